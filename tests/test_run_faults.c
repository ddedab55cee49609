// What may go wrong around a run: bad numbers, a full disk, another recipe, other data, two runs in
// one place. Each ends as documented, with a message that names the cause, or does not end at all.
#include "tests/tiny_run.h"

#include <errno.h>
#include <math.h>
#include <sys/resource.h>
#include "model/backend.h"

// A run on the CPU backend with some of its ops changed.
static Status train_with(const Recipe *recipe, const RunOptions *options,
                         void (*change)(BackendOps *)) {
    Backend *backend;
    TRY(prepare_backend(recipe, 0, &backend));
    BackendOps ops = *backend->ops;
    change(&ops);
    backend->ops = &ops;
    Status status = run_training_on(backend, recipe, options);
    backend_destroy(backend);
    return status;
}

// --- Bad numbers ---------------------------------------------------------------------------------

// A backend that spoils the loss, or a gradient, of chosen steps.
enum { SPOIL_LOSS, SPOIL_GRADIENT };
static struct {
    int what;
    int first, last;          // steps
    int micro_batches, steps; // seen so far
    Status (*cross_entropy)(Backend *, const LinearCrossEntropyArgs *);
    Status (*norm2)(Backend *, DType, const void *, int64_t, double *);
} spoil;

static Status spoil_value(Backend *backend, double *device) {
    double nan = NAN;
    return backend->ops->upload(backend, device, &nan, sizeof nan);
}

static bool spoils(int what, int step) {
    return spoil.what == what && step >= spoil.first && step <= spoil.last;
}

static Status spoiled_cross_entropy(Backend *backend, const LinearCrossEntropyArgs *args) {
    TRY(spoil.cross_entropy(backend, args));
    if (!args->grad_weight) return STATUS_OK; // an evaluation
    int step = spoil.micro_batches++ / 2 + 1; // two micro-batches a step
    return spoils(SPOIL_LOSS, step) ? spoil_value(backend, args->loss_sum) : STATUS_OK;
}

// Called twice a step: for the body and for the routers' tail.
static Status spoiled_norm2(Backend *backend, DType dtype, const void *grad, int64_t count,
                            double *sums) {
    TRY(spoil.norm2(backend, dtype, grad, count, sums));
    int step = spoil.steps++ / 2 + 1;
    return spoils(SPOIL_GRADIENT, step) ? spoil_value(backend, sums) : STATUS_OK;
}

static void spoil_ops(BackendOps *ops) {
    spoil.cross_entropy = ops->linear_cross_entropy;
    spoil.norm2 = ops->norm2;
    ops->linear_cross_entropy = spoiled_cross_entropy;
    ops->norm2 = spoiled_norm2;
}

static Status train_spoiled(const Recipe *recipe, const RunOptions *options) {
    return train_with(recipe, options, spoil_ops);
}

static const TinyRun spoiled = {.train = train_spoiled};

static double last_loss(const char *name) {
    json_t *steps = tiny_log(name, "step");
    json_t *last = json_array_get(steps, json_array_size(steps) - 1);
    double loss = json_is_number(json_object_get(last, "loss"))
                      ? json_number_value(json_object_get(last, "loss"))
                      : NAN;
    json_decref(steps);
    return loss;
}

START_TEST(bad_steps_are_skipped_counted_and_leave_no_trace) {
    tiny_prepare();
    for (int what = SPOIL_LOSS; what <= SPOIL_GRADIENT; what++) {
        char name[32];
        snprintf(name, sizeof name, "skips%d", what);
        Recipe recipe = tiny_moe_recipe(name);
        spoil.what = what;
        spoil.first = 5;
        spoil.last = 7;
        expect_exit(&recipe, &spoiled, STATUS_OK);
        ck_assert_uint_eq(tiny_count_events(name, "skip"), 3);
        ck_assert(isfinite(last_loss(name)));
        json_t *steps = tiny_log(name, "step");
        json_t *last = json_array_get(steps, json_array_size(steps) - 1);
        ck_assert_int_eq(json_integer_value(json_object_get(last, "skipped")), 3);
        // The schedule and the data go on: the last step has the last step's number.
        ck_assert_int_eq(json_integer_value(json_object_get(last, "step")), TINY_STEPS);
        json_decref(steps);
    }
    expect_same_run("skips0", "skips1"); // what was bad about a step does not matter
}
END_TEST

