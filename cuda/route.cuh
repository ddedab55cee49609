// What the router's forward, backward and loss kernels share.
//
// A token's experts lie in the lanes of a group of a warp: 8 lanes for up to 8 experts (four tokens
// per warp), else the whole warp with up to 8 experts per lane. Lane l holds experts l, l + LANES,
// ... Group sums are butterflies, so every lane gets the same bits.
#ifndef CUDA_ROUTE_CUH
#define CUDA_ROUTE_CUH

#include "cuda/common.cuh"

enum {
    ROUTE_THREADS = 256,
    ROUTE_CHUNK = 8, // experts whose logits or gradients a thread holds at once
};

template <int LANES, typename F> static __device__ __forceinline__ F group_sum(F x) {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset >>= 1)
        x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}
template <int LANES> static __device__ __forceinline__ float group_max(float x) {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset >>= 1)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

// Calls body with LANES and PER_LANE for `experts`.
#define DISPATCH_GROUP(experts, LANES, PER_LANE, ...)                                              \
    do {                                                                                           \
        if ((experts) <= 8) {                                                                      \
            constexpr int LANES = 8, PER_LANE = 1;                                                 \
            __VA_ARGS__;                                                                           \
        } else if ((experts) <= 32) {                                                              \
            constexpr int LANES = 32, PER_LANE = 1;                                                \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            constexpr int LANES = 32, PER_LANE = CUDA_MAX_EXPERTS / 32;                            \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

// The scratch of both directions. `logits` holds their gradient in backward.
typedef struct RouteScratch {
    float *logits;   // (T, N)
    int32_t *counts; // (N, token blocks) forward: rows of each expert in each block of tokens
    float *partial;  // (parts, N, H) backward: the weight's gradient by parts of the tokens
    int64_t parts;   // that fit
} RouteScratch;

// Which part of [0, count) part `index` of `parts` nearly equal ones begins at.
static __host__ __device__ __forceinline__ int64_t part_begin(int64_t count, int64_t parts,
                                                              int64_t index) {
    int64_t rest = count % parts;
    return count / parts * index + (index < rest ? index : rest);
}

Status route_scratch(CudaBackend *backend, const RouteArgs *args, RouteScratch *out) NODISCARD;

#endif
