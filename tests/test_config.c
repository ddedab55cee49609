// Model configurations: what validation refuses, and the canonical JSON form.
#include <math.h>

#include "model/config.h"
#include "tests/test.h"

static ModelConfig valid_config(void) {
    ModelConfig c = {
        .family = FAMILY_QWEN2,
        .hidden_size = 64,
        .num_layers = 3,
        .num_heads = 4,
        .num_kv_heads = 2,
        .head_dim = 16,
        .intermediate_size = 96,
        .moe_intermediate_size = 48,
        .vocab_size = 100,
        .max_position_embeddings = 512,
        .rope_theta = 1e6,
        .rms_norm_eps = 1e-6,
        .tie_word_embeddings = true,
        .qkv_bias = true,
        .bos_token_id = -1,
        .eos_token_id = 99,
        .router = {GATE_SOFTMAX, 3.0f, true},
        .layers = {{0, 0}, {4, 2}, {3, 1}},
    };
    return c;
}

START_TEST(accepts_what_the_engine_computes) {
    ModelConfig c = valid_config();
    ck_assert_ok(config_validate(&c, "t"));
    ck_assert(config_has_moe(&c));
    c.layers[1] = c.layers[2] = (LayerConfig){0, 0};
    c.moe_intermediate_size = 0;
    ck_assert(!config_has_moe(&c));
    ck_assert_ok(config_validate(&c, "t"));
    c.family = FAMILY_QWEN3;
    c.qk_norm = true;
    c.qkv_bias = false;
    ck_assert_ok(config_validate(&c, "t"));
}
END_TEST

// Each line makes the valid config wrong in one way and names what the message must contain.
START_TEST(refuses_each_wrong_member) {
    ModelConfig c;
#define REFUSED(change, text)                                                                      \
    do {                                                                                           \
        c = valid_config();                                                                        \
        change;                                                                                    \
        ck_assert_fails(config_validate(&c, "file.json"), STATUS_BAD_DATA, text);                  \
        ck_assert_ptr_nonnull(strstr(status_message(), "file.json"));                              \
    } while (0)
    REFUSED(c.hidden_size = 0, "hidden_size is 0");
    REFUSED(c.num_layers = MODEL_MAX_LAYERS + 1, "num_hidden_layers is 1025");
    REFUSED(c.vocab_size = -5, "vocab_size is -5");
    REFUSED(c.num_heads = 5, "num_attention_heads 5 is not a multiple");
    REFUSED(c.num_kv_heads = 8, "num_key_value_heads is 8");
    REFUSED(c.head_dim = 15, "head_dim is 15");
    REFUSED(c.rope_theta = 0, "rope_theta is 0");
    REFUSED(c.rms_norm_eps = NAN, "rms_norm_eps is");
    REFUSED(c.intermediate_size = 0, "intermediate_size is 0");
    REFUSED(c.moe_intermediate_size = 0, "moe_intermediate_size is 0");
    REFUSED(c.eos_token_id = 100, "eos_token_id is 100");
    REFUSED(c.qk_norm = true, "family qwen2 has no QK-norm");
    REFUSED(c.family = FAMILY_LLAMA, "family llama has no QKV bias");
    REFUSED(c.layers[1].num_experts = MODEL_MAX_EXPERTS + 1, "layer 1 has num_experts 257");
    REFUSED(c.layers[1].top_k = 5, "layer 1 has top_k 5");
    REFUSED(c.layers[1].top_k = 0, "layer 1 has top_k 0");
    REFUSED(c.layers[0].top_k = 1, "layer 0 has top_k 1");
    REFUSED(c.router.gate_scale = INFINITY, "router.gate_scale");
    REFUSED(c.router.gate = GATE_RENORM, "straight_through"); // layer 2 has k = 1
#undef REFUSED
}
END_TEST

START_TEST(canonical_round_trip_is_exact) {
    ModelConfig c = valid_config(), back;
    c.rope_theta = 1e6 / 3;            // needs all 17 digits
    c.router.gate_scale = 1.0f / 3.0f; // a float that is no short decimal
    json_t *root, *again;
    ck_assert_ok(config_to_canonical(&c, &root));
    char path[IO_PATH_MAX];
    ck_assert_ok(io_path(path, "%s/config.json", test_directory()));
    ck_assert_ok(json_write_file(path, root));
    ck_assert_ok(json_read_file(path, 1 << 20, &again));
    ck_assert_ok(config_from_canonical(again, path, &back));
    json_decref(again);
    // Equal in every member: the second canonical form is the first, and the reals match bit by
    // bit.
    ck_assert_ok(config_to_canonical(&back, &again));
    ck_assert(json_equal(root, again));
    ck_assert(back.rope_theta == c.rope_theta && back.rms_norm_eps == c.rms_norm_eps);
    ck_assert(back.router.gate_scale == c.router.gate_scale);
    ck_assert_mem_eq(back.layers, c.layers, sizeof c.layers);
    json_decref(root);
    json_decref(again);
}
END_TEST

START_TEST(canonical_refuses_bad_files) {
    ModelConfig c = valid_config(), back;
    json_t *root;
    ck_assert_ok(config_to_canonical(&c, &root));
    json_object_set_new(root, "hidden_size", json_string("64"));
    ck_assert_fails(config_from_canonical(root, "s.json", &back), STATUS_BAD_DATA, "hidden_size");
    json_object_set_new(root, "hidden_size", json_integer(64));
    json_object_set_new(root, "family", json_string("gpt2"));
    ck_assert_fails(config_from_canonical(root, "s.json", &back), STATUS_BAD_DATA, "gpt2");
    json_object_set_new(root, "family", json_string("qwen2"));
    json_object_set_new(root, "num_layers", json_integer(-1));
    ck_assert_fails(config_from_canonical(root, "s.json", &back), STATUS_BAD_DATA, "num_layers");
    json_object_set_new(root, "num_layers", json_integer(2));
    ck_assert_fails(config_from_canonical(root, "s.json", &back), STATUS_BAD_DATA, "3 entries");
    json_object_set_new(root, "num_layers", json_integer(3));
    ck_assert_ok(config_from_canonical(root, "s.json", &back));
    json_array_set_new(json_object_get(root, "layers"), 0, json_null());
    ck_assert_fails(config_from_canonical(root, "s.json", &back), STATUS_BAD_DATA, "num_experts");
    json_decref(root);
}
END_TEST

TEST_MAIN("config", TEST(accepts_what_the_engine_computes), TEST(refuses_each_wrong_member),
          TEST(canonical_round_trip_is_exact), TEST(canonical_refuses_bad_files))
