// Saving while training goes on, and what a failed save means: a warning, another try at the next
// interval, and the end of the run only when checkpoint.max_failures in a row have failed. A full
// disk is often emptied again; a run that died of it has lost everything since its last save.
#include "train/trainer.h"

#include <inttypes.h>
#include "base/log.h"

// Bookkeeping for schedulers; training does not depend on it.
static void note_progress(Trainer *t) {
    Status status = rundir_status(&t->dir, "running", t->saved_step, STATUS_OK, "");
    if (status == STATUS_OK) return;
    log_warn("run_status.json could not be written: %s", status_message());
    status_clear();
}

static Status save_failed(Trainer *t, int64_t step) {
    int most = (int)t->recipe->checkpoint_max_failures;
    t->failed_saves++;
    t->unsaved = true;
    log_warn("the checkpoint of step %" PRId64 " was not saved (failure %d of at most %d in a "
             "row), training goes on: %s",
             step, t->failed_saves, most, status_message());
    report_event(t->report, step, "save_failed", status_message());
    status_take(&t->save_failure);
    if (t->failed_saves < most) return STATUS_OK;
    status_put(&t->save_failure);
    return status_prefix(t->save_failure.code, "%d saves in a row failed, the last: ", most);
}

Status save_collect(Trainer *t, bool wait) {
    if (t->saving_step < 0 || (!wait && checkpoint_busy(t->writer))) return STATUS_OK;
    int64_t step = t->saving_step;
    t->saving_step = -1;
    if (checkpoint_wait(t->writer) != STATUS_OK) return save_failed(t, step);
    t->saved_step = step;
    t->failed_saves = 0;
    log_debug("saved the checkpoint of step %" PRId64, step);
    report_event(t->report, step, "checkpoint", t->checkpoints);
    note_progress(t);
    return STATUS_OK;
}

Status save_begin(Trainer *t) {
    json_t *state;
    TRY(save_collect(t, true));
    TRY(run_state_to_json(&t->state, &t->identity, &state));
    Status status = checkpoint_begin(t->writer, t->state.step, state);
    json_decref(state);
    if (status != STATUS_OK) return save_failed(t, t->state.step);
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
