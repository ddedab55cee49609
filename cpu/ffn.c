// Dense SwiGLU MLP. The elementwise step follows each tile's product while the tile is in cache.
#include "cpu/cpu.h"
#include "cpu/gemm.h"
#include "cpu/swiglu.h"

typedef struct FfnScratch {
    float *activation; // (T, I) when the caller keeps none
    float *dgate_up;   // (T, 2I) backward
} FfnScratch;

static void ffn_layout(const FfnArgs *args, Workspace *workspace, FfnScratch *out) {
    const int64_t elements = args->tokens * args->intermediate_size;
    out->activation = workspace_floats(workspace, elements);
    out->dgate_up = workspace_floats(workspace, 2 * elements);
}

size_t cpu_ffn_workspace(const Backend *backend, const FfnArgs *args) {
    (void)backend;
    Workspace counter = {NULL, 0};
    FfnScratch unused;
    ffn_layout(args, &counter, &unused);
    return counter.used;
}

// gate_up and activation of one tile of (T, I).
static void gate_up_tile(const FfnArgs *args, const Tile *tile, float *activation) {
    const int64_t hidden = args->hidden_size, inner = args->intermediate_size;
    const float *x = (const float *)args->x + tile->row * hidden;
    const float *weight = (const float *)args->weight_gate_up + tile->column * hidden;
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
    if (!args->out && !args->activation) return;
    for (int64_t r = 0; r < tile->rows; r++)
        swiglu_forward_row(gate + r * 2 * inner, gate + r * 2 * inner + inner, 1.0f, tile->columns,
                           activation + (tile->row + r) * inner + tile->column);
}

Status cpu_ffn_forward(Backend *backend, const FfnArgs *args) {
    Workspace workspace = workspace_open(backend);
    FfnScratch scratch;
    ffn_layout(args, &workspace, &scratch);
    WORKSPACE_FITS(backend, workspace);
    const int64_t hidden = args->hidden_size, inner = args->intermediate_size;
    float *activation = args->activation ? args->activation : scratch.activation;
    const float *down = args->weight_down;
    float *out = args->out; // NULL: gate_up and activation only
    const TileGrid inner_grid = tile_grid(backend->num_threads, args->tokens, inner);
    const TileGrid out_grid = tile_grid(backend->num_threads, args->tokens, out ? hidden : 0);
#pragma omp parallel num_threads(backend->num_threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < inner_grid.count; i++) {
            const Tile tile = tile_at(&inner_grid, i);
            gate_up_tile(args, &tile, activation);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < out_grid.count; i++) {
            const Tile tile = tile_at(&out_grid, i);
            gemm_nt(tile.rows, tile.columns, inner, 1.0f, activation + tile.row * inner, inner,
                    down + tile.column * inner, inner, 0.0f, out + tile.row * hidden + tile.column,
                    hidden);
        }
    }
    return STATUS_OK;
}

// dgate_up of one tile of (T, I), and the activation when `activation` is not NULL.
static void dgate_up_tile(const FfnArgs *args, const Tile *tile, float *dgate_up,
                          float *activation) {
    const int64_t hidden = args->hidden_size, inner = args->intermediate_size;
    const float *gate = (const float *)args->gate_up + tile->row * 2 * inner + tile->column;
    float *dgate = dgate_up + tile->row * 2 * inner + tile->column;
    gemm_nn(tile->rows, tile->columns, hidden, 1.0f, (const float *)args->dout + tile->row * hidden,
            hidden, (const float *)args->weight_down + tile->column, inner, 0.0f, dgate, 2 * inner);
    for (int64_t r = 0; r < tile->rows; r++) {
        float *kept = activation ? activation + (tile->row + r) * inner + tile->column : NULL;
        float *row = dgate + r * 2 * inner;
        swiglu_backward_row(gate + r * 2 * inner, gate + r * 2 * inner + inner, 1.0f, tile->columns,
                            row, row, row + inner, kept);
    }
}

// The three products that need dgate_up and the activation complete.
static void last_product_tile(const FfnArgs *args, const TileGrid grids[3], int64_t index,
                              const float *dgate_up, const float *activation) {
    const int64_t tokens = args->tokens, hidden = args->hidden_size;
    const int64_t inner = args->intermediate_size;
    const float beta = args->grad_assign ? 0.0f : 1.0f;
    if (index < grids[0].count) {
        const Tile tile = tile_at(&grids[0], index);
        gemm_tn(tile.rows, tile.columns, tokens, 1.0f, dgate_up + tile.row, 2 * inner,
                (const float *)args->x + tile.column, hidden, beta,
                (float *)args->grad_gate_up + tile.row * hidden + tile.column, hidden);
        return;
    }
    index -= grids[0].count;
    if (index < grids[1].count) {
        const Tile tile = tile_at(&grids[1], index);
        gemm_tn(tile.rows, tile.columns, tokens, 1.0f, (const float *)args->dout + tile.row, hidden,
                activation + tile.column, inner, beta,
                (float *)args->grad_down + tile.row * inner + tile.column, inner);
        return;
    }
    const Tile tile = tile_at(&grids[2], index - grids[1].count);
    gemm_nn(tile.rows, tile.columns, 2 * inner, 1.0f, dgate_up + tile.row * 2 * inner, 2 * inner,
            (const float *)args->weight_gate_up + tile.column, hidden, 0.0f,
            (float *)args->dx + tile.row * hidden + tile.column, hidden);
}

Status cpu_ffn_backward(Backend *backend, const FfnArgs *args) {
    Workspace workspace = workspace_open(backend);
    FfnScratch scratch;
    ffn_layout(args, &workspace, &scratch);
    WORKSPACE_FITS(backend, workspace);
    const int64_t hidden = args->hidden_size, inner = args->intermediate_size;
    const int threads = backend->num_threads;
    float *recomputed = args->activation ? NULL : scratch.activation;
    const float *activation = args->activation ? args->activation : scratch.activation;
    const TileGrid inner_grid = tile_grid(threads, args->tokens, inner);
    const TileGrid last[3] = {tile_grid(threads, 2 * inner, hidden),
                              tile_grid(threads, hidden, inner),
                              tile_grid(threads, args->tokens, hidden)};
    const int64_t last_count = last[0].count + last[1].count + last[2].count;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < inner_grid.count; i++) {
            const Tile tile = tile_at(&inner_grid, i);
            dgate_up_tile(args, &tile, scratch.dgate_up, recomputed);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < last_count; i++)
            last_product_tile(args, last, i, scratch.dgate_up, activation);
    }
    return STATUS_OK;
}
