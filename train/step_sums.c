#include "train/step_sums.h"

#include <string.h>

enum { SCALARS = 5 }; // two of the gradient, loss_sum, loss_count, tokens

int64_t step_sums_count(const ModelSums *sums, int layers) {
    return SCALARS + 2 * (int64_t)layers * sums->stride + 2 * (int64_t)layers;
}

// The arrays behind the scalars: (layers, stride) twice, (layers) twice.
static size_t array_count(const ModelSums *sums, int layers, int i) {
    return (size_t)layers * (i < 2 ? (size_t)sums->stride : 1);
}

void step_sums_pack(const ModelSums *sums, int layers, const double gradient[2], double *row) {
    const double scalars[SCALARS] = {gradient[0], gradient[1], sums->loss_sum, sums->loss_count,
                                     sums->tokens};
    const double *const arrays[4] = {sums->assignments, sums->probability, sums->entropy, sums->z};
    memcpy(row, scalars, sizeof scalars);
    row += SCALARS;
    for (int i = 0; i < 4; i++) {
        memcpy(row, arrays[i], array_count(sums, layers, i) * sizeof *row);
        row += array_count(sums, layers, i);
    }
}

void step_sums_unpack(const double *row, int layers, ModelSums *sums, double gradient[2]) {
    double *const arrays[4] = {sums->assignments, sums->probability, sums->entropy, sums->z};
    gradient[0] = row[0];
    gradient[1] = row[1];
    sums->loss_sum = row[2];
    sums->loss_count = row[3];
    sums->tokens = row[4];
    row += SCALARS;
    for (int i = 0; i < 4; i++) {
        memcpy(arrays[i], row, array_count(sums, layers, i) * sizeof *row);
        row += array_count(sums, layers, i);
    }
}
