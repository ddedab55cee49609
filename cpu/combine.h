// Elements of several ranks become one, in an order that depends on nothing but the ranks.
#ifndef CPU_COMBINE_H
#define CPU_COMBINE_H

#include "model/communicator.h"

static inline size_t comm_type_bytes(CommType type) {
    return type == COMM_BYTE ? 1 : type == COMM_BF16 ? 2 : type == COMM_F32 ? 4 : 8;
}

enum { COMBINE_SCRATCH_BYTES = 4 }; // of scratch per element and rank, for BF16

// parts[r] holds `count` values of rank r; out = the reduction over all ranks. The parts are used
// up; `out` may be one of them. `scratch` (COMBINE_SCRATCH_BYTES * count * world) is for BF16,
// which is combined in fp32 and rounded once. In a minimum or maximum a NaN wins.
void combine(void **parts, int world, int64_t count, CommType type, CommReduce reduce, bool tree,
             void *scratch, void *out);

#endif
