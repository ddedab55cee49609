// Model configurations: what is allowed, and the canonical JSON form that checkpoints compare.
//
// A config that passes config_validate is safe to compute sizes from: every member is in a range in
// which the products the engine forms (a packed q|k|v row, one expert's matrix) fit their types;
// sums over the whole model are checked where they are formed (tensor_table.c).
#include "model/config.h"

#include <math.h>
#include <string.h>

enum {
    MAX_HIDDEN = 1 << 20,
    MAX_INTERMEDIATE = 1 << 22,
    MAX_HEADS = 4096,
    MAX_HEAD_DIM = 1024,
    MAX_VOCAB = 1 << 24,
    MAX_POSITIONS = 1 << 30,
};

// --- Names ---------------------------------------------------------------------------------------

static const char *const family_names[] = {
    [FAMILY_QWEN2] = "qwen2",
    [FAMILY_LLAMA] = "llama",
    [FAMILY_QWEN3] = "qwen3",
};
static const char *const gate_names[] = {
    [GATE_SOFTMAX] = "softmax",
    [GATE_RENORM] = "renorm",
    [GATE_STRAIGHT_THROUGH] = "straight_through",
};
enum { NUM_FAMILIES = sizeof family_names / sizeof family_names[0] };
enum { NUM_GATES = sizeof gate_names / sizeof gate_names[0] };

const char *config_family_name(ModelFamily family) {
    return family_names[family];
}

const char *config_gate_name(RouterGate gate) {
    return gate_names[gate];
}

bool config_gate_parse(const char *name, RouterGate *out) {
    for (int i = 0; i < NUM_GATES; i++) {
        if (strcmp(name, gate_names[i]) != 0) continue;
        *out = (RouterGate)i;
        return true;
    }
    return false;
}

static bool family_parse(const char *name, ModelFamily *out) {
    for (int i = 0; i < NUM_FAMILIES; i++) {
        if (strcmp(name, family_names[i]) != 0) continue;
        *out = (ModelFamily)i;
        return true;
    }
    return false;
}

bool config_has_moe(const ModelConfig *c) {
    for (int layer = 0; layer < c->num_layers; layer++)
        if (config_layer_is_moe(c, layer)) return true;
    return false;
}

static bool has_dense(const ModelConfig *c) {
    for (int layer = 0; layer < c->num_layers; layer++)
        if (!config_layer_is_moe(c, layer)) return true;
    return false;
}

// --- Validation ----------------------------------------------------------------------------------

static Status check_range(const char *name, const char *key, int64_t value, int64_t min,
                          int64_t max) {
    if (value < min || value > max) {
        FAIL(STATUS_BAD_DATA, "%s: %s is %lld, expected %lld to %lld", name, key, (long long)value,
             (long long)min, (long long)max);
    }
    return STATUS_OK;
}

static Status check_attention(const ModelConfig *c, const char *name) {
    TRY(check_range(name, "num_attention_heads", c->num_heads, 1, MAX_HEADS));
    TRY(check_range(name, "num_key_value_heads", c->num_kv_heads, 1, c->num_heads));
    TRY(check_range(name, "head_dim", c->head_dim, 2, MAX_HEAD_DIM));
    if (c->num_heads % c->num_kv_heads) {
        FAIL(STATUS_BAD_DATA,
             "%s: num_attention_heads %d is not a multiple of num_key_value_heads %d", name,
             c->num_heads, c->num_kv_heads);
    }
    if (c->head_dim % 2)
        FAIL(STATUS_BAD_DATA, "%s: head_dim is %d, expected an even number (rotary pairs)", name,
             c->head_dim);
    if (!isfinite(c->rope_theta) || c->rope_theta <= 0)
        FAIL(STATUS_BAD_DATA, "%s: rope_theta is %g, expected a positive number", name,
             c->rope_theta);
    return STATUS_OK;
}

// What each family's Hugging Face implementation computes; other mixtures have no name to be
// written under.
static Status check_family(const ModelConfig *c, const char *name) {
    TRY(check_range(name, "family", c->family, 0, NUM_FAMILIES - 1));
    if (c->qk_norm != (c->family == FAMILY_QWEN3)) {
        FAIL(STATUS_BAD_DATA, "%s: family %s %s QK-norm, but the config says %s", name,
             config_family_name(c->family), c->family == FAMILY_QWEN3 ? "has" : "has no",
             c->qk_norm ? "yes" : "no");
    }
    if (c->qkv_bias && c->family != FAMILY_QWEN2) {
        FAIL(STATUS_BAD_DATA, "%s: family %s has no QKV bias, but the config says yes", name,
             config_family_name(c->family));
    }
    return STATUS_OK;
}

