// Rows between token and expert order.
#include "cpu/rows.h"
#include <string.h>
#include "cpu/cpu.h"

void gather_rows(const GatherRowsArgs *args, int64_t begin, int64_t end) {
    const size_t bytes = (size_t)args->row_bytes;
    const char *in = args->in;
    char *out = args->out;
    for (int64_t row = begin; row < end; row++) {
        const size_t from = (size_t)(args->index[row] / args->divisor);
        memcpy(out + (size_t)row * bytes, in + from * bytes, bytes);
    }
}

void combine_token(const CombineRowsArgs *args, int64_t t) {
    const int64_t hidden = args->hidden_size;
    const int32_t *row_of = args->row_of_slot + t * args->top_k;
    const float *rows = args->rows;
    float *to = (float *)args->out + t * hidden;
    memcpy(to, rows + row_of[0] * hidden, (size_t)hidden * sizeof(float));
    for (int j = 1; j < args->top_k; j++) {
        const float *from = rows + row_of[j] * hidden;
#pragma omp simd
        for (int64_t h = 0; h < hidden; h++) to[h] += from[h];
    }
}

Status cpu_gather_rows(Backend *backend, const GatherRowsArgs *args) {
    const int parts = backend->num_threads;
    INVARIANT(args->row_bytes % 4 == 0 && args->divisor >= 1);
#pragma omp parallel for num_threads(parts) schedule(static)
    for (int p = 0; p < parts; p++)
        gather_rows(args, part_begin(args->rows, parts, p), part_begin(args->rows, parts, p + 1));
    return STATUS_OK;
}

Status cpu_combine_rows(Backend *backend, const CombineRowsArgs *args) {
#pragma omp parallel for num_threads(backend->num_threads) schedule(static)
    for (int64_t t = 0; t < args->tokens; t++) combine_token(args, t);
    return STATUS_OK;
}
