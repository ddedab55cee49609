// Saving while training goes on, and what a failed save means: a warning, another try at the next
// interval, and the end of the run only when checkpoint.max_failures in a row have failed. A full
// disk is often emptied again; a run that died of it has lost everything since its last save.
//
// Several ranks save together: all write their parts, each says how that went, rank 0 publishes,
// and says how that went. A save has failed for all when it has for one. What is said is said
// between steps; while a save is waited for, the ranks keep asking each other, so that one slow
// disk is not taken for a lost rank.
#include "train/trainer.h"

#include <inttypes.h>
#include <stdlib.h>
#include <time.h>
#include "base/log.h"

static Status save_failed(Trainer *t, int64_t step) {
    int most = (int)t->recipe->checkpoint_max_failures;
    t->failed_saves++;
    t->unsaved = true;
    // Taken before anything else is written, which may fail on the same disk.
    status_take(&t->save_failure);
    const char *why = t->save_failure.message;
    if (t->team.rank == 0)
        log_warn("the checkpoint of step %" PRId64 " was not saved (failure %d of at most %d in a "
                 "row)%s: %s",
                 step, t->failed_saves, most, t->failed_saves < most ? ", training goes on" : "",
                 why);
    report_event(t->report, step, "save_failed", why);
    if (t->failed_saves < most) return STATUS_OK;
    status_put(&t->save_failure);
    return status_prefix(t->save_failure.code, "%d saves in a row failed, the last: ", most);
}

// Whether some rank's thread is still at work, as far as the last step has told; with `wait`, asks
// until none is.
static Status somebody_writes(Trainer *t, bool wait, bool *writes) {
    const struct timespec pause = {.tv_nsec = 5 * 1000 * 1000};
    *writes = t->team.world == 1 ? checkpoint_busy(t->writer) : t->others_save;
    if (!wait) return STATUS_OK;
    for (;;) {
        double busy = checkpoint_busy(t->writer);
        TRY(team_sum(&t->team, &busy, 1));
        *writes = busy > 0;
        if (!*writes || t->team.world == 1) return STATUS_OK;
        nanosleep(&pause, NULL);
    }
}

// How one half of a save went on all ranks. Where it failed, what was written is gone before anyone
// can begin the next one.
static Status agree_on_save(Trainer *t, Status status) {
    StatusRecord failure;
    double nothing = 0;
    Status agreed = team_agree(&t->team, status);
    if (agreed == STATUS_OK || agreed == STATUS_COMMUNICATION || t->team.world == 1) return agreed;
    status_take(&failure);
    if (t->team.rank == 0) checkpoint_discard(t->writer);
    TRY(team_sum(&t->team, &nothing, 1));
    return status_put(&failure);
}

// All ranks have written: rank 0 learns what, and begins to publish.
static Status publish(Trainer *t) {
    Status status = STATUS_OK;
    FileHash *parts = calloc((size_t)t->team.world, sizeof *parts);
    if (!parts) FAIL(STATUS_INTERNAL, "out of memory for %d parts", t->team.world);
    parts[t->team.rank] = checkpoint_part(t->writer);
    status = team_gather(&t->team, parts, sizeof *parts);
    if (status == STATUS_OK && t->team.rank == 0) status = checkpoint_publish(t->writer, parts);
    free(parts);
    return status;
}

static Status saved(Trainer *t, int64_t step) {
    t->saved_step = step;
    t->failed_saves = 0;
    log_debug("saved the checkpoint of step %" PRId64, step);
    report_event(t->report, step, "checkpoint", t->checkpoints);
    record_progress(t);
    return STATUS_OK;
}

Status save_collect(Trainer *t, bool wait) {
    while (t->saving_step >= 0) {
        bool writes;
        TRY(somebody_writes(t, wait, &writes));
        if (writes && !(wait && t->team.world == 1)) return STATUS_OK;
        bool complete = t->team.world == 1 || t->publishing;
        int64_t step = t->saving_step;
        Status status = agree_on_save(t, checkpoint_wait(t->writer));
        if (status == STATUS_OK && !complete) status = agree_on_save(t, publish(t));
        if (status == STATUS_COMMUNICATION) return status;
        t->publishing = status == STATUS_OK && !complete;
        if (t->publishing && wait) continue;
        if (t->publishing) return STATUS_OK;
        t->saving_step = -1;
        return status == STATUS_OK ? saved(t, step) : save_failed(t, step);
    }
    return STATUS_OK;
}

// The snapshot holds whole weights only once they are all here.
static Status begin(Trainer *t) {
    json_t *state;
    if (t->traffic) TRY(traffic_settle(t->traffic));
    TRY(run_state_to_json(&t->state, &t->identity, &state));
    Status status = checkpoint_begin(t->writer, t->state.step, state);
    json_decref(state);
    return status;
}

Status save_begin(Trainer *t) {
    TRY(save_collect(t, true));
    Status status = team_agree(&t->team, begin(t));
    if (status == STATUS_OK) status = team_agree(&t->team, checkpoint_start(t->writer));
    if (status == STATUS_COMMUNICATION) return status;
    if (status != STATUS_OK) {
        // Those who have begun end first.
        StatusRecord failure;
        status_take(&failure);
        if (checkpoint_wait(t->writer) != STATUS_OK) status_clear();
        status = agree_on_save(t, status_put(&failure));
        return status == STATUS_COMMUNICATION ? status : save_failed(t, t->state.step);
    }
    t->saving_step = t->state.step;
    t->unsaved = false;
    return STATUS_OK;
}

Status save_finally(Trainer *t) {
    if (t->unsaved) TRY(save_begin(t));
    TRY(save_collect(t, true));
    if (!t->unsaved) return STATUS_OK;
    status_put(&t->save_failure);
    return status_prefix(t->save_failure.code,
                         "the state at the end (step %" PRId64 ") could not be saved; the newest "
                         "checkpoint is of step %" PRId64 ": ",
                         t->state.step, t->saved_step);
}
