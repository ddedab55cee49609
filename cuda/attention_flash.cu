// Attention on the tensor cores (bf16, head_dim a multiple of 8 up to 128): the S x S matrix exists
// only as tiles in registers (Dao et al. 2022, Dao 2023).
//
// Forward. A block owns BM queries of one head and walks the key tiles they may see, keeping the
// running maximum m, the sum l and the unnormalised output in registers. Each warp owns 16 MT rows,
// so that softmax needs no other warp. Keys and values arrive by cp.async one tile ahead.
//
// Backward. Nothing is added atomically, so the same input gives the same bits. dq is computed by
// query tiles; dk and dv by key tiles, summing over the query heads of the group in head order.
// Both compute the probabilities again, p = exp(s - lse): 7 products instead of 5, the price of the
// fixed order. With delta = Σ dout·out per row,
//   dv += pᵀ·dout    ds = p·(dout·vᵀ - delta)    dq += ds·k/√D    dk += dsᵀ·q/√D
// The dk/dv kernel computes everything transposed (keys are rows), so that pᵀ and dsᵀ are already
// fragments of the next product and never pass through shared memory.
//
// D is head_dim rounded up to 64 or 128; the columns between are zero in shared memory.
// Masks are applied only on tiles that need one. Scores are kept in units of log2.
#include "cuda/attention.h"
#include "cuda/mma.cuh"

typedef struct FlashArgs {
    const bf16 *q, *k, *v;         // of the first token's first head; tokens `stride` apart
    const int32_t *document_start; // (B, S) or NULL
    bf16 *out;                     // tokens `out_stride` apart
    float *log_sum_exp;            // (B, heads, S)
    const bf16 *dout;              // as out
    const float *delta;            // as log_sum_exp
    bf16 *dq, *dk, *dv;            // as q, k, v
    int64_t stride, out_stride;
    int length, heads, kv_heads, head_dim;
    float scale, scale_log2; // 1/√head_dim, and that times log2(e)
} FlashArgs;

// --- Pieces of all three kernels ----------------------------------------------------------------

template <int MT, int NT> static __device__ __forceinline__ void clear(float (&c)[MT][NT][4]) {
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) c[i][n][e] = 0.0f;
}

