// A model on a backend: weights, gradients, activations, forward and backward, written once for
// every family and layer kind by walking the config's layer list.
//
// Memory is planned before it is taken (model_plan) and taken once (model_create); nothing is
// allocated afterwards. Parameter gradients accumulate over micro-batches until
// model_zero_gradients.
#ifndef MODEL_MODEL_H
#define MODEL_MODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "base/batch.h"
#include "base/memory_plan.h"
#include "base/status.h"
#include "model/backend.h"
#include "model/communicator.h"
#include "model/config.h"
#include "model/gradient_window.h"
#include "model/source.h"
#include "model/tensor_table.h"

// What backward computes again instead of keeping, per class of activation.
typedef struct Recompute {
    bool swiglu; // the product silu(gate)*up of dense layers, (T, I)
    bool norms;  // RMSNorm outputs, 2 x (T, H) a layer
    bool layer;  // everything inside a layer but its input; implies the others
} Recompute;

typedef struct ModelOptions {
    int64_t micro_batch;     // B, sequences per micro-batch
    int64_t sequence_length; // S
    bool training;           // gradients and saved activations are needed
    Recompute recompute;
    int64_t loss_chunk_tokens; // rows of logits at once; 0 = the backend's choice
    int ranks; // that share the arenas in equal parts (tensor_table_pad); 0 and 1: just this one
    bool share_gradients; // no rank keeps them all: model/gradient_window.h
    // Rank expert_rank of expert_ranks that share the experts of each layer (TableLayout); 0 and
    // 1: just this one. Set Model.experts before the first pass then.
    int expert_ranks, expert_rank;
    // Room to keep what backward reads of the rows that this rank's experts receive: so many times
    // as many as all layers have if every rank gets the same. What does not fit is made again.
    double expert_room;
} ModelOptions;

enum { MODEL_EXPERT_RANKS_MAX = 64 };

// Weights of the training objective for one micro-batch (METHOD.md §5).
typedef struct LossWeights {
    double target_count; // valid targets of the whole step: CE is a mean over them
    double token_count;  // tokens of the whole step, over all ranks: router means are over them
    double balance;      // α
    double z;            // ζ
    bool balance_micro;  // f_i from this micro-batch; else the load set by model_set_load
} LossWeights;

// Sums since model_reset_sums, on the host. Element (l, e) of an array (num_layers, stride) is at
// l * stride + e; experts that a layer does not have, and dense layers, hold zeros.
typedef struct ModelSums {
    double loss_sum, loss_count; // Σ -log p, and over how many targets
    double tokens;               // tokens that went through the layers
    int stride;                  // largest expert count of any layer, at least 1
    double *assignments;         // (num_layers, stride)
    double *probability;         // (num_layers, stride)
    double *entropy;             // (num_layers)
    double *z;                   // (num_layers)
} ModelSums;

typedef enum ObservePoint { OBSERVE_MLP_INPUT, OBSERVE_LAYER_OUTPUT } ObservePoint;
// Called during model_forward and model_logits with the residual stream (T, H) after attention
// (h_l) and after the layer (y_l); `x` is device memory that is valid during the call only.
typedef Status (*ModelObserver)(void *context, int layer, ObservePoint point, const void *x,
                                int64_t tokens);

// What a pass tells about weights and gradients, so that they can travel between ranks while it
// runs (optim/traffic.h). Either function may be NULL. "Matrices" are [0, table.vectors_begin).
typedef struct ModelHooks {
    void *context;
    // The forward pass is about to read the matrices' elements [0, end), and any of the others.
    Status (*weights_needed)(void *context, int64_t end);
    // The backward pass adds nothing more to the matrices' elements from `from` on, which falls
    // from call to call; 0 = nothing more to any gradient.
    Status (*gradients_final)(void *context, int64_t from);
    // Only with share_gradients: the matrices' gradients from element `from` on, which are final,
    // are about to be written over.
    Status (*gradients_reused)(void *context, int64_t from);
} ModelHooks;

// Elements [begin, begin + count) of the fp32 weights, where a rank has only some of them.
typedef struct MasterPart {
    int64_t begin, count;
    float *values; // device memory
} MasterPart;

