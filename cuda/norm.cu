// Residual addition and RMSNorm: one pass over memory, a row lives in registers.
//
//   out[h] = x_out[h] · r · w[h],  r = 1 / sqrt(mean(x_out²) + ε)
//   with g[h] = dout[h]·w[h]:  dx[h] += r·(g[h] - n[h]·mean(g·n)),  n = x_out·r
//   grad_weight[h] += Σ_t dout·n
//
// A thread holds 32 elements of a row at most, so a row has 32 to 256 threads; several short rows
// share a block. Row statistics are of the values as stored (rounded to bf16), which is what
// backward sees. In backward each row of threads walks over many rows of the matrix and keeps its
// share of the weight's gradient in registers; the shares of all blocks are then added in order.
#include "cuda/common.cuh"

enum {
    ELEMENTS = 32, // of a row, per thread
    THREADS = 256, // of a block, at most
    SHORT_BLOCK = 128,
    BLOCKS_PER_SM = 4,
    MAX_PARTS = 1024, // blocks of backward, at most
};

typedef struct RowShape {
    int threads; // per row, a multiple of 32
    int rows;    // per block
} RowShape;

static RowShape row_shape(int width) {
    RowShape shape;
    shape.threads = (int)div_up(div_up(width, ELEMENTS), 32) * 32;
    shape.rows = shape.threads == 32 ? SHORT_BLOCK / 32 : 1;
    return shape;
}

static Status check_width(const RmsNormArgs *args) {
    if (args->hidden_size > CUDA_NORM_WIDTH_MAX)
        FAIL(STATUS_USAGE, "hidden size %d: RMSNorm on a GPU takes at most %d", args->hidden_size,
             CUDA_NORM_WIDTH_MAX);
    return STATUS_OK;
}

// Sum over the threads of one row. Rows of one warp share a block, longer rows have it alone.
static __device__ __forceinline__ float row_sum(float x, float *shared) {
    return blockDim.x == 32 ? warp_sum(x) : block_sum(x, shared);
}

// --- Forward -------------------------------------------------------------------------------------

template <typename T> struct ForwardRows {
    const T *x, *y, *weight;
    T *x_out, *out;
    float *inv_rms;
    int64_t tokens;
    int hidden;
    float epsilon;
};

template <typename T, int W>
static __global__ void __launch_bounds__(THREADS) forward_kernel(ForwardRows<T> a) {
    constexpr int PIECES = ELEMENTS / W;
    __shared__ float shared[32];
    const int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= a.tokens) return; // whole warps, and only where rows are warps
    Piece<T, W> x[PIECES], y[PIECES];
    const int64_t at = row * a.hidden;
    const int step = blockDim.x * W, begin = threadIdx.x * W;
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const int h = begin + p * step;
        if (h >= a.hidden) break;
        x[p] = load_piece<T, W>(a.x + at + h);
        if (a.y) y[p] = load_piece<T, W>(a.y + at + h);
    }
    float squares = 0.0f;
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const int h = begin + p * step;
        if (h >= a.hidden) break;
#pragma unroll
        for (int i = 0; i < W; i++) {
            if (a.y) x[p].v[i] = from_float<T>(to_float(x[p].v[i]) + to_float(y[p].v[i]));
            squares += to_float(x[p].v[i]) * to_float(x[p].v[i]);
        }
        if (a.y || a.x_out != a.x) store_piece<T, W>(a.x_out + at + h, x[p]);
    }
    const float inverse = rsqrtf(row_sum(squares, shared) / (float)a.hidden + a.epsilon);
    if (threadIdx.x == 0) a.inv_rms[row] = inverse;
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const int h = begin + p * step;
        if (h >= a.hidden) break;
        const Piece<T, W> w = load_piece<T, W>(a.weight + h);
#pragma unroll
        for (int i = 0; i < W; i++)
            x[p].v[i] = from_float<T>(to_float(x[p].v[i]) * inverse * to_float(w.v[i]));
        store_piece<T, W>(a.out + at + h, x[p]);
    }
}

