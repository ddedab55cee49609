// What the tests of Hopper's fused kernels share: products in double precision, and the comparison
// of rows.
#ifndef TESTS_GPU_HOPPER_H
#define TESTS_GPU_HOPPER_H

#include "tests/gpu/gpu_test.h"

enum { LANES = 8 }; // every hidden size is a multiple

// Lanes are kept apart so that the loop vectorises.
static inline double dot(const float *a, const float *b, int64_t count) {
    double lanes[LANES] = {}, sum = 0;
    for (int64_t k = 0; k < count; k += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += (double)a[k + l] * b[k + l];
    for (int l = 0; l < LANES; l++) sum += lanes[l];
    return sum;
}

// out (rows, columns) = in (rows, inner) · weightᵀ, weight (columns, inner).
static inline void multiply_transposed(int64_t rows, int64_t columns, int64_t inner,
                                       const float *in, const float *weight, float *out) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++)
            out[r * columns + c] = (float)dot(in + r * inner, weight + c * inner, inner);
}

// out (rows, columns) = in (rows, inner) · weight, weight (inner, columns).
static inline void multiply(int64_t rows, int64_t columns, int64_t inner, const float *in,
                            const float *weight, float *out) {
    double *sums = (double *)malloc((size_t)columns * sizeof *sums);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < columns; c++) sums[c] = 0;
        for (int64_t k = 0; k < inner; k++) {
            const double factor = in[r * inner + k];
            for (int64_t c = 0; c < columns; c++) sums[c] += factor * weight[k * columns + c];
        }
        for (int64_t c = 0; c < columns; c++) out[r * columns + c] = (float)sums[c];
    }
    free(sums);
}

// The error of the worst row: in the norm of a large matrix a wrong piece of one row would be lost.
static inline void check_rows(const float *got, const float *expected, int64_t count,
                              int64_t columns, const char *text, const char *what) {
    double worst = 0;
    for (int64_t i = 0; i < count; i += columns)
        worst = fmax(worst, gpu_error_of(got + i, expected + i, columns));
    // A single value is off by at most one rounding to bf16 (4e-3), or two where it is made from a
    // rounded product: whatever the row's length, that stays below.
    gpu_report(worst, gpu_tolerance(DTYPE_BF16), "%s %s, worst row", text, what);
}
static inline void pair_check_rows(const Pair *p, int64_t columns, const char *text,
                                   const char *what) {
    float *got = pair_download(p);
    check_rows(got, p->cpu, p->count, columns, text, what);
    free(got);
}

#endif
