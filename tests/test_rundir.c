// The run directory: one run at a time, what killed runs leave behind, and when to give up.
#include "tests/test.h"

#include <errno.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include "base/json.h"
#include "train/rundir.h"

static const char *in_run(const char *name) {
    static char path[IO_PATH_MAX];
    ck_assert_ok(io_path(path, "%s/runs/r/%s", test_directory(), name));
    return path;
}

static Status open_run(RunDir *dir) {
    char parent[IO_PATH_MAX];
    ck_assert_ok(io_path(parent, "%s/runs", test_directory()));
    return rundir_open(dir, parent, "r");
}

static json_t *read_status(void) {
    json_t *root;
    ck_assert_ok(json_read_file(in_run("run_status.json"), 1 << 20, &root));
    return root;
}

static const char *text_of(const json_t *object, const char *key) {
    return json_string_value(json_object_get(object, key));
}

static int64_t int_of(const json_t *object, const char *key) {
    ck_assert(json_is_integer(json_object_get(object, key)));
    return json_integer_value(json_object_get(object, key));
}

// One attempt from start to end.
static void attempt(const char *state, int64_t step, Status code) {
    RunDir dir;
    ck_assert_ok(open_run(&dir));
    ck_assert_ok(rundir_status(&dir, state, step, code, code ? "it broke" : ""));
    rundir_close(&dir);
}

START_TEST(opens_records_and_closes) {
    RunDir dir;
    setenv("SLURM_JOB_ID", "4711", 1);
    ck_assert_ok(open_run(&dir));
    ck_assert_int_eq(dir.attempt, 1);
    ck_assert(io_is_directory(dir.path));
    char *text, expected[64];
    size_t bytes;
    ck_assert_ok(io_read_file(in_run("lock"), 1000, &text, &bytes));
    snprintf(expected, sizeof expected, " pid %ld job 4711 start 20", (long)getpid());
    ck_assert_msg(strncmp(text, "host ", 5) == 0 && strstr(text, expected), "%s", text);
    free(text);

    json_t *root = read_status();
    ck_assert_str_eq(text_of(root, "state"), "running");
    json_decref(root);
    ck_assert_ok(rundir_status(&dir, "running", 100, STATUS_OK, NULL));
    ck_assert_ok(rundir_status(&dir, "preempted", 120, STATUS_PREEMPTED, "saved \"it\""));
    root = read_status();
    ck_assert_int_eq(int_of(root, "attempt"), 1);
    ck_assert_int_eq(int_of(root, "step"), 120);
    ck_assert_int_eq(int_of(root, "code"), 75);
    ck_assert_str_eq(text_of(root, "state"), "preempted");
    ck_assert_str_eq(text_of(root, "message"), "saved \"it\"");
    json_t *attempts = json_object_get(root, "attempts");
    ck_assert_uint_eq(json_array_size(attempts), 1);
    const json_t *record = json_array_get(attempts, 0);
    ck_assert_int_eq(int_of(record, "pid"), getpid());
    ck_assert_str_eq(text_of(record, "job"), "4711");
    json_decref(root);

    rundir_close(&dir);
    ck_assert_int_eq(dir.lock_fd, -1);
    ck_assert_ok(io_read_file(in_run("lock"), 1000, &text, &bytes));
    ck_assert_str_eq(text, ""); // an orderly end leaves no holder behind
    free(text);
    ck_assert_ok(open_run(&dir));
    ck_assert_int_eq(dir.attempt, 2);
    rundir_close(&dir);
}
END_TEST

START_TEST(two_runs_on_one_directory) {
    RunDir first, second;
    char expected[32];
    ck_assert_ok(open_run(&first));
    snprintf(expected, sizeof expected, "pid %ld", (long)getpid());
    ck_assert_fails(open_run(&second), STATUS_USAGE, expected);
    ck_assert_ptr_nonnull(strstr(status_message(), "in use"));
    ck_assert_int_eq(second.lock_fd, -1);
    rundir_close(&second); // harmless
    // The refused one left lock and record alone.
    json_t *root = read_status();
    ck_assert_uint_eq(json_array_size(json_object_get(root, "attempts")), 1);
    json_decref(root);
    ck_assert_fails(open_run(&second), STATUS_USAGE, expected);
    rundir_close(&first);
    ck_assert_ok(open_run(&second));
    rundir_close(&second);
}
END_TEST