// c = A·Bᵀ: A is the rows [row, row + 16 MT) of a tile, B the 8 NT rows of another.
template <int D, int MT, int NT>
static __device__ __forceinline__ void multiply_nt(float (&c)[MT][NT][4], uint32_t a_tile, int row,
                                                   uint32_t b_tile) {
    clear(c);
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t a[MT][4];
#pragma unroll
        for (int i = 0; i < MT; i++) fragment_a<D>(a[i], a_tile, row + 16 * i, k);
#pragma unroll
        for (int n = 0; n < NT / 2; n++) {
            uint32_t b[4];
            fragment_b<D>(b, b_tile, 16 * n, k);
#pragma unroll
            for (int i = 0; i < MT; i++) {
                mma_bf16(c[i][2 * n], a[i], b[0], b[1]);
                mma_bf16(c[i][2 * n + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// c += P·B: P is a result of multiply_nt, rounded to bf16; B the 8 NT rows of a tile.
template <int D, int MT, int NT>
static __device__ __forceinline__ void multiply_nn(float (&c)[MT][D / 8][4],
                                                   const float (&p)[MT][NT][4], uint32_t b_tile) {
#pragma unroll
    for (int k = 0; k < NT / 2; k++) {
        uint32_t a[MT][4];
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float(&pair)[4] = p[i][2 * k + e / 2];
                a[i][e] = pack_bf16(pair[e % 2 * 2], pair[e % 2 * 2 + 1]);
            }
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t b[4];
            fragment_b_transposed<D>(b, b_tile, 16 * k, n);
#pragma unroll
            for (int i = 0; i < MT; i++) {
                mma_bf16(c[i][2 * n], a[i], b[0], b[1]);
                mma_bf16(c[i][2 * n + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// Writes a warp's 16 MT rows, times factor, as bf16. They pass through `staging`, rows [row, ...)
// of a tile that only this warp uses, so that global memory sees 16-byte stores.
template <int D, int MT>
static __device__ __forceinline__ void
store_rows(const float (&c)[MT][D / 8][4], const float (&factor)[MT][2], char *staging, int row,
           bf16 *to, int64_t stride, int rows, int width) {
    const int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
    __syncwarp(); // the warp's last reads of these rows are over
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t at = tile_offset<D>(row + 16 * i + 8 * half + g, n) + 4 * t;
                *(uint32_t *)(staging + at) = pack_bf16(c[i][n][2 * half] * factor[i][half],
                                                        c[i][n][2 * half + 1] * factor[i][half]);
            }
    __syncwarp();
    constexpr int CHUNKS = D / 8;
#pragma unroll
    for (int i = 0; i < 16 * MT * CHUNKS / 32; i++) {
        int r = row + (i * 32 + lane) / CHUNKS, chunk = (i * 32 + lane) % CHUNKS;
        if (r < rows && chunk * 8 < width)
            *(int4 *)(to + r * stride + chunk * 8) = *(int4 *)(staging + tile_offset<D>(r, chunk));
    }
}

// Keys and values [begin, begin + BN) into two neighbouring tiles.
template <int D, int BN, int THREADS>
static __device__ __forceinline__ void load_keys(const FlashArgs &args, uint32_t tiles,
                                                 const bf16 *k, const bf16 *v, int begin) {
    const int rows = args.length - begin;
    const int64_t at = begin * args.stride;
    tile_load<D, BN, THREADS>(tiles, k + at, args.stride, rows, args.head_dim);
    tile_load<D, BN, THREADS>(tiles + BN * D * 2, v + at, args.stride, rows, args.head_dim);
}

// First visible key of each of the lane's rows; 0 without documents and past the end.
template <int MT>
static __device__ __forceinline__ void first_keys(int (&first)[MT][2], const int32_t *starts,
                                                  int query, int length) {
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = query + 16 * i + 8 * half;
            first[i][half] = starts && row < length ? starts[row] : 0;
        }
}

// Scores of keys a query may not see become -inf. `query` and `key` are the lane's first row and
// column.
template <int MT, int NT>
static __device__ __forceinline__ void mask_keys(float (&s)[MT][NT][4], int query, int key,
                                                 const int (&first)[MT][2]) {
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int row = query + 16 * i + e / 2 * 8, column = key + 8 * n + e % 2;
                if (column > row || column < first[i][e / 2]) s[i][n][e] = -INFINITY;
            }
}

// What a block of query rows works on.
typedef struct QueryBlock {
    const bf16 *k, *v;                    // of its sequence and key head
    const int32_t *starts;                // of its sequence, or NULL
    int64_t token, q_at, out_at, stat_at; // first token; offsets of it in q, out, log_sum_exp
    int key_begin, key_end;
} QueryBlock;

template <int BM, int BN>
static __device__ __forceinline__ QueryBlock query_block(const FlashArgs &args, int q0) {
    const int head = blockIdx.x, kv_head = head / (args.heads / args.kv_heads);
    const int64_t batch = blockIdx.y;
    QueryBlock b;
    b.token = batch * args.length;
    b.k = args.k + b.token * args.stride + kv_head * args.head_dim;
    b.v = args.v + b.token * args.stride + kv_head * args.head_dim;
    b.starts = args.document_start ? args.document_start + b.token : nullptr;
    b.q_at = (b.token + q0) * args.stride + head * args.head_dim;
    b.out_at = (b.token + q0) * args.out_stride + head * args.head_dim;
    b.stat_at = (batch * args.heads + head) * args.length + q0;
    b.key_begin = b.starts ? b.starts[q0] / BN * BN : 0;
    b.key_end = min(q0 + BM, args.length);
    return b;
}

// --- Forward ------------------------------------------------------------------------------------

// Turns a tile's scores into exp(score - m) and brings m, l and the output up to date. l is the
// lane's own part of the row sum.
template <int D, int MT, int NT>
static __device__ __forceinline__ void softmax_step(float (&s)[MT][NT][4], float (&o)[MT][D / 8][4],
                                                    float (&m)[MT][2], float (&l)[MT][2],
                                                    float scale_log2) {
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float highest = m[i][half];
#pragma unroll
            for (int n = 0; n < NT; n++)
                highest = fmaxf(highest, fmaxf(s[i][n][2 * half], s[i][n][2 * half + 1]));
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
            // A row that has seen no key yet: -inf - -inf must not arise.
            const float base = highest == -INFINITY ? 0.0f : highest * scale_log2;
            const float shrink = exp2_fast(m[i][half] * scale_log2 - base);
            m[i][half] = highest;
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    s[i][n][e] = exp2_fast(s[i][n][e] * scale_log2 - base);
                    sum += s[i][n][e];
                }
            l[i][half] = l[i][half] * shrink + sum;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                o[i][n][2 * half] *= shrink;
                o[i][n][2 * half + 1] *= shrink;
            }
        }
}

// Grid (heads, B, query tiles), the longest tiles first.
template <int D, int WARPS, int MT, int BN>
static __global__ void __launch_bounds__(WARPS * 32) forward_kernel(const FlashArgs args) {
    constexpr int BM = WARPS * MT * 16, THREADS = WARPS * 32;
    constexpr uint32_t STAGE = 2 * BN * D * 2;
    extern __shared__ __align__(1024) char shared[];
    const int q0 = (gridDim.z - 1 - blockIdx.z) * BM;
    const QueryBlock block = query_block<BM, BN>(args, q0);
    const uint32_t q_tile = shared_address(shared), keys = q_tile + BM * D * 2;
    tile_load<D, BM, THREADS>(q_tile, args.q + block.q_at, args.stride, args.length - q0,
                              args.head_dim);
    load_keys<D, BN, THREADS>(args, keys, block.k, block.v, block.key_begin);

    const int lane = threadIdx.x & 31, row = (threadIdx.x >> 5) * MT * 16; // the warp's first
    const int query = q0 + row + lane / 4, last = q0 + row + 16 * MT - 1;
    int first[MT][2];
    first_keys(first, block.starts, query, args.length);
    const int unmasked_from = block.starts ? block.starts[min(last, args.length - 1)] : 0;
    float o[MT][D / 8][4], m[MT][2], l[MT][2];
    clear(o);
#pragma unroll
    for (int i = 0; i < 2 * MT; i++) m[i / 2][i % 2] = -INFINITY, l[i / 2][i % 2] = 0.0f;

    int stage = 0;
    for (int k0 = block.key_begin; k0 < block.key_end; k0 += BN, stage ^= 1) {
        const uint32_t k_tile = keys + stage * STAGE;
        copy_async_wait_all();
        __syncthreads(); // this tile has arrived, and nobody reads the other any more
        if (k0 + BN < block.key_end)
            load_keys<D, BN, THREADS>(args, keys + (stage ^ 1) * STAGE, block.k, block.v, k0 + BN);
        if (k0 > last) continue; // wholly after the warp's queries
        float s[MT][BN / 8][4];
        multiply_nt<D>(s, q_tile, row, k_tile);
        if (k0 + BN - 1 > q0 + row || k0 < unmasked_from)
            mask_keys(s, query, k0 + lane % 4 * 2, first);
        softmax_step<D>(s, o, m, l, args.scale_log2);
        multiply_nn<D>(o, s, k_tile + BN * D * 2);
    }

#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = l[i][half];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            l[i][half] = 1.0f / sum;
            int r = row + lane / 4 + 16 * i + 8 * half;
            if (lane % 4 == 0 && q0 + r < args.length)
                args.log_sum_exp[block.stat_at + r] = m[i][half] * args.scale + logf(sum);
        }
    store_rows<D>(o, l, shared, row, args.out + block.out_at, args.out_stride, args.length - q0,
                  args.head_dim);
}

// --- Backward -----------------------------------------------------------------------------------

// Grid as forward. dq of BM queries.
template <int D, int WARPS, int MT, int BN>
static __global__ void __launch_bounds__(WARPS * 32) backward_query_kernel(const FlashArgs args) {
    constexpr int BM = WARPS * MT * 16, THREADS = WARPS * 32;
    constexpr uint32_t STAGE = 2 * BN * D * 2;
    extern __shared__ __align__(1024) char shared[];
    const int q0 = (gridDim.z - 1 - blockIdx.z) * BM;
    const QueryBlock block = query_block<BM, BN>(args, q0);
    const uint32_t q_tile = shared_address(shared), do_tile = q_tile + BM * D * 2;
    const uint32_t keys = do_tile + BM * D * 2;
    tile_load<D, BM, THREADS>(q_tile, args.q + block.q_at, args.stride, args.length - q0,
                              args.head_dim);
    tile_load<D, BM, THREADS>(do_tile, args.dout + block.out_at, args.out_stride, args.length - q0,
                              args.head_dim);
    load_keys<D, BN, THREADS>(args, keys, block.k, block.v, block.key_begin);

    const int lane = threadIdx.x & 31, row = (threadIdx.x >> 5) * MT * 16;
    const int query = q0 + row + lane / 4, last = q0 + row + 16 * MT - 1;
    int first[MT][2];
    first_keys(first, block.starts, query, args.length);
    const int unmasked_from = block.starts ? block.starts[min(last, args.length - 1)] : 0;
    float dq[MT][D / 8][4], lse_log2[MT][2], delta[MT][2], factor[MT][2];
    clear(dq);
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int r = row + lane / 4 + 16 * i + 8 * half;
            bool exists = q0 + r < args.length;
            lse_log2[i][half] = exists ? args.log_sum_exp[block.stat_at + r] * LOG2_E : 0.0f;
            delta[i][half] = exists ? args.delta[block.stat_at + r] : 0.0f;
            factor[i][half] = args.scale;
        }

    int stage = 0;
    for (int k0 = block.key_begin; k0 < block.key_end; k0 += BN, stage ^= 1) {
        const uint32_t k_tile = keys + stage * STAGE;
        copy_async_wait_all();
        __syncthreads();
        if (k0 + BN < block.key_end)
            load_keys<D, BN, THREADS>(args, keys + (stage ^ 1) * STAGE, block.k, block.v, k0 + BN);
        if (k0 > last) continue;
        float s[MT][BN / 8][4], dp[MT][BN / 8][4];
        multiply_nt<D>(s, q_tile, row, k_tile);
        if (k0 + BN - 1 > q0 + row || k0 < unmasked_from)
            mask_keys(s, query, k0 + lane % 4 * 2, first);
        multiply_nt<D>(dp, do_tile, row, k_tile + BN * D * 2);
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int n = 0; n < BN / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float p = exp2_fast(s[i][n][e] * args.scale_log2 - lse_log2[i][e / 2]);
                    s[i][n][e] = p * (dp[i][n][e] - delta[i][e / 2]);
                }
        multiply_nn<D>(dq, s, k_tile);
    }
    store_rows<D>(dq, factor, shared, row, args.dq + block.q_at, args.stride, args.length - q0,
                  args.head_dim);
}

