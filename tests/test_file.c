// Files under fault injection: whatever fails, and wherever the process dies, a name shows the old
// content or the new one, whole.
#include "tests/test.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>

static const char old_text[] = "the old content";
static const char new_text[] = "the new content, which is longer than the old";

// The fault to inject at one numbered operation, and a record of what was seen.
typedef struct Fault {
    enum { NOTHING, ERRNO, SHORT, KILL } action;
    int error;
    int at;    // which operation, from 1; 0 = every one
    int only;  // an IoOp, or -1 for all
    int calls; // matching operations seen
    char seen[4096];
} Fault;

static int inject(void *context, IoOp op, const char *path, size_t *bytes) {
    static const char letters[] = "ORWFNUML"; // rename is N
    Fault *fault = context;
    size_t used = strlen(fault->seen);
    const char *name = path ? strrchr(path, '/') : NULL;
    snprintf(fault->seen + used, sizeof fault->seen - used, "%c:%s ", letters[op],
             name ? name + 1 : "?");
    if (fault->only >= 0 && fault->only != (int)op) return 0;
    fault->calls++;
    if (fault->at && fault->calls != fault->at) return 0;
    if (fault->action == KILL) raise(SIGKILL);
    if (fault->action == SHORT && *bytes > 1) *bytes = 1;
    return fault->action == ERRNO ? fault->error : 0;
}

// The path of `name` in the test directory; the same pointer for the same name.
static const char *in_directory(const char *name) {
    static char paths[32][128];
    char path[sizeof paths[0]];
    int length = snprintf(path, sizeof path, "%s/%s", test_directory(), name);
    ck_assert_int_lt(length, (int)sizeof path);
    for (size_t i = 0; i < sizeof paths / sizeof paths[0]; i++) {
        if (!paths[i][0]) memcpy(paths[i], path, sizeof path);
        if (strcmp(paths[i], path) == 0) return paths[i];
    }
    ck_abort_msg("too many names");
    return NULL;
}

static void put(const char *path, const char *text) {
    ck_assert_ok(io_write_file_atomic(path, text, strlen(text)));
}

// 1 if the file holds `text`.
static int holds(const char *path, const char *text) {
    char *data;
    size_t bytes;
    ck_assert_ok(io_read_file(path, 1 << 20, &data, &bytes));
    int same = bytes == strlen(text) && memcmp(data, text, bytes) == 0;
    free(data);
    return same;
}

static Status replace(const char *path) {
    return io_write_file_atomic(path, new_text, strlen(new_text));
}
static Status copy_over(const char *path) {
    return io_copy_file(in_directory("source"), path);
}
typedef Status (*Update)(const char *path);
static const Update updates[] = {replace, copy_over};

START_TEST(order_of_an_atomic_write) {
    Fault fault = {.action = NOTHING, .only = -1};
    const char *path = in_directory("file");
    io_set_hook(inject, &fault);
    ck_assert_ok(replace(path));
    io_set_hook(NULL, NULL);
    // Content is on disk before the name shows it, and the name before the caller goes on.
    char expected[200];
    const char *directory = strrchr(test_directory(), '/') + 1;
    snprintf(expected, sizeof expected, "O:file.tmp W:file.tmp F:file.tmp N:file.tmp O:%s F:%s ",
             directory, directory);
    ck_assert_str_eq(fault.seen, expected);
    ck_assert(holds(path, new_text));
}
END_TEST

START_TEST(errors_at_each_operation_leave_old_or_new) {
    static const int errors[] = {ENOSPC, EIO};
    const char *path = in_directory("target");
    put(in_directory("source"), new_text);
    for (int u = 0; u < 2; u++) {
        for (int e = 0; e < 2; e++) {
            int failures = 0;
            for (int at = 1;; at++) {
                put(path, old_text);
                Fault fault = {.action = ERRNO, .error = errors[e], .at = at, .only = -1};
                io_set_hook(inject, &fault);
                Status status = updates[u](path);
                io_set_hook(NULL, NULL);
                if (fault.calls < at) break; // past the last operation
                ck_assert_int_ne(status, STATUS_OK);
                ck_assert_ptr_nonnull(strstr(status_message(), strerror(errors[e])));
                ck_assert_ptr_nonnull(strstr(status_message(), test_directory()));
                ck_assert(holds(path, old_text) || holds(path, new_text));
                // A failed write gives its space back.
                ck_assert(!io_exists(in_directory("target.tmp")));
                failures++;
            }
            ck_assert_int_ge(failures, 6);
        }
    }
}
END_TEST

