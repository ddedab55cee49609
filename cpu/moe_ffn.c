// The expert MLPs, dropless and without padding.
//
// Rows (token, choice) stand grouped by expert, so that each expert's products run on a contiguous
// block of exactly its rows. The gate is put into the activation, A' = g·silu(gate)·up: the down
// product then gives the weighted output directly, and out[t] is the plain sum of t's rows, found
// through row_of_slot, without atomics. Backward, with d' = doutᵀ's rows times down:
//   dgate_value = Σ d'·silu(gate)·up,   d(gate), d(up) from g·d',   grad_down += doutᵀ·A'
// so the expert outputs need not be kept.
#include "cpu/cpu.h"
#include "cpu/gemm.h"
#include "cpu/rows.h"
#include "cpu/swiglu.h"

// The rows of all experts cut into pieces of nearly equal size that never mix experts, and the
// columns of a product into `across` parts: tile i is part i % across of piece i / across.
typedef struct ExpertGrid {
    int64_t columns, across, pieces;
    int64_t *begin;  // (pieces + 1) first row of each piece
    int32_t *expert; // (pieces)
} ExpertGrid;

typedef struct MoeScratch {
    float *x;          // (R, H) rows of x by expert; R = T*k
    float *activation; // (R, I) with the gate inside
    float *rows;       // (R, H) forward: weighted expert outputs; backward: dx by row
    float *dout;       // (R, H) rows of dout by expert
    float *dgate_up;   // (R, 2I)
    float *dgate;      // (R, inner.across) partial sums over the tiles of I
    ExpertGrid inner;  // tiles of (R, I)
    ExpertGrid hidden; // tiles of (R, H)
} MoeScratch;

static int64_t row_count(const MoeFfnArgs *args) {
    return args->tokens * args->top_k;
}

// The shape alone decides how many parts there are; the routing, in expert_grid_fill, what they
// are.
static void expert_grid_layout(const Backend *backend, const MoeFfnArgs *args, int64_t columns,
                               Workspace *workspace, ExpertGrid *out) {
    const TileGrid grid = tile_grid(backend->num_threads, row_count(args), columns);
    const size_t most =
        (size_t)(args->num_experts + tile_grid_most(backend->num_threads, columns).down);
    out->columns = columns;
    out->across = grid.across;
    out->pieces = grid.down;
    out->begin = workspace_take(workspace, (most + 1) * sizeof *out->begin);
    out->expert = workspace_take(workspace, most * sizeof *out->expert);
}

// Cuts at the experts' borders and at those of `pieces` equal parts of all rows.
static void expert_grid_fill(const MoeFfnArgs *args, ExpertGrid *grid) {
    const int64_t rows = row_count(args), parts = grid->pieces;
    int64_t pieces = 0, part = 0;
    for (int e = 0; e < args->num_experts; e++) {
        int64_t row = args->routing.expert_begin[e];
        const int64_t end = args->routing.expert_begin[e + 1];
        while (row < end) {
            while (part_begin(rows, parts, part + 1) <= row) part++;
            grid->begin[pieces] = row;
            grid->expert[pieces++] = e;
            row = min_i64(end, part_begin(rows, parts, part + 1));
        }
    }
    grid->begin[pieces] = rows;
    grid->pieces = pieces;
}

static Tile expert_tile(const ExpertGrid *grid, int64_t index, int *expert) {
    const int64_t piece = index / grid->across, part = index % grid->across;
    Tile tile;
    *expert = grid->expert[piece];
    tile.row = grid->begin[piece];
    tile.rows = grid->begin[piece + 1] - tile.row;
    tile.column = part_begin(grid->columns, grid->across, part);
    tile.columns = part_begin(grid->columns, grid->across, part + 1) - tile.column;
    return tile;
}

static void moe_layout(const Backend *backend, const MoeFfnArgs *args, Workspace *workspace,
                       MoeScratch *out) {
    const int64_t rows = row_count(args), hidden = args->hidden_size;
    const int64_t inner = args->intermediate_size;
    expert_grid_layout(backend, args, inner, workspace, &out->inner);
    expert_grid_layout(backend, args, hidden, workspace, &out->hidden);
    out->x = workspace_floats(workspace, rows * hidden);
    out->activation = workspace_floats(workspace, rows * inner);
    out->rows = workspace_floats(workspace, rows * hidden);
    out->dout = workspace_floats(workspace, rows * hidden);
    out->dgate_up = workspace_floats(workspace, rows * 2 * inner);
    out->dgate =
        workspace_floats(workspace, rows * tile_grid_most(backend->num_threads, inner).across);
}

size_t cpu_moe_ffn_workspace(const Backend *backend, const MoeFfnArgs *args) {
    Workspace counter = {NULL, 0};
    MoeScratch unused;
    moe_layout(backend, args, &counter, &unused);
    return counter.used;
}

static const float *expert_gate_up(const MoeFfnArgs *args, int expert) {
    return (const float *)args->weight_gate_up +
           (int64_t)expert * 2 * args->intermediate_size * args->hidden_size;
}

