// config.json: both spellings of transformers, every refusal by its key, and writing what reading
// takes back.
#include "tests/test.h"

#include "tests/synthetic.h"

// The config.json of Qwen2.5-0.5B, as published.
static const char qwen2_5[] =
    "{\"architectures\":[\"Qwen2ForCausalLM\"],\"attention_dropout\":0.0,\"bos_token_id\":151643,"
    "\"eos_token_id\":151643,\"hidden_act\":\"silu\",\"hidden_size\":896,"
    "\"initializer_range\":0.02,\"intermediate_size\":4864,\"max_position_embeddings\":32768,"
    "\"max_window_layers\":24,\"model_type\":\"qwen2\",\"num_attention_heads\":14,"
    "\"num_hidden_layers\":24,\"num_key_value_heads\":2,\"rms_norm_eps\":1e-06,"
    "\"rope_theta\":1000000.0,\"sliding_window\":32768,\"tie_word_embeddings\":true,"
    "\"torch_dtype\":\"bfloat16\",\"transformers_version\":\"4.40.1\",\"use_cache\":true,"
    "\"use_mrope\":false,\"use_sliding_window\":false,\"vocab_size\":151936}";

static const char small_llama[] =
    "{\"model_type\":\"llama\",\"hidden_size\":64,\"intermediate_size\":96,"
    "\"num_attention_heads\":8,\"num_hidden_layers\":2,\"vocab_size\":100}";

static const char small_moe[] =
    "{\"model_type\":\"qwen2_moe\",\"hidden_size\":64,\"intermediate_size\":96,"
    "\"num_attention_heads\":8,\"num_key_value_heads\":8,\"num_hidden_layers\":6,"
    "\"vocab_size\":100,\"num_experts\":4,\"num_experts_per_tok\":2,\"moe_intermediate_size\":32,"
    "\"shared_expert_intermediate_size\":0}";

static const char small_qwen3[] =
    "{\"model_type\":\"qwen3\",\"hidden_size\":64,\"intermediate_size\":96,"
    "\"num_attention_heads\":8,\"num_key_value_heads\":4,\"num_hidden_layers\":2,"
    "\"vocab_size\":100}";

// `text` with the members of `changes` set; a member that is "delete" is removed.
static Status read_changed(const char *text, const char *changes, ModelConfig *out) {
    json_t *root, *patch, *value;
    ck_assert_ok(json_parse(text, strlen(text), "base", &root));
    ck_assert_ok(json_parse(changes, strlen(changes), changes, &patch));
    const char *key;
    json_object_foreach(patch, key, value) {
        if (json_is_string(value) && strcmp(json_string_value(value), "delete") == 0)
            ck_assert_int_eq(json_object_del(root, key), 0);
        else
            json_object_set(root, key, value);
    }
    Status status = config_from_json(root, "config.json", out);
    json_decref(root);
    json_decref(patch);
    return status;
}

static ModelConfig read_ok(const char *text, const char *changes) {
    ModelConfig config;
    ck_assert_ok(read_changed(text, changes, &config));
    return config;
}

START_TEST(published_qwen2_5) {
    ModelConfig c = read_ok(qwen2_5, "{}");
    ck_assert_int_eq(c.family, FAMILY_QWEN2);
    ck_assert_int_eq(c.hidden_size, 896);
    ck_assert_int_eq(c.num_layers, 24);
    ck_assert_int_eq(c.num_heads, 14);
    ck_assert_int_eq(c.num_kv_heads, 2);
    ck_assert_int_eq(c.head_dim, 64);
    ck_assert_int_eq(c.intermediate_size, 4864);
    ck_assert_int_eq(c.vocab_size, 151936);
    ck_assert_int_eq(c.max_position_embeddings, 32768);
    ck_assert_double_eq(c.rope_theta, 1e6);
    ck_assert_double_eq(c.rms_norm_eps, 1e-6);
    ck_assert(c.tie_word_embeddings && c.qkv_bias && !c.qk_norm);
    ck_assert_int_eq(c.bos_token_id, 151643);
    ck_assert_int_eq(c.eos_token_id, 151643);
    ck_assert(!config_has_moe(&c));
    TensorTable table;
    ck_assert_ok(tensor_table_build(&c, &table));
    ck_assert_int_eq(table.count, 290);
    ck_assert_int_eq(table.parameters, 494032768);
    tensor_table_free(&table);
}
END_TEST

