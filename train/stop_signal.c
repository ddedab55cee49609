// The handler only sets a flag that the training loop reads between steps; everything that saving
// needs happens there. The second signal cannot wait for that: somebody wants the process gone.
// What is to be written down even then needs more than a handler may do, so a thread that sleeps
// until then does it, and the handler waits a little.
//
// A scheduler may signal all processes of a job, and a rank's parent passes on what it gets: such a
// rank sees two signals where there is one request. So under a parent, signals that come within
// STOP_ECHO_SECONDS of the first are taken for its echo. (Who sent a signal does not help: of two
// that are pending the kernel keeps one.)
#include "train/stop_signal.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "base/clock.h"
#include "base/log.h"
#include "train/launch.h"

static const int signals[] = {SIGTERM, SIGUSR1, SIGINT};
enum { NUM_SIGNALS = sizeof signals / sizeof signals[0], LAST_WORDS_SECONDS = 3 };
static const int64_t ECHO_NS = STOP_ECHO_SECONDS * INT64_C(1000000000);

static int installed;                  // pairs of install and restore that are open
static volatile sig_atomic_t received; // the first signal; 0 = none
static volatile sig_atomic_t insisted; // the second one
static struct sigaction before[NUM_SIGNALS], pipe_before, size_before;
static bool has_parent;     // of train/supervisor.h
static bool speaks;         // says that it has heard
static int64_t received_ns; // when the newest that counts came

static struct {
    volatile sig_atomic_t there;
    LastWords say;
    void *context;
    pthread_t thread;
    sem_t wanted; // posted by the handler, or for the thread to end
} last;

const char *stop_signal_name_of(int number) {
    switch (number) {
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

// poll(2) is what a handler may sleep with.
static void leave_at_once(int number) {
    if (!insisted && last.there) {
        insisted = number;
        sem_post(&last.wanted);
        (void)poll(NULL, 0, LAST_WORDS_SECONDS * 1000);
    }
    _exit(STATUS_PREEMPTED);
}

static void on_signal(int number) {
    int64_t now = clock_monotonic_ns(); // clock_gettime may be called here
    if (received && has_parent && now - received_ns < ECHO_NS) return;
    received_ns = now;
    if (received) leave_at_once(number);
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
    received = insisted = 0;
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigfillset(&action.sa_mask); // one at a time
    for (int i = 0; i < NUM_SIGNALS; i++) sigaction(signals[i], &action, &before[i]);
    // Whoever reads the output may go (a parent that was killed, `tee`), and a file may reach the
    // limit of `ulimit -f`: writing fails then, which is seen to where it is done.
    action = (struct sigaction){.sa_handler = SIG_IGN};
    sigaction(SIGPIPE, &action, &pipe_before);
    sigaction(SIGXFSZ, &action, &size_before);
    mask_requests(SIG_UNBLOCK);
}

void stop_signal_restore(void) {
    if (--installed > 0) return;
    for (int i = 0; i < NUM_SIGNALS; i++) sigaction(signals[i], &before[i], NULL);
    sigaction(SIGPIPE, &pipe_before, NULL);
    sigaction(SIGXFSZ, &size_before, NULL);
}

bool stop_requested(void) {
    return received != 0;
}

const char *stop_signal_name(void) {
    return stop_signal_name_of(received);
}

static void *say_last_words(void *unused) {
    (void)unused;
    while (sem_wait(&last.wanted) != 0) continue; // interrupted
    if (!insisted) return NULL;
    last.say(last.context, stop_signal_name_of(insisted));
    _exit(STATUS_PREEMPTED);
}

Status stop_signal_last_words(LastWords say, void *context) {
    sigset_t all, mask;
    INVARIANT(!last.there);
    last.say = say;
    last.context = context;
    sem_init(&last.wanted, 0, 0);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &mask);
    int error = pthread_create(&last.thread, NULL, say_last_words, NULL);
    last.there = error == 0;
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    if (error) FAIL(STATUS_INTERNAL, "cannot start the thread of last words: error %d", error);
    return STATUS_OK;
}

void stop_signal_no_last_words(void) {
    if (!last.there) return;
    last.there = false;
    sem_post(&last.wanted);
    pthread_join(last.thread, NULL); // never returns when it has been asked for them
    sem_destroy(&last.wanted);
}
