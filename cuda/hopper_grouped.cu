// Products over rows grouped by expert, on Hopper's own instructions.
//
// All experts' tiles are one list that the blocks share, so only the last round of tiles of the
// whole op leaves SMs idle, not that of every expert, and one launch does what a library takes one
// per expert for. Each group has tensor maps of its own rows: what a tile reads beyond them is
// zero, and what it would write there is cut off by the copy engine.
//
// Loading and multiplying are those of hopper_product.cuh. Nothing elementwise happens here, so the
// warpgroups that multiply also store: 32 columns at a time go through shared memory to the copy
// engine, which stores them, or adds them to fp32 gradients, while the next ones are on their way.
#include "cuda/grouped.h"
#include "cuda/hopper_grouped.h"
#include "cuda/hopper_launch.cuh"

// What the operands and the result look like.
typedef enum Kind {
    ROWS_INNER_LAST,    // in (rows, K), weight (N, K), bf16 out
    ROWS_INNER_FIRST,   // in (rows, K), weight (K, N), bf16 out
    GRADIENT,           // left (K, M), right (K, N), fp32 grad (M, N)
    GRADIENT_TRANSPOSED // the same with grad (N, M)
} Kind;

static constexpr bool is_gradient(Kind kind) {
    return kind == GRADIENT || kind == GRADIENT_TRANSPOSED;
}
static constexpr bool inner_first(Kind kind) { // of the right operand
    return kind != ROWS_INNER_LAST;
}

enum {
    // One warpgroup loads, two multiply. Registers: 168 on average, what every thread begins with.
    GROUPED_THREADS = 384,
    GROUPED_LOAD_REGISTERS = 40,
    GROUPED_MULTIPLY_REGISTERS = 232,
    GROUPED_STAGES = 4,
    PIECE = 32, // columns that are stored together: 64 rows of bf16, or twice 32 of fp32
    PIECE_BYTES = 64 * PIECE * 4,
    BOX_F32_BYTES = PIECE_BYTES / 2,
    GROUPED_SHARED = GROUPED_STAGES * STAGE_BYTES + 4 * PIECE_BYTES + 1024,
};

typedef struct GroupedArgs {
    CUtensorMap a[HOPPER_GROUPS_MAX], b[HOPPER_GROUPS_MAX], out[HOPPER_GROUPS_MAX];
    int tile_begin[HOPPER_GROUPS_MAX + 1];
    int k_steps[HOPPER_GROUPS_MAX];
    int groups, tiles_n, tiles;
    int *turns; // see Turns
    bool add;
} GroupedArgs;

// What a block has in shared memory.
typedef struct GroupedShared {
    uint32_t tiles, full, empty; // full, empty: barriers of the stages
    Turns turns;
} GroupedShared;

typedef struct GroupTile {
    int group, row, column;
} GroupTile;

static __device__ __forceinline__ GroupTile tile_of(const GroupedArgs &args, int index,
                                                    int columns) {
    int group = 0;
    while (index >= args.tile_begin[group + 1]) group++;
    index -= args.tile_begin[group];
    return GroupTile{group, index / args.tiles_n * CLUSTER_ROWS, index % args.tiles_n * columns};
}

// --- Loading ------------------------------------------------------------------------------------

template <int COLUMNS, Kind KIND> struct StageOf {
    static constexpr int BOXES_N = (COLUMNS + 63) / 64; // of 64 columns
    static constexpr int BYTES =
        A_BYTES + (inner_first(KIND) ? BOXES_N * BOX_BYTES : COLUMNS * 128);
};

template <int COLUMNS, Kind KIND>
static __device__ __forceinline__ void load_stage(const GroupedArgs &args, const GroupTile &tile,
                                                  int inner, int rank, uint32_t at,
                                                  uint32_t loaded) {
    const CUtensorMap *a = &args.a[tile.group], *b = &args.b[tile.group];
    const int row = tile.row + rank * BLOCK_ROWS;
    if (is_gradient(KIND)) {
        copy_box(at, a, row, inner, loaded);
        copy_box(at + BOX_BYTES, a, row + 64, inner, loaded);
    } else {
        copy_box(at, a, inner, row, loaded);
    }
    if (inner_first(KIND)) {
        for (int box = rank; box < StageOf<COLUMNS, KIND>::BOXES_N; box += CLUSTER)
            copy_box_to_all(at + A_BYTES + box * BOX_BYTES, b, tile.column + box * 64, inner,
                            loaded, (1 << CLUSTER) - 1);
    } else {
        const int half = rank * (COLUMNS / CLUSTER);
        copy_box_to_all(at + A_BYTES + half * 128, b, inner, tile.column + half, loaded,
                        (1 << CLUSTER) - 1);
    }
}

