// Model directories that are wrong, or that other programs wrote: what is missing, misshapen or
// superfluous is named, and the forms of transformers 5 are read.
#include "tests/test.h"

#include <fcntl.h>
#include "base/json.h"
#include "model/safetensors.h"
#include "tests/hf_fixture.h"

// Writes weight file `path` with tensors of F32 ones.
static void write_tensors(const char *path, const SafetensorsSpec *specs, size_t count) {
    SafetensorsWriter *writer;
    FileHash hash;
    ck_assert_ok(safetensors_writer_open(path, specs, count, NULL, &writer));
    for (size_t i = 0; i < count; i++) {
        int64_t elements = 1;
        for (int d = 0; d < specs[i].ndim; d++) elements *= specs[i].shape[d];
        for (int64_t k = 0; k < elements; k++)
            ck_assert_ok(safetensors_writer_append(writer, &(float){(float)k}, 1));
    }
    ck_assert_ok(safetensors_writer_finish(writer, &hash));
}

static const char one_layer[] =
    "{\"model_type\":\"llama\",\"hidden_size\":4,\"intermediate_size\":6,"
    "\"num_attention_heads\":2,\"num_hidden_layers\":1,\"vocab_size\":5,"
    "\"tie_word_embeddings\":true}";

enum { ONE_LAYER = 11 };
static const SafetensorsSpec one_layer_specs[ONE_LAYER + 4] = {
    {"model.embed_tokens.weight", DTYPE_F32, 2, {5, 4}},
    {"model.layers.0.input_layernorm.weight", DTYPE_F32, 1, {4}},
    {"model.layers.0.self_attn.q_proj.weight", DTYPE_F32, 2, {4, 4}},
    {"model.layers.0.self_attn.k_proj.weight", DTYPE_F32, 2, {4, 4}},
    {"model.layers.0.self_attn.v_proj.weight", DTYPE_F32, 2, {4, 4}},
    {"model.layers.0.self_attn.o_proj.weight", DTYPE_F32, 2, {4, 4}},
    {"model.layers.0.post_attention_layernorm.weight", DTYPE_F32, 1, {4}},
    {"model.layers.0.mlp.gate_proj.weight", DTYPE_F32, 2, {6, 4}},
    {"model.layers.0.mlp.up_proj.weight", DTYPE_F32, 2, {6, 4}},
    {"model.layers.0.mlp.down_proj.weight", DTYPE_F32, 2, {4, 6}},
    {"model.norm.weight", DTYPE_BF16, 1, {4}},
    // What the model does not have:
    {"lm_head.weight", DTYPE_F32, 2, {5, 4}},
    {"model.layers.0.self_attn.rotary_emb.inv_freq", DTYPE_F32, 1, {1}},
    {"model.layers.0.self_attn.q_proj.bias", DTYPE_F32, 1, {4}},
    {"model.layers.1.mlp.up_proj.weight", DTYPE_F32, 2, {6, 4}},
};

// A directory with that config and the first `count` tensors.
static const char *one_layer_directory(const char *name, size_t count) {
    const char *directory = in_directory("%s", name);
    char path[IO_PATH_MAX];
    ck_assert_ok(io_make_directories(directory));
    ck_assert_ok(io_path(path, "%s/config.json", directory));
    write_text(path, one_layer);
    ck_assert_ok(io_path(path, "%s/model.safetensors", directory));
    write_tensors(path, one_layer_specs, count);
    return directory;
}

START_TEST(missing_files) {
    TensorSource *source;
    ck_assert_fails(hf_open(in_directory("%s", "nowhere"), &source), STATUS_MISSING_INPUT,
                    "nowhere");
    KEEP(directory, in_directory("%s", "bare"));
    ck_assert_ok(io_make_directories(directory));
    ck_assert_fails(hf_open(directory, &source), STATUS_MISSING_INPUT, "bare/config.json");
    write_text(in_directory("%s", "bare/config.json"), one_layer);
    ck_assert_fails(hf_open(directory, &source), STATUS_MISSING_INPUT, "bare: neither");
    write_text(in_directory("%s", "bare/pytorch_model.bin"), "");
    ck_assert_fails(hf_open(directory, &source), STATUS_MISSING_INPUT, "as safetensors");
    write_text(in_directory("%s", "bare/config.json"), "{\"model_type\":\"gpt2\"}");
    ck_assert_fails(hf_open(directory, &source), STATUS_BAD_DATA, "gpt2");
    write_text(in_directory("%s", "bare/config.json"), "{");
    ck_assert_fails(hf_open(directory, &source), STATUS_BAD_DATA, "bare/config.json");
}
END_TEST

