// The parent of the ranks on one machine (train/supervisor.h).
//
// Ranks are started by exec, not fork alone: they begin with nothing that the parent has, neither
// threads nor a CUDA context. Each is in a process group of its own, so that a Ctrl-C on the
// terminal reaches the parent alone and every rank gets each signal once; a second one would mean
// "leave at once". Where a scheduler signals all processes of a job, ranks know what is an echo
// (train/stop_signal.h).
//
// The loop sleeps in poll(2) on the ranks' output and on a signalfd, so that nothing is handled
// where a signal may interrupt it.
#include "train/supervisor.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>
#include "base/clock.h"
#include "base/log.h"
#include "base/net.h"
#include "train/launch.h"
#include "train/stop_signal.h"

enum { GRACE_SECONDS = 10, LINE_BYTES = 4096, FAR_SECONDS = 3600 };
enum { CANNOT_EXEC = 127 };

typedef struct Child {
    pid_t pid;  // 0: has ended
    int code;   // exit code, or as a shell counts it: 128 + signal
    int output; // read end of its stdout and stderr; -1: none
    char line[LINE_BYTES];
    size_t used;
} Child;

typedef struct Parent {
    const SupervisorOptions *options;
    Child *children; // (processes)
    struct pollfd *polls;
    int *poll_ranks;
    int signals; // signalfd
    int alive;
    pid_t first; // rank 0's
    bool asked_to_stop;
    double asked; // when
    int insisted; // the second request's signal; 0: none
    double doom;  // when those that still run are killed; 0: not yet
} Parent;

static bool is_request(int number) {
    return number == SIGTERM || number == SIGINT || number == SIGUSR1;
}

// --- Exit codes ----------------------------------------------------------------------------------

// What a repetition does not mend comes first. Codes that are not listed are bugs: as bad as 70.
static int badness(int code) {
    static const int order[] = {
        STATUS_OK,       STATUS_PREEMPTED,     STATUS_COMMUNICATION,   STATUS_IO,
        STATUS_INTERNAL, STATUS_NUMERICS,      STATUS_NO_PROGRESS,     STATUS_CANNOT_WRITE,
        STATUS_BAD_DATA, STATUS_MISSING_INPUT, STATUS_RECIPE_MISMATCH, STATUS_USAGE};
    for (int i = 0; i < (int)(sizeof order / sizeof order[0]); i++)
        if (order[i] == code) return 2 * i;
    // Killed by a request: worse than a rank that has heard it, no failure of the run.
    if (is_request(code - 128)) return 3;
    return badness(STATUS_INTERNAL);
}

int supervisor_worse(int a, int b) {
    return badness(b) > badness(a) ? b : a;
}

// --- Output --------------------------------------------------------------------------------------

static void print_line(int rank, const char *text, size_t bytes) {
    if (bytes == 0) return;
    log_transient("%s", "");
    // Rank 0 may have a progress bar on this terminal.
    fprintf(stderr, "%srank %d: %.*s\n", isatty(STDERR_FILENO) ? "\r\033[K" : "", rank, (int)bytes,
            text);
}

static void print_lines(Child *child, int rank) {
    size_t begin = 0;
    for (size_t i = 0; i < child->used; i++) {
        if (child->line[i] != '\n') continue;
        print_line(rank, child->line + begin, i - begin);
        begin = i + 1;
    }
    if (begin == 0 && child->used == LINE_BYTES) { // longer than a line can be
        print_line(rank, child->line, child->used);
        begin = child->used;
    }
    memmove(child->line, child->line + begin, child->used - begin);
    child->used -= begin;
}

static void read_output(Child *child, int rank) {
    for (;;) {
        ssize_t got = read(child->output, child->line + child->used, LINE_BYTES - child->used);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
        if (got > 0) {
            child->used += (size_t)got;
            print_lines(child, rank);
            continue;
        }
        print_line(rank, child->line, child->used);
        child->used = 0;
        close(child->output);
        child->output = -1;
        return;
    }
}

// --- Starting ------------------------------------------------------------------------------------

typedef struct Start {
    int listener, port;
    char job[RENDEZVOUS_ID_MAX];
    char *const *arguments;
    pid_t parent;
} Start;

static void set_number(const char *name, long value) {
    char text[32];
    snprintf(text, sizeof text, "%ld", value);
    setenv(name, text, 1);
}