START_TEST(both_spellings) {
    ModelConfig c = read_ok(qwen2_5, "{\"rope_theta\":\"delete\",\"rope_parameters\":"
                                     "{\"rope_type\":\"default\",\"rope_theta\":5000.0},"
                                     "\"torch_dtype\":\"delete\",\"dtype\":\"bfloat16\","
                                     "\"layer_types\":[\"full_attention\",\"full_attention\"]}");
    ck_assert_double_eq(c.rope_theta, 5000);
    c = read_ok(qwen2_5, "{\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":1e6,"
                         "\"partial_rotary_factor\":1.0}}");
    ck_assert_double_eq(c.rope_theta, 1e6);
    c = read_ok(qwen2_5, "{\"rope_scaling\":null}");
    ck_assert_double_eq(c.rope_theta, 1e6);
    c = read_ok(qwen2_5, "{\"eos_token_id\":[151645,151643],\"bos_token_id\":null}");
    ck_assert_int_eq(c.eos_token_id, 151645);
    ck_assert_int_eq(c.bos_token_id, -1);
}
END_TEST

START_TEST(defaults_are_those_of_transformers) {
    ModelConfig c = read_ok(small_llama, "{}");
    ck_assert_int_eq(c.num_kv_heads, 8);
    ck_assert_int_eq(c.head_dim, 8);
    ck_assert_int_eq(c.max_position_embeddings, 2048);
    ck_assert_double_eq(c.rope_theta, 10000);
    ck_assert_double_eq(c.rms_norm_eps, 1e-6);
    ck_assert(!c.tie_word_embeddings && !c.qkv_bias && !c.qk_norm);
    c = read_ok(small_qwen3, "{}");
    ck_assert_int_eq(c.head_dim, 128);
    ck_assert(c.qk_norm && !c.qkv_bias);
    c = read_ok(small_qwen3, "{\"head_dim\":null,\"num_key_value_heads\":null}");
    ck_assert_int_eq(c.num_kv_heads, 8);
}
END_TEST

START_TEST(which_layers_have_experts) {
    ModelConfig c = read_ok(small_moe, "{\"decoder_sparse_step\":2,\"mlp_only_layers\":[3]}");
    for (int l = 0; l < 6; l++) ck_assert_int_eq(c.layers[l].num_experts, l == 1 || l == 5 ? 4 : 0);
    ck_assert_int_eq(c.layers[1].top_k, 2);
    ck_assert_int_eq(c.moe_intermediate_size, 32);
    c = read_ok(small_moe, "{\"qkv_bias\":false}");
    ck_assert(!c.qkv_bias);
    c = read_ok(small_moe, "{\"model_type\":\"qwen3_moe\",\"num_experts\":\"delete\","
                           "\"num_local_experts\":8}");
    ck_assert_int_eq(c.layers[0].num_experts, 8);
    ck_assert(c.qk_norm);
}
END_TEST

START_TEST(gates) {
    ck_assert_int_eq(read_ok(small_moe, "{}").router.gate, GATE_SOFTMAX);
    ck_assert_int_eq(read_ok(small_moe, "{\"norm_topk_prob\":true}").router.gate, GATE_RENORM);
    ModelConfig c = read_ok(small_moe, "{\"norm_topk_prob\":true,\"num_experts_per_tok\":1}");
    ck_assert_int_eq(c.router.gate, GATE_STRAIGHT_THROUGH);
    ck_assert_float_eq(c.router.gate_scale, 1);
}
END_TEST

