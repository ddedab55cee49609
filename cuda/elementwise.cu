// a += b, and casts between element types.
#include <cuda_fp16.h>
#include "cuda/common.cuh"

enum { THREADS = 256, PIECES = 4 }; // a thread's pieces of 16 bytes, all in flight

static __device__ __forceinline__ float to_float(__half x) {
    return __half2float(x);
}
template <> __device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}

// --- a += b --------------------------------------------------------------------------------------

template <typename T, int W>
static __global__ void __launch_bounds__(THREADS)
    add_kernel(T *__restrict__ a, const T *__restrict__ b, int64_t count) {
    const int64_t begin = ((int64_t)blockIdx.x * PIECES * THREADS + threadIdx.x) * W;
    Piece<T, W> x[PIECES], y[PIECES];
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const int64_t at = begin + (int64_t)p * THREADS * W;
        if (at >= count) break;
        x[p] = load_piece<T, W>(a + at);
        y[p] = load_piece<T, W>(b + at);
    }
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const int64_t at = begin + (int64_t)p * THREADS * W;
        if (at >= count) break;
#pragma unroll
        for (int i = 0; i < W; i++)
            x[p].v[i] = from_float<T>(to_float(x[p].v[i]) + to_float(y[p].v[i]));
        store_piece<T, W>(a + at, x[p]);
    }
}

template <typename T, int W>
static void launch_add(T *a, const T *b, int64_t count, cudaStream_t stream) {
    if (count == 0) return;
    const int64_t blocks = div_up(count, (int64_t)THREADS * PIECES * W);
    add_kernel<T, W><<<(unsigned)blocks, THREADS, 0, stream>>>(a, b, count);
}

// Whole pieces first, then the few elements behind them.
Status cuda_add(Backend *base, void *a, const void *b, int64_t count) {
    CudaBackend *backend = cuda_of(base);
    backend->current_op = "add";
    DISPATCH_DTYPE(base->compute_dtype, T, {
        constexpr int WIDE = Vec<T>::SIZE;
        const bool wide = vec_ok<T>((const void *)((uintptr_t)a | (uintptr_t)b), 0);
        const int64_t whole = wide ? count / WIDE * WIDE : 0;
        launch_add<T, WIDE>((T *)a, (const T *)b, whole, backend->stream);
        launch_add<T, 1>((T *)a + whole, (const T *)b + whole, count - whole, backend->stream);
    });
    LAUNCH_TRY(backend);
    return STATUS_OK;
}

// --- Casts ---------------------------------------------------------------------------------------

enum { CAST_WIDTH = 8 }; // 16 or 32 bytes on either side

template <typename T> static __device__ __forceinline__ void load_eight(const T *p, float *out) {
    Vec<T> piece;
#pragma unroll
    for (int i = 0; i < CAST_WIDTH; i++) {
        if (i % Vec<T>::SIZE == 0) piece = load_vec(p + i);
        out[i] = to_float(piece.v[i % Vec<T>::SIZE]);
    }
}
template <typename T> static __device__ __forceinline__ void store_eight(T *p, const float *x) {
    Vec<T> piece;
#pragma unroll
    for (int i = 0; i < CAST_WIDTH; i++) {
        piece.v[i % Vec<T>::SIZE] = from_float<T>(x[i]);
        if ((i + 1) % Vec<T>::SIZE == 0) store_vec(p + i + 1 - Vec<T>::SIZE, piece);
    }
}

template <typename To, typename From>
static __global__ void __launch_bounds__(THREADS)
    cast_kernel(To *__restrict__ out, const From *__restrict__ in, int64_t count, bool wide) {
    const int64_t begin = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * CAST_WIDTH;
    if (wide && begin + CAST_WIDTH <= count) {
        float x[CAST_WIDTH];
        load_eight(in + begin, x);
        store_eight(out + begin, x);
        return;
    }
    for (int64_t i = begin; i < begin + CAST_WIDTH && i < count; i++)
        out[i] = from_float<To>(to_float(in[i]));
}

template <typename To, typename From>
static void launch_cast(void *out, const void *in, int64_t count, cudaStream_t stream) {
    const bool wide = (((uintptr_t)out | (uintptr_t)in) & 15) == 0;
    const int64_t blocks = div_up(count, (int64_t)THREADS * CAST_WIDTH);
    cast_kernel<To, From>
        <<<(unsigned)blocks, THREADS, 0, stream>>>((To *)out, (const From *)in, count, wide);
}

template <typename From>
static void cast_from(DType to, void *out, const void *in, int64_t count, cudaStream_t stream) {
    switch (to) {
    case DTYPE_F32:
        launch_cast<float, From>(out, in, count, stream);
        break;
    case DTYPE_BF16:
        launch_cast<bf16, From>(out, in, count, stream);
        break;
    case DTYPE_F16:
        launch_cast<__half, From>(out, in, count, stream);
        break;
    }
}

Status cuda_cast(Backend *base, DType to, void *out, DType from, const void *in, int64_t count) {
    CudaBackend *backend = cuda_of(base);
    backend->current_op = "cast";
    if (count == 0) return STATUS_OK;
    switch (from) {
    case DTYPE_F32:
        cast_from<float>(to, out, in, count, backend->stream);
        break;
    case DTYPE_BF16:
        cast_from<bf16>(to, out, in, count, backend->stream);
        break;
    case DTYPE_F16:
        cast_from<__half>(to, out, in, count, backend->stream);
        break;
    }
    LAUNCH_TRY(backend);
    return STATUS_OK;
}
