// Device helpers of every kernel family: conversions, 16-byte vectors, block reductions.
#ifndef CUDA_COMMON_CUH
#define CUDA_COMMON_CUH

#include <cuda_bf16.h>
#include <stdint.h>
#include "cuda/cuda.h"

typedef __nv_bfloat16 bf16;

static __device__ __forceinline__ float to_float(float x) {
    return x;
}
static __device__ __forceinline__ float to_float(bf16 x) {
    return __bfloat162float(x);
}
template <typename T> static __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return __float2bfloat16_rn(x);
}

// From Hopper on a kernel can be launched before the one ahead of it in the stream has ended, where
// its launch allows that: it then waits for the end and for all that was written.
// grid_dependents_start() lets it be launched as soon as every block has come there.
static __device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
}
static __device__ __forceinline__ void grid_dependents_start() {
#if __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// 16 bytes of T: 4 floats or 8 bf16. Pointers must be 16-byte aligned.
template <typename T> struct alignas(16) Vec {
    static constexpr int SIZE = 16 / sizeof(T);
    T v[SIZE];
};
template <typename T> static __device__ __forceinline__ Vec<T> load_vec(const T *p) {
    Vec<T> r;
    *reinterpret_cast<int4 *>(&r) = *reinterpret_cast<const int4 *>(p);
    return r;
}
template <typename T> static __device__ __forceinline__ void store_vec(T *p, const Vec<T> &r) {
    *reinterpret_cast<int4 *>(p) = *reinterpret_cast<const int4 *>(&r);
}

// W elements of T: Vec<T>::SIZE of them in one 16-byte access, or one by one where vec_ok() is
// false.
template <typename T, int W> struct alignas(W == 1 ? sizeof(T) : 16) Piece {
    static_assert(W == 1 || W == Vec<T>::SIZE, "a scalar or 16 bytes");
    T v[W];
};
template <typename T, int W> static __device__ __forceinline__ Piece<T, W> load_piece(const T *p) {
    Piece<T, W> r;
    if constexpr (W == 1)
        r.v[0] = *p;
    else
        *reinterpret_cast<int4 *>(&r) = *reinterpret_cast<const int4 *>(p);
    return r;
}
template <typename T, int W>
static __device__ __forceinline__ void store_piece(T *p, const Piece<T, W> &r) {
    if constexpr (W == 1)
        *p = r.v[0];
    else
        *reinterpret_cast<int4 *>(p) = *reinterpret_cast<const int4 *>(&r);
}

// Hides from the compiler that a piece keeps its value, so that it converts to fp32 again instead
// of holding the converted values in twice the registers.
template <typename T, int W> static __device__ __forceinline__ void forget(Piece<T, W> *piece) {
    if constexpr (W > 1) {
        int4 *words = reinterpret_cast<int4 *>(piece);
        asm volatile("" : "+r"(words->x), "+r"(words->y), "+r"(words->z), "+r"(words->w));
    }
}

// True when rows of `width` elements at `p` can be accessed as vectors.
template <typename T> static inline bool vec_ok(const void *p, int64_t width) {
    return ((uintptr_t)p & 15) == 0 && width % Vec<T>::SIZE == 0;
}

static constexpr float LOG2_E = 1.4426950408889634f;

// 2^x to about 2 units in the last place; 0 for -inf, NaN for NaN.
static __device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ float warp_sum(float x) {
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}
static __device__ __forceinline__ double warp_sum(double x) {
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}
static __device__ __forceinline__ float warp_max(float x) {
    for (int offset = 16; offset > 0; offset >>= 1)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

// Sum over a block of up to 1024 threads (a multiple of 32), to every thread, in a fixed order.
// Every thread of the block must call it; `shared` holds 32 values.
template <typename F> static __device__ __forceinline__ F block_sum(F x, F *shared) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
    x = warp_sum(x);
    if (warps == 1) return x;
    __syncthreads();
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    x = lane < warps ? shared[lane] : F(0);
    return warp_sum(x);
}

static __device__ __forceinline__ float block_max(float x, float *shared) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
    x = warp_max(x);
    if (warps == 1) return x;
    __syncthreads();
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return warp_max(shared[lane < warps ? lane : 0]);
}

// Keeps the bad token id of the lowest position: the word grows as the position falls.
static __device__ __forceinline__ void note_bad_id(uint64_t *word, int64_t position, int32_t id) {
    const uint64_t value = (uint64_t)(INT32_MAX - position) << 32 | (uint32_t)id;
    atomicMax((unsigned long long *)word, (unsigned long long)value | 1ull << 63);
}

static inline int64_t div_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Launches KERNEL on the compute stream while the kernel ahead of it ends, for which KERNEL waits
// (grid_dependency_wait) before it touches memory. Where the device does not run code that was made
// to wait, but older PTX, the launch itself waits as any does.
template <auto KERNEL, typename... Args>
static Status launch_early(CudaBackend *backend, dim3 blocks, dim3 threads, Args... args) {
    static int ptx; // version of the compute capability; the same for every device that runs it
    if (ptx == 0) {
        cudaFuncAttributes attributes;
        CUDA_TRY(backend, cudaFuncGetAttributes(&attributes, KERNEL));
        ptx = attributes.ptxVersion;
    }
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks;
    config.blockDim = threads;
    config.stream = backend->stream;
    config.attrs = &early;
    config.numAttrs = ptx >= 90 ? 1 : 0;
    CUDA_TRY(backend, cudaLaunchKernelEx(&config, KERNEL, args...));
    return STATUS_OK;
}

// Calls body with T = float or bf16 by dtype.
#define DISPATCH_DTYPE(dtype, T, ...)                                                              \
    do {                                                                                           \
        if ((dtype) == DTYPE_F32) {                                                                \
            using T = float;                                                                       \
            __VA_ARGS__;                                                                           \
        } else {                                                                                   \
            using T = bf16;                                                                        \
            __VA_ARGS__;                                                                           \
        }                                                                                          \
    } while (0)

#endif
