// Final linear layer, softmax and cross-entropy in chunks of tokens.
//
// A chunk's logits (C, V) are computed, turned in place into their gradient, and used for dx and
// the weight's gradient before the next chunk overwrites them. A chunk is as large as a fixed
// budget allows: the products want many rows, and the weight's gradient is read and written once
// per chunk. Rows of logits are padded to whole cache lines, so that any vocabulary is accessed in
// 16-byte pieces.
//
// On a Hopper chip the products do without a pass over the logits (hopper_loss.h). Elsewhere the
// row kernel has one, bound by memory. One block takes a row, as many bytes of it as fit stay in
// shared memory between reading and writing, the rest (a quarter of 151,936 bf16 logits) is read
// again and comes from the L2 cache, since only one row per SM is in flight.
#include <math.h>
#include "cuda/common.cuh"
#include "cuda/cuda.h"
#include "cuda/hopper_grouped.h"
#include "cuda/hopper_loss.h"

// --- One row: loss, and logits to gradient ------------------------------------------------------

enum { ROW_THREADS_MAX = 1024, ROW_GROUP = 4 }; // pieces a thread has in flight
static const float LOWEST = -1e30f;             // finite, so that it can be subtracted from itself

template <typename T> struct LossRows {
    T *logits;             // (C, stride)
    int64_t stride, first; // first: of the chunk in the micro-batch
    int vocab, cached; // cached: pieces kept in shared memory, a multiple of the block's threads
    const int32_t *targets; // (T)
    float *losses;          // (T)
    float grad_scale;
    uint64_t *bad_id;
};

// The row's target, -1 where it is ignored. One outside the vocabulary is ignored, too, and noted
// for synchronize().
static __device__ __forceinline__ int target_of(const int32_t *targets, int64_t t, int vocab,
                                                uint64_t *bad_id) {
    const int target = targets[t];
    if (target >= -1 && target < vocab) return target;
    if (threadIdx.x == 0) note_bad_id(bad_id, t, target);
    return -1;
}

// A thread's largest logit and its sum of exp(logit - largest).
struct Softmax {
    float highest, sum;
};

// Reads the thread's pieces of the row once, keeping the first `cached` in shared memory.
template <typename T>
static __device__ __forceinline__ Softmax read_row(const T *row, int pieces, int cached,
                                                   int4 *cache) {
    constexpr int W = Vec<T>::SIZE;
    Softmax s = {LOWEST, 0.0f};
    for (int begin = threadIdx.x; begin < pieces; begin += ROW_GROUP * blockDim.x) {
        Vec<T> x[ROW_GROUP];
        float highest = s.highest;
#pragma unroll
        for (int j = 0; j < ROW_GROUP; j++) {
            const int p = begin + j * blockDim.x;
            if (p < pieces) x[j] = load_vec(row + (int64_t)p * W);
        }
#pragma unroll
        for (int j = 0; j < ROW_GROUP; j++) {
            const int p = begin + j * blockDim.x;
            if (p >= pieces) break;
            if (p < cached) cache[p] = *reinterpret_cast<const int4 *>(&x[j]);
#pragma unroll
            for (int i = 0; i < W; i++) highest = fmaxf(highest, to_float(x[j].v[i]));
        }
        s.sum *= exp2_fast((s.highest - highest) * LOG2_E);
        s.highest = highest;
#pragma unroll
        for (int j = 0; j < ROW_GROUP; j++) {
            if (begin + j * (int)blockDim.x >= pieces) break;
#pragma unroll
            for (int i = 0; i < W; i++)
                s.sum += exp2_fast((to_float(x[j].v[i]) - highest) * LOG2_E);
        }
    }
    return s;
}

template <typename T>
static __device__ __forceinline__ Vec<T> gradient_of(const Vec<T> &x, float highest, float factor) {
    Vec<T> g;
#pragma unroll
    for (int i = 0; i < Vec<T>::SIZE; i++)
        g.v[i] = from_float<T>(factor * exp2_fast((to_float(x.v[i]) - highest) * LOG2_E));
    return g;
}