// One step of the dk/dv kernel in shared memory: BQ queries of one head.
template <int D, int BQ> struct QueryStage {
    static constexpr uint32_t DOUT = BQ * D * 2, LSE = 2 * DOUT, DELTA = LSE + BQ * 4;
    static constexpr uint32_t START = DELTA + BQ * 4;
    static constexpr uint32_t BYTES = (START + BQ * 4 + 1023) / 1024 * 1024; // tiles follow
};

template <int D, int BQ, int THREADS>
static __device__ __forceinline__ void load_queries(const FlashArgs &args, uint32_t stage,
                                                    int64_t batch, int head, int q0) {
    typedef QueryStage<D, BQ> Stage;
    const int rows = args.length - q0;
    const int64_t token = batch * args.length + q0;
    tile_load<D, BQ, THREADS>(stage, args.q + token * args.stride + head * args.head_dim,
                              args.stride, rows, args.head_dim);
    tile_load<D, BQ, THREADS>(stage + Stage::DOUT,
                              args.dout + token * args.out_stride + head * args.head_dim,
                              args.out_stride, rows, args.head_dim);
    const int r = threadIdx.x;
    if (r >= BQ) return;
    const bool exists = r < rows;
    const int64_t at = (batch * args.heads + head) * args.length + q0 + (exists ? r : 0);
    copy_async_4(stage + Stage::LSE + 4 * r, args.log_sum_exp + at, exists);
    copy_async_4(stage + Stage::DELTA + 4 * r, args.delta + at, exists);
    if (args.document_start)
        copy_async_4(stage + Stage::START + 4 * r, args.document_start + token + (exists ? r : 0),
                     exists);
}

