// Which rank holds the others up.
//
// Ranks that train together take the same time for a step: the fast ones wait. What tells them
// apart is the time in which a rank does not wait for others. Each rank notes it per step; at a log
// line they compare the medians. A rank beyond `ratio` times the median of all for
// `patience` steps in a row is named, once until it has caught up.
#ifndef TRAIN_STRAGGLERS_H
#define TRAIN_STRAGGLERS_H

#include <stdbool.h>
#include <stdint.h>
#include "base/status.h"

enum { STRAGGLER_STEPS_MAX = 1024 }; // of an interval that are looked at: the latest

typedef struct StepTimes {
    double seconds[STRAGGLER_STEPS_MAX];
    int64_t count; // of the interval
} StepTimes;

void step_times_add(StepTimes *times, double own_seconds);
// Median and maximum of the interval (0 without a step), and begins the next.
void step_times_take(StepTimes *times, double *median, double *maximum);

typedef struct Stragglers {
    double ratio;
    int64_t patience;
    int world;
    int64_t *steps; // (world) in a row beyond the limit; -1: named
} Stragglers;

Status stragglers_open(int world, double ratio, int64_t patience, Stragglers *out) NODISCARD;
void stragglers_close(Stragglers *stragglers); // safe on zeroed memory
// What the ranks' medians (world) over the latest `steps` steps mean: slow[r] is set for each rank
// that is to be named now. Returns their number.
int stragglers_judge(Stragglers *stragglers, const double *medians, int64_t steps, bool *slow);

#endif
