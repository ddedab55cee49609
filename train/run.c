// A training run, from the lock of its directory to the exit code.
//
// The loop asks the same questions before every step: is an evaluation due, was a stop requested,
// is a save due, are we there? Everything it needs to answer them is in the state that a checkpoint
// holds, so an interrupted run and an uninterrupted one ask and answer the same. Several ranks run
// this loop side by side; what only one of them can know they tell each other (run_ranks.c).
#include "train/run.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include "base/log.h"
#include "train/stop_signal.h"
#include "train/trainer.h"

static Status save_if_due(Trainer *t) {
    int64_t step = t->state.step, every = t->recipe->checkpoint_every;
    // The last step is saved by the end of the run, after its evaluation.
    bool due = every > 0 && step > 0 && step < t->total_steps && step % every == 0;
    return due && t->unsaved ? save_begin(t) : STATUS_OK;
}

static Status report_if_due(Trainer *t) {
    bool last = t->state.step == t->total_steps;
    if (!last && t->state.step % t->recipe->train_log_every != 0) return STATUS_OK;
    if (t->team.world > 1) TRY(ranks_compare_times(t));
    report_interval(t);
    return STATUS_OK;
}

// What the device reports names the op and the token; this names the step.
static Status one_step(Trainer *t) {
    Status status = train_step(t);
    if (status != STATUS_INTERNAL && status != STATUS_BAD_DATA) return status;
    return status_prefix(status, "step %" PRId64 ": ", t->state.step + 1);
}

static Status train_loop(Trainer *t) {
    for (;;) {
        watchdog_beat(t->watchdog, t->state.step, "between steps");
        TRY(evaluate_if_due(t));
        // A rank alone hears of a signal at once, several with the step that follows it.
        if (t->team.world == 1) TRY(ranks_agree_on_stop(t));
        if (t->stop || t->state.step >= t->total_steps) return STATUS_OK;
        TRY(save_if_due(t));
        watchdog_beat(t->watchdog, t->state.step + 1, "in the step");
        TRY(one_step(t));
        watchdog_beat(t->watchdog, t->state.step, "after the step");
        TRY(report_if_due(t));
        TRY(save_collect(t, false));
    }
}

static Status stopped(const Trainer *t, int64_t step) {
    Status status =
        status_fail(__FILE__, __LINE__, STATUS_PREEMPTED,
                    "stopped by %s at step %" PRId64 " of %" PRId64 "; the same command continues",
                    t->stop_name, step, t->total_steps);
    if (t->team.rank > 0) status_told(); // all ranks stop at the same step, and rank 0 says so
    return status;
}

// A rank that fails by itself leaves the others waiting for it: they are told at once.
static Status train_to_the_end(Trainer *t) {
    Communicator *c = t->team.communicator;
    Status status = ranks_agree_on_stop(t);
    if (status == STATUS_OK) status = train_loop(t);
    if (status == STATUS_OK) status = save_finally(t);
    if (status == STATUS_OK) status = ranks_agree_on_stop(t);
    if (status != STATUS_OK && c) c->ops->abort(c);
    return status;
}

// Before the first step one rank may have an hour's work that the others wait for; a rank that dies
// is noticed at once all the same.
static void wait_longer(Trainer *t) {
    Communicator *c = t->communicator;
    double setup = (double)t->recipe->parallel_setup_seconds;
    if (!c) return;
    t->wait_seconds = c->timeout_seconds;
    if (setup > c->timeout_seconds) c->timeout_seconds = setup;
}

static void wait_as_told(Trainer *t) {
    Communicator *all[] = {t->team.communicator, t->experts, t->replicas};
    for (int i = 0; i < 3; i++)
        if (all[i]) all[i]->timeout_seconds = t->wait_seconds;
}

// The watchdog's limit is a little beyond the communicator's, which knows better who is to blame.
static double hang_limit(const Trainer *t) {
    enum { LATER_SECONDS = 10 };
    double limit = t->recipe->parallel_hang_seconds;
    return limit + (limit / 4 < LATER_SECONDS ? limit / 4 : LATER_SECONDS);
}

// Ranks are watched from where they wait for each other, and may have an hour's work first.
static Status watch_setup(Trainer *t) {
    double setup = (double)t->recipe->parallel_setup_seconds, limit = hang_limit(t);
    if (t->team.world == 1) return STATUS_OK;
    return watchdog_start(t->team.rank, setup > limit ? setup : limit, t->team.communicator,
                          &t->watchdog);
}

static Status watch_steps(Trainer *t) {
    if (t->watchdog) {
        watchdog_allow(t->watchdog, hang_limit(t));
        return STATUS_OK;
    }
    TRY(watchdog_start(t->team.rank, hang_limit(t), t->team.communicator, &t->watchdog));
    record_watch(t);
    return STATUS_OK;
}

// Its thread starts when nothing forks any more.
static Status watch_gpu(Trainer *t) {
    if (strcmp(t->backend->name, "cuda") != 0) return STATUS_OK;
    return gpu_events_start(NULL, t->options->local_rank == 0, &t->gpu_events);
}

// That what is continued is this recipe's run, also where nothing is left to do.
static Status check_resumed(Trainer *t) {
    TRY(resume_check_recipe(t));
    if (t->options->resume != RESUME_FROM || t->resume_step <= t->total_steps) return STATUS_OK;
    FAIL(STATUS_USAGE,
         "--resume %s: is of step %" PRId64 ", beyond the %" PRId64 " steps of the recipe; raise "
         "train.steps or train.tokens, or name an earlier checkpoint",
         t->resume_path, t->resume_step, t->total_steps);
}