// A process that opens the run, reports `step` and is killed.
static void killed_attempt(int64_t step) {
    test_directory(); // made here, or the child would have its own
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0) {
        RunDir dir;
        if (open_run(&dir) != STATUS_OK) _exit(1);
        if (rundir_status(&dir, "running", step, STATUS_OK, NULL) != STATUS_OK) _exit(1);
        raise(SIGKILL);
    }
    int how;
    ck_assert_int_eq(waitpid(child, &how, 0), child);
    ck_assert(WIFSIGNALED(how));
}

START_TEST(a_killed_holder_is_followed) {
    RunDir dir;
    killed_attempt(10);
    ck_assert_ok(open_run(&dir));
    ck_assert_int_eq(dir.attempt, 2);
    json_t *root = read_status(), *attempts = json_object_get(root, "attempts");
    ck_assert_str_eq(text_of(json_array_get(attempts, 0), "state"), "killed");
    ck_assert_int_eq(int_of(json_array_get(attempts, 0), "step"), 10);
    ck_assert_str_eq(text_of(json_array_get(attempts, 1), "state"), "running");
    json_decref(root);
    rundir_close(&dir);
}
END_TEST

static void expect_newest(const char *state, Status code, int64_t step) {
    json_t *root = read_status();
    ck_assert_str_eq(text_of(root, "state"), state);
    ck_assert_int_eq(int_of(root, "code"), code);
    ck_assert_int_eq(int_of(root, "step"), step);
    json_decref(root);
}

static Status close_as_preempted(long pid) {
    char parent[IO_PATH_MAX];
    ck_assert_ok(io_path(parent, "%s/runs", test_directory()));
    return rundir_close_attempt(parent, "r", pid, "preempted", STATUS_PREEMPTED, "asked twice");
}

// Whoever has waited for a process that was killed says in its place how it ended.
START_TEST(an_attempt_that_was_killed_is_closed_by_another_process) {
    RunDir dir;
    ck_assert_ok(close_as_preempted(1)); // there is no run
    ck_assert(!io_exists(in_run("")));
    killed_attempt(10);
    json_t *root = read_status();
    const json_t *record = json_array_get(json_object_get(root, "attempts"), 0);
    const long pid = (long)int_of(record, "pid");
    json_decref(root);
    ck_assert_ok(close_as_preempted(pid + 1)); // another's attempt
    expect_newest("running", STATUS_OK, 10);
    ck_assert_ok(close_as_preempted(pid));
    expect_newest("preempted", STATUS_PREEMPTED, 10);
    ck_assert_ok(open_run(&dir));
    ck_assert_int_eq(dir.attempt, 2);
    ck_assert_fails(close_as_preempted((long)getpid()), STATUS_USAGE, "in use"); // it goes on
    expect_newest("running", STATUS_OK, 0);
    ck_assert_ok(rundir_status(&dir, "failed", 11, STATUS_IO, "it broke"));
    rundir_close(&dir);
    ck_assert_ok(close_as_preempted((long)getpid())); // it has said how it ended
    expect_newest("failed", STATUS_IO, 11);
}
END_TEST

START_TEST(three_attempts_without_progress) {
    RunDir dir;
    attempt("failed", 0, STATUS_IO);
    killed_attempt(0);
    attempt("failed", 0, STATUS_INTERNAL);
    ck_assert_fails(open_run(&dir), STATUS_NO_PROGRESS, "3 attempts");
    ck_assert_ptr_nonnull(strstr(status_message(), "failed: it broke"));
    ck_assert_int_eq(dir.lock_fd, -1);
    json_t *root = read_status();
    ck_assert_int_eq(int_of(root, "code"), STATUS_NO_PROGRESS);
    json_decref(root);
    // Whoever starts it again has three more.
    for (int i = 0; i < 3; i++) attempt("failed", 0, STATUS_IO);
    ck_assert_fails(open_run(&dir), STATUS_NO_PROGRESS, "3 attempts");
}
END_TEST

START_TEST(progress_is_beyond_every_attempt_before) {
    RunDir dir;
    attempt("failed", 100, STATUS_IO);
    attempt("failed", 100, STATUS_IO);
    attempt("failed", 50, STATUS_IO); // fell back to an older checkpoint
    attempt("failed", 101, STATUS_IO);
    attempt("failed", 101, STATUS_IO);
    killed_attempt(101);
    attempt("failed", 100, STATUS_IO);
    ck_assert_fails(open_run(&dir), STATUS_NO_PROGRESS, "3 attempts");
}
END_TEST

