// What may go wrong when several ranks train one model: killed ranks, signals, bad numbers, full
// disks, other files on one rank. All ranks end alike or none notices, and nobody waits in vain.
#include "tests/parallel_job.h"

// --- Faults --------------------------------------------------------------------------------------

// To the end, as a scheduler would.
static void finish(int world, Job *job) {
    for (int attempt = 0;; attempt++) {
        ck_assert_int_lt(attempt, 3);
        ranks_start(world, &comm_options, run_rank, job);
        ranks_join(world);
        // Three deaths before the first checkpoint are a crash loop, and said so once.
        if (rank_results_[0].status != STATUS_NO_PROGRESS) break;
    }
    for (int r = 0; r < world; r++)
        ck_assert_msg(rank_results_[r].status == STATUS_OK, "rank %d: %d %s", r,
                      rank_results_[r].status, rank_results_[r].message);
}

START_TEST(a_killed_rank_ends_all_and_the_same_command_continues) {
    tiny_prepare();
    Job whole = job_of(tiny_moe_recipe("whole"));
    run_ok(2, &whole);
    int killed = 0;
    for (uint64_t round = 0; round < 10; round++) {
        char name[32];
        snprintf(name, sizeof name, "killed%d", (int)round);
        Job job = job_of(tiny_moe_recipe(name));
        Trigger trigger = {.number = 30 + (long)(random_u64(5, 1, round) % 500), .signal = SIGKILL};
        job.victim = (int)(round % 2);
        job.hook = on_operation;
        job.context = &trigger;
        ranks_start(2, &comm_options, run_rank, &job);
        ranks_join(2);
        if (rank_results_[job.victim].status == RANK_KILLED + SIGKILL) {
            // The other one notices, or was done.
            int other = rank_results_[1 - job.victim].status;
            ck_assert_msg(other == STATUS_COMMUNICATION || other == STATUS_OK, "%d: %s", other,
                          rank_results_[1 - job.victim].message);
            ck_assert_double_lt(rank_results_[1 - job.victim].seconds, 25);
            killed++;
        }
        job.victim = ALL_RANKS;
        finish(2, &job);
        expect_same_run_of(2, "whole", name);
    }
    ck_assert_int_ge(killed, 5);
}
END_TEST

START_TEST(a_signal_to_one_rank_stops_all) {
    tiny_prepare();
    Job whole = job_of(tiny_moe_recipe("whole"));
    run_ok(2, &whole);
    for (int victim = 0; victim < 2; victim++) {
        char name[32], hex[HASH_HEX_SIZE];
        snprintf(name, sizeof name, "stopped%d", victim);
        Job job = job_of(tiny_moe_recipe(name));
        job.recipe.checkpoint_every = 0; // only the signal saves
        Trigger trigger = {.number = victim == 0 ? 300 : 150, .signal = SIGUSR1};
        job.victim = victim;
        job.hook = on_operation;
        job.context = &trigger;
        ranks_start(2, &comm_options, run_rank, &job);
        ranks_join(2);
        for (int r = 0; r < 2; r++) ranks_expect(r, STATUS_PREEMPTED, "stopped by SIGUSR1");
        int64_t step = tiny_newest(name, "state.json", hex);
        ck_assert(step > 0 && step < TINY_STEPS);
        job.victim = ALL_RANKS;
        run_ok(2, &job);
        expect_same_run_of(2, "whole", name);
    }
}
END_TEST

// Sleeps once, at the first operation of a kind on a path.
typedef struct Pause {
    IoOp op;
    const char *part;
    int seconds;
} Pause;

static int pause_once(void *context, IoOp op, const char *path, size_t *bytes) {
    Pause *pause = context;
    (void)bytes;
    if (op != pause->op || !path || !strstr(path, pause->part)) return 0;
    int seconds = pause->seconds;
    pause->seconds = 0;
    if (seconds) sleep((unsigned)seconds);
    return 0;
}

