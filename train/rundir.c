// The run directory's lock and its record of attempts.
//
// The lock is flock(2): the kernel releases it when its holder dies, however it dies, so there is
// no stale lock to clean up by hand. The text inside is for people, and for file systems that know
// no locks: there the text decides, and a holder on this host is checked to be alive. An orderly
// end empties the text, so text in a free lock tells of a process that was killed.
//
// run_status.json is what a scheduler script reads to decide about a requeue, and what stops a
// crash loop: a run that dies at the same place each time must not take its place in the queue
// for ever. It is bookkeeping, not state: when it is damaged, the run says so and starts a new one.
#include "train/rundir.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "base/clock.h"
#include "base/json.h"
#include "base/log.h"

enum {
    LOCK_TEXT_MAX = 512,
    NAME_TEXT_MAX = 128,       // of a host or a job id
    STATUS_FILE_MAX = 4 << 20, // bytes
    ATTEMPTS_KEPT = 200,       // records; the attempt number goes on counting
    ATTEMPTS_WITHOUT_PROGRESS = 3,
    ORPHAN_PATIENCE_SECONDS = 2,
    ORPHAN_TRIES_PER_SECOND = 20,
};

// Who this process is, in the lock and in its attempt's record.
typedef struct Identity {
    char host[NAME_TEXT_MAX];
    long pid;
    char job[NAME_TEXT_MAX]; // "-" outside a job
} Identity;

static Identity own_identity(void) {
    Identity self = {.pid = (long)getpid()};
    const char *job = getenv("SLURM_JOB_ID");
    snprintf(self.job, sizeof self.job, "%s", job && job[0] ? job : "-");
    if (gethostname(self.host, sizeof self.host - 1) != 0) strcpy(self.host, "unknown");
    return self;
}

// --- The lock ------------------------------------------------------------------------------------

// The lock's text without line ends, or "" when it is empty or cannot be read.
static void read_lock_text(const char *path, char text[LOCK_TEXT_MAX]) {
    char *data;
    size_t bytes;
    text[0] = '\0';
    if (io_read_file(path, LOCK_TEXT_MAX - 1, &data, &bytes) != STATUS_OK) {
        status_clear();
        return;
    }
    snprintf(text, LOCK_TEXT_MAX, "%.*s", (int)strcspn(data, "\n"), data);
    free(data);
}

// For file systems without locks: whether the process that the text names may still run.
static bool text_names_living_process(const char *text, const Identity *self) {
    Identity holder;
    if (sscanf(text, "host %127s pid %ld", holder.host, &holder.pid) != 2) return false;
    if (strcmp(holder.host, self->host) != 0) return true; // cannot be asked from here
    return holder.pid != self->pid && (kill((pid_t)holder.pid, 0) == 0 || errno == EPERM);
}

// A process that was killed a moment ago may have a child that still shares its lock.
static bool holder_is_gone(const char *text, const Identity *self) {
    Identity holder;
    if (sscanf(text, "host %127s pid %ld", holder.host, &holder.pid) != 2) return false;
    if (strcmp(holder.host, self->host) != 0) return false; // cannot be asked from here
    return kill((pid_t)holder.pid, 0) != 0 && errno == ESRCH;
}

static IoLock lock_patiently(const char *path, int fd, const Identity *self, const char *text) {
    const struct timespec pause = {.tv_nsec = 1000 * 1000 * 1000 / ORPHAN_TRIES_PER_SECOND};
    IoLock lock = io_lock(fd, path);
    for (int i = 0; i < ORPHAN_PATIENCE_SECONDS * ORPHAN_TRIES_PER_SECOND; i++) {
        if (lock != IO_LOCK_BUSY || !holder_is_gone(text, self)) break;
        nanosleep(&pause, NULL);
        lock = io_lock(fd, path);
    }
    return lock;
}