// The same as if the rule had thrown them away, and no sign of a run gone wrong.
START_TEST(steps_are_skipped_on_request) {
    tiny_prepare();
    Recipe recipe = tiny_moe_recipe("asked"), other = tiny_moe_recipe("spoiled");
    tiny_set(&recipe, "optim.skip_steps=5-6, 7, 900-1000");
    recipe.optim_max_skipped = 2;
    expect_exit(&recipe, NULL, STATUS_OK);
    ck_assert_uint_eq(tiny_count_events("asked", "skip"), 3);
    spoil.what = SPOIL_GRADIENT;
    spoil.first = 5;
    spoil.last = 7;
    expect_exit(&other, &spoiled, STATUS_OK);
    expect_same_run("asked", "spoiled");
    // A run may be continued with other steps to skip, and stops where they lie behind it.
    Recipe more = tiny_moe_recipe("asked");
    tiny_set(&more, "optim.skip_steps=%d", TINY_STEPS + 1);
    tiny_set(&more, "train.steps=%d", TINY_STEPS + 2);
    expect_exit(&more, NULL, STATUS_OK);
    ck_assert_uint_eq(tiny_count_events("asked", "skip"), 4);
}
END_TEST

START_TEST(too_many_bad_steps_end_the_run_naming_samples) {
    char hex[HASH_HEX_SIZE];
    tiny_prepare();
    Recipe recipe = tiny_moe_recipe("hopeless");
    recipe.optim_max_skipped = 3;
    spoil.what = SPOIL_LOSS;
    spoil.first = 10;
    spoil.last = TINY_STEPS;
    expect_exit(&recipe, &spoiled, STATUS_NUMERICS);
    expect_message(&recipe, "steps 10 to 12");
    // Steps of four samples: 0-3, 4-7, ...
    expect_message(&recipe, "samples 36 to 47");
    expect_message(&recipe, "max_skipped");
    ck_assert_int_eq(tiny_newest("hopeless", "state.json", hex), 8);
    // Without the cause the same command goes on from there.
    expect_exit(&recipe, NULL, STATUS_OK);
}
END_TEST

// --- Memory --------------------------------------------------------------------------------------

// A backend whose allocation number `fails` fails, as on a device that is full.
static struct {
    int fails, calls;
    Status (*alloc)(Backend *, size_t, void **);
    Status (*host_alloc)(Backend *, size_t, void **);
} scarce;

static Status scarce_alloc(Backend *backend, size_t bytes, void **out) {
    *out = NULL;
    if (++scarce.calls == scarce.fails)
        FAIL(STATUS_INTERNAL, "no room for %zu bytes on the device", bytes);
    return scarce.alloc(backend, bytes, out);
}

static Status scarce_host_alloc(Backend *backend, size_t bytes, void **out) {
    *out = NULL;
    if (++scarce.calls == scarce.fails)
        FAIL(STATUS_INTERNAL, "no room for %zu bytes of host memory", bytes);
    return scarce.host_alloc(backend, bytes, out);
}

static void make_scarce(BackendOps *ops) {
    scarce.alloc = ops->alloc;
    scarce.host_alloc = ops->host_alloc;
    ops->alloc = scarce_alloc;
    ops->host_alloc = scarce_host_alloc;
}

static Status train_scarce(const Recipe *recipe, const RunOptions *options) {
    return train_with(recipe, options, make_scarce);
}

