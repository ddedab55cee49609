// The handler only sets a flag that the training loop reads between steps; everything that saving
// needs happens there. The second signal cannot wait for that: somebody wants the process gone.
//
// A scheduler may signal all processes of a job, and a rank's parent passes on what it gets: such a
// rank sees two signals where there is one request. So under a parent, signals that come within
// ECHO_NS of the first are taken for its echo. (Who sent a signal does not help: of two that are
// pending the kernel keeps one.)
#include "train/stop_signal.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "base/clock.h"
#include "base/log.h"
#include "train/launch.h"

static const int signals[] = {SIGTERM, SIGUSR1, SIGINT};
enum { NUM_SIGNALS = sizeof signals / sizeof signals[0], SHELL_SIGNAL_BASE = 128 };
static const int64_t ECHO_NS = 2000000000;

static int installed;                  // pairs of install and restore that are open
static volatile sig_atomic_t received; // the first signal; 0 = none
static struct sigaction before[NUM_SIGNALS], pipe_before;
static bool has_parent;     // of train/supervisor.h
static bool speaks;         // says that it has heard
static int64_t received_ns; // when

// Steps may be long. Only what a handler may call: no printf.
static void say_heard(void) {
    static const char text[] = "; the run stops before its next step and saves; a second signal "
                               "ends it at once\n";
    const char *name = stop_signal_name();
    int kept = errno;
    if (write(STDERR_FILENO, "info: ", 6) < 0 || write(STDERR_FILENO, name, strlen(name)) < 0 ||
        write(STDERR_FILENO, text, sizeof text - 1) < 0)
        speaks = false;
    errno = kept;
}

static void on_signal(int number) {
    int64_t now = clock_monotonic_ns(); // clock_gettime may be called here
    if (received && has_parent && now - received_ns < ECHO_NS) return;
    if (received) _exit(SHELL_SIGNAL_BASE + number); // what a shell reports for a killed process
    received_ns = now;
    received = number;
    if (speaks) say_heard();
}

// Of this thread, and of those that it will start: signals are the main thread's.
static void mask_requests(int how) {
    sigset_t requests;
    sigemptyset(&requests);
    for (int i = 0; i < NUM_SIGNALS; i++) sigaddset(&requests, signals[i]);
    pthread_sigmask(how, &requests, NULL);
}

void stop_signal_hold(void) {
    mask_requests(SIG_BLOCK);
}

void stop_signal_install(bool says) {
    if (installed++ > 0) return;
    has_parent = getenv(LAUNCH_PARENT) != NULL;
    speaks = says && log_enabled(LOG_INFO);
    received = 0;
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigfillset(&action.sa_mask); // one at a time
    for (int i = 0; i < NUM_SIGNALS; i++) sigaction(signals[i], &action, &before[i]);
    // Whoever reads the output may go: a parent that was killed, `tee`.
    action = (struct sigaction){.sa_handler = SIG_IGN};
    sigaction(SIGPIPE, &action, &pipe_before);
    mask_requests(SIG_UNBLOCK);
}

void stop_signal_restore(void) {
    if (--installed > 0) return;
    for (int i = 0; i < NUM_SIGNALS; i++) sigaction(signals[i], &before[i], NULL);
    sigaction(SIGPIPE, &pipe_before, NULL);
}

bool stop_requested(void) {
    return received != 0;
}

const char *stop_signal_name(void) {
    switch (received) {
    case SIGTERM:
        return "SIGTERM";
    case SIGUSR1:
        return "SIGUSR1";
    case SIGINT:
        return "SIGINT";
    default:
        return "";
    }
}