// row = factor · exp(row - highest). First what was read last, while it is in the L2 cache.
template <typename T>
static __device__ __forceinline__ void write_row(T *row, int pieces, int cached, const int4 *cache,
                                                 float highest, float factor) {
    constexpr int W = Vec<T>::SIZE;
    for (int begin = cached + threadIdx.x; begin < pieces; begin += ROW_GROUP * blockDim.x) {
        Vec<T> x[ROW_GROUP];
#pragma unroll
        for (int j = 0; j < ROW_GROUP; j++) {
            const int p = begin + j * blockDim.x;
            if (p < pieces) x[j] = load_vec(row + (int64_t)p * W);
        }
#pragma unroll
        for (int j = 0; j < ROW_GROUP; j++) {
            const int p = begin + j * blockDim.x;
            if (p < pieces) store_vec(row + (int64_t)p * W, gradient_of(x[j], highest, factor));
        }
    }
#pragma unroll 2
    for (int p = threadIdx.x; p < cached && p < pieces; p += blockDim.x) {
        const Vec<T> x = *reinterpret_cast<const Vec<T> *>(&cache[p]);
        store_vec(row + (int64_t)p * W, gradient_of(x, highest, factor));
    }
}

template <typename T> static __device__ __forceinline__ void zero_row(T *row, int pieces) {
    const int4 zero = {0, 0, 0, 0};
    for (int p = threadIdx.x; p < pieces; p += blockDim.x) reinterpret_cast<int4 *>(row)[p] = zero;
}

// GRADIENT: the logits become grad_scale · (softmax - target); else they are only read.
template <typename T, bool GRADIENT>
static __global__ void __launch_bounds__(ROW_THREADS_MAX) loss_rows_kernel(const LossRows<T> a) {
    extern __shared__ int4 cache[];
    __shared__ float shared[2][32];
    constexpr int W = Vec<T>::SIZE;
    const int64_t t = a.first + blockIdx.x;
    T *row = a.logits + blockIdx.x * a.stride;
    const int pieces = (a.vocab + W - 1) / W;
    const int target = target_of(a.targets, t, a.vocab, a.bad_id);
    if (target < 0) {
        if (GRADIENT) zero_row(row, pieces);
        if (threadIdx.x == 0) a.losses[t] = 0.0f;
        return;
    }
    if (a.vocab % W != 0) { // the padding of the last piece: no probability
        const int column = a.vocab + threadIdx.x;
        if (column < pieces * W) row[column] = from_float<T>(-INFINITY);
        __syncthreads();
    }
    const Softmax own = read_row(row, pieces, GRADIENT ? a.cached : 0, cache);
    const float highest = block_max(own.highest, shared[0]);
    const float sum = block_sum(own.sum * exp2_fast((own.highest - highest) * LOG2_E), shared[1]);
    // The thread that reads and writes the target's piece also does what is special about it.
    const bool owner = (int)threadIdx.x == target / W % (int)blockDim.x;
    const float logit = owner ? to_float(row[target]) : 0.0f;
    if (owner) a.losses[t] = (highest - logit) + logf(sum);
    if (!GRADIENT) return;
    const float factor = a.grad_scale / sum;
    write_row(row, pieces, a.cached, cache, highest, factor);
    if (owner)
        row[target] = from_float<T>(factor * exp2_fast((logit - highest) * LOG2_E) - a.grad_scale);
}

static int64_t minimum(int64_t a, int64_t b) {
    return a < b ? a : b;
}

template <typename T, bool GRADIENT>
static Status launch_rows(CudaBackend *backend, LossRows<T> *rows, int64_t count) {
    const int64_t pieces = div_up(rows->vocab, Vec<T>::SIZE);
    const int64_t warps = div_up(pieces, 32 * ROW_GROUP);
    const int threads = (int)minimum(warps * 32, ROW_THREADS_MAX);
    int limit = 0;
    CUDA_TRY(backend, cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                             backend->device));
    auto kernel = loss_rows_kernel<T, GRADIENT>;
    int64_t rounds =
        (limit - 1024) / (threads * (int64_t)sizeof(int4)); // 1024: static and reserved
    rows->cached = (int)minimum(rounds, div_up(pieces, threads)) * threads;
    const int bytes = GRADIENT ? rows->cached * (int)sizeof(int4) : 0;
    CUDA_TRY(backend,
             cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<(unsigned)count, (unsigned)threads, (size_t)bytes, backend->stream>>>(*rows);
    LAUNCH_TRY(backend);
    return STATUS_OK;
}