template <int COLUMNS, Kind KIND>
static __device__ __forceinline__ void
load_groups(const GroupedArgs &args, const GroupedShared &shared, int next, int rank) {
    const Turns &turns = shared.turns;
    Ring ring = {0, 1}, turn = {0, 0}; // the stages begin empty
    if (rank == 0) send_turn(turns, 0, next);
    for (int index; (index = next_turn_of_loader(turns, &turn)) < turns.tiles;) {
        const GroupTile tile = tile_of(args, index, COLUMNS);
        const int k_steps = args.k_steps[tile.group];
        for (int step = 0; step < k_steps; step++, advance<GROUPED_STAGES>(&ring)) {
            const uint32_t loaded = shared.full + 8 * ring.stage;
            if (rank == 0) pass_turn(turns, turn, step, k_steps, &next);
            barrier_wait(shared.empty + 8 * ring.stage, ring.phase);
            barrier_expect(loaded, StageOf<COLUMNS, KIND>::BYTES);
            load_stage<COLUMNS, KIND>(args, tile, step * TILE_K, rank,
                                      shared.tiles + ring.stage * STAGE_BYTES, loaded);
        }
    }
}

// --- Storing ------------------------------------------------------------------------------------

static __device__ __forceinline__ void store_shared(uint32_t to, float x) {
    asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(to), "f"(x) : "memory");
}
static __device__ __forceinline__ void store_shared(uint32_t to, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};\n" ::"r"(to), "f"(x), "f"(y) : "memory");
}

// A piece of fp32 is 64 rows by 32 columns of the tile, in two boxes of 32 by 32: rows of 128
// bytes, whose 16-byte chunk c is at place c ^ (row & 7), as the copy engine's swizzle wants it.
// What depends on the thread is one address; the rest are constants added to it or, inside a row,
// exclusive-ored.
static __device__ __forceinline__ void put_gradient(const float *c, uint32_t buffer, int warp,
                                                    int lane) {
    const uint32_t place = buffer + warp / 2 * BOX_F32_BYTES + (warp % 2 * 16 + lane / 4) * 128 +
                           ((lane % 4 / 2 ^ lane / 4) << 4) + lane % 2 * 8;
#pragma unroll
    for (int j = 0; j < PIECE / 8; j++) {
        const uint32_t to = place ^ j << 5;
        store_shared(to, c[4 * j], c[4 * j + 1]);
        store_shared(to + 8 * 128, c[4 * j + 2], c[4 * j + 3]); // 8 rows below
    }
}

// The same with rows and columns exchanged.
static __device__ __forceinline__ void put_transposed(const float *c, uint32_t buffer, int warp,
                                                      int lane) {
    const uint32_t place = buffer + warp / 2 * BOX_F32_BYTES + lane % 4 * 2 * 128 +
                           ((warp % 2 * 4 + lane / 16 ^ lane % 4 * 2) << 4) + lane / 4 % 4 * 4;
#pragma unroll
    for (int j = 0; j < PIECE / 8; j++) {
        const uint32_t to = place + j * 8 * 128;
        store_shared(to, c[4 * j]);
        store_shared((to ^ 1 << 4) + 128, c[4 * j + 1]);
        store_shared(to ^ 2 << 4, c[4 * j + 2]);
        store_shared((to ^ 3 << 4) + 128, c[4 * j + 3]);
    }
}

// A piece of bf16 is one box: rows of 64 bytes, whose chunk c is at place c ^ (row / 2 & 3).
static __device__ __forceinline__ void put_rows(const float *c, uint32_t buffer, int warp,
                                                int lane) {
    const int row = warp * 16 + lane % 16;
    const uint32_t place = buffer + row * 64 + ((lane / 16 ^ (row >> 1 & 3)) << 4);
#pragma unroll
    for (int pair = 0; pair < PIECE / 16; pair++) { // of chunks of 8 columns
        const float *from = c + 8 * pair;
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(
                         place ^ pair << 5),
                     "r"(pack_bf16(from[0], from[1])), "r"(pack_bf16(from[2], from[3])),
                     "r"(pack_bf16(from[4], from[5])), "r"(pack_bf16(from[6], from[7]))
                     : "memory");
    }
}

template <Kind KIND>
static __device__ __forceinline__ void put(const float *c, uint32_t buffer, int warp, int lane) {
    if (KIND == GRADIENT)
        put_gradient(c, buffer, warp, lane);
    else if (KIND == GRADIENT_TRANSPOSED)
        put_transposed(c, buffer, warp, lane);
    else
        put_rows(c, buffer, warp, lane);
}