Status cuda_rmsnorm_forward(Backend *base, const RmsNormArgs *args) {
    CudaBackend *backend = cuda_of(base);
    backend->current_op = "rmsnorm_forward";
    TRY(check_width(args));
    if (args->tokens == 0) return STATUS_OK;
    const RowShape shape = row_shape(args->hidden_size);
    const uintptr_t bits = (uintptr_t)args->x | (uintptr_t)args->y | (uintptr_t)args->weight |
                           (uintptr_t)args->x_out | (uintptr_t)args->out;
    DISPATCH_DTYPE(base->compute_dtype, T, {
        const ForwardRows<T> rows = {
            (const T *)args->x, (const T *)args->y, (const T *)args->weight,
            (T *)args->x_out,   (T *)args->out,     args->inv_rms,
            args->tokens,       args->hidden_size,  args->epsilon};
        auto kernel = vec_ok<T>((const void *)bits, args->hidden_size)
                          ? forward_kernel<T, Vec<T>::SIZE>
                          : forward_kernel<T, 1>;
        kernel<<<(unsigned)div_up(args->tokens, shape.rows),
                 dim3((unsigned)shape.threads, (unsigned)shape.rows), 0, backend->stream>>>(rows);
    });
    LAUNCH_TRY(backend);
    return STATUS_OK;
}

// --- Backward ------------------------------------------------------------------------------------

template <typename T> struct BackwardRows {
    const T *x, *weight, *dout;
    T *dx;
    const float *inv_rms;
    float *parts; // (gridDim.x, H)
    int64_t tokens;
    int hidden;
};

// One row: dx, and its share of the weight's gradient into `sums`.
template <typename T, int W>
static __device__ __forceinline__ void backward_row(const BackwardRows<T> &a, int64_t row,
                                                    float *shared, float *sums) {
    constexpr int PIECES = ELEMENTS / W;
    Piece<T, W> x[PIECES], d[PIECES], dx[PIECES];
    const int64_t at = row * a.hidden;
    const int step = blockDim.x * W, begin = threadIdx.x * W;
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const int h = begin + p * step;
        if (h >= a.hidden) break;
        x[p] = load_piece<T, W>(a.x + at + h);
        d[p] = load_piece<T, W>(a.dout + at + h);
        dx[p] = load_piece<T, W>(a.dx + at + h);
    }
    const float inverse = a.inv_rms[row];
    float dot = 0.0f;
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const int h = begin + p * step;
        if (h >= a.hidden) break;
        const Piece<T, W> w = load_piece<T, W>(a.weight + h);
#pragma unroll
        for (int i = 0; i < W; i++) {
            const float product = to_float(d[p].v[i]) * (to_float(x[p].v[i]) * inverse);
            sums[p * W + i] += product;
            dot += product * to_float(w.v[i]);
        }
    }
    const float mean = row_sum(dot, shared) / (float)a.hidden;
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const int h = begin + p * step;
        if (h >= a.hidden) break;
        forget(&x[p]);
        forget(&d[p]);
        const Piece<T, W> w = load_piece<T, W>(a.weight + h);
#pragma unroll
        for (int i = 0; i < W; i++) {
            const float g = to_float(d[p].v[i]) * to_float(w.v[i]);
            const float n = to_float(x[p].v[i]) * inverse;
            dx[p].v[i] = from_float<T>(to_float(dx[p].v[i]) + inverse * (g - n * mean));
        }
        store_piece<T, W>(a.dx + at + h, dx[p]);
    }
}

// Only the variant that training uses is held to half of the registers; it needs no more.
template <typename T, int W> constexpr int MIN_BLOCKS = sizeof(T) == 2 && W > 1 ? 2 : 1;

// Dynamic shared memory: (rows per block, H) when there are several.
template <typename T, int W>
static __global__ void __launch_bounds__(THREADS, MIN_BLOCKS<T, W>)
    backward_kernel(BackwardRows<T> a) {
    constexpr int PIECES = ELEMENTS / W;
    __shared__ float shared[32];
    extern __shared__ float all_sums[];
    float sums[ELEMENTS] = {};
    const int64_t rows = (int64_t)gridDim.x * blockDim.y;
    grid_dependents_start(); // when all blocks run, so the next kernel takes nobody's place
    for (int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y; row < a.tokens; row += rows)
        backward_row<T, W>(a, row, shared, sums);
    float *part = a.parts + (int64_t)blockIdx.x * a.hidden;
    float *mine = blockDim.y == 1 ? part : all_sums + threadIdx.y * a.hidden;
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const int h = ((int)threadIdx.x + p * (int)blockDim.x) * W;
        if (h >= a.hidden) break;
#pragma unroll
        for (int i = 0; i < W; i++) mine[h + i] = sums[p * W + i];
    }
    if (blockDim.y == 1) return;
    __syncthreads();
    for (int h = threadIdx.y * blockDim.x + threadIdx.x; h < a.hidden;
         h += blockDim.x * blockDim.y) {
        float sum = 0.0f;
        for (unsigned r = 0; r < blockDim.y; r++) sum += all_sums[r * a.hidden + h];
        part[h] = sum;
    }
}