static Status check_router(const ModelConfig *c, const char *name) {
    TRY(check_range(name, "router.gate", c->router.gate, 0, NUM_GATES - 1));
    if (!isfinite(c->router.gate_scale) || c->router.gate_scale <= 0)
        FAIL(STATUS_BAD_DATA, "%s: router.gate_scale is %g, expected a positive number", name,
             (double)c->router.gate_scale);
    return STATUS_OK;
}

static Status check_layer(const ModelConfig *c, const char *name, int layer) {
    const LayerConfig *l = &c->layers[layer];
    if (l->num_experts < 0 || l->num_experts > MODEL_MAX_EXPERTS) {
        FAIL(STATUS_BAD_DATA, "%s: layer %d has num_experts %d, expected 0 (dense) to %d", name,
             layer, l->num_experts, MODEL_MAX_EXPERTS);
    }
    int min = l->num_experts ? 1 : 0;
    if (l->top_k < min || l->top_k > l->num_experts) {
        FAIL(STATUS_BAD_DATA, "%s: layer %d has top_k %d, expected %d to num_experts = %d", name,
             layer, l->top_k, min, l->num_experts);
    }
    // A renormalised single gate is always 1: the router would never learn from the text.
    if (l->num_experts > 1 && l->top_k == 1 && c->router.gate == GATE_RENORM) {
        FAIL(STATUS_BAD_DATA,
             "%s: gate renorm with top_k 1 (layer %d) gives the router no language-model gradient; "
             "use gate straight_through (same values, with a gradient) or softmax",
             name, layer);
    }
    return STATUS_OK;
}

Status config_validate(const ModelConfig *c, const char *name) {
    TRY(check_range(name, "hidden_size", c->hidden_size, 1, MAX_HIDDEN));
    TRY(check_range(name, "num_hidden_layers", c->num_layers, 1, MODEL_MAX_LAYERS));
    TRY(check_range(name, "vocab_size", c->vocab_size, 1, MAX_VOCAB));
    TRY(check_range(name, "max_position_embeddings", c->max_position_embeddings, 1, MAX_POSITIONS));
    TRY(check_range(name, "bos_token_id", c->bos_token_id, -1, c->vocab_size - 1));
    TRY(check_range(name, "eos_token_id", c->eos_token_id, -1, c->vocab_size - 1));
    if (!isfinite(c->rms_norm_eps) || c->rms_norm_eps <= 0 || c->rms_norm_eps > 1)
        FAIL(STATUS_BAD_DATA, "%s: rms_norm_eps is %g, expected above 0 and at most 1", name,
             c->rms_norm_eps);
    TRY(check_attention(c, name));
    TRY(check_family(c, name));
    for (int layer = 0; layer < c->num_layers; layer++) TRY(check_layer(c, name, layer));
    // The width that no layer uses may be anything that is not negative.
    TRY(check_range(name, "intermediate_size", c->intermediate_size, has_dense(c) ? 1 : 0,
                    MAX_INTERMEDIATE));
    TRY(check_range(name, "moe_intermediate_size", c->moe_intermediate_size,
                    config_has_moe(c) ? 1 : 0, MAX_INTERMEDIATE));
    if (config_has_moe(c)) TRY(check_router(c, name));
    return STATUS_OK;
}

// --- The canonical form --------------------------------------------------------------------------

// The integer members, in one list for both directions.
#define CANONICAL_INTS(X)                                                                          \
    X(hidden_size, MAX_HIDDEN)                                                                     \
    X(num_layers, MODEL_MAX_LAYERS)                                                                \
    X(num_heads, MAX_HEADS)                                                                        \
    X(num_kv_heads, MAX_HEADS)                                                                     \
    X(head_dim, MAX_HEAD_DIM)                                                                      \
    X(intermediate_size, MAX_INTERMEDIATE)                                                         \
    X(moe_intermediate_size, MAX_INTERMEDIATE)                                                     \
    X(vocab_size, MAX_VOCAB)                                                                       \
    X(max_position_embeddings, MAX_POSITIONS)                                                      \
    X(bos_token_id, MAX_VOCAB)                                                                     \
    X(eos_token_id, MAX_VOCAB)
#define CANONICAL_BOOLS(X)                                                                         \
    X(tie_word_embeddings)                                                                         \
    X(qkv_bias)                                                                                    \
    X(qk_norm)

