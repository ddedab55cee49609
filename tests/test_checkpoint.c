// Checkpoints as files: the round trip is exact, parts of several ranks read as one, and damage is
// found and named and the checkpoint before is used.
#include "tests/checkpoint_fixture.h"

#include "model/hf.h"
#include "train/checkpoint_slices.h"

// --- Round trip ----------------------------------------------------------------------------------

static void check_round_trip(DType dtype) {
    char path[IO_PATH_MAX];
    int64_t step;
    json_t *state;
    double third;
    Fixture f = fixture_with(dtype, 2, 0);
    ck_assert_ok(save(&f, 7));
    ck_assert_ok(checkpoint_find(directory, &step, path));
    ck_assert_int_eq(step, 7);

    ModelConfig config = tiny_config();
    OptimizerOptions options = tiny_options();
    TinyTrainer other = tiny_trainer(&config, &options, 99);
    ck_assert_ok(checkpoint_load(path, other.model, other.optimizer));
    check_arena_equal(&f.t, f.t.model->master, &other, other.model->master, "weights");
    check_arena_equal(&f.t, f.t.optimizer->m, &other, other.optimizer->m, "m");
    check_arena_equal(&f.t, f.t.optimizer->v, &other, other.optimizer->v, "v");
    ck_assert_ok(checkpoint_read_state(path, &state));
    ck_assert_ok(json_get_real(state, "state", "third", &third));
    ck_assert(third == 1.0 / 3);
    json_decref(state);
    tiny_trainer_free(&other);
    fixture_free(&f);
}

START_TEST(round_trip_is_bit_exact) {
    use_directory("bf16");
    check_round_trip(DTYPE_BF16);
    use_directory("f32");
    check_round_trip(DTYPE_F32);
}
END_TEST

static void check_moments_equal(const TinyTrainer *a, const void *x, const TinyTrainer *b,
                                const void *y, const char *what) {
    float *p = download_moments(a, x), *q = download_moments(b, y);
    ck_assert_msg(memcmp(p, q, (size_t)a->model->table.total * sizeof *p) == 0, "%s differ", what);
    free(p);
    free(q);
}

// Moments from real updates, so that they hold numbers that bf16 rounds.
static Fixture updated_fixture(DType state_dtype) {
    ModelConfig config = tiny_config();
    OptimizerOptions options = tiny_options();
    CheckpointOptions checkpoint = {.directory = directory, .keep_last = 2, .dtype = DTYPE_BF16};
    options.state_dtype = state_dtype;
    Fixture f = {.t = tiny_trainer(&config, &options, 1)};
    for (int step = 1; step <= 2; step++) {
        double norm;
        fill_arena(&f.t, f.t.model->grads, 20 + (uint64_t)step, 0, 1e-3f);
        ck_assert_ok(optimizer_gradient_norm(f.t.optimizer, &norm));
        ck_assert_ok(optimizer_step(f.t.optimizer, 1e-3, norm));
    }
    ck_assert_ok(checkpoint_writer_create(f.t.model, f.t.optimizer, &checkpoint, &f.writer));
    return f;
}

// Saves moments of one dtype and loads them into an optimizer of another.
static void check_between(DType saved, DType loaded) {
    Fixture f = updated_fixture(saved);
    ck_assert_ok(save(&f, 7));
    ModelConfig config = tiny_config();
    OptimizerOptions options = tiny_options();
    options.state_dtype = loaded;
    TinyTrainer other = tiny_trainer(&config, &options, 99);
    ck_assert_ok(checkpoint_load(path_of(7, ""), other.model, other.optimizer));
    check_arena_equal(&f.t, f.t.model->master, &other, other.model->master, "weights");
    if (saved == DTYPE_F32 && loaded == DTYPE_BF16) { // what is loaded is rounded
        size_t total = (size_t)f.t.model->table.total;
        float *wide = download_moments(&f.t, f.t.optimizer->v);
        uint16_t *rounded = malloc(total * sizeof *rounded);
        ck_assert_ptr_nonnull(rounded);
        dtype_from_f32(DTYPE_BF16, wide, rounded, total);
        ck_assert_mem_eq(rounded, other.optimizer->v, total * sizeof *rounded); // CPU memory
        free(rounded);
        free(wide);
    } else {
        check_moments_equal(&f.t, f.t.optimizer->m, &other, other.optimizer->m, "m");
        check_moments_equal(&f.t, f.t.optimizer->v, &other, other.optimizer->v, "v");
    }
    tiny_trainer_free(&other);
    fixture_free(&f);
}

