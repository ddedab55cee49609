// Settings whose text is a small language of its own: data.train and train.recompute.
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

#endif