// Each allocation of measuring, surgery and training in turn. What had been taken before is given
// back (the child looks for leaks under a sanitizer), and the same command then works.
START_TEST(an_allocation_that_fails_ends_the_run) {
    const TinyRun run = {.train = train_scarce};
    int failures = 0;
    tiny_prepare();
    for (scarce.fails = 1;; scarce.fails++) {
        char name[32];
        snprintf(name, sizeof name, "scarce%d", scarce.fails);
        Recipe recipe = tiny_moe_recipe(name);
        tiny_set(&recipe, "train.steps=2");
        int code = tiny_train(&recipe, &run);
        if (code == STATUS_OK) break;
        ck_assert_msg(code == STATUS_INTERNAL, "allocation %d: exit %d: %s", scarce.fails, code,
                      tiny_message(name));
        expect_message(&recipe, "no room for");
        if (failures++ == 0) expect_exit(&recipe, NULL, STATUS_OK);
    }
    printf("%d allocations failed\n", failures);
    ck_assert_int_ge(failures, 20);
}
END_TEST

// --- The disk ------------------------------------------------------------------------------------

typedef struct FullDisk {
    const char *part; // of the paths that cannot be written
    int first, last;  // writes that fail, counted from 1
    int writes;
} FullDisk;

static int full_disk(void *context, IoOp op, const char *path, size_t *bytes) {
    FullDisk *disk = context;
    (void)bytes;
    if (op != IO_WRITE || !path || !strstr(path, disk->part)) return 0;
    int write = __atomic_add_fetch(&disk->writes, 1, __ATOMIC_RELAXED);
    return write >= disk->first && write <= disk->last ? ENOSPC : 0;
}

START_TEST(training_goes_on_while_the_disk_is_full) {
    tiny_prepare();
    Recipe plain = tiny_moe_recipe("plain"), recipe = tiny_moe_recipe("full");
    expect_exit(&plain, NULL, STATUS_OK);
    FullDisk disk = {.part = "/checkpoints/", .first = 3, .last = 5}; // three saves, one each
    TinyRun run = {.hook = full_disk, .context = &disk};
    expect_exit(&recipe, &run, STATUS_OK);
    ck_assert_uint_eq(tiny_count_events("full", "save_failed"), 3);
    expect_same_run("plain", "full");
}
END_TEST

// `ulimit -f`: the model's file is larger, all others of the run are smaller.
static Status train_with_small_files(const Recipe *recipe, const RunOptions *options) {
    const struct rlimit limit = {.rlim_cur = 24 << 10, .rlim_max = 24 << 10};
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0)
        FAIL(STATUS_INTERNAL, "setrlimit: %s", strerror(errno));
    return run_training(recipe, options);
}

START_TEST(a_limit_of_file_sizes_is_a_failed_save) {
    tiny_prepare();
    Recipe recipe = tiny_moe_recipe("limited");
    recipe.checkpoint_max_failures = 3;
    TinyRun run = {.train = train_with_small_files};
    expect_exit(&recipe, &run, STATUS_IO);
    expect_message(&recipe, "3 saves in a row failed");
    expect_message(&recipe, "File too large");
    ck_assert_uint_eq(tiny_count_events("limited", "save_failed"), 3);
}
END_TEST

START_TEST(saves_that_never_succeed_end_the_run) {
    tiny_prepare();
    Recipe recipe = tiny_moe_recipe("hopeless");
    recipe.checkpoint_max_failures = 3;
    FullDisk disk = {.part = "/checkpoints/step_00000012", .first = 1, .last = 1 << 30};
    TinyRun run = {.hook = full_disk, .context = &disk};
    // One save fails for good, the others do not: three in a row is what counts.
    expect_exit(&recipe, &run, STATUS_OK);
    Recipe never = tiny_moe_recipe("never");
    never.checkpoint_max_failures = 3;
    disk.part = "/checkpoints/";
    expect_exit(&never, &run, STATUS_IO);
    expect_message(&never, "3 saves in a row failed");
    expect_message(&never, "No space left");
    ck_assert_uint_eq(tiny_count_events("never", "save_failed"), 3);
}
END_TEST