START_TEST(moments_in_bf16_come_back_exactly) {
    use_directory("moments");
    check_between(DTYPE_BF16, DTYPE_BF16);
    check_between(DTYPE_BF16, DTYPE_F32);
    check_between(DTYPE_F32, DTYPE_BF16);
}
END_TEST

START_TEST(same_state_gives_the_same_bytes) {
    char a[HASH_HEX_SIZE], b[HASH_HEX_SIZE];
    uint64_t bytes;
    use_directory("same");
    Fixture f = fixture();
    ck_assert_ok(save(&f, 1));
    ck_assert_ok(hash_file(path_of(1, MANIFEST_NAME), a, &bytes, NULL, NULL));
    ck_assert_ok(save(&f, 1)); // replaces it
    ck_assert_ok(hash_file(path_of(1, MANIFEST_NAME), b, &bytes, NULL, NULL));
    ck_assert_str_eq(a, b);
    ck_assert_int_eq(newest(), 1);
    fixture_free(&f);
}
END_TEST

START_TEST(model_part_opens_as_a_hugging_face_directory) {
    use_directory("hf");
    Fixture f = fixture_with(DTYPE_F32, 2, 0);
    ck_assert_ok(save(&f, 1));
    TensorSource *saved;
    ck_assert_ok(hf_open(path_of(1, ""), &saved));
    float *master = download_arena(&f.t, f.t.model->master);
    for (int i = 0; i < f.t.model->table.count; i++) {
        const Tensor *tensor = &f.t.model->table.tensors[i];
        int64_t count;
        float *values = read_tensor(saved, tensor->name, &count);
        ck_assert_int_eq(count, tensor->count);
        ck_assert_msg(memcmp(values, master + tensor->offset, (size_t)count * 4) == 0, "%s",
                      tensor->name);
        free(values);
    }
    free(master);
    source_close(saved);
    fixture_free(&f);
}
END_TEST

START_TEST(another_model_is_refused_by_name) {
    use_directory("other");
    Fixture f = fixture();
    ck_assert_ok(save(&f, 1));
    ModelConfig config = tiny_config();
    OptimizerOptions options = tiny_options();
    config.layers[1].num_experts = 2;
    TinyTrainer fewer = tiny_trainer(&config, &options, 1);
    ck_assert_fails(checkpoint_load(path_of(1, ""), fewer.model, fewer.optimizer), STATUS_BAD_DATA,
                    "experts.2");
    config.layers[1].num_experts = 4;
    TinyTrainer more = tiny_trainer(&config, &options, 1);
    ck_assert_fails(checkpoint_load(path_of(1, ""), more.model, more.optimizer), STATUS_BAD_DATA,
                    "optimizer");
    tiny_trainer_free(&fewer);
    tiny_trainer_free(&more);
    fixture_free(&f);
}
END_TEST

// --- Parts of several ranks ----------------------------------------------------------------------

// Writes m as [0, a), [a, b), [b, total) of three ranks.
static void write_three_ranks(const TinyTrainer *t, const float *arena, int64_t a, int64_t b) {
    const int64_t bounds[4] = {0, a, b, t->model->table.total};
    for (int rank = 0; rank < 3; rank++) {
        const float *part = arena + bounds[rank];
        const SliceArena arena_part = {part, DTYPE_F32};
        const SliceArena arenas[SLICE_KINDS] = {arena_part, arena_part, arena_part};
        char name[64], path[IO_PATH_MAX];
        FileHash hash;
        ck_assert_ok(slices_file_name(rank, 3, name));
        ck_assert_ok(io_path(path, "%s/%s", directory, name));
        const SliceRange range = {bounds[rank], bounds[rank + 1]};
        ck_assert_ok(slices_write(path, &t->model->table, &range, 1, arenas, &hash));
    }
}

