// Reductions over ranks.
//
// In rank order: ((0 + 1) + 2) + 3. As a tree: (0 + 1) + (2 + 3), neighbours first; a rank without
// a neighbour passes up as it is. Either way the values meet two at a time in the left one's place,
// so each type needs one loop per operation.
#include "cpu/combine.h"

#include <string.h>
#include "base/dtype.h"

// a = b where `b` is the more extreme, or is no number.
#define FOLD(name, type)                                                                           \
    static void name(type *restrict a, const type *restrict b, int64_t count, CommReduce reduce) { \
        if (reduce == COMM_SUM)                                                                    \
            for (int64_t i = 0; i < count; i++) a[i] += b[i];                                      \
        else if (reduce == COMM_MIN)                                                               \
            for (int64_t i = 0; i < count; i++) a[i] = b[i] < a[i] || b[i] != b[i] ? b[i] : a[i];  \
        else                                                                                       \
            for (int64_t i = 0; i < count; i++) a[i] = b[i] > a[i] || b[i] != b[i] ? b[i] : a[i];  \
    }
FOLD(fold_f32, float)
FOLD(fold_f64, double)
FOLD(fold_i64, int64_t)
FOLD(fold_byte, uint8_t)

static void fold(void *a, const void *b, int64_t count, CommType type, CommReduce reduce) {
    switch (type) {
    case COMM_F32:
    case COMM_BF16: // widened before
        fold_f32(a, b, count, reduce);
        break;
    case COMM_F64:
        fold_f64(a, b, count, reduce);
        break;
    case COMM_I64:
        fold_i64(a, b, count, reduce);
        break;
    case COMM_BYTE:
        fold_byte(a, b, count, reduce);
        break;
    }
}

void combine(void **parts, int world, int64_t count, CommType type, CommReduce reduce, bool tree,
             void *scratch, void *out) {
    for (int r = 0; r < world && type == COMM_BF16; r++) {
        float *wide = (float *)scratch + r * count;
        dtype_to_f32(DTYPE_BF16, parts[r], wide, (size_t)count);
        parts[r] = wide;
    }
    if (tree) {
        for (int step = 1; step < world; step *= 2)
            for (int r = 0; r + step < world; r += 2 * step)
                fold(parts[r], parts[r + step], count, type, reduce);
    } else {
        for (int r = 1; r < world; r++) fold(parts[0], parts[r], count, type, reduce);
    }
    if (type == COMM_BF16)
        dtype_from_f32(DTYPE_BF16, parts[0], out, (size_t)count);
    else if (out != parts[0])
        memcpy(out, parts[0], (size_t)count * comm_type_bytes(type));
}
