// The sums of a step as one row of numbers, so that they are added over micro-batches or ranks in
// one go: what ModelSums holds, and the gradients' Σ g² and count of values that are not finite.
#ifndef TRAIN_STEP_SUMS_H
#define TRAIN_STEP_SUMS_H

#include <stdint.h>
#include "model/model.h"

// How many numbers, for a model of `layers` layers.
int64_t step_sums_count(const ModelSums *sums, int layers);
void step_sums_pack(const ModelSums *sums, int layers, const double gradient[2], double *row);
void step_sums_unpack(const double *row, int layers, ModelSums *sums, double gradient[2]);

#endif
