// What several ranks agree on before they train and between steps.
//
// Rank 0 decides and writes, the others follow: there is one run directory, one choice of what to
// continue, one log. A failure on any rank is everybody's, with one message; so every part of the
// start-up ends in team_agree, on every rank, also where a rank had nothing to do.
#include "train/trainer.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "base/log.h"
#include "train/stop_signal.h"

// --- Parts of the start-up -----------------------------------------------------------------------

Status ranks_together(Trainer *t, TrainerPart part) {
    return team_agree(&t->team, part(t));
}

Status ranks_first_only(Trainer *t, TrainerPart part) {
    return team_agree(&t->team, t->team.rank == 0 ? part(t) : STATUS_OK);
}

Status ranks_in_turn(Trainer *t, TrainerPart part) {
    TRY(ranks_first_only(t, part));
    if (t->team.world == 1) return STATUS_OK;
    return team_agree(&t->team, t->team.rank > 0 ? part(t) : STATUS_OK);
}

Status ranks_share_directory(Trainer *t) {
    struct {
        char path[IO_PATH_MAX];
        int attempt;
    } shared = {.attempt = t->dir.attempt};
    memcpy(shared.path, t->dir.path, sizeof shared.path);
    TRY(team_broadcast(&t->team, &shared, sizeof shared));
    if (t->team.rank == 0) return STATUS_OK;
    t->dir = (RunDir){.lock_fd = -1, .attempt = shared.attempt};
    memcpy(t->dir.path, shared.path, sizeof t->dir.path);
    return STATUS_OK;
}

static Status read_chosen_state(Trainer *t) {
    if (t->team.rank == 0 || !t->resume_path[0]) return STATUS_OK;
    return checkpoint_read_state(t->resume_path, &t->resume_state);
}

Status ranks_share_resume(Trainer *t) {
    struct {
        int64_t step;
        char path[IO_PATH_MAX], origin[RUN_ORIGIN_MAX];
    } shared = {.step = t->resume_step};
    if (t->resume_state) memcpy(shared.path, t->resume_path, sizeof shared.path);
    memcpy(shared.origin, t->origin, sizeof shared.origin);
    TRY(team_broadcast(&t->team, &shared, sizeof shared));
    if (t->team.rank > 0) {
        t->resume_step = shared.step;
        memcpy(t->resume_path, shared.path, sizeof t->resume_path);
        memcpy(t->origin, shared.origin, sizeof t->origin);
    }
    return ranks_together(t, read_chosen_state);
}

Status ranks_share_finished(Trainer *t, bool *finished) {
    char answer = t->team.rank == 0 && !t->profile && run_is_finished(t);
    TRY(team_broadcast(&t->team, &answer, sizeof answer));
    *finished = answer;
    return STATUS_OK;
}

Status ranks_compare_data(Trainer *t) {
    char first[HASH_HEX_SIZE];
    Status status = STATUS_OK;
    memcpy(first, t->identity.data_fingerprint, sizeof first);
    TRY(team_broadcast(&t->team, first, sizeof first));
    if (strcmp(first, t->identity.data_fingerprint) != 0)
        status = status_fail(__FILE__, __LINE__, STATUS_BAD_DATA,
                             "data.train = %s: the shards have fingerprint %s, those of rank 0 %s; "
                             "all ranks must see the same files",
                             t->recipe->data_train, t->identity.data_fingerprint, first);
    return team_agree(&t->team, status);
}

// --- Who holds up the others ---------------------------------------------------------------------

typedef struct RankTimes {
    double median, maximum; // seconds
    char host[64];
} RankTimes;

static void warn_of_stragglers(Trainer *t, const RankTimes *times, const double *medians) {
    bool slow[TEAM_RANKS_MAX];
    char text[256];
    if (stragglers_judge(&t->stragglers, medians, t->interval_steps, slow) == 0) return;
    for (int r = 0; r < t->team.world; r++) {
        if (!slow[r]) continue;
        snprintf(
            text, sizeof text,
            "rank %d on %.63s holds up the others: its steps take %.3g s without waiting, more "
            "than %.3g times the median of the ranks",
            r, times[r].host, times[r].median, t->stragglers.ratio);
        log_warn("step %" PRId64 ": %s", t->state.step, text);
        report_event(t->report, t->state.step, "straggler", text);
    }
}

Status ranks_compare_times(Trainer *t) {
    const int world = t->team.world;
    Status status = STATUS_OK;
    RankTimes *times = calloc((size_t)world, sizeof *times);
    double *medians = calloc(2 * (size_t)world, sizeof *medians);
    if (!times || !medians) FAIL_GOTO(done, STATUS_INTERNAL, "out of memory: %d ranks", world);
    RankTimes *own = &times[t->team.rank];
    step_times_take(&t->own_times, &own->median, &own->maximum);
    if (gethostname(own->host, sizeof own->host - 1) != 0) strcpy(own->host, "unknown");
    TRY_GOTO(team_gather(&t->team, times, sizeof *times), done);
    if (t->team.rank > 0) goto done;
    for (int r = 0; r < world; r++) {
        medians[r] = times[r].median;
        medians[world + r] = times[r].maximum;
    }
    report_ranks(t->report, t->state.step, medians, medians + world, world);
    warn_of_stragglers(t, times, medians);
done:
    free(times);
    free(medians);
    return status;
}

// --- Between steps -------------------------------------------------------------------------------

static Status share_signal_name(Trainer *t) {
    char names[TEAM_RANKS_MAX][sizeof t->stop_name] = {{0}};
    const size_t size = sizeof names[0];
    INVARIANT(t->team.world <= TEAM_RANKS_MAX);
    snprintf(names[t->team.rank], size, "%s", stop_signal_name());
    TRY(team_gather(&t->team, names, size));
    for (int r = 0; r < t->team.world && !t->stop_name[0]; r++)
        memcpy(t->stop_name, names[r], size);
    return STATUS_OK;
}

static Status hear_stop(Trainer *t, double ranks) {
    if (t->stop || ranks == 0) return STATUS_OK;
    t->stop = true;
    return share_signal_name(t);
}

Status ranks_agree_on_stop(Trainer *t) {
    double stop = stop_requested();
    if (t->stop) return STATUS_OK;
    TRY(team_sum(&t->team, &stop, 1));
    return hear_stop(t, stop);
}

StepNews ranks_news(const Trainer *t) {
    bool saving = t->saving_step >= 0 && checkpoint_busy(t->writer);
    return (StepNews){.stop = stop_requested(), .saving = saving};
}

Status ranks_hear(Trainer *t, const StepNews *all) {
    t->others_save = all->saving > 0;
    return hear_stop(t, all->stop);
}
