// Hugging Face config.json <-> ModelConfig.
//
// A config.json names a class of transformers, and every key the class knows may change what the
// model computes. So reading is a list of refusals as much as of values: what this engine does not
// compute is refused by its key, and what is absent takes the default of transformers' class, not
// one of our own. Both generations of spelling are understood: rope_theta and torch_dtype
// (transformers 4), rope_parameters and dtype (5). Writing sets both, and also every key whose
// default in transformers differs from what the model needs.
#include "model/config.h"

#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <string.h>
#include "base/log.h"

enum { QWEN3_HEAD_DIM = 128 };                    // the default of Qwen3Config
static const double default_rope_theta = 10000.0; // of all five classes

typedef struct ModelType {
    const char *name, *architecture;
    ModelFamily family;
    bool moe;
} ModelType;

enum { TYPE_QWEN2, TYPE_LLAMA, TYPE_QWEN3, TYPE_QWEN2_MOE, TYPE_QWEN3_MOE };
static const ModelType types[] = {
    [TYPE_QWEN2] = {"qwen2", "Qwen2ForCausalLM", FAMILY_QWEN2, false},
    [TYPE_LLAMA] = {"llama", "LlamaForCausalLM", FAMILY_LLAMA, false},
    [TYPE_QWEN3] = {"qwen3", "Qwen3ForCausalLM", FAMILY_QWEN3, false},
    [TYPE_QWEN2_MOE] = {"qwen2_moe", "Qwen2MoeForCausalLM", FAMILY_QWEN2, true},
    [TYPE_QWEN3_MOE] = {"qwen3_moe", "Qwen3MoeForCausalLM", FAMILY_QWEN3, true},
};

// --- Getters: an absent key and null mean the default --------------------------------------------

static Status get_size(const json_t *root, const char *name, const char *key, int max, int *out) {
    int64_t value;
    TRY(json_get_int(root, name, key, 1, max, &value));
    *out = (int)value;
    return STATUS_OK;
}

static Status optional_int(const json_t *root, const char *name, const char *key, int64_t min,
                           int64_t max, int *value) {
    if (!json_has(root, key)) return STATUS_OK;
    int64_t wide;
    TRY(json_get_int(root, name, key, min, max, &wide));
    *value = (int)wide;
    return STATUS_OK;
}

static Status optional_real(const json_t *root, const char *name, const char *key, double *value) {
    return json_has(root, key) ? json_get_real(root, name, key, value) : STATUS_OK;
}

static Status optional_bool(const json_t *root, const char *name, const char *key, bool *value) {
    return json_has(root, key) ? json_get_bool(root, name, key, value) : STATUS_OK;
}

// --- What is refused -----------------------------------------------------------------------------

static Status read_type(const json_t *root, const char *name, const ModelType **out) {
    char text[64];
    TRY(json_get_text(root, name, "model_type", text, sizeof text));
    *out = NULL;
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++)
        if (strcmp(text, types[i].name) == 0) *out = &types[i];
    if (!*out) {
        FAIL(STATUS_BAD_DATA,
             "%s: model_type \"%s\" is not supported, expected qwen2, llama, qwen3, qwen2_moe or "
             "qwen3_moe",
             name, text);
    }
    // A classifier or a bare Qwen2Model of the same type has other tensors.
    const json_t *architecture = json_array_get(json_object_get(root, "architectures"), 0);
    if (architecture && (!json_is_string(architecture) ||
                         strcmp(json_string_value(architecture), (*out)->architecture) != 0)) {
        FAIL(STATUS_BAD_DATA, "%s: architectures holds \"%.64s\", expected \"%s\"", name,
             json_is_string(architecture) ? json_string_value(architecture) : "?",
             (*out)->architecture);
    }
    return STATUS_OK;
}

static Status refuse_true(const json_t *root, const char *name, const char *key,
                          const char *reason) {
    bool value = false;
    TRY(optional_bool(root, name, key, &value));
    if (value) FAIL(STATUS_BAD_DATA, "%s: %s = true is not supported: %s", name, key, reason);
    return STATUS_OK;
}

static Status refuse_present(const json_t *root, const char *name, const char *key,
                             const char *reason) {
    if (json_has(root, key))
        FAIL(STATUS_BAD_DATA, "%s: %s is not supported: %s", name, key, reason);
    return STATUS_OK;
}