static const float *expert_down(const MoeFfnArgs *args, int expert) {
    return (const float *)args->weight_down +
           (int64_t)expert * args->hidden_size * args->intermediate_size;
}

// to[row] = from[token of row] for part `p` of the rows, cut into `parts`.
static void gather_part(const MoeFfnArgs *args, const float *from, int parts, int p, float *to) {
    const GatherRowsArgs rows = {.rows = row_count(args),
                                 .row_bytes = args->hidden_size * (int64_t)sizeof(float),
                                 .divisor = args->top_k,
                                 .index = args->routing.slot_of_row,
                                 .in = from,
                                 .out = to};
    gather_rows(&rows, part_begin(rows.rows, parts, p), part_begin(rows.rows, parts, p + 1));
}

static CombineRowsArgs combine_of(const MoeFfnArgs *args, const MoeScratch *scratch, void *out) {
    return (CombineRowsArgs){.tokens = args->tokens,
                             .hidden_size = args->hidden_size,
                             .top_k = args->top_k,
                             .row_of_slot = args->routing.row_of_slot,
                             .rows = scratch->rows,
                             .out = out};
}

static void forward_inner_tile(const MoeFfnArgs *args, const MoeScratch *scratch, int expert,
                               const Tile *tile) {
    const int64_t hidden = args->hidden_size, inner = args->intermediate_size;
    const float *x = scratch->x + tile->row * hidden;
    const float *weight = expert_gate_up(args, expert) + tile->column * hidden;
    float *gate = (float *)args->gate_up + tile->row * 2 * inner + tile->column;
    if (tile->columns == inner) { // gate and up are one matrix
        gemm_nt(tile->rows, 2 * inner, hidden, 1.0f, x, hidden, weight, hidden, 0.0f, gate,
                2 * inner);
    } else {
        gemm_nt(tile->rows, tile->columns, hidden, 1.0f, x, hidden, weight, hidden, 0.0f, gate,
                2 * inner);
        gemm_nt(tile->rows, tile->columns, hidden, 1.0f, x, hidden, weight + inner * hidden, hidden,
                0.0f, gate + inner, 2 * inner);
    }
    if (!args->out) return;
    for (int64_t r = 0; r < tile->rows; r++) {
        const float weight_of_row = args->routing.gate[args->routing.slot_of_row[tile->row + r]];
        swiglu_forward_row(gate + r * 2 * inner, gate + r * 2 * inner + inner, weight_of_row,
                           tile->columns,
                           scratch->activation + (tile->row + r) * inner + tile->column);
    }
}

Status cpu_moe_ffn_forward(Backend *backend, const MoeFfnArgs *args) {
    Workspace workspace = workspace_open(backend);
    MoeScratch scratch;
    moe_layout(backend, args, &workspace, &scratch);
    WORKSPACE_FITS(backend, workspace);
    const int64_t hidden = args->hidden_size, inner = args->intermediate_size;
    const int parts = backend->num_threads;
    expert_grid_fill(args, &scratch.inner);
    expert_grid_fill(args, &scratch.hidden);
    const int64_t inner_tiles = scratch.inner.pieces * scratch.inner.across;
    // Without out (NULL) only gate_up is wanted: the second half has no tiles and no tokens.
    const int64_t hidden_tiles = args->out ? scratch.hidden.pieces * scratch.hidden.across : 0;
    const int64_t combined = args->out ? args->tokens : 0;
    const CombineRowsArgs combine = combine_of(args, &scratch, args->out);
#pragma omp parallel num_threads(parts)
    {
#pragma omp for schedule(static)
        for (int p = 0; p < parts; p++) gather_part(args, args->x, parts, p, scratch.x);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < inner_tiles; i++) {
            int expert;
            const Tile tile = expert_tile(&scratch.inner, i, &expert);
            forward_inner_tile(args, &scratch, expert, &tile);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < hidden_tiles; i++) {
            int expert;
            const Tile tile = expert_tile(&scratch.hidden, i, &expert);
            gemm_nt(tile.rows, tile.columns, inner, 1.0f, scratch.activation + tile.row * inner,
                    inner, expert_down(args, expert) + tile.column * inner, inner, 0.0f,
                    scratch.rows + tile.row * hidden + tile.column, hidden);
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < combined; t++) combine_token(&combine, t);
    }
    return STATUS_OK;
}