START_TEST(parts_of_three_ranks_read_as_one) {
    use_directory("ranks");
    Fixture f = fixture();
    const TensorTable *table = &f.t.model->table;
    float *arena = download_arena(&f.t, f.t.optimizer->m);
    // Uneven cuts in the middle of tensors, and one rank that owns almost nothing.
    const int64_t cuts[][2] = {{table->total / 3 + 1, table->total / 3 * 2 + 5},
                               {1, 2},
                               {table->total - 3, table->total - 1}};
    for (int c = 0; c < 3; c++) {
        SliceSet set;
        write_three_ranks(&f.t, arena, cuts[c][0], cuts[c][1]);
        ck_assert_ok(slices_open(directory, table, &set));
        for (int i = 0; i < table->count; i++) {
            const Tensor *tensor = &table->tensors[i];
            float *values = malloc((size_t)tensor->count * sizeof *values);
            // In pieces of odd size, so that reads begin and end inside slices.
            for (int64_t at = 0; at < tensor->count; at += 7) {
                int64_t some = tensor->count - at < 7 ? tensor->count - at : 7;
                ck_assert_ok(slices_read(&set, SLICE_M, tensor, at, some, values + at));
            }
            ck_assert_mem_eq(values, arena + tensor->offset, (size_t)tensor->count * 4);
            free(values);
        }
        slices_close(&set);
    }
    free(arena);
    fixture_free(&f);
}
END_TEST

START_TEST(missing_and_doubled_parts_are_refused) {
    SliceSet set;
    char path[IO_PATH_MAX];
    use_directory("gaps");
    Fixture f = fixture();
    const TensorTable *table = &f.t.model->table;
    float *arena = download_arena(&f.t, f.t.optimizer->m);
    const SliceArena whole = {arena, DTYPE_F32};
    const SliceArena arenas[SLICE_KINDS] = {whole, whole, whole};
    const SliceRange short_one = {1000, 1999}, twice = {999, 2000}, all = {1000, table->total};
    FileHash hash;
    write_three_ranks(&f.t, arena, 1000, 2000);
    ck_assert_ok(io_path(path, "%s/optimizer-00001-of-00003.safetensors", directory));
    ck_assert_ok(slices_write(path, table, &short_one, 1, arenas, &hash)); // one short
    ck_assert_fails(slices_open(directory, table, &set), STATUS_BAD_DATA, "once");
    ck_assert_ok(slices_write(path, table, &twice, 1, arenas, &hash)); // one twice
    ck_assert_fails(slices_open(directory, table, &set), STATUS_BAD_DATA, "once");
    ck_assert_ok(slices_write(path, table, &all, 1, arenas, &hash));
    ck_assert_fails(slices_open(directory, table, &set), STATUS_BAD_DATA, "once");
    ck_assert_ok(io_unlink(path));
    ck_assert_fails(slices_open(directory, table, &set), STATUS_MISSING_INPUT, "00001-of-00003");
    free(arena);
    fixture_free(&f);
}
END_TEST

// --- Damage --------------------------------------------------------------------------------------

// The byte that was changed is in the range that the message gives.
static void expect_located(const char *file, size_t position) {
    const char *range = strstr(status_message(), "in bytes ");
    unsigned long long begin, last;
    ck_assert_msg(range != NULL, "%s: %s", file, status_message());
    ck_assert_int_eq(sscanf(range, "in bytes %llu to %llu", &begin, &last), 2);
    ck_assert_msg(begin <= position && position <= last && last - begin < HASH_BLOCK_LEAST,
                  "%s, byte %zu: %s", file, position, status_message());
}