static Status acquire(const char *path, int fd, const Identity *self, const char *text) {
    const char *holder = text[0] ? text : "holder unknown";
    IoLock lock = lock_patiently(path, fd, self, text);
    if (lock == IO_LOCK_BUSY) {
        FAIL(STATUS_USAGE,
             "%s: the run directory is in use (%s); wait for it, stop it, or give this run another "
             "name with --set run.name=NAME",
             path, holder);
    }
    if (lock == IO_LOCK_UNSUPPORTED) {
        log_warn("%s: this file system has no locks; trusting the lock's text", path);
        if (text_names_living_process(text, self)) {
            FAIL(STATUS_USAGE,
                 "%s: the run directory seems to be in use (%s); if that process is gone, delete "
                 "the lock",
                 path, holder);
        }
    }
    if (text[0]) log_info("%s: taking over from a process that was killed (%s)", path, text);
    return STATUS_OK;
}

static Status write_lock_text(int fd, const char *path, const Identity *self) {
    char text[LOCK_TEXT_MAX], now[CLOCK_TEXT_SIZE];
    clock_iso8601(now);
    int length = snprintf(text, sizeof text, "host %s pid %ld job %s start %s\n", self->host,
                          self->pid, self->job, now);
    if (ftruncate(fd, 0) != 0)
        FAIL(STATUS_IO, "%s: cannot empty the lock: %s", path, strerror(errno));
    return io_pwrite(fd, path, text, (size_t)length, 0);
}

static Status take_lock(RunDir *dir, const Identity *self) {
    char path[IO_PATH_MAX], text[LOCK_TEXT_MAX];
    int fd;
    TRY(io_path(path, "%s/lock", dir->path));
    TRY(io_open(path, O_RDWR | O_CREAT, &fd));
    read_lock_text(path, text);
    Status status = acquire(path, fd, self, text);
    if (status == STATUS_OK) status = write_lock_text(fd, path, self);
    if (status != STATUS_OK) {
        close(fd);
        return status;
    }
    dir->lock_fd = fd;
    return STATUS_OK;
}

// --- run_status.json -----------------------------------------------------------------------------

// {"attempt": newest number, "state", "step", "code", "message", "updated",
//  "attempts": [{"attempt", "host", "pid", "job", "start", "updated", "state", "step", "code",
//                "message"}, ...]}: the first line repeats the newest attempt for simple readers.

// The records read from the file, or an empty array; *newest is the last attempt's number.
static Status load_attempts(const char *path, json_t **attempts, int64_t *newest) {
    json_t *root = NULL, *array;
    *newest = 0;
    Status status = STATUS_OK;
    if (io_exists(path)) {
        status = json_read_file(path, STATUS_FILE_MAX, &root);
        if (status == STATUS_OK) status = json_get_int(root, path, "attempt", 0, 1 << 30, newest);
        if (status == STATUS_OK) status = json_get_array(root, path, "attempts", &array);
    }
    if (root && status == STATUS_OK) {
        *attempts = json_incref(array);
    } else {
        if (status != STATUS_OK) log_warn("%s; counting attempts anew", status_message());
        status_clear();
        *newest = 0;
        *attempts = json_array();
    }
    json_decref(root);
    if (!*attempts) FAIL(STATUS_INTERNAL, "%s: out of memory", path);
    return STATUS_OK;
}

static Status store_attempts(const char *path, json_t *attempts) {
    while (json_array_size(attempts) > ATTEMPTS_KEPT) json_array_remove(attempts, 0);
    json_t *root = json_object(), *newest = json_array_get(attempts, json_array_size(attempts) - 1);
    static const char *const repeated[] = {"attempt", "state",   "step",
                                           "code",    "message", "updated"};
    int failed = json_object_set(root, "attempts", attempts);
    for (size_t i = 0; i < sizeof repeated / sizeof repeated[0]; i++)
        failed |= json_object_set(root, repeated[i], json_object_get(newest, repeated[i]));
    Status status = STATUS_OK;
    if (failed)
        status = status_fail(__FILE__, __LINE__, STATUS_INTERNAL, "%s: out of memory", path);
    else
        status = json_write_file(path, root);
    json_decref(root);
    return status;
}

static json_t *new_record(int64_t attempt, const Identity *self) {
    char now[CLOCK_TEXT_SIZE];
    clock_iso8601(now);
    return json_pack("{s:I, s:s, s:I, s:s, s:s, s:s, s:s, s:I, s:i, s:s}", "attempt",
                     (json_int_t)attempt, "host", self->host, "pid", (json_int_t)self->pid, "job",
                     self->job, "start", now, "updated", now, "state", "running", "step",
                     (json_int_t)0, "code", 0, "message", "");
}