// Rank 0 may take long before the first step, but not between steps; and a rank that waits for it
// says so and does not hang.
START_TEST(a_slow_start_is_waited_for_and_a_slow_step_is_not) {
    static const CommunicatorOptions impatient = {.timeout_seconds = 3};
    tiny_prepare();
    Job job = job_of(tiny_moe_recipe("slow"));
    Pause at_start = {.op = IO_READ, .part = "shards.json", .seconds = 6};
    job.victim = 0;
    job.hook = pause_once;
    job.context = &at_start;
    ranks_expect_ok(2, &impatient, run_rank, &job);
    Job slower = job_of(tiny_moe_recipe("slower"));
    Pause in_step = {.op = IO_WRITE, .part = "log.jsonl", .seconds = 6};
    slower.victim = 0;
    slower.hook = pause_once;
    slower.context = &in_step;
    ranks_start(2, &impatient, run_rank, &slower);
    ranks_join(2);
    ranks_expect(1, STATUS_COMMUNICATION, "rank 0");
    ck_assert_int_eq(rank_results_[0].status, STATUS_COMMUNICATION);
    ck_assert_double_lt(rank_results_[1].seconds, 20);
}
END_TEST

// Trains on a backend whose loss is another function, which may call replaced_loss_.
static Status train_with_loss(const Recipe *recipe, const RunOptions *options, LossOp *loss) {
    Backend *backend;
    TRY(prepare_backend(recipe, 0, &backend));
    replace_loss(backend, loss);
    Status status = run_training_on(backend, recipe, options);
    backend_destroy(backend);
    return status;
}

static Status train_spoiled(const Recipe *recipe, const RunOptions *options) {
    return train_with_loss(recipe, options, spoiled_loss);
}

START_TEST(bad_numbers_on_one_rank_are_skipped_by_all) {
    tiny_prepare();
    for (int what = SPOIL_LOSS; what <= SPOIL_GRADIENT; what++) {
        char name[32];
        snprintf(name, sizeof name, "nan%d", what);
        Job job = job_of(tiny_moe_recipe(name));
        job.victim = 1;
        job.train = train_spoiled;
        spoiled_ = what;
        run_ok(2, &job);
        ck_assert_uint_eq(tiny_count_events(name, "skip"), 3);
        json_t *steps = tiny_log(name, "step");
        json_t *last = json_array_get(steps, json_array_size(steps) - 1);
        ck_assert(isfinite(json_number_value(json_object_get(last, "loss"))));
        ck_assert_int_eq(json_integer_value(json_object_get(last, "skipped")), 3);
        ck_assert_int_eq(json_integer_value(json_object_get(last, "step")), TINY_STEPS);
        json_decref(steps);
    }
    expect_same_run_of(2, "nan0", "nan1");        // what was bad about a step does not matter
    Job asked = job_of(tiny_moe_recipe("asked")); // nor whether somebody has known it before
    tiny_set(&asked.recipe, "optim.skip_steps=5-7");
    run_ok(2, &asked);
    expect_same_run_of(2, "nan0", "asked");
    // Too many: all end, and say why.
    Job job = job_of(tiny_moe_recipe("hopeless"));
    job.recipe.optim_max_skipped = 2;
    job.victim = 1;
    job.train = train_spoiled;
    ranks_start(2, &comm_options, run_rank, &job);
    ranks_join(2);
    for (int r = 0; r < 2; r++) ranks_expect(r, STATUS_NUMERICS, "steps 5 to 6 were all skipped");
}
END_TEST

START_TEST(too_little_space_ends_all_ranks_before_the_first_step) {
    tiny_prepare();
    Job job = job_of(tiny_dense_recipe("crowded"));
    tiny_set(&job.recipe, "model.hidden_size=512");
    tiny_set(&job.recipe, "train.steps=1000000000");
    tiny_set(&job.recipe, "checkpoint.every=1");
    tiny_set(&job.recipe, "checkpoint.keep_last=1000000"); // some 60 TB
    ranks_start(2, &comm_options, run_rank, &job);
    ranks_join(2);
    for (int r = 0; r < 2; r++) ranks_expect(r, STATUS_CANNOT_WRITE, "lower checkpoint.keep_last");
    ck_assert(!io_exists(tiny_run_path("crowded", "log.jsonl")));
}
END_TEST

static Status train_slowly(const Recipe *recipe, const RunOptions *options) {
    return train_with_loss(recipe, options, slow_loss);
}

