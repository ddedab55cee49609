// The SwiGLU elementwise step, activation = scale·silu(gate)·up, of the dense and the expert MLP.
//
// gate_up is (R, 2I), gate columns then up columns, as one product leaves it. The scale of row r is
// the gate of an expert: scale[scale_index[r]], or scale[r] without an index; without a scale, 1.
#ifndef CUDA_SWIGLU_CUH
#define CUDA_SWIGLU_CUH

#include "cuda/common.cuh"

typedef struct Swiglu {
    int64_t rows;
    int inner;                  // I
    const void *gate_up;        // (R, 2I)
    const float *scale;         // or NULL
    const int32_t *scale_index; // (R) or NULL
    void *activation;           // (R, I); backward: NULL, or computed again
    const void *dactivation;    // (R, I); activation may be the same memory
    void *dgate_up;             // (R, 2I)
    float *dscale;              // where scale is: = Σ_c dactivation·silu(gate)·up, or NULL
} Swiglu;

Status swiglu_forward(CudaBackend *backend, const Swiglu *s, cudaStream_t stream) NODISCARD;
Status swiglu_backward(CudaBackend *backend, const Swiglu *s, cudaStream_t stream) NODISCARD;

// 1 / (1 + exp(-g)), good to 1e-6 over the range where silu is not g or 0; what would be a denormal
// number on the way is 0.
static __device__ __forceinline__ float sigmoid(float g) {
    float power, quotient;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(power) : "f"(-LOG2_E * g));
    asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(quotient) : "f"(1.0f + power));
    return quotient;
}
static __device__ __forceinline__ float swiglu_of(float gate, float up) {
    return gate * sigmoid(gate) * up;
}
// From d, the gradient of silu(gate)·up, to the gradients of both; returns silu(gate)·up.
// silu'(g) = σ·(1 + g·(1 - σ)).
static __device__ __forceinline__ float swiglu_gradients(float gate, float up, float d,
                                                         float *dgate, float *dup) {
    float s = sigmoid(gate), silu = gate * s;
    *dgate = d * up * (s + silu * (1.0f - s));
    *dup = d * silu;
    return silu * up;
}

#endif
