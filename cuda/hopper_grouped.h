// Products over rows that are grouped by expert, all groups as one kernel: Hopper chips only.
#ifndef CUDA_HOPPER_GROUPED_H
#define CUDA_HOPPER_GROUPED_H

#include "cuda/hopper_mlp.h"

#ifdef __cplusplus
extern "C" {
#endif

// out_g = in_g · weight_g over the rows of each group g.
typedef struct HopperRows {
    int groups;           // G <= HOPPER_GROUPS_MAX
    const int32_t *begin; // (G+1) on the host: where each group's rows begin, and R
    int inner, columns;   // K, N
    bool inner_last;      // weight is (G, N, K), else (G, K, N)
    const void *in;       // (R, K)
    const void *weight;
    void *out; // (R, N)
} HopperRows;

// grad_g = or += left_gᵀ · right_g. Groups without rows are assigned zeros.
typedef struct HopperGradient {
    int groups;
    const int32_t *begin;
    int m, n;         // M, N
    const void *left; // (R, M), consecutive rows `left_stride` apart
    int64_t left_stride;
    const void *right; // (R, N)
    bool assign;
    float *grad; // (G, M, N)
} HopperGradient;

#ifdef D2M_HAVE_HOPPER
// Whether the backend (bf16, compute capability 9.0) and these shapes and pointers can use the
// kernel: 16-byte aligned rows; and whether its tiles then fill the chip nearly to the last round,
// which a kernel that splits sums does not depend on.
bool hopper_rows_takes(const CudaBackend *backend, const HopperRows *product);
bool hopper_rows_fills(const CudaBackend *backend, const HopperRows *product);
Status hopper_rows(CudaBackend *backend, const HopperRows *product) NODISCARD;
bool hopper_gradient_takes(const CudaBackend *backend, const HopperGradient *gradient);
bool hopper_gradient_fills(const CudaBackend *backend, const HopperGradient *gradient);
Status hopper_gradient(CudaBackend *backend, const HopperGradient *gradient) NODISCARD;
#else // a build without code for these chips
static inline bool hopper_rows_takes(const CudaBackend *, const HopperRows *) {
    return false;
}
static inline bool hopper_rows_fills(const CudaBackend *, const HopperRows *) {
    return false;
}
static inline Status hopper_rows(CudaBackend *, const HopperRows *) {
    return STATUS_INTERNAL;
}
static inline bool hopper_gradient_takes(const CudaBackend *, const HopperGradient *) {
    return false;
}
static inline bool hopper_gradient_fills(const CudaBackend *, const HopperGradient *) {
    return false;
}
static inline Status hopper_gradient(CudaBackend *, const HopperGradient *) {
    return STATUS_INTERNAL;
}
#endif

#ifdef __cplusplus
}
#endif
#endif