// Queries past the last that sees key `last`: starts is non-decreasing, so a binary search.
static __device__ __forceinline__ int query_end(const int32_t *starts, int last, int length) {
    int low = min(last, length - 1), high = length; // low sees a key <= last: itself or nearer
    while (starts && high - low > 1) {
        int middle = (low + high) / 2;
        if (starts[middle] <= last)
            low = middle;
        else
            high = middle;
    }
    return high;
}

// p = exp(s - lse), 0 where masked; rows are keys, columns queries. `masked` says whether any
// element of the tile can be.
template <int MT, int NT>
static __device__ __forceinline__ void probabilities(float (&s)[MT][NT][4], const FlashArgs &args,
                                                     const char *lse, const char *starts,
                                                     bool masked, int key, int q0) {
    const int column = (threadIdx.x & 3) * 2;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        const float2 l = *(const float2 *)(lse + 4 * (8 * n + column));
        int2 start = make_int2(0, 0);
        if (masked && args.document_start) start = *(const int2 *)(starts + 4 * (8 * n + column));
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float *p = &s[i][n][e];
                *p = exp2_fast(*p * args.scale_log2 - (e % 2 ? l.y : l.x) * LOG2_E);
                int query = q0 + 8 * n + column + e % 2, k = key + 16 * i + e / 2 * 8;
                if (masked &&
                    (query < k || query >= args.length || k < (e % 2 ? start.y : start.x)))
                    *p = 0.0f;
            }
    }
}

