// Rows between token and expert order.
//
// A row belongs to a power of two of neighbouring lanes, at most a warp: rows of a few words, down
// to one float, would leave most lanes of a warp idle.
#include "cuda/rows.h"
#include "cuda/common.cuh"
#include "cuda/grouped.h"

enum { ROW_THREADS = 256, ROW_LANES_MAX = 32 };

// Who copies or adds up what: row, and the first word and the distance of a thread's words.
typedef struct Lane {
    int64_t row;
    int first, step;
} Lane;

static __device__ __forceinline__ Lane lane_of(int log_lanes) {
    const int64_t thread = (int64_t)blockIdx.x * ROW_THREADS + threadIdx.x;
    const int lanes = 1 << log_lanes;
    return Lane{thread >> log_lanes, (int)threadIdx.x & (lanes - 1), lanes};
}

// For rows of `words` accesses each.
static int log_lanes_of(int64_t words) {
    int log_lanes = 0;
    while ((1 << log_lanes) < ROW_LANES_MAX && (1 << log_lanes) < words) log_lanes++;
    return log_lanes;
}
static unsigned blocks_of(int64_t rows, int log_lanes) {
    return (unsigned)div_up(rows << log_lanes, ROW_THREADS);
}

template <typename Word>
static __global__ void __launch_bounds__(ROW_THREADS)
    gather_kernel(int64_t rows, int64_t words, int log_lanes, int divisor,
                  const int32_t *__restrict__ index, const Word *__restrict__ in,
                  Word *__restrict__ out) {
    const Lane lane = lane_of(log_lanes);
    if (lane.row >= rows) return;
    const Word *from = in + index[lane.row] / divisor * words;
    Word *to = out + lane.row * words;
#pragma unroll 4
    for (int64_t w = lane.first; w < words; w += lane.step) to[w] = from[w];
}

template <typename T, int W>
static __global__ void __launch_bounds__(ROW_THREADS)
    combine_kernel(int64_t tokens, int hidden, int log_lanes, int top_k,
                   const int32_t *__restrict__ row_of_slot, const T *__restrict__ rows,
                   T *__restrict__ out) {
    const Lane lane = lane_of(log_lanes);
    if (lane.row >= tokens) return;
    const int32_t *row = row_of_slot + lane.row * top_k;
    for (int h = lane.first * W; h < hidden; h += lane.step * W) {
        float sums[W] = {};
        for (int j = 0; j < top_k; j++) {
            const Piece<T, W> piece = load_piece<T, W>(rows + (int64_t)row[j] * hidden + h);
#pragma unroll
            for (int i = 0; i < W; i++) sums[i] += to_float(piece.v[i]);
        }
        Piece<T, W> sum;
#pragma unroll
        for (int i = 0; i < W; i++) sum.v[i] = from_float<T>(sums[i]);
        store_piece<T, W>(out + lane.row * hidden + h, sum);
    }
}

template <typename Word> static Status launch_gather(CudaBackend *b, const GatherRowsArgs *args) {
    const int64_t words = args->row_bytes / (int64_t)sizeof(Word);
    const int log_lanes = log_lanes_of(words);
    gather_kernel<Word><<<blocks_of(args->rows, log_lanes), ROW_THREADS, 0, b->stream>>>(
        args->rows, words, log_lanes, args->divisor, args->index, (const Word *)args->in,
        (Word *)args->out);
    LAUNCH_TRY(b);
    return STATUS_OK;
}

Status rows_gather(CudaBackend *b, const GatherRowsArgs *args) {
    const uintptr_t bits = (uintptr_t)args->in | (uintptr_t)args->out | (uintptr_t)args->row_bytes;
    if (args->rows == 0 || args->row_bytes == 0) return STATUS_OK;
    if (bits % sizeof(int4) == 0) return launch_gather<int4>(b, args);
    if (bits % sizeof(uint32_t) == 0) return launch_gather<uint32_t>(b, args);
    INVARIANT(bits % sizeof(uint16_t) == 0);
    return launch_gather<uint16_t>(b, args);
}

Status rows_combine(CudaBackend *b, const CombineRowsArgs *args) {
    const int hidden = args->hidden_size;
    if (args->tokens == 0) return STATUS_OK;
    if (args->top_k == 1) { // a sum of one is a copy
        GatherRowsArgs copy = {};
        copy.rows = args->tokens;
        copy.row_bytes = hidden * (int64_t)dtype_bytes(b->base.compute_dtype);
        copy.divisor = 1;
        copy.index = args->row_of_slot;
        copy.in = args->rows;
        copy.out = args->out;
        return rows_gather(b, &copy);
    }
    DISPATCH_DTYPE(b->base.compute_dtype, T, {
        const uintptr_t bits = (uintptr_t)args->rows | (uintptr_t)args->out;
        const bool wide = vec_ok<T>((const void *)bits, hidden);
        const int log_lanes = log_lanes_of(wide ? hidden / Vec<T>::SIZE : hidden);
        auto kernel = wide ? combine_kernel<T, Vec<T>::SIZE> : combine_kernel<T, 1>;
        kernel<<<blocks_of(args->tokens, log_lanes), ROW_THREADS, 0, b->stream>>>(
            args->tokens, hidden, log_lanes, args->top_k, args->row_of_slot, (const T *)args->rows,
            (T *)args->out);
    });
    LAUNCH_TRY(b);
    return STATUS_OK;
}

Status cuda_gather_rows(Backend *base, const GatherRowsArgs *args) {
    CudaBackend *b = cuda_of(base);
    b->current_op = "gather_rows";
    INVARIANT(args->row_bytes % 4 == 0 && args->divisor >= 1);
    // What is gathered may be any array, row counts, too.
    counts_forget(b, args->out, (size_t)(args->rows * args->row_bytes));
    return rows_gather(b, args);
}

Status cuda_combine_rows(Backend *base, const CombineRowsArgs *args) {
    cuda_of(base)->current_op = "combine_rows";
    return rows_combine(cuda_of(base), args);
}