static Status refuse_layer_types(const json_t *root, const char *name) {
    if (!json_has(root, "layer_types")) return STATUS_OK;
    json_t *list;
    TRY(json_get_array(root, name, "layer_types", &list));
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *text = json_string_value(json_array_get(list, i));
        if (!text || strcmp(text, "full_attention") != 0) {
            FAIL(STATUS_BAD_DATA,
                 "%s: layer_types[%zu] is \"%.64s\", only full_attention is supported", name, i,
                 text ? text : "?");
        }
    }
    return STATUS_OK;
}

static Status refuse_unsupported(const json_t *root, const char *name, const ModelType *type) {
    TRY(refuse_present(root, name, "quantization_config",
                       "the weights are quantized; take the checkpoint they were made from"));
    TRY(refuse_present(root, name, "auto_map", "the model needs code of its own"));
    TRY(refuse_true(root, name, "use_sliding_window", "attention is always over all positions"));
    TRY(refuse_layer_types(root, name));
    if (type->family != FAMILY_QWEN2)
        TRY(refuse_true(root, name, "attention_bias", "it adds a bias to o_proj, too"));
    if (type->family == FAMILY_LLAMA)
        TRY(refuse_true(root, name, "mlp_bias", "MLP matrices have no bias"));

    char act[32] = "silu";
    if (json_has(root, "hidden_act")) TRY(json_get_text(root, name, "hidden_act", act, sizeof act));
    if (strcmp(act, "silu") != 0)
        FAIL(STATUS_BAD_DATA, "%s: hidden_act \"%s\" is not supported, expected silu", name, act);
    double dropout = 0;
    TRY(optional_real(root, name, "attention_dropout", &dropout));
    if (dropout != 0) log_warn("%s: attention_dropout %g is not applied", name, dropout);
    return STATUS_OK;
}

// --- Rotary embedding ----------------------------------------------------------------------------

// rope_scaling (transformers 4) or rope_parameters (5): only the plain embedding passes.
static Status check_rope_object(const char *name, const char *where, json_t *rope) {
    if (!json_is_object(rope)) FAIL(STATUS_BAD_DATA, "%s: %s is not an object", name, where);
    const char *key;
    json_t *value;
    json_object_foreach(rope, key, value) {
        if (strcmp(key, "rope_type") != 0 && strcmp(key, "type") != 0) continue;
        const char *type = json_string_value(value);
        if (!type || strcmp(type, "default") != 0) {
            FAIL(STATUS_BAD_DATA, "%s: %s.%s \"%.32s\" is not supported, expected default", name,
                 where, key, type ? type : "?");
        }
    }
    json_object_foreach(rope, key, value) {
        bool known = strcmp(key, "rope_type") == 0 || strcmp(key, "type") == 0 ||
                     strcmp(key, "rope_theta") == 0 || json_is_null(value);
        bool whole = strcmp(key, "partial_rotary_factor") == 0 && json_number_value(value) == 1.0;
        if (!known && !whole)
            FAIL(STATUS_BAD_DATA, "%s: %s.%.64s is not supported", name, where, key);
    }
    return STATUS_OK;
}

static Status read_rope(const json_t *root, const char *name, double *theta) {
    static const char *const keys[] = {"rope_scaling", "rope_parameters"};
    double factor = 1;
    *theta = default_rope_theta;
    TRY(optional_real(root, name, "rope_theta", theta));
    TRY(optional_real(root, name, "partial_rotary_factor", &factor));
    if (factor != 1)
        FAIL(STATUS_BAD_DATA, "%s: partial_rotary_factor %g is not supported", name, factor);
    for (int i = 0; i < 2; i++) {
        if (!json_has(root, keys[i])) continue;
        json_t *rope = json_object_get(root, keys[i]);
        TRY(check_rope_object(name, keys[i], rope));
        double inner = *theta;
        TRY(optional_real(rope, name, "rope_theta", &inner));
        if (json_has(root, "rope_theta") && inner != *theta) {
            FAIL(STATUS_BAD_DATA, "%s: rope_theta is %g, but %s.rope_theta is %g", name, *theta,
                 keys[i], inner);
        }
        *theta = inner;
    }
    return STATUS_OK;
}

// --- Values --------------------------------------------------------------------------------------