// Grid (kv_heads, B, key tiles), the longest tiles first. dk and dv of BN keys.
template <int D, int WARPS, int MT, int BQ>
static __global__ void __launch_bounds__(WARPS * 32) backward_key_kernel(const FlashArgs args) {
    typedef QueryStage<D, BQ> Stage;
    constexpr int BN = WARPS * MT * 16, THREADS = WARPS * 32;
    extern __shared__ __align__(1024) char shared[];
    const int kv_head = blockIdx.x, group = args.heads / args.kv_heads, k0 = blockIdx.z * BN;
    const int64_t batch = blockIdx.y;
    const int64_t k_at = (batch * args.length + k0) * args.stride + kv_head * args.head_dim;
    const uint32_t k_tile = shared_address(shared), v_tile = k_tile + BN * D * 2;
    load_keys<D, BN, THREADS>(args, k_tile, args.k + k_at - k0 * args.stride,
                              args.v + k_at - k0 * args.stride, k0);

    const int32_t *starts = args.document_start;
    if (starts) starts += batch * args.length;
    const int q_begin = k0 / BQ * BQ, q_end = query_end(starts, k0 + BN - 1, args.length);
    const int tiles = (q_end - q_begin + BQ - 1) / BQ, steps = tiles * group;
    load_queries<D, BQ, THREADS>(args, v_tile + BN * D * 2, batch, kv_head * group, q_begin);

    const int lane = threadIdx.x & 31, row = (threadIdx.x >> 5) * MT * 16;
    const int key = k0 + row + lane / 4;
    float dk[MT][D / 8][4], dv[MT][D / 8][4];
    clear(dk);
    clear(dv);
    for (int step = 0; step < steps; step++) {
        const uint32_t at = 2 * BN * D * 2 + step % 2 * Stage::BYTES;
        const uint32_t q_tile = k_tile + at, do_tile = q_tile + Stage::DOUT;
        const char *stage = shared + at;
        const int q0 = q_begin + step % tiles * BQ, next = step + 1;
        copy_async_wait_all();
        __syncthreads();
        if (next < steps)
            load_queries<D, BQ, THREADS>(args, k_tile + 2 * BN * D * 2 + next % 2 * Stage::BYTES,
                                         batch, kv_head * group + next / tiles,
                                         q_begin + next % tiles * BQ);
        if (q0 + BQ - 1 < k0 + row) continue; // wholly before the warp's keys
        float s[MT][BQ / 8][4], dp[MT][BQ / 8][4];
        multiply_nt<D>(s, k_tile, row, q_tile);
        const int last = min(BQ, args.length - q0) - 1;
        const bool masked = q0 < k0 + row + 16 * MT - 1 || q0 + BQ > args.length ||
                            (starts && ((const int *)(stage + Stage::START))[last] > k0 + row);
        probabilities(s, args, stage + Stage::LSE, stage + Stage::START, masked, key, q0);
        multiply_nn<D>(dv, s, do_tile);
        multiply_nt<D>(dp, v_tile, row, do_tile);
#pragma unroll
        for (int n = 0; n < BQ / 8; n++) {
            const float2 delta =
                *(const float2 *)(stage + Stage::DELTA + 4 * (8 * n + lane % 4 * 2));
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[i][n][e] *= dp[i][n][e] - (e % 2 ? delta.y : delta.x);
        }
        multiply_nn<D>(dk, s, q_tile);
    }
    float one[MT][2], scale[MT][2];
#pragma unroll
    for (int i = 0; i < 2 * MT; i++) one[i / 2][i % 2] = 1.0f, scale[i / 2][i % 2] = args.scale;
    store_rows<D>(dk, scale, shared, row, args.dk + k_at, args.stride, args.length - k0,
                  args.head_dim);
    store_rows<D>(dv, one, shared + BN * D * 2, row, args.dv + k_at, args.stride, args.length - k0,
                  args.head_dim);
}

// --- Launching ----------------------------------------------------------------------------------

