// The handler only sets a flag that the training loop reads between steps; everything that saving
// needs happens there. The second signal cannot wait for that: somebody wants the process gone.
//
// A scheduler may signal all processes of a job, and a rank's parent passes on what it gets: such a
// rank would see two requests where there is one. So it obeys its parent alone, while it has one.
#include "train/stop_signal.h"

#include <signal.h>
#include <stdlib.h>
#include <unistd.h>
#include "train/launch.h"

static const int signals[] = {SIGTERM, SIGUSR1, SIGINT};
enum { NUM_SIGNALS = sizeof signals / sizeof signals[0], SHELL_SIGNAL_BASE = 128 };

static volatile sig_atomic_t received; // the first signal; 0 = none
static struct sigaction before[NUM_SIGNALS];
static pid_t parent; // whose signals count; 0 = everybody's

static void on_signal(int number, siginfo_t *info, void *context) {
    (void)context;
    if (parent && info->si_pid != parent && getppid() == parent) return;
    if (received) _exit(SHELL_SIGNAL_BASE + number); // what a shell reports for a killed process
    received = number;
}

void stop_signal_install(void) {
    const char *launcher = getenv(LAUNCH_PARENT);
    parent = launcher ? (pid_t)atol(launcher) : 0;
    received = 0;
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_RESTART | SA_SIGINFO};
    sigemptyset(&action.sa_mask);
    for (int i = 0; i < NUM_SIGNALS; i++) sigaction(signals[i], &action, &before[i]);
}

void stop_signal_restore(void) {
    for (int i = 0; i < NUM_SIGNALS; i++) sigaction(signals[i], &before[i], NULL);
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