static int64_t backward_blocks(const CudaBackend *backend, const RmsNormArgs *args) {
    const int64_t all = div_up(args->tokens, row_shape(args->hidden_size).rows);
    int64_t most = (int64_t)backend->num_sms * BLOCKS_PER_SM;
    if (most > MAX_PARTS) most = MAX_PARTS;
    return all < most ? all : most;
}

size_t cuda_rmsnorm_workspace(const CudaBackend *backend, const RmsNormArgs *args) {
    return scratch_bytes((size_t)backward_blocks(backend, args) * (size_t)args->hidden_size *
                         sizeof(float));
}

Status cuda_rmsnorm_backward(Backend *base, const RmsNormArgs *args) {
    CudaBackend *backend = cuda_of(base);
    backend->current_op = "rmsnorm_backward";
    TRY(check_width(args));
    if (args->tokens == 0) return STATUS_OK;
    const RowShape shape = row_shape(args->hidden_size);
    const int64_t blocks = backward_blocks(backend, args), hidden = args->hidden_size;
    const uintptr_t bits = (uintptr_t)args->x_out | (uintptr_t)args->weight |
                           (uintptr_t)args->dout | (uintptr_t)args->dx;
    const size_t shared = shape.rows > 1 ? (size_t)shape.rows * (size_t)hidden * sizeof(float) : 0;
    Scratch scratch = scratch_open(backend);
    float *parts = NULL;
    TRY(scratch_take(&scratch, (size_t)(blocks * hidden) * sizeof(float), (void **)&parts));
    DISPATCH_DTYPE(base->compute_dtype, T, {
        const BackwardRows<T> rows = {(const T *)args->x_out, (const T *)args->weight,
                                      (const T *)args->dout,  (T *)args->dx,
                                      args->inv_rms,          parts,
                                      args->tokens,           args->hidden_size};
        auto kernel = vec_ok<T>((const void *)bits, args->hidden_size)
                          ? backward_kernel<T, Vec<T>::SIZE>
                          : backward_kernel<T, 1>;
        kernel<<<(unsigned)blocks, dim3((unsigned)shape.threads, (unsigned)shape.rows), shared,
                 backend->stream>>>(rows);
    });
    LAUNCH_TRY(backend);
    return add_column_sums(backend, parts, blocks, hidden, hidden, base->grad_dtype,
                           args->grad_weight);
}

// --- Sums of parts -------------------------------------------------------------------------------

enum { SUM_COLUMNS = 32, SUM_GROUPS = 32 };

// Thread (c, g) of a block adds the rows g, g + SUM_GROUPS, ... of column c; then warp c adds the
// groups of that column. Starts while the kernel that writes the parts ends, and waits for it.
template <typename G>
static __global__ void __launch_bounds__(SUM_COLUMNS *SUM_GROUPS)
    column_sums_kernel(const float *__restrict__ parts, int64_t rows, int64_t stride,
                       int64_t columns, G *__restrict__ grad) {
    __shared__ float groups[SUM_GROUPS][SUM_COLUMNS + 1];
    const int64_t first = (int64_t)blockIdx.x * SUM_COLUMNS, column = first + threadIdx.x;
    const bool writes = threadIdx.x == 0 && first + threadIdx.y < columns;
    grid_dependency_wait();
    const float before = writes ? to_float(grad[first + threadIdx.y]) : 0.0f;
    float sum = 0.0f;
    if (column < columns) {
#pragma unroll 16
        for (int64_t r = threadIdx.y; r < rows; r += SUM_GROUPS) sum += parts[r * stride + column];
    }
    groups[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    sum = warp_sum(groups[threadIdx.x][threadIdx.y]);
    if (writes) grad[first + threadIdx.y] = from_float<G>(before + sum);
}
static_assert(SUM_COLUMNS == 32 && SUM_GROUPS == 32, "a warp per column, a lane per group");

Status add_column_sums(CudaBackend *backend, const float *parts, int64_t rows, int64_t stride,
                       int64_t columns, DType grad_dtype, void *grad) {
    const dim3 blocks((unsigned)div_up(columns, SUM_COLUMNS)), threads(SUM_COLUMNS, SUM_GROUPS);
    DISPATCH_DTYPE(grad_dtype, G, {
        TRY(launch_early<column_sums_kernel<G>>(backend, blocks, threads, parts, rows, stride,
                                                columns, (G *)grad));
    });
    return STATUS_OK;
}