bool attention_flash_takes(const CudaBackend *backend, const AttentionArgs *args) {
    return backend->base.compute_dtype == DTYPE_BF16 && args->head_dim % 8 == 0 &&
           args->head_dim <= 128;
}

static Status flash_args(const AttentionArgs *args, const float *delta, FlashArgs *out) {
    INVARIANT(args->num_heads % args->num_kv_heads == 0 && args->batch < 65536 &&
              args->sequence_length < 1 << 21); // tiles fit grid dimensions y and z
    const bf16 *qkv = (const bf16 *)args->qkv;
    bf16 *dqkv = (bf16 *)args->dqkv;
    const int64_t k_at = (int64_t)args->num_heads * args->head_dim;
    const int64_t v_at = k_at + (int64_t)args->num_kv_heads * args->head_dim;
    FlashArgs flash = {};
    flash.q = qkv, flash.k = qkv + k_at, flash.v = qkv + v_at;
    flash.document_start = args->document_start;
    flash.out = (bf16 *)args->out;
    flash.log_sum_exp = args->log_sum_exp;
    flash.dout = (const bf16 *)args->dout;
    flash.delta = delta;
    flash.stride = attention_qkv_stride(args);
    flash.out_stride = k_at;
    flash.length = (int)args->sequence_length;
    flash.heads = args->num_heads, flash.kv_heads = args->num_kv_heads;
    flash.head_dim = args->head_dim;
    flash.scale = (float)(1.0 / sqrt((double)args->head_dim));
    flash.scale_log2 = flash.scale * LOG2_E;
    if (delta) flash.dq = dqkv, flash.dk = dqkv + k_at, flash.dv = dqkv + v_at;
    *out = flash;
    return STATUS_OK;
}

static Status launch(CudaBackend *backend, void (*kernel)(FlashArgs), dim3 grid, int threads,
                     size_t shared_bytes, const FlashArgs *args) {
    CUDA_TRY(backend, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           (int)shared_bytes));
    kernel<<<grid, threads, shared_bytes, backend->stream>>>(*args);
    LAUNCH_TRY(backend);
    return STATUS_OK;
}

static dim3 grid_of(const AttentionArgs *args, int heads, int rows) {
    return dim3((unsigned)heads, (unsigned)args->batch,
                (unsigned)div_up(args->sequence_length, rows));
}

template <int D, int WARPS, int MT, int BN>
static Status forward(CudaBackend *backend, const AttentionArgs *args, const FlashArgs *flash) {
    constexpr int BM = WARPS * MT * 16;
    return launch(backend, forward_kernel<D, WARPS, MT, BN>, grid_of(args, args->num_heads, BM),
                  WARPS * 32, (BM + 4 * BN) * D * 2, flash);
}

template <int D, int WARPS, int MT, int BN>
static Status backward_query(CudaBackend *backend, const AttentionArgs *args,
                             const FlashArgs *flash) {
    constexpr int BM = WARPS * MT * 16;
    return launch(backend, backward_query_kernel<D, WARPS, MT, BN>,
                  grid_of(args, args->num_heads, BM), WARPS * 32, (2 * BM + 4 * BN) * D * 2, flash);
}

template <int D, int WARPS, int MT, int BQ>
static Status backward_key(CudaBackend *backend, const AttentionArgs *args,
                           const FlashArgs *flash) {
    constexpr int BN = WARPS * MT * 16;
    return launch(backend, backward_key_kernel<D, WARPS, MT, BQ>,
                  grid_of(args, args->num_kv_heads, BN), WARPS * 32,
                  2 * BN * D * 2 + 2 * QueryStage<D, BQ>::BYTES, flash);
}

Status attention_flash_forward(CudaBackend *backend, const AttentionArgs *args) {
    FlashArgs flash;
    TRY(flash_args(args, NULL, &flash));
    if (args->head_dim <= 64) return forward<64, 4, 2, 64>(backend, args, &flash);
    return forward<128, 8, 1, 64>(backend, args, &flash);
}

Status attention_flash_backward(CudaBackend *backend, const AttentionArgs *args,
                                const float *delta) {
    FlashArgs flash;
    TRY(flash_args(args, delta, &flash));
    if (args->head_dim <= 64) {
        TRY((backward_query<64, 4, 2, 32>(backend, args, &flash)));
        return backward_key<64, 4, 1, 32>(backend, args, &flash);
    }
    TRY((backward_query<128, 4, 1, 32>(backend, args, &flash)));
    return backward_key<128, 4, 1, 16>(backend, args, &flash);
}
