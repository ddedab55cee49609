// The parts of a run while it lives, shared by the files that make it up:
//   run.c          from the lock to the exit code
//   run_resume.c   which checkpoint to continue, and whether it may be continued
//   run_setup.c    opens model, data, optimizer, writer and report
//   run_ranks.c    what ranks that train together agree on at the start and between steps
//   run_step.c     one optimizer step
//   run_save.c     checkpoints in the background and what their failures mean
//   run_record.c   what run_status.json says of it
//   run_finish.c   evaluation, export, the last line
//   run_profile.c  --profile: steps timed op by op instead of all that
#ifndef TRAIN_TRAINER_H
#define TRAIN_TRAINER_H

#include <stdbool.h>
#include <stdint.h>
#include "base/file.h"
#include "base/json.h"
#include "data/loader.h"
#include "model/model.h"
#include "optim/optimizer.h"
#include "optim/pairwise.h"
#include "optim/schedule.h"
#include "optim/traffic.h"
#include "train/checkpoint.h"
#include "train/gpu_events.h"
#include "train/profile.h"
#include "train/recipe_lists.h"
#include "train/report.h"
#include "train/run.h"
#include "train/run_state.h"
#include "train/stragglers.h"
#include "train/step_sums.h"
#include "train/team.h"
#include "train/watchdog.h"

#define RESULT_NAME    "result.json" // <run>/result.json: written when everything is done
#define PROFILE_SUFFIX "-profile"    // of the run's name with --profile

typedef struct Trainer {
    const Recipe *recipe;
    const RunOptions *options;
    Backend *backend;           // not owned; with --profile the profile's
    Profile *profile;           // NULL without --profile
    Communicator *communicator; // of the options; with --profile the profile's
    Team team;             // the ranks that train together; rank 0 alone writes what is not a slice
    double wait_seconds;   // for another rank in a collective, once steps are made
    RunDir dir;            // locked by rank 0
    GpuEvents *gpu_events; // on a GPU, from the first step on
    Watchdog *watchdog;    // of several ranks from the start, of one from the first step on
    char checkpoints[IO_PATH_MAX]; // <run>/checkpoints
    char *recipe_text;             // resolved, as written to recipe.resolved.ini

    // What this attempt continues (run_resume.c).
    int64_t resume_step;           // -1 = starts from the beginning
    char resume_path[IO_PATH_MAX]; // its checkpoint
    char origin[RUN_ORIGIN_MAX];   // see RunState
    json_t *resume_state;

    ModelConfig config;
    TensorSource *source;             // of the weights, until they are loaded; NULL = random
    Communicator *experts, *replicas; // of the ranks that share out experts, and of those with the
                                      // same ones; NULL where every rank has all
    Model *model;
    Traffic *traffic;   // NULL with one rank
    Pairwise *pairwise; // NULL without parallel.pairwise
    Optimizer *optimizer;
    DataConfig data, valid_data;
    Loader *loader;
    FixedPass *valid; // NULL = no held-out shards
    CheckpointWriter *writer;
    Report *report; // NULL on ranks other than 0
    Schedule schedule;
    StepRanges skip_steps;
    int64_t total_steps;
    RunIdentity identity; // points into this struct

    RunState state;
    ModelSums sums;                         // of the latest step or evaluation, over all ranks
    double *row;                            // the same as a row (train/step_sums.h)
    bool stop;                              // some rank was asked to, and all know
    char stop_name[16];                     // by which signal
    bool unsaved;                           // state has moved since the latest save began
    int64_t saved_step;                     // newest step with a complete checkpoint; -1 = none
    int64_t saving_step;                    // of the save in flight; -1 = none
    bool others_save;                       // some rank still wrote when the last step was made
    bool publishing;                        // several ranks: all have written, rank 0 publishes
    long save_tag;                          // CheckpointOptions.tag
    int failed_saves;                       // in a row
    StatusRecord save_failure;              // the newest
    double interval_seconds, interval_wait; // this attempt's part of the interval
    int64_t interval_steps;                 // steps in it, skipped ones included
    StepTimes own_times;                    // of the interval, without waiting for other ranks
    Stragglers stragglers;                  // rank 0, once there are several
    double learning_rate;                   // of the latest step
} Trainer;