typedef struct Model {
    Backend *backend;
    ModelConfig config;
    TensorTable table;
    ModelOptions options;
    void *params;  // working copy (tensor_table_copy_bytes)
    float *master; // fp32 arena AdamW updates; the same memory as params on an fp32 backend; NULL
                   // on other backends when not training, or when ranks share it
    const MasterPart *master_parts; // the optimizer's, where ranks share it; loading fills them
    int num_master_parts;
    void *grads; // grad_dtype with an fp32 router tail (byte offsets by model_gradient_bytes); NULL
                 // when not training
    GradientWindow window;
    bool no_gradients_yet; // since model_zero_gradients: the next backward assigns the matrices'
    struct Activations *activations; // model/activations.h
    struct Replay *replay;           // model/replay.h; NULL when not training
    const ModelHooks *hooks;         // of the next model_forward_backward; NULL = none
    Communicator *experts; // of the ranks that share the experts, not owned; NULL: none do
} Model;

// Adds exactly what model_create allocates, without allocating it: "parameters", "master weights"
// (where the working copy is not fp32), "gradients", "activations" (kept for backward),
// "activation buffers" (shared by layers), "workspace". The workspace covers the optimizer's ops
// and row_similarity, too.
Status model_plan(Backend *backend, const ModelConfig *config, const ModelOptions *options,
                  MemoryPlan *plan) NODISCARD;
// The table of a model with these options: padded for the ranks, and in sections where they share
// gradients.
Status model_table(const ModelConfig *config, const ModelOptions *options,
                   TensorTable *out) NODISCARD;
Status model_create(Backend *backend, const ModelConfig *config, const ModelOptions *options,
                    Model **out) NODISCARD;
void model_destroy(Model *model);

Status model_load(Model *model, TensorSource *source) NODISCARD; // configs must agree in shape
// Normal(0, stddev) for matrices, router included; 1 for norms; 0 for biases. A pure function of
// seed and tensor name.
Status model_init_random(Model *model, uint64_t seed, float stddev) NODISCARD;
// The model's weights as a source (master precision where there is a master). Valid while the model
// lives.
Status model_source(Model *model, TensorSource **out) NODISCARD;

// Byte offset in the gradients of element `offset` of the arenas.
size_t model_gradient_bytes(const Model *model, int64_t offset);
// The gradients count as zero from here on. Those of matrices still hold what they held: the next
// model_forward_backward assigns them. Read none in between.
Status model_zero_gradients(Model *model) NODISCARD;
// A micro-batch holds up to micro_batch sequences of up to sequence_length tokens, or one sequence
// of up to micro_batch * sequence_length.
//
// Forward only; adds to the sums. Without targets (NULL) the LM head and the loss are left out.
Status model_forward(Model *model, const MicroBatch *batch) NODISCARD;
// Forward and backward of loss = CE + α·LB + ζ·Z; adds to the sums and the gradients. With
// share_gradients there is no adding: model_zero_gradients comes before each micro-batch, and the
// hooks take the gradients away.
Status model_forward_backward(Model *model, const MicroBatch *batch,
                              const LossWeights *weights) NODISCARD;
// Logits (tokens, V) in fp32 on the host for one sequence; tokens <= B*S.
Status model_logits(Model *model, const int32_t *ids, int64_t tokens, float *logits) NODISCARD;

// f_i (share of assignments) per layer and expert for balance = global (zero, i.e. no balance
// gradient, until set), and the selection bias b_i of aux-loss-free balancing (off until set; NULL
// turns it off); host arrays of (num_layers, stride).
int model_sums_stride(const Model *model);
Status model_set_load(Model *model, const float *load) NODISCARD;
Status model_set_selection_bias(Model *model, const float *bias) NODISCARD;

Status model_reset_sums(Model *model) NODISCARD;
Status model_sums_create(const Model *model, ModelSums *out) NODISCARD;
void model_sums_free(ModelSums *sums);
Status model_read_sums(Model *model, ModelSums *out) NODISCARD; // waits for the device

void model_set_observer(Model *model, ModelObserver observer, void *context);

#endif