START_TEST(a_final_save_that_fails_is_the_runs_failure) {
    char hex[HASH_HEX_SIZE];
    tiny_prepare();
    Recipe recipe = tiny_moe_recipe("last");
    FullDisk disk = {.part = "/checkpoints/step_00000040", .first = 1, .last = 1 << 30};
    TinyRun run = {.hook = full_disk, .context = &disk};
    expect_exit(&recipe, &run, STATUS_IO);
    expect_message(&recipe, "newest checkpoint is of step 36");
    ck_assert_int_eq(tiny_newest("last", "state.json", hex), 36);
    expect_exit(&recipe, NULL, STATUS_OK);
}
END_TEST

START_TEST(a_full_log_disk_does_not_matter) {
    char a[HASH_HEX_SIZE], b[HASH_HEX_SIZE];
    const char *optimizer = "optimizer-00000-of-00001.safetensors";
    tiny_prepare();
    Recipe plain = tiny_moe_recipe("plain"), recipe = tiny_moe_recipe("nolog");
    expect_exit(&plain, NULL, STATUS_OK);
    FullDisk disk = {.part = "log.jsonl", .first = 3, .last = 1 << 30};
    TinyRun run = {.hook = full_disk, .context = &disk};
    expect_exit(&recipe, &run, STATUS_OK);
    ck_assert_int_eq(tiny_newest("plain", optimizer, a), tiny_newest("nolog", optimizer, b));
    ck_assert_str_eq(a, b);
}
END_TEST

// --- Another recipe ------------------------------------------------------------------------------

// Continues the run `name` (stopped at step 20 of 40) with one setting changed.
static void expect_refusal(const char *setting, const char *message) {
    Recipe recipe = tiny_moe_recipe("changed");
    tiny_set(&recipe, "%s", setting);
    expect_exit(&recipe, NULL, STATUS_RECIPE_MISMATCH);
    expect_message(&recipe, message);
}

START_TEST(what_decides_the_model_or_the_data_may_not_change) {
    char before[HASH_HEX_SIZE], after[HASH_HEX_SIZE];
    tiny_prepare();
    Recipe half = tiny_moe_recipe("changed");
    half.train_steps = 20;
    expect_exit(&half, NULL, STATUS_OK);
    ck_assert_int_eq(tiny_newest("changed", MANIFEST_NAME, before), 20);

    expect_refusal("run.seed=5", "run.seed: checkpoint 1, now 5");
    expect_refusal("lfuc.num_experts=4", "lfuc.num_experts: checkpoint 3, now 4");
    expect_refusal("router.gate=straight_through", "router.gate: checkpoint softmax");
    expect_refusal("data.sequence_length=8", "data.sequence_length: checkpoint 16, now 8");
    char mixture[400];
    snprintf(mixture, sizeof mixture, "data.train=%s:2, %s:1", tiny_train_, tiny_valid_);
    expect_refusal(mixture, "data.train (mixture)");
    snprintf(mixture, sizeof mixture, "data.train=%s", tiny_valid_);
    expect_refusal(mixture, "fingerprint");
    // Several differences come in one message.
    Recipe several = tiny_moe_recipe("changed");
    tiny_set(&several, "run.seed=5");
    tiny_set(&several, "lfuc.top_k=2");
    expect_exit(&several, NULL, STATUS_RECIPE_MISMATCH);
    expect_message(&several, "run.seed");
    expect_message(&several, "lfuc.top_k: checkpoint 1, now 2");
    ck_assert_int_eq(tiny_newest("changed", MANIFEST_NAME, after), 20);
    ck_assert_str_eq(before, after);

    // What only decides how to go on may.
    Recipe allowed = tiny_moe_recipe("changed");
    tiny_set(&allowed, "optim.lr=1e-3");
    tiny_set(&allowed, "train.log_every=1");
    tiny_set(&allowed, "train.micro_batch=4");
    tiny_set(&allowed, "checkpoint.every=10");
    tiny_set(&allowed, "optim.state_dtype=bf16");
    expect_exit(&allowed, NULL, STATUS_OK);
    ck_assert_int_eq(tiny_newest("changed", MANIFEST_NAME, after), TINY_STEPS);
    // Not even where nothing is left to do.
    expect_exit(&allowed, NULL, STATUS_OK);
    expect_refusal("run.seed=5", "run.seed: checkpoint 1, now 5");
}
END_TEST