START_TEST(tensors_are_checked) {
    TensorSource *source;
    KEEP(directory, one_layer_directory("tensors", ONE_LAYER));
    KEEP(weights, in_directory("%s", "tensors/model.safetensors"));
    ck_assert_ok(hf_open(directory, &source));
    ck_assert_int_eq(source->dtype, DTYPE_F32); // of F32 and BF16
    source_close(source);

    SafetensorsSpec specs[ONE_LAYER];
    memcpy(specs, one_layer_specs, sizeof specs);
    write_tensors(weights, specs, ONE_LAYER - 1);
    ck_assert_fails(hf_open(directory, &source), STATUS_BAD_DATA,
                    "tensor model.norm.weight is missing");
    specs[7].shape[0] = 4;
    specs[7].shape[1] = 6;
    write_tensors(weights, specs, ONE_LAYER);
    ck_assert_fails(hf_open(directory, &source), STATUS_BAD_DATA,
                    "model.layers.0.mlp.gate_proj.weight has shape [4, 6], expected [6, 4]");
    specs[7].ndim = 1;
    write_tensors(weights, specs, ONE_LAYER);
    ck_assert_fails(hf_open(directory, &source), STATUS_BAD_DATA, "shape [4], expected [6, 4]");
    write_text(weights, "not a weight file");
    ck_assert_fails(hf_open(directory, &source), STATUS_BAD_DATA, "tensors/model.safetensors");
}
END_TEST

START_TEST(other_types_are_named) {
    KEEP(directory, one_layer_directory("types", ONE_LAYER));
    KEEP(weights, in_directory("%s", "types/model.safetensors"));
    char *data;
    size_t bytes;
    ck_assert_ok(io_read_file(weights, 1 << 20, &data, &bytes));
    char *dtype = strstr(data + 8, "\"F32\""); // of the first tensor
    ck_assert_ptr_nonnull(dtype);
    memcpy(dtype, "\"I32\"", 5);
    ck_assert_ok(io_write_file_atomic(weights, data, bytes));
    free(data);
    TensorSource *source;
    ck_assert_fails(hf_open(directory, &source), STATUS_BAD_DATA,
                    "embed_tokens.weight has dtype I32");
}
END_TEST

// Runs hf_open with stderr in a file, and gives what it logged.
static char *open_logged(const char *directory) {
    const char *log = in_directory("%s", "stderr");
    TensorSource *source;
    fflush(stderr);
    int saved = dup(STDERR_FILENO), fd = open(log, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    ck_assert_int_ge(dup2(fd, STDERR_FILENO), 0);
    Status status = hf_open(directory, &source);
    fflush(stderr);
    dup2(saved, STDERR_FILENO);
    close(saved);
    close(fd);
    ck_assert_ok(status);
    source_close(source);
    char *text;
    size_t bytes;
    ck_assert_ok(io_read_file(log, 1 << 20, &text, &bytes));
    return text;
}

START_TEST(tensors_nobody_needs_are_named) {
    char *log = open_logged(one_layer_directory("clean", ONE_LAYER));
    ck_assert_str_eq(log, "");
    free(log);
    log = open_logged(one_layer_directory("extra", ONE_LAYER + 4));
    ck_assert_ptr_nonnull(strstr(log, "lm_head.weight is ignored: tie_word_embeddings"));
    ck_assert_ptr_nonnull(strstr(log, "2 tensors that the model of config.json does not have"));
    ck_assert_ptr_nonnull(strstr(log, "q_proj.bias"));
    ck_assert_ptr_nonnull(strstr(log, "model.layers.1.mlp.up_proj.weight"));
    ck_assert_ptr_null(strstr(log, "inv_freq"));
    free(log);
    // What our own export adds is nothing to warn about.
    ModelConfig config = synthetic_moe(synthetic_qwen2(), 2, 1, GATE_SOFTMAX);
    HfWriteOptions options = bf16();
    export_model(in_directory("%s", "own"), &config, &options);
    log = open_logged(in_directory("%s", "own"));
    ck_assert_str_eq(log, "");
    free(log);
}
END_TEST

START_TEST(indexes_are_checked) {
    ModelConfig config = synthetic_qwen2();
    HfWriteOptions options = bf16();
    options.max_shard_bytes = 8000;
    KEEP(directory, in_directory("%s", "index"));
    KEEP(path, in_directory("%s", "index/model.safetensors.index.json"));
    TensorSource *source;
    json_t *index;
    export_model(directory, &config, &options);
    ck_assert_ok(json_read_file(path, 1 << 20, &index));
    json_t *map = json_object_get(index, "weight_map");
    static const struct {
        const char *tensor, *file, *text;
        Status status;
    } cases[] = {
        {"model.norm.weight", "model-00001-of-00009.safetensors",
         "model-00001-of-00009.safetensors", STATUS_MISSING_INPUT},
        {"model.norm.weight", "../swap/model.safetensors", "weight_map[\"model.norm.weight\"]",
         STATUS_BAD_DATA},
        {"model.norm.weight", "", "weight_map", STATUS_BAD_DATA},
        {"extra", NULL, "tensor extra should be in model-00001", STATUS_BAD_DATA},
        {"model.norm.weight", NULL, "model.norm.weight should be in", STATUS_BAD_DATA},
    };
    const char *first = json_string_value(json_object_get(map, "model.embed_tokens.weight"));
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        json_t *changed = json_deep_copy(index);
        json_object_set_new(json_object_get(changed, "weight_map"), cases[i].tensor,
                            json_string(cases[i].file ? cases[i].file : first));
        ck_assert_ok(json_write_file(path, changed));
        ck_assert_fails(hf_open(directory, &source), cases[i].status, cases[i].text);
        json_decref(changed);
    }
    json_object_del(map, "model.norm.weight");
    ck_assert_ok(json_write_file(path, index));
    ck_assert_fails(hf_open(directory, &source), STATUS_BAD_DATA, "model.norm.weight is missing");
    json_decref(index);
    write_text(path, "{}");
    ck_assert_fails(hf_open(directory, &source), STATUS_BAD_DATA, "weight_map");
}
END_TEST