static void stopped_by(const char *signal, int64_t step) {
    RunDir dir;
    char message[64];
    snprintf(message, sizeof message, "stopped by %s", signal);
    ck_assert_ok(open_run(&dir));
    ck_assert_ok(rundir_status(&dir, "preempted", step, STATUS_PREEMPTED, message));
    rundir_close(&dir);
}

// A scheduler whose warning comes before the first step, every time.
START_TEST(stops_by_a_scheduler_count_without_progress) {
    RunDir dir;
    for (int i = 1; i < 6; i++) stopped_by("SIGUSR1", i);
    for (int i = 0; i < 2; i++) stopped_by("SIGUSR1", 5);
    stopped_by("SIGINT", 5); // a person
    for (int i = 0; i < 3; i++) stopped_by("SIGUSR1", 5);
    ck_assert_fails(open_run(&dir), STATUS_NO_PROGRESS, "3 attempts");
    ck_assert_ptr_nonnull(strstr(status_message(), "preempted: stopped by SIGUSR1"));
}
END_TEST

START_TEST(asked_for_ends_do_not_count) {
    for (int i = 0; i < 5; i++) attempt("done", 0, STATUS_OK);
    for (int i = 0; i < 5; i++) attempt("preempted", 0, STATUS_PREEMPTED);
    for (int i = 0; i < 5; i++) attempt("failed", 0, STATUS_RECIPE_MISMATCH);
    for (int i = 0; i < 5; i++) attempt("failed", 0, STATUS_MISSING_INPUT);
    for (int i = 0; i < 5; i++) attempt("failed", 0, STATUS_CANNOT_WRITE);
    for (int i = 0; i < 3; i++) attempt("failed", 0, STATUS_BAD_DATA);
    RunDir dir;
    ck_assert_fails(open_run(&dir), STATUS_NO_PROGRESS, "3 attempts");
}
END_TEST

START_TEST(long_histories_are_cut) {
    for (int i = 0; i < 205; i++) attempt("preempted", i, STATUS_PREEMPTED);
    json_t *root = read_status(), *attempts = json_object_get(root, "attempts");
    ck_assert_uint_eq(json_array_size(attempts), 200);
    ck_assert_int_eq(int_of(json_array_get(attempts, 199), "attempt"), 205);
    json_decref(root);
}
END_TEST

START_TEST(damaged_records_are_counted_anew) {
    static const char *const damaged[] = {
        "",
        "{\"attempt\": 1",
        "[]",
        "{\"attempt\": -1, \"attempts\": []}",
        "{\"attempt\": 1, \"attempts\": {}}",
        "{\"attempt\": 1}",
    };
    RunDir dir;
    attempt("done", 0, STATUS_OK);
    for (size_t i = 0; i < sizeof damaged / sizeof damaged[0]; i++) {
        ck_assert_ok(
            io_write_file_atomic(in_run("run_status.json"), damaged[i], strlen(damaged[i])));
        ck_assert_ok(open_run(&dir));
        ck_assert_int_eq(dir.attempt, 1);
        rundir_close(&dir);
    }
    // Odd elements do not disturb.
    const char *odd = "{\"attempt\": 7, \"attempts\": [1, null, \"x\", {\"state\": 5}, []]}";
    ck_assert_ok(io_write_file_atomic(in_run("run_status.json"), odd, strlen(odd)));
    ck_assert_fails(open_run(&dir), STATUS_NO_PROGRESS, "the last attempt: ?");
    ck_assert_ok(open_run(&dir));
    ck_assert_int_eq(dir.attempt, 9);
    // Removed while we run: our record is written again.
    ck_assert_ok(io_unlink(in_run("run_status.json")));
    ck_assert_ok(rundir_status(&dir, "running", 5, STATUS_OK, "bad \xff byte"));
    json_t *root = read_status();
    ck_assert_int_eq(int_of(root, "attempt"), 9);
    ck_assert_int_eq(int_of(root, "step"), 5);
    ck_assert_ptr_nonnull(strstr(text_of(root, "message"), "not UTF-8"));
    json_decref(root);
    rundir_close(&dir);
}
END_TEST

