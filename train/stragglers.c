// Comparing ranks' times (train/stragglers.h).
#include "train/stragglers.h"

#include <stdlib.h>

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median_of(double *values, int64_t count) {
    if (count == 0) return 0;
    qsort(values, (size_t)count, sizeof *values, compare_doubles);
    return count % 2 ? values[count / 2] : (values[count / 2 - 1] + values[count / 2]) / 2;
}

void step_times_add(StepTimes *times, double own_seconds) {
    times->seconds[times->count++ % STRAGGLER_STEPS_MAX] = own_seconds;
}

void step_times_take(StepTimes *times, double *median, double *maximum) {
    int64_t kept = times->count < STRAGGLER_STEPS_MAX ? times->count : STRAGGLER_STEPS_MAX;
    *median = median_of(times->seconds, kept);
    *maximum = kept > 0 ? times->seconds[kept - 1] : 0;
    times->count = 0;
}

Status stragglers_open(int world, double ratio, int64_t patience, Stragglers *out) {
    *out = (Stragglers){.ratio = ratio, .patience = patience, .world = world};
    out->steps = calloc((size_t)world, sizeof *out->steps);
    if (!out->steps) FAIL(STATUS_INTERNAL, "out of memory for the times of %d ranks", world);
    return STATUS_OK;
}

void stragglers_close(Stragglers *stragglers) {
    free(stragglers->steps);
    *stragglers = (Stragglers){0};
}

int stragglers_judge(Stragglers *stragglers, const double *medians, int64_t steps, bool *slow) {
    double *sorted = malloc((size_t)stragglers->world * sizeof *sorted);
    int count = 0;
    for (int r = 0; r < stragglers->world; r++) slow[r] = false;
    if (!sorted || stragglers->ratio <= 0) { // a comparison is left out, nothing else
        free(sorted);
        return 0;
    }
    for (int r = 0; r < stragglers->world; r++) sorted[r] = medians[r];
    qsort(sorted, (size_t)stragglers->world, sizeof *sorted, compare_doubles);
    // The lower one of two in the middle: of two ranks, the faster one is what is normal.
    double limit = stragglers->ratio * sorted[(stragglers->world - 1) / 2];
    free(sorted);
    for (int r = 0; r < stragglers->world; r++) {
        int64_t *in_a_row = &stragglers->steps[r];
        if (medians[r] <= limit) {
            *in_a_row = 0;
        } else if (*in_a_row >= 0) {
            *in_a_row += steps;
            slow[r] = *in_a_row >= stragglers->patience;
            if (slow[r]) *in_a_row = -1;
            count += slow[r];
        }
    }
    return count;
}
