// The activation arena of a model: where every intermediate result of a forward and backward pass
// lives. Planned once from config and options; model/ only.
//
// Two blocks of device memory:
//   kept    what the forward pass saves for the backward pass, per layer ("activations")
//   shared  one layer's worth of everything that is not kept, inputs, gradients of activations,
//           statistics ("activation buffers")
// Which buffer is kept follows from ModelOptions:
//   evaluation         nothing is kept; the residual stream is one buffer, updated in place
//   training           all of a layer is kept, but
//     recompute norms    the normed rows are shared and made again from the residual stream
//     recompute swiglu   the activation of a dense MLP is workspace of the op
//     recompute layer    only the layer's input is kept; all else is made again, layer by layer
#ifndef MODEL_ACTIVATIONS_H
#define MODEL_ACTIVATIONS_H

#include "model/model.h"

// Below: T = tokens of the largest micro-batch, H hidden size, Q width of a packed q|k|v row.

// What backward reads of rows that this rank's experts have received, where experts are shared out
// (model/expert_parallel.h).
typedef struct RowBuffers {
    void *x;                            // (rows, H)
    void *gate_up;                      // (rows, 2I)
    float *gate;                        // (rows)
    int32_t *slot_of_row, *row_of_slot; // (rows)
} RowBuffers;

// The rows of one layer: at `place` of the pool, or, with -1, in the scratch, where those of
// another layer may follow.
typedef struct ReceivedRows {
    int64_t place;
    int32_t *expert_begin; // (ranks, N/E + 1) of a Routing of them
    int32_t *begin;        // (ranks, N + 1) every rank's expert_begin; host memory
    bool known;            // `begin` is of this pass
} ReceivedRows;

enum { TRAVEL_ROWS_ALIGN = 128 };
typedef struct TravelBuffers {
    int64_t most, pool_rows; // R: what one layer can receive; what the pool holds
    RowBuffers pool;         // (pool_rows) of all layers, in the order of the forward pass
    RowBuffers scratch;      // (R)
    int scratch_layer;       // whose rows are there; -1: nobody's
    void *sent;              // (T*k, H)
    float *sent_floats;      // (T*k)
    void *out;               // (R, H) of the experts, or their dx
    void *dout;              // (R, H)
    float *d_gate;           // (R)
    int32_t *begin;          // (ranks, N + 1)
    int32_t *host_index;     // (2R + ranks (N/E + 1)) host memory, to make a routing in
    int64_t *used;           // (ranks) rows in each rank's pool; host memory
} TravelBuffers;

typedef struct LayerActivations {
    void *input;          // (T, H) residual stream that enters the layer
    float *input_inv_rms; // (T)
    void *input_normed;   // (T, H) what attention reads
    void *qkv;            // (T, Q) as projected
    float *qk_inv_rms;    // (T, heads + kv heads), QK-norm only
    void *rotated;        // (T, Q) after rotary embedding; == qkv without QK-norm
    void *attention;      // (T, heads * head_dim)
    float *log_sum_exp;   // (T * heads)
    void *middle;         // (T, H) residual stream after attention: h_l of METHOD.md
    float *middle_inv_rms;
    void *middle_normed; // (T, H) what the MLP reads
    void *gate_up;       // (T, 2I), or (T*k, 2I) grouped by expert; NULL with shared-out experts
    void *activation;    // (T, I) of dense layers, or NULL: recomputed
    Routing routing;     // MoE layers
    ReceivedRows received;
} LayerActivations;

typedef struct Activations {
    LayerActivations *layers; // (num_layers)
    void *kept, *shared, *workspace;
    uint64_t kept_bytes, shared_bytes, workspace_bytes;

    int32_t *ids, *targets, *document_start; // (T)
    void *stream;                            // (T, H) residual stream where layers share one
    void *branch; // (T, H) output of attention or MLP, not yet added to the stream
    void *output; // (T, H) residual stream after the last layer
    float *output_inv_rms;
    void *output_normed; // (T, H)
    void *logits;        // (logits_rows, V) compute dtype
    float *logits_f32;   // the same in fp32; == logits on an fp32 backend
    int64_t logits_rows;

    void *d_stream;    // (T, H) gradient of the residual stream, updated in place
    void *d_normed;    // (T, H) gradient of what attention or MLP read
    void *d_qkv;       // (T, Q)
    void *d_attention; // (T, heads * head_dim)
    float *d_gate;     // (T, largest k)
    TravelBuffers rows;
    int32_t *host_begins; // of all layers' received.begin

    int stride;            // largest expert count of any layer, at least 1
    double *sums;          // (activations_sums_count())
    float *load;           // (num_layers, stride) f_i of the global balance loss
    float *selection_bias; // (num_layers, stride)
    bool use_selection_bias;

    double *host_sums;    // host copy for model_read_sums
    double router_tokens; // tokens of the forward passes since model_reset_sums
    ModelObserver observer;
    void *observer_context;
} Activations;

// Lays the arena out for model->config and model->options without allocating device memory: sizes
// are set, pointers are NULL, workspace_bytes is 0. model->activations receives it.
Status activations_create(Model *model) NODISCARD;
// Allocates kept, shared and workspace (of workspace_bytes) and sets all pointers.
Status activations_allocate(Model *model) NODISCARD;
void activations_destroy(Model *model); // NULL activations are fine

// The statistics, on the device and in host_sums: loss sum, loss count, then per layer assignments
// (stride), probability (stride), entropy, z.
size_t activations_sums_count(const Model *model);
size_t activations_sums_index(const Model *model, int layer); // of a layer's first
RouterSums activations_layer_sums(const Model *model, int layer);

#endif