START_TEST(unwritable_directories) {
    RunDir dir;
    char parent[IO_PATH_MAX];
    ck_assert_ok(io_path(parent, "%s/file", test_directory()));
    ck_assert_ok(io_write_file_atomic(parent, "x", 1));
    ck_assert_fails(rundir_open(&dir, parent, "r"), STATUS_CANNOT_WRITE, parent);
    ck_assert_fails(rundir_open(&dir, "/proc/nowhere", "r"), STATUS_CANNOT_WRITE, "/proc/nowhere");
    if (geteuid() == 0) {
        printf("rundir: running as root, permissions are not tested\n");
        return;
    }
    ck_assert_ok(io_path(parent, "%s/locked", test_directory()));
    ck_assert_ok(io_make_directories(parent));
    ck_assert_int_eq(chmod(parent, 0500), 0);
    ck_assert_fails(rundir_open(&dir, parent, "r"), STATUS_CANNOT_WRITE, "Permission denied");
}
END_TEST

// Answers `error` to every operation of one kind.
typedef struct Failing {
    IoOp op;
    int error;
} Failing;
static int fail_all(void *context, IoOp op, const char *path, size_t *bytes) {
    (void)path, (void)bytes;
    const Failing *failing = context;
    return op == failing->op ? failing->error : 0;
}

START_TEST(full_disks_are_cannot_write) {
    static const IoOp ops[] = {IO_OPEN, IO_WRITE, IO_FSYNC, IO_RENAME, IO_MKDIR};
    for (size_t i = 0; i < sizeof ops / sizeof ops[0]; i++) {
        Failing failing = {ops[i], ENOSPC};
        RunDir dir;
        char runs[IO_PATH_MAX];
        ck_assert_ok(io_path(runs, "%s/runs", test_directory()));
        io_set_hook(fail_all, &failing);
        ck_assert_fails(open_run(&dir), STATUS_CANNOT_WRITE, strerror(ENOSPC));
        io_set_hook(NULL, NULL);
        ck_assert_ok(io_remove_tree(runs));
    }
}
END_TEST

START_TEST(file_systems_without_locks) {
    Failing failing = {IO_LOCK, ENOLCK};
    RunDir dir;
    char text[256], host[64];
    io_set_hook(fail_all, &failing);
    attempt("done", 0, STATUS_OK);
    killed_attempt(0); // its text stays behind, but its process is gone
    attempt("done", 0, STATUS_OK);

    ck_assert_int_eq(gethostname(host, sizeof host), 0);
    snprintf(text, sizeof text, "host %s pid %ld job - start x\n", host, (long)getppid());
    ck_assert_ok(io_write_file_atomic(in_run("lock"), text, strlen(text)));
    ck_assert_fails(open_run(&dir), STATUS_USAGE, "delete the lock");
    const char *elsewhere = "host another-machine pid 1 job 5 start x\n";
    ck_assert_ok(io_write_file_atomic(in_run("lock"), elsewhere, strlen(elsewhere)));
    ck_assert_fails(open_run(&dir), STATUS_USAGE, "another-machine");
    ck_assert_ok(io_unlink(in_run("lock")));
    ck_assert_ok(open_run(&dir));
    rundir_close(&dir);
    io_set_hook(NULL, NULL);
}
END_TEST

// A killed run's own child (one that parses a shard, say) lives a moment longer, with the lock.
START_TEST(a_killed_holders_child_is_waited_for) {
    RunDir dir;
    test_directory(); // made here, or the child would have its own
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0) {
        if (open_run(&dir) != STATUS_OK) _exit(1);
        if (fork() == 0) {
            usleep(300 * 1000);
            _exit(0);
        }
        raise(SIGKILL);
    }
    int status;
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    ck_assert(WIFSIGNALED(status));
    ck_assert_ok(open_run(&dir));
    rundir_close(&dir);
}
END_TEST

TEST_MAIN("rundir", TEST(opens_records_and_closes), TEST(two_runs_on_one_directory),
          TEST(a_killed_holder_is_followed), TEST(a_killed_holders_child_is_waited_for),
          TEST(an_attempt_that_was_killed_is_closed_by_another_process),
          TEST(three_attempts_without_progress), TEST(progress_is_beyond_every_attempt_before),
          TEST(stops_by_a_scheduler_count_without_progress), TEST(asked_for_ends_do_not_count),
          TEST(long_histories_are_cut), TEST(damaged_records_are_counted_anew),
          TEST(unwritable_directories), TEST(full_disks_are_cannot_write),
          TEST(file_systems_without_locks))