// From one thread: the piece at (row, column) of the tile's result.
template <Kind KIND>
static __device__ __forceinline__ void send_piece(const GroupedArgs &args, int group,
                                                  uint32_t buffer, int row, int column) {
    const CUtensorMap *out = &args.out[group];
    if (!is_gradient(KIND)) store_box(buffer, out, column, row, false);
    for (int i = 0; i < 2 && is_gradient(KIND); i++) {
        const uint32_t from = buffer + i * BOX_F32_BYTES;
        if (KIND == GRADIENT)
            store_box(from, out, column, row + i * PIECE, args.add);
        else
            store_box(from, out, row + i * PIECE, column, args.add);
    }
    store_commit();
}

static __device__ __forceinline__ void warpgroup_sync(int warpgroup) {
    asm volatile("bar.sync %0, 128;\n" ::"r"(1 + warpgroup) : "memory");
}

// Two buffers take turns: one is filled while the copy engine reads the other.
template <int COLUMNS, Kind KIND>
static __device__ __forceinline__ void store_tile(const GroupedArgs &args, const GroupTile &tile,
                                                  const float (&c)[COLUMNS / 2], uint32_t buffers,
                                                  int row, int warpgroup) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const bool speaker = threadIdx.x % 128 == 0;
#pragma unroll
    for (int p = 0; p < COLUMNS / PIECE; p++) {
        const uint32_t buffer = buffers + p % 2 * PIECE_BYTES;
        // What was stored from this buffer before: two pieces ago, or by the tile before.
        if (speaker && p == 0) store_wait_read<0>();
        if (speaker && p > 0) store_wait_read<1>();
        warpgroup_sync(warpgroup);
        put<KIND>(c + p * PIECE / 2, buffer, warp, lane);
        store_fence();
        warpgroup_sync(warpgroup);
        if (speaker) send_piece<KIND>(args, tile.group, buffer, row, tile.column + p * PIECE);
    }
}

// --- The kernel ---------------------------------------------------------------------------------

template <int COLUMNS, Kind KIND>
static __device__ __forceinline__ void multiply_groups(const GroupedArgs &args,
                                                       const GroupedShared &shared, int rank) {
    const int warpgroup = threadIdx.x / 128 - 1;
    const bool speaker = threadIdx.x % 128 == 0;
    const uint32_t buffers =
        shared.tiles + GROUPED_STAGES * STAGE_BYTES + warpgroup * 2 * PIECE_BYTES;
    Ring ring = {0, 0}, turn = {0, 0};
    float c[COLUMNS / 2];
    for (int index; (index = next_turn(shared.turns, &turn)) < shared.turns.tiles;) {
        const GroupTile tile = tile_of(args, index, COLUMNS);
        multiply<GROUPED_STAGES, COLUMNS, COLUMNS, is_gradient(KIND), inner_first(KIND)>(
            c, args.k_steps[tile.group], &ring, shared.tiles, shared.full, shared.empty, warpgroup,
            speaker);
        store_tile<COLUMNS, KIND>(args, tile, c, buffers,
                                  tile.row + rank * BLOCK_ROWS + warpgroup * 64, warpgroup);
    }
    if (speaker) store_wait_all();
}

template <int COLUMNS, Kind KIND>
static __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(GROUPED_THREADS, 1)
    grouped_kernel(const __grid_constant__ GroupedArgs args) {
    extern __shared__ char dynamic[];
    __shared__ uint64_t barriers[2 * GROUPED_STAGES + TURNS];
    __shared__ int numbers[TURNS];
    GroupedShared shared;
    shared.tiles = (shared_address(dynamic) + 1023) & ~1023u;
    shared.full = shared_address(barriers);
    shared.empty = shared.full + 8 * GROUPED_STAGES;
    shared.turns =
        Turns{shared_address(numbers), shared.empty + 8 * GROUPED_STAGES, args.turns, args.tiles};
    const int rank = (int)cluster_rank();
    int first = 0;
    if (threadIdx.x == 0) {
        if (rank == 0) first = take_turn(shared.turns);
        init_stages(GROUPED_STAGES, shared.full, shared.empty);
        init_turns(shared.turns);
        barrier_init_done();
    }
    cluster_sync();
    if (threadIdx.x < 128) {
        registers_give<GROUPED_LOAD_REGISTERS>();
        if (threadIdx.x == 0) load_groups<COLUMNS, KIND>(args, shared, first, rank);
    } else {
        registers_take<GROUPED_MULTIPLY_REGISTERS>();
        multiply_groups<COLUMNS, KIND>(args, shared, rank);
    }
    __syncwarp();
    cluster_sync(); // the other block may still copy or arrive here
}

