// Matrix products with SwiGLU inside, on Hopper's own instructions.
//
// The elementwise pass between the MLP's products moves as many bytes as a product of these shapes
// takes time for. Here it happens on the accumulators, while other warps keep the tensor cores
// busy: forward saves reading gate_up, backward also writing and reading the activation's gradient.
//
// A block stays on its SM for all of its tiles and has three kinds of warps. One fills shared
// memory through the copy engine. Two warpgroups multiply: 64 rows and all 256 columns each, in
// registers. They leave the product, rounded, in shared memory and go on with the next tile, while
// one more warpgroup does the elementwise part of the last one and moves its rows, a line of 128
// bytes at a time. So the tensor cores, the copies and the elementwise part never wait for each
// other unless one of them is the slowest.
//
// Two blocks are a cluster: 256 rows by 256 columns, each block having 128 of the rows, and each
// loading half of the columns' operand for both. In the forward pass 128 gate columns and the 128
// up columns that belong to them are one tile. Only rows and columns that exist are stored, so
// tiles may stand over: rows of an expert's last tile that are the next expert's are computed and
// dropped.
#include "cuda/hopper_product.cuh"
#include "cuda/swiglu.cuh"

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

// The factor of a row.
static __device__ __forceinline__ float scale_of(const HopperArgs &args, int64_t row,
                                                 const Tile &tile) {
    if (row >= tile.row_end) return 0.0f;
    return args.scale[args.scale_index ? args.scale_index[row] : row];
}

// --- Elementwise: forward ----------------------------------------------------------------------

// Lane l has chunk l%16 of rows 2i + l/16. `scale`: of row `lane`.
template <bool SCALED>
static __device__ __forceinline__ void forward_rows(const HopperArgs &args, const Handover &h,
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
            activation.v[j] = pack(swiglu_of(g.x, u.x) * s, swiglu_of(g.y, u.y) * s);
        }
        store_line_if(valid, args.activation + window.narrow + (int64_t)2 * i * inner, activation);
    }
}

// --- Elementwise: backward -----------------------------------------------------------------------

typedef struct GateUp {
    Line gate, up;
} GateUp;

static __device__ __forceinline__ GateUp load_gate_up(const HopperArgs &args, const Window &window,
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
        line->gate.v[j] = pack(dgate.x, dgate.y);
        line->up.v[j] = pack(dup.x, dup.y);
        activation->v[j] = pack(x * s, y * s);
    }
    return dot;
}

// AHEAD rows from `first` on, one line per lane; `next` are theirs on entry and on exit those of
// the rows that follow. `scale`, and what is returned, the gate's gradient: of row `lane`.
template <bool SCALED>
static __device__ __forceinline__ float backward_rows(const HopperArgs &args, const Handover &h,
                                                      int first, float scale, GateUp (&next)[AHEAD],
                                                      const Window &window, int lane) {
    const int inner = args.inner;
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        const int row = first + i;
        const bool valid = row < window.rows;
        GateUp line = next[i];
        if (first + AHEAD < WARP_ROWS) next[i] = load_gate_up(args, window, row + AHEAD);
        const float s = SCALED ? __shfl_sync(0xffffffffu, scale, row) : 1.0f;
        Line activation;
        float share = backward_line<SCALED>(take(h, row, lane), s, &line, &activation);
        bf16 *to = args.dgate_up + window.wide + (int64_t)2 * row * inner;
        store_line_if(valid, to, line.gate);
        store_line_if(valid, to + inner, line.up);
        store_line_if(valid && args.activation,
                      args.activation + window.narrow + (int64_t)row * inner, activation);
        if (SCALED) share = warp_sum(share);
        if (SCALED && lane == row) dot = share;
    }
    return dot;
}

// --- The kernel ----------------------------------------------------------------------------------

typedef struct Shared {
    uint32_t tiles, product, full, empty; // full, empty: barriers of the stages
    uint32_t handover;                    // barriers: filled and emptied of both pairs
} Shared;

static __device__ __forceinline__ Handover handover_of(const Shared &shared, int row) {
    const uint32_t barriers = shared.handover + row / 64 * 16;
    return Handover{barriers, barriers + 8, shared.product + row * 128, 0};
}

template <bool BACKWARD>
static __device__ __forceinline__ void multiply_tiles(const HopperArgs &args,
                                                      const Shared &shared) {
    const int warpgroup = threadIdx.x / 128 - 1, lane = threadIdx.x & 31;
    const bool speaker = threadIdx.x % 128 == 0;
    Handover handover = handover_of(shared, (threadIdx.x / 32 - 4) * 16);
    Ring ring = {0, 0};
    float c[128];
    for (int index = blockIdx.x / CLUSTER; index < args.tiles; index += gridDim.x / CLUSTER) {
        multiply<BACKWARD>(c, args.k_steps, &ring, shared.tiles, shared.full, shared.empty,
                           warpgroup, speaker);
        hand_over(c, &handover, lane);
    }
}

