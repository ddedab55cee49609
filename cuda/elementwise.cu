// a += b, sums in fp32, and casts between element types.
#include <cuda_fp16.h>
#include "cuda/common.cuh"

enum { THREADS = 256, PIECES = 4 }; // a thread's pieces of 16 bytes, all in flight

static __device__ __forceinline__ float to_float(__half x) {
    return __half2float(x);
}
template <> __device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}

// W elements of T, in accesses of 16 bytes where there are more than one.
template <typename T, int W> struct Elements { T v[W]; };
template <typename T, int W>
static __device__ __forceinline__ Elements<T, W> load_elements(const T *p) {
    constexpr int STEP = W == 1 ? 1 : Vec<T>::SIZE;
    Elements<T, W> r;
#pragma unroll
    for (int i = 0; i < W; i += STEP) {
        const Piece<T, STEP> piece = load_piece<T, STEP>(p + i);
#pragma unroll
        for (int j = 0; j < STEP; j++) r.v[i + j] = piece.v[j];
    }
    return r;
}
template <typename T, int W>
static __device__ __forceinline__ void store_elements(T *p, const Elements<T, W> &r) {
    constexpr int STEP = W == 1 ? 1 : Vec<T>::SIZE;
#pragma unroll
    for (int i = 0; i < W; i += STEP) {
        Piece<T, STEP> piece;
#pragma unroll
        for (int j = 0; j < STEP; j++) piece.v[j] = r.v[i + j];
        store_piece<T, STEP>(p + i, piece);
    }
}

// --- a += b --------------------------------------------------------------------------------------

// b in pieces of 16 bytes or one by one; a, of the same type or wider, in as many elements.
template <typename A, typename B, int W>
static __global__ void __launch_bounds__(THREADS)
    add_kernel(A *__restrict__ a, const B *__restrict__ b, int64_t count) {
    const int64_t begin = ((int64_t)blockIdx.x * PIECES * THREADS + threadIdx.x) * W;
    Elements<A, W> x[PIECES];
    Piece<B, W> y[PIECES];
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const int64_t at = begin + (int64_t)p * THREADS * W;
        if (at >= count) break;
        x[p] = load_elements<A, W>(a + at);
        y[p] = load_piece<B, W>(b + at);
    }
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const int64_t at = begin + (int64_t)p * THREADS * W;
        if (at >= count) break;
#pragma unroll
        for (int i = 0; i < W; i++)
            x[p].v[i] = from_float<A>(to_float(x[p].v[i]) + to_float(y[p].v[i]));
        store_elements<A, W>(a + at, x[p]);
    }
}

template <typename A, typename B, int W>
static void launch_add(A *a, const B *b, int64_t count, cudaStream_t stream) {
    if (count == 0) return;
    const int64_t blocks = div_up(count, (int64_t)THREADS * PIECES * W);
    add_kernel<A, B, W><<<(unsigned)blocks, THREADS, 0, stream>>>(a, b, count);
}

// Whole pieces first, then the few elements behind them.
template <typename A, typename B>
static void add_all(A *a, const B *b, int64_t count, cudaStream_t stream) {
    constexpr int WIDE = Vec<B>::SIZE;
    const bool wide = vec_ok<B>((const void *)((uintptr_t)a | (uintptr_t)b), 0);
    const int64_t whole = wide ? count / WIDE * WIDE : 0;
    launch_add<A, B, WIDE>(a, b, whole, stream);
    launch_add<A, B, 1>(a + whole, b + whole, count - whole, stream);
}

Status cuda_accumulate(Backend *base, float *sum, DType dtype, const void *values, int64_t count) {
    CudaBackend *backend = cuda_of(base);
    backend->current_op = "accumulate";
    DISPATCH_DTYPE(dtype, T, add_all(sum, (const T *)values, count, backend->stream));
    LAUNCH_TRY(backend);
    return STATUS_OK;
}

Status cuda_add(Backend *base, void *a, const void *b, int64_t count) {
    CudaBackend *backend = cuda_of(base);
    backend->current_op = "add";
    DISPATCH_DTYPE(base->compute_dtype, T, add_all((T *)a, (const T *)b, count, backend->stream));
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