// --- Host: tiles --------------------------------------------------------------------------------

static int64_t tiles_of(int64_t m, int64_t n, int columns) {
    return div_up(m, CLUSTER_ROWS) * div_up(n, columns);
}

// The width of tiles that leaves the fewest columns over, the widest of those.
static int best_columns(int64_t n) {
    const int widths[] = {256, 224, 192};
    int best = widths[0];
    for (int width : widths)
        if (div_up(n, width) * width < div_up(n, best) * best) best = width;
    return best;
}

static int64_t padded(int64_t m, int64_t n) {
    const int columns = best_columns(n);
    return tiles_of(m, n, columns) * CLUSTER_ROWS * columns;
}

// Whether `tiles` of which `useful` are needed fill all rounds but a little.
static bool fills(const CudaBackend *backend, int64_t tiles, double useful) {
    const int64_t clusters = backend->num_sms / CLUSTER, rounds = div_up(tiles, clusters);
    return useful >= 0.92 * (double)(rounds * clusters);
}

static bool chip_takes(const CudaBackend *backend, int groups, const int32_t *begin,
                       uintptr_t bits) {
    const int32_t rows = begin[groups];
    return backend->capability == 90 && backend->base.compute_dtype == DTYPE_BF16 &&
           groups <= HOPPER_GROUPS_MAX && rows > 0 && rows < INT32_MAX / 2 && bits % 16 == 0;
}

// --- Host: launch -------------------------------------------------------------------------------

template <int COLUMNS, Kind KIND>
static Status launch_grouped(CudaBackend *backend, GroupedArgs *args) {
    auto kernel = grouped_kernel<COLUMNS, KIND>;
    static int known[DEVICES_MAX];
    int clusters;
    if (args->tiles == 0) return STATUS_OK;
    TRY(count_clusters(backend, (const void *)kernel, GROUPED_THREADS, GROUPED_SHARED, known,
                       &clusters));
    args->turns = backend->turns;
    kernel<<<blocks_for(args->tiles, clusters), GROUPED_THREADS, GROUPED_SHARED, backend->stream>>>(
        *args);
    LAUNCH_TRY(backend);
    return STATUS_OK;
}

template <Kind KIND>
static Status launch_columns(CudaBackend *backend, int columns, GroupedArgs *args) {
    if (columns == 256) return launch_grouped<256, KIND>(backend, args);
    if (columns == 224) return launch_grouped<224, KIND>(backend, args);
    return launch_grouped<192, KIND>(backend, args);
}

static void add_group(GroupedArgs *args, int64_t m, int64_t k) {
    const int g = args->groups++;
    args->k_steps[g] = (int)div_up(k, TILE_K);
    args->tiles += (int)div_up(m, CLUSTER_ROWS) * args->tiles_n;
    args->tile_begin[g + 1] = args->tiles;
}

// --- Host: rows ---------------------------------------------------------------------------------

bool hopper_rows_takes(const CudaBackend *backend, const HopperRows *p) {
    const uintptr_t bits = (uintptr_t)p->in | (uintptr_t)p->weight | (uintptr_t)p->out;
    return p->inner % 8 == 0 && p->columns % 8 == 0 &&
           chip_takes(backend, p->groups, p->begin, bits);
}

bool hopper_rows_fills(const CudaBackend *backend, const HopperRows *p) {
    const int columns = best_columns(p->columns);
    int64_t tiles = 0;
    for (int g = 0; g < p->groups; g++)
        tiles += tiles_of(p->begin[g + 1] - p->begin[g], p->columns, columns);
    return fills(backend, tiles, (double)p->begin[p->groups] * p->columns / CLUSTER_ROWS / columns);
}

// In the product's place `at`: group g.
static Status map_rows(CudaBackend *backend, const HopperRows *p, int g, int columns, int at,
                       GroupedArgs *args) {
    const int64_t begin = p->begin[g], rows = p->begin[g + 1] - begin;
    const int64_t k = p->inner, n = p->columns;
    const bf16 *weight = (const bf16 *)p->weight + g * n * k;
    const MapShape out = {(bf16 *)p->out + begin * n, rows, n, 64, PIECE, DTYPE_BF16};
    TRY(make_map(backend, (const bf16 *)p->in + begin * k, rows, k, BLOCK_ROWS, &args->a[at]));
    TRY(make_map_of(backend, &out, &args->out[at]));
    if (p->inner_last) return make_map(backend, weight, n, k, columns / CLUSTER, &args->b[at]);
    return make_map(backend, weight, k, n, 64, &args->b[at]);
}