// SCALED: the rows have factors, which have gradients.
template <bool BACKWARD, bool SCALED>
static __device__ __forceinline__ void elementwise_tiles(const HopperArgs &args,
                                                         const Shared &shared, int rank) {
    const int own_row = (threadIdx.x / 32 - 12) * WARP_ROWS, lane = threadIdx.x & 31;
    Handover handover = handover_of(shared, own_row);
    for (int index = blockIdx.x / CLUSTER; index < args.tiles; index += gridDim.x / CLUSTER) {
        const Tile tile = tile_at(args, index);
        const int64_t row = tile.row + rank * BLOCK_ROWS + own_row;
        const float scale = SCALED ? scale_of(args, row + lane, tile) : 1.0f;
        if constexpr (BACKWARD) {
            const Window window = window_of(row, tile.row_end,
                                            tile.column_tile * TILE_COLUMNS + lane * 8, args.inner);
            GateUp next[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) next[i] = load_gate_up(args, window, i);
            barrier_wait(handover.filled, handover.phase);
            float dot = 0.0f;
#pragma unroll 1
            for (int first = 0; first < WARP_ROWS; first += AHEAD)
                dot += backward_rows<SCALED>(args, handover, first, scale, next, window, lane);
            if (SCALED && row + lane < tile.row_end)
                args.partial[tile.column_tile * args.rows + row + lane] = dot;
        } else {
            const int column = tile.column_tile * TILE_COLUMNS / 2 + lane % 16 * 8;
            const Window window = window_of(row + lane / 16, tile.row_end, column, args.inner);
            barrier_wait(handover.filled, handover.phase);
            forward_rows<SCALED>(args, handover, window, scale, lane);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive_here(handover.emptied);
        handover.phase ^= 1;
    }
}

static __device__ __forceinline__ void init_barriers(const Shared &shared) {
    for (int s = 0; s < STAGES; s++) {
        barrier_init(shared.full + 8 * s, 1);            // the loader
        barrier_init(shared.empty + 8 * s, 2 * CLUSTER); // multiplying warpgroups of all blocks
    }
    for (int half = 0; half < 2; half++) { // warps
        barrier_init(shared.handover + 16 * half, 4);
        barrier_init(shared.handover + 16 * half + 8, 2);
    }
    barrier_init_done();
}

template <bool BACKWARD, bool SCALED>
static __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    mlp_kernel(const __grid_constant__ HopperArgs args) {
    extern __shared__ char dynamic[];
    __shared__ uint64_t barriers[2 * STAGES + 4];
    Shared shared;
    shared.tiles = (shared_address(dynamic) + 1023) & ~1023u;
    shared.product = shared.tiles + STAGES * STAGE_BYTES;
    shared.full = shared_address(barriers);
    shared.empty = shared.full + 8 * STAGES;
    shared.handover = shared.empty + 8 * STAGES;
    const int rank = (int)cluster_rank(), warpgroup = threadIdx.x / 128;
    if (threadIdx.x == 0) init_barriers(shared);
    cluster_sync();
    if (warpgroup == 0) {
        registers_give<LOAD_REGISTERS>();
        if (threadIdx.x == 0)
            load_tiles<BACKWARD>(args, shared.tiles, shared.full, shared.empty, rank);
    } else if (warpgroup <= 2) {
        registers_take<MULTIPLY_REGISTERS>();
        multiply_tiles<BACKWARD>(args, shared);
    } else {
        registers_take<ELEMENTWISE_REGISTERS>();
        elementwise_tiles<BACKWARD, SCALED>(args, shared, rank);
    }
    __syncwarp();
    cluster_sync(); // the other block may still copy or arrive here
}

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

typedef CUresult (*EncodeTiled)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// A row-major (rows, columns) matrix in boxes of 64 columns by `box_rows` rows.
static Status make_map(CudaBackend *backend, const void *matrix, int64_t rows, int64_t columns,
                       int box_rows, CUtensorMap *out) {
    static EncodeTiled encode; // the same for every device
    if (!encode) {
        void *found = NULL;
        cudaDriverEntryPointQueryResult result;
        CUDA_TRY(backend, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                           cudaEnableDefault, &result));
        if (result != cudaDriverEntryPointSuccess)
            FAIL(STATUS_INTERNAL, "the driver has no cuTensorMapEncodeTiled; it must be newer");
        encode = (EncodeTiled)found;
    }
    const cuuint64_t sizes[2] = {(cuuint64_t)columns, (cuuint64_t)rows};
    const cuuint64_t strides[1] = {(cuuint64_t)columns * sizeof(bf16)};
    const cuuint32_t box[2] = {TILE_K, (cuuint32_t)box_rows}, steps[2] = {1, 1};
    const CUresult error =
        encode(out, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void *)matrix, sizes, strides, box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS)
        FAIL(STATUS_INTERNAL, "tensor map of a (%lld, %lld) matrix: driver error %d",
             (long long)rows, (long long)columns, (int)error);
    return STATUS_OK;
}