static Status train(Trainer *t) {
    bool finished;
    TRY(ranks_first_only(t, resume_choose));
    TRY(ranks_share_resume(t));
    TRY(ranks_first_only(t, check_resumed));
    if (t->resume_step > 0) t->saved_step = t->resume_step;
    TRY(ranks_share_finished(t, &finished));
    if (finished) {
        log_info("step %" PRId64 " of %" PRId64 " is already reached and exported in %s; raise "
                 "train.steps or train.tokens to go on",
                 t->resume_step, t->total_steps, t->dir.path);
        return STATUS_OK;
    }
    // What follows may take an hour.
    TRY(ranks_agree_on_stop(t));
    if (t->stop) return stopped(t, t->resume_step > 0 ? t->resume_step : 0);
    TRY(trainer_open(t));
    wait_as_told(t);
    TRY(watch_steps(t));
    if (t->profile) return run_profile(t);
    TRY(watch_gpu(t));
    TRY(train_to_the_end(t));
    watchdog_alone(t->watchdog);
    if (t->stop) return stopped(t, t->state.step);
    // The others have nothing left to do, and nobody waits for them. Writing the export and reading
    // it back takes long for a large model.
    watchdog_beat(t->watchdog, t->state.step, "in the export");
    watchdog_allow(t->watchdog, (double)t->recipe->parallel_setup_seconds);
    return t->team.rank == 0 ? finish_run(t) : STATUS_OK;
}

// A profile has a directory of its own, so that it can never come between a run and its
// checkpoints.
static Status open_own_directory(Trainer *t) {
    char name[RECIPE_TEXT_MAX], own[RECIPE_TEXT_MAX + sizeof PROFILE_SUFFIX];
    TRY(recipe_run_name(t->recipe, name, sizeof name));
    snprintf(own, sizeof own, "%s%s", name, t->profile ? PROFILE_SUFFIX : "");
    return rundir_open(&t->dir, t->recipe->run_directory, own);
}

static Status open_directory(Trainer *t) {
    TRY(ranks_first_only(t, open_own_directory));
    TRY(ranks_share_directory(t));
    return io_path(t->checkpoints, "%s/checkpoints", t->dir.path);
}

static Status open_team(Trainer *t) {
    Communicator *communicator = t->communicator;
    TRY(team_open(t->backend, communicator, &t->team));
    if (communicator) communicator->tree = t->recipe->parallel_pairwise;
    wait_longer(t);
    if (t->team.rank > 0) log_lower();
    return team_agree(&t->team, prepare_check_world(t->recipe, t->backend, t->team.world));
}

static Status open_profile(Trainer *t) {
    TRY(profile_create(t->backend, &t->profile));
    t->backend = profile_backend(t->profile);
    if (!t->options->communicator) return STATUS_OK;
    return profile_communicator(t->profile, t->options->communicator, &t->communicator);
}

static void close_profile(Trainer *t) {
    if (t->communicator != t->options->communicator) communicator_destroy(t->communicator);
    profile_destroy(t->profile);
}

static Status run_attempt(Backend *backend, const Recipe *recipe, const RunOptions *options) {
    Trainer *t = calloc(1, sizeof *t);
    if (!t) FAIL(STATUS_INTERNAL, "out of memory for the run");
    Status status = STATUS_OK;
    t->recipe = recipe;
    t->options = options;
    t->backend = backend;
    t->communicator = options->communicator;
    t->saved_step = t->saving_step = -1;
    t->dir.lock_fd = -1;
    t->total_steps = recipe_steps(recipe);
    TRY_GOTO(recipe_print(recipe, &t->recipe_text), done);
    if (options->profile_steps > 0) TRY_GOTO(open_profile(t), done);
    TRY_GOTO(open_team(t), done);
    TRY_GOTO(watch_setup(t), done);
    TRY_GOTO(open_directory(t), done);
    status = record_begin(t);
    if (status == STATUS_OK) status = train(t);
    status = watchdog_place(t->watchdog, status);
    watchdog_stop(t->watchdog);
    status = gpu_events_explain(t->gpu_events, status);
    gpu_events_stop(t->gpu_events);
    record_end(t, status);
    trainer_close(t);
    rundir_close(&t->dir);
    team_close(&t->team);
    close_profile(t);
    free(t);
    return status;
done:
    watchdog_stop(t->watchdog);
    rundir_close(&t->dir);
    team_close(&t->team);
    close_profile(t);
    free(t->recipe_text);
    free(t);
    return status;
}

// Requests to stop are heard from the start on: before the run directory is open, too, a run that
// is asked to stop must get so far as to say in there that it was asked, or nobody would requeue
// it.
static void hear_requests(const RunOptions *options) {
    stop_signal_install(!options->communicator || options->communicator->rank == 0);
}

Status run_training_on(Backend *backend, const Recipe *recipe, const RunOptions *options) {
    hear_requests(options);
    Status status = run_attempt(backend, recipe, options);
    stop_signal_restore();
    return status;
}

static Status run_alone(const Recipe *recipe, const RunOptions *options) {
    Backend *backend;
    TRY(prepare_check_inputs(recipe));
    TRY(prepare_backend(recipe, 0, &backend));
    Status status = run_attempt(backend, recipe, options);
    backend_destroy(backend);
    return status;
}

Status run_training(const Recipe *recipe, const RunOptions *options) {
    hear_requests(options);
    Status status = run_alone(recipe, options);
    stop_signal_restore();
    return status;
}