// --- Sums over the micro-batch ------------------------------------------------------------------

enum { TOTAL_THREADS = 1024 };

static __global__ void __launch_bounds__(TOTAL_THREADS)
    total_kernel(const int32_t *__restrict__ targets, const float *__restrict__ losses,
                 int64_t tokens, int vocab, double *loss_sum, double *loss_count) {
    __shared__ double shared[2][32];
    double sum = 0.0, count = 0.0;
#pragma unroll 8
    for (int64_t t = threadIdx.x; t < tokens; t += TOTAL_THREADS) {
        const bool counts = targets[t] >= 0 && targets[t] < vocab;
        sum += counts ? (double)losses[t] : 0.0;
        count += counts ? 1.0 : 0.0;
    }
    sum = block_sum(sum, shared[0]);
    count = block_sum(count, shared[1]);
    if (threadIdx.x != 0) return;
    *loss_sum += sum;
    *loss_count += count;
}

// --- The op -------------------------------------------------------------------------------------

static const int64_t CHUNK_BYTES = (int64_t)5 << 29; // of logits: 8192 x 151,936 in bf16
enum { CHUNK_ROWS_MIN = 1024, CHUNK_ROWS_STEP = 128, STRIDE_STEP = 64 };

static int64_t logits_stride(const LinearCrossEntropyArgs *args) {
    return div_up(args->vocab_size, STRIDE_STEP) * STRIDE_STEP;
}
static int64_t row_bytes(const CudaBackend *backend, const LinearCrossEntropyArgs *args) {
    return logits_stride(args) * (int64_t)dtype_bytes(backend->base.compute_dtype);
}

static bool is_fused(const CudaBackend *backend, const LinearCrossEntropyArgs *args) {
    return hopper_loss_takes(backend, args->hidden_size, args->vocab_size, args->x, args->weight,
                             args->dx);
}

// Rows that a chunk can have. Where chunks may be fused all are as short, so that the workspace's
// size does not depend on pointers.
static int64_t rows_limit(const CudaBackend *backend, const LinearCrossEntropyArgs *args) {
    int64_t limit = args->tokens;
    if (hopper_loss_runs(backend)) limit = minimum(limit, HOPPER_LOSS_ROWS_MAX);
    return args->chunk_tokens > 0 ? minimum(limit, args->chunk_tokens) : limit;
}

// Rows of a chunk: what the caller asks for, or equal chunks of at most CHUNK_BYTES.
static int64_t chunk_rows(const CudaBackend *backend, const LinearCrossEntropyArgs *args) {
    const int64_t limit = rows_limit(backend, args);
    if (args->chunk_tokens > 0) return limit;
    int64_t most = CHUNK_BYTES / row_bytes(backend, args) / CHUNK_ROWS_STEP * CHUNK_ROWS_STEP;
    if (most < CHUNK_ROWS_MIN) most = CHUNK_ROWS_MIN;
    const int64_t chunks = div_up(args->tokens, minimum(most, limit));
    const int64_t rows = div_up(div_up(args->tokens, chunks), CHUNK_ROWS_STEP) * CHUNK_ROWS_STEP;
    return minimum(rows, args->tokens);
}

// An upper bound of the chunk's size that does not shrink as tokens or vocabulary grow.
static size_t logits_bytes(const CudaBackend *backend, const LinearCrossEntropyArgs *args) {
    const int64_t row = row_bytes(backend, args), all = row * rows_limit(backend, args);
    if (args->chunk_tokens > 0) return (size_t)all;
    const int64_t least = row * CHUNK_ROWS_MIN;
    return (size_t)minimum(all, least > CHUNK_BYTES ? least : CHUNK_BYTES);
}