START_TEST(refused_by_name) {
    static const struct {
        const char *base, *changes, *text;
    } cases[] = {
        {qwen2_5, "{\"model_type\":\"mixtral\"}", "model_type \"mixtral\""},
        {qwen2_5, "{\"model_type\":\"delete\"}", "model_type"},
        {qwen2_5, "{\"architectures\":[\"Qwen2ForSequenceClassification\"]}", "architectures"},
        {qwen2_5, "{\"quantization_config\":{\"bits\":4}}", "quantization_config"},
        {qwen2_5, "{\"auto_map\":{\"AutoModel\":\"x.Y\"}}", "auto_map"},
        {qwen2_5, "{\"use_sliding_window\":true}", "use_sliding_window"},
        {qwen2_5, "{\"layer_types\":[\"full_attention\",\"sliding_attention\"]}", "layer_types[1]"},
        {qwen2_5, "{\"hidden_act\":\"gelu\"}", "hidden_act \"gelu\""},
        {qwen2_5, "{\"rope_scaling\":{\"type\":\"linear\",\"factor\":2.0}}", "rope_scaling.type"},
        {qwen2_5, "{\"rope_scaling\":{\"rope_type\":\"yarn\"}}", "rope_scaling.rope_type \"yarn\""},
        {qwen2_5, "{\"rope_parameters\":{\"rope_type\":\"llama3\"}}", "rope_parameters.rope_type"},
        {qwen2_5, "{\"rope_scaling\":{\"type\":\"default\",\"mrope_section\":[1]}}",
         "rope_scaling.mrope_section"},
        {qwen2_5, "{\"rope_parameters\":{\"full_attention\":{\"rope_type\":\"default\"}}}",
         "rope_parameters.full_attention"},
        {qwen2_5, "{\"rope_parameters\":{\"rope_theta\":7.0}}", "rope_parameters.rope_theta is 7"},
        {qwen2_5, "{\"rope_parameters\":[]}", "rope_parameters is not an object"},
        {qwen2_5, "{\"partial_rotary_factor\":0.5}", "partial_rotary_factor"},
        {qwen2_5, "{\"rope_parameters\":{\"partial_rotary_factor\":0.5}}", "partial_rotary_factor"},
        {qwen2_5, "{\"rope_theta\":0.0}", "rope_theta"},
        {qwen2_5, "{\"rms_norm_eps\":\"1e-6\"}", "rms_norm_eps"},
        {qwen2_5, "{\"hidden_size\":\"delete\"}", "hidden_size"},
        {qwen2_5, "{\"hidden_size\":896.0}", "hidden_size"},
        {qwen2_5, "{\"hidden_size\":897}", "not a multiple of num_attention_heads"},
        {qwen2_5, "{\"num_hidden_layers\":0}", "num_hidden_layers"},
        {qwen2_5, "{\"num_hidden_layers\":1025}", "num_hidden_layers"},
        {qwen2_5, "{\"num_key_value_heads\":\"delete\"}", "num_key_value_heads"},
        {qwen2_5, "{\"num_key_value_heads\":3}", "num_key_value_heads"},
        {qwen2_5, "{\"vocab_size\":99999999999}", "vocab_size"},
        {qwen2_5, "{\"eos_token_id\":151936}", "eos_token_id"},
        {qwen2_5, "{\"bos_token_id\":\"x\"}", "bos_token_id"},
        {qwen2_5, "{\"tie_word_embeddings\":1}", "tie_word_embeddings"},
        {small_llama, "{\"attention_bias\":true}", "attention_bias"},
        {small_llama, "{\"mlp_bias\":true}", "mlp_bias"},
        {small_qwen3, "{\"attention_bias\":true}", "attention_bias"},
        {small_moe, "{\"shared_expert_intermediate_size\":5632}",
         "shared_expert_intermediate_size 5632"},
        {small_moe, "{\"shared_expert_intermediate_size\":\"delete\"}",
         "shared_expert_intermediate_size"},
        {small_moe, "{\"num_experts\":257}", "num_experts"},
        {small_moe, "{\"num_experts_per_tok\":5}", "top_k"},
        {small_moe, "{\"num_experts_per_tok\":0}", "num_experts_per_tok"},
        {small_moe, "{\"mlp_only_layers\":[6]}", "mlp_only_layers[0]"},
        {small_moe, "{\"mlp_only_layers\":[1,-1]}", "mlp_only_layers[1]"},
        {small_moe, "{\"decoder_sparse_step\":0}", "decoder_sparse_step"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        ModelConfig config;
        ck_assert_fails(read_changed(cases[i].base, cases[i].changes, &config), STATUS_BAD_DATA,
                        cases[i].text);
        ck_assert_msg(strncmp(status_message(), "config.json", 11) == 0, "no file name in '%s'",
                      status_message());
    }
}
END_TEST

// --- Writing -------------------------------------------------------------------------------------

static json_t *written(const ModelConfig *config) {
    json_t *root;
    ck_assert_ok(config_to_json(config, DTYPE_BF16, &root));
    return root;
}

static void check_round_trip(const ModelConfig *config) {
    json_t *root = written(config), *before, *after;
    ModelConfig again;
    ck_assert_ok(config_from_json(root, "config.json", &again));
    ck_assert_ok(config_to_canonical(config, &before));
    ck_assert_ok(config_to_canonical(&again, &after));
    ck_assert(json_equal(before, after));
    json_decref(root);
    json_decref(before);
    json_decref(after);
}

START_TEST(what_is_written_reads_back) {
    const ModelConfig configs[] = {
        synthetic_qwen2(),
        synthetic_llama(),
        synthetic_qwen3(),
        synthetic_moe(synthetic_qwen2(), 6, 1, GATE_SOFTMAX),
        synthetic_moe(synthetic_qwen2(), 6, 1, GATE_STRAIGHT_THROUGH),
        synthetic_moe(synthetic_qwen3(), 4, 2, GATE_RENORM),
    };
    for (size_t i = 0; i < sizeof configs / sizeof configs[0]; i++) check_round_trip(&configs[i]);
}
END_TEST

static void check_text(const json_t *root, const char *key, const char *expected) {
    char *text = json_dumps(json_object_get(root, key), JSON_ENCODE_ANY | JSON_COMPACT);
    ck_assert_msg(text && strcmp(text, expected) == 0, "%s is %s, expected %s", key,
                  text ? text : "absent", expected);
    free(text);
}

START_TEST(moe_keys) {
    ModelConfig config = synthetic_moe(synthetic_qwen2(), 6, 1, GATE_STRAIGHT_THROUGH);
    json_t *root = written(&config);
    check_text(root, "architectures", "[\"Qwen2MoeForCausalLM\"]");
    check_text(root, "model_type", "\"qwen2_moe\"");
    check_text(root, "num_experts", "6");
    check_text(root, "num_experts_per_tok", "1");
    check_text(root, "moe_intermediate_size", "28");
    check_text(root, "shared_expert_intermediate_size", "0");
    check_text(root, "norm_topk_prob", "true");
    check_text(root, "decoder_sparse_step", "1");
    check_text(root, "mlp_only_layers", "[1]");
    check_text(root, "qkv_bias", "true");
    check_text(root, "output_router_logits", "false");
    check_text(root, "tie_word_embeddings", "true");
    check_text(root, "rope_theta", "1000000.0");
    check_text(root, "rope_parameters", "{\"rope_type\":\"default\",\"rope_theta\":1000000.0}");
    check_text(root, "torch_dtype", "\"bfloat16\"");
    check_text(root, "dtype", "\"bfloat16\"");
    json_decref(root);
    config.router.gate = GATE_SOFTMAX;
    root = written(&config);
    check_text(root, "norm_topk_prob", "false");
    json_decref(root);
}
END_TEST

// Models that have lost or gained experts get the class that computes them.
START_TEST(the_class_follows_the_mathematics) {
    ModelConfig config = synthetic_moe(synthetic_llama(), 4, 1, GATE_SOFTMAX);
    json_t *root = written(&config);
    check_text(root, "model_type", "\"qwen2_moe\"");
    check_text(root, "qkv_bias", "false");
    json_decref(root);
    config = synthetic_qwen2();
    config.qkv_bias = false;
    root = written(&config);
    check_text(root, "model_type", "\"llama\"");
    json_decref(root);
}
END_TEST

START_TEST(not_expressible) {
    json_t *root;
    ModelConfig config = synthetic_moe(synthetic_qwen2(), 6, 1, GATE_SOFTMAX);
    config.router.input_is_raw = true;
    ck_assert_fails(config_to_json(&config, DTYPE_BF16, &root), STATUS_USAGE, "router.input");
    config.router.input_is_raw = false;
    config.layers[2].num_experts = 4;
    ck_assert_fails(config_to_json(&config, DTYPE_BF16, &root), STATUS_USAGE,
                    "layers 0 and 2 have 6 and 4 experts");
    config.layers[2] = (LayerConfig){6, 2};
    ck_assert_fails(config_to_json(&config, DTYPE_BF16, &root), STATUS_USAGE, "top-k 1 and 2");
}
END_TEST

TEST_MAIN("config_json", TEST(published_qwen2_5), TEST(both_spellings),
          TEST(defaults_are_those_of_transformers), TEST(which_layers_have_experts), TEST(gates),
          TEST(refused_by_name), TEST(what_is_written_reads_back), TEST(moe_keys),
          TEST(the_class_follows_the_mathematics), TEST(not_expressible))
