// Model directories: round trips of every family through one file and through shards, what an
// export holds and what it refuses, and how it replaces an earlier one.
#include "tests/test.h"

#include "base/hash.h"
#include "base/json.h"
#include "model/hf.h"
#include "model/safetensors.h"
#include "tests/hf_fixture.h"

static void check_same_config(const ModelConfig *a, const ModelConfig *b) {
    json_t *x, *y;
    ck_assert_ok(config_to_canonical(a, &x));
    ck_assert_ok(config_to_canonical(b, &y));
    ck_assert(json_equal(x, y));
    json_decref(x);
    json_decref(y);
}

// Every tensor holds the synthetic values, read whole and from the middle.
static void check_values(TensorSource *source) {
    for (int i = 0; i < source->table->count; i++) {
        const Tensor *tensor = &source->table->tensors[i];
        float *values = malloc((size_t)tensor->count * sizeof *values);
        ck_assert_ok(source->read(source, tensor, 0, tensor->count, values));
        for (int64_t k = 0; k < tensor->count; k++)
            ck_assert_float_eq(values[k], synthetic_value(tensor->name, k));
        int64_t middle = tensor->count / 3;
        ck_assert_ok(source->read(source, tensor, middle, 5, values));
        for (int64_t k = 0; k < 5; k++)
            ck_assert_float_eq(values[k], synthetic_value(tensor->name, middle + k));
        free(values);
    }
}

static void check_round_trip(const char *name, const ModelConfig *config,
                             const HfWriteOptions *options) {
    KEEP(directory, in_directory("%s", name));
    export_model(directory, config, options);
    TensorSource *source;
    ck_assert_ok(hf_open(directory, &source));
    ck_assert_int_eq(source->dtype, options->dtype);
    check_same_config(source->config, config);
    check_values(source);
    source_close(source);
    ck_assert(!io_exists(in_directory("%s.tmp", name)));
}

START_TEST(round_trips) {
    const ModelConfig configs[] = {
        synthetic_qwen2(),
        synthetic_llama(),
        synthetic_qwen3(),
        synthetic_moe(synthetic_qwen2(), 5, 1, GATE_SOFTMAX),
        synthetic_moe(synthetic_qwen3(), 4, 2, GATE_RENORM),
    };
    for (size_t i = 0; i < sizeof configs / sizeof configs[0]; i++) {
        for (DType dtype = DTYPE_F32; dtype <= DTYPE_F16; dtype++) {
            HfWriteOptions options = {.dtype = dtype};
            check_round_trip("one_file", &configs[i], &options);
            options.max_shard_bytes = 6000;
            check_round_trip("shards", &configs[i], &options);
        }
    }
}
END_TEST

START_TEST(shards_keep_the_limit) {
    ModelConfig config = synthetic_qwen2(); // largest tensor 50 * 24 * 2 = 2400 bytes
    HfWriteOptions options = bf16();
    options.max_shard_bytes = 2500;
    KEEP(directory, in_directory("%s", "limit"));
    export_model(directory, &config, &options);
    ck_assert(!io_exists(in_directory("limit/%s", "model.safetensors")));

    json_t *index, *metadata;
    KEEP(path, in_directory("limit/%s", "model.safetensors.index.json"));
    int64_t total, sum = 0;
    ck_assert_ok(json_read_file(path, 1 << 20, &index));
    ck_assert_ok(json_get_object(index, path, "metadata", &metadata));
    ck_assert_ok(json_get_int(metadata, path, "total_size", 1, 1 << 30, &total));
    json_decref(index);

    char **names;
    size_t count, files = 0;
    ck_assert_ok(io_list_directory(directory, &names, &count));
    for (size_t i = 0; i < count; i++) {
        if (!strstr(names[i], ".safetensors") || strstr(names[i], ".json")) continue;
        SafetensorsFile file;
        ck_assert_ok(safetensors_open(in_directory("limit/%s", names[i]), &file));
        uint64_t bytes = 0;
        for (size_t k = 0; k < file.header.count; k++)
            bytes += file.header.entries[k].end - file.header.entries[k].begin;
        ck_assert_uint_le(bytes, 2500);
        sum += (int64_t)bytes;
        files++;
        safetensors_close(&file);
    }
    io_free_names(names, count);
    ck_assert_uint_ge(files, 2);
    ck_assert_int_eq(sum, total);
}
END_TEST

