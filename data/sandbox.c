// A child process per group of items, with a pipe back.
//
// The child answers each item with one verdict and one result, in order. When it dies, the first
// item without an answer is the one that killed it: that item gets a verdict made from the exit
// status, and a new child goes on behind it. Time is limited twice: by the child's own alarm, which
// costs nothing, and by the parent's patience, in case the child's alarm does not come through.
#include "data/sandbox.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include "base/clock.h"

enum { PARENT_PATIENCE_SECONDS = 5 }; // beyond the child's own limit

typedef struct Child {
    pid_t pid;
    int pipe; // read end
} Child;

// --- In the child --------------------------------------------------------------------------------

static bool write_all(int fd, const void *data, size_t bytes) {
    const char *at = data;
    while (bytes > 0) {
        ssize_t count = write(fd, at, bytes);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return false;
        at += count;
        bytes -= (size_t)count;
    }
    return true;
}

static void limit_child(const SandboxLimits *limits) {
    // Signals meant for the program (Ctrl-C, a preemption notice) are the parent's business.
    static const int ignored[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGPIPE};
    for (size_t i = 0; i < sizeof ignored / sizeof ignored[0]; i++) signal(ignored[i], SIG_IGN);
    signal(SIGALRM, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);

    const struct rlimit no_core = {0, 0};
    (void)setrlimit(RLIMIT_CORE, &no_core);
    // The limit is on top of what the parent has mapped, which with a GPU is hundreds of GB.
    FILE *file = fopen("/proc/self/statm", "re");
    unsigned long pages;
    if (file && fscanf(file, "%lu", &pages) == 1) {
        rlim_t bytes = (rlim_t)pages * (rlim_t)sysconf(_SC_PAGESIZE) + limits->memory_bytes;
        const struct rlimit memory = {bytes, bytes};
        (void)setrlimit(RLIMIT_AS, &memory);
    }
    if (file) fclose(file);
}

static _Noreturn void child_main(SandboxTask task, const void *context, int first, int count,
                                 const SandboxLimits *limits, size_t result_bytes, char *results,
                                 int pipe) {
    limit_child(limits);
    // A parent that is killed now must not live on in what this process inherited, the lock of its
    // run directory above all.
    (void)close_range(STDERR_FILENO + 1, (unsigned)pipe - 1, 0);
    (void)close_range((unsigned)pipe + 1, ~0U, 0);
    for (int i = first; i < count; i++) {
        char *result = results + (size_t)i * result_bytes; // the child's own copy of the page
        SandboxVerdict verdict = {.code = STATUS_OK};
        alarm(limits->seconds);
        verdict.code = task(context, i, result);
        alarm(0);
        if (verdict.code != STATUS_OK)
            snprintf(verdict.message, sizeof verdict.message, "%s", status_message());
        if (!write_all(pipe, &verdict, sizeof verdict) || !write_all(pipe, result, result_bytes))
            _exit(1);
    }
    _exit(0);
}

// --- In the parent -------------------------------------------------------------------------------

static Status start_child(SandboxTask task, const void *context, int first, int count,
                          const SandboxLimits *limits, size_t result_bytes, void *results,
                          Child *child) {
    int ends[2];
    if (pipe(ends) != 0) FAIL(STATUS_INTERNAL, "cannot make a pipe: %s", strerror(errno));
    child->pid = fork();
    if (child->pid == 0) {
        close(ends[0]);
        child_main(task, context, first, count, limits, result_bytes, results, ends[1]);
    }
    int error = errno;
    close(ends[1]);
    child->pipe = ends[0];
    if (child->pid > 0) return STATUS_OK;
    close(ends[0]);
    FAIL(STATUS_INTERNAL, "cannot start a process that checks shards: %s", strerror(error));
}

// False at the end of the pipe or of the parent's patience.
static bool read_all(int fd, void *data, size_t bytes, double deadline) {
    char *at = data;
    while (bytes > 0) {
        double left = deadline - clock_seconds();
        struct pollfd wait = {.fd = fd, .events = POLLIN};
        int ready = left > 0 ? poll(&wait, 1, (int)(left * 1000) + 1) : 0;
        if (ready < 0 && errno == EINTR) continue;
        if (ready <= 0) return false;
        ssize_t count = read(fd, at, bytes);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return false;
        at += count;
        bytes -= (size_t)count;
    }
    return true;
}

static int reap(pid_t pid) {
    int exit_status = 0;
    while (waitpid(pid, &exit_status, 0) < 0 && errno == EINTR) continue;
    return exit_status;
}

// `late`: the parent's patience had ended. A SIGKILL before that came from outside (the system
// short of memory, a user) and says nothing about the item.
static void describe_death(int exit_status, bool late, const SandboxLimits *limits,
                           SandboxVerdict *verdict) {
    int signal_number = WIFSIGNALED(exit_status) ? WTERMSIG(exit_status) : 0;
    verdict->code = STATUS_BAD_DATA;
    verdict->died = true;
    if (signal_number == SIGKILL && !late) {
        verdict->code = STATUS_INTERNAL;
        snprintf(verdict->message, sizeof verdict->message,
                 "the process that checks it was killed from outside (is memory short?)");
    } else if (signal_number == SIGALRM || signal_number == SIGKILL) {
        snprintf(verdict->message, sizeof verdict->message, "reading it took more than %u s",
                 limits->seconds);
    } else if (signal_number) {
        snprintf(verdict->message, sizeof verdict->message, "reading it crashes (signal %d)",
                 signal_number);
    } else {
        snprintf(verdict->message, sizeof verdict->message,
                 "reading it ended the checking process (exit %d)", WEXITSTATUS(exit_status));
    }
}

// Collects answers from `first` on; *next is the first item without one.
static void collect(Child *child, int first, int count, const SandboxLimits *limits,
                    size_t result_bytes, char *results, SandboxVerdict *verdicts, int *next) {
    int i = first;
    double deadline = 0;
    for (; i < count; i++) {
        deadline = clock_seconds() + limits->seconds + PARENT_PATIENCE_SECONDS;
        char *result = results + (size_t)i * result_bytes;
        if (!read_all(child->pipe, &verdicts[i], sizeof verdicts[i], deadline)) break;
        if (!read_all(child->pipe, result, result_bytes, deadline)) break;
        if (verdicts[i].code != STATUS_OK) memset(result, 0, result_bytes);
    }
    close(child->pipe);
    // A child that still runs has answered everything and is about to exit, has run out of the
    // parent's patience, or is dying from its own signal, which then comes first.
    bool late = clock_seconds() >= deadline;
    if (i < count) kill(child->pid, SIGKILL);
    int exit_status = reap(child->pid);
    if (i < count) {
        memset(results + (size_t)i * result_bytes, 0, result_bytes);
        describe_death(exit_status, late, limits, &verdicts[i]);
        i++;
    }
    *next = i;
}

Status sandbox_run(SandboxTask task, const void *context, int count, const SandboxLimits *limits,
                   size_t result_bytes, void *results, SandboxVerdict *verdicts) {
    for (int first = 0; first < count;) {
        Child child;
        TRY(start_child(task, context, first, count, limits, result_bytes, results, &child));
        collect(&child, first, count, limits, result_bytes, results, verdicts, &first);
    }
    return STATUS_OK;
}
