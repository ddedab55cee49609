// Reductions over whole arrays. The array is cut into a fixed number of parts whose double sums
// are added in order, so that the result does not depend on the number of threads.
#include <math.h>
#include "cpu/cpu.h"
#include "cpu/vector_math.h"

enum { REDUCE_PARTS = 256 };

static void norm2_part(const float *values, int64_t begin, int64_t end, double *sum,
                       double *non_finite) {
    double squares = 0;
    int64_t bad = 0;
#pragma omp simd reduction(+ : squares, bad)
    for (int64_t i = begin; i < end; i++) {
        squares += (double)values[i] * values[i];
        bad += (bits_of_float(values[i]) & 0x7F800000u) == 0x7F800000u;
    }
    *sum = squares;
    *non_finite = (double)bad;
}

Status cpu_norm2(Backend *backend, DType dtype, const void *grad, int64_t count, double *sums) {
    INVARIANT(dtype == DTYPE_F32);
    double squares[REDUCE_PARTS], bad[REDUCE_PARTS];
#pragma omp parallel for num_threads(backend->num_threads) schedule(static)
    for (int part = 0; part < REDUCE_PARTS; part++)
        norm2_part(grad, part_begin(count, REDUCE_PARTS, part),
                   part_begin(count, REDUCE_PARTS, part + 1), &squares[part], &bad[part]);
    for (int part = 0; part < REDUCE_PARTS; part++) {
        sums[0] += squares[part];
        sums[1] += bad[part];
    }
    return STATUS_OK;
}

static void similarity_row(const float *a, const float *b, int64_t hidden, double sums[2]) {
    double aa = 0, bb = 0, ab = 0;
#pragma omp simd reduction(+ : aa, bb, ab)
    for (int64_t h = 0; h < hidden; h++) {
        aa += (double)a[h] * a[h];
        bb += (double)b[h] * b[h];
        ab += (double)a[h] * b[h];
    }
    const double norm_a = sqrt(aa), norm_b = sqrt(bb);
    if (norm_a != 0 && norm_b != 0) sums[0] += ab / (norm_a * norm_b);
    if (norm_a != norm_b) sums[1] += fabs(norm_a - norm_b) / norm_b;
}

Status cpu_row_similarity(Backend *backend, const RowSimilarityArgs *args) {
    double parts[REDUCE_PARTS][2] = {{0}};
    const int64_t hidden = args->hidden_size;
    const float *a = args->a, *b = args->b;
#pragma omp parallel for num_threads(backend->num_threads) schedule(static)
    for (int part = 0; part < REDUCE_PARTS; part++) {
        const int64_t end = part_begin(args->tokens, REDUCE_PARTS, part + 1);
        for (int64_t t = part_begin(args->tokens, REDUCE_PARTS, part); t < end; t++)
            similarity_row(a + t * hidden, b + t * hidden, hidden, parts[part]);
    }
    for (int part = 0; part < REDUCE_PARTS; part++) {
        args->sums[0] += parts[part][0];
        args->sums[1] += parts[part][1];
    }
    return STATUS_OK;
}
