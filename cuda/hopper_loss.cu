// Softmax inside the final linear layer's product; see hopper_loss.h for the method.
//
// Four kernels per chunk: the reference c of each row, the product, the product again for rows
// that need another c (which nearly always returns at once), and the end of the rows: their sums
// in a fixed order, their losses, and what the backward products read.
#include <math.h>
#include "cuda/hopper_launch.cuh"
#include "cuda/hopper_loss.h"

static const float LN_2 = 0.693147181f;

// Floats as integers of the same order, for atomicMax.
static __device__ __forceinline__ int ordered(float x) {
    const int bits = __float_as_int(x);
    return bits >= 0 ? bits : bits ^ 0x7fffffff;
}
static __device__ __forceinline__ float from_ordered(int x) {
    return __int_as_float(x >= 0 ? x : x ^ 0x7fffffff);
}

// --- Scratch -------------------------------------------------------------------------------------

typedef struct LossRow {
    float *reference; // (R) c in powers of two, +infinity where the target is ignored
    int *highest; // (R) the largest logit, ordered and in powers of two, of rows beyond the limit
    float *target_logit; // (R)
    float *sums;         // (column tiles, R)
    int *beyond;         // (1) whether any row is
} LossRow;

static int64_t column_tiles(int64_t vocab) {
    return div_up(vocab, TILE_COLUMNS);
}

size_t hopper_loss_scratch(int64_t rows, int64_t vocab) {
    return (size_t)((3 + column_tiles(vocab)) * rows + 1) * sizeof(float);
}

static LossRow loss_row_of(const HopperLoss *loss) {
    LossRow row;
    row.reference = (float *)loss->scratch;
    row.highest = (int *)(row.reference + loss->rows);
    row.target_logit = row.reference + 2 * loss->rows;
    row.sums = row.reference + 3 * loss->rows;
    row.beyond = (int *)(row.sums + column_tiles(loss->vocab) * loss->rows);
    return row;
}

// --- References ----------------------------------------------------------------------------------

enum { ROW_THREADS = 256, ROW_WARPS = ROW_THREADS / 32 };

// The target's logit of one row per warp. A target outside the vocabulary is ignored, too, and
// noted for synchronize().
static __global__ void __launch_bounds__(ROW_THREADS)
    reference_kernel(const HopperLoss loss, const LossRow out, uint64_t *bad_id) {
    const int64_t row = (int64_t)blockIdx.x * ROW_WARPS + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (blockIdx.x == 0 && threadIdx.x == 0) *out.beyond = 0;
    if (row >= loss.rows) return;
    const int target = loss.targets[row];
    const bool counts = target >= 0 && target < loss.vocab;
    float logit = 0.0f;
    if (counts) {
        const bf16 *x = (const bf16 *)loss.x + row * loss.hidden;
        const bf16 *weight = (const bf16 *)loss.weight + (int64_t)target * loss.hidden;
        for (int h = lane * Vec<bf16>::SIZE; h < loss.hidden; h += 32 * Vec<bf16>::SIZE) {
            const Vec<bf16> a = load_vec(x + h), b = load_vec(weight + h);
#pragma unroll
            for (int i = 0; i < Vec<bf16>::SIZE; i++) logit += to_float(a.v[i]) * to_float(b.v[i]);
        }
    }
    logit = warp_sum(logit);
    if (lane != 0) return;
    if (!counts && target != -1) note_bad_id(bad_id, loss.first + row, target);
    // Rounded as the product's will be.
    out.reference[row] = counts ? to_float(from_float<bf16>(logit)) * LOG2_E : INFINITY;
    out.highest[row] = ordered(-INFINITY);
}

// --- The product ---------------------------------------------------------------------------------

enum { LOSS_BAND = 16 };

struct LossProduct {
    CUtensorMap a, b;
    int tiles, k_steps, tiles_m, tiles_n;
    int *turns;
    int rows, vocab;
    bool again; // with the references that the first time has found to be needed
    const int32_t *targets;
    LossRow row;
    bf16 *exps; // (rows, stride) or NULL
    int64_t stride;

    static constexpr bool B_ROWS = false;

    __device__ __forceinline__ bool idle() const { return again && *row.beyond == 0; }

    __device__ __forceinline__ Tile tile_at(int index) const {
        const TilePlace place = place_in_bands(index, tiles_m, tiles_n, LOSS_BAND);
        return Tile{0, place.row_tile * CLUSTER_ROWS, rows, place.column_tile};
    }

    __device__ __forceinline__ BoxPlace box_of_b(const Tile &tile, int box, int step) const {
        return BoxPlace{step * TILE_K, tile.column_tile * TILE_COLUMNS + box * 64};
    }

