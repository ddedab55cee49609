#include "train/step_sums.h"

#include <string.h>

enum { SCALARS = 7 };

int64_t step_sums_count(const ModelSums *sums, int layers) {
    return SCALARS + 2 * (int64_t)layers * sums->stride + 2 * (int64_t)layers;
}

// The arrays behind the scalars: (layers, stride) twice, (layers) twice.
static size_t array_count(const ModelSums *sums, int layers, int i) {
    return (size_t)layers * (i < 2 ? (size_t)sums->stride : 1);
}

void step_sums_pack(const ModelSums *sums, int layers, const StepNews *news, double *row) {
    const double scalars[SCALARS] = {news->gradient[0], news->gradient[1], news->stop,
                                     news->saving,      sums->loss_sum,    sums->loss_count,
                                     sums->tokens};
    const double *const arrays[4] = {sums->assignments, sums->probability, sums->entropy, sums->z};
    memcpy(row, scalars, sizeof scalars);
    row += SCALARS;
    for (int i = 0; i < 4; i++) {
        memcpy(row, arrays[i], array_count(sums, layers, i) * sizeof *row);
        row += array_count(sums, layers, i);
    }
}

void step_sums_unpack(const double *row, int layers, ModelSums *sums, StepNews *news) {
    double *const arrays[4] = {sums->assignments, sums->probability, sums->entropy, sums->z};
    *news = (StepNews){.gradient = {row[0], row[1]}, .stop = row[2], .saving = row[3]};
    sums->loss_sum = row[4];
    sums->loss_count = row[5];
    sums->tokens = row[6];
    row += SCALARS;
    for (int i = 0; i < 4; i++) {
        memcpy(arrays[i], row, array_count(sums, layers, i) * sizeof *row);
        row += array_count(sums, layers, i);
    }
}
