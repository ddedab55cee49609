// Matrix products with SwiGLU inside, on Hopper's own instructions.
//
// The elementwise pass between the MLP's products moves as many bytes as a product of these shapes
// takes time for. Here it happens on the accumulators, while other warps keep the tensor cores
// busy: forward saves reading gate_up, backward also writing and reading the activation's gradient.
//
// In the forward pass 128 gate columns and the 128 up columns that belong to them are one tile.
// Rows of an expert's last tile that are the next expert's are computed and dropped.
#include "cuda/hopper_launch.cuh"
#include "cuda/hopper_mlp.h"
#include "cuda/swiglu.cuh"

typedef struct MlpArgs {
    CUtensorMap a, b;
    int groups, k_steps, tiles_n, tiles; // tiles: of all groups
    int *turns;
    int inner, hidden;
    int begin[HOPPER_GROUPS_MAX + 1];
    int tile_begin[HOPPER_GROUPS_MAX + 1];
    const float *scale;
    const int32_t *scale_index;
    bf16 *gate_up, *activation, *dgate_up;
    float *partial; // (tiles_n, rows)
    int64_t rows;
} MlpArgs;

// --- Lines of device memory ------------------------------------------------------------------

// A warp reads and writes whole rows of its tile, as long as they can be, since memory is slower
// with short ones: 512 bytes, 16 by each lane, or in the forward pass two rows of 256.
typedef struct Window {
    int64_t wide, narrow; // the lane's first element in a (R, 2I) and in a (R, I) matrix
    int rows;             // from there to the first that does not exist; 0 beyond the last column
} Window;

static __device__ __forceinline__ Window window_of(int64_t row, int row_end, int column,
                                                   int inner) {
    const int rows = column < inner ? (int)(row_end - row) : 0;
    return Window{row * 2 * inner + column, row * inner + column, rows};
}

// The factor of a row.
static __device__ __forceinline__ float scale_of(const MlpArgs &args, int64_t row,
                                                 const Tile &tile) {
    if (row >= tile.row_end) return 0.0f;
    return args.scale[args.scale_index ? args.scale_index[row] : row];
}

// --- Elementwise: forward ----------------------------------------------------------------------

// Lane l has chunk l%16 of rows 2i + l/16. `scale`: of row `lane`.
template <bool SCALED>
static __device__ __forceinline__ void forward_rows(const MlpArgs &args, const Handover &h,
                                                    const Window &window, float scale, int lane) {
    const int inner = args.inner, upper = lane / 16, chunk = lane % 16;
#pragma unroll 8
    for (int i = 0; i < WARP_ROWS / 2; i++) {
        const bool valid = 2 * i < window.rows;
        const Line gate = take(h, 2 * i + upper, chunk), up = take(h, 2 * i + upper, chunk + 16);
        bf16 *to = args.gate_up + window.wide + (int64_t)4 * i * inner;
        store_line_if(valid, to, gate);
        store_line_if(valid, to + inner, up);
        if (!args.activation) continue;
        const float s = SCALED ? __shfl_sync(0xffffffffu, scale, 2 * i + upper) : 1.0f;
        Line activation;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 g = unpack(gate.v[j]), u = unpack(up.v[j]);
            activation.v[j] = pack_bf16(swiglu_of(g.x, u.x) * s, swiglu_of(g.y, u.y) * s);
        }
        store_line_if(valid, args.activation + window.narrow + (int64_t)2 * i * inner, activation);
    }
}

// --- Elementwise: backward -----------------------------------------------------------------------

typedef struct GateUp {
    Line gate, up;
} GateUp;

static __device__ __forceinline__ GateUp load_gate_up(const MlpArgs &args, const Window &window,
                                                      int row) {
    const bf16 *from = args.gate_up + window.wide + (int64_t)2 * row * args.inner;
    const bool valid = row < window.rows;
    return GateUp{load_line_if(valid, from), load_line_if(valid, from + args.inner)};
}