START_TEST(death_at_each_operation_leaves_old_or_new) {
    const char *path = in_directory("target");
    put(in_directory("source"), new_text);
    for (int u = 0; u < 2; u++) {
        int old_count = 0, new_count = 0;
        for (int at = 1;; at++) {
            put(path, old_text);
            pid_t child = fork();
            ck_assert_int_ge(child, 0);
            if (child == 0) {
                Fault fault = {.action = KILL, .at = at, .only = -1};
                io_set_hook(inject, &fault);
                _exit(updates[u](path) == STATUS_OK ? 0 : 1);
            }
            int how;
            ck_assert_int_eq(waitpid(child, &how, 0), child);
            if (WIFEXITED(how)) {
                ck_assert_int_eq(WEXITSTATUS(how), 0);
                ck_assert(holds(path, new_text));
                break;
            }
            ck_assert_int_eq(WTERMSIG(how), SIGKILL);
            int is_old = holds(path, old_text), is_new = holds(path, new_text);
            ck_assert_int_eq(is_old + is_new, 1);
            old_count += is_old, new_count += is_new;
            // What the dead left does not disturb the next.
            ck_assert_ok(updates[u](path));
            ck_assert(holds(path, new_text));
        }
        ck_assert_int_ge(old_count, 4); // open, write, fsync, rename
        ck_assert_int_ge(new_count, 2); // the directory's fsync
    }
}
END_TEST

START_TEST(short_writes_and_reads_are_continued) {
    Fault fault = {.action = SHORT, .only = -1};
    const char *path = in_directory("target");
    io_set_hook(inject, &fault);
    ck_assert_ok(replace(path));
    ck_assert(holds(path, new_text));
    ck_assert_int_gt(fault.calls, 2 * (int)strlen(new_text)); // one byte at a time
    io_set_hook(NULL, NULL);
}
END_TEST

START_TEST(interrupted_calls_are_repeated) {
    Fault fault = {.action = ERRNO, .error = EINTR, .at = 1, .only = IO_WRITE};
    const char *path = in_directory("target");
    io_set_hook(inject, &fault);
    ck_assert_ok(replace(path));
    io_set_hook(NULL, NULL);
    ck_assert(holds(path, new_text));
}
END_TEST

START_TEST(fsync_is_never_retried) {
    Fault fault = {.action = ERRNO, .error = EIO, .only = IO_FSYNC};
    const char *path = in_directory("target");
    put(path, old_text);
    io_set_hook(inject, &fault);
    ck_assert_fails(replace(path), STATUS_IO, "fsync failed");
    io_set_hook(NULL, NULL);
    ck_assert_int_eq(fault.calls, 1);
    ck_assert(holds(path, old_text));
}
END_TEST

START_TEST(positioned_reads_and_writes) {
    const char *path = in_directory("random");
    int fd;
    char back[6] = "";
    ck_assert_ok(io_open(path, O_RDWR | O_CREAT, &fd));
    ck_assert_int_ne(fcntl(fd, F_GETFD) & FD_CLOEXEC, 0);
    ck_assert_ok(io_pwrite(fd, path, "world", 5, 6));
    ck_assert_ok(io_pwrite(fd, path, "hello ", 6, 0));
    ck_assert_ok(io_pread(fd, path, back, 5, 6));
    ck_assert_str_eq(back, "world");
    ck_assert_fails(io_pread(fd, path, back, 5, 7), STATUS_BAD_DATA,
                    "expected 5 bytes at offset 7, found 4");
    ck_assert_ok(io_fsync(fd, path));
    ck_assert_ok(io_close(fd, path));
    ck_assert_fails(io_close(fd, path), STATUS_IO, path);
    ck_assert_fails(io_write(fd, path, "x", 1), STATUS_IO, path);
}
END_TEST