// A step that takes longer than a rank may hang is none, as long as its micro-batches go on.
START_TEST(a_long_step_is_no_hang) {
    tiny_prepare();
    Recipe recipe = tiny_moe_recipe("long");
    const RunOptions options = {.resume = RESUME_NEVER};
    tiny_set(&recipe, "train.steps=1");
    tiny_set(&recipe, "train.global_batch=240"); // 120 micro-batches of 30 ms and more
    tiny_set(&recipe, "parallel.hang_seconds=1");
    ck_assert_ok(train_slowly(&recipe, &options));
}
END_TEST

START_TEST(a_slow_rank_is_named_once) {
    tiny_prepare();
    for (int slow = 0; slow < 2; slow++) {
        Job job = job_of(tiny_moe_recipe(slow ? "slow" : "even"));
        tiny_set(&job.recipe, "parallel.straggler_steps=9");
        tiny_set(&job.recipe, "parallel.straggler_ratio=%s", slow ? "1.5" : "1000");
        job.victim = 1;
        if (slow) job.train = train_slowly;
        run_ok(2, &job);
    }
    ck_assert_uint_eq(tiny_count_events("even", "straggler"), 0);
    ck_assert_uint_eq(tiny_count_events("slow", "straggler"), 1);
    expect_same_run_of(2, "even", "slow"); // and nothing else is different
    json_t *lines = tiny_log("slow", "ranks"), *line;
    size_t i;
    ck_assert_uint_eq(json_array_size(lines), tiny_count("slow", "step"));
    json_array_foreach(lines, i, line) {
        const json_t *seconds = json_object_get(line, "seconds");
        ck_assert_uint_eq(json_array_size(seconds), 2);
        // Rank 0 waits for rank 1; that is not counted as its own time.
        double fast = json_number_value(json_array_get(seconds, 0));
        ck_assert_double_lt(fast, json_number_value(json_array_get(seconds, 1)) - 0.015);
    }
    json_decref(lines);
}
END_TEST

// Writes of the files whose path contains `part` fail, `times` times.
typedef struct FullDisk {
    const char *part;
    int times;
} FullDisk;

static int full_disk(void *context, IoOp op, const char *path, size_t *bytes) {
    FullDisk *disk = context;
    (void)bytes;
    bool hit = op == IO_WRITE && path && strstr(path, disk->part) && disk->times > 0;
    if (hit) disk->times--;
    return hit ? ENOSPC : 0;
}

START_TEST(a_failed_write_on_one_rank_fails_that_save_on_all) {
    static const char *const parts[] = {"optimizer-00000-of-00002", "optimizer-00001-of-00002",
                                        "manifest.json"};
    tiny_prepare();
    Job whole = job_of(tiny_moe_recipe("whole"));
    run_ok(2, &whole);
    for (int i = 0; i < 3; i++) {
        char name[32], **names;
        size_t count;
        snprintf(name, sizeof name, "full%d", i);
        Job job = job_of(tiny_moe_recipe(name));
        FullDisk disk = {.part = parts[i], .times = 2};
        job.victim = i == 1 ? 1 : 0;
        job.hook = full_disk;
        job.context = &disk;
        run_ok(2, &job);
        ck_assert_uint_eq(tiny_count_events(name, "save_failed"), 2);
        expect_same_run_of(2, "whole", name);
        json_t *events = tiny_log(name, "event"), *event;
        size_t index;
        json_array_foreach(events, index, event) {
            const char *text = json_string_value(json_object_get(event, "text"));
            if (strcmp(json_string_value(json_object_get(event, "event")), "save_failed") != 0)
                continue;
            ck_assert_msg(strstr(text, job.victim ? "rank 1: " : "rank 0: "), "%s", text);
            ck_assert_msg(strstr(text, parts[i]), "%s", text);
        }
        json_decref(events);
        // Nothing is left of the failed saves.
        ck_assert_ok(io_list_directory(tiny_run_path(name, "checkpoints"), &names, &count));
        for (size_t j = 0; j < count; j++) ck_assert(!strstr(names[j], ".tmp-"));
        io_free_names(names, count);
    }
    // A disk that stays full ends the run everywhere.
    Job job = job_of(tiny_moe_recipe("fuller"));
    FullDisk disk = {.part = parts[1], .times = 1000};
    job.victim = 1;
    job.hook = full_disk;
    job.context = &disk;
    ranks_start(2, &comm_options, run_rank, &job);
    ranks_join(2);
    for (int r = 0; r < 2; r++) ranks_expect(r, STATUS_IO, "5 saves in a row failed");
}
END_TEST