static Status read_heads(const json_t *root, const char *name, const ModelType *type,
                         ModelConfig *c) {
    TRY(get_size(root, name, "num_attention_heads", INT_MAX, &c->num_heads));
    c->num_kv_heads = c->num_heads; // null, or an early Llama
    bool named = json_object_get(root, "num_key_value_heads") != NULL;
    if (!named && type->family != FAMILY_LLAMA)
        FAIL(STATUS_BAD_DATA, "%s: key \"num_key_value_heads\" is missing", name);
    TRY(optional_int(root, name, "num_key_value_heads", 1, INT_MAX, &c->num_kv_heads));

    c->head_dim = type == &types[TYPE_QWEN3] ? QWEN3_HEAD_DIM : 0;
    TRY(optional_int(root, name, "head_dim", 1, INT_MAX, &c->head_dim));
    if (c->head_dim) return STATUS_OK;
    if (c->hidden_size % c->num_heads != 0) {
        FAIL(STATUS_BAD_DATA,
             "%s: no head_dim, and hidden_size %d is not a multiple of num_attention_heads %d",
             name, c->hidden_size, c->num_heads);
    }
    c->head_dim = c->hidden_size / c->num_heads;
    return STATUS_OK;
}

// eos_token_id may be a list, of which the first ends documents.
static Status read_token_id(const json_t *root, const char *name, const char *key, int vocab_size,
                            int64_t *out) {
    const json_t *value = json_object_get(root, key);
    if (json_is_array(value)) value = json_array_get(value, 0);
    *out = -1;
    if (!value || json_is_null(value)) return STATUS_OK;
    if (!json_is_integer(value) || json_integer_value(value) < -1 ||
        json_integer_value(value) >= vocab_size) {
        FAIL(STATUS_BAD_DATA, "%s: %s is not a token id below vocab_size %d", name, key,
             vocab_size);
    }
    *out = json_integer_value(value);
    return STATUS_OK;
}

static Status read_sizes(const json_t *root, const char *name, const ModelType *type,
                         ModelConfig *c) {
    TRY(get_size(root, name, "hidden_size", INT_MAX, &c->hidden_size));
    TRY(get_size(root, name, "num_hidden_layers", MODEL_MAX_LAYERS, &c->num_layers));
    TRY(get_size(root, name, "intermediate_size", INT_MAX, &c->intermediate_size));
    TRY(get_size(root, name, "vocab_size", INT_MAX, &c->vocab_size));
    TRY(read_heads(root, name, type, c));
    c->max_position_embeddings = type->family == FAMILY_LLAMA ? 2048 : 32768;
    TRY(optional_int(root, name, "max_position_embeddings", 1, INT_MAX,
                     &c->max_position_embeddings));
    c->rms_norm_eps = 1e-6;
    TRY(optional_real(root, name, "rms_norm_eps", &c->rms_norm_eps));
    TRY(read_rope(root, name, &c->rope_theta));
    TRY(optional_bool(root, name, "tie_word_embeddings", &c->tie_word_embeddings));
    TRY(read_token_id(root, name, "bos_token_id", c->vocab_size, &c->bos_token_id));
    TRY(read_token_id(root, name, "eos_token_id", c->vocab_size, &c->eos_token_id));
    c->qk_norm = type->family == FAMILY_QWEN3;
    c->qkv_bias = type->family == FAMILY_QWEN2;
    if (type == &types[TYPE_QWEN2_MOE]) TRY(optional_bool(root, name, "qkv_bias", &c->qkv_bias));
    return STATUS_OK;
}

// --- Experts -------------------------------------------------------------------------------------

// A layer has experts unless it is listed in mlp_only_layers, or decoder_sparse_step skips it.
static Status read_layers(const json_t *root, const char *name, int experts, int top_k,
                          ModelConfig *c) {
    int step = 1;
    TRY(optional_int(root, name, "decoder_sparse_step", 1, INT_MAX, &step));
    for (int l = 0; l < c->num_layers && experts > 0; l++)
        if ((l + 1) % step == 0) c->layers[l] = (LayerConfig){experts, top_k};

    if (!json_has(root, "mlp_only_layers")) return STATUS_OK;
    json_t *list;
    TRY(json_get_array(root, name, "mlp_only_layers", &list));
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *value = json_array_get(list, i);
        json_int_t layer = json_integer_value(value);
        if (!json_is_integer(value) || layer < 0 || layer >= c->num_layers) {
            FAIL(STATUS_BAD_DATA, "%s: mlp_only_layers[%zu] is not a layer below %d", name, i,
                 c->num_layers);
        }
        c->layers[layer] = (LayerConfig){0, 0};
    }
    return STATUS_OK;
}