START_TEST(codes_of_missing_and_forbidden_files) {
    int fd;
    char *data;
    size_t bytes;
    ck_assert_fails(io_open(in_directory("absent"), O_RDONLY, &fd), STATUS_MISSING_INPUT, "absent");
    ck_assert_fails(io_open(in_directory("absent/x"), O_WRONLY | O_CREAT, &fd), STATUS_CANNOT_WRITE,
                    "cannot create");
    ck_assert_fails(io_read_file(in_directory("absent"), 10, &data, &bytes), STATUS_MISSING_INPUT,
                    "absent");
    ck_assert_fails(replace(in_directory("absent/x")), STATUS_CANNOT_WRITE, "absent/x.tmp");
    put(in_directory("file"), old_text);
    ck_assert_fails(io_open(in_directory("file/x"), O_RDONLY, &fd), STATUS_IO, "cannot open");
    ck_assert_fails(io_read_file(in_directory("file"), 5, &data, &bytes), STATUS_BAD_DATA,
                    "has 15 bytes, expected at most 5");
    ck_assert_fails(io_read_file(test_directory(), 5, &data, &bytes), STATUS_BAD_DATA,
                    "not a regular file");
    // A pipe would block the reader for ever.
    ck_assert_int_eq(mkfifo(in_directory("pipe"), 0600), 0);
    ck_assert_fails(io_read_file(in_directory("pipe"), 5, &data, &bytes), STATUS_BAD_DATA,
                    "not a regular file");
}
END_TEST

START_TEST(empty_files_are_files) {
    const char *path = in_directory("empty");
    char *data;
    size_t bytes = 1;
    ck_assert_ok(io_write_file_atomic(path, "", 0));
    ck_assert_ok(io_read_file(path, 0, &data, &bytes));
    ck_assert_uint_eq(bytes, 0);
    ck_assert_str_eq(data, "");
    free(data);
    ck_assert_ok(io_copy_file(path, in_directory("copy")));
    ck_assert(io_exists(in_directory("copy")));
}
END_TEST

START_TEST(directories) {
    const char *deep = in_directory("a/b//c/");
    ck_assert_ok(io_make_directories(deep));
    ck_assert(io_is_directory(in_directory("a/b/c")));
    ck_assert_ok(io_make_directories(deep)); // again is no error
    put(in_directory("a/b/file"), old_text);
    ck_assert_fails(io_make_directories(in_directory("a/b/file/x")), STATUS_CANNOT_WRITE, "file");
    ck_assert_fails(io_make_directories(in_directory("a/b/file")), STATUS_CANNOT_WRITE, "file");
    ck_assert_fails(io_make_directories(""), STATUS_CANNOT_WRITE, "");

    // Removing does not follow links out of the tree.
    put(in_directory("outside"), old_text);
    ck_assert_int_eq(symlink(in_directory("outside"), in_directory("a/link")), 0);
    ck_assert_int_eq(symlink(test_directory(), in_directory("a/up")), 0);
    ck_assert_ok(io_remove_tree(in_directory("a")));
    ck_assert(!io_exists(in_directory("a")));
    ck_assert(holds(in_directory("outside"), old_text));
    ck_assert_ok(io_remove_tree(in_directory("a"))); // so is a missing one
    ck_assert_ok(io_unlink(in_directory("a")));
}
END_TEST

START_TEST(a_failing_removal_is_reported) {
    ck_assert_ok(io_make_directories(in_directory("tree/inner")));
    put(in_directory("tree/inner/file"), old_text);
    for (int at = 1; at <= 3; at++) { // the file, its directory, the tree
        Fault fault = {.action = ERRNO, .error = EIO, .at = at, .only = IO_UNLINK};
        ck_assert_ok(io_make_directories(in_directory("tree/inner")));
        put(in_directory("tree/inner/file"), old_text);
        io_set_hook(inject, &fault);
        ck_assert_fails(io_remove_tree(in_directory("tree")), STATUS_IO, "cannot remove");
        io_set_hook(NULL, NULL);
    }
}
END_TEST