// What a fused chunk needs besides.
typedef struct FusedBytes {
    size_t scratch, x_scaled, factor, product;
} FusedBytes;

static FusedBytes fused_bytes(const CudaBackend *backend, const LinearCrossEntropyArgs *args) {
    const int64_t rows = rows_limit(backend, args);
    const size_t values = (size_t)rows * (size_t)args->hidden_size;
    FusedBytes bytes = {};
    if (!hopper_loss_runs(backend)) return bytes;
    bytes.scratch = hopper_loss_scratch(rows, args->vocab_size);
    bytes.x_scaled = values * sizeof(bf16);
    bytes.factor = (size_t)rows * sizeof(float);
    bytes.product = values * sizeof(float);
    return bytes;
}

// The same for every hidden size and pointer, whether or not the fused path takes them.
size_t cuda_linear_cross_entropy_workspace(const CudaBackend *backend,
                                           const LinearCrossEntropyArgs *args) {
    const FusedBytes fused = fused_bytes(backend, args);
    return scratch_bytes(logits_bytes(backend, args)) +
           scratch_bytes((size_t)args->tokens * sizeof(float)) + scratch_bytes(fused.scratch) +
           scratch_bytes(fused.x_scaled) + scratch_bytes(fused.factor) +
           scratch_bytes(fused.product);
}

typedef struct Chunk {
    int64_t first, rows;
    void *logits;  // (rows, stride)
    float *losses; // (T)
    bool fused;
    const void *x_right; // (rows, H) what the logits' gradient is multiplied by: x, scaled if fused
    void *scratch, *x_scaled, *product;
    float *factor;
} Chunk;

static const void *chunk_x(const CudaBackend *backend, const LinearCrossEntropyArgs *args,
                           const Chunk *chunk) {
    return (const char *)args->x +
           chunk->first * args->hidden_size * (int64_t)dtype_bytes(backend->base.compute_dtype);
}

static Status fused_losses(CudaBackend *backend, const LinearCrossEntropyArgs *args, Chunk *chunk) {
    HopperLoss loss = {};
    loss.rows = chunk->rows;
    loss.first = chunk->first;
    loss.hidden = args->hidden_size;
    loss.vocab = args->vocab_size;
    loss.x = chunk_x(backend, args, chunk);
    loss.weight = args->weight;
    loss.targets = args->targets + chunk->first;
    loss.grad_scale = args->grad_scale;
    loss.losses = chunk->losses + chunk->first;
    loss.gradient = args->grad_weight ? chunk->logits : NULL;
    loss.stride = logits_stride(args);
    loss.x_scaled = chunk->x_scaled;
    loss.factor = chunk->factor;
    loss.scratch = chunk->scratch;
    chunk->x_right = chunk->x_scaled;
    return hopper_loss(backend, &loss);
}

static Status chunk_losses(CudaBackend *backend, const LinearCrossEntropyArgs *args, Chunk *chunk) {
    if (chunk->fused) return fused_losses(backend, args, chunk);
    chunk->x_right = chunk_x(backend, args, chunk);
    Gemm logits = gemm_of(backend, chunk->rows, args->vocab_size, args->hidden_size, chunk->x_right,
                          args->weight, chunk->logits);
    logits.transpose_b = true;
    logits.ldc = logits_stride(args);
    TRY(gemm_run(backend, &logits, 0));
    DISPATCH_DTYPE(backend->base.compute_dtype, T, {
        LossRows<T> rows = {.logits = (T *)chunk->logits,
                            .stride = logits_stride(args),
                            .first = chunk->first,
                            .vocab = args->vocab_size,
                            .targets = args->targets,
                            .losses = chunk->losses,
                            .grad_scale = args->grad_scale,
                            .bad_id = backend->bad_id};
        if (args->grad_weight)
            TRY((launch_rows<T, true>(backend, &rows, chunk->rows)));
        else
            TRY((launch_rows<T, false>(backend, &rows, chunk->rows)));
    });
    return STATUS_OK;
}