// From the second save on nothing can be written any more: no log, no run_status.json.
static int no_room(void *context, IoOp op, const char *path, size_t *bytes) {
    bool *full = context;
    (void)bytes;
    if (op != IO_WRITE || !path || !strstr(path, "crammed")) return 0;
    *full |= strstr(path, "step_00000008") != NULL;
    return *full ? ENOSPC : 0;
}

START_TEST(a_disk_without_any_room_ends_the_run) {
    tiny_prepare();
    for (int world = 1; world <= 2; world++) {
        char name[32];
        bool full = false;
        snprintf(name, sizeof name, "crammed%d", world);
        Job job = job_of(tiny_dense_recipe(name));
        tiny_set(&job.recipe, "checkpoint.max_failures=2");
        job.victim = 0;
        job.hook = no_room;
        job.context = &full;
        ranks_start(world, &comm_options, run_rank, &job);
        ranks_join(world);
        for (int r = 0; r < world; r++) ranks_expect(r, STATUS_IO, "2 saves in a row failed");
    }
}
END_TEST

// The disk of one rank fails in the middle of the run.
static int broken_disk(void *context, IoOp op, const char *path, size_t *bytes) {
    int *reads = context;
    (void)bytes;
    if (op != IO_READ || !path || !strstr(path, ".h5")) return 0;
    return ++*reads > 60 ? EIO : 0;
}

START_TEST(a_rank_that_fails_by_itself_is_not_waited_for) {
    tiny_prepare();
    for (int victim = 0; victim < 2; victim++) {
        int reads = 0;
        Job job = job_of(tiny_dense_recipe(victim ? "disk1" : "disk0"));
        job.victim = victim;
        job.hook = broken_disk;
        job.context = &reads;
        ranks_start(2, &comm_options, run_rank, &job);
        ranks_join(2);
        ranks_expect(victim, STATUS_IO, ".h5");
        char text[32];
        snprintf(text, sizeof text, "rank %d", victim);
        ranks_expect(1 - victim, STATUS_COMMUNICATION, text);
        ck_assert_double_lt(rank_results_[1 - victim].seconds, 15); // of 30 that it would wait
    }
}
END_TEST

// Fails one operation on the files of one save; other saves are left alone.
typedef struct OneFailure {
    int number, seen; // from 1
} OneFailure;

static int fail_once(void *context, IoOp op, const char *path, size_t *bytes) {
    OneFailure *failure = context;
    (void)bytes;
    if (op == IO_LOCK || op == IO_READ || !path || !strstr(path, "step_00000008")) return 0;
    return __atomic_add_fetch(&failure->seen, 1, __ATOMIC_RELAXED) == failure->number ? EIO : 0;
}

START_TEST(any_failed_operation_of_a_save_fails_at_most_that_save) {
    tiny_prepare();
    Job whole = job_of(tiny_dense_recipe("whole"));
    tiny_set(&whole.recipe, "train.steps=16");
    run_ok(2, &whole);
    int failed = 0, rounds = 0;
    for (int victim = 0; victim < 2; victim++) {
        for (int number = 1; number <= (victim ? 9 : 26); number += 4, rounds++) {
            char name[32];
            snprintf(name, sizeof name, "once%d_%d", victim, number);
            Job job = job_of(tiny_dense_recipe(name));
            tiny_set(&job.recipe, "train.steps=16");
            OneFailure failure = {.number = number};
            job.victim = victim;
            job.hook = fail_once;
            job.context = &failure;
            run_ok(2, &job);
            size_t events = tiny_count_events(name, "save_failed");
            ck_assert_uint_le(events, 1); // removing old checkpoints may fail without harm
            failed += (int)events;
            expect_same_run_of(2, "whole", name);
        }
    }
    ck_assert_int_ge(failed, rounds / 2);
}
END_TEST

