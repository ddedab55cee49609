// The matrix product of the kernels in hopper_mlp.cu: tiles, the warp that loads, the warpgroups
// that multiply, and the product in shared memory where they leave it.
#ifndef CUDA_HOPPER_PRODUCT_CUH
#define CUDA_HOPPER_PRODUCT_CUH

#include "cuda/hopper.cuh"
#include "cuda/hopper_mlp.h"

enum {
    BLOCK_ROWS = 128,
    CLUSTER = 2, // blocks; of clusters of four an H200 runs 30, which leaves a tenth of it idle
    CLUSTER_ROWS = CLUSTER * BLOCK_ROWS,
    TILE_COLUMNS = 256,
    TILE_K = 64, // 128 bytes: one row of the swizzle
    STAGES = 3,
    BOX_BYTES = 64 * TILE_K * 2, // 64 rows or 64 columns
    A_BYTES = 2 * BOX_BYTES,
    B_BYTES = 4 * BOX_BYTES,
    BOXES = 4 / CLUSTER, // of B that each block loads
    STAGE_BYTES = A_BYTES + B_BYTES,
    BLOCK_BYTES = BLOCK_ROWS * 128, // 64 columns of the product
    PRODUCT_BYTES = TILE_COLUMNS / 64 * BLOCK_BYTES,
    SHARED_BYTES = STAGES * STAGE_BYTES + PRODUCT_BYTES + 1024, // 1024: to align it
    // Warpgroups: 0 loads, 1 and 2 multiply, 3 does the elementwise part. Registers of each: at
    // most 128 on average, which is what every thread begins with.
    THREADS = 512,
    LOAD_REGISTERS = 24,
    MULTIPLY_REGISTERS = 160,
    ELEMENTWISE_REGISTERS = 168,
    WARP_ROWS = 32,   // of an elementwise warp
    AHEAD = 8,        // rows that it has on their way
    TILES_SHARED = 8, // of a cluster, where SMs are shared with collectives
    BAND = 8, // cluster tiles of rows that go through the columns together, for the L2 cache
};

typedef struct HopperArgs {
    CUtensorMap a, b;
    int groups, k_steps, tiles_n, tiles; // tiles: of all groups
    int inner, hidden;
    int begin[HOPPER_GROUPS_MAX + 1];
    int tile_begin[HOPPER_GROUPS_MAX + 1];
    const float *scale;
    const int32_t *scale_index;
    bf16 *gate_up, *activation, *dgate_up;
    float *partial; // (tiles_n, rows)
    int64_t rows;
} HopperArgs;

typedef struct Tile {
    int group, row, row_end, column_tile; // row: of the cluster's first
} Tile;

static __device__ __forceinline__ Tile tile_at(const HopperArgs &args, int index) {
    Tile tile = {};
    while (index >= args.tile_begin[tile.group + 1]) tile.group++;
    index -= args.tile_begin[tile.group];
    tile.row_end = args.begin[tile.group + 1];
    const int tiles_m =
        (args.tile_begin[tile.group + 1] - args.tile_begin[tile.group]) / args.tiles_n;
    const int band = index / (BAND * args.tiles_n), in_band = index % (BAND * args.tiles_n);
    const int height = min(BAND, tiles_m - band * BAND);
    tile.row = args.begin[tile.group] + (band * BAND + in_band % height) * CLUSTER_ROWS;
    tile.column_tile = in_band / height;
    return tile;
}

// --- The warp that loads -------------------------------------------------------------------------

// Where a stage is in the ring, and the parity of its phase.
typedef struct Ring {
    int stage;
    uint32_t phase;
} Ring;
static __device__ __forceinline__ void advance(Ring *ring) {
    if (++ring->stage < STAGES) return;
    ring->stage = 0;
    ring->phase ^= 1;
}

typedef struct BoxPlace {
    int column, row;
} BoxPlace;

// The box of the weight that is quarter `box` of the tile's columns. Forward, (2I, H): 64 gate rows
// or, the third and fourth, 64 up rows. Backward, (H, I): 64 columns.
template <bool BACKWARD>
static __device__ __forceinline__ BoxPlace box_of_b(const HopperArgs &args, const Tile &tile,
                                                    int box, int step) {
    if (BACKWARD)
        return BoxPlace{tile.column_tile * TILE_COLUMNS + box * 64,
                        tile.group * args.hidden + step * TILE_K};
    return BoxPlace{step * TILE_K, (2 * tile.group + box / 2) * args.inner +
                                       tile.column_tile * TILE_COLUMNS / 2 + box % 2 * 64};
}

