// An interrupted run ends where an uninterrupted one does: the same losses in the log, the same
// weights and optimizer state to the bit, whatever interrupted it and how often.
#include "tests/tiny_run.h"

#include <time.h>

// The reference of all tests below: the main job without an interruption.
static void prepare_reference(void) {
    tiny_prepare();
    Recipe whole = tiny_moe_recipe("whole");
    expect_exit(&whole, NULL, STATUS_OK);
}

// --- Killed at any moment ------------------------------------------------------------------------

// Starts the run again and again, killing it after up to `limit_us`, until it gets to its end.
// Returns how often it was killed.
static int finish_under_fire(const Recipe *recipe, uint64_t seed, int64_t limit_us) {
    int killed = 0;
    for (uint64_t attempt = 0;; attempt++) {
        ck_assert_int_lt(attempt, 200);
        int64_t after = (int64_t)(random_u64(seed, 1, attempt) % (uint64_t)limit_us);
        pid_t child = tiny_start(recipe, NULL);
        struct timespec pause = {after / 1000000, after % 1000000 * 1000};
        nanosleep(&pause, NULL);
        kill(child, SIGKILL);
        int code = tiny_wait(child);
        if (code == STATUS_OK) return killed;
        // Three kills before the first checkpoint look like a crash loop; whoever starts the run
        // again after that refusal has looked into it.
        ck_assert_msg(code == 128 + SIGKILL || code == STATUS_NO_PROGRESS, "ended with %d: %s",
                      code, tiny_message(recipe->run_name));
        killed += code == 128 + SIGKILL;
    }
}

static int64_t elapsed_us(const struct timespec *start) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (now.tv_sec - start->tv_sec) * 1000000 + (now.tv_nsec - start->tv_nsec) / 1000;
}

START_TEST(killed_at_random_moments) {
    prepare_reference();
    struct timespec start;
    clock_gettime(CLOCK_MONOTONIC, &start);
    Recipe timed = tiny_moe_recipe("timed");
    expect_exit(&timed, NULL, STATUS_OK);
    int64_t whole_us = elapsed_us(&start);
    expect_same_run("whole", "timed"); // deterministic to begin with
    int killed = 0;
    for (int round = 0; killed < 12 && round < 40; round++) {
        char name[32];
        snprintf(name, sizeof name, "killed%d", round);
        Recipe recipe = tiny_moe_recipe(name);
        int some = finish_under_fire(&recipe, 100 + (uint64_t)round, whole_us);
        expect_same_run("whole", name);
        killed += some;
        // The machine is faster than it was for the timed run.
        if (some == 0) whole_us = whole_us * 2 / 3 + 1000;
    }
    ck_assert_int_ge(killed, 10);
}
END_TEST

// --- At a chosen file operation ------------------------------------------------------------------

typedef struct Trigger {
    long number, calls; // acts at this operation, counted from 1
    int signals[2];     // raised one after the other; 0 = none
    pid_t run;          // set at the first operation
} Trigger;

static int on_operation(void *context, IoOp op, const char *path, size_t *bytes) {
    Trigger *trigger = context;
    (void)op, (void)path, (void)bytes;
    // The run is what is interrupted. A process that checks a shard for it has a copy of the
    // trigger and reaches the number, too, when it starts just before.
    if (trigger->run == 0) trigger->run = getpid();
    if (trigger->run != getpid()) return 0;
    // Two threads do I/O; which of them hits the number does not matter.
    if (__atomic_add_fetch(&trigger->calls, 1, __ATOMIC_RELAXED) != trigger->number) return 0;
    for (int i = 0; i < 2; i++)
        if (trigger->signals[i]) kill(getpid(), trigger->signals[i]);
    return 0;
}

