// The matrix product of the kernels in hopper_*.cu: tiles, the warp that loads, the warpgroups that
// multiply, and the product in shared memory where they leave it to the warpgroup that finishes it.
//
// A block stays on its SM while there are tiles and has three kinds of warps. One fills shared
// memory through the copy engine. Two warpgroups multiply: 64 rows and all 256 columns each, in
// registers. They leave the product, rounded, in shared memory and go on with the next tile, while
// one more warpgroup finishes the last one: it does what the kernel is for and moves the rows, a
// line of 16 bytes per lane at a time. So the tensor cores, the copies and the elementwise part
// never wait for each other unless one of them is the slowest.
//
// Two blocks are a cluster: 256 rows by 256 columns, each block having 128 of the rows, and each
// loading half of the columns' operand for both. Only rows and columns that exist are stored, so
// tiles may stand over.
#ifndef CUDA_HOPPER_PRODUCT_CUH
#define CUDA_HOPPER_PRODUCT_CUH

#include "cuda/common.cuh"
#include "cuda/hopper.cuh"

enum {
    BLOCK_ROWS = 128,
    CLUSTER = 2, // blocks; of clusters of four an H200 runs 30, which leaves a tenth of it idle
    CLUSTER_ROWS = CLUSTER * BLOCK_ROWS,
    TILE_COLUMNS = 256,
    TILE_K = 64, // 128 bytes: one row of the swizzle
    STAGES = 3,
    STAGES_MAX = 4, // of any kernel here
    TURNS = 8,      // numbers of tiles that a block remembers
    TURN_AHEAD = 4, // steps before the end of a tile, when the next one's number is asked for
    BOX_BYTES = 64 * TILE_K * 2, // 64 rows or 64 columns
    A_BYTES = 2 * BOX_BYTES,
    B_BYTES = 4 * BOX_BYTES,
    BOXES = 4 / CLUSTER, // of B that each block loads
    STAGE_BYTES = A_BYTES + B_BYTES,
    BLOCK_BYTES = BLOCK_ROWS * 128, // 64 columns of the product
    PRODUCT_BYTES = TILE_COLUMNS / 64 * BLOCK_BYTES,
    SHARED_BYTES = STAGES * STAGE_BYTES + PRODUCT_BYTES + 1024, // 1024: to align it
    // Warpgroups: 0 loads, 1 and 2 multiply, 3 finishes. Registers of each: at most 128 on average,
    // which is what every thread begins with.
    THREADS = 512,
    LOAD_REGISTERS = 24,
    MULTIPLY_REGISTERS = 160,
    FINISH_REGISTERS = 168,
    WARP_ROWS = 32, // of a warp that finishes
    AHEAD = 8,      // rows that it has on their way
};

// A product over tiles, which a kernel is made for: its parameter, and what it does with a tile.
//
//     struct Example {
//         CUtensorMap a, b;   // a: rows by inner dimension, in boxes of BLOCK_ROWS rows
//         int tiles, k_steps; // of a cluster; steps of TILE_K
//         int *turns;         // see Turns
//         static constexpr bool B_ROWS;                             // see wgmma
//         bool idle() const;                                        // nothing to do at all
//         Tile tile_at(int index) const;
//         BoxPlace box_of_b(const Tile &, int box, int step) const; // a quarter of its columns
//         // Takes the 32 rows that begin at `row`, which are the warp's own, once they are filled.
//         void finish(const Tile &, int64_t row, Handover *, int lane) const;
//     };
typedef struct Tile {
    int group, row, row_end, column_tile; // row: of the cluster's first; row_end: of its group
} Tile;

typedef struct BoxPlace {
    int column, row;
} BoxPlace;

typedef struct TilePlace {
    int row_tile, column_tile;
} TilePlace;

// The place of tile `index`: `band` tiles of rows go through the columns together, so that both
// operands of what runs at a time stay in the L2 cache.
static __device__ __forceinline__ TilePlace place_in_bands(int index, int tiles_m, int tiles_n,
                                                           int band) {
    const int number = index / (band * tiles_n), in_band = index % (band * tiles_n);
    const int height = min(band, tiles_m - number * band);
    return TilePlace{number * band + in_band % height, in_band / height};
}

// --- Turns ---------------------------------------------------------------------------------------