static Status update_record(json_t *record, const char *path, const char *state, int64_t step,
                            Status code, const char *message) {
    char now[CLOCK_TEXT_SIZE];
    clock_iso8601(now);
    // A message may quote bytes of a file that are no UTF-8; JSON cannot hold those.
    json_t *text = json_string(message ? message : "");
    if (!text) text = json_string("(the message is not UTF-8: see the log)");
    json_t *news = json_pack("{s:s, s:I, s:i, s:s, s:o}", "state", state, "step", (json_int_t)step,
                             "code", (int)code, "updated", now, "message", text);
    if (!news || json_object_update(record, news) != 0) {
        json_decref(news);
        FAIL(STATUS_INTERNAL, "%s: out of memory", path);
    }
    json_decref(news);
    return STATUS_OK;
}

static int64_t int_member(const json_t *record, const char *key) {
    return json_integer_value(json_object_get(record, key)); // 0 when it is not an integer
}

// Of the command line, the recipe, the inputs or the place to write to: found before anything is
// computed, and mended between two attempts. (Bad data may be found after hours.)
static bool is_mistake(Status code) {
    return code == STATUS_USAGE || code == STATUS_RECIPE_MISMATCH || code == STATUS_MISSING_INPUT ||
           code == STATUS_CANNOT_WRITE;
}

// Done, or stopped by a person. SIGUSR1 comes from a scheduler, which would send it after every
// requeue where the time that it gives is too short for a step: without progress that is a loop.
static bool is_wanted(const char *state, const char *message) {
    if (!state) return false;
    if (strcmp(state, "preempted") == 0) return !message || !strstr(message, "SIGUSR1");
    return strcmp(state, "done") == 0;
}

// How many of the newest attempts in a row ended without progress. Ends that were wanted, and
// mistakes that a person is correcting, do not count but end the row.
static int attempts_without_progress(const json_t *attempts) {
    int64_t best = 0;
    int row = 0;
    size_t index;
    json_t *record;
    json_array_foreach(attempts, index, record) {
        const char *state = json_string_value(json_object_get(record, "state"));
        const char *message = json_string_value(json_object_get(record, "message"));
        int64_t code = int_member(record, "code"), step = int_member(record, "step");
        bool excused =
            is_wanted(state, message) || is_mistake((Status)code) || code == STATUS_NO_PROGRESS;
        row = excused || step > best ? 0 : row + 1;
        if (step > best) best = step;
    }
    return row;
}

static bool is_running(const json_t *record) {
    const char *state = json_string_value(json_object_get(record, "state"));
    return state && strcmp(state, "running") == 0;
}

// An attempt that still says "running" while we hold the lock was killed.
static Status close_killed_attempt(json_t *attempts, const char *path) {
    json_t *last = json_array_get(attempts, json_array_size(attempts) - 1);
    if (!is_running(last)) return STATUS_OK;
    json_t *killed = json_string("killed");
    if (json_object_set_new(last, "state", killed) != 0)
        FAIL(STATUS_INTERNAL, "%s: out of memory", path);
    return STATUS_OK;
}

static Status refuse_crash_loop(const RunDir *dir, const json_t *attempts) {
    if (attempts_without_progress(attempts) < ATTEMPTS_WITHOUT_PROGRESS) return STATUS_OK;
    const json_t *last = json_array_get(attempts, json_array_size(attempts) - 1);
    const char *state = json_string_value(json_object_get(last, "state"));
    const char *message = json_string_value(json_object_get(last, "message"));
    FAIL(STATUS_NO_PROGRESS,
         "%s: %d attempts in a row made no progress, so this start ends here (the last attempt: "
         "%s%s%s); look into the cause, then start the run again",
         dir->path, ATTEMPTS_WITHOUT_PROGRESS, state ? state : "?",
         message && message[0] ? ": " : "", message ? message : "");
}