// How many operations an uninterrupted run makes, counted by the child through a shared page.
static long count_operations(void) {
    char path[IO_PATH_MAX];
    Recipe recipe = tiny_moe_recipe("counted");
    snprintf(path, sizeof path, "%s/counted.operations", tiny_runs_);
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0) {
        Trigger trigger = {.number = -1};
        RunOptions options = {.resume = RESUME_AUTO};
        io_set_hook(on_operation, &trigger);
        Status status = run_training(&recipe, &options);
        FILE *file = fopen(path, "w");
        if (!file || fprintf(file, "%ld", trigger.calls) < 0 || fclose(file) != 0) _exit(99);
        _exit(status);
    }
    ck_assert_int_eq(tiny_wait(child), STATUS_OK);
    FILE *file = fopen(path, "r");
    long count = 0;
    ck_assert_ptr_nonnull(file);
    ck_assert_int_eq(fscanf(file, "%ld", &count), 1);
    fclose(file);
    return count;
}

// Kills during saves, evaluations, log lines and the export, wherever the random number falls.
START_TEST(killed_at_random_operations) {
    prepare_reference();
    long operations = count_operations();
    ck_assert_int_gt(operations, 500);
    for (uint64_t round = 0; round < 16; round++) {
        char name[32];
        snprintf(name, sizeof name, "operation%d", (int)round);
        Recipe recipe = tiny_moe_recipe(name);
        Trigger trigger = {.number = 1 + (long)(random_u64(9, 1, round) % (uint64_t)operations),
                           .signals = {SIGKILL}};
        TinyRun run = {.hook = on_operation, .context = &trigger};
        int code = tiny_train(&recipe, &run);
        ck_assert_msg(code == 128 + SIGKILL || code == STATUS_OK, "operation %ld: %d",
                      trigger.number, code);
        expect_exit(&recipe, NULL, STATUS_OK);
        expect_same_run("whole", name);
    }
}
END_TEST

// --- Asked to stop -------------------------------------------------------------------------------

START_TEST(stop_signals_save_and_the_same_command_continues) {
    static const int signals[] = {SIGTERM, SIGUSR1, SIGINT};
    char hex[HASH_HEX_SIZE];
    prepare_reference();
    long operations = count_operations();
    int stopped = 0;
    for (int round = 0; round < 9; round++) {
        char name[32];
        snprintf(name, sizeof name, "stopped%d", round);
        Recipe recipe = tiny_moe_recipe(name);
        recipe.checkpoint_every = 0; // only the signal saves
        Trigger trigger = {.number = operations * (round + 1) / 12,
                           .signals = {signals[round % 3]}};
        TinyRun run = {.hook = on_operation, .context = &trigger};
        int code = tiny_train(&recipe, &run);
        ck_assert_msg(code == STATUS_PREEMPTED || code == STATUS_OK, "%d", code);
        if (code == STATUS_PREEMPTED) {
            expect_message(&recipe, "the same command continues");
            // Before the first step there is nothing to save.
            if (io_exists(tiny_run_path(name, "log.jsonl")) && tiny_count(name, "step") > 0) {
                ck_assert_int_gt(tiny_newest(name, "state.json", hex), 0);
                stopped++;
            }
        }
        expect_exit(&recipe, NULL, STATUS_OK);
        expect_same_run("whole", name);
    }
    ck_assert_int_ge(stopped, 3);
}
END_TEST

enum { ANY_STEP = -1 };

static void expect_status(const char *name, const char *state, Status code, int64_t step) {
    json_t *root;
    ck_assert_ok(json_read_file(tiny_run_path(name, "run_status.json"), 1 << 20, &root));
    ck_assert_str_eq(json_string_value(json_object_get(root, "state")), state);
    ck_assert_int_eq(json_integer_value(json_object_get(root, "code")), code);
    int64_t found = json_integer_value(json_object_get(root, "step"));
    if (step != ANY_STEP) ck_assert_int_eq(found, step);
    json_decref(root);
}