// run_resume.c
Status resume_choose(Trainer *t) NODISCARD;
Status resume_check_recipe(const Trainer *t) NODISCARD; // before anything is opened
Status resume_check_config(const Trainer *t) NODISCARD; // once the recipe's model is known
Status resume_check_data(const Trainer *t) NODISCARD;   // once the data is open
// --resume never: what the earlier course of the run has left is moved aside, nothing is deleted.
Status resume_start_anew(Trainer *t) NODISCARD;
// --resume DIR: the run's checkpoints that DIR does not lead to are moved aside.
Status resume_set_aside(const Trainer *t) NODISCARD;

// run_ranks.c
// Runs one part of the start-up: on all ranks at once; on rank 0, then on the others, which find
// what it left; on rank 0 alone. All fail when one does (team_agree).
typedef Status (*TrainerPart)(Trainer *t);
Status ranks_together(Trainer *t, TrainerPart part) NODISCARD;
Status ranks_in_turn(Trainer *t, TrainerPart part) NODISCARD;
Status ranks_first_only(Trainer *t, TrainerPart part) NODISCARD;
// Rank 0's run directory, choice of a checkpoint and answer to run_is_finished, known to all.
Status ranks_share_directory(Trainer *t) NODISCARD;
Status ranks_share_resume(Trainer *t) NODISCARD;
Status ranks_share_finished(Trainer *t, bool *finished) NODISCARD;
// Whether any rank has other training shards than rank 0: fails on those that have.
Status ranks_compare_data(Trainer *t) NODISCARD;
// How long the ranks worked on the steps of the interval: to log.jsonl, and a warning that names
// those which hold up the others.
Status ranks_compare_times(Trainer *t) NODISCARD;
// Sets t->stop when any rank has been asked to stop. Asks the others, which waits for weights that
// are still on their way; between steps what the last one has brought is enough.
Status ranks_agree_on_stop(Trainer *t) NODISCARD;
// What this rank has to tell with a step's sums, and what it hears of all.
StepNews ranks_news(const Trainer *t);
Status ranks_hear(Trainer *t, const StepNews *all) NODISCARD;

// run_setup.c
Status trainer_open(Trainer *t) NODISCARD;
void trainer_close(Trainer *t);

// run_step.c
Status train_step(Trainer *t) NODISCARD;
void report_interval(Trainer *t);
// t->sums and the news of this rank become those of all ranks.
Status sum_over_ranks(Trainer *t, StepNews *news) NODISCARD;

// run_save.c
// Starts a save of the present state; collects the one before first.
Status save_begin(Trainer *t) NODISCARD;
// Collects a save that has ended; with `wait`, also one that has not. Fails only when too many
// saves in a row have failed.
Status save_collect(Trainer *t, bool wait) NODISCARD;
// Saves what is unsaved, waits, and fails when it could not be saved.
Status save_finally(Trainer *t) NODISCARD;

// run_record.c: rank 0's; nothing on others.
Status record_begin(Trainer *t) NODISCARD; // once the directory is open
void record_watch(Trainer *t);             // there is a watchdog that may end the process
void record_progress(Trainer *t);          // saved_step has moved
// How the attempt ended. The failure itself is what the caller reports.
void record_end(Trainer *t, Status code);

// run_finish.c
// The evaluation that the present step asks for, if any: "start" before the first step, "end" after
// the last, "valid" every train.eval_every steps. A request to stop leaves it undone; the attempt
// that continues does it first.
Status evaluate_if_due(Trainer *t) NODISCARD;
// Export, result.json and the last line.
Status finish_run(Trainer *t) NODISCARD;
// True when an earlier attempt has already done everything that this recipe asks for.
bool run_is_finished(const Trainer *t);

// run_profile.c
Status run_profile(Trainer *t) NODISCARD;

#endif
