// Saving: a save that fails or dies at any file operation leaves a checkpoint to continue from,
// what is visible is on disk, and old checkpoints go in the right order.
#include "tests/checkpoint_fixture.h"

#include <errno.h>
#include <signal.h>
#include <sys/wait.h>

// --- Faults during a save ------------------------------------------------------------------------

typedef struct Fault {
    int number;   // which call fails, counted from 1; 0 = none
    int error;    // its errno; 0 = half as many bytes, -1 = the process dies
    bool forever; // and every one after it
    bool (*counts)(IoOp op);
    int calls;
} Fault;

static int inject(void *context, IoOp op, const char *path, size_t *bytes) {
    Fault *fault = context;
    (void)path;
    if (fault->counts && !fault->counts(op)) return 0;
    fault->calls++;
    bool hit = fault->calls == fault->number || (fault->forever && fault->calls > fault->number);
    if (!hit) return 0;
    if (fault->error < 0) raise(SIGKILL);
    if (fault->error == 0) *bytes = (*bytes + 1) / 2;
    return fault->error;
}

static bool makes_a_save(IoOp op) {
    return op != IO_READ && op != IO_UNLINK;
}
static bool is_write(IoOp op) {
    return op == IO_WRITE;
}

// A process that has step 10 and 20 and dies at operation `number` of saving 30 (which removes 10).
static int save_in_child(int number) {
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0) {
        Fixture f = fixture();
        if (save(&f, 10) != STATUS_OK || save(&f, 20) != STATUS_OK) _exit(1);
        Fault fault = {.number = number, .error = -1};
        io_set_hook(inject, &fault);
        _exit(save(&f, 30) == STATUS_OK ? 0 : 2);
    }
    int status;
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    return status;
}

START_TEST(kill_at_each_operation_leaves_a_checkpoint) {
    setenv("DENSE2MOE_LOG", "error", 1);
    int seen_old = 0, seen_new = 0;
    for (int number = 1;; number++) {
        char name[32];
        snprintf(name, sizeof name, "kill%d", number);
        use_directory(name);
        int status = save_in_child(number);
        // What the next start does: clean up, and find what is whole.
        ck_assert_ok(checkpoint_clean(directory));
        int64_t step = newest();
        ck_assert_msg(step == 20 || step == 30, "operation %d: newest is %" PRId64, number, step);
        ck_assert_uint_eq(count_names(".tmp-"), 0);
        seen_old += step == 20;
        seen_new += step == 30;
        ck_assert_ok(io_remove_tree(directory));
        if (WIFEXITED(status)) {
            ck_assert_int_eq(WEXITSTATUS(status), 0);
            break;
        }
    }
    // The fault did hit before and after the moment of publication.
    ck_assert_int_ge(seen_old, 20);
    ck_assert_int_ge(seen_new, 5);
}
END_TEST

// Each operation of a save fails once with `error`; the save fails or succeeds as a whole.
static void fail_each_operation(int error, bool (*counts)(IoOp), bool forever) {
    char name[32];
    Fault fault = {.error = error, .counts = counts, .forever = forever};
    snprintf(name, sizeof name, "fail%d_%d", error, forever);
    use_directory(name);
    Fixture f = fixture();
    ck_assert_ok(save(&f, 10));
    int failures = 0;
    for (fault.number = 1;; fault.number++) {
        fault.calls = 0;
        io_set_hook(inject, &fault);
        Status status = save(&f, 20);
        io_set_hook(NULL, NULL);
        int64_t step = newest();
        if (fault.calls < fault.number) {
            ck_assert_int_eq(status, STATUS_OK); // no operation was left to fail
            break;
        }
        failures += status != STATUS_OK;
        if (status != STATUS_OK) ck_assert_str_ne(status_message(), "");
        if (status == STATUS_OK) ck_assert_int_eq(step, 20);
        ck_assert_msg(step == 10 || step == 20, "operation %d: newest %" PRId64, fault.number,
                      step);
        ck_assert_uint_eq(count_names(".tmp-"), 0);
        ck_assert_ok(save(&f, 20)); // the next interval
        ck_assert_int_eq(newest(), 20);
        ck_assert_ok(checkpoint_remove(path_of(20, "")));
    }
    ck_assert_int_ge(failures, 10);
    fixture_free(&f);
}

START_TEST(a_failed_operation_fails_the_save_and_nothing_else) {
    fail_each_operation(EIO, makes_a_save, false);
    fail_each_operation(ENOSPC, makes_a_save, false);
    fail_each_operation(ENOSPC, is_write, true);
}
END_TEST

START_TEST(short_writes_are_continued) {
    Fault fault = {.number = 1, .forever = true, .counts = is_write};
    use_directory("short");
    Fixture f = fixture();
    io_set_hook(inject, &fault);
    ck_assert_ok(save(&f, 10));
    io_set_hook(NULL, NULL);
    ck_assert_int_gt(fault.calls, 20);
    ck_assert_int_eq(newest(), 10);
    fixture_free(&f);
}
END_TEST

// --- Order of operations -------------------------------------------------------------------------