// transformers 5 writes the experts of a layer as two tensors.
START_TEST(fused_experts) {
    static const char text[] =
        "{\"model_type\":\"qwen3_moe\",\"hidden_size\":4,\"intermediate_size\":6,\"head_dim\":2,"
        "\"num_attention_heads\":2,\"num_key_value_heads\":2,\"num_hidden_layers\":1,"
        "\"vocab_size\":5,\"tie_word_embeddings\":true,\"num_experts\":3,"
        "\"num_experts_per_tok\":1,\"moe_intermediate_size\":2}";
    SafetensorsSpec specs[ONE_LAYER + 1];
    memcpy(specs, one_layer_specs, ONE_LAYER * sizeof *specs);
    specs[7] = (SafetensorsSpec){"model.layers.0.mlp.gate.weight", DTYPE_F32, 2, {3, 4}};
    specs[8] =
        (SafetensorsSpec){"model.layers.0.mlp.experts.gate_up_proj", DTYPE_F32, 3, {3, 4, 4}};
    specs[9] = (SafetensorsSpec){"model.layers.0.mlp.experts.down_proj", DTYPE_F32, 3, {3, 4, 2}};
    specs[11] = (SafetensorsSpec){"model.layers.0.self_attn.q_norm.weight", DTYPE_F32, 1, {2}};
    SafetensorsSpec all[ONE_LAYER + 2];
    memcpy(all, specs, sizeof specs);
    all[12] = (SafetensorsSpec){"model.layers.0.self_attn.k_norm.weight", DTYPE_F32, 1, {2}};

    KEEP(directory, in_directory("%s", "fused"));
    ck_assert_ok(io_make_directories(directory));
    write_text(in_directory("%s", "fused/config.json"), text);
    KEEP(weights, in_directory("%s", "fused/model.safetensors"));
    write_tensors(weights, all, ONE_LAYER + 2);
    TensorSource *source;
    ck_assert_ok(hf_open(directory, &source));
    // Element k of each file tensor is k. Expert 1: gate rows 0..1 and up rows 2..3 of [1].
    static const struct {
        const char *name;
        float first;
    } expected[] = {{"gate_proj", 16}, {"up_proj", 24}, {"down_proj", 8}};
    for (int i = 0; i < 3; i++) {
        char name[TENSOR_NAME_MAX];
        float values[8];
        snprintf(name, sizeof name, "model.layers.0.mlp.experts.1.%s.weight", expected[i].name);
        const Tensor *tensor = tensor_table_find(source->table, name);
        ck_assert_ptr_nonnull(tensor);
        ck_assert_ok(source->read(source, tensor, 0, 8, values));
        for (int k = 0; k < 8; k++) ck_assert_float_eq(values[k], expected[i].first + (float)k);
    }
    source_close(source);

    all[8].shape[1] = 2; // the gate alone
    write_tensors(weights, all, ONE_LAYER + 2);
    ck_assert_fails(hf_open(directory, &source), STATUS_BAD_DATA,
                    "gate_up_proj has shape [3, 2, 4], expected [3, 4, 4]");
}
END_TEST

TEST_MAIN("hf_directories", TEST(missing_files), TEST(tensors_are_checked),
          TEST(other_types_are_named), TEST(tensors_nobody_needs_are_named),
          TEST(indexes_are_checked), TEST(fused_experts))