// From d and gate and up to their gradients, which take gate's and up's place, and the activation.
// Returns the line's share of the gate's gradient.
template <bool SCALED>
static __device__ __forceinline__ float backward_line(const Line &d, float scale, GateUp *line,
                                                      Line *activation) {
    float dot = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; j++) { // two values each
        const float2 g = unpack(line->gate.v[j]), u = unpack(line->up.v[j]), e = unpack(d.v[j]);
        const float s = SCALED ? scale : 1.0f;
        float2 dgate, dup;
        const float x = swiglu_gradients(g.x, u.x, e.x * s, &dgate.x, &dup.x);
        const float y = swiglu_gradients(g.y, u.y, e.y * s, &dgate.y, &dup.y);
        if (SCALED) dot += e.x * x + e.y * y;
        line->gate.v[j] = pack_bf16(dgate.x, dgate.y);
        line->up.v[j] = pack_bf16(dup.x, dup.y);
        activation->v[j] = pack_bf16(x * s, y * s);
    }
    return dot;
}

// AHEAD rows from `first` on, one line per lane; `next` are theirs on entry and on exit those of
// the rows that follow. `scale`: of row `lane`. Returns the tile's share of the gradient of the
// gate of row `first + lane/4`.
template <bool SCALED>
static __device__ __forceinline__ float backward_rows(const MlpArgs &args, const Handover &h,
                                                      int first, float scale, GateUp (&next)[AHEAD],
                                                      const Window &window, int lane) {
    const int inner = args.inner;
    float shares[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        const int row = first + i;
        const bool valid = row < window.rows;
        GateUp line = next[i];
        if (first + AHEAD < WARP_ROWS) next[i] = load_gate_up(args, window, row + AHEAD);
        const float s = SCALED ? __shfl_sync(0xffffffffu, scale, row) : 1.0f;
        Line activation;
        shares[i] = backward_line<SCALED>(take(h, row, lane), s, &line, &activation);
        bf16 *to = args.dgate_up + window.wide + (int64_t)2 * row * inner;
        store_line_if(valid, to, line.gate);
        store_line_if(valid, to + inner, line.up);
        store_line_if(valid && args.activation,
                      args.activation + window.narrow + (int64_t)row * inner, activation);
    }
    return SCALED ? sum_rows(shares, lane) : 0.0f;
}

// --- The product ---------------------------------------------------------------------------------

enum { MLP_BAND = 8 };

// SCALED: the rows have factors, which have gradients.
template <bool BACKWARD, bool SCALED> struct MlpProduct : MlpArgs {
    static constexpr bool B_ROWS = BACKWARD;

    __device__ __forceinline__ bool idle() const { return false; }

    __device__ __forceinline__ Tile tile_at(int index) const {
        Tile tile = {};
        while (index >= tile_begin[tile.group + 1]) tile.group++;
        index -= tile_begin[tile.group];
        tile.row_end = begin[tile.group + 1];
        const int tiles_m = (tile_begin[tile.group + 1] - tile_begin[tile.group]) / tiles_n;
        const TilePlace place = place_in_bands(index, tiles_m, tiles_n, MLP_BAND);
        tile.row = begin[tile.group] + place.row_tile * CLUSTER_ROWS;
        tile.column_tile = place.column_tile;
        return tile;
    }

    // Forward, weight (2I, H): 64 gate rows or, the third and fourth box, 64 up rows. Backward,
    // (H, I): 64 columns.
    __device__ __forceinline__ BoxPlace box_of_b(const Tile &tile, int box, int step) const {
        if (BACKWARD)
            return BoxPlace{tile.column_tile * TILE_COLUMNS + box * 64,
                            tile.group * hidden + step * TILE_K};
        return BoxPlace{step * TILE_K, (2 * tile.group + box / 2) * inner +
                                           tile.column_tile * TILE_COLUMNS / 2 + box % 2 * 64};
    }

    __device__ __forceinline__ void finish(const Tile &tile, int64_t row, Handover *handover,
                                           int lane) const {
        const float scale = SCALED ? scale_of(*this, row + lane, tile) : 1.0f;
        if constexpr (BACKWARD) {
            const Window window =
                window_of(row, tile.row_end, tile.column_tile * TILE_COLUMNS + lane * 8, inner);
            GateUp next[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) next[i] = load_gate_up(*this, window, i);
            barrier_wait(handover->filled, handover->phase);
#pragma unroll 1
            for (int first = 0; first < WARP_ROWS; first += AHEAD) {
                const float share =
                    backward_rows<SCALED>(*this, *handover, first, scale, next, window, lane);
                const int64_t at = row + first + lane / 4;
                if (SCALED && lane % 4 == 0 && at < tile.row_end)
                    partial[tile.column_tile * rows + at] = share;
            }
        } else {
            const int column = tile.column_tile * TILE_COLUMNS / 2 + lane % 16 * 8;
            const Window window = window_of(row + lane / 16, tile.row_end, column, inner);
            barrier_wait(handover->filled, handover->phase);
            forward_rows<SCALED>(*this, *handover, window, scale, lane);
        }
    }
};