enum { MAX_EVENTS = 4096 };
typedef struct Events {
    struct {
        IoOp op;
        char path[200];
    } list[MAX_EVENTS];
    int count;
} Events;

static int record(void *context, IoOp op, const char *path, size_t *bytes) {
    Events *events = context;
    (void)bytes;
    if (op == IO_READ || op == IO_OPEN || events->count == MAX_EVENTS) return 0;
    events->list[events->count].op = op;
    snprintf(events->list[events->count++].path, 200, "%s", path ? path : "");
    return 0;
}

// Index of the last event of that kind whose path ends like this, or -1.
static int last_event(const Events *events, IoOp op, const char *ending) {
    for (int i = events->count - 1; i >= 0; i--) {
        size_t length = strlen(events->list[i].path), tail = strlen(ending);
        if (events->list[i].op == op && length >= tail &&
            strcmp(events->list[i].path + length - tail, ending) == 0)
            return i;
    }
    return -1;
}

// What a power loss may reorder is what lies between two syncs: so everything is synced before the
// rename that makes it visible, and the rename itself afterwards.
START_TEST(everything_is_synced_before_it_becomes_visible) {
    static Events events;
    char temp[64];
    use_directory("order");
    Fixture f = fixture_with(DTYPE_BF16, 1, 0);
    ck_assert_ok(save(&f, 10));
    io_set_hook(record, &events);
    ck_assert_ok(save(&f, 20));
    io_set_hook(NULL, NULL);
    snprintf(temp, sizeof temp, "step_00000020.tmp-%d", (int)getpid());
    int publish = last_event(&events, IO_RENAME, temp);
    ck_assert_int_ge(publish, 0);
    for (int i = 0; i < events.count; i++) {
        if (events.list[i].op != IO_WRITE) continue;
        ck_assert_int_lt(i, publish);
        int synced = last_event(&events, IO_FSYNC, events.list[i].path);
        ck_assert_msg(synced > i && synced < publish, "%s is not synced", events.list[i].path);
    }
    int directory_synced = last_event(&events, IO_FSYNC, temp);
    int manifest = last_event(&events, IO_RENAME, MANIFEST_NAME ".tmp");
    ck_assert_int_gt(directory_synced, manifest);
    ck_assert_int_lt(directory_synced, publish);
    // The manifest comes last of all files.
    ck_assert_int_gt(manifest, last_event(&events, IO_WRITE, "state.json.tmp"));
    ck_assert_int_gt(manifest, last_event(&events, IO_WRITE, ".safetensors"));
    int parent_synced = last_event(&events, IO_FSYNC, "/order");
    ck_assert_int_gt(parent_synced, publish);
    // Only then the old one goes, its manifest first.
    int old_manifest = last_event(&events, IO_UNLINK, "step_00000010/" MANIFEST_NAME);
    int old_model = last_event(&events, IO_UNLINK, "step_00000010/model.safetensors");
    ck_assert_int_gt(old_manifest, parent_synced);
    ck_assert_int_gt(old_model, old_manifest);
    int old_synced = last_event(&events, IO_FSYNC, "step_00000010");
    ck_assert(old_synced > old_manifest && old_synced < old_model);
    fixture_free(&f);
}
END_TEST

// --- What stays ----------------------------------------------------------------------------------

static void expect_steps(const int64_t *expected, size_t count) {
    ck_assert_uint_eq(count_names("step_"), count);
    for (size_t i = 0; i < count; i++)
        ck_assert_msg(io_exists(path_of(expected[i], "")), "step %" PRId64 " is gone", expected[i]);
}

START_TEST(retention_keeps_the_newest_and_the_multiples) {
    use_directory("retention");
    Fixture f = fixture_with(DTYPE_BF16, 2, 30);
    for (int64_t step = 10; step <= 80; step += 10) ck_assert_ok(save(&f, step));
    expect_steps((const int64_t[]){30, 60, 70, 80}, 4);
    // An interrupted removal goes with the next save; steps of an abandoned future do not count.
    ck_assert_ok(io_unlink(path_of(30, MANIFEST_NAME)));
    ck_assert_ok(save(&f, 75));
    expect_steps((const int64_t[]){60, 70, 75, 80}, 4);
    fixture_free(&f);
}
END_TEST

START_TEST(leftovers_of_killed_saves_are_removed) {
    char path[IO_PATH_MAX];
    use_directory("clean");
    snprintf(path, sizeof path, "%s/step_00000010.tmp-12345/deep", directory);
    ck_assert_ok(io_make_directories(path));
    snprintf(path, sizeof path, "%s/notes.tmp-1", directory); // not ours
    ck_assert_ok(io_make_directories(path));
    ck_assert_ok(checkpoint_clean(directory));
    ck_assert_uint_eq(count_names("step_"), 0);
    ck_assert_uint_eq(count_names("notes"), 1);
    ck_assert_int_eq(newest(), -1);
}
END_TEST