// dgate_up, the activation and this tile's share of dgate.
static void backward_inner_tile(const MoeFfnArgs *args, const MoeScratch *scratch, int expert,
                                const Tile *tile, int64_t part) {
    const int64_t hidden = args->hidden_size, inner = args->intermediate_size;
    const float *gate = (const float *)args->gate_up + tile->row * 2 * inner + tile->column;
    float *dgate = scratch->dgate_up + tile->row * 2 * inner + tile->column;
    gemm_nn(tile->rows, tile->columns, hidden, 1.0f, scratch->dout + tile->row * hidden, hidden,
            expert_down(args, expert) + tile->column, inner, 0.0f, dgate, 2 * inner);
    for (int64_t r = 0; r < tile->rows; r++) {
        const int64_t row = tile->row + r;
        const float weight = args->routing.gate[args->routing.slot_of_row[row]];
        float *d = dgate + r * 2 * inner;
        scratch->dgate[row * scratch->inner.across + part] = swiglu_backward_row(
            gate + r * 2 * inner, gate + r * 2 * inner + inner, weight, tile->columns, d, d,
            d + inner, scratch->activation + row * inner + tile->column);
    }
}

typedef struct LastGrids {
    TileGrid gate_up, down; // of one expert's weight gradients
    int64_t count;          // tiles of all experts and of dx
} LastGrids;

// The products that need dgate_up and the activation complete: both weight gradients of every
// expert, then dx by row.
static void last_product_tile(const MoeFfnArgs *args, const MoeScratch *scratch,
                              const LastGrids *grids, int64_t index) {
    const int64_t hidden = args->hidden_size, inner = args->intermediate_size;
    const int64_t per_expert = grids->gate_up.count + grids->down.count;
    if (index >= per_expert * args->num_experts) {
        int expert;
        const Tile tile =
            expert_tile(&scratch->hidden, index - per_expert * args->num_experts, &expert);
        gemm_nn(tile.rows, tile.columns, 2 * inner, 1.0f, scratch->dgate_up + tile.row * 2 * inner,
                2 * inner, expert_gate_up(args, expert) + tile.column, hidden, 0.0f,
                scratch->rows + tile.row * hidden + tile.column, hidden);
        return;
    }
    const int64_t expert = index / per_expert, begin = args->routing.expert_begin[expert];
    const int64_t rows = args->routing.expert_begin[expert + 1] - begin;
    const float beta = args->grad_assign ? 0.0f : 1.0f; // a sum over no rows is 0
    index %= per_expert;
    if (index < grids->gate_up.count) {
        const Tile tile = tile_at(&grids->gate_up, index);
        gemm_tn(
            tile.rows, tile.columns, rows, 1.0f, scratch->dgate_up + begin * 2 * inner + tile.row,
            2 * inner, scratch->x + begin * hidden + tile.column, hidden, beta,
            (float *)args->grad_gate_up + (expert * 2 * inner + tile.row) * hidden + tile.column,
            hidden);
        return;
    }
    const Tile tile = tile_at(&grids->down, index - grids->gate_up.count);
    gemm_tn(tile.rows, tile.columns, rows, 1.0f, scratch->dout + begin * hidden + tile.row, hidden,
            scratch->activation + begin * inner + tile.column, inner, beta,
            (float *)args->grad_down + (expert * hidden + tile.row) * inner + tile.column, inner);
}

// dx and dgate of one token from its rows.
static void finish_token(const MoeFfnArgs *args, const MoeScratch *scratch, int64_t t) {
    const int64_t across = scratch->inner.across;
    const CombineRowsArgs combine = combine_of(args, scratch, args->dx);
    combine_token(&combine, t);
    for (int j = 0; j < args->top_k; j++) {
        const int64_t slot = t * args->top_k + j;
        const float *partial = scratch->dgate + args->routing.row_of_slot[slot] * across;
        double sum = 0;
        for (int64_t i = 0; i < across; i++) sum += partial[i];
        args->dgate[slot] = (float)sum;
    }
}

Status cpu_moe_ffn_backward(Backend *backend, const MoeFfnArgs *args) {
    Workspace workspace = workspace_open(backend);
    MoeScratch scratch;
    moe_layout(backend, args, &workspace, &scratch);
    WORKSPACE_FITS(backend, workspace);
    const int64_t hidden = args->hidden_size, inner = args->intermediate_size;
    const int parts = backend->num_threads, experts = args->num_experts;
    expert_grid_fill(args, &scratch.inner);
    expert_grid_fill(args, &scratch.hidden);
    const int64_t inner_tiles = scratch.inner.pieces * scratch.inner.across;
    LastGrids last = {tile_grid(parts, 2 * inner, hidden), tile_grid(parts, hidden, inner), 0};
    last.count = (last.gate_up.count + last.down.count) * experts +
                 scratch.hidden.pieces * scratch.hidden.across;
#pragma omp parallel num_threads(parts)
    {
#pragma omp for schedule(static)
        for (int p = 0; p < parts; p++) {
            gather_part(args, args->x, parts, p, scratch.x);
            gather_part(args, args->dout, parts, p, scratch.dout);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < inner_tiles; i++) {
            int expert;
            const Tile tile = expert_tile(&scratch.inner, i, &expert);
            backward_inner_tile(args, &scratch, expert, &tile, i % scratch.inner.across);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < last.count; i++) last_product_tile(args, &scratch, &last, i);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < args->tokens; t++) finish_token(args, &scratch, t);
    }
    return STATUS_OK;
}
