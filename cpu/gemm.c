#include "cpu/gemm.h"
#include <cblas.h>
#include <math.h>
#include <omp.h>
#include "cpu/cpu.h"

static void gemm(CBLAS_TRANSPOSE trans_a, CBLAS_TRANSPOSE trans_b, int64_t m, int64_t n, int64_t k,
                 float alpha, const float *a, int64_t lda, const float *b, int64_t ldb, float beta,
                 float *c, int64_t ldc) {
    if (m == 0 || n == 0) return;
    // OpenBLAS on OpenMP asks this, and otherwise starts its own team where ours has one thread.
    // Holds for the calling thread's part of the parallel region only.
    omp_set_num_threads(1);
    cblas_sgemm(CblasRowMajor, trans_a, trans_b, (blasint)m, (blasint)n, (blasint)k, alpha, a,
                (blasint)lda, b, (blasint)ldb, beta, c, (blasint)ldc);
}

void gemm_nt(int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
             const float *b, int64_t ldb, float beta, float *c, int64_t ldc) {
    gemm(CblasNoTrans, CblasTrans, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void gemm_nn(int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
             const float *b, int64_t ldb, float beta, float *c, int64_t ldc) {
    gemm(CblasNoTrans, CblasNoTrans, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void gemm_tn(int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
             const float *b, int64_t ldb, float beta, float *c, int64_t ldc) {
    gemm(CblasTrans, CblasNoTrans, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void gemm_use_one_thread(void) {
    const int before = omp_get_max_threads(); // which OpenBLAS on OpenMP overwrites
    openblas_set_num_threads(1);
    omp_set_num_threads(before);
}

// OpenBLAS copies both operands of a product into packed panels. A tile of r x c outputs packs r +
// c vectors of length k for its r·c·k multiply-adds, so few, large, nearly square tiles are best:
// with 256 x 1536 tiles instead of 1024 x 1536 the MLP of the quickstart model runs 6 % slower.
// Outputs beyond TILE_AREA per thread are cut further, so that a thread that is held up gets fewer
// tiles.
enum { TILE_AREA = 2 << 20, ROUNDS_MAX = 8, TILE_ROWS_MIN = 32, TILE_COLUMNS_MIN = 64 };
// Cycles per element of k: a multiply-add takes 1/16 on a core with two 256-bit FMA units, packing
// an element 2 (measured: a tenth of the time at 1024 x 1536).
static const double pack_cost = 2.0, multiply_cost = 1.0 / 16;

static double grid_cost(const TileGrid *grid, int threads) {
    const double rows = (double)divide_up(grid->rows, grid->down);
    const double columns = (double)divide_up(grid->columns, grid->across);
    const double rounds = (double)divide_up(grid->down * grid->across, threads);
    return rounds * (rows * columns * multiply_cost + (rows + columns) * pack_cost);
}

TileGrid tile_grid(int threads, int64_t rows, int64_t columns) {
    TileGrid best = {rows, columns, 0, 0, 0};
    if (rows == 0 || columns == 0) return best;
    const int64_t rounds =
        min_i64(divide_up(rows * columns, TILE_AREA * (int64_t)threads), ROUNDS_MAX);
    const int64_t wanted = rounds * threads;
    double lowest = INFINITY;
    for (int64_t down = min_i64(wanted, divide_up(rows, TILE_ROWS_MIN)); down >= 1; down--) {
        TileGrid grid = {rows, columns, down, 0, 0};
        grid.across = min_i64(divide_up(wanted, down), divide_up(columns, TILE_COLUMNS_MIN));
        const double cost = grid_cost(&grid, threads);
        if (cost < lowest) {
            lowest = cost;
            best = grid;
        }
    }
    best.count = best.down * best.across;
    return best;
}

TileGrid tile_grid_most(int threads, int64_t columns) {
    return (TileGrid){.columns = columns,
                      .down = (int64_t)threads * ROUNDS_MAX,
                      .across = divide_up(columns, TILE_COLUMNS_MIN)};
}

Tile tile_at(const TileGrid *grid, int64_t index) {
    int64_t down = index / grid->across, across = index % grid->across;
    Tile tile;
    tile.row = part_begin(grid->rows, grid->down, down);
    tile.rows = part_begin(grid->rows, grid->down, down + 1) - tile.row;
    tile.column = part_begin(grid->columns, grid->across, across);
    tile.columns = part_begin(grid->columns, grid->across, across + 1) - tile.column;
    return tile;
}