START_TEST(setting_aside_moves_what_comes_later) {
    char aside[150];
    int moved;
    use_directory("aside");
    Fixture f = fixture_with(DTYPE_BF16, 9, 0);
    for (int64_t step = 10; step <= 40; step += 10) ck_assert_ok(save(&f, step));
    snprintf(aside, sizeof aside, "%.120s.aside", directory);
    ck_assert_ok(checkpoint_set_aside(directory, 20, aside, &moved));
    ck_assert_int_eq(moved, 2);
    expect_steps((const int64_t[]){10, 20}, 2);
    snprintf(directory, sizeof directory, "%s", aside);
    expect_steps((const int64_t[]){30, 40}, 2);
    ck_assert_int_eq(newest(), 40);
    fixture_free(&f);
}
END_TEST

START_TEST(names_are_read_as_they_are_written) {
    char path[IO_PATH_MAX];
    const int64_t steps[] = {0, 7, 99999999, 100000000, 123456789012345678};
    for (size_t i = 0; i < sizeof steps / sizeof steps[0]; i++) {
        ck_assert_ok(checkpoint_path("/x", steps[i], path));
        ck_assert_int_eq(checkpoint_step_of(path), steps[i]);
    }
    const char *const others[] = {
        "step_1",          "step_0000001x", "step_00000010.tmp-1",
        "Step_00000010",   "step_",         "step_0000000000000000000000000001",
        "/step_00000001/x"};
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++)
        ck_assert_int_eq(checkpoint_step_of(others[i]), -1);
}
END_TEST

START_TEST(a_disk_that_is_too_small_is_refused_at_the_start) {
    use_directory("space");
    ModelConfig config = tiny_config();
    TensorTable table;
    ck_assert_ok(tensor_table_build(&config, &table));
    CheckpointOptions options = {.directory = directory, .keep_last = 2, .dtype = DTYPE_BF16};
    ck_assert_ok(checkpoint_check_space(&options, &table, 1000));
    // A checkpoint has at least a megabyte here: so many are more than any disk holds.
    const int64_t many = INT64_C(1) << 36;
    options.keep_last = many;
    ck_assert_fails(checkpoint_check_space(&options, &table, many), STATUS_CANNOT_WRITE,
                    "keep_last");
    ck_assert_ok(checkpoint_check_space(&options, &table, 3)); // a run that makes only three
    table.parameters = INT64_MAX;                              // overflow is arithmetic, too
    ck_assert_fails(checkpoint_check_space(&options, &table, 3), STATUS_CANNOT_WRITE, directory);
    tensor_table_free(&table);
}
END_TEST

START_TEST(plan_says_what_the_writer_takes) {
    ModelConfig config = tiny_config();
    TensorTable table;
    MemoryPlan plan = {.count = 0};
    const CheckpointOptions alone = {.world = 1};
    ck_assert_ok(tensor_table_build(&config, &table));
    ck_assert_ok(checkpoint_plan(&table, &table, DTYPE_F32, DTYPE_F32, &alone, &plan));
    ck_assert_int_eq(memory_plan_total(&plan), (uint64_t)table.total * 12);
    plan.count = 0;
    ck_assert_ok(checkpoint_plan(&table, &table, DTYPE_BF16, DTYPE_F32, &alone, &plan));
    ck_assert_int_eq(memory_plan_total(&plan), (uint64_t)table.total * 8);
    tensor_table_free(&table);
}
END_TEST

// Training may change the weights the moment begin has returned.
START_TEST(a_save_holds_the_weights_of_its_moment) {
    use_directory("moment");
    Fixture f = fixture();
    float *before = download_arena(&f.t, f.t.model->master);
    json_t *state = json_pack("{s:i}", "step", 1);
    ck_assert_ok(checkpoint_begin(f.writer, 1, state));
    ck_assert_ok(checkpoint_start(f.writer));
    json_decref(state);
    fill_arena(&f.t, f.t.model->master, 77, 0, 1);
    ck_assert_ok(checkpoint_wait(f.writer));
    ck_assert_ok(checkpoint_wait(f.writer)); // nothing in flight: fine
    ck_assert(!checkpoint_busy(f.writer));
    ck_assert_ok(checkpoint_load(path_of(1, ""), f.t.model, f.t.optimizer));
    float *after = download_arena(&f.t, f.t.model->master);
    ck_assert_mem_eq(before, after, (size_t)f.t.model->table.total * 4);
    free(before);
    free(after);
    fixture_free(&f);
}
END_TEST

TEST_MAIN("checkpoint_faults", TEST(kill_at_each_operation_leaves_a_checkpoint),
          TEST(a_failed_operation_fails_the_save_and_nothing_else),
          TEST(short_writes_are_continued), TEST(everything_is_synced_before_it_becomes_visible),
          TEST(retention_keeps_the_newest_and_the_multiples),
          TEST(leftovers_of_killed_saves_are_removed), TEST(setting_aside_moves_what_comes_later),
          TEST(names_are_read_as_they_are_written),
          TEST(a_disk_that_is_too_small_is_refused_at_the_start),
          TEST(plan_says_what_the_writer_takes), TEST(a_save_holds_the_weights_of_its_moment))