    // AHEAD rows, this lane's 8 columns. Returns the sum of row lane/4. EDGE: columns beyond the
    // vocabulary; `columns`: those of the lane that exist.
    template <bool EDGE>
    __device__ __forceinline__ float exp_rows(const Handover &h, int begin, float reference,
                                              bf16 *to, int to_rows, int columns, int lane) const {
        float sums[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            Line line = take(h, begin + i, lane);
            const float c = __shfl_sync(0xffffffffu, reference, begin + i);
            float e[8];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float2 logits = unpack(line.v[j]);
                e[2 * j] = exp2_fast(fmaf(logits.x, LOG2_E, -c));
                e[2 * j + 1] = exp2_fast(fmaf(logits.y, LOG2_E, -c));
                line.v[j] = pack_bf16(e[2 * j], e[2 * j + 1]);
            }
#pragma unroll
            for (int j = 0; j < 8 && EDGE; j++) e[j] = j < columns ? e[j] : 0.0f;
            sums[i] = ((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7]));
            store_line_if(begin + i < to_rows, to + (begin + i) * stride, line);
        }
        return sum_rows(sums, lane);
    }

    // The largest logits of rows that may overflow.
    static __device__ __forceinline__ void note_highest(const LossRow &row, const Handover &h,
                                                        int64_t first, float reference, int columns,
                                                        int lane) {
        for (int i = 0; i < WARP_ROWS; i++) {
            const Line line = take(h, i, lane);
            float most = -INFINITY;
            for (int j = 0; j < 8; j++) {
                const float2 both = unpack(line.v[j / 2]);
                if (j < columns) most = fmaxf(most, j % 2 ? both.y : both.x);
            }
            most = warp_max(most) * LOG2_E;
            const float c = __shfl_sync(0xffffffffu, reference, i);
            if (lane != 0 || !(most - c > HOPPER_LOSS_LOG2 - 8)) continue; // 2^8 columns
            atomicMax(&row.highest[first + i], ordered(most));
            *row.beyond = 1;
        }
    }

    // Row `row + lane`'s reference.
    __device__ __forceinline__ float reference_of(int64_t at) const {
        if (at >= rows) return INFINITY;
        const float c = row.reference[at];
        return again ? fmaxf(c, from_ordered(row.highest[at])) : c;
    }

    __device__ __forceinline__ void finish(const Tile &tile, int64_t first, Handover *handover,
                                           int lane) const {
        const int column = tile.column_tile * TILE_COLUMNS, columns = vocab - column - lane * 8;
        const float reference = reference_of(first + lane);
        const int target = first + lane < rows ? targets[first + lane] - column : -1;
        bf16 *to = exps + first * stride + column + lane * 8;
        const int to_rows = exps && columns > 0 ? (int)(rows - first) : 0;
        bool beyond = false;
        barrier_wait(handover->filled, handover->phase);
#pragma unroll 1
        for (int begin = 0; begin < WARP_ROWS; begin += AHEAD) {
            const float sum =
                column + TILE_COLUMNS <= vocab
                    ? exp_rows<false>(*handover, begin, reference, to, to_rows, 8, lane)
                    : exp_rows<true>(*handover, begin, reference, to, to_rows, columns, lane);
            const int64_t at = first + begin + lane / 4;
            if (lane % 4 == 0 && at < rows) row.sums[(int64_t)tile.column_tile * rows + at] = sum;
            beyond |= sum > exp2f(HOPPER_LOSS_LOG2);
        }
        if (target >= 0 && target < TILE_COLUMNS)
            row.target_logit[first + lane] = take_value(*handover, lane, target);
        if (__any_sync(0xffffffffu, beyond) && !again)
            note_highest(row, *handover, first, reference, columns, lane);
    }
};

// --- The end of the rows -------------------------------------------------------------------------

enum { END_ROWS = 32, END_PARTS = ROW_THREADS / END_ROWS };

// The sums of END_ROWS rows, END_PARTS threads each, to the first of them.
static __device__ __forceinline__ float sum_tiles(const float *sums, int64_t rows, int tiles,
                                                  int64_t row,
                                                  float (&shared)[END_PARTS][END_ROWS]) {
    const int part = threadIdx.x / END_ROWS, in_block = threadIdx.x % END_ROWS;
    float sum = 0.0f;
    if (row < rows) {
#pragma unroll 8
        for (int tile = part; tile < tiles; tile += END_PARTS)
            sum += sums[(int64_t)tile * rows + row];
    }
    shared[part][in_block] = sum;
    __syncthreads();
    for (int p = 1; p < END_PARTS && part == 0; p++) sum += shared[p][in_block];
    return sum;
}

// Loss and factor of a row, and its target's gradient.
static __device__ __forceinline__ float end_row(const HopperLoss &loss, const LossRow &in,
                                                int64_t row, float z) {
    const int target = loss.targets[row];
    const bool counts = target >= 0 && target < loss.vocab;
    if (!counts) {
        loss.losses[row] = 0.0f;
        return 0.0f;
    }
    const float c = fmaxf(in.reference[row], from_ordered(in.highest[row]));
    const float above = fmaf(in.target_logit[row], LOG2_E, -c);
    loss.losses[row] = logf(z) - above * LN_2;
    if (!loss.gradient) return 0.0f;
    ((bf16 *)loss.gradient)[row * loss.stride + target] = from_float<bf16>(exp2_fast(above) - z);
    return loss.grad_scale / z;
}

