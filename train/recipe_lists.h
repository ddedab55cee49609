// Settings whose text is a small language of its own: data.train, train.recompute and
// optim.skip_steps.
#ifndef TRAIN_RECIPE_LISTS_H
#define TRAIN_RECIPE_LISTS_H

#include "base/status.h"
#include "model/model.h"
#include "train/run.h"

// "DIR:WEIGHT, DIR": fills loader.sources, whose texts go to out->directories. Weight 1 when none
// is given. `key` is the setting's name for messages.
Status parse_sources(const char *key, const char *text, DataConfig *out) NODISCARD;

// "none", "layer", or a list of swiglu and norms.
Status parse_recompute(const char *text, Recompute *out) NODISCARD;

// "120, 300-320": the steps of each range, counted from 1. "": none.
enum { STEP_RANGES_MAX = 64 };
typedef struct StepRange {
    int64_t first, last;
} StepRange;
typedef struct StepRanges {
    int count;
    StepRange range[STEP_RANGES_MAX];
} StepRanges;
Status parse_step_ranges(const char *key, const char *text, StepRanges *out) NODISCARD;
bool step_ranges_have(const StepRanges *ranges, int64_t step);

#endif