static json_t *layers_to_json(const ModelConfig *c) {
    json_t *layers = json_array();
    for (int i = 0; i < c->num_layers; i++) {
        json_t *layer = json_pack("{s:i, s:i}", "num_experts", c->layers[i].num_experts, "top_k",
                                  c->layers[i].top_k);
        if (json_array_append_new(layers, layer) != 0) {
            json_decref(layers);
            return NULL;
        }
    }
    return layers;
}

Status config_to_canonical(const ModelConfig *c, json_t **out) {
    int failed = 0;
    json_t *root = json_object();
    failed |= json_object_set_new(root, "family", json_string(config_family_name(c->family)));
#define X(key, max) failed |= json_object_set_new(root, #key, json_integer(c->key));
    CANONICAL_INTS(X)
#undef X
#define X(key) failed |= json_object_set_new(root, #key, json_boolean(c->key));
    CANONICAL_BOOLS(X)
#undef X
    failed |= json_object_set_new(root, "rope_theta", json_real(c->rope_theta));
    failed |= json_object_set_new(root, "rms_norm_eps", json_real(c->rms_norm_eps));
    failed |= json_object_set_new(
        root, "router",
        json_pack("{s:s, s:f, s:b}", "gate", config_gate_name(c->router.gate), "gate_scale",
                  (double)c->router.gate_scale, "input_is_raw", c->router.input_is_raw));
    failed |= json_object_set_new(root, "layers", layers_to_json(c));
    if (failed) {
        json_decref(root);
        FAIL(STATUS_INTERNAL, "cannot build the JSON form of a model config");
    }
    *out = root;
    return STATUS_OK;
}

static Status get_int(const json_t *object, const char *name, const char *key, int64_t min,
                      int64_t max, int *out) {
    int64_t value;
    TRY(json_get_int(object, name, key, min, max, &value));
    *out = (int)value;
    return STATUS_OK;
}

static Status router_from_json(const json_t *root, const char *name, RouterConfig *out) {
    json_t *router;
    char gate[32];
    double scale;
    TRY(json_get_object(root, name, "router", &router));
    TRY(json_get_text(router, name, "gate", gate, sizeof gate));
    if (!config_gate_parse(gate, &out->gate))
        FAIL(STATUS_BAD_DATA,
             "%s: router.gate is \"%s\", expected softmax, renorm or "
             "straight_through",
             name, gate);
    TRY(json_get_real(router, name, "gate_scale", &scale));
    out->gate_scale = (float)scale;
    TRY(json_get_bool(router, name, "input_is_raw", &out->input_is_raw));
    return STATUS_OK;
}

static Status layers_from_json(const json_t *root, const char *name, ModelConfig *out) {
    json_t *layers;
    TRY(json_get_array(root, name, "layers", &layers));
    if (json_array_size(layers) != (size_t)out->num_layers) {
        FAIL(STATUS_BAD_DATA, "%s: layers has %zu entries, expected num_layers = %d", name,
             json_array_size(layers), out->num_layers);
    }
    for (int i = 0; i < out->num_layers; i++) {
        const json_t *layer = json_array_get(layers, (size_t)i);
        LayerConfig *l = &out->layers[i];
        TRY(get_int(layer, name, "num_experts", 0, MODEL_MAX_EXPERTS, &l->num_experts));
        TRY(get_int(layer, name, "top_k", 0, MODEL_MAX_EXPERTS, &l->top_k));
    }
    return STATUS_OK;
}

Status config_from_canonical(const json_t *root, const char *name, ModelConfig *out) {
    memset(out, 0, sizeof *out);
    char family[32];
    TRY(json_get_text(root, name, "family", family, sizeof family));
    if (!family_parse(family, &out->family))
        FAIL(STATUS_BAD_DATA, "%s: family is \"%s\", expected qwen2, llama or qwen3", name, family);
    int64_t value;
#define X(key, max)                                                                                \
    TRY(json_get_int(root, name, #key, -1, max, &value));                                          \
    out->key = (__typeof__(out->key))value;
    CANONICAL_INTS(X)
#undef X
#define X(key) TRY(json_get_bool(root, name, #key, &out->key));
    CANONICAL_BOOLS(X)
#undef X
    TRY(json_get_real(root, name, "rope_theta", &out->rope_theta));
    TRY(json_get_real(root, name, "rms_norm_eps", &out->rms_norm_eps));
    TRY(router_from_json(root, name, &out->router));
    // Read before validation, which would otherwise be the first to look at these bounds.
    if (out->num_layers < 1)
        FAIL(STATUS_BAD_DATA, "%s: num_layers is %d, expected at least 1", name, out->num_layers);
    TRY(layers_from_json(root, name, out));
    TRY(config_validate(out, name));
    return STATUS_OK;
}
