// Matrix products on row-major operands with leading dimensions, and the tiles they are cut into.
//
// OpenBLAS does the arithmetic on the calling thread; parallel ops give each thread whole tiles of
// the output. Against OpenBLAS's own threads this costs nothing in speed (202-217 GFLOP/s either
// way on 2 cores of Zen 4, of a peak of 217), lets an op follow a tile's product with its
// elementwise work while the tile is in cache, and serves the unequal products of a
// mixture of experts with one loop.
#ifndef CPU_GEMM_H
#define CPU_GEMM_H

#include <stdint.h>

// c (m, n) = alpha·a·b + beta·c; with beta = 0, c is not read. To be called in a parallel region.
// nt: a (m, k), b (n, k) transposed    nn: a (m, k), b (k, n)    tn: a (k, m) transposed, b (k, n)
// Sizes may be 0: an empty product is 0.
void gemm_nt(int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
             const float *b, int64_t ldb, float beta, float *c, int64_t ldc);
void gemm_nn(int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
             const float *b, int64_t ldb, float beta, float *c, int64_t ldc);
void gemm_tn(int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
             const float *b, int64_t ldb, float beta, float *c, int64_t ldc);

// To be called once before any product: keeps OpenBLAS on the calling thread.
void gemm_use_one_thread(void);

// An output of rows x columns cut into count = down·across tiles, numbered row by row.
typedef struct TileGrid {
    int64_t rows, columns;
    int64_t down, across, count;
} TileGrid;

typedef struct Tile {
    int64_t row, rows, column, columns;
} Tile;

// Tiles that are large enough for OpenBLAS to run near its peak and, where the output allows, many
// enough to keep `threads` threads busy.
TileGrid tile_grid(int threads, int64_t rows, int64_t columns);
// The most that tile_grid cuts a matrix of any number of rows into: for memory that must not shrink
// as rows are added, which `across` does.
TileGrid tile_grid_most(int threads, int64_t columns);
Tile tile_at(const TileGrid *grid, int64_t index);

#endif