START_TEST(moe_directories_suit_vllm) {
    ModelConfig config = synthetic_moe(synthetic_qwen2(), 3, 1, GATE_SOFTMAX);
    HfWriteOptions options = bf16();
    export_model(in_directory("%s", "moe"), &config, &options);
    SafetensorsFile file;
    ck_assert_ok(safetensors_open(in_directory("%s", "moe/model.safetensors"), &file));
    for (size_t i = 0; i < file.header.count; i++) {
        ck_assert_uint_gt(file.header.entries[i].count, 0); // no zero-size tensors
        ck_assert_ptr_null(strstr(file.header.entries[i].name, "shared_expert."));
    }
    for (int l = 0; l < 3; l++) {
        char name[TENSOR_NAME_MAX];
        snprintf(name, sizeof name, "model.layers.%d.mlp.shared_expert_gate.weight", l);
        const SafetensorsEntry *gate = safetensors_find(&file, name);
        ck_assert_int_eq(gate != NULL, config_layer_is_moe(&config, l));
        if (!gate) continue;
        float values[24];
        ck_assert_uint_eq(gate->shape[0], 1);
        ck_assert_uint_eq(gate->shape[1], 24);
        ck_assert_ok(safetensors_read(&file, gate, 0, 24, values));
        for (int k = 0; k < 24; k++) ck_assert_float_eq(values[k], 0);
    }
    safetensors_close(&file);
}
END_TEST

START_TEST(gate_scale_goes_into_down_proj) {
    ModelConfig config = synthetic_moe(synthetic_qwen2(), 4, 1, GATE_SOFTMAX);
    config.router.gate_scale = 4;
    HfWriteOptions options = bf16();
    KEEP(directory, in_directory("%s", "scaled"));
    export_model(directory, &config, &options);
    TensorSource *source;
    ck_assert_ok(hf_open(directory, &source));
    ck_assert_float_eq(source->config->router.gate_scale, 1);
    for (int i = 0; i < source->table->count; i++) {
        const Tensor *tensor = &source->table->tensors[i];
        float value,
            scale = strstr(tensor->name, "experts.") && strstr(tensor->name, "down") ? 4 : 1;
        ck_assert_ok(source->read(source, tensor, 7, 1, &value));
        ck_assert_float_eq(value, scale * synthetic_value(tensor->name, 7));
    }
    source_close(source);
}
END_TEST

START_TEST(equal_sources_give_equal_files) {
    ModelConfig config = synthetic_moe(synthetic_qwen2(), 4, 2, GATE_RENORM);
    HfWriteOptions options = bf16();
    options.max_shard_bytes = 9000;
    export_model(in_directory("%s", "first"), &config, &options);
    export_model(in_directory("%s", "second"), &config, &options);
    char **names;
    size_t count;
    ck_assert_ok(io_list_directory(in_directory("%s", "first"), &names, &count));
    ck_assert_uint_ge(count, 5); // two shards, index, config, generation_config
    for (size_t i = 0; i < count; i++) {
        char a[HASH_HEX_SIZE], b[HASH_HEX_SIZE];
        uint64_t bytes;
        ck_assert_ok(hash_file(in_directory("first/%s", names[i]), a, &bytes, NULL, NULL));
        ck_assert_ok(hash_file(in_directory("second/%s", names[i]), b, &bytes, NULL, NULL));
        ck_assert_str_eq(a, b);
    }
    io_free_names(names, count);
}
END_TEST

START_TEST(refused_before_anything_is_written) {
    ModelConfig config = synthetic_moe(synthetic_qwen2(), 4, 1, GATE_SOFTMAX);
    HfWriteOptions options = bf16();
    KEEP(directory, in_directory("%s", "refused"));
    ck_assert_ok(hf_check_writable(&config));
    config.router.input_is_raw = true;
    ck_assert_fails(hf_check_writable(&config), STATUS_USAGE, "router.input = raw");
    TensorSource *source = synthetic_source(&config);
    ck_assert_fails(hf_write(directory, source, &options), STATUS_USAGE, "router.input = raw");
    source_close(source);
    config.router.input_is_raw = false;
    config.layers[1] = (LayerConfig){2, 1};
    source = synthetic_source(&config);
    ck_assert_fails(hf_write(directory, source, &options), STATUS_USAGE, "4 and 2 experts");
    source_close(source);
    ck_assert(!io_exists(directory));
    ck_assert(!io_exists(in_directory("%s.tmp", "refused")));
}
END_TEST

// --- Files beside the weights --------------------------------------------------------------------