START_TEST(listings_are_sorted) {
    char **names;
    size_t count;
    ck_assert_ok(io_make_directories(in_directory("list")));
    ck_assert_ok(io_list_directory(in_directory("list"), &names, &count));
    ck_assert_uint_eq(count, 0);
    io_free_names(names, count);
    for (int i = 40; i > 0; i--) {
        char path[IO_PATH_MAX];
        ck_assert_ok(io_path(path, "%s/list/file%02d", test_directory(), i));
        put(path, "");
    }
    ck_assert_ok(io_list_directory(in_directory("list"), &names, &count));
    ck_assert_uint_eq(count, 40);
    ck_assert_str_eq(names[0], "file01");
    ck_assert_str_eq(names[39], "file40");
    io_free_names(names, count);
    ck_assert_fails(io_list_directory(in_directory("absent"), &names, &count), STATUS_MISSING_INPUT,
                    "absent");
    ck_assert_fails(io_list_directory(in_directory("list/file01"), &names, &count), STATUS_IO,
                    "cannot list");
}
END_TEST

START_TEST(paths_are_never_cut) {
    char path[IO_PATH_MAX], *longest = malloc(IO_PATH_MAX + 1);
    memset(longest, 'x', IO_PATH_MAX);
    longest[IO_PATH_MAX] = '\0';
    ck_assert_fails(io_path(path, "%s", longest), STATUS_USAGE, "too long");
    longest[IO_PATH_MAX - 1] = '\0';
    ck_assert_ok(io_path(path, "%s", longest));
    ck_assert_fails(io_write_file_atomic(longest, "", 0), STATUS_USAGE, "too long");
    free(longest);
}
END_TEST

// In a child whose environment asks for a fault: how `replace` ends.
static int replace_with_environment(const char *fault, const char *path) {
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0) {
        setenv("DENSE2MOE_IO_FAULT", fault, 1);
        setenv("DENSE2MOE_LOG", "error", 1); // the announcement of the fault is not test output
        Status status = replace(path);
        if (status == STATUS_OK) status = replace(path);
        _exit((int)status);
    }
    int how;
    ck_assert_int_eq(waitpid(child, &how, 0), child);
    return WIFEXITED(how) ? WEXITSTATUS(how) : -WTERMSIG(how);
}

START_TEST(faults_from_the_environment) {
    static const struct {
        const char *fault;
        int result;
    } cases[] = {
        {"write:1:enospc", STATUS_IO},
        {"write:2:eio", STATUS_IO},
        {"write:3:eio", STATUS_OK}, // there is no third write
        {"write:1:short", STATUS_OK},
        {"any:1+:short", STATUS_OK},
        {"open:1:enospc", STATUS_CANNOT_WRITE},
        {"fsync:3:eio", STATUS_IO},
        {"rename:1:kill", -SIGKILL},
        {"any:5:kill", -SIGKILL},
        {"write:1+:enospc", STATUS_IO},
        {"unlink:1:kill", STATUS_OK},
        {"write:0:eio", STATUS_OK}, // not a fault: ignored
        {"write:1:explode", STATUS_OK},
        {"nonsense", STATUS_OK},
        {"write:1:eio:more", STATUS_OK},
    };
    // No file operation may come before the forks: the environment is read at the first.
    const char *path = in_directory("target");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        int result = replace_with_environment(cases[i].fault, path);
        ck_assert_msg(result == cases[i].result, "%s: %d, expected %d", cases[i].fault, result,
                      cases[i].result);
    }
}
END_TEST

TEST_MAIN("file", TEST(order_of_an_atomic_write), TEST(errors_at_each_operation_leave_old_or_new),
          TEST(death_at_each_operation_leaves_old_or_new),
          TEST(short_writes_and_reads_are_continued), TEST(interrupted_calls_are_repeated),
          TEST(fsync_is_never_retried), TEST(positioned_reads_and_writes),
          TEST(codes_of_missing_and_forbidden_files), TEST(empty_files_are_files),
          TEST(directories), TEST(a_failing_removal_is_reported), TEST(listings_are_sorted),
          TEST(paths_are_never_cut), TEST(faults_from_the_environment))
