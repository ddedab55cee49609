// What a step tells all ranks, as one row of numbers: one sum over the ranks is all that a step
// waits for between the gradients and the update.
//
// The update sends weights on their way to the other ranks, which travel while the next forward
// pass runs; a question to the others after it would have to wait until they have arrived. So what
// has to be known between steps goes into the same row.
#ifndef TRAIN_STEP_SUMS_H
#define TRAIN_STEP_SUMS_H

#include <stdint.h>
#include "model/model.h"

// Beside what ModelSums holds.
typedef struct StepNews {
    double gradient[2]; // Σ g² and how many are not finite, of the gradients that the rank owns
    double stop;        // ranks that have been asked to stop
    double saving;      // ranks whose part of a save is still being written
} StepNews;

// How many numbers, for a model of `layers` layers.
int64_t step_sums_count(const ModelSums *sums, int layers);
void step_sums_pack(const ModelSums *sums, int layers, const StepNews *news, double *row);
void step_sums_unpack(const double *row, int layers, ModelSums *sums, StepNews *news);

#endif