// At the first operation the inputs are looked for, and the run directory is not open.
START_TEST(a_request_before_the_run_is_open_stops_it_before_its_first_step) {
    static const int signals[] = {SIGTERM, SIGUSR1, SIGINT};
    char hex[HASH_HEX_SIZE];
    prepare_reference();
    for (int i = 0; i < 3; i++) {
        char name[32];
        snprintf(name, sizeof name, "early%d", i);
        Recipe recipe = tiny_moe_recipe(name);
        Trigger first = {.number = 1, .signals = {signals[i]}};
        Trigger later = {.number = 400, .signals = {signals[i]}};
        TinyRun early = {.hook = on_operation, .context = &first};
        TinyRun middle = {.hook = on_operation, .context = &later};
        expect_exit(&recipe, &early, STATUS_PREEMPTED);
        expect_message(&recipe, "at step 0 of 40; the same command continues");
        expect_status(name, "preempted", STATUS_PREEMPTED, 0);
        ck_assert(!io_exists(tiny_run_path(name, "log.jsonl"))); // it did not begin
        // Nor does one that continues: what is there stays what it is.
        expect_exit(&recipe, &middle, STATUS_PREEMPTED);
        int64_t step = tiny_newest(name, "state.json", hex);
        // A person may do so as often as he likes; a scheduler would go on for ever.
        const bool scheduler = signals[i] == SIGUSR1;
        for (int times = 0; times < (scheduler ? 3 : 4); times++)
            expect_exit(&recipe, &early, STATUS_PREEMPTED);
        ck_assert_int_gt(step, 0);
        expect_status(name, "preempted", STATUS_PREEMPTED, step);
        ck_assert_int_eq(tiny_newest(name, "state.json", hex), step);
        if (scheduler) expect_exit(&recipe, &early, STATUS_NO_PROGRESS);
        expect_exit(&recipe, NULL, STATUS_OK);
        expect_same_run("whole", name);
    }
}
END_TEST

// It has not saved, and says which signal was the second. A save that the thread has completed by
// itself may be newer than the record.
static void expect_left_at_once(const char *name, const char *signal) {
    char path[IO_PATH_MAX], text[96];
    int64_t step;
    json_t *root;
    ck_assert_ok(checkpoint_find(tiny_run_path(name, "checkpoints"), &step, path));
    expect_status(name, "preempted", STATUS_PREEMPTED, ANY_STEP);
    snprintf(text, sizeof text, "ended at once by a second signal (%s)", signal);
    ck_assert_ok(json_read_file(tiny_run_path(name, "run_status.json"), 1 << 20, &root));
    ck_assert_int_le(json_integer_value(json_object_get(root, "step")), step > 0 ? step : 0);
    const char *message = json_string_value(json_object_get(root, "message"));
    ck_assert_msg(strstr(message, text) != NULL, "'%s' lacks '%s'", message, text);
    json_decref(root);
}

START_TEST(second_signal_ends_the_process_at_once) {
    tiny_prepare();
    Recipe recipe = tiny_moe_recipe("twice");
    Trigger trigger = {.number = 200, .signals = {SIGTERM, SIGTERM}};
    TinyRun run = {.hook = on_operation, .context = &trigger};
    ck_assert_int_eq(tiny_train(&recipe, &run), STATUS_PREEMPTED);
    expect_left_at_once("twice", "SIGTERM");
    expect_exit(&recipe, NULL, STATUS_OK);
}
END_TEST

// Operations that never end from some number on: the main thread's first, or all, as on a file
// system that does not answer.
typedef struct Hang {
    Trigger trigger;
    bool all;
    int ready; // a pipe to write to
} Hang;

static int hanging_operation(void *context, IoOp op, const char *path, size_t *bytes) {
    Hang *hang = context;
    Trigger *trigger = &hang->trigger;
    (void)op, (void)path, (void)bytes;
    if (trigger->run == 0) trigger->run = getpid();
    if (trigger->run != getpid()) return 0;
    if (__atomic_add_fetch(&trigger->calls, 1, __ATOMIC_RELAXED) < trigger->number) return 0;
    if (gettid() != getpid() && !hang->all) return 0;
    if (write(hang->ready, "x", 1) != 1) _exit(99);
    for (;;) sleep(60);
}

