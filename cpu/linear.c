// Linear layer. Forward adds the bias to a tile while it is in cache; backward runs the products
// for dx and for the weights as one list of tiles.
#include "cpu/cpu.h"
#include "cpu/gemm.h"

static void add_bias(float *out, int64_t stride, int64_t rows, int64_t columns, const float *bias) {
    for (int64_t r = 0; r < rows; r++) {
        float *row = out + r * stride;
#pragma omp simd
        for (int64_t c = 0; c < columns; c++) row[c] += bias[c];
    }
}

Status cpu_linear_forward(Backend *backend, const LinearArgs *args) {
    const int64_t in = args->in_features, out_features = args->out_features;
    const float *x = args->x, *weight = args->weight, *bias = args->bias;
    float *out = args->out;
    const TileGrid grid = tile_grid(backend->num_threads, args->tokens, out_features);
#pragma omp parallel for num_threads(backend->num_threads) schedule(dynamic)
    for (int64_t i = 0; i < grid.count; i++) {
        const Tile tile = tile_at(&grid, i);
        float *to = out + tile.row * out_features + tile.column;
        gemm_nt(tile.rows, tile.columns, in, 1.0f, x + tile.row * in, in, weight + tile.column * in,
                in, 0.0f, to, out_features);
        if (bias) add_bias(to, out_features, tile.rows, tile.columns, bias + tile.column);
    }
    return STATUS_OK;
}

// grad_bias[c] += Σ_t dout[t, c] for the columns [begin, end), in double and token order.
enum { BIAS_COLUMNS = 32 };
static void add_column_sums(const LinearArgs *args, int64_t begin, int64_t end) {
    const float *dout = args->dout;
    float *grad_bias = args->grad_bias;
    for (int64_t column = begin; column < end; column += BIAS_COLUMNS) {
        const int64_t width = min_i64(BIAS_COLUMNS, end - column);
        double sums[BIAS_COLUMNS] = {0};
        for (int64_t t = 0; t < args->tokens; t++) {
            const float *row = dout + t * args->out_features + column;
#pragma omp simd
            for (int64_t c = 0; c < width; c++) sums[c] += row[c];
        }
        for (int64_t c = 0; c < width; c++) grad_bias[column + c] += (float)sums[c];
    }
}

static void weight_gradient_tile(const LinearArgs *args, const Tile *tile) {
    const int64_t in = args->in_features, out_features = args->out_features;
    const float *x = args->x, *dout = args->dout;
    float *grad_weight = args->grad_weight;
    gemm_tn(tile->rows, tile->columns, args->tokens, 1.0f, dout + tile->row, out_features,
            x + tile->column, in, args->grad_assign ? 0.0f : 1.0f,
            grad_weight + tile->row * in + tile->column, in);
    if (args->bias && tile->column == 0) // the first of a row of tiles also does the bias
        add_column_sums(args, tile->row, tile->row + tile->rows);
}

Status cpu_linear_backward(Backend *backend, const LinearArgs *args) {
    const int64_t in = args->in_features, out_features = args->out_features;
    const float *dout = args->dout, *weight = args->weight;
    float *dx = args->dx;
    const TileGrid weights = tile_grid(backend->num_threads, out_features, in);
    const TileGrid inputs = tile_grid(backend->num_threads, dx ? args->tokens : 0, in);
#pragma omp parallel for num_threads(backend->num_threads) schedule(dynamic)
    for (int64_t i = 0; i < weights.count + inputs.count; i++) {
        if (i < weights.count) {
            const Tile tile = tile_at(&weights, i);
            weight_gradient_tile(args, &tile);
            continue;
        }
        const Tile tile = tile_at(&inputs, i - weights.count);
        gemm_nn(tile.rows, tile.columns, out_features, 1.0f, dout + tile.row * out_features,
                out_features, weight + tile.column, in, args->dx_accumulate ? 1.0f : 0.0f,
                dx + tile.row * in + tile.column, in);
    }
    return STATUS_OK;
}
