// What the router's forward, backward and loss kernels share.
//
// A token's experts lie in the lanes of a group of a warp, or all in one thread: lane l of LANES
// holds experts l, l + LANES, ..., PER_LANE of them. Group sums are butterflies, so every lane gets
// the same bits.
#ifndef CUDA_ROUTE_CUH
#define CUDA_ROUTE_CUH

#include <type_traits>
#include "cuda/common.cuh"

enum {
    ROUTE_THREADS = 256,
    ROUTE_CHUNK = 8, // experts whose logits or gradients a thread holds at once
    ROUTE_FEW = 6,   // experts of the default recipe: kernels that leave out the other two
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

// W elements of T as they lie in memory, to be loaded a step before they are used: the compiler
// would carry the members of a Piece<bf16> from one step of a loop to the next in a register each.
template <typename T, int W> using Packed = std::conditional_t<W == 1, T, int4>;
template <typename T, int W>
static __device__ __forceinline__ Packed<T, W> load_packed(const T *p) {
    return *reinterpret_cast<const Packed<T, W> *>(p);
}
// The same as floats.
template <typename T, int W>
static __device__ __forceinline__ void unpack(const Packed<T, W> &from, float to[W]) {
    if constexpr (W == 1) {
        to[0] = to_float(from);
    } else {
        const unsigned words[4] = {(unsigned)from.x, (unsigned)from.y, (unsigned)from.z,
                                   (unsigned)from.w};
#pragma unroll
        for (int i = 0; i < W; i++) {
            if constexpr (sizeof(T) == 4) // else a bf16 is the upper half of the float's bits
                to[i] = __uint_as_float(words[i]);
            else
                to[i] = __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
        }
    }
}

// Calls body with the PER_LANE that a whole warp needs for `experts`.
#define DISPATCH_PER_LANE(experts, PER_LANE, ...)                                                  \
    do {                                                                                           \
        if ((experts) <= 32) {                                                                     \
            constexpr int PER_LANE = 1;                                                            \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            constexpr int PER_LANE = CUDA_MAX_EXPERTS / 32;                                        \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

// The scratch of both directions. `logits` holds their gradient in backward.
typedef struct RouteScratch {
    float *logits;   // (T, N) with more than ROUTE_CHUNK experts, else nothing
    int32_t *counts; // (token blocks, N) forward: rows of each expert in each block of tokens
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