static Status begin_attempt(RunDir *dir, const Identity *self) {
    char path[IO_PATH_MAX];
    json_t *attempts = NULL;
    int64_t newest;
    Status status = STATUS_OK, refused;
    TRY(io_path(path, "%s/run_status.json", dir->path));
    TRY(load_attempts(path, &attempts, &newest));
    TRY_GOTO(close_killed_attempt(attempts, path), done);
    refused = refuse_crash_loop(dir, attempts);

    json_t *record = new_record(newest + 1, self);
    if (!record || json_array_append_new(attempts, record) != 0)
        FAIL_GOTO(done, STATUS_INTERNAL, "%s: out of memory", path);
    if (refused != STATUS_OK) {
        TRY_GOTO(update_record(record, path, "failed", 0, refused, status_message()), done);
        StatusRecord why;
        status_take(&why);
        TRY_GOTO(store_attempts(path, attempts), done);
        status = status_put(&why);
        goto done;
    }
    TRY_GOTO(store_attempts(path, attempts), done);
    dir->attempt = (int)newest + 1;
done:
    json_decref(attempts);
    return status;
}

Status rundir_status(RunDir *dir, const char *state, int64_t step, Status code,
                     const char *message) {
    char path[IO_PATH_MAX];
    json_t *attempts = NULL;
    int64_t newest;
    Status status = STATUS_OK;
    TRY(io_path(path, "%s/run_status.json", dir->path));
    TRY(load_attempts(path, &attempts, &newest));
    json_t *record = json_array_get(attempts, json_array_size(attempts) - 1);
    if (!json_is_object(record) || int_member(record, "attempt") != dir->attempt) {
        // Somebody damaged or removed the file while we run: our own record still counts.
        Identity self = own_identity();
        record = new_record(dir->attempt, &self);
        if (!record || json_array_append_new(attempts, record) != 0)
            FAIL_GOTO(done, STATUS_INTERNAL, "%s: out of memory", path);
    }
    TRY_GOTO(update_record(record, path, state, step, code, message), done);
    TRY_GOTO(store_attempts(path, attempts), done);
done:
    json_decref(attempts);
    return status;
}

// --- Opening and closing -------------------------------------------------------------------------

static Status prepare(RunDir *dir) {
    Identity self = own_identity();
    TRY(io_make_directories(dir->path));
    TRY(take_lock(dir, &self));
    return begin_attempt(dir, &self);
}

Status rundir_open(RunDir *dir, const char *parent, const char *name) {
    *dir = (RunDir){.lock_fd = -1};
    TRY(io_path(dir->path, "%s/%s", parent, name));
    Status status = prepare(dir);
    if (status == STATUS_OK) return STATUS_OK;
    if (dir->lock_fd >= 0) close(dir->lock_fd);
    dir->lock_fd = -1;
    // Whatever the reason, at this point it means that the run cannot leave anything behind.
    if (status == STATUS_IO) status = status_prefix(STATUS_CANNOT_WRITE, "run directory: ");
    return status;
}

void rundir_close(RunDir *dir) {
    if (dir->lock_fd < 0) return;
    if (ftruncate(dir->lock_fd, 0) != 0)
        log_debug("%s/lock: cannot empty it: %s", dir->path, strerror(errno));
    close(dir->lock_fd);
    dir->lock_fd = -1;
}

Status rundir_close_attempt(const char *parent, const char *name, long pid, const char *state,
                            Status code, const char *message) {
    RunDir dir = {.lock_fd = -1};
    const Identity self = own_identity();
    char path[IO_PATH_MAX];
    json_t *attempts = NULL;
    int64_t newest;
    Status status = STATUS_OK;
    TRY(io_path(dir.path, "%s/%s", parent, name));
    TRY(io_path(path, "%s/run_status.json", dir.path));
    if (!io_exists(path)) return STATUS_OK;
    TRY(take_lock(&dir, &self));
    TRY_GOTO(load_attempts(path, &attempts, &newest), done);
    json_t *last = json_array_get(attempts, json_array_size(attempts) - 1);
    const char *host = json_string_value(json_object_get(last, "host"));
    if (!is_running(last) || int_member(last, "pid") != pid || !host ||
        strcmp(host, self.host) != 0)
        goto done;
    TRY_GOTO(update_record(last, path, state, int_member(last, "step"), code, message), done);
    TRY_GOTO(store_attempts(path, attempts), done);
done:
    json_decref(attempts);
    rundir_close(&dir);
    return status;
}