// --- Profile -------------------------------------------------------------------------------------

START_TEST(a_profile_shows_what_goes_between_ranks) {
    static const char *const rows[] = {"reduce_scatter", "all_gather", "all_reduce",
                                       "wait for ranks"};
    tiny_prepare();
    Job job = job_of(tiny_moe_recipe("watched"));
    job.options.profile_steps = 3;
    run_ok(2, &job);
    json_t *root, *op;
    size_t index;
    double sum = 0;
    ck_assert_ok(json_read_file(tiny_run_path("watched-profile", "profile.json"), 1 << 20, &root));
    for (int i = 0; i < 4; i++) {
        bool found = false;
        json_array_foreach(json_object_get(root, "ops"), index, op) {
            if (strcmp(json_string_value(json_object_get(op, "op")), rows[i]) != 0) continue;
            found = true;
            sum += json_number_value(json_object_get(op, "ms"));
            // One small sum a step, and as many buckets one way as the other.
            double calls = json_number_value(json_object_get(op, "calls"));
            ck_assert(i == 2 ? calls == 1 : calls > 8);
            ck_assert(json_is_null(json_object_get(op, "share_of_limit")));
        }
        ck_assert_msg(found, "no row %s", rows[i]);
    }
    double exposed = json_number_value(json_object_get(root, "exposed_communication_ms"));
    ck_assert_double_eq_tol(exposed, sum, 1e-9 * sum);
    ck_assert_double_gt(exposed, 0);
    ck_assert(exposed < json_number_value(json_object_get(root, "step_ms")));
    json_decref(root);
    ck_assert(!io_exists(tiny_run_path("watched", "")));
}
END_TEST

// --- Bad input -----------------------------------------------------------------------------------

START_TEST(batches_that_do_not_divide_are_refused_by_all) {
    tiny_prepare();
    Job job = job_of(tiny_moe_recipe("odd"));
    ranks_start(3, &comm_options, run_rank, &job);
    ranks_join(3);
    for (int r = 0; r < 3; r++)
        ranks_expect(r, STATUS_USAGE, "times 3 ranks; set train.global_batch = 6");
    ck_assert(!io_exists(tiny_run_path("odd", "lock")));
    ranks_start(4, &comm_options, run_rank, &job);
    ranks_join(4);
    for (int r = 0; r < 4; r++)
        ranks_expect(r, STATUS_USAGE, "times 4 ranks; set train.micro_batch = 1,");
}
END_TEST

// One rank sees other files than the rest.
static Status train_on_other_shards(const Recipe *recipe, const RunOptions *options) {
    Recipe other = *recipe;
    tiny_set(&other, "data.train=%s", tiny_valid_);
    return run_training(&other, options);
}

START_TEST(other_shards_on_one_rank_are_refused_by_all) {
    tiny_prepare();
    Job job = job_of(tiny_dense_recipe("mixed"));
    job.victim = 1;
    job.train = train_on_other_shards;
    ranks_start(2, &comm_options, run_rank, &job);
    ranks_join(2);
    for (int r = 0; r < 2; r++) ranks_expect(r, STATUS_BAD_DATA, "rank 1: data.train");
}
END_TEST

START_TEST(a_spoiled_shard_ends_all_ranks_or_is_left_out_by_all) {
    char spoiled[160], rest[160];
    tiny_prepare();
    tiny_copy_shards("spoiled", spoiled);
    tiny_spoil_shard(spoiled, "shard-00001.h5");
    tiny_copy_shards("rest", rest);
    tiny_forget_shard(rest);
    Job job = job_of(tiny_moe_recipe("spoiled")), plain = job_of(tiny_moe_recipe("rest"));
    tiny_set(&job.recipe, "data.train=%s", spoiled);
    tiny_set(&plain.recipe, "data.train=%s", rest);
    ranks_start(2, &comm_options, run_rank, &job);
    ranks_join(2);
    for (int r = 0; r < 2; r++) ranks_expect(r, STATUS_BAD_DATA, "spoiled/shard-00001.h5");
    tiny_set(&job.recipe, "data.on_bad_shard=skip_shard");
    job.victim = 0;
    job.train = tiny_train_warning;
    run_ok(2, &job);
    tiny_expect_warning("spoiled", "spoiled: 1 of 2 shards left out");
    run_ok(2, &plain);
    expect_same_run_of(2, "rest", "spoiled");
}
END_TEST

