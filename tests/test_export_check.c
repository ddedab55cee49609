// The check of an export against the model it came from: every kind of model passes it, and every
// kind of damage fails it.
//
// With DENSE2MOE_EXAMPLES=DIR the directories are written there and stay, with logits.safetensors
// beside the weights: what scripts/check_export.py compares real transformers with.
#include "tests/test.h"

#include "model/export_check.h"
#include "model/hf.h"
#include "model/safetensors.h"
#include "tests/random_source.h"

enum { TOKENS = 48 };

static const char *example_path(const char *name) {
    static char path[IO_PATH_MAX];
    const char *parent = getenv("DENSE2MOE_EXAMPLES");
    ck_assert_ok(io_path(path, "%s/%s", parent ? parent : test_directory(), name));
    return path;
}

// --- Models --------------------------------------------------------------------------------------

typedef struct Example {
    const char *name;
    ModelConfig config;
} Example;

static ModelConfig llama(void) {
    ModelConfig config = small_config(3);
    config.family = FAMILY_LLAMA;
    config.qkv_bias = false;
    config.tie_word_embeddings = false;
    config.rms_norm_eps = 1e-5;
    return config;
}

static ModelConfig qwen3(void) {
    ModelConfig config = small_config(3);
    config.family = FAMILY_QWEN3;
    config.qkv_bias = false;
    config.qk_norm = true;
    config.head_dim = 16;
    return config;
}

// Layers 0 and 2 have experts, layer 1 is dense.
static ModelConfig with_experts(ModelConfig config, int num_experts, int top_k, RouterGate gate,
                                float gate_scale) {
    config.layers[0] = config.layers[2] = (LayerConfig){num_experts, top_k};
    config.moe_intermediate_size = 40;
    config.router.gate = gate;
    config.router.gate_scale = gate_scale;
    return config;
}

enum { NUM_EXAMPLES = 8 };
static void list_examples(Example out[NUM_EXAMPLES]) {
    const ModelConfig qwen2 = small_config(3);
    out[0] = (Example){"qwen2", qwen2};
    out[1] = (Example){"llama", llama()};
    out[2] = (Example){"qwen3", qwen3()};
    out[3] = (Example){"softmax", with_experts(qwen2, 6, 1, GATE_SOFTMAX, 1)};
    out[4] = (Example){"scaled", with_experts(qwen2, 6, 1, GATE_SOFTMAX, 6)};
    out[5] = (Example){"straight_through", with_experts(qwen2, 6, 1, GATE_STRAIGHT_THROUGH, 1)};
    out[6] = (Example){"llama_moe", with_experts(llama(), 4, 2, GATE_RENORM, 1)};
    out[7] = (Example){"qwen3_moe", with_experts(qwen3(), 4, 2, GATE_RENORM, 1)};
}

static Model *make_model(Backend *backend, const ModelConfig *config) {
    const ModelOptions options = {.micro_batch = 2, .sequence_length = TOKENS / 2};
    Model *model;
    TensorSource *source = random_source(config, 5);
    ck_assert_ok(model_create(backend, config, &options, &model));
    ck_assert_ok(model_load(model, source));
    source_close(source);
    return model;
}

static void write_model(Model *model, const char *directory, DType dtype) {
    const HfWriteOptions options = {.dtype = dtype};
    TensorSource *source;
    ck_assert_ok(model_source(model, &source));
    ck_assert_ok(hf_write(directory, source, &options));
    source_close(source);
}

// ids (T) and logits (T, V) of the model, in fp32, which holds any small id exactly.
static void write_logits(Model *model, const char *directory) {
    char path[IO_PATH_MAX];
    int vocab = model->config.vocab_size;
    FileHash hash;
    int32_t ids[TOKENS];
    float values[TOKENS], *logits = malloc(sizeof *logits * TOKENS * (size_t)vocab);
    for (int t = 0; t < TOKENS; t++) values[t] = (float)(ids[t] = (t * t + 3 * t + 7) % vocab);
    ck_assert_ok(model_logits(model, ids, TOKENS, logits));
    const SafetensorsSpec specs[] = {{"ids", DTYPE_F32, 1, {TOKENS}},
                                     {"logits", DTYPE_F32, 2, {TOKENS, vocab}}};
    SafetensorsWriter *writer;
    ck_assert_ok(io_path(path, "%s/logits.safetensors", directory));
    ck_assert_ok(safetensors_writer_open(path, specs, 2, NULL, &writer));
    ck_assert_ok(safetensors_writer_append(writer, values, TOKENS));
    ck_assert_ok(safetensors_writer_append(writer, logits, (uint64_t)TOKENS * (uint64_t)vocab));
    ck_assert_ok(safetensors_writer_finish(writer, &hash));
    free(logits);
}