static Status chunk_weight_gradient(CudaBackend *backend, const LinearCrossEntropyArgs *args,
                                    const Chunk *chunk) {
    const int32_t all[] = {0, (int32_t)chunk->rows};
    HopperGradient grouped = {};
    grouped.groups = 1;
    grouped.begin = all;
    grouped.m = args->vocab_size;
    grouped.n = args->hidden_size;
    grouped.left = chunk->logits;
    grouped.left_stride = logits_stride(args);
    grouped.right = chunk->x_right;
    grouped.assign = args->grad_assign && chunk->first == 0;
    grouped.grad = (float *)args->grad_weight;
    if (hopper_gradient_takes(backend, &grouped) && hopper_gradient_fills(backend, &grouped))
        return hopper_gradient(backend, &grouped);
    Gemm weight = gemm_of(backend, args->vocab_size, args->hidden_size, chunk->rows, chunk->logits,
                          chunk->x_right, args->grad_weight);
    weight.transpose_a = true;
    weight.lda = logits_stride(args);
    weight.dtype_c = backend->base.grad_dtype;
    weight.beta = grouped.assign ? 0.0f : 1.0f;
    return gemm_run(backend, &weight, 0);
}

static Status chunk_gradients(CudaBackend *backend, const LinearCrossEntropyArgs *args,
                              const Chunk *chunk) {
    TRY(chunk_weight_gradient(backend, args, chunk));
    if (!args->dx) return STATUS_OK;
    char *dx = (char *)args->dx +
               chunk->first * args->hidden_size * (int64_t)dtype_bytes(backend->base.compute_dtype);
    Gemm inputs = gemm_of(backend, chunk->rows, args->hidden_size, args->vocab_size, chunk->logits,
                          args->weight, chunk->fused ? chunk->product : dx);
    inputs.lda = logits_stride(args);
    if (chunk->fused) inputs.dtype_c = DTYPE_F32;
    TRY(gemm_run(backend, &inputs, 0));
    if (!chunk->fused) return STATUS_OK;
    return hopper_loss_dx(backend, chunk->rows, args->hidden_size, (const float *)chunk->product,
                          chunk->factor, dx);
}

static Status open_chunk(CudaBackend *backend, const LinearCrossEntropyArgs *args, Chunk *chunk) {
    Scratch scratch = scratch_open(backend);
    *chunk = Chunk{};
    chunk->fused = is_fused(backend, args);
    chunk->losses = args->token_loss;
    TRY(scratch_take(&scratch, logits_bytes(backend, args), &chunk->logits));
    if (!chunk->losses)
        TRY(scratch_take(&scratch, (size_t)args->tokens * sizeof(float), (void **)&chunk->losses));
    if (!chunk->fused) return STATUS_OK;
    const FusedBytes bytes = fused_bytes(backend, args);
    TRY(scratch_take(&scratch, bytes.scratch, &chunk->scratch));
    TRY(scratch_take(&scratch, bytes.x_scaled, &chunk->x_scaled));
    TRY(scratch_take(&scratch, bytes.factor, (void **)&chunk->factor));
    return scratch_take(&scratch, bytes.product, &chunk->product);
}

Status cuda_linear_cross_entropy(Backend *base, const LinearCrossEntropyArgs *args) {
    CudaBackend *backend = cuda_of(base);
    backend->current_op = "linear_cross_entropy";
    if (args->tokens == 0) return STATUS_OK;
    const int64_t most = chunk_rows(backend, args);
    Chunk chunk;
    TRY(open_chunk(backend, args, &chunk));
    for (chunk.first = 0; chunk.first < args->tokens; chunk.first += most) {
        chunk.rows = minimum(most, args->tokens - chunk.first);
        TRY(chunk_losses(backend, args, &chunk));
        if (args->grad_weight) TRY(chunk_gradients(backend, args, &chunk));
    }
    total_kernel<<<1, TOTAL_THREADS, 0, backend->stream>>>(args->targets, chunk.losses,
                                                           args->tokens, args->vocab_size,
                                                           args->loss_sum, args->loss_count);
    LAUNCH_TRY(backend);
    return STATUS_OK;
}