START_TEST(another_source_model_is_refused_by_its_shape) {
    tiny_prepare();
    Recipe recipe = tiny_dense_recipe("dense");
    recipe.train_steps = 8;
    expect_exit(&recipe, NULL, STATUS_OK);
    recipe.train_steps = 12;
    tiny_set(&recipe, "model.intermediate_size=64");
    expect_exit(&recipe, NULL, STATUS_RECIPE_MISMATCH);
    expect_message(&recipe, "intermediate_size: checkpoint 48, now 64");
}
END_TEST

START_TEST(moved_data_is_the_same_data) {
    char path[IO_PATH_MAX];
    tiny_prepare();
    // A constant rate, so that stopping at step 20 and going on is the same as 40 at once.
    Recipe recipe = tiny_moe_recipe("moved"), plain = tiny_moe_recipe("plain");
    tiny_set(&recipe, "optim.schedule=constant");
    tiny_set(&plain, "optim.schedule=constant");
    expect_exit(&plain, NULL, STATUS_OK);
    recipe.train_steps = 20;
    expect_exit(&recipe, NULL, STATUS_OK);
    recipe.train_steps = TINY_STEPS;
    snprintf(path, sizeof path, "%.150s.elsewhere", tiny_train_);
    ck_assert_ok(io_rename(tiny_train_, path));
    tiny_set(&recipe, "data.train=%.400s", path);
    expect_exit(&recipe, NULL, STATUS_OK);
    char a[HASH_HEX_SIZE], b[HASH_HEX_SIZE];
    const char *optimizer = "optimizer-00000-of-00001.safetensors";
    ck_assert_int_eq(tiny_newest("moved", optimizer, a), tiny_newest("plain", optimizer, b));
    ck_assert_str_eq(a, b);
}
END_TEST

// --- Spoiled shards ------------------------------------------------------------------------------

START_TEST(a_spoiled_shard_ends_the_run_or_is_left_out) {
    static const TinyRun warning = {.train = tiny_train_warning};
    char bad[160], rest[160], hex[2][HASH_HEX_SIZE];
    const char *optimizer = "optimizer-00000-of-00001.safetensors";
    tiny_prepare();
    tiny_copy_shards("spoiled", bad);
    tiny_spoil_shard(bad, "shard-00001.h5");
    tiny_copy_shards("rest", rest);
    tiny_forget_shard(rest);
    // A constant rate, so that stopping at step 20 and going on is the same as 40 at once.
    Recipe recipe = tiny_moe_recipe("spoiled"), plain = tiny_moe_recipe("rest");
    tiny_set(&recipe, "optim.schedule=constant");
    tiny_set(&recipe, "data.train=%s", bad);
    tiny_set(&plain, "optim.schedule=constant");
    tiny_set(&plain, "data.train=%s", rest);
    expect_exit(&recipe, NULL, STATUS_BAD_DATA);
    expect_message(&recipe, "spoiled/shard-00001.h5: its XXH3-128 is");
    ck_assert(!io_exists(tiny_run_path("spoiled", "log.jsonl"))); // it did not begin
    // Left out, it is as if it had never been there: for calibration, order and epochs.
    tiny_set(&recipe, "data.on_bad_shard=skip_shard");
    recipe.train_steps = 20;
    expect_exit(&recipe, &warning, STATUS_OK);
    tiny_expect_warning("spoiled", "spoiled/shard-00001.h5: its XXH3-128 is");
    tiny_expect_warning("spoiled", "spoiled: 1 of 2 shards left out");
    recipe.train_steps = TINY_STEPS;
    expect_exit(&recipe, NULL, STATUS_OK); // the next attempt leaves out the same
    ck_assert_uint_eq(tiny_count_events("spoiled", "skipped_shards"), 2);
    expect_exit(&plain, NULL, STATUS_OK);
    ck_assert_int_eq(tiny_newest("spoiled", optimizer, hex[0]), TINY_STEPS);
    ck_assert_int_eq(tiny_newest("rest", optimizer, hex[1]), TINY_STEPS);
    ck_assert_str_eq(hex[0], hex[1]);
    // None is left.
    tiny_spoil_shard(bad, "shard-00000.h5");
    Recipe none = tiny_moe_recipe("none");
    tiny_set(&none, "data.train=%s", bad);
    tiny_set(&none, "data.on_bad_shard=skip_shard");
    expect_exit(&none, NULL, STATUS_BAD_DATA);
    expect_message(&none, "all 2 shards are bad");
}
END_TEST