// No tile is anybody's own: a cluster takes the next that nobody has, by a counter in device
// memory. So clusters that get their SMs late, because a collective has them, and those whose tiles
// take longer leave more to the others. The first block's loader asks for a number while the last
// steps of the tile before are on their way, and sends it to both blocks, where every kind of warp
// waits for it.
//
// A number is replaced TURNS tiles later. The sender is then at most STAGES_MAX + 1 tiles ahead of
// what both blocks have multiplied, and that is at most two ahead of what they have finished: one
// product lies in shared memory while the next is multiplied.
//
// The counter needs one such kernel at a time (the compute stream's order), launched as usual, at
// least one tile and at least one step of each, and idle() to be the same for all blocks.
static_assert(TURNS >= STAGES_MAX + 4, "who has not read a number yet would miss it");

typedef struct Turns {
    uint32_t numbers, known; // in shared memory: TURNS numbers, and a barrier for each
    int *counter;            // 0 before and after the kernel
    int tiles;
} Turns;

// Where a stage, or a number, is in a ring of COUNT, and the parity of its phase.
typedef struct Ring {
    int stage;
    uint32_t phase;
} Ring;
template <int COUNT> static __device__ __forceinline__ void advance(Ring *ring) {
    if (++ring->stage < COUNT) return;
    ring->stage = 0;
    ring->phase ^= 1;
}

// The next tile, or at least `tiles` at the end.
static __device__ __forceinline__ int next_turn(const Turns &turns, Ring *turn) {
    int number;
    barrier_wait(turns.known + 8 * turn->stage, turn->phase);
    asm volatile("ld.shared.b32 %0, [%1];\n"
                 : "=r"(number)
                 : "r"(turns.numbers + 4 * turn->stage)
                 : "memory");
    advance<TURNS>(turn);
    return number;
}
// The same for a loader, which lets its block's barrier wait for the number.
static __device__ __forceinline__ int next_turn_of_loader(const Turns &turns, Ring *turn) {
    barrier_expect(turns.known + 8 * turn->stage, sizeof(int));
    return next_turn(turns, turn);
}

static __device__ __forceinline__ int take_turn(const Turns &turns) {
    return atomicAdd(turns.counter, 1);
}
// Every cluster takes one number beyond the tiles; the last of these sets the counter back.
static __device__ __forceinline__ void send_turn(const Turns &turns, int place, int number) {
    if (number == turns.tiles + (int)gridDim.x / CLUSTER - 1) *turns.counter = 0;
#pragma unroll
    for (int block = 0; block < CLUSTER; block++)
        send_number(turns.numbers + 4 * place, turns.known + 8 * place, number, block);
}
// Before each step of a tile, from the first block's loader: the number after the tile's.
static __device__ __forceinline__ void pass_turn(const Turns &turns, const Ring &turn, int step,
                                                 int k_steps, int *next) {
    if (step == max(k_steps - TURN_AHEAD, 0)) *next = take_turn(turns);
    if (step == k_steps - 1) send_turn(turns, turn.stage, *next);
}

static __device__ __forceinline__ void init_turns(const Turns &turns) {
    for (int i = 0; i < TURNS; i++) barrier_init(turns.known + 8 * i, 1); // the block's loader
}

// --- The warp that loads -------------------------------------------------------------------------

// What a block has in shared memory.
typedef struct Shared {
    uint32_t tiles, product, full, empty; // full, empty: barriers of the stages
    uint32_t handover;                    // barriers: filled and emptied of both pairs
    Turns turns;
} Shared;

// `next`: in the cluster's first block the number of its first tile.
template <class Product>
static __device__ __forceinline__ void load_tiles(const Product &product, const Shared &shared,
                                                  int next, int rank) {
    const Turns &turns = shared.turns;
    Ring ring = {0, 1}, turn = {0, 0}; // the stages begin empty
    if (rank == 0) send_turn(turns, 0, next);
    for (int index; (index = next_turn_of_loader(turns, &turn)) < turns.tiles;) {
        const Tile tile = product.tile_at(index);
        const int row = tile.row + rank * BLOCK_ROWS;
        for (int step = 0; step < product.k_steps; step++, advance<STAGES>(&ring)) {
            const uint32_t at = shared.tiles + ring.stage * STAGE_BYTES;
            const uint32_t loaded = shared.full + 8 * ring.stage;
            if (rank == 0) pass_turn(turns, turn, step, product.k_steps, &next);
            barrier_wait(shared.empty + 8 * ring.stage, ring.phase);
            barrier_expect(loaded, STAGE_BYTES);
            copy_box(at, &product.a, step * TILE_K, row, loaded);
#pragma unroll
            for (int i = 0; i < BOXES; i++) {
                const int box = rank * BOXES + i;
                const BoxPlace from = product.box_of_b(tile, box, step);
                copy_box_to_all(at + A_BYTES + box * BOX_BYTES, &product.b, from.column, from.row,
                                loaded, (1 << CLUSTER) - 1);
            }
        }
    }
}