// --- Tests ---------------------------------------------------------------------------------------

START_TEST(every_kind_of_model_passes) {
    Example examples[NUM_EXAMPLES];
    Backend *backend;
    list_examples(examples);
    ck_assert_ok(backend_cpu(1, &backend));
    for (int i = 0; i < NUM_EXAMPLES; i++) {
        Model *model = make_model(backend, &examples[i].config);
        const char *directory = example_path(examples[i].name);
        ExportCheck check;
        write_model(model, directory, DTYPE_BF16);
        ck_assert_ok(export_verify(model, directory, DTYPE_BF16, &check));
        ck_assert_int_eq(check.tokens, TOKENS);
        ck_assert_double_eq(check.max_file_diff, 0);
        ck_assert_double_gt(check.max_diff, 0); // bf16 does lose something
        // bf16 rounds weights by 2^-9 relative, in the mean half of it, and a few layers add up;
        // with experts, some of the tokens change theirs.
        bool moe = config_has_moe(&examples[i].config);
        ck_assert_double_lt(check.median_error, moe ? 0.2 : 0.03);
        ck_assert_double_gt(check.top1_agreement, moe ? 0.6 : 0.9);

        write_model(model, directory, DTYPE_F32);
        ck_assert_ok(export_verify(model, directory, DTYPE_F32, &check));
        ck_assert_double_eq(check.max_file_diff, 0);
        // Only a folded gate_scale rounds again, in the last of 24 bits.
        ck_assert_double_le(check.max_diff, examples[i].config.router.gate_scale == 1 ? 0 : 1e-4);
        ck_assert_double_eq(check.top1_agreement, 1);
        write_logits(model, directory);
        model_destroy(model);
    }
    backend_destroy(backend);
}
END_TEST

// Sets a key of config.json in place.
static void change_config(const char *directory, const char *key, json_t *value) {
    char path[IO_PATH_MAX];
    json_t *root;
    ck_assert_ok(io_path(path, "%s/config.json", directory));
    ck_assert_ok(json_read_file(path, 1 << 20, &root));
    ck_assert_int_eq(json_object_set_new(root, key, value), 0);
    ck_assert_ok(json_write_file(path, root));
    json_decref(root);
}

START_TEST(damage_is_found) {
    const ModelConfig config = with_experts(small_config(3), 6, 2, GATE_SOFTMAX, 1);
    Backend *backend;
    ExportCheck check;
    ck_assert_ok(backend_cpu(1, &backend));
    Model *model = make_model(backend, &config);
    char directory[IO_PATH_MAX], weights[IO_PATH_MAX], *data;
    ck_assert_ok(io_path(directory, "%s/damaged", test_directory()));
    ck_assert_ok(io_path(weights, "%s/model.safetensors", directory));
    static const char *const keys[] = {"rms_norm_eps", "norm_topk_prob", "num_experts_per_tok"};
    for (int i = 0; i < 3; i++) {
        write_model(model, directory, DTYPE_BF16);
        change_config(directory, keys[i],
                      i == 0   ? json_real(1e-3)
                      : i == 1 ? json_true()
                               : json_integer(1));
        ck_assert_fails(export_verify(model, directory, DTYPE_BF16, &check), STATUS_INTERNAL,
                        "expected equal");
    }
    // One bit of one weight: the exponent of the file's last element but the shared gates' zeros.
    size_t bytes;
    write_model(model, directory, DTYPE_BF16);
    ck_assert_ok(io_read_file(weights, 1 << 24, &data, &bytes));
    data[bytes - 2 * 2 * 32 - 1] ^= 1;
    ck_assert_ok(io_write_file_atomic(weights, data, bytes));
    free(data);
    ck_assert_fails(export_verify(model, directory, DTYPE_BF16, &check), STATUS_INTERNAL,
                    "damaged: read back");
    // Not the precision that was asked for.
    write_model(model, directory, DTYPE_BF16);
    ck_assert_fails(export_verify(model, directory, DTYPE_F32, &check), STATUS_INTERNAL,
                    "F32 weights");
    // Equal files of another model.
    ModelConfig other = config;
    other.tie_word_embeddings = false;
    Model *stranger = make_model(backend, &other);
    write_model(stranger, directory, DTYPE_BF16);
    ck_assert_fails(export_verify(model, directory, DTYPE_BF16, &check), STATUS_INTERNAL,
                    "damaged");
    model_destroy(stranger);
    model_destroy(model);
    backend_destroy(backend);
}
END_TEST

TEST_MAIN("export_check", TEST(every_kind_of_model_passes), TEST(damage_is_found))