// Leaving it out would change what the rest of the run sees, and in which order.
START_TEST(a_shard_that_spoils_between_attempts_ends_the_run) {
    char directory[160], hex[HASH_HEX_SIZE];
    tiny_prepare();
    tiny_copy_shards("spoils", directory);
    Recipe recipe = tiny_moe_recipe("spoils");
    tiny_set(&recipe, "data.train=%s", directory);
    tiny_set(&recipe, "data.on_bad_shard=skip_shard");
    recipe.train_steps = 20;
    expect_exit(&recipe, NULL, STATUS_OK);
    tiny_spoil_shard(directory, "shard-00001.h5");
    recipe.train_steps = TINY_STEPS;
    expect_exit(&recipe, NULL, STATUS_RECIPE_MISMATCH);
    expect_message(&recipe, "data.train (fingerprint of the shards' content)");
    tiny_set(&recipe, "data.on_bad_shard=abort");
    expect_exit(&recipe, NULL, STATUS_BAD_DATA);
    expect_message(&recipe, "spoils/shard-00001.h5");
    ck_assert_int_eq(tiny_newest("spoils", "state.json", hex), 20);
}
END_TEST

// --- Broken checkpoints --------------------------------------------------------------------------

static void spoil_newest(const char *name, int64_t step) {
    char path[IO_PATH_MAX], file[IO_PATH_MAX];
    ck_assert_ok(checkpoint_path(tiny_run_path(name, "checkpoints"), step, path));
    ck_assert_ok(io_path(file, "%s/optimizer-00000-of-00001.safetensors", path));
    FILE *stream = fopen(file, "r+b");
    ck_assert_ptr_nonnull(stream);
    ck_assert_int_eq(fseek(stream, -9, SEEK_END), 0);
    ck_assert_int_eq(fputc(0x5a, stream), 0x5a);
    ck_assert_int_eq(fclose(stream), 0);
}

START_TEST(a_broken_checkpoint_costs_its_interval_and_no_more) {
    char hex[HASH_HEX_SIZE];
    tiny_prepare();
    Recipe plain = tiny_moe_recipe("plain"), recipe = tiny_moe_recipe("broken");
    expect_exit(&plain, NULL, STATUS_OK);
    expect_exit(&recipe, NULL, STATUS_OK);
    ck_assert_ok(io_unlink(tiny_run_path("broken", "result.json")));
    spoil_newest("broken", 40);
    expect_exit(&recipe, NULL, STATUS_OK);
    ck_assert_int_eq(tiny_newest("broken", "state.json", hex), TINY_STEPS);
    expect_same_run("plain", "broken");
    // All of them broken: never from the beginning without being told to.
    spoil_newest("broken", 40);
    spoil_newest("broken", 36);
    expect_exit(&recipe, NULL, STATUS_BAD_DATA);
    expect_message(&recipe, "--resume never");
}
END_TEST

// --- Places --------------------------------------------------------------------------------------