template <bool BACKWARD>
static __device__ __forceinline__ void load_tiles(const HopperArgs &args, uint32_t tiles,
                                                  uint32_t full, uint32_t empty, int rank) {
    Ring ring = {0, 1}; // the stages begin empty
    for (int index = blockIdx.x / CLUSTER; index < args.tiles; index += gridDim.x / CLUSTER) {
        const Tile tile = tile_at(args, index);
        const int row = tile.row + rank * BLOCK_ROWS;
        for (int step = 0; step < args.k_steps; step++, advance(&ring)) {
            const uint32_t at = tiles + ring.stage * STAGE_BYTES;
            const uint32_t loaded = full + 8 * ring.stage;
            barrier_wait(empty + 8 * ring.stage, ring.phase);
            barrier_expect(loaded, STAGE_BYTES);
            copy_box(at, &args.a, step * TILE_K, row, loaded);
#pragma unroll
            for (int i = 0; i < BOXES; i++) {
                const int box = rank * BOXES + i;
                const BoxPlace from = box_of_b<BACKWARD>(args, tile, box, step);
                copy_box_to_all(at + A_BYTES + box * BOX_BYTES, &args.b, from.column, from.row,
                                loaded, (1 << CLUSTER) - 1);
            }
        }
    }
}

// --- The warpgroups that multiply ----------------------------------------------------------------

static __device__ __forceinline__ void give_back(uint32_t empty) {
#pragma unroll
    for (int block = 0; block < CLUSTER; block++) barrier_arrive(empty, block);
}

// c = the tile's product for this warpgroup's 64 rows. A stage is handed back to all loaders once
// the products that read it are over, one step later.
template <bool B_ROWS>
static __device__ __forceinline__ void multiply(float (&c)[128], int k_steps, Ring *ring,
                                                uint32_t tiles, uint32_t full, uint32_t empty,
                                                int warpgroup, bool speaker) {
    int last = -1;
    for (int step = 0; step < k_steps; step++) {
        const uint32_t a = tiles + ring->stage * STAGE_BYTES + warpgroup * BOX_BYTES;
        const uint32_t b = tiles + ring->stage * STAGE_BYTES + A_BYTES;
        barrier_wait(full + 8 * ring->stage, ring->phase);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < TILE_K / 16; k++) {
            const uint64_t left = tile_descriptor(a + 32 * k, 1024, 16);
#pragma unroll
            for (int half = 0; half < 2; half++) { // n = 256 needs more registers at the start
                const uint32_t at = b + half * B_BYTES / 2 + (B_ROWS ? 2048 : 32) * k;
                wgmma_64x128<B_ROWS>(c + 64 * half, left,
                                     tile_descriptor(at, 1024, B_ROWS ? BOX_BYTES : 16),
                                     step > 0 || k > 0);
            }
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (last >= 0 && speaker) give_back(empty + 8 * last);
        last = ring->stage;
        advance(ring);
    }
    wgmma_wait<0>();
    if (speaker) give_back(empty + 8 * last);
}

// --- The product in shared memory ------------------------------------------------------------

// Four blocks of 64 columns; a block is 128 rows of 128 bytes, swizzled. Four multiplying warps
// fill 64 rows, two others empty them.
typedef struct Handover {
    uint32_t filled, emptied; // barriers of these 64 rows, one arrival per warp
    uint32_t place;           // of the warp's own rows
    uint32_t phase;
} Handover;

static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&both);
}

static __device__ __forceinline__ void hand_over(const float (&c)[128], Handover *h, int lane) {
    const int row = (lane & 7) + (lane >> 3 & 1) * 8;
    const uint32_t place = h->place + row * 128 + (((lane >> 4) ^ (row & 7)) << 4);
    barrier_wait(h->emptied, h->phase ^ 1);
#pragma unroll
    for (int pair = 0; pair < 16; pair++) { // of chunks of 8 columns
        const float *from = &c[8 * pair];
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(
                         (place ^ (pair & 3) << 5) + (pair >> 2) * BLOCK_BYTES),
                     "r"(pack(from[0], from[1])), "r"(pack(from[2], from[3])),
                     "r"(pack(from[4], from[5])), "r"(pack(from[6], from[7]))
                     : "memory");
    }
    __syncwarp();
    if (lane == 0) barrier_arrive_here(h->filled);
    h->phase ^= 1;
}

// 8 columns of one row.
typedef struct Line {
    uint32_t v[4];
} Line;

// Row `row` of the warp's rows, chunk `chunk` of the tile's 32.
static __device__ __forceinline__ Line take(const Handover &h, int row, int chunk) {
    Line line;
    asm volatile(
        "ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
        : "=r"(line.v[0]), "=r"(line.v[1]), "=r"(line.v[2]), "=r"(line.v[3])
        : "r"(h.place + row * 128 + chunk / 8 * BLOCK_BYTES + ((chunk % 8 ^ (row & 7)) << 4)));
    return line;
}
static __device__ __forceinline__ float2 unpack(uint32_t both) {
    return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
}

#endif