// After `what` was done to `file` of step 20, that file is named and step 10 is the newest.
static void expect_fallback(const char *file, const char *what, size_t position) {
    Status status = checkpoint_verify(path_of(20, ""));
    ck_assert_msg(status != STATUS_OK, "%s %s at %zu is not noticed", file, what, position);
    // The manifest may lie about any file; what is wrong is named all the same.
    bool named = strstr(status_message(), file) || strcmp(file, MANIFEST_NAME) == 0;
    ck_assert_msg(named, "%s %s at %zu: %s", file, what, position, status_message());
    if (strcmp(what, "flipped") == 0 && strcmp(file, MANIFEST_NAME) != 0)
        expect_located(file, position);
    ck_assert_int_eq(newest(), 10);
}

static void damage_file(const char *file) {
    char *data, path[IO_PATH_MAX];
    size_t bytes;
    snprintf(path, sizeof path, "%s", path_of(20, file));
    ck_assert_ok(io_read_file(path, 1 << 24, &data, &bytes));
    for (uint64_t i = 0; i < 24; i++) {
        // Both ends, then anywhere.
        size_t at = i < 4   ? i * 5 % bytes
                    : i < 8 ? bytes - 1 - (i - 4) * 3
                            : random_u64(5, random_stream(file), i) % bytes;
        data[at] ^= (char)(1 << (i % 8));
        overwrite(path, data, bytes);
        expect_fallback(file, "flipped", at);
        data[at] ^= (char)(1 << (i % 8));
        if (i % 4 == 0) {
            // The manifest's last byte is a line end, which nobody would miss.
            if (at == bytes - 1 && strcmp(file, MANIFEST_NAME) == 0) at--;
            overwrite(path, data, at);
            expect_fallback(file, "cut", at);
        }
    }
    overwrite(path, data, bytes);
    FILE *stream = fopen(path, "ab");
    ck_assert_int_eq(fputc('x', stream), 'x');
    fclose(stream);
    expect_fallback(file, "lengthened", bytes);
    ck_assert_ok(io_unlink(path));
    expect_fallback(file, "removed", 0);
    overwrite(path, data, bytes);
    ck_assert_int_eq(newest(), 20); // the test itself has repaired it
    free(data);
}

START_TEST(damage_anywhere_is_found_named_and_stepped_over) {
    setenv("DENSE2MOE_LOG", "error", 1); // hundreds of warnings otherwise
    use_directory("damage");
    Fixture f = fixture();
    ck_assert_ok(save(&f, 10));
    ck_assert_ok(save(&f, 20));
    damage_file("model.safetensors");
    damage_file("optimizer-00000-of-00001.safetensors");
    damage_file("state.json");
    damage_file("config.json");
    damage_file(MANIFEST_NAME);
    fixture_free(&f);
}
END_TEST

START_TEST(all_broken_is_an_error_and_none_is_not) {
    int64_t step;
    char path[IO_PATH_MAX];
    use_directory("broken");
    ck_assert_int_eq(newest(), -1);
    Fixture f = fixture();
    ck_assert_ok(save(&f, 10));
    ck_assert_ok(save(&f, 20));
    overwrite(path_of(10, "state.json"), "{}", 2);
    overwrite(path_of(20, "state.json"), "{}", 2);
    ck_assert_fails(checkpoint_find(directory, &step, path), STATUS_BAD_DATA,
                    "step_00000020/state.json");
    fixture_free(&f);
}
END_TEST

static void expect_manifest(const char *text, const char *message) {
    json_t *root;
    Manifest manifest;
    ck_assert_ok(json_parse(text, strlen(text), "manifest.json", &root));
    ck_assert_fails(manifest_from_json(root, "manifest.json", &manifest), STATUS_BAD_DATA, message);
    json_decref(root);
}

#define HEX         "0123456789abcdef0123456789abcdef"
#define ENTRY(name) "{\"name\": \"" name "\", \"bytes\": 1, \"xxh3_128\": \"" HEX "\"}"
// 5000 bytes, with hashes of blocks.
#define BLOCKS(block_bytes, digits)                                                                \
    "{\"name\": \"blocks\", \"bytes\": 5000, \"xxh3_128\": \"" HEX                                 \
    "\", \"block_bytes\": " block_bytes ", \"xxh3_64\": \"" digits "\"}]}"