static __device__ __forceinline__ void init_stages(int count, uint32_t full, uint32_t empty) {
    for (int s = 0; s < count; s++) {
        barrier_init(full + 8 * s, 1);            // the loader
        barrier_init(empty + 8 * s, 2 * CLUSTER); // multiplying warpgroups of all blocks
    }
}

// --- The warpgroups that multiply ----------------------------------------------------------------

static __device__ __forceinline__ void give_back(uint32_t empty) {
#pragma unroll
    for (int block = 0; block < CLUSTER; block++) barrier_arrive(empty, block);
}

// c = the tile's product of COLUMNS columns for this warpgroup's 64 rows, over at least one step;
// WIDTH: columns of one instruction. A stage is handed back to all loaders once the products that
// read it are over, one step later.
template <int COUNT, int COLUMNS, int WIDTH, bool A_ROWS, bool B_ROWS>
static __device__ __forceinline__ void multiply(float (&c)[COLUMNS / 2], int k_steps, Ring *ring,
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
            const uint64_t left = A_ROWS ? tile_descriptor(a + 2048 * k, 1024, BOX_BYTES)
                                         : tile_descriptor(a + 32 * k, 1024, 16);
#pragma unroll
            for (int part = 0; part < COLUMNS / WIDTH; part++) {
                const uint32_t at = b + part * WIDTH * 128 + (B_ROWS ? 2048 : 32) * k;
                wgmma<WIDTH, A_ROWS, B_ROWS>(c + part * WIDTH / 2, left,
                                             tile_descriptor(at, 1024, B_ROWS ? BOX_BYTES : 16),
                                             step > 0 || k > 0);
            }
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (last >= 0 && speaker) give_back(empty + 8 * last);
        last = ring->stage;
        advance<COUNT>(ring);
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

static __device__ __forceinline__ void hand_over(const float (&c)[128], Handover *h, int lane) {
    const int row = (lane & 7) + (lane >> 3 & 1) * 8;
    const uint32_t place = h->place + row * 128 + (((lane >> 4) ^ (row & 7)) << 4);
    barrier_wait(h->emptied, h->phase ^ 1);
#pragma unroll
    for (int pair = 0; pair < 16; pair++) { // of chunks of 8 columns
        const float *from = &c[8 * pair];
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(
                         (place ^ (pair & 3) << 5) + (pair >> 2) * BLOCK_BYTES),
                     "r"(pack_bf16(from[0], from[1])), "r"(pack_bf16(from[2], from[3])),
                     "r"(pack_bf16(from[4], from[5])), "r"(pack_bf16(from[6], from[7]))
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
// One value of the warp's rows.
static __device__ __forceinline__ float take_value(const Handover &h, int row, int column) {
    const int chunk = column / 8;
    uint16_t bits;
    asm volatile("ld.shared.u16 %0, [%1];\n"
                 : "=h"(bits)
                 : "r"(h.place + row * 128 + chunk / 8 * BLOCK_BYTES +
                       ((chunk % 8 ^ (row & 7)) << 4) + column % 8 * 2));
    return __uint_as_float((uint32_t)bits << 16);
}
static __device__ __forceinline__ float2 unpack(uint32_t both) {
    return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
}

// AHEAD values of each lane, one per row: their sums over the warp, lane l having row l/4's.
static __device__ __forceinline__ float sum_rows(float (&s)[AHEAD], int lane) {
    static_assert(AHEAD == 8, "four lanes share a row in the end");
#pragma unroll
    for (int half = AHEAD / 2; half > 0; half /= 2) { // lanes 16, 8 and 4 apart exchange rows
        const bool upper = lane & 4 * half;
#pragma unroll
        for (int j = 0; j < half; j++) {
            const float given = upper ? s[j] : s[j + half], kept = upper ? s[j + half] : s[j];
            s[j] = kept + __shfl_xor_sync(0xffffffffu, given, 4 * half);
        }
    }
    s[0] += __shfl_xor_sync(0xffffffffu, s[0], 2);
    return s[0] + __shfl_xor_sync(0xffffffffu, s[0], 1);
}

// --- Lines of device memory ------------------------------------------------------------------

// A line, or nothing. Predicates, not branches, so that many are in flight.
static __device__ __forceinline__ Line load_line_if(bool valid, const bf16 *from) {
    Line line;
    asm volatile("{\n"
                 ".reg .pred valid;\n"
                 "setp.ne.b32 valid, %5, 0;\n"
                 "mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
                 "@valid ld.global.cs.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                 "}\n"
                 : "=&r"(line.v[0]), "=&r"(line.v[1]), "=&r"(line.v[2]), "=&r"(line.v[3])
                 : "l"(from), "r"((int)valid));
    return line;
}
static __device__ __forceinline__ void store_line_if(bool valid, bf16 *to, const Line &line) {
    asm volatile("{\n"
                 ".reg .pred valid;\n"
                 "setp.ne.b32 valid, %5, 0;\n"
                 "@valid st.global.v4.b32 [%0], {%1, %2, %3, %4};\n"
                 "}\n" ::"l"(to),
                 "r"(line.v[0]), "r"(line.v[1]), "r"(line.v[2]), "r"(line.v[3]), "r"((int)valid)
                 : "memory");
}

// --- The kernel ----------------------------------------------------------------------------------

static __device__ __forceinline__ Handover handover_of(const Shared &shared, int row) {
    const uint32_t barriers = shared.handover + row / 64 * 16;
    return Handover{barriers, barriers + 8, shared.product + row * 128, 0};
}

template <class Product>
static __device__ __forceinline__ void multiply_tiles(const Product &product,
                                                      const Shared &shared) {
    const int warpgroup = threadIdx.x / 128 - 1, lane = threadIdx.x & 31;
    const bool speaker = threadIdx.x % 128 == 0;
    Handover handover = handover_of(shared, (threadIdx.x / 32 - 4) * 16);
    Ring ring = {0, 0}, turn = {0, 0};
    float c[TILE_COLUMNS / 2];
    bool more = next_turn(shared.turns, &turn) < shared.turns.tiles;
    while (more) {
        // 256 columns in one instruction need more registers than a thread begins with.
        multiply<STAGES, TILE_COLUMNS, 128, false, Product::B_ROWS>(
            c, product.k_steps, &ring, shared.tiles, shared.full, shared.empty, warpgroup, speaker);
        more = next_turn(shared.turns, &turn) < shared.turns.tiles; // came while it multiplied
        hand_over(c, &handover, lane);
    }
}

template <class Product>
static __device__ __forceinline__ void finish_tiles(const Product &product, const Shared &shared,
                                                    int rank) {
    const int own_row = (threadIdx.x / 32 - 12) * WARP_ROWS, lane = threadIdx.x & 31;
    Handover handover = handover_of(shared, own_row);
    Ring turn = {0, 0};
    for (int index; (index = next_turn(shared.turns, &turn)) < shared.turns.tiles;) {
        const Tile tile = product.tile_at(index);
        product.finish(tile, (int64_t)tile.row + rank * BLOCK_ROWS + own_row, &handover, lane);
        __syncwarp();
        if (lane == 0) barrier_arrive_here(handover.emptied);
        handover.phase ^= 1;
    }
}

static __device__ __forceinline__ void init_barriers(const Shared &shared) {
    init_stages(STAGES, shared.full, shared.empty);
    init_turns(shared.turns);
    for (int half = 0; half < 2; half++) { // warps
        barrier_init(shared.handover + 16 * half, 4);
        barrier_init(shared.handover + 16 * half + 8, 2);
    }
    barrier_init_done();
}

template <class Product>
static __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    product_kernel(const __grid_constant__ Product product) {
    extern __shared__ char dynamic[];
    __shared__ uint64_t barriers[2 * STAGES + 4 + TURNS];
    __shared__ int numbers[TURNS];
    if (product.idle()) return;
    Shared shared;
    shared.tiles = (shared_address(dynamic) + 1023) & ~1023u;
    shared.product = shared.tiles + STAGES * STAGE_BYTES;
    shared.full = shared_address(barriers);
    shared.empty = shared.full + 8 * STAGES;
    shared.handover = shared.empty + 8 * STAGES;
    shared.turns =
        Turns{shared_address(numbers), shared.handover + 32, product.turns, product.tiles};
    const int rank = (int)cluster_rank(), warpgroup = threadIdx.x / 128;
    int first = 0;
    if (threadIdx.x == 0) {
        if (rank == 0) first = take_turn(shared.turns);
        init_barriers(shared);
    }
    cluster_sync();
    if (warpgroup == 0) {
        registers_give<LOAD_REGISTERS>();
        if (threadIdx.x == 0) load_tiles(product, shared, first, rank);
    } else if (warpgroup <= 2) {
        registers_take<MULTIPLY_REGISTERS>();
        multiply_tiles(product, shared);
    } else {
        registers_take<FINISH_REGISTERS>();
        finish_tiles(product, shared, rank);
    }
    __syncwarp();
    cluster_sync(); // the other block may still copy or arrive here
}

#endif