// The node of one rank has shards of its own.
static char copied_shards[160];
static Status train_on_copied_shards(const Recipe *recipe, const RunOptions *options) {
    Recipe other = *recipe;
    tiny_set(&other, "data.train=%s", copied_shards);
    return run_training(&other, options);
}

// A rank that left out what the others have would be at other samples than they.
START_TEST(a_shard_that_only_one_rank_leaves_out_ends_all) {
    tiny_prepare();
    tiny_copy_shards("copy", copied_shards);
    Job job = job_of(tiny_dense_recipe("copy"));
    tiny_set(&job.recipe, "data.on_bad_shard=skip_shard");
    job.victim = 1;
    job.train = train_on_copied_shards;
    run_ok(2, &job);
    tiny_spoil_shard(copied_shards, "shard-00001.h5");
    for (job.victim = 0; job.victim < 2; job.victim++) {
        tiny_set(&job.recipe, "run.name=copy%d", job.victim);
        ranks_start(2, &comm_options, run_rank, &job);
        ranks_join(2);
        for (int r = 0; r < 2; r++) ranks_expect(r, STATUS_BAD_DATA, "rank 1: data.train");
    }
}
END_TEST

START_TEST(what_only_one_rank_finds_wrong_ends_all) {
    char path[IO_PATH_MAX], hex[HASH_HEX_SIZE];
    tiny_prepare();
    Job job = job_of(tiny_dense_recipe("broken"));
    tiny_set(&job.recipe, "train.steps=8");
    run_ok(2, &job);
    // Rank 0 alone reads the run directory; there is no checkpoint left that it trusts.
    char **names;
    size_t count;
    snprintf(path, sizeof path, "%s", tiny_run_path("broken", "checkpoints"));
    ck_assert_int_eq(tiny_newest("broken", "state.json", hex), 8);
    ck_assert_ok(io_list_directory(path, &names, &count));
    for (size_t i = 0; i < count; i++) {
        char state[IO_PATH_MAX];
        ck_assert_ok(io_path(state, "%.3000s/%s/state.json", path, names[i]));
        ck_assert_ok(io_write_file_atomic(state, "{}", 2));
    }
    io_free_names(names, count);
    ranks_start(2, &comm_options, run_rank, &job);
    ranks_join(2);
    for (int r = 0; r < 2; r++) ranks_expect(r, STATUS_BAD_DATA, "rank 0: ");
    for (int r = 0; r < 2; r++) ranks_expect(r, STATUS_BAD_DATA, "none of");
}
END_TEST

TEST_MAIN_TIMEOUT(
    "parallel faults", 300, TEST(a_killed_rank_ends_all_and_the_same_command_continues),
    TEST(a_signal_to_one_rank_stops_all), TEST(a_slow_start_is_waited_for_and_a_slow_step_is_not),
    TEST(bad_numbers_on_one_rank_are_skipped_by_all), TEST(a_slow_rank_is_named_once),
    TEST(too_little_space_ends_all_ranks_before_the_first_step), TEST(a_long_step_is_no_hang),
    TEST(a_failed_write_on_one_rank_fails_that_save_on_all),
    TEST(a_disk_without_any_room_ends_the_run), TEST(a_rank_that_fails_by_itself_is_not_waited_for),
    TEST(any_failed_operation_of_a_save_fails_at_most_that_save),
    TEST(a_profile_shows_what_goes_between_ranks),
    TEST(batches_that_do_not_divide_are_refused_by_all),
    TEST(other_shards_on_one_rank_are_refused_by_all),
    TEST(a_spoiled_shard_ends_all_ranks_or_is_left_out_by_all),
    TEST(a_shard_that_only_one_rank_leaves_out_ends_all),
    TEST(what_only_one_rank_finds_wrong_ends_all))
