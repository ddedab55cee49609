// Real training runs of a second or less, each in a process of its own, for the tests of what may
// happen to a run. The test process itself never computes: a process that has used OpenMP threads
// cannot fork children that use them.
#ifndef TESTS_TINY_RUN_H
#define TESTS_TINY_RUN_H

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include "base/json.h"
#include "base/random.h"
#include "tests/shard_fixture.h"
#include "train/checkpoint.h"
#include "train/checkpoint_manifest.h"
#include "train/recipe.h"
#include "train/run.h"

enum { TINY_STEPS = 40, TINY_VOCAB = 48, TINY_GLOBAL_BATCH = 4 };

static char tiny_train_[160], tiny_valid_[160], tiny_runs_[160];

__attribute__((unused)) static void tiny_set(Recipe *recipe, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
__attribute__((unused)) static void tiny_set(Recipe *recipe, const char *format, ...) {
    char assignment[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(assignment, sizeof assignment, format, arguments);
    va_end(arguments);
    ck_assert_ok(recipe_set(recipe, assignment));
}

// What every tiny run has in common: data, batch, and intervals that do not fit each other, so that
// log lines, evaluations and checkpoints fall on all sides of an interruption.
static Recipe tiny_recipe_(const char *name) {
    Recipe r;
    recipe_defaults(&r);
    tiny_set(&r, "run.name=%s", name);
    tiny_set(&r, "run.directory=%s", tiny_runs_);
    tiny_set(&r, "run.threads=1");
    tiny_set(&r, "run.device=cpu");
    tiny_set(&r, "data.train=%s", tiny_train_);
    tiny_set(&r, "data.valid=%s", tiny_valid_);
    tiny_set(&r, "data.sequence_length=16");
    tiny_set(&r, "train.steps=%d", TINY_STEPS);
    tiny_set(&r, "train.micro_batch=2");
    tiny_set(&r, "train.global_batch=%d", TINY_GLOBAL_BATCH);
    tiny_set(&r, "train.log_every=3");
    tiny_set(&r, "train.eval_every=10");
    tiny_set(&r, "optim.lr=3e-3");
    tiny_set(&r, "optim.warmup_steps=5");
    tiny_set(&r, "checkpoint.every=4");
    return r;
}

__attribute__((unused)) static Recipe tiny_dense_recipe(const char *name) {
    Recipe r = tiny_recipe_(name);
    tiny_set(&r, "model.hidden_size=32");
    tiny_set(&r, "model.num_layers=4");
    tiny_set(&r, "model.num_heads=4");
    tiny_set(&r, "model.num_kv_heads=2");
    tiny_set(&r, "model.intermediate_size=48");
    return r;
}

// The main job: fuses two layers of the dense run "seed" and trains the experts.
__attribute__((unused)) static Recipe tiny_moe_recipe(const char *name) {
    Recipe r = tiny_recipe_(name);
    tiny_set(&r, "model.source=%s/seed/export", tiny_runs_);
    tiny_set(&r, "lfuc.enabled=true");
    tiny_set(&r, "lfuc.select=budget");
    tiny_set(&r, "lfuc.prune_layers=1");
    tiny_set(&r, "lfuc.num_experts=3");
    tiny_set(&r, "lfuc.follower_copies=1");
    tiny_set(&r, "lfuc.calibration_sequences=4");
    tiny_set(&r, "router.balance_weight=0.01");
    tiny_set(&r, "optim.spike_sigma=8");
    tiny_set(&r, "optim.spike_window=16");
    return r;
}

// --- Processes -----------------------------------------------------------------------------------

static const char *tiny_run_path(const char *name, const char *file) {
    static char path[IO_PATH_MAX];
    snprintf(path, sizeof path, "%s/%s%s%s", tiny_runs_, name, file[0] ? "/" : "", file);
    return path;
}

// What to do to a run, from inside its process.
typedef struct TinyRun {
    RunOptions options;
    IoHook hook;
    void *context;
    Status (*train)(const Recipe *, const RunOptions *); // NULL: run_training
} TinyRun;

int __lsan_do_recoverable_leak_check(void) __attribute__((weak)); // there in an ASan build

// Starts the run in a child, whose failure message goes to <run>.message.
__attribute__((unused)) static pid_t tiny_start(const Recipe *recipe, const TinyRun *run) {
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child > 0) return child;
    static const TinyRun plain;
    if (!run) run = &plain;
    if (run->hook) io_set_hook(run->hook, run->context);
    Status status = (run->train ? run->train : run_training)(recipe, &run->options);
    io_set_hook(NULL, NULL);
    char path[IO_PATH_MAX];
    snprintf(path, sizeof path, "%s/%.64s.message", tiny_runs_, recipe->run_name);
    const char *message = status == STATUS_OK ? "" : status_message();
    if (io_write_file_atomic(path, message, strlen(message)) != STATUS_OK) _exit(99);
    // _exit leaves out what a sanitizer checks at the end: ask for it.
    if (__lsan_do_recoverable_leak_check && __lsan_do_recoverable_leak_check()) _exit(98);
    _exit(status);
}

// The exit code, or 128 + the signal that ended it.
__attribute__((unused)) static int tiny_wait(pid_t child) {
    int status;
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

__attribute__((unused)) static int tiny_train(const Recipe *recipe, const TinyRun *run) {
    return tiny_wait(tiny_start(recipe, run));
}

__attribute__((unused)) static const char *tiny_message(const char *name) {
    static char text[STATUS_TEXT_MAX + 1];
    char path[IO_PATH_MAX], *data;
    size_t bytes;
    snprintf(path, sizeof path, "%s/%.64s.message", tiny_runs_, name);
    ck_assert_ok(io_read_file(path, STATUS_TEXT_MAX, &data, &bytes));
    snprintf(text, sizeof text, "%s", data);
    free(data);
    return text;
}

#define expect_exit(recipe, run, code)                                                             \
    do {                                                                                           \
        int exit_ = tiny_train((recipe), (run));                                                   \
        ck_assert_msg(exit_ == (code), "%s ended with %d, expected %d: %s", (recipe)->run_name,    \
                      exit_, (int)(code), tiny_message((recipe)->run_name));                       \
    } while (0)
#define expect_message(recipe, text)                                                               \
    ck_assert_msg(strstr(tiny_message((recipe)->run_name), (text)) != NULL, "'%s' lacks '%s'",     \
                  tiny_message((recipe)->run_name), (text))

// Data, and the dense run "seed" that the others start from. The children are quiet: what they
// warn about is what the test does to them.
__attribute__((unused)) static void tiny_prepare(void) {
    setenv("DENSE2MOE_LOG", "error", 1);
    DatasetSpec train = {
        .num_tokens = 3000, .num_shards = 2, .vocab_size = TINY_VOCAB, .token_bytes = 2};
    DatasetSpec valid = {
        .num_tokens = 300, .num_shards = 1, .vocab_size = TINY_VOCAB, .token_bytes = 2};
    snprintf(tiny_train_, sizeof tiny_train_, "%s", fixture_dataset("train", &train));
    snprintf(tiny_valid_, sizeof tiny_valid_, "%s", fixture_dataset("valid", &valid));
    snprintf(tiny_runs_, sizeof tiny_runs_, "%s/runs", test_directory());
    ck_assert_ok(io_make_directories(tiny_runs_));
    Recipe seed = tiny_dense_recipe("seed");
    expect_exit(&seed, NULL, STATUS_OK);
}

// --- Files ---------------------------------------------------------------------------------------

// The files of a directory.
__attribute__((unused)) static void tiny_copy_directory(const char *from, const char *to) {
    char **names, source[IO_PATH_MAX], target[IO_PATH_MAX];
    size_t count;
    ck_assert_ok(io_make_directories(to));
    ck_assert_ok(io_list_directory(from, &names, &count));
    for (size_t i = 0; i < count; i++) {
        if (names[i][0] == '.') continue; // notes of a run that has verified shards
        ck_assert_ok(io_path(source, "%s/%s", from, names[i]));
        ck_assert_ok(io_path(target, "%s/%s", to, names[i]));
        ck_assert_ok(io_copy_file(source, target));
    }
    io_free_names(names, count);
}

// Another directory with the training shards, to the byte: train.<name>.
__attribute__((unused)) static void tiny_copy_shards(const char *name, char directory[160]) {
    snprintf(directory, 160, "%.120s.%s", tiny_train_, name);
    tiny_copy_directory(tiny_train_, directory);
}

// Two bits in the middle of a shard's tokens. All ids stay within the vocabulary: only the hash of
// the file can tell.
__attribute__((unused)) static void tiny_spoil_shard(const char *directory, const char *shard) {
    char path[IO_PATH_MAX];
    uint64_t bytes;
    ck_assert_ok(io_path(path, "%s/%s", directory, shard));
    ck_assert_ok(io_file_size(path, &bytes));
    FILE *file = fopen(path, "r+b");
    ck_assert_ptr_nonnull(file);
    for (long at = (long)bytes / 2 & ~1L, i = 0; i < 2; i++, at += 2) {
        ck_assert_int_eq(fseek(file, at, SEEK_SET), 0);
        int low = fgetc(file); // of a token
        ck_assert_int_eq(fseek(file, at, SEEK_SET), 0);
        ck_assert_int_eq(fputc(low ^ 1, file), low ^ 1);
    }
    ck_assert_int_eq(fclose(file), 0);
}

// A manifest that has never heard of the last of two shards.
__attribute__((unused)) static void tiny_forget_shard(const char *directory) {
    static const char *const totals[] = {"tokens", "documents"};
    char path[IO_PATH_MAX];
    json_t *root, *shards;
    ck_assert_ok(io_path(path, "%s/shards.json", directory));
    ck_assert_ok(json_read_file(path, 1 << 20, &root));
    ck_assert_ok(json_get_array(root, path, "shards", &shards));
    ck_assert_uint_eq(json_array_size(shards), 2);
    ck_assert_int_eq(json_array_remove(shards, 1), 0);
    for (int i = 0; i < 2; i++)
        json_object_set(root, totals[i], json_object_get(json_array_get(shards, 0), totals[i]));
    ck_assert_ok(json_write_file(path, root));
    json_decref(root);
}

// For TinyRun.train: warnings go to <run>.warnings.
__attribute__((unused)) static Status tiny_train_warning(const Recipe *recipe,
                                                         const RunOptions *options) {
    char path[IO_PATH_MAX];
    TRY(io_path(path, "%s/%s.warnings", tiny_runs_, recipe->run_name));
    setenv("DENSE2MOE_LOG", "warn", 1);
    int file = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (file < 0 || dup2(file, STDERR_FILENO) < 0) FAIL(STATUS_IO, "%s: cannot be written", path);
    close(file);
    return run_training(recipe, options);
}

__attribute__((unused)) static void tiny_expect_warning(const char *name, const char *text) {
    char path[IO_PATH_MAX], *warnings;
    size_t bytes;
    ck_assert_ok(io_path(path, "%s/%s.warnings", tiny_runs_, name));
    ck_assert_ok(io_read_file(path, 1 << 20, &warnings, &bytes));
    ck_assert_msg(strstr(warnings, text) != NULL, "'%s' lacks '%s'", warnings, text);
    free(warnings);
}

// --- What a run has left -------------------------------------------------------------------------

// Records of log.jsonl of one kind ("step", "eval", "event"; NULL = all), without what depends on
// the clock.
__attribute__((unused)) static json_t *tiny_log(const char *name, const char *kind) {
    static const char *const clock_keys[] = {"time", "tokens_per_second", "data_wait",
                                             "eta_seconds"};
    char *text, *save = NULL;
    size_t bytes;
    json_t *list = json_array();
    ck_assert_ok(io_read_file(tiny_run_path(name, "log.jsonl"), 1 << 24, &text, &bytes));
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        json_t *record;
        ck_assert_ok(json_parse(line, strlen(line), "log.jsonl", &record));
        for (int i = 0; i < 4; i++) json_object_del(record, clock_keys[i]);
        const char *found = json_string_value(json_object_get(record, "kind"));
        if (!kind || strcmp(found, kind) == 0) json_array_append(list, record);
        json_decref(record);
    }
    free(text);
    return list;
}

__attribute__((unused)) static size_t tiny_count(const char *name, const char *kind) {
    json_t *list = tiny_log(name, kind);
    size_t count = json_array_size(list);
    json_decref(list);
    return count;
}

__attribute__((unused)) static size_t tiny_count_events(const char *name, const char *event) {
    json_t *list = tiny_log(name, "event"), *record;
    size_t index, count = 0;
    json_array_foreach(list, index, record) {
        count += strcmp(json_string_value(json_object_get(record, "event")), event) == 0;
    }
    json_decref(list);
    return count;
}

__attribute__((unused)) static void expect_same_log(const char *a, const char *b,
                                                    const char *kind) {
    json_t *x = tiny_log(a, kind), *y = tiny_log(b, kind), *record;
    size_t index;
    ck_assert_uint_gt(json_array_size(x), 0);
    json_array_foreach(x, index, record) {
        const json_t *other = json_array_get(y, index);
        if (json_equal(record, other)) continue;
        char *p = json_dumps(record, JSON_COMPACT),
             *q = other ? json_dumps(other, JSON_COMPACT) : NULL;
        ck_abort_msg("%s record %zu of %s is\n%.1500s\nand of %s\n%.1500s", kind, index, a, p, b,
                     q ? q : "missing");
    }
    ck_assert_uint_eq(json_array_size(x), json_array_size(y));
    json_decref(x);
    json_decref(y);
}

// Step of the newest checkpoint and the hash of one of its files.
__attribute__((unused)) static int64_t tiny_newest(const char *name, const char *file,
                                                   char hex[HASH_HEX_SIZE]) {
    char path[IO_PATH_MAX], full[IO_PATH_MAX];
    int64_t step;
    uint64_t bytes;
    ck_assert_ok(checkpoint_find(tiny_run_path(name, "checkpoints"), &step, path));
    ck_assert_msg(step >= 0, "%s has no checkpoint", name);
    ck_assert_ok(io_path(full, "%s/%s", path, file));
    ck_assert_ok(hash_file(full, hex, &bytes, NULL, NULL));
    return step;
}

// Final weights and optimizer state to the bit, and every loss that was logged.
__attribute__((unused)) static void expect_same_run(const char *a, const char *b) {
    static const char *const files[] = {"model.safetensors",
                                        "optimizer-00000-of-00001.safetensors"};
    char x[HASH_HEX_SIZE], y[HASH_HEX_SIZE];
    expect_same_log(a, b, "step");
    expect_same_log(a, b, "eval");
    for (int i = 0; i < 2; i++) {
        ck_assert_int_eq(tiny_newest(a, files[i], x), tiny_newest(b, files[i], y));
        ck_assert_msg(strcmp(x, y) == 0, "%s of %s and %s differ", files[i], a, b);
    }
}

#endif