static void check_text(const char *path, const char *expected) {
    char *text;
    size_t bytes;
    ck_assert_ok(io_read_file(path, 1 << 20, &text, &bytes));
    ck_assert_str_eq(text, expected);
    free(text);
}

START_TEST(tokenizer_files_travel) {
    ModelConfig config = synthetic_qwen2();
    HfWriteOptions options = bf16();
    export_model(in_directory("%s", "seed"), &config, &options);
    check_text(in_directory("%s", "seed/generation_config.json"),
               "{\n  \"bos_token_id\": 48,\n  \"eos_token_id\": 49\n}\n");
    write_text(in_directory("%s", "seed/tokenizer.json"), "{}");
    write_text(in_directory("%s", "seed/generation_config.json"), "{\"top_p\": 0.8}");
    write_text(in_directory("%s", "seed/notes.txt"), "private");

    options.copy_from = in_directory("%s", "seed");
    export_model(in_directory("%s", "child"), &config, &options);
    check_text(in_directory("%s", "child/tokenizer.json"), "{}");
    check_text(in_directory("%s", "child/generation_config.json"), "{\"top_p\": 0.8}");
    ck_assert(!io_exists(in_directory("%s", "child/notes.txt")));
    ck_assert(!io_exists(in_directory("%s", "child/merges.txt")));

    char id[TOKENIZER_ID_SIZE];
    options = (HfWriteOptions){.dtype = DTYPE_BF16, .tokenizer_id = TOKENIZER_BYTES_ID};
    export_model(in_directory("%s", "bytes"), &config, &options);
    ck_assert_ok(hf_tokenizer_id(in_directory("%s", "bytes"), id));
    ck_assert_str_eq(id, TOKENIZER_BYTES_ID);
}
END_TEST

