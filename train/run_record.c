// What run_status.json says of this attempt: bookkeeping for schedulers, on which training does not
// depend.
//
// A process that leaves at once on a second request, or because it hangs, does not come back to
// where its end is written down; so another thread does that (train/stop_signal.h,
// train/watchdog.h), one at a time with the run's own.
#include "train/trainer.h"

#include <pthread.h>
#include <stdio.h>
#include "base/log.h"
#include "train/stop_signal.h"

static pthread_mutex_t writing = PTHREAD_MUTEX_INITIALIZER;
static bool has_ended; // guarded by it: the end has been written

// With the mutex held.
static void write_record(Trainer *t, const char *state, Status code, const char *message) {
    int64_t step = t->saved_step > 0 ? t->saved_step : 0;
    if (rundir_status(&t->dir, state, step, code, message) == STATUS_OK) return;
    log_warn("run_status.json could not be written: %s", status_message());
    status_clear();
}

// The process ends behind this, so the mutex stays locked.
static void say_last_words(void *context, const char *signal) {
    Trainer *t = context;
    char message[128];
    pthread_mutex_lock(&writing);
    if (has_ended) return;
    snprintf(message, sizeof message,
             "ended at once by a second signal (%s); the same command continues", signal);
    write_record(t, "preempted", STATUS_PREEMPTED, message);
}

// The same of a rank 0 that hangs, from the watchdog.
static void say_that_it_hangs(void *context, const char *why) {
    Trainer *t = context;
    pthread_mutex_lock(&writing);
    if (!has_ended) write_record(t, "failed", STATUS_COMMUNICATION, why);
}

void record_watch(Trainer *t) {
    if (t->team.rank == 0) watchdog_last_words(t->watchdog, say_that_it_hangs, t);
}

Status record_begin(Trainer *t) {
    has_ended = false;
    record_watch(t);
    return t->team.rank == 0 ? stop_signal_last_words(say_last_words, t) : STATUS_OK;
}

void record_progress(Trainer *t) {
    if (t->team.rank > 0) return;
    pthread_mutex_lock(&writing);
    write_record(t, "running", STATUS_OK, "");
    pthread_mutex_unlock(&writing);
}

void record_end(Trainer *t, Status code) {
    const char *state = code == STATUS_OK          ? "done"
                        : code == STATUS_PREEMPTED ? "preempted"
                                                   : "failed";
    StatusRecord record;
    if (t->team.rank > 0) return;
    status_take(&record);
    pthread_mutex_lock(&writing);
    write_record(t, state, code, code == STATUS_OK ? "" : record.message);
    has_ended = true;
    pthread_mutex_unlock(&writing);
    stop_signal_no_last_words();
    if (code != STATUS_OK) status_put(&record);
}