START_TEST(two_runs_in_one_directory_are_refused) {
    tiny_prepare();
    RunDir held;
    Recipe recipe = tiny_moe_recipe("shared");
    ck_assert_ok(rundir_open(&held, tiny_runs_, "shared"));
    expect_exit(&recipe, NULL, STATUS_USAGE);
    char pid[32];
    snprintf(pid, sizeof pid, "%d", (int)getpid());
    expect_message(&recipe, pid);
    rundir_close(&held);
    expect_exit(&recipe, NULL, STATUS_OK);
}
END_TEST

START_TEST(results_say_where_everything_is) {
    tiny_prepare();
    json_t *root;
    double start, end;
    char path[IO_PATH_MAX];
    Recipe recipe = tiny_moe_recipe("result");
    expect_exit(&recipe, NULL, STATUS_OK);
    ck_assert_ok(json_read_file(tiny_run_path("result", "result.json"), 1 << 20, &root));
    ck_assert_ok(json_get_real(root, "result", "perplexity_start", &start));
    ck_assert_ok(json_get_real(root, "result", "perplexity_end", &end));
    ck_assert_ok(json_get_text(root, "result", "export", path, sizeof path));
    ck_assert(end < start); // it has learned something
    ck_assert(io_exists(tiny_run_path("result", "export/model.safetensors")));
    ck_assert_str_eq(path, tiny_run_path("result", "export"));
    json_decref(root);
    // Scripts read the same from the log.
    json_t *evals = tiny_log("result", "eval");
    size_t last = json_array_size(evals) - 1;
    ck_assert_str_eq(json_string_value(json_object_get(json_array_get(evals, 0), "name")), "start");
    ck_assert_str_eq(json_string_value(json_object_get(json_array_get(evals, last), "name")),
                     "end");
    ck_assert_uint_eq(last, 4); // steps 0, 10, 20, 30, 40
    json_decref(evals);
}
END_TEST

START_TEST(missing_inputs_are_found_before_anything_is_made) {
    tiny_prepare();
    Recipe recipe = tiny_moe_recipe("missing");
    tiny_set(&recipe, "model.source=%s/nothing", tiny_runs_);
    expect_exit(&recipe, NULL, STATUS_MISSING_INPUT);
    ck_assert(!io_exists(tiny_run_path("missing", "")));
    recipe = tiny_moe_recipe("missing");
    tiny_set(&recipe, "data.train=%s/nothing", tiny_runs_);
    expect_exit(&recipe, NULL, STATUS_MISSING_INPUT);
    ck_assert(!io_exists(tiny_run_path("missing", "")));
    TinyRun from = {.options = {.resume = RESUME_FROM, .resume_path = "/nowhere"}};
    recipe = tiny_moe_recipe("missing");
    expect_exit(&recipe, &from, STATUS_MISSING_INPUT);
}
END_TEST

TEST_MAIN_TIMEOUT(
    "run_faults", 300, TEST(bad_steps_are_skipped_counted_and_leave_no_trace),
    TEST(steps_are_skipped_on_request), TEST(too_many_bad_steps_end_the_run_naming_samples),
    TEST(an_allocation_that_fails_ends_the_run), TEST(training_goes_on_while_the_disk_is_full),
    TEST(a_limit_of_file_sizes_is_a_failed_save), TEST(saves_that_never_succeed_end_the_run),
    TEST(a_final_save_that_fails_is_the_runs_failure), TEST(a_full_log_disk_does_not_matter),
    TEST(what_decides_the_model_or_the_data_may_not_change),
    TEST(another_source_model_is_refused_by_its_shape), TEST(moved_data_is_the_same_data),
    TEST(a_spoiled_shard_ends_the_run_or_is_left_out),
    TEST(a_shard_that_spoils_between_attempts_ends_the_run),
    TEST(a_broken_checkpoint_costs_its_interval_and_no_more),
    TEST(two_runs_in_one_directory_are_refused), TEST(results_say_where_everything_is),
    TEST(missing_inputs_are_found_before_anything_is_made))
