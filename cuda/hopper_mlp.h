// The MLP's two products that have SwiGLU between them, each as one kernel: Hopper chips only.
#ifndef CUDA_HOPPER_MLP_H
#define CUDA_HOPPER_MLP_H

#include "cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { HOPPER_GROUPS_MAX = 16 };

// Rows grouped by expert; the dense MLP is one group of all rows.
typedef struct HopperMlp {
    int groups;           // G
    const int32_t *begin; // (G+1) on the host: where each group's rows begin, and R
    int hidden, inner;    // H, I
    // The row's factor of the activation: scale[scale_index[r]]; NULL: 1 and no dscale.
    const float *scale;
    const int32_t *scale_index; // (R)
    const void *weight;         // forward (G, 2I, H), gate rows then up rows; backward (G, H, I)
    const void *in;             // (R, H) x; backward: dout
    void *gate_up;              // (R, 2I) written by forward, read by backward
    void *activation;           // (R, I) = scale·silu(gate)·up
    void *dgate_up;             // (R, 2I)
    float *dscale;              // where scale is: = Σ dactivation·silu(gate)·up
    float *partial;             // (hopper_mlp_partials) with dscale
} HopperMlp;

#ifdef D2M_HAVE_HOPPER
// Whether this backend and these shapes and pointers can use the kernels: bf16, compute capability
// 9.0, H a multiple of 64, I of 8, at most HOPPER_GROUPS_MAX groups, 16-byte aligned rows.
bool hopper_mlp_takes(const CudaBackend *backend, const HopperMlp *mlp);
int64_t hopper_mlp_partials(int64_t rows, int inner);
// gate_up = in · weightᵀ, activation = scale·silu(gate)·up of gate and up as stored.
Status hopper_mlp_forward(CudaBackend *backend, const HopperMlp *mlp) NODISCARD;
// d = in · weight, rounded to bf16, is the gradient of activation: dgate_up, activation and dscale
// as swiglu_backward() (swiglu.cuh) makes them from d.
Status hopper_mlp_backward(CudaBackend *backend, const HopperMlp *mlp) NODISCARD;
#else // a build without code for these chips
static inline bool hopper_mlp_takes(const CudaBackend *, const HopperMlp *) {
    return false;
}
static inline int64_t hopper_mlp_partials(int64_t, int) {
    return 0;
}
static inline Status hopper_mlp_forward(CudaBackend *, const HopperMlp *) {
    return STATUS_INTERNAL;
}
static inline Status hopper_mlp_backward(CudaBackend *, const HopperMlp *) {
    return STATUS_INTERNAL;
}
#endif

#ifdef __cplusplus
}
#endif
#endif
