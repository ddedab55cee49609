// The single list of named tensors. Parameters, gradients, optimizer state, checkpoints, import and
// export all walk this table, and nobody else computes an offset.
//
// Order and packing. Tensors that one op reads as one matrix are neighbours without a gap, so that
// q|k|v weights, q|k|v biases and gate|up weights need no copy under their Hugging Face names:
//   matrices  embed, then per layer: qkv, o, and dense: gate, up, down   MoE: (gate, up) of expert
//             0, (gate, up) of expert 1, ..., all downs; lm_head (untied only)
//   vectors   per layer: input norm, qkv biases, q/k norms, post-attention norm; final norm
//   routers   which stay fp32 on every backend
// Matrices lie together because their gradients are assigned by the first micro-batch of a step,
// which leaves one short range to zero, and because the optimizer then makes few calls. Each packed
// group starts at a multiple of TENSOR_ALIGN elements.
// The arenas (parameters, gradients, m, v) share these element offsets; gaps hold zeros for ever.
//
// Where ranks share the experts of a layer (TableLayout.expert_ranks), a rank's table lists those
// that it has, under the names that they have in the whole model.
#ifndef MODEL_TENSOR_TABLE_H
#define MODEL_TENSOR_TABLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "base/status.h"
#include "model/config.h"

enum { TENSOR_ALIGN = 128, TENSOR_NAME_MAX = 96 };

typedef enum TensorRole {
    ROLE_EMBED,
    ROLE_NORM, // any RMSNorm weight
    ROLE_QKV_WEIGHT,
    ROLE_QKV_BIAS,
    ROLE_O_WEIGHT,
    ROLE_GATE,
    ROLE_UP,
    ROLE_DOWN,
    ROLE_ROUTER,
    ROLE_LM_HEAD,
} TensorRole;

typedef struct Tensor {
    char name[TENSOR_NAME_MAX]; // Hugging Face name
    TensorRole role;
    int layer;  // -1 outside layers
    int expert; // -1 outside experts
    int ndim;
    int64_t shape[2];
    int64_t count;  // elements
    int64_t offset; // elements into the arenas
} Tensor;

// Element offsets of what the ops of one layer read; -1 where the layer has no such tensor.
typedef struct LayerOffsets {
    int64_t input_norm, qkv_weight, qkv_bias, q_norm, k_norm, o_weight, post_norm;
    int64_t gate_up, down; // dense, or expert 0 of the packed (N, 2I, H) and (N, H, I)
    int64_t router;        // (N, H) fp32
} LayerOffsets;

// How the table of a rank differs from that of the whole model on its own. Zeros: it does not.
typedef struct TableLayout {
    // The sections of the arenas - embedding, each layer's matrices, LM head, vectors; with
    // expert_ranks also the experts of a layer - begin at multiples of so many elements, itself a
    // multiple of TENSOR_ALIGN, so that each section can be cut by itself. 0: TENSOR_ALIGN.
    int64_t section;
    // Rank r of so many has experts [r N/E, (r + 1) N/E) of each MoE layer. 0 and 1: all.
    int expert_ranks, expert_rank;
} TableLayout;

typedef struct TensorTable {
    TableLayout layout;
    Tensor *tensors;
    int count;
    const Tensor **by_name; // (count) the same tensors, sorted by name
    LayerOffsets *layers;   // (num_layers)
    int num_layers;
    int64_t embed, final_norm, lm_head; // lm_head == embed when tied
    int64_t vectors_begin;              // first element behind the matrices
    int64_t total;                      // elements of an arena, gaps included
    int64_t router_begin;               // first element of the fp32 tail; multiple of TENSOR_ALIGN
    int64_t expert_elements;            // of sections that hold shared-out experts, gaps included
    int64_t parameters;                 // of the whole model, without gaps
    int64_t active_parameters; // per token: experts counted top_k times; embedding counted once
} TensorTable;

// `config` has passed config_validate. Fails on more elements than can be addressed, or no memory.
Status tensor_table_build(const ModelConfig *config, TensorTable *out) NODISCARD;
// STATUS_USAGE where expert_ranks does not divide the experts of every MoE layer.
Status tensor_table_build_layout(const ModelConfig *config, const TableLayout *layout,
                                 TensorTable *out) NODISCARD;
void tensor_table_free(TensorTable *table);
// Lengthens the gaps at the end of the body (before router_begin) and at the end of the arena, so
// that both divide into `ranks` parts of a multiple of TENSOR_ALIGN elements. With 1, which changes
// nothing, and with more the tensors, their names and their order stay what they are.
Status tensor_table_pad(TensorTable *table, int ranks) NODISCARD;
// Where the matrices of a layer end: where the next section begins.
int64_t tensor_table_layer_end(const TensorTable *table, int layer);
// Whether the experts of this layer are shared out, and their section begins at its gate_up.
bool tensor_table_shares_experts(const TensorTable *table, int layer);
const Tensor *tensor_table_find(const TensorTable *table, const char *name); // NULL if absent

// Byte offset of element `offset` in the working-copy arena, whose body has `compute` dtype and
// whose router tail is fp32; pass table->total for the arena's size.
size_t tensor_table_copy_bytes(const TensorTable *table, DType compute, int64_t offset);

// How many elements of the tensor lie within [begin, end) of the arenas, and which is the first.
int64_t tensor_part(const Tensor *tensor, int64_t begin, int64_t end, int64_t *first);

// True for the tensors that weight decay applies to: matrices, but not norms, biases, routers, and
// embeddings only when decay_embeddings.
bool tensor_decays(const Tensor *tensor, bool decay_embeddings);

#endif