// Two requests end it.
static void end_a_run_that_hangs(const Recipe *recipe, Hang *hang, int second) {
    TinyRun run = {.hook = hanging_operation, .context = hang};
    char byte;
    int ends[2];
    ck_assert_int_eq(pipe(ends), 0);
    hang->ready = ends[1];
    pid_t child = tiny_start(recipe, &run);
    ck_assert_int_eq(read(ends[0], &byte, 1), 1);
    kill(child, SIGTERM);
    usleep(200000);
    ck_assert_int_eq(waitpid(child, NULL, WNOHANG), 0);
    kill(child, second);
    ck_assert_int_eq(tiny_wait(child), STATUS_PREEMPTED);
    close(ends[0]);
    close(ends[1]);
}

START_TEST(a_second_request_ends_a_run_that_hangs) {
    static const long operations[] = {40, 400}; // in the set-up, in the middle
    static const int signals[] = {SIGUSR1, SIGINT};
    static const char *const names[] = {"SIGUSR1", "SIGINT"};
    prepare_reference();
    for (int i = 0; i < 4; i++) {
        char name[32];
        Hang hang = {.trigger = {.number = operations[i % 2]}, .all = i >= 2};
        snprintf(name, sizeof name, "hangs%d", i);
        Recipe recipe = tiny_moe_recipe(name);
        end_a_run_that_hangs(&recipe, &hang, signals[i % 2]);
        // Where nothing can be written any more, nothing is, and the process leaves all the same.
        if (hang.all)
            expect_status(name, "running", STATUS_OK, ANY_STEP);
        else
            expect_left_at_once(name, names[i % 2]);
        expect_exit(&recipe, NULL, STATUS_OK);
        expect_same_run("whole", name);
    }
}
END_TEST

// --- All of the state ----------------------------------------------------------------------------

// Selection bias, micro balance, z-loss, master weights beside bf16 files, moments in bf16: what
// the runs above do not carry from step to step.
START_TEST(every_option_that_has_state_survives) {
    tiny_prepare();
    char name[32];
    for (int variant = 0; variant < 4; variant++) {
        for (int interrupted = 0; interrupted < 2; interrupted++) {
            snprintf(name, sizeof name, "variant%d_%d", variant, interrupted);
            Recipe recipe = tiny_moe_recipe(name);
            recipe.export_hf = variant != 0; // a selection bias has no Hugging Face form
            if (variant == 0) tiny_set(&recipe, "router.balance_bias=true");
            if (variant == 1) tiny_set(&recipe, "router.balance=micro");
            if (variant == 1) tiny_set(&recipe, "data.mask_documents=true");
            if (variant == 2) tiny_set(&recipe, "router.gate=straight_through");
            if (variant == 2) tiny_set(&recipe, "router.z_weight=1e-3");
            if (variant == 2) tiny_set(&recipe, "optim.schedule=wsd");
            if (variant == 2) tiny_set(&recipe, "optim.decay_steps=10");
            if (variant == 3) tiny_set(&recipe, "optim.state_dtype=bf16");
            if (interrupted) {
                Trigger trigger = {.number = 600, .signals = {SIGKILL}};
                TinyRun run = {.hook = on_operation, .context = &trigger};
                ck_assert_int_eq(tiny_train(&recipe, &run), 128 + SIGKILL);
            }
            expect_exit(&recipe, NULL, STATUS_OK);
        }
        char whole[32];
        snprintf(whole, sizeof whole, "variant%d_0", variant);
        expect_same_run(whole, name);
    }
}
END_TEST

// --- Continuing on purpose -----------------------------------------------------------------------

