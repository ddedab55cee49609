// Linear layer: cuBLASLt for the products, the bias added by its epilogue; the bias gradient is a
// column sum of its own.
//
// cuBLASLt has an epilogue for bias gradients, too, but it overwrites where gradients accumulate.
// The own kernel reads dout once more, which only the layers with a bias pay for (q, k, v).
#include "cuda/common.cuh"
#include "cuda/cuda.h"

// --- Column sums: grad_bias[c] += Σ_t dout[t, c] -------------------------------------------------
//
// Every block sums some rows of 32 pieces of columns to a row of partial sums, which
// add_column_sums() adds up. Both in a fixed order.

enum { SUM_WARPS = 8, SUM_THREADS = 32 * SUM_WARPS, SUM_ROWS_MIN = 64 };
enum { SUM_COLUMNS = 32 * 8, SUM_BLOCKS_PER_SM = 4 }; // columns: of a block in bf16

template <typename T, int W>
static __global__ void __launch_bounds__(SUM_THREADS)
    partial_sums_kernel(const T *__restrict__ dout, int64_t tokens, int columns,
                        float *__restrict__ partial) {
    __shared__ float shared[SUM_WARPS][32 * W + 1];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first = blockIdx.x * 32 * W, column = first + lane * W;
    const int64_t step = (int64_t)gridDim.y * SUM_WARPS;
    float sums[W] = {};
    if (column < columns) {
        for (int64_t t = (int64_t)blockIdx.y * SUM_WARPS + warp; t < tokens; t += step) {
            const Piece<T, W> piece = load_piece<T, W>(dout + t * columns + column);
#pragma unroll
            for (int i = 0; i < W; i++) sums[i] += to_float(piece.v[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < W; i++) shared[warp][lane * W + i] = sums[i];
    __syncthreads();
    for (int c = threadIdx.x; c < 32 * W && first + c < columns; c += SUM_THREADS) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < SUM_WARPS; w++) sum += shared[w][c];
        partial[(int64_t)blockIdx.y * columns + first + c] = sum;
    }
}

// Enough parts to fill the device, of at least SUM_ROWS_MIN rows each.
static int64_t part_count(const CudaBackend *backend, int64_t tokens, int64_t columns) {
    const int64_t across = div_up(columns, SUM_COLUMNS);
    const int64_t wanted = div_up((int64_t)SUM_BLOCKS_PER_SM * backend->num_sms, across);
    const int64_t most = div_up(tokens, SUM_ROWS_MIN);
    return wanted < most ? wanted : most;
}

static Status add_bias_gradient(CudaBackend *backend, const LinearArgs *args) {
    const int columns = args->out_features;
    const int64_t parts = part_count(backend, args->tokens, columns);
    Scratch scratch = scratch_open(backend);
    float *partial;
    TRY(scratch_take(&scratch, (size_t)(parts * columns) * sizeof(float), (void **)&partial));
    DISPATCH_DTYPE(backend->base.compute_dtype, T, {
        constexpr int WIDE = Vec<T>::SIZE;
        const bool wide = vec_ok<T>(args->dout, columns);
        auto kernel = wide ? partial_sums_kernel<T, WIDE> : partial_sums_kernel<T, 1>;
        const dim3 grid((unsigned)div_up(columns, 32 * (wide ? WIDE : 1)), (unsigned)parts);
        kernel<<<grid, SUM_THREADS, 0, backend->stream>>>((const T *)args->dout, args->tokens,
                                                          columns, partial);
    });
    LAUNCH_TRY(backend);
    return add_column_sums(backend, partial, parts, columns, columns, backend->base.grad_dtype,
                           args->grad_bias);
}

// --- The op -------------------------------------------------------------------------------------

// A bound of parts · columns (see part_count) that does not shrink as the columns grow and the
// parts become fewer.
size_t cuda_linear_workspace(const CudaBackend *backend, const LinearArgs *args) {
    const int64_t columns = args->out_features;
    const int64_t all = div_up(args->tokens, SUM_ROWS_MIN) * columns;
    const int64_t bound = (int64_t)SUM_BLOCKS_PER_SM * backend->num_sms * SUM_COLUMNS + columns;
    return scratch_bytes((size_t)(all < bound ? all : bound) * sizeof(float));
}

Status cuda_linear_forward(Backend *base, const LinearArgs *args) {
    CudaBackend *backend = cuda_of(base);
    backend->current_op = "linear_forward";
    Gemm product = gemm_of(backend, args->tokens, args->out_features, args->in_features, args->x,
                           args->weight, args->out);
    product.transpose_b = true;
    product.bias = args->bias;
    return gemm_run(backend, &product, 0);
}

Status cuda_linear_backward(Backend *base, const LinearArgs *args) {
    CudaBackend *backend = cuda_of(base);
    backend->current_op = "linear_backward";
    if (args->tokens == 0) return STATUS_OK;
    TRY(gemm_weight_gradient(backend, args->tokens, args->out_features, args->in_features,
                             args->dout, args->x, args->grad_assign, args->grad_weight));
    if (args->bias) TRY(add_bias_gradient(backend, args));
    if (!args->dx) return STATUS_OK;
    Gemm inputs = gemm_of(backend, args->tokens, args->in_features, args->out_features, args->dout,
                          args->weight, args->dx);
    inputs.beta = args->dx_accumulate ? 1.0f : 0.0f;
    return gemm_run(backend, &inputs, 0);
}