static __global__ void __launch_bounds__(ROW_THREADS)
    end_kernel(const HopperLoss loss, const LossRow in, int tiles) {
    __shared__ float shared[END_PARTS][END_ROWS], factor[END_ROWS];
    const int64_t first = (int64_t)blockIdx.x * END_ROWS, row = first + threadIdx.x % END_ROWS;
    const float z = sum_tiles(in.sums, loss.rows, tiles, row, shared);
    if (threadIdx.x < END_ROWS && row < loss.rows) {
        factor[threadIdx.x] = end_row(loss, in, row, z);
        if (loss.gradient) loss.factor[row] = factor[threadIdx.x];
    }
    __syncthreads();
    if (!loss.gradient) return;
    const int pieces = loss.hidden / Vec<bf16>::SIZE,
              rows = (int)min(loss.rows - first, (int64_t)END_ROWS);
    const bf16 *x = (const bf16 *)loss.x + first * loss.hidden;
    bf16 *out = (bf16 *)loss.x_scaled + first * loss.hidden;
#pragma unroll 4
    for (int i = threadIdx.x; i < rows * pieces; i += ROW_THREADS) {
        Vec<bf16> v = load_vec(x + (int64_t)i * Vec<bf16>::SIZE);
        const float f = factor[i / pieces];
#pragma unroll
        for (int j = 0; j < Vec<bf16>::SIZE; j++) v.v[j] = from_float<bf16>(to_float(v.v[j]) * f);
        store_vec(out + (int64_t)i * Vec<bf16>::SIZE, v);
    }
}

static __global__ void __launch_bounds__(ROW_THREADS)
    scale_rows_kernel(int64_t pieces, int row_pieces, const float *__restrict__ product,
                      const float *__restrict__ factor, bf16 *__restrict__ dx) {
    const int64_t i = (int64_t)blockIdx.x * ROW_THREADS + threadIdx.x;
    if (i >= pieces) return;
    const float f = factor[i / row_pieces];
    const Vec<float> low = load_vec(product + i * 8), high = load_vec(product + i * 8 + 4);
    Vec<bf16> out;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        out.v[j] = from_float<bf16>(low.v[j] * f);
        out.v[j + 4] = from_float<bf16>(high.v[j] * f);
    }
    store_vec(dx + i * 8, out);
}

// --- Host ----------------------------------------------------------------------------------------

static Status make_product(CudaBackend *backend, const HopperLoss *loss, const LossRow *row,
                           LossProduct *product) {
    product->k_steps = loss->hidden / TILE_K;
    product->tiles_m = (int)div_up(loss->rows, CLUSTER_ROWS);
    product->tiles_n = (int)column_tiles(loss->vocab);
    product->tiles = product->tiles_m * product->tiles_n;
    product->rows = (int)loss->rows;
    product->vocab = loss->vocab;
    product->targets = loss->targets;
    product->row = *row;
    product->exps = (bf16 *)loss->gradient;
    product->stride = loss->stride;
    TRY(make_map(backend, loss->x, loss->rows, loss->hidden, BLOCK_ROWS, &product->a));
    return make_map(backend, loss->weight, loss->vocab, loss->hidden, 64, &product->b);
}

bool hopper_loss_runs(const CudaBackend *backend) {
    return backend->capability == 90 && backend->base.compute_dtype == DTYPE_BF16;
}

bool hopper_loss_takes(const CudaBackend *backend, int hidden, int vocab, const void *x,
                       const void *weight, const void *dx) {
    const uintptr_t bits = (uintptr_t)x | (uintptr_t)weight | (uintptr_t)dx;
    return hopper_loss_runs(backend) && hidden % TILE_K == 0 && bits % 16 == 0 && vocab > 0 &&
           vocab < INT32_MAX / 2;
}

Status hopper_loss(CudaBackend *backend, const HopperLoss *loss) {
    const LossRow row = loss_row_of(loss);
    LossProduct product = {};
    INVARIANT(loss->rows <= HOPPER_LOSS_ROWS_MAX);
    TRY(make_product(backend, loss, &row, &product));
    reference_kernel<<<(unsigned)div_up(loss->rows, ROW_WARPS), ROW_THREADS, 0, backend->stream>>>(
        *loss, row, backend->bad_id);
    LAUNCH_TRY(backend);
    TRY(launch_product(backend, &product));
    product.again = true;
    TRY(launch_product(backend, &product));
    end_kernel<<<(unsigned)div_up(loss->rows, END_ROWS), ROW_THREADS, 0, backend->stream>>>(
        *loss, row, product.tiles_n);
    LAUNCH_TRY(backend);
    return STATUS_OK;
}

Status hopper_loss_dx(CudaBackend *backend, int64_t rows, int hidden, const float *product,
                      const float *factor, void *dx) {
    const int64_t pieces = rows * hidden / 8;
    scale_rows_kernel<<<(unsigned)div_up(pieces, ROW_THREADS), ROW_THREADS, 0, backend->stream>>>(
        pieces, hidden / 8, product, factor, (bf16 *)dx);
    LAUNCH_TRY(backend);
    return STATUS_OK;
}
