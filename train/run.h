// The run: prepare the model and its data (prepare.c), train it (run.c), export it.
#ifndef TRAIN_RUN_H
#define TRAIN_RUN_H

#include <stdbool.h>
#include "base/memory_plan.h"
#include "base/status.h"
#include "data/loader.h"
#include "model/communicator.h"
#include "model/hf.h"
#include "model/model.h"
#include "model/source.h"
#include "optim/optimizer.h"
#include "train/recipe.h"
#include "train/rundir.h"

typedef enum ResumeMode { RESUME_AUTO, RESUME_NEVER, RESUME_FROM } ResumeMode;

typedef struct RunOptions {
    ResumeMode resume;
    const char *resume_path; // RESUME_FROM: a checkpoint directory, or a run directory
    int64_t profile_steps;   // > 0: times that many steps and does nothing else (run_profile.c)
    // Connects the ranks that train together, for the backend of the run; NULL: this process trains
    // alone. Not owned. Its `tree` is set from the recipe.
    Communicator *communicator;
    int local_rank; // among the ranks of this machine; the first speaks for its GPUs
} RunOptions;

// --- prepare.c: from a recipe to what the run works with ---------------------------------------

// Finds what is wrong with the inputs before anything is created: device, model.source and its
// config.json, shards, tokenizer of the shards against the model's.
Status prepare_check_inputs(const Recipe *recipe) NODISCARD;

// The device of the rank that is number `local_rank` on this machine.
Status prepare_backend(const Recipe *recipe, int local_rank, Backend **out) NODISCARD;
// How many ranks a run that nobody else starts has on this machine: parallel.processes, or one per
// visible GPU, as many of them as the batch divides among.
int prepare_ranks(const Recipe *recipe);
Status prepare_model_options(const Recipe *recipe, bool training, ModelOptions *out) NODISCARD;
// What a recipe asks for that `world` ranks cannot do: a batch that does not divide, fp32 files of
// weights that no rank has whole.
Status prepare_check_world(const Recipe *recipe, const Backend *backend, int world) NODISCARD;
OptimizerOptions prepare_optimizer_options(const Recipe *recipe);

// Opens the recipe's model (HF directory or random shape) and, when lfuc is enabled, measures,
// chooses and fuses, leaving plan/similarity.h5 and plan/plan.json. An existing plan/plan.json of
// the same run is used again, so that a resumed run keeps its model.
// *source is NULL for random weights (then only *config is filled); else it owns all behind it.
Status prepare_model(const Recipe *recipe, Backend *backend, const RunDir *dir, ModelConfig *config,
                     TensorSource **source) NODISCARD;

// A LoaderConfig with the texts it points to: never copy or move one.
typedef struct DataConfig {
    LoaderConfig loader;
    char directories[RECIPE_TEXT_MAX]; // loader.sources[i].directory, each NUL-terminated
    char tokenizer_id[TOKENIZER_ID_SIZE];
} DataConfig;
// The loader settings a recipe means, for training and for the held-out shards.
Status prepare_train_data(const Recipe *recipe, const ModelConfig *config,
                          DataConfig *out) NODISCARD;
Status prepare_valid_data(const Recipe *recipe, const ModelConfig *config,
                          DataConfig *out) NODISCARD;

// train --plan-only and --surgery-only: prepare_model under the run directory's lock, then stop;
// surgery also streams the fused model to <run>/surgery, file to file.
typedef enum StopAfter { STOP_AFTER_PLAN, STOP_AFTER_SURGERY } StopAfter;
Status prepare_only(const Recipe *recipe, StopAfter stop) NODISCARD;

// --- dryrun.c ------------------------------------------------------------------------------------

// Prints recipe, plan, parameters, memory per item, tokens and steps to stdout; memory is that of
// one of `ranks` processes that train together.
Status dry_run(const Recipe *recipe, int ranks) NODISCARD;

// --- run.c: everything from the lock to the export -----------------------------------------------

Status run_training(const Recipe *recipe, const RunOptions *options) NODISCARD;
// The same on a backend that the caller made (tests wrap one to inject faults).
Status run_training_on(Backend *backend, const Recipe *recipe, const RunOptions *options) NODISCARD;

#endif