START_TEST(tokenizer_identity) {
    char id[TOKENIZER_ID_SIZE];
    KEEP(directory, in_directory("%s", "tokenizer"));
    ck_assert_ok(io_make_directories(directory));
    ck_assert_ok(hf_tokenizer_id(directory, id));
    ck_assert_str_eq(id, "");
    write_text(in_directory("%s", "tokenizer/vocab.json"), "a");
    ck_assert_ok(hf_tokenizer_id(directory, id));
    ck_assert_str_eq(id, ""); // half of a tokenizer
    write_text(in_directory("%s", "tokenizer/merges.txt"), "bc");
    ck_assert_ok(hf_tokenizer_id(directory, id)); // sha256("abc"), as FIPS 180-4 gives it
    ck_assert_str_eq(id, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    write_text(in_directory("%s", "tokenizer/tokenizer.json"), "");
    ck_assert_ok(hf_tokenizer_id(directory, id)); // sha256("")
    ck_assert_str_eq(id, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    KEEP(marker, in_directory("%s", "tokenizer/dense2moe_tokenizer.json"));
    write_text(marker, "{\"type\": \"bytes\"}");
    ck_assert_ok(hf_tokenizer_id(directory, id)); // printf dense2moe-bytes-v1 | sha256sum
    ck_assert_str_eq(id, "1c937cda051e406cb170168253e013168e7f8a4152778b4230b61d101b2e90f4");
    write_text(marker, "{\"type\": \"words\"}");
    ck_assert_fails(hf_tokenizer_id(directory, id), STATUS_BAD_DATA, "dense2moe_tokenizer.json");
}
END_TEST

START_TEST(identity_of_the_real_qwen2_tokenizer) {
    char id[TOKENIZER_ID_SIZE];
    const char *directory = TEST_SOURCE_DIR "/../shared/data/qwen2_tokenizer";
    if (!io_is_directory(directory)) {
        printf("skipped: %s is not there\n", directory);
        return;
    }
    ck_assert_ok(hf_tokenizer_id(directory, id)); // cat vocab.json merges.txt | sha256sum
    ck_assert_str_eq(id, "621938cf30f2e49377bb2c614b639af40ea569729019ea88523dd601c7c87b9d");
}
END_TEST

// --- Replacing an export -------------------------------------------------------------------------

static void check_family(const char *directory, ModelFamily family) {
    TensorSource *source;
    ck_assert_ok(hf_open(directory, &source));
    ck_assert_int_eq(source->config->family, family);
    source_close(source);
}

typedef struct FailAt {
    IoOp op;
    int number; // fails the call of this number, counted from 0
    bool after; // and all later ones
} FailAt;

static int fail_at(void *context, IoOp op, const char *path, size_t *bytes) {
    (void)path, (void)bytes;
    FailAt *fail = context;
    if (op != fail->op) return 0;
    int left = fail->number--;
    return left == 0 || (left < 0 && fail->after) ? 28 /* ENOSPC */ : 0;
}

START_TEST(an_export_is_replaced_whole_or_not_at_all) {
    ModelConfig qwen2 = synthetic_qwen2(), llama = synthetic_llama();
    HfWriteOptions options = bf16();
    KEEP(directory, in_directory("%s", "swap"));
    export_model(directory, &qwen2, &options);
    TensorSource *source = synthetic_source(&llama);
    // A disk that fills up at any write, and any rename that fails, leaves the earlier export.
    for (int op = 0; op < 2; op++) {
        FailAt fail = {.op = op ? IO_RENAME : IO_WRITE, .after = !op};
        Status status = STATUS_IO;
        for (int number = 0; status != STATUS_OK; number++) {
            fail.number = number;
            io_set_hook(fail_at, &fail);
            status = hf_write(directory, source, &options);
            io_set_hook(NULL, NULL);
            ck_assert(!io_exists(in_directory("%s.tmp", "swap")));
            check_family(directory, status == STATUS_OK ? FAMILY_LLAMA : FAMILY_QWEN2);
            ck_assert_int_lt(number, 100);
        }
        export_model(directory, &qwen2, &options);
    }
    // A process that ended between the two renames: the next call finds the earlier export again.
    ck_assert_ok(io_rename(directory, in_directory("%s.old", "swap")));
    FailAt fail = {.op = IO_WRITE, .after = true};
    io_set_hook(fail_at, &fail);
    ck_assert_fails(hf_write(directory, source, &options), STATUS_IO, "model.safetensors");
    io_set_hook(NULL, NULL);
    check_family(directory, FAMILY_QWEN2);
    ck_assert_ok(hf_write(directory, source, &options));
    check_family(directory, FAMILY_LLAMA);
    ck_assert(!io_exists(in_directory("%s.old", "swap")));
    source_close(source);
}
END_TEST

START_TEST(other_directories_are_left_alone) {
    ModelConfig config = synthetic_qwen2();
    HfWriteOptions options = bf16();
    TensorSource *source = synthetic_source(&config);
    ck_assert_ok(io_make_directories(in_directory("%s", "home")));
    write_text(in_directory("%s", "home/thesis.tex"), "text");
    ck_assert_fails(hf_write(in_directory("%s", "home"), source, &options), STATUS_CANNOT_WRITE,
                    "home: holds files");
    check_text(in_directory("%s", "home/thesis.tex"), "text");
    ck_assert_fails(hf_write(in_directory("%s", "home/thesis.tex"), source, &options),
                    STATUS_CANNOT_WRITE, "no directory");
    // An empty directory, a slash at the end and missing parents are fine.
    ck_assert_ok(io_make_directories(in_directory("%s", "empty")));
    ck_assert_ok(hf_write(in_directory("%s", "empty/"), source, &options));
    ck_assert_ok(hf_write(in_directory("%s", "deep/er"), source, &options));
    check_family(in_directory("%s", "deep/er"), FAMILY_QWEN2);
    source_close(source);
}
END_TEST

typedef struct Seen {
    uint64_t done, total;
    int calls;
} Seen;

static void see(void *context, uint64_t done, uint64_t total) {
    Seen *seen = context;
    ck_assert_uint_gt(done, seen->done);
    *seen = (Seen){done, total, seen->calls + 1};
}

START_TEST(progress_ends_at_the_total) {
    ModelConfig config = synthetic_qwen2();
    Seen seen = {0};
    HfWriteOptions options = {.dtype = DTYPE_F32, .progress = see, .context = &seen};
    export_model(in_directory("%s", "progress"), &config, &options);
    TensorSource *source = synthetic_source(&config);
    ck_assert_uint_eq(seen.total, (uint64_t)source->table->parameters * 4);
    ck_assert_uint_eq(seen.done, seen.total);
    source_close(source);
}
END_TEST

TEST_MAIN("hf", TEST(round_trips), TEST(shards_keep_the_limit), TEST(moe_directories_suit_vllm),
          TEST(gate_scale_goes_into_down_proj), TEST(equal_sources_give_equal_files),
          TEST(refused_before_anything_is_written), TEST(tokenizer_files_travel),
          TEST(tokenizer_identity), TEST(identity_of_the_real_qwen2_tokenizer),
          TEST(an_export_is_replaced_whole_or_not_at_all), TEST(other_directories_are_left_alone),
          TEST(progress_ends_at_the_total))