static Status read_experts(const json_t *root, const char *name, const ModelType *type,
                           ModelConfig *c) {
    // transformers 5 may call the same number num_local_experts in qwen3_moe.
    const char *key = json_has(root, "num_experts") ? "num_experts" : "num_local_experts";
    int64_t experts, top_k, shared = 0;
    TRY(json_get_int(root, name, key, 0, MODEL_MAX_EXPERTS, &experts));
    TRY(json_get_int(root, name, "num_experts_per_tok", 1, MODEL_MAX_EXPERTS, &top_k));
    TRY(get_size(root, name, "moe_intermediate_size", INT_MAX, &c->moe_intermediate_size));
    if (type == &types[TYPE_QWEN2_MOE]) {
        TRY(json_get_int(root, name, "shared_expert_intermediate_size", 0, INT_MAX, &shared));
        if (shared > 0) {
            FAIL(STATUS_BAD_DATA,
                 "%s: shared_expert_intermediate_size %" PRId64
                 " is not supported, expected 0: there are no shared experts",
                 name, shared);
        }
    }
    TRY(read_layers(root, name, (int)experts, (int)top_k, c));

    // A renormalised gate of one expert is the constant 1; only its straight-through form trains
    // the router (METHOD.md §4).
    bool normalised = false;
    TRY(optional_bool(root, name, "norm_topk_prob", &normalised));
    if (normalised) c->router.gate = top_k == 1 ? GATE_STRAIGHT_THROUGH : GATE_RENORM;
    return STATUS_OK;
}

Status config_from_json(const json_t *root, const char *name, ModelConfig *out) {
    const ModelType *type;
    TRY(read_type(root, name, &type));
    TRY(refuse_unsupported(root, name, type));
    *out = (ModelConfig){.family = type->family};
    out->router = (RouterConfig){.gate = GATE_SOFTMAX, .gate_scale = 1};
    TRY(read_sizes(root, name, type, out));
    out->moe_intermediate_size = out->intermediate_size;
    if (type->moe) TRY(read_experts(root, name, type, out));
    TRY(config_validate(out, name));
    return STATUS_OK;
}

// --- Writing -------------------------------------------------------------------------------------

// The class that computes this model. The family's name alone does not decide: a model without
// biases that was read as qwen2_moe and has lost its experts is a Llama.
static const ModelType *choose_type(const ModelConfig *c) {
    bool moe = config_has_moe(c);
    if (c->qk_norm) return &types[moe ? TYPE_QWEN3_MOE : TYPE_QWEN3];
    if (moe) return &types[TYPE_QWEN2_MOE];
    return &types[c->qkv_bias ? TYPE_QWEN2 : TYPE_LLAMA];
}

static Status check_expressible(const ModelConfig *c) {
    if (!config_has_moe(c)) return STATUS_OK;
    if (c->router.input_is_raw) {
        FAIL(STATUS_USAGE,
             "router.input = raw cannot be exported: Hugging Face models route on the "
             "normalised input; use router.input = normed or export.hf = false");
    }
    int first = 0;
    while (!config_layer_is_moe(c, first)) first++;
    for (int l = first + 1; l < c->num_layers; l++) {
        const LayerConfig *a = &c->layers[first], *b = &c->layers[l];
        if (!config_layer_is_moe(c, l)) continue;
        if (a->num_experts == b->num_experts && a->top_k == b->top_k) continue;
        FAIL(STATUS_USAGE,
             "layers %d and %d have %d and %d experts with top-k %d and %d, which cannot be "
             "exported: "
             "a Hugging Face model has the same in every MoE layer",
             first, l, a->num_experts, b->num_experts, a->top_k, b->top_k);
    }
    return STATUS_OK;
}

// Members are set through this, so that running out of memory is noticed once, at the end.
typedef struct Builder {
    json_t *root;
    bool failed;
} Builder;

static void set(Builder *b, const char *key, json_t *value) {
    if (json_object_set_new(b->root, key, value) != 0) b->failed = true;
}
static void set_int(Builder *b, const char *key, int64_t value) {
    set(b, key, json_integer((json_int_t)value));
}
static void set_real(Builder *b, const char *key, double value) {
    set(b, key, json_real(value));
}
static void set_bool(Builder *b, const char *key, bool value) {
    set(b, key, json_boolean(value));
}
static void set_text(Builder *b, const char *key, const char *value) {
    set(b, key, json_string(value));
}
static void set_token_id(Builder *b, const char *key, int64_t id) {
    set(b, key, id < 0 ? json_null() : json_integer((json_int_t)id));
}