// Between fork and exec. The parent has one thread, so anything is allowed here.
static void become_rank(const Parent *parent, const Start *start, int rank, int output) {
    const SupervisorOptions *options = parent->options;
    sigset_t others;
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != start->parent) _exit(STATUS_COMMUNICATION); // it is dead already
    set_number("RANK", rank);
    set_number("WORLD_SIZE", options->processes);
    set_number("LOCAL_RANK", rank);
    set_number("LOCAL_WORLD_SIZE", options->processes);
    set_number("MASTER_PORT", start->port);
    set_number(LAUNCH_PARENT, (long)start->parent);
    setenv("MASTER_ADDR", "127.0.0.1", 1);
    setenv(LAUNCH_JOB, start->job, 1);
    unsetenv("TORCHELASTIC_USE_AGENT_STORE");
    unsetenv(LAUNCH_LISTENER);
    if (rank == 0) {
        set_number(LAUNCH_LISTENER, start->listener);
        fcntl(start->listener, F_SETFD, 0);
    }
    // Ranks that each took all cores would be in each other's way.
    if (!getenv("OMP_NUM_THREADS"))
        set_number("OMP_NUM_THREADS", launch_cores_for(options->processes));
    if (output >= 0) {
        dup2(output, STDOUT_FILENO);
        dup2(output, STDERR_FILENO);
    }
    // Requests stay blocked, as here: the rank hears those that are passed on before it is ready.
    sigfillset(&others);
    for (int number = 1; number < NSIG; number++)
        if (is_request(number)) sigdelset(&others, number);
    sigprocmask(SIG_UNBLOCK, &others, NULL);
    execv(options->program ? options->program : "/proc/self/exe", start->arguments);
    fprintf(stderr, "train: error: cannot start %s: %s\n", start->arguments[0], strerror(errno));
    _exit(CANNOT_EXEC);
}

static Status start_rank(Parent *parent, const Start *start, int rank) {
    Child *child = &parent->children[rank];
    int ends[2] = {-1, -1};
    *child = (Child){.output = -1};
    if (rank > 0 && pipe2(ends, O_CLOEXEC) != 0)
        FAIL(STATUS_INTERNAL, "cannot make a pipe for rank %d: %s", rank, strerror(errno));
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) become_rank(parent, start, rank, ends[1]);
    if (ends[1] >= 0) close(ends[1]);
    if (pid < 0) {
        if (ends[0] >= 0) close(ends[0]);
        FAIL(STATUS_INTERNAL, "cannot start a process for rank %d: %s", rank, strerror(errno));
    }
    if (ends[0] >= 0) fcntl(ends[0], F_SETFL, O_NONBLOCK);
    child->pid = pid;
    if (rank == 0) parent->first = pid;
    child->output = ends[0];
    parent->alive++;
    return STATUS_OK;
}

static Status prepare_start(const Parent *parent, int attempt, Start *start) {
    uint64_t noise = 0;
    const SupervisorOptions *options = parent->options;
    bool again = attempt > 0 && options->on_restart;
    if (getrandom(&noise, sizeof noise, 0) != sizeof noise)
        FAIL(STATUS_INTERNAL, "the system gave no random bytes");
    *start =
        (Start){.parent = getpid(), .arguments = again ? options->on_restart : options->arguments};
    snprintf(start->job, sizeof start->job, "local-%ld-%d-%016" PRIx64, (long)getpid(), attempt,
             noise);
    return net_listen("127.0.0.1", 0, &start->listener, &start->port);
}

// --- Watching ------------------------------------------------------------------------------------

static void send_to_all(const Parent *parent, int number) {
    for (int rank = 0; rank < parent->options->processes; rank++)
        if (parent->children[rank].pid > 0) kill(parent->children[rank].pid, number);
}

static void set_doom(Parent *parent) {
    double grace = parent->options->grace_seconds;
    if (parent->doom == 0) parent->doom = clock_seconds() + (grace > 0 ? grace : GRACE_SECONDS);
}

static void note_end(Parent *parent, int rank, int how) {
    Child *child = &parent->children[rank];
    child->pid = 0;
    parent->alive--;
    if (child->output >= 0) read_output(child, rank);
    if (!WIFSIGNALED(how)) {
        child->code = WEXITSTATUS(how);
    } else if (parent->asked_to_stop && is_request(WTERMSIG(how))) {
        child->code = 128 + WTERMSIG(how); // before it could do anything about it
    } else if (parent->insisted && WTERMSIG(how) == SIGKILL) {
        child->code = STATUS_PREEMPTED; // it did not hear, and was ended on request all the same
    } else {
        child->code = STATUS_COMMUNICATION;
        if (parent->doom == 0 || WTERMSIG(how) != SIGKILL) // else it was us
            log_error("rank %d was killed by signal %d (%s)", rank, WTERMSIG(how),
                      strsignal(WTERMSIG(how)));
    }
    if (child->code != STATUS_OK && child->code != STATUS_PREEMPTED) set_doom(parent);
}

static void reap(Parent *parent) {
    int how;
    pid_t pid;
    while ((pid = waitpid(-1, &how, WNOHANG)) > 0)
        for (int rank = 0; rank < parent->options->processes; rank++)
            if (parent->children[rank].pid == pid) note_end(parent, rank, how);
}

// Ranks leave at once on a second request. One that hangs so that it does not hear it does not
// leave at all.
static void hear_request(Parent *parent, int number) {
    double now = clock_seconds();
    if (!parent->asked_to_stop) {
        parent->asked = now;
    } else if (now - parent->asked >= STOP_ECHO_SECONDS) {
        parent->insisted = number;
        set_doom(parent);
    }
    parent->asked_to_stop = true;
    send_to_all(parent, number);
}

