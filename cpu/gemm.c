#include "cpu/gemm.h"
#include <cblas.h>
#include "cpu/cpu.h"

static void gemm(CBLAS_TRANSPOSE trans_a, CBLAS_TRANSPOSE trans_b, int64_t m, int64_t n, int64_t k,
                 float alpha, const float *a, int64_t lda, const float *b, int64_t ldb, float beta,
                 float *c, int64_t ldc) {
    if (m == 0 || n == 0) return;
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
    openblas_set_num_threads(1);
}

// Measured on Zen 4 (README of the numbers: tests/bench_ops.c): 256 rows reach 95 % of what one
// large product does; narrower column tiles than 512 lose 10 %.
enum { TILE_ROWS = 256, TILE_COLUMNS = 2048, TILE_ROWS_MIN = 64, TILE_COLUMNS_MIN = 128 };

TileGrid tile_grid(int threads, int64_t rows, int64_t columns) {
    TileGrid grid = {rows, columns, 0, 0, 0};
    if (rows == 0 || columns == 0) return grid;
    grid.across = divide_up(columns, TILE_COLUMNS);
    // A multiple of the team, so that equal tiles end together.
    int64_t down = divide_up(divide_up(rows, TILE_ROWS), threads) * threads;
    grid.down = min_i64(down, divide_up(rows, TILE_ROWS_MIN));
    if (grid.down * grid.across < threads) {
        int64_t enough = divide_up(threads, grid.down);
        grid.across = max_i64(grid.across, min_i64(enough, divide_up(columns, TILE_COLUMNS_MIN)));
    }
    grid.count = grid.down * grid.across;
    return grid;
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