static void set_common(Builder *b, const ModelConfig *c, const ModelType *type, DType dtype) {
    static const char *const torch_names[] = {
        [DTYPE_F32] = "float32", [DTYPE_BF16] = "bfloat16", [DTYPE_F16] = "float16"};
    set(b, "architectures", json_pack("[s]", type->architecture));
    set_text(b, "model_type", type->name);
    set_text(b, "dtype", torch_names[dtype]);
    set_text(b, "torch_dtype", torch_names[dtype]);
    set_int(b, "vocab_size", c->vocab_size);
    set_int(b, "hidden_size", c->hidden_size);
    set_int(b, "intermediate_size", c->intermediate_size);
    set_int(b, "num_hidden_layers", c->num_layers);
    set_int(b, "num_attention_heads", c->num_heads);
    set_int(b, "num_key_value_heads", c->num_kv_heads);
    set_int(b, "max_position_embeddings", c->max_position_embeddings);
    set_text(b, "hidden_act", "silu");
    set_real(b, "rms_norm_eps", c->rms_norm_eps);
    set_real(b, "rope_theta", c->rope_theta);
    set(b, "rope_parameters",
        json_pack("{s:s, s:f}", "rope_type", "default", "rope_theta", c->rope_theta));
    set_real(b, "initializer_range", 0.02);
    set_real(b, "attention_dropout", 0);
    set_bool(b, "use_cache", true);
    set_bool(b, "tie_word_embeddings", c->tie_word_embeddings);
    set_token_id(b, "bos_token_id", c->bos_token_id);
    set_token_id(b, "eos_token_id", c->eos_token_id);
}

// What the classes do not share. head_dim is no member of the Qwen2 classes, though their models
// read it: it is only written where it says something.
static void set_family(Builder *b, const ModelConfig *c, const ModelType *type) {
    if (type->family != FAMILY_QWEN2) set_bool(b, "attention_bias", false);
    if (type->family != FAMILY_QWEN2 || c->head_dim * c->num_heads != c->hidden_size)
        set_int(b, "head_dim", c->head_dim);
    if (type->family == FAMILY_LLAMA) {
        set_bool(b, "mlp_bias", false);
        return;
    }
    set_bool(b, "use_sliding_window", false);
    set(b, "sliding_window", json_null());
    set_int(b, "max_window_layers", c->num_layers);
}

static void set_experts(Builder *b, const ModelConfig *c, const ModelType *type) {
    json_t *dense = json_array();
    LayerConfig experts = {0, 0}; // of every MoE layer
    for (int l = 0; l < c->num_layers; l++) {
        if (config_layer_is_moe(c, l)) {
            experts = c->layers[l];
        } else if (json_array_append_new(dense, json_integer(l)) != 0) {
            b->failed = true;
        }
    }
    set(b, "mlp_only_layers", dense);
    set_int(b, "decoder_sparse_step", 1);
    set_int(b, "num_experts", experts.num_experts);
    set_int(b, "num_experts_per_tok", experts.top_k);
    set_int(b, "moe_intermediate_size", c->moe_intermediate_size);
    set_bool(b, "norm_topk_prob", c->router.gate != GATE_SOFTMAX);
    set_bool(b, "output_router_logits", false);
    set_real(b, "router_aux_loss_coef", 0.001);
    if (type != &types[TYPE_QWEN2_MOE]) return;
    set_int(b, "shared_expert_intermediate_size", 0);
    set_bool(b, "qkv_bias", c->qkv_bias);
}

Status config_to_json(const ModelConfig *c, DType dtype, json_t **out) {
    TRY(check_expressible(c));
    const ModelType *type = choose_type(c);
    Builder builder = {.root = json_object()};
    set_common(&builder, c, type, dtype);
    set_family(&builder, c, type);
    if (type->moe) set_experts(&builder, c, type);
    if (builder.failed) {
        json_decref(builder.root);
        FAIL(STATUS_INTERNAL, "out of memory building config.json");
    }
    *out = builder.root;
    return STATUS_OK;
}