Status hopper_rows(CudaBackend *backend, const HopperRows *p) {
    const int columns = best_columns(p->columns);
    int order[HOPPER_GROUPS_MAX];
    GroupedArgs args = {};
    args.tiles_n = (int)div_up(p->columns, columns);
    experts_by_rows(p->begin, p->groups, order); // the longest tiles do not come last
    for (int i = 0; i < p->groups; i++) {
        const int64_t rows = p->begin[order[i] + 1] - p->begin[order[i]];
        if (rows == 0) break;
        TRY(map_rows(backend, p, order[i], columns, i, &args));
        add_group(&args, rows, p->inner);
    }
    return p->inner_last ? launch_columns<ROWS_INNER_LAST>(backend, columns, &args)
                         : launch_columns<ROWS_INNER_FIRST>(backend, columns, &args);
}

// --- Host: gradients ----------------------------------------------------------------------------

bool hopper_gradient_takes(const CudaBackend *backend, const HopperGradient *p) {
    const uintptr_t bits = (uintptr_t)p->left | (uintptr_t)p->right | (uintptr_t)p->grad;
    return p->m % 8 == 0 && p->n % 8 == 0 && p->left_stride % 8 == 0 &&
           backend->base.grad_dtype == DTYPE_F32 && chip_takes(backend, p->groups, p->begin, bits);
}

// Whether the tiles' rows are columns of the gradient.
static bool is_transposed(const HopperGradient *p) {
    return padded(p->n, p->m) < padded(p->m, p->n);
}

bool hopper_gradient_fills(const CudaBackend *backend, const HopperGradient *p) {
    const int64_t m = is_transposed(p) ? p->n : p->m, n = is_transposed(p) ? p->m : p->n;
    const int columns = best_columns(n);
    int with_rows = 0;
    for (int g = 0; g < p->groups; g++) with_rows += p->begin[g + 1] > p->begin[g];
    return fills(backend, with_rows * tiles_of(m, n, columns),
                 (double)with_rows * (double)m * (double)n / CLUSTER_ROWS / columns);
}

static Status map_gradient(CudaBackend *backend, const HopperGradient *p, int g, int at,
                           GroupedArgs *args) {
    const int64_t begin = p->begin[g], rows = p->begin[g + 1] - begin;
    const MapShape grad = {p->grad + (int64_t)g * p->m * p->n, p->m, p->n, PIECE, PIECE, DTYPE_F32};
    const MapShape left = {(const bf16 *)p->left + begin * p->left_stride,
                           rows,
                           p->m,
                           64,
                           TILE_K,
                           DTYPE_BF16,
                           p->left_stride};
    TRY(make_map_of(backend, &grad, &args->out[at]));
    TRY(make_map_of(backend, &left, is_transposed(p) ? &args->b[at] : &args->a[at]));
    return make_map(backend, (const bf16 *)p->right + begin * p->n, rows, p->n, 64,
                    is_transposed(p) ? &args->a[at] : &args->b[at]);
}

static Status zero_gradient(CudaBackend *backend, const HopperGradient *p, int g) {
    const size_t count = (size_t)p->m * (size_t)p->n;
    CUDA_TRY(backend, cudaMemsetAsync(p->grad + (size_t)g * count, 0, count * sizeof(float),
                                      backend->stream));
    return STATUS_OK;
}

Status hopper_gradient(CudaBackend *backend, const HopperGradient *p) {
    const int64_t m = is_transposed(p) ? p->n : p->m, n = is_transposed(p) ? p->m : p->n;
    const int columns = best_columns(n);
    int order[HOPPER_GROUPS_MAX];
    GroupedArgs args = {};
    args.tiles_n = (int)div_up(n, columns);
    args.add = !p->assign;
    experts_by_rows(p->begin, p->groups, order); // the longest tiles do not come last
    for (int i = 0; i < p->groups; i++) {
        const int64_t rows = p->begin[order[i] + 1] - p->begin[order[i]];
        if (rows == 0 && p->assign) TRY(zero_gradient(backend, p, order[i]));
        if (rows == 0) continue; // all that follow have none either
        TRY(map_gradient(backend, p, order[i], i, &args));
        add_group(&args, m, rows);
    }
    return is_transposed(p) ? launch_columns<GRADIENT_TRANSPOSED>(backend, columns, &args)
                            : launch_columns<GRADIENT>(backend, columns, &args);
}