static __global__ void sum_partials_kernel(int64_t rows, int parts,
                                           const float *__restrict__ partial,
                                           const int32_t *__restrict__ scale_index,
                                           float *__restrict__ dscale) {
    const int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    float sum = 0.0f;
    for (int p = 0; p < parts; p++) sum += partial[p * rows + row];
    dscale[scale_index ? scale_index[row] : row] = sum;
}

// --- Host ----------------------------------------------------------------------------------------

static void make_groups(const HopperMlp *mlp, MlpArgs *args) {
    args->groups = mlp->groups;
    for (int g = 0; g <= args->groups; g++) args->begin[g] = mlp->begin[g];
    for (int g = 0; g < args->groups; g++) {
        const int64_t rows = args->begin[g + 1] - args->begin[g];
        args->tile_begin[g + 1] =
            args->tile_begin[g] + (int)div_up(rows, CLUSTER_ROWS) * args->tiles_n;
    }
    args->tiles = args->tile_begin[args->groups];
}

static Status make_args(CudaBackend *backend, const HopperMlp *mlp, bool backward, MlpArgs *args) {
    args->k_steps = mlp->hidden / TILE_K;
    args->tiles_n = (int)div_up(mlp->inner, backward ? TILE_COLUMNS : TILE_COLUMNS / 2);
    args->inner = mlp->inner;
    args->hidden = mlp->hidden;
    args->scale = mlp->scale;
    args->scale_index = mlp->scale_index;
    args->gate_up = (bf16 *)mlp->gate_up;
    args->activation = (bf16 *)mlp->activation;
    args->dgate_up = (bf16 *)mlp->dgate_up;
    args->partial = mlp->partial;
    args->rows = mlp->begin[mlp->groups];
    make_groups(mlp, args);
    TRY(make_map(backend, mlp->in, args->rows, mlp->hidden, BLOCK_ROWS, &args->a));
    if (backward)
        return make_map(backend, mlp->weight, (int64_t)mlp->groups * mlp->hidden, mlp->inner, 64,
                        &args->b);
    return make_map(backend, mlp->weight, (int64_t)mlp->groups * 2 * mlp->inner, mlp->hidden, 64,
                    &args->b);
}

template <bool BACKWARD, bool SCALED>
static Status launch(CudaBackend *backend, const HopperMlp *mlp) {
    MlpProduct<BACKWARD, SCALED> product = {};
    TRY(make_args(backend, mlp, BACKWARD, &product));
    return launch_product(backend, &product);
}

bool hopper_mlp_takes(const CudaBackend *backend, const HopperMlp *mlp) {
    const uintptr_t bits = (uintptr_t)mlp->weight | (uintptr_t)mlp->in | (uintptr_t)mlp->gate_up |
                           (uintptr_t)mlp->activation | (uintptr_t)mlp->dgate_up;
    return backend->capability == 90 && backend->base.compute_dtype == DTYPE_BF16 &&
           mlp->hidden % TILE_K == 0 && mlp->inner % 8 == 0 && bits % 16 == 0 &&
           mlp->groups <= HOPPER_GROUPS_MAX && mlp->begin[mlp->groups] > 0 &&
           mlp->begin[mlp->groups] < INT32_MAX / 2;
}

int64_t hopper_mlp_partials(int64_t rows, int inner) {
    return rows * div_up(inner, TILE_COLUMNS);
}

Status hopper_mlp_forward(CudaBackend *backend, const HopperMlp *mlp) {
    return mlp->scale ? launch<false, true>(backend, mlp) : launch<false, false>(backend, mlp);
}

Status hopper_mlp_backward(CudaBackend *backend, const HopperMlp *mlp) {
    if (!mlp->scale) return launch<true, false>(backend, mlp);
    const int64_t rows = mlp->begin[mlp->groups];
    TRY((launch<true, true>(backend, mlp)));
    sum_partials_kernel<<<(unsigned)div_up(rows, 256), 256, 0, backend->stream>>>(
        rows, (int)div_up(mlp->inner, TILE_COLUMNS), mlp->partial, mlp->scale_index, mlp->dscale);
    LAUNCH_TRY(backend);
    return STATUS_OK;
}
