// The watchdog's thread (train/watchdog.h). What it reads is atomic, so that a beat costs a few
// stores; a beat's step and phase may be one beat apart in the log, which nobody minds.
#include "train/watchdog.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
#include "base/clock.h"
#include "base/log.h"

enum { LOOKS_PER_LIMIT = 10, LEAVE_SECONDS = 10, LOOK_SECONDS_MAX = 1, LAST_WORDS_SECONDS = 3 };

struct Watchdog {
    int rank;
    Communicator *communicator;
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    bool stopped;         // guarded by mutex
    _Atomic double limit; // seconds
    atomic_bool alone;
    atomic_llong beat_ns; // of the latest beat
    atomic_llong step;
    _Atomic(const char *) phase;
    WatchdogWords say; // or NULL
    void *context;     // of it
    char why[512];     // the rank ends
    sem_t said;
};

// Waits for so long, or until the watchdog is stopped: then true.
static bool rest(Watchdog *w, double seconds) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    int64_t ns = until.tv_nsec + (int64_t)(seconds * 1e9);
    until.tv_sec += ns / 1000000000;
    until.tv_nsec = ns % 1000000000;
    pthread_mutex_lock(&w->mutex);
    while (!w->stopped && pthread_cond_timedwait(&w->changed, &w->mutex, &until) != ETIMEDOUT)
        continue;
    bool stopped = w->stopped;
    pthread_mutex_unlock(&w->mutex);
    return stopped;
}

static void *say_last_words(void *context) {
    Watchdog *w = context;
    w->say(w->context, w->why);
    sem_post(&w->said);
    return NULL;
}

// What hangs may be what the words are written to, so another thread says them.
static void last_words(Watchdog *w) {
    pthread_t thread;
    struct timespec until;
    if (!w->say || pthread_create(&thread, NULL, say_last_words, w) != 0) return;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += LAST_WORDS_SECONDS;
    while (sem_timedwait(&w->said, &until) != 0 && errno == EINTR) continue;
}

// Gives the rank some seconds to help itself.
__attribute__((format(printf, 2, 3))) static void leave(Watchdog *w, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(w->why, sizeof w->why, format, arguments);
    va_end(arguments);
    log_error("%s", w->why);
    if (w->communicator) w->communicator->ops->abort(w->communicator);
    double limit = atomic_load(&w->limit);
    if (rest(w, limit < LEAVE_SECONDS ? limit : LEAVE_SECONDS)) return;
    last_words(w);
    _exit(STATUS_COMMUNICATION);
}

static void end_rank(Watchdog *w, double idle) {
    CommTicket ticket = 0;
    const char *last =
        w->communicator ? w->communicator->ops->last(w->communicator, &ticket) : "none";
    leave(w,
          "rank %d has made no progress for %.0f s: step %lld, %s, last collective %s number "
          "%" PRId64 "; it hangs, so this rank ends (exit code %d)",
          w->rank, idle, (long long)atomic_load(&w->step), atomic_load(&w->phase), last, ticket,
          STATUS_COMMUNICATION);
}

// Whether a rank is gone that this one may be waiting for.
static bool peer_is_lost(Watchdog *w) {
    Communicator *c = w->communicator;
    const char *name = c && c->ops->lost ? c->ops->lost(c) : NULL;
    if (!name || atomic_load(&w->alone)) return false;
    CommTicket ticket = 0;
    const char *last = c->ops->last(c, &ticket);
    leave(w,
          "%s is lost: its connection is closed; this is rank %d, step %lld, %s, last "
          "collective %s number %" PRId64,
          name, w->rank, (long long)atomic_load(&w->step), atomic_load(&w->phase), last, ticket);
    return true;
}

static void *look_after(void *context) {
    Watchdog *w = context;
    CommTicket seen = 0;
    int64_t moved_ns = 0;
    for (;;) {
        double limit = atomic_load(&w->limit), pause = limit / LOOKS_PER_LIMIT;
        if (rest(w, pause < LOOK_SECONDS_MAX ? pause : LOOK_SECONDS_MAX)) return NULL;
        if (peer_is_lost(w)) return NULL;
        CommTicket ticket = 0;
        int64_t now = clock_monotonic_ns(), beat = atomic_load(&w->beat_ns);
        if (w->communicator) (void)w->communicator->ops->last(w->communicator, &ticket);
        if (ticket != seen) moved_ns = now;
        seen = ticket;
        double idle = (double)(now - (beat > moved_ns ? beat : moved_ns)) * 1e-9;
        if (idle < atomic_load(&w->limit)) continue;
        end_rank(w, idle);
        return NULL;
    }
}

Status watchdog_start(int rank, double seconds, Communicator *communicator, Watchdog **out) {
    pthread_condattr_t attributes;
    sigset_t all, before;
    *out = NULL;
    Watchdog *w = calloc(1, sizeof *w);
    if (!w) FAIL(STATUS_INTERNAL, "out of memory for the watchdog");
    w->rank = rank;
    w->communicator = communicator;
    atomic_store(&w->limit, seconds);
    watchdog_beat(w, 0, "start");
    pthread_mutex_init(&w->mutex, NULL);
    sem_init(&w->said, 0, 0);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&w->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    sigfillset(&all); // signals are the main thread's
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&w->thread, NULL, look_after, w);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) {
        free(w);
        FAIL(STATUS_INTERNAL, "cannot start the watchdog's thread: error %d", error);
    }
    *out = w;
    return STATUS_OK;
}

void watchdog_beat(Watchdog *w, int64_t step, const char *phase) {
    if (!w) return;
    atomic_store(&w->step, step);
    atomic_store(&w->phase, phase);
    atomic_store(&w->beat_ns, clock_monotonic_ns());
}

void watchdog_allow(Watchdog *w, double seconds) {
    if (!w) return;
    atomic_store(&w->beat_ns, clock_monotonic_ns());
    atomic_store(&w->limit, seconds);
}

void watchdog_last_words(Watchdog *w, WatchdogWords say, void *context) {
    if (!w) return;
    pthread_mutex_lock(&w->mutex); // for the other thread to see both
    w->context = context;
    w->say = say;
    pthread_mutex_unlock(&w->mutex);
}

Status watchdog_place(Watchdog *w, Status status) {
    if (!w || status != STATUS_COMMUNICATION) return status;
    return status_prefix(status, "step %lld, %s: ", (long long)atomic_load(&w->step),
                         atomic_load(&w->phase));
}

void watchdog_alone(Watchdog *w) {
    if (w) atomic_store(&w->alone, true);
}

void watchdog_stop(Watchdog *w) {
    if (!w) return;
    pthread_mutex_lock(&w->mutex);
    w->stopped = true;
    pthread_cond_signal(&w->changed);
    pthread_mutex_unlock(&w->mutex);
    pthread_join(w->thread, NULL);
    pthread_cond_destroy(&w->changed);
    pthread_mutex_destroy(&w->mutex);
    sem_destroy(&w->said);
    free(w);
}
