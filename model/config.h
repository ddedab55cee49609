// What a model is, as data. One code path serves Qwen2/2.5 (QKV bias), Llama (no bias) and Qwen3
// (QK-norm); layers with a dense MLP and layers with experts mix freely.
#ifndef MODEL_CONFIG_H
#define MODEL_CONFIG_H

#include <stdbool.h>
#include <stdint.h>
#include "base/json.h"
#include "base/status.h"
#include "model/backend.h"

typedef enum ModelFamily { FAMILY_QWEN2, FAMILY_LLAMA, FAMILY_QWEN3 } ModelFamily;

enum { MODEL_MAX_LAYERS = 1024, MODEL_MAX_EXPERTS = 256 };

// num_experts == 0 means a dense MLP of intermediate_size.
typedef struct LayerConfig {
    int num_experts;
    int top_k;
} LayerConfig;

typedef struct RouterConfig {
    RouterGate gate;
    float gate_scale;  // multiplies every gate; folded into down_proj at export
    bool input_is_raw; // router sees h instead of RMSNorm(h)·w (METHOD.md §4)
} RouterConfig;

typedef struct ModelConfig {
    ModelFamily family;
    int hidden_size;
    int num_layers;
    int num_heads, num_kv_heads, head_dim;
    int intermediate_size;     // dense MLP
    int moe_intermediate_size; // each expert
    int vocab_size;
    int max_position_embeddings;
    double rope_theta;
    double rms_norm_eps;
    bool tie_word_embeddings;
    bool qkv_bias;
    bool qk_norm;
    int64_t bos_token_id, eos_token_id; // -1 = not given
    RouterConfig router;
    LayerConfig layers[MODEL_MAX_LAYERS];
} ModelConfig;

// Width of a packed q|k|v row.
static inline int config_qkv_size(const ModelConfig *c) {
    return (c->num_heads + 2 * c->num_kv_heads) * c->head_dim;
}
static inline bool config_layer_is_moe(const ModelConfig *c, int layer) {
    return c->layers[layer].num_experts > 0;
}
bool config_has_moe(const ModelConfig *c);
const char *config_family_name(ModelFamily family); // "qwen2", "llama", "qwen3"
const char *config_gate_name(RouterGate gate);      // "softmax", "renorm", "straight_through"
bool config_gate_parse(const char *name, RouterGate *out);

// Ranges and divisibility (head counts, rotary dimension, top_k <= num_experts, renorm with k = 1
// refused, ...): STATUS_BAD_DATA. `name` opens the message.
Status config_validate(const ModelConfig *c, const char *name) NODISCARD;

// Hugging Face config.json <-> ModelConfig. model_type qwen2, llama, qwen3, qwen2_moe, qwen3_moe.
// Refuses by name whatever the engine does not compute (rope scaling, sliding window, other
// activations, attention bias in Llama, shared experts of non-zero width, ...): STATUS_BAD_DATA.
Status config_from_json(const json_t *root, const char *name, ModelConfig *out) NODISCARD;
// A new object; MoE models become qwen2_moe (qwen3_moe with qk_norm). STATUS_USAGE when the layers
// cannot be expressed (different expert counts).
Status config_to_json(const ModelConfig *c, DType dtype, json_t **out) NODISCARD;

// A canonical JSON object of everything that decides tensor shapes and mathematics, for checkpoint
// state and its comparison key by key. Round-trips through config_from_canonical exactly.
Status config_to_canonical(const ModelConfig *c, json_t **out) NODISCARD;
Status config_from_canonical(const json_t *root, const char *name, ModelConfig *out) NODISCARD;

#endif