static void make_groups(const HopperMlp *mlp, HopperArgs *args) {
    args->groups = mlp->begin ? mlp->groups : 1;
    args->begin[1] = (int)mlp->rows;
    for (int g = 0; g <= args->groups && mlp->begin; g++) args->begin[g] = mlp->begin[g];
    for (int g = 0; g < args->groups; g++) {
        const int64_t rows = args->begin[g + 1] - args->begin[g];
        args->tile_begin[g + 1] =
            args->tile_begin[g] + (int)div_up(rows, CLUSTER_ROWS) * args->tiles_n;
    }
    args->tiles = args->tile_begin[args->groups];
}

static Status make_args(CudaBackend *backend, const HopperMlp *mlp, bool backward,
                        HopperArgs *args) {
    const int groups = mlp->begin ? mlp->groups : 1;
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
    args->rows = mlp->rows;
    make_groups(mlp, args);
    TRY(make_map(backend, mlp->in, mlp->rows, mlp->hidden, BLOCK_ROWS, &args->a));
    if (backward)
        return make_map(backend, mlp->weight, (int64_t)groups * mlp->hidden, mlp->inner, 64,
                        &args->b);
    return make_map(backend, mlp->weight, (int64_t)groups * 2 * mlp->inner, mlp->hidden, 64,
                    &args->b);
}

// Prepares the kernel and asks how many of its clusters run at a time: multiprocessors come in
// groups whose size a cluster need not divide.
static Status count_clusters(CudaBackend *backend, const void *kernel, int *clusters) {
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = CLUSTER;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)(backend->num_sms / CLUSTER * CLUSTER));
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = SHARED_BYTES;
    config.attrs = &cluster;
    config.numAttrs = 1;
    CUDA_TRY(backend, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           SHARED_BYTES));
    CUDA_TRY(backend, cudaOccupancyMaxActiveClusters(clusters, kernel, &config));
    if (*clusters < 1) FAIL(STATUS_INTERNAL, "no cluster of %d blocks fits on the GPU", CLUSTER);
    return STATUS_OK;
}

template <bool BACKWARD, bool SCALED>
static Status launch(CudaBackend *backend, const HopperMlp *mlp) {
    HopperArgs args = {};
    TRY(make_args(backend, mlp, BACKWARD, &args));
    auto kernel = mlp_kernel<BACKWARD, SCALED>;
    static int clusters; // that fit on the device, the same on every one of a machine
    if (clusters == 0) TRY(count_clusters(backend, (const void *)kernel, &clusters));
    // Blocks that stay for their share of all tiles are late by a whole share where a collective
    // has taken their SMs. Shares of a few tiles then let the others take over.
    const int most = backend->shares_sms ? (int)div_up(args.tiles, TILES_SHARED) : clusters;
    const int used = args.tiles < most ? args.tiles : most;
    kernel<<<CLUSTER *(unsigned)used, THREADS, SHARED_BYTES, backend->stream>>>(args);
    LAUNCH_TRY(backend);
    return STATUS_OK;
}

bool hopper_mlp_takes(const CudaBackend *backend, const HopperMlp *mlp) {
    const uintptr_t bits = (uintptr_t)mlp->weight | (uintptr_t)mlp->in | (uintptr_t)mlp->gate_up |
                           (uintptr_t)mlp->activation | (uintptr_t)mlp->dgate_up;
    return backend->capability == 90 && backend->base.compute_dtype == DTYPE_BF16 &&
           mlp->hidden % TILE_K == 0 && mlp->inner % 8 == 0 && bits % 16 == 0 &&
           mlp->groups <= HOPPER_GROUPS_MAX && mlp->rows > 0 && mlp->rows < INT32_MAX / 2;
}

int64_t hopper_mlp_partials(int64_t rows, int inner) {
    return rows * div_up(inner, TILE_COLUMNS);
}

Status hopper_mlp_forward(CudaBackend *backend, const HopperMlp *mlp) {
    return mlp->scale ? launch<false, true>(backend, mlp) : launch<false, false>(backend, mlp);
}

Status hopper_mlp_backward(CudaBackend *backend, const HopperMlp *mlp) {
    if (!mlp->scale) return launch<true, false>(backend, mlp);
    TRY((launch<true, true>(backend, mlp)));
    sum_partials_kernel<<<(unsigned)div_up(mlp->rows, 256), 256, 0, backend->stream>>>(
        mlp->rows, (int)div_up(mlp->inner, TILE_COLUMNS), mlp->partial, mlp->scale_index,
        mlp->dscale);
    LAUNCH_TRY(backend);
    return STATUS_OK;
}
