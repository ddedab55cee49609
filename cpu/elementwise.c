// Sums, and casts between element types.
#include <string.h>
#include "cpu/cpu.h"

Status cpu_add(Backend *backend, void *a, const void *b, int64_t count) {
    float *to = a;
    const float *from = b;
#pragma omp parallel for simd num_threads(backend->num_threads) schedule(static)
    for (int64_t i = 0; i < count; i++) to[i] += from[i];
    return STATUS_OK;
}

Status cpu_accumulate(Backend *backend, float *sum, DType dtype, const void *values,
                      int64_t count) {
    INVARIANT(dtype == DTYPE_F32);
    return cpu_add(backend, sum, values, count);
}

enum { CAST_BLOCK = 4096 };

// Between two 16-bit types a block goes through fp32, which holds both exactly.
static void cast_block(DType to, void *out, DType from, const void *in, size_t count) {
    float block[CAST_BLOCK];
    if (to == from) {
        memcpy(out, in, count * dtype_bytes(from));
    } else if (to == DTYPE_F32) {
        dtype_to_f32(from, in, out, count);
    } else if (from == DTYPE_F32) {
        dtype_from_f32(to, in, out, count);
    } else {
        dtype_to_f32(from, in, block, count);
        dtype_from_f32(to, block, out, count);
    }
}

Status cpu_cast(Backend *backend, DType to, void *out, DType from, const void *in, int64_t count) {
    const size_t to_size = dtype_bytes(to), from_size = dtype_bytes(from);
    const int64_t blocks = divide_up(count, CAST_BLOCK);
#pragma omp parallel for num_threads(backend->num_threads) schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        const size_t begin = (size_t)b * CAST_BLOCK;
        cast_block(to, (char *)out + begin * to_size, from, (const char *)in + begin * from_size,
                   (size_t)min_i64(CAST_BLOCK, count - (int64_t)begin));
    }
    return STATUS_OK;
}
