// What prepare.c, prepare_plan.c and dryrun.c share. Callers outside use train/run.h.
#ifndef TRAIN_PREPARE_H
#define TRAIN_PREPARE_H

#include "model/fusion.h"
#include "train/run.h"

// The model the recipe starts from, before any fusion: the source's config.json, or the shape of
// [model] with random weights. Reads no weights.
Status prepare_seed_config(const Recipe *recipe, ModelConfig *out) NODISCARD;

// --- prepare_plan.c ------------------------------------------------------------------------------

// True when blocks can be chosen without measuring: from lfuc.plan, or by hand.
bool plan_is_given(const Recipe *recipe);
// Such a plan; checks it against the seed.
Status plan_from_recipe(const Recipe *recipe, const ModelConfig *seed, FusionPlan *out) NODISCARD;
// Everything of a plan but its blocks.
void plan_settings(const Recipe *recipe, const ModelConfig *seed, FusionPlan *out);
// A budget that no choice of blocks can meet is found before anything is measured.
Status plan_check_budget(const Recipe *recipe, const ModelConfig *seed) NODISCARD;
// The plan of an earlier start of this run; *found = false when there is none that still holds.
Status plan_of_run(const Recipe *recipe, const char *run_path, const ModelConfig *seed,
                   FusionPlan *out, bool *found) NODISCARD;
// The run's plan: the earlier one, the given one, or a new one from a measurement; written to
// <run>/plan/.
Status plan_make(const Recipe *recipe, Backend *backend, const char *run_path, TensorSource *seed,
                 FusionPlan *out) NODISCARD;

#endif
