// A tiny model with a checkpoint writer, and a directory of checkpoints for each test.
#ifndef TESTS_CHECKPOINT_FIXTURE_H
#define TESTS_CHECKPOINT_FIXTURE_H

#include <inttypes.h>
#include "tests/tiny_trainer.h"
#include "train/checkpoint.h"
#include "train/checkpoint_manifest.h"

static char directory[160]; // of the checkpoints, fresh for each test
__attribute__((unused)) static void use_directory(const char *name) {
    snprintf(directory, sizeof directory, "%s/%s", test_directory(), name);
    ck_assert_ok(io_make_directories(directory));
}

__attribute__((unused)) static const char *path_of(int64_t step, const char *file) {
    static char path[IO_PATH_MAX];
    char checkpoint[IO_PATH_MAX];
    ck_assert_ok(checkpoint_path(directory, step, checkpoint));
    snprintf(path, sizeof path, "%.4000s%s%s", checkpoint, file[0] ? "/" : "", file);
    return path;
}

typedef struct Fixture {
    TinyTrainer t;
    CheckpointWriter *writer;
} Fixture;

__attribute__((unused)) static Fixture fixture_with(DType dtype, int64_t keep_last,
                                                    int64_t keep_every) {
    ModelConfig config = tiny_config();
    OptimizerOptions options = tiny_options();
    CheckpointOptions checkpoint = {
        .directory = directory, .keep_last = keep_last, .keep_every = keep_every, .dtype = dtype};
    Fixture f = {.t = tiny_trainer(&config, &options, 1)};
    fill_arena(&f.t, f.t.optimizer->m, 2, 0, 1e-3f);
    fill_arena(&f.t, f.t.optimizer->v, 3, 1e-4f, 1e-6f);
    ck_assert_ok(checkpoint_writer_create(f.t.model, f.t.optimizer, &checkpoint, &f.writer));
    return f;
}
__attribute__((unused)) static Fixture fixture(void) {
    return fixture_with(DTYPE_BF16, 2, 0);
}

__attribute__((unused)) static void fixture_free(Fixture *f) {
    checkpoint_writer_destroy(f->writer);
    tiny_trainer_free(&f->t);
}

__attribute__((unused)) static Status save(Fixture *f, int64_t step) {
    json_t *state = json_pack("{s:I, s:f}", "step", (json_int_t)step, "third", 1.0 / 3);
    Status status = checkpoint_begin(f->writer, step, state);
    if (status == STATUS_OK) status = checkpoint_start(f->writer);
    json_decref(state);
    if (status == STATUS_OK) status = checkpoint_wait(f->writer);
    return status;
}

__attribute__((unused)) static int64_t newest(void) {
    int64_t step;
    char path[IO_PATH_MAX];
    ck_assert_ok(checkpoint_find(directory, &step, path));
    return step;
}

__attribute__((unused)) static void check_arena_equal(const TinyTrainer *a, const float *x,
                                                      const TinyTrainer *b, const float *y,
                                                      const char *what) {
    float *p = download_arena(a, x), *q = download_arena(b, y);
    ck_assert_msg(memcmp(p, q, (size_t)a->model->table.total * sizeof *p) == 0, "%s differ", what);
    free(p);
    free(q);
}

__attribute__((unused)) static size_t count_names(const char *part) {
    char **names;
    size_t count, found = 0;
    ck_assert_ok(io_list_directory(directory, &names, &count));
    for (size_t i = 0; i < count; i++) found += strstr(names[i], part) != NULL;
    io_free_names(names, count);
    return found;
}

__attribute__((unused)) static void overwrite(const char *path, const char *data, size_t bytes) {
    FILE *file = fopen(path, "wb");
    ck_assert_ptr_nonnull(file);
    ck_assert_int_eq(fwrite(data, 1, bytes, file), bytes);
    ck_assert_int_eq(fclose(file), 0);
}

#endif