static void handle_signals(Parent *parent) {
    struct signalfd_siginfo info;
    while (read(parent->signals, &info, sizeof info) == sizeof info) {
        if (info.ssi_signo == SIGCHLD) continue;
        hear_request(parent, (int)info.ssi_signo);
    }
    reap(parent);
}

static void enforce(Parent *parent) {
    if (parent->doom == 0 || parent->alive == 0 || clock_seconds() < parent->doom) return;
    log_warn("%d rank%s did not notice the end of the run and will be killed", parent->alive,
             parent->alive > 1 ? "s" : "");
    send_to_all(parent, SIGKILL);
    parent->doom = clock_seconds() + FAR_SECONDS;
}

static void watch(Parent *parent) {
    while (parent->alive > 0) {
        nfds_t count = 0;
        parent->polls[count++] = (struct pollfd){.fd = parent->signals, .events = POLLIN};
        for (int rank = 0; rank < parent->options->processes; rank++) {
            if (parent->children[rank].output < 0) continue;
            parent->poll_ranks[count] = rank;
            parent->polls[count++] =
                (struct pollfd){.fd = parent->children[rank].output, .events = POLLIN};
        }
        double until = parent->doom > 0 ? parent->doom : clock_seconds() + FAR_SECONDS;
        (void)poll(parent->polls, count, net_poll_ms(until));
        for (nfds_t i = 1; i < count; i++)
            if (parent->polls[i].revents)
                read_output(&parent->children[parent->poll_ranks[i]], parent->poll_ranks[i]);
        handle_signals(parent);
        enforce(parent);
    }
}

// One life of all ranks.
static Status run_once(Parent *parent, int attempt, int *exit_code) {
    Start start;
    Status status = STATUS_OK;
    parent->doom = 0;
    parent->alive = 0;
    TRY(prepare_start(parent, attempt, &start));
    for (int rank = 0; rank < parent->options->processes && status == STATUS_OK; rank++)
        status = start_rank(parent, &start, rank);
    net_close(start.listener);
    if (status != STATUS_OK) { // those that have been started must not wait for the others
        send_to_all(parent, SIGKILL);
        parent->doom = clock_seconds();
    }
    watch(parent);
    *exit_code = STATUS_OK;
    for (int rank = 0; rank < parent->options->processes; rank++) {
        Child *child = &parent->children[rank];
        if (child->output >= 0) read_output(child, rank);
        if (child->output >= 0) close(child->output); // held by somebody that the rank has started
        child->output = -1;
        *exit_code = supervisor_worse(*exit_code, child->code);
    }
    return status;
}

static Status run_all(Parent *parent, int *exit_code) {
    for (int attempt = 0;; attempt++) {
        TRY(run_once(parent, attempt, exit_code));
        if (*exit_code != STATUS_COMMUNICATION || parent->asked_to_stop) return STATUS_OK;
        if (attempt >= parent->options->max_restarts) return STATUS_OK;
        log_warn("starting all ranks again from the newest checkpoint (restart %d of %d)",
                 attempt + 1, parent->options->max_restarts);
    }
}

Status supervise(const SupervisorOptions *options, SupervisorEnd *out) {
    Parent parent = {.options = options, .signals = -1};
    sigset_t watched, before;
    Status status = STATUS_OK;
    size_t count = (size_t)options->processes;
    *out = (SupervisorEnd){.exit_code = STATUS_INTERNAL};
    INVARIANT(options->processes >= 1 && options->processes <= SUPERVISOR_RANKS_MAX);
    sigemptyset(&watched);
    sigaddset(&watched, SIGCHLD);
    sigaddset(&watched, SIGTERM);
    sigaddset(&watched, SIGINT);
    sigaddset(&watched, SIGUSR1);
    sigprocmask(SIG_BLOCK, &watched, &before);
    parent.children = calloc(count, sizeof *parent.children);
    parent.polls = calloc(count + 1, sizeof *parent.polls);
    parent.poll_ranks = calloc(count + 1, sizeof *parent.poll_ranks);
    parent.signals = signalfd(-1, &watched, SFD_CLOEXEC | SFD_NONBLOCK);
    if (!parent.children || !parent.polls || !parent.poll_ranks || parent.signals < 0)
        FAIL_GOTO(done, STATUS_INTERNAL, "cannot prepare to start %d ranks: %s", options->processes,
                  strerror(errno));
    status = run_all(&parent, &out->exit_code);
    out->insisted = parent.insisted;
    out->first = parent.first;
done:
    if (parent.signals >= 0) close(parent.signals);
    free(parent.children);
    free(parent.polls);
    free(parent.poll_ranks);
    sigprocmask(SIG_SETMASK, &before, NULL);
    return status;
}