START_TEST(a_finished_run_says_so_and_a_longer_one_goes_on) {
    char before[HASH_HEX_SIZE], after[HASH_HEX_SIZE];
    prepare_reference();
    Recipe recipe = tiny_moe_recipe("whole");
    ck_assert_int_eq(tiny_newest("whole", MANIFEST_NAME, before), TINY_STEPS);
    expect_exit(&recipe, NULL, STATUS_OK);
    ck_assert_int_eq(tiny_newest("whole", MANIFEST_NAME, after), TINY_STEPS);
    ck_assert_str_eq(before, after);
    // An export that is gone is made again, without training.
    ck_assert_ok(io_remove_tree(tiny_run_path("whole", "export")));
    expect_exit(&recipe, NULL, STATUS_OK);
    ck_assert(io_exists(tiny_run_path("whole", "export/config.json")));
    ck_assert_int_eq(tiny_newest("whole", MANIFEST_NAME, after), TINY_STEPS);
    ck_assert_str_eq(before, after);
    recipe.train_steps = TINY_STEPS + 7;
    expect_exit(&recipe, NULL, STATUS_OK);
    ck_assert_int_eq(tiny_newest("whole", MANIFEST_NAME, after), TINY_STEPS + 7);
}
END_TEST

START_TEST(resume_from_a_given_checkpoint_takes_the_other_course_away) {
    char path[IO_PATH_MAX], hex[HASH_HEX_SIZE];
    prepare_reference();
    // Another run continues this one's last but one checkpoint, to the same end.
    ck_assert_ok(checkpoint_path(tiny_run_path("whole", "checkpoints"), 36, path));
    Recipe recipe = tiny_moe_recipe("branch");
    TinyRun from = {.options = {.resume = RESUME_FROM, .resume_path = path}};
    expect_exit(&recipe, &from, STATUS_OK);
    const char *optimizer = "optimizer-00000-of-00001.safetensors";
    char whole[HASH_HEX_SIZE];
    ck_assert_int_eq(tiny_newest("branch", optimizer, hex), TINY_STEPS);
    tiny_newest("whole", optimizer, whole);
    ck_assert_str_eq(hex, whole);
    // The same command again: the run has started from there already, and is finished.
    expect_exit(&recipe, &from, STATUS_OK);
    ck_assert_uint_eq(tiny_count_events("branch", "checkpoint"), 1);

    // A checkpoint of a longer run is not the end of a shorter one.
    Recipe shorter = tiny_moe_recipe("shorter");
    shorter.train_steps = 12;
    expect_exit(&shorter, &from, STATUS_USAGE);
    expect_message(&shorter, "is of step 36, beyond the 12 steps of the recipe");

    // Back to an earlier point of the run itself: step 40 is kept, but out of the way.
    Recipe whole_recipe = tiny_moe_recipe("whole");
    expect_exit(&whole_recipe, &from, STATUS_OK);
    ck_assert_int_eq(tiny_newest("whole", optimizer, hex), TINY_STEPS);
    ck_assert_str_eq(hex, whole);
    snprintf(path, sizeof path, "%s",
             tiny_run_path("whole", "checkpoints.before_attempt_2/step_00000040"));
    ck_assert_ok(checkpoint_verify(path));
}
END_TEST

START_TEST(never_starts_again_and_keeps_what_was_there) {
    prepare_reference();
    Recipe recipe = tiny_moe_recipe("again");
    recipe.train_steps = 8;
    expect_exit(&recipe, NULL, STATUS_OK);
    recipe.train_steps = TINY_STEPS;
    TinyRun never = {.options = {.resume = RESUME_NEVER}};
    expect_exit(&recipe, &never, STATUS_OK);
    expect_same_run("whole", "again");
    ck_assert(io_exists(
        tiny_run_path("again", "checkpoints.before_attempt_2/step_00000008/manifest.json")));
    ck_assert(io_exists(tiny_run_path("again", "log.jsonl.before_attempt_2")));
}
END_TEST

TEST_MAIN_TIMEOUT("resume", 300, TEST(killed_at_random_moments), TEST(killed_at_random_operations),
                  TEST(stop_signals_save_and_the_same_command_continues),
                  TEST(a_request_before_the_run_is_open_stops_it_before_its_first_step),
                  TEST(second_signal_ends_the_process_at_once),
                  TEST(a_second_request_ends_a_run_that_hangs),
                  TEST(every_option_that_has_state_survives),
                  TEST(a_finished_run_says_so_and_a_longer_one_goes_on),
                  TEST(resume_from_a_given_checkpoint_takes_the_other_course_away),
                  TEST(never_starts_again_and_keeps_what_was_there))
