// The run: prepare the model (prepare.c), train it (run.c), export it.
#ifndef TRAIN_RUN_H
#define TRAIN_RUN_H

#include <stdbool.h>
#include "base/status.h"
#include "data/loader.h"
#include "model/model.h"
#include "model/source.h"
#include "train/recipe.h"
#include "train/rundir.h"

typedef enum ResumeMode { RESUME_AUTO, RESUME_NEVER, RESUME_FROM } ResumeMode;
typedef enum StopAfter { STOP_AT_END, STOP_AFTER_PLAN, STOP_AFTER_SURGERY } StopAfter;

typedef struct RunOptions {
    ResumeMode resume;
    const char *resume_path; // RESUME_FROM: a checkpoint directory, or a run directory
    bool dry_run;
    StopAfter stop_after;
} RunOptions;

// prepare.c: opens the recipe's model (HF directory or random shape) and, when lfuc is enabled,
// measures, chooses and fuses, leaving plan/similarity.h5 and plan/plan.json. An existing
// plan/plan.json of the same run is used again, so that a resumed run keeps its model.
// *source is NULL for random weights (then only *config is filled).
Status prepare_model(const Recipe *recipe, Backend *backend, const RunDir *dir, ModelConfig *config,
                     TensorSource **source) NODISCARD;
// The loader settings a recipe means, for training and for the held-out shards.
Status prepare_train_data(const Recipe *recipe, const ModelConfig *config,
                          LoaderConfig *out) NODISCARD;
Status prepare_valid_data(const Recipe *recipe, const ModelConfig *config,
                          LoaderConfig *out) NODISCARD;
Status prepare_model_options(const Recipe *recipe, bool training, ModelOptions *out) NODISCARD;
Status prepare_backend(const Recipe *recipe, Backend **out) NODISCARD;

// dryrun.c: prints recipe, plan, parameters, memory per item, tokens and steps to stdout.
Status dry_run(const Recipe *recipe) NODISCARD;
// The whole memory plan of a training run.
Status run_memory_plan(const Recipe *recipe, Backend *backend, const ModelConfig *config,
                       MemoryPlan *out) NODISCARD;

// run.c: everything from the lock to the export.
Status run_training(const Recipe *recipe, const RunOptions *options) NODISCARD;

#endif
