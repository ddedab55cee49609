// Reductions over whole arrays, in double. A fixed number of blocks leaves a partial sum each;
// one more block adds those in order, so that the result repeats bit for bit.
#include "cuda/common.cuh"

enum { BLOCKS = 1024, THREADS = 256, WARPS = THREADS / 32 };

typedef struct TwoSums {
    double a, b;
} TwoSums;

// Block: adds `mine` over its threads into parts[blockIdx.x].
static __device__ __forceinline__ void leave_part(TwoSums mine, TwoSums *parts) {
    __shared__ double shared[32];
    mine.a = block_sum(mine.a, shared);
    mine.b = block_sum(mine.b, shared);
    if (threadIdx.x == 0) parts[blockIdx.x] = mine;
}

static __global__ void __launch_bounds__(THREADS)
    add_parts_kernel(const TwoSums *__restrict__ parts, double *__restrict__ sums) {
    __shared__ double shared[32];
    TwoSums mine = {0.0, 0.0};
    for (int i = threadIdx.x; i < BLOCKS; i += THREADS) {
        mine.a += parts[i].a;
        mine.b += parts[i].b;
    }
    mine.a = block_sum(mine.a, shared);
    mine.b = block_sum(mine.b, shared);
    if (threadIdx.x > 0) return;
    sums[0] += mine.a;
    sums[1] += mine.b;
}

static Status add_parts(CudaBackend *backend, const TwoSums *parts, double *sums) {
    LAUNCH_TRY(backend);
    add_parts_kernel<<<1, THREADS, 0, backend->stream>>>(parts, sums);
    LAUNCH_TRY(backend);
    return STATUS_OK;
}

static Status take_parts(CudaBackend *backend, TwoSums **parts) {
    Scratch scratch = scratch_open(backend);
    return scratch_take(&scratch, BLOCKS * sizeof **parts, (void **)parts);
}

// --- Squares and non-finite values ---------------------------------------------------------------

static __device__ __forceinline__ void count_value(float x, TwoSums *sums) {
    sums->a += (double)x * x;
    sums->b += (__float_as_uint(x) & 0x7F800000u) == 0x7F800000u ? 1.0 : 0.0;
}

template <typename T, int W>
static __global__ void __launch_bounds__(THREADS)
    norm2_kernel(const T *__restrict__ values, int64_t count, TwoSums *__restrict__ parts) {
    TwoSums sums = {0.0, 0.0};
    const int64_t pieces = count / W, step = (int64_t)BLOCKS * THREADS;
    const int64_t first = (int64_t)blockIdx.x * THREADS + threadIdx.x;
#pragma unroll 4
    for (int64_t p = first; p < pieces; p += step) {
        const Piece<T, W> piece = load_piece<T, W>(values + p * W);
#pragma unroll
        for (int i = 0; i < W; i++) count_value(to_float(piece.v[i]), &sums);
    }
    const int64_t rest = pieces * W + first; // fewer than W elements
    if (rest < count) count_value(to_float(values[rest]), &sums);
    leave_part(sums, parts);
}

size_t cuda_norm2_workspace(const CudaBackend *backend, const int64_t *count) {
    (void)backend;
    (void)count;
    return scratch_bytes(BLOCKS * sizeof(TwoSums));
}

Status cuda_norm2(Backend *base, DType dtype, const void *grad, int64_t count, double *sums) {
    CudaBackend *backend = cuda_of(base);
    backend->current_op = "norm2";
    TwoSums *parts = NULL;
    INVARIANT(dtype != DTYPE_F16);
    TRY(take_parts(backend, &parts));
    DISPATCH_DTYPE(dtype, T, {
        auto kernel = vec_ok<T>(grad, 0) ? norm2_kernel<T, Vec<T>::SIZE> : norm2_kernel<T, 1>;
        kernel<<<BLOCKS, THREADS, 0, backend->stream>>>((const T *)grad, count, parts);
    });
    return add_parts(backend, parts, sums);
}

// --- Similarity of rows --------------------------------------------------------------------------

// A warp per row.
template <typename T, int W>
static __global__ void __launch_bounds__(THREADS)
    similarity_kernel(int64_t tokens, int hidden, const T *__restrict__ a, const T *__restrict__ b,
                      TwoSums *__restrict__ parts) {
    const int lane = threadIdx.x % 32;
    TwoSums sums = {0.0, 0.0};
    for (int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32; row < tokens;
         row += (int64_t)BLOCKS * WARPS) {
        double aa = 0.0, bb = 0.0, ab = 0.0;
#pragma unroll 2
        for (int h = lane * W; h < hidden; h += 32 * W) {
            const Piece<T, W> x = load_piece<T, W>(a + row * hidden + h);
            const Piece<T, W> y = load_piece<T, W>(b + row * hidden + h);
#pragma unroll
            for (int i = 0; i < W; i++) {
                const double u = to_float(x.v[i]), v = to_float(y.v[i]);
                aa += u * u;
                bb += v * v;
                ab += u * v;
            }
        }
        const double norm_a = sqrt(warp_sum(aa)), norm_b = sqrt(warp_sum(bb));
        ab = warp_sum(ab);
        if (lane > 0) continue;
        if (norm_a != 0.0 && norm_b != 0.0) sums.a += ab / (norm_a * norm_b);
        if (norm_a != norm_b) sums.b += fabs(norm_a - norm_b) / norm_b;
    }
    leave_part(sums, parts);
}

size_t cuda_row_similarity_workspace(const CudaBackend *backend, const RowSimilarityArgs *args) {
    (void)backend;
    (void)args;
    return scratch_bytes(BLOCKS * sizeof(TwoSums));
}

Status cuda_row_similarity(Backend *base, const RowSimilarityArgs *args) {
    CudaBackend *backend = cuda_of(base);
    backend->current_op = "row_similarity";
    TwoSums *parts = NULL;
    TRY(take_parts(backend, &parts));
    const uintptr_t bits = (uintptr_t)args->a | (uintptr_t)args->b;
    DISPATCH_DTYPE(base->compute_dtype, T, {
        auto kernel = vec_ok<T>((const void *)bits, args->hidden_size)
                          ? similarity_kernel<T, Vec<T>::SIZE>
                          : similarity_kernel<T, 1>;
        kernel<<<BLOCKS, THREADS, 0, backend->stream>>>(
            args->tokens, args->hidden_size, (const T *)args->a, (const T *)args->b, parts);
    });
    return add_parts(backend, parts, args->sums);
}