#define FORMAT    "\"format\": \"dense2moe-checkpoint\""
#define HEAD      "{" FORMAT ", \"version\": 1, \"step\": 1, \"files\": ["
#define BASIC     ENTRY("model.safetensors") "," ENTRY("state.json")
#define OPTIMIZER "optimizer-00000-of-00001.safetensors"

START_TEST(lying_manifests_are_refused) {
    expect_manifest(HEAD BASIC "," ENTRY(OPTIMIZER) "," ENTRY("../../etc/passwd") "]}", "plain");
    expect_manifest(HEAD BASIC "," ENTRY(OPTIMIZER) "," ENTRY("/etc/passwd") "]}", "plain");
    expect_manifest(HEAD BASIC "," ENTRY(OPTIMIZER) "," ENTRY("") "]}", "plain");
    expect_manifest(HEAD BASIC "," ENTRY(OPTIMIZER) "," ENTRY("state.json") "]}", "twice");
    expect_manifest(HEAD ENTRY("state.json") "," ENTRY(OPTIMIZER) "]}", "model.safetensors");
    expect_manifest(HEAD ENTRY("model.safetensors") "," ENTRY(OPTIMIZER) "]}", "state.json");
    expect_manifest(HEAD BASIC "]}", "optimizer");
    expect_manifest(HEAD BASIC "," ENTRY("optimizer-00000-of-00002.safetensors") "]}",
                    "1 optimizer");
    expect_manifest(HEAD BASIC "," ENTRY("optimizer-00001-of-00001.safetensors") "]}",
                    "unexpected");
    expect_manifest(HEAD BASIC "," ENTRY("optimizer-00000-of-00001.bin") "]}", "unexpected");
    expect_manifest(HEAD BASIC "," ENTRY(OPTIMIZER) ", 7]}", "object");
    expect_manifest(HEAD BASIC "," BLOCKS("4096", "0123456789abcdef"), "each of its blocks");
    expect_manifest(HEAD BASIC "," BLOCKS("4096", "0123456789ABCDEF0123456789ABCDEF"),
                    "each of its blocks");
    expect_manifest(HEAD BASIC "," BLOCKS("8192", "0123456789abcdef"), "block_bytes");
    expect_manifest(HEAD BASIC "," BLOCKS("0", ""), "block_bytes");
    expect_manifest(HEAD BASIC ",{\"name\": \"x\", \"bytes\": -1, \"xxh3_128\": \"" HEX "\"}]}",
                    "bytes");
    expect_manifest(HEAD BASIC ",{\"name\": \"x\", \"bytes\": 1, \"xxh3_128\": \"12\"}]}",
                    "32 hex");
    expect_manifest("{\"format\": \"other\"}", "format");
    expect_manifest("{\"format\": \"dense2moe-checkpoint\", \"version\": 2}", "newer");
    expect_manifest("{}", "format");
}
END_TEST

START_TEST(manifest_of_another_step_is_refused) {
    use_directory("renamed");
    Fixture f = fixture();
    ck_assert_ok(save(&f, 10));
    ck_assert_ok(save(&f, 20));
    ck_assert_ok(checkpoint_remove(path_of(20, "")));
    char from[IO_PATH_MAX];
    snprintf(from, sizeof from, "%s", path_of(10, ""));
    ck_assert_ok(io_rename(from, path_of(20, "")));
    ck_assert_fails(checkpoint_verify(path_of(20, "")), STATUS_BAD_DATA, "step 10");
    fixture_free(&f);
}
END_TEST

TEST_MAIN("checkpoint", TEST(round_trip_is_bit_exact), TEST(moments_in_bf16_come_back_exactly),
          TEST(same_state_gives_the_same_bytes), TEST(model_part_opens_as_a_hugging_face_directory),
          TEST(another_model_is_refused_by_name), TEST(parts_of_three_ranks_read_as_one),
          TEST(missing_and_doubled_parts_are_refused),
          TEST(damage_anywhere_is_found_named_and_stepped_over),
          TEST(all_broken_is_an_error_and_none_is_not), TEST(lying_manifests_are_refused),
          TEST(manifest_of_another_step_is_refused))
