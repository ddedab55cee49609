// Attention in fp32 arithmetic for any storage type and any head_dim up to 256: the reference on
// the device, and the fallback for head sizes the tensor-core kernels do not take.
//
// As there, tiles and an online softmax in the forward; dq by query tiles, dk and dv by key tiles
// over the query heads of the group in the backward; no atomics. A tile has ROWS rows; eight
// neighbouring lanes share a row: each computes every eighth score of it and owns every eighth
// column of the result.
#include "cuda/attention.h"
#include "cuda/common.cuh"

enum { LANES = 8 }; // per row

template <typename T> struct PlainArgs {
    const T *q, *k, *v;            // of the first token's first head; tokens `stride` apart
    const int32_t *document_start; // (B, S) or NULL
    T *out;                        // tokens `out_stride` apart
    float *log_sum_exp;            // (B, heads, S)
    const T *dout;                 // as out
    const float *delta;            // as log_sum_exp
    T *dq, *dk, *dv;               // as q, k, v
    int64_t stride, out_stride, length;
    int heads, kv_heads, head_dim;
    float scale; // 1/√head_dim
};

// Rows are one float longer than D, so that lanes that read one column meet different banks.
template <int D, int ROWS> using Tile = float[ROWS][D + 1];

// Rows [begin, begin + ROWS) of a sequence into shared memory; zeros beyond `end` and head_dim.
template <typename T, int D, int ROWS>
static __device__ void load_tile(Tile<D, ROWS> &tile, const T *from, int64_t stride, int64_t begin,
                                 int64_t end, int head_dim) {
    for (int i = threadIdx.x; i < ROWS * D; i += ROWS * LANES) {
        int row = i / D, d = i % D;
        bool exists = begin + row < end && d < head_dim;
        tile[row][d] = exists ? to_float(from[(begin + row) * stride + d]) : 0.0f;
    }
}

// s[j] = a · b[lane + 8 j]
template <int D, int ROWS>
static __device__ void dot_rows(float (&s)[ROWS / LANES], const float *a, const Tile<D, ROWS> &b,
                                int lane, int head_dim) {
    for (int j = 0; j < ROWS / LANES; j++) s[j] = 0.0f;
    for (int d = 0; d < head_dim; d++) {
        float x = a[d];
#pragma unroll
        for (int j = 0; j < ROWS / LANES; j++) s[j] += x * b[lane + LANES * j][d];
    }
}

// c[i] += Σ_j weights[j] · rows[j][lane + 8 i]
template <int D, int ROWS>
static __device__ void add_rows(float (&c)[D / LANES], const float *weights,
                                const Tile<D, ROWS> &rows, int lane) {
    for (int j = 0; j < ROWS; j++) {
        float w = weights[j];
#pragma unroll
        for (int i = 0; i < D / LANES; i++) c[i] += w * rows[j][lane + LANES * i];
    }
}

template <typename T, int D>
static __device__ void store_row(const float (&c)[D / LANES], float factor, T *to, int lane,
                                 int head_dim) {
#pragma unroll
    for (int i = 0; i < D / LANES; i++) {
        int d = lane + LANES * i;
        if (d < head_dim) to[d] = from_float<T>(c[i] * factor);
    }
}

// Over the eight lanes of a row.
static __device__ float row_sum(float x) {
    for (int offset = LANES / 2; offset > 0; offset >>= 1)
        x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}
static __device__ float row_max(float x) {
    for (int offset = LANES / 2; offset > 0; offset >>= 1)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

template <int D, int ROWS> struct PlainShared {
    Tile<D, ROWS> a, b, c, d;
    float p[ROWS][ROWS + 1], ds[ROWS][ROWS + 1];
};

static __device__ bool visible(const int32_t *starts, int64_t query, int64_t key, int64_t length) {
    return query < length && key <= query && (!starts || key >= starts[query]);
}

// Grid (heads, B, query tiles).
template <typename T, int D, int ROWS>
static __global__ void __launch_bounds__(ROWS *LANES, 1) forward_kernel(const PlainArgs<T> args) {
    extern __shared__ __align__(128) char shared[];
    PlainShared<D, ROWS> &tile = *(PlainShared<D, ROWS> *)shared;
    const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES, head = blockIdx.x;
    const int64_t batch = blockIdx.y, q0 = (int64_t)blockIdx.z * ROWS, query = q0 + row;
    const int64_t token = batch * args.length;
    const int64_t kv = token * args.stride + head / (args.heads / args.kv_heads) * args.head_dim;
    const int32_t *starts = args.document_start ? args.document_start + token : nullptr;
    load_tile<T, D, ROWS>(tile.a, args.q + token * args.stride + head * args.head_dim, args.stride,
                          q0, args.length, args.head_dim);
    float o[D / LANES] = {}, s[ROWS / LANES], m = -INFINITY, l = 0.0f;
    const int64_t end = min(q0 + ROWS, args.length);
    for (int64_t k0 = starts ? starts[q0] : 0; k0 < end; k0 += ROWS) {
        __syncthreads();
        load_tile<T, D, ROWS>(tile.b, args.k + kv, args.stride, k0, end, args.head_dim);
        load_tile<T, D, ROWS>(tile.c, args.v + kv, args.stride, k0, end, args.head_dim);
        __syncthreads();
        dot_rows<D, ROWS>(s, tile.a[row], tile.b, lane, args.head_dim);
        float highest = m, sum = 0.0f;
        for (int j = 0; j < ROWS / LANES; j++) {
            bool seen = visible(starts, query, k0 + lane + LANES * j, args.length);
            s[j] = seen ? s[j] * args.scale : -INFINITY;
            highest = fmaxf(highest, s[j]);
        }
        highest = row_max(highest);
        const float base = highest == -INFINITY ? 0.0f : highest; // no key seen yet
        const float shrink = expf(m - base);
        for (int j = 0; j < ROWS / LANES; j++) {
            s[j] = expf(s[j] - base);
            tile.p[row][lane + LANES * j] = s[j];
            sum += s[j];
        }
        __syncwarp(); // the lanes of a row are in one warp
        l = l * shrink + row_sum(sum);
        m = highest;
        for (int i = 0; i < D / LANES; i++) o[i] *= shrink;
        add_rows<D, ROWS>(o, tile.p[row], tile.c, lane);
    }
    if (query >= args.length) return;
    T *out = args.out + (token + query) * args.out_stride + head * args.head_dim;
    store_row<T, D>(o, 1.0f / l, out, lane, args.head_dim);
    if (lane == 0)
        args.log_sum_exp[(batch * args.heads + head) * args.length + query] = m + logf(l);
}

// p and ds of one query and key; 0 where the query may not see the key.
static __device__ void gradient(bool seen, float s, float dp, float scale, float lse, float delta,
                                float *p, float *ds) {
    *p = seen ? expf(s * scale - lse) : 0.0f;
    *ds = seen ? *p * (dp - delta) : 0.0f;
}

// Grid as forward: dq.
template <typename T, int D, int ROWS>
static __global__ void __launch_bounds__(ROWS *LANES, 1)
    backward_query_kernel(const PlainArgs<T> args) {
    extern __shared__ __align__(128) char shared[];
    PlainShared<D, ROWS> &tile = *(PlainShared<D, ROWS> *)shared;
    const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES, head = blockIdx.x;
    const int64_t batch = blockIdx.y, q0 = (int64_t)blockIdx.z * ROWS, query = q0 + row;
    const int64_t token = batch * args.length, q_at = token * args.stride + head * args.head_dim;
    const int64_t kv = token * args.stride + head / (args.heads / args.kv_heads) * args.head_dim;
    const int64_t stat = (batch * args.heads + head) * args.length + query;
    const int32_t *starts = args.document_start ? args.document_start + token : nullptr;
    load_tile<T, D, ROWS>(tile.a, args.q + q_at, args.stride, q0, args.length, args.head_dim);
    load_tile<T, D, ROWS>(tile.d, args.dout + token * args.out_stride + head * args.head_dim,
                          args.out_stride, q0, args.length, args.head_dim);
    const float lse = query < args.length ? args.log_sum_exp[stat] : 0.0f;
    const float delta = query < args.length ? args.delta[stat] : 0.0f;
    float dq[D / LANES] = {}, s[ROWS / LANES], dp[ROWS / LANES];
    const int64_t end = min(q0 + ROWS, args.length);
    for (int64_t k0 = starts ? starts[q0] : 0; k0 < end; k0 += ROWS) {
        __syncthreads();
        load_tile<T, D, ROWS>(tile.b, args.k + kv, args.stride, k0, end, args.head_dim);
        load_tile<T, D, ROWS>(tile.c, args.v + kv, args.stride, k0, end, args.head_dim);
        __syncthreads();
        dot_rows<D, ROWS>(s, tile.a[row], tile.b, lane, args.head_dim);
        dot_rows<D, ROWS>(dp, tile.d[row], tile.c, lane, args.head_dim);
        for (int j = 0; j < ROWS / LANES; j++) {
            float p;
            gradient(visible(starts, query, k0 + lane + LANES * j, args.length), s[j], dp[j],
                     args.scale, lse, delta, &p, &tile.ds[row][lane + LANES * j]);
        }
        __syncwarp();
        add_rows<D, ROWS>(dq, tile.ds[row], tile.b, lane);
    }
    if (query < args.length)
        store_row<T, D>(dq, args.scale, args.dq + q_at + query * args.stride, lane, args.head_dim);
}

// Grid (kv_heads, B, key tiles): dk and dv. Rows are keys.
template <typename T, int D, int ROWS>
static __global__ void __launch_bounds__(ROWS *LANES, 1)
    backward_key_kernel(const PlainArgs<T> args) {
    extern __shared__ __align__(128) char shared[];
    PlainShared<D, ROWS> &tile = *(PlainShared<D, ROWS> *)shared;
    const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES, kv_head = blockIdx.x;
    const int64_t batch = blockIdx.y, k0 = (int64_t)blockIdx.z * ROWS, key = k0 + row;
    const int64_t token = batch * args.length, kv = token * args.stride + kv_head * args.head_dim;
    const int32_t *starts = args.document_start ? args.document_start + token : nullptr;
    const int group = args.heads / args.kv_heads;
    load_tile<T, D, ROWS>(tile.a, args.k + kv, args.stride, k0, args.length, args.head_dim);
    load_tile<T, D, ROWS>(tile.b, args.v + kv, args.stride, k0, args.length, args.head_dim);
    float dk[D / LANES] = {}, dv[D / LANES] = {}, s[ROWS / LANES], dp[ROWS / LANES];
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
        const T *q = args.q + token * args.stride + head * args.head_dim;
        const T *dout = args.dout + token * args.out_stride + head * args.head_dim;
        const int64_t stat = (batch * args.heads + head) * args.length;
        for (int64_t q0 = k0; q0 < args.length; q0 += ROWS) {
            if (starts && starts[q0] >= k0 + ROWS) break; // no later query sees these keys
            __syncthreads();
            load_tile<T, D, ROWS>(tile.c, q, args.stride, q0, args.length, args.head_dim);
            load_tile<T, D, ROWS>(tile.d, dout, args.out_stride, q0, args.length, args.head_dim);
            __syncthreads();
            dot_rows<D, ROWS>(s, tile.a[row], tile.c, lane, args.head_dim);
            dot_rows<D, ROWS>(dp, tile.b[row], tile.d, lane, args.head_dim);
            for (int j = 0; j < ROWS / LANES; j++) {
                const int column = lane + LANES * j;
                const int64_t query = q0 + column, at = stat + min(query, args.length - 1);
                gradient(visible(starts, query, key, args.length), s[j], dp[j], args.scale,
                         args.log_sum_exp[at], args.delta[at], &tile.p[row][column],
                         &tile.ds[row][column]);
            }
            __syncwarp();
            add_rows<D, ROWS>(dv, tile.p[row], tile.d, lane);
            add_rows<D, ROWS>(dk, tile.ds[row], tile.c, lane);
        }
    }
    if (key >= args.length) return;
    store_row<T, D>(dk, args.scale, args.dk + kv + key * args.stride, lane, args.head_dim);
    store_row<T, D>(dv, 1.0f, args.dv + kv + key * args.stride, lane, args.head_dim);
}

// --- Launching ----------------------------------------------------------------------------------

template <typename T>
static Status plain_args(const AttentionArgs *args, const float *delta, PlainArgs<T> *out) {
    INVARIANT(args->num_heads % args->num_kv_heads == 0 && args->batch < 65536 &&
              args->sequence_length < 1 << 20); // tiles fit grid dimensions y and z
    const int64_t k_at = (int64_t)args->num_heads * args->head_dim;
    const int64_t v_at = k_at + (int64_t)args->num_kv_heads * args->head_dim;
    PlainArgs<T> plain = {};
    plain.q = (const T *)args->qkv, plain.k = plain.q + k_at, plain.v = plain.q + v_at;
    plain.document_start = args->document_start;
    plain.out = (T *)args->out;
    plain.log_sum_exp = args->log_sum_exp;
    plain.dout = (const T *)args->dout;
    plain.delta = delta;
    if (delta) {
        plain.dq = (T *)args->dqkv;
        plain.dk = plain.dq + k_at, plain.dv = plain.dq + v_at;
    }
    plain.stride = attention_qkv_stride(args);
    plain.out_stride = k_at;
    plain.length = args->sequence_length;
    plain.heads = args->num_heads, plain.kv_heads = args->num_kv_heads;
    plain.head_dim = args->head_dim;
    plain.scale = (float)(1.0 / sqrt((double)args->head_dim));
    *out = plain;
    return STATUS_OK;
}

template <typename T, int D, int ROWS>
static Status launch(CudaBackend *backend, void (*kernel)(PlainArgs<T>), int heads,
                     const AttentionArgs *args, const PlainArgs<T> *plain) {
    const size_t bytes = sizeof(PlainShared<D, ROWS>);
    const dim3 grid((unsigned)heads, (unsigned)args->batch,
                    (unsigned)div_up(args->sequence_length, ROWS));
    CUDA_TRY(backend,
             cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    kernel<<<grid, ROWS * LANES, bytes, backend->stream>>>(*plain);
    LAUNCH_TRY(backend);
    return STATUS_OK;
}

template <typename T, int D, int ROWS>
static Status run(CudaBackend *backend, const AttentionArgs *args, const float *delta) {
    PlainArgs<T> plain;
    TRY(plain_args(args, delta, &plain));
    if (!delta)
        return launch<T, D, ROWS>(backend, forward_kernel<T, D, ROWS>, args->num_heads, args,
                                  &plain);
    TRY((launch<T, D, ROWS>(backend, backward_query_kernel<T, D, ROWS>, args->num_heads, args,
                            &plain)));
    return launch<T, D, ROWS>(backend, backward_key_kernel<T, D, ROWS>, args->num_kv_heads, args,
                              &plain);
}

// delta NULL: forward. Tiles of 16 rows where 32 would pass 99 KB, sm_89's shared memory.
static Status dispatch(CudaBackend *backend, const AttentionArgs *args, const float *delta) {
    if (args->head_dim > 256)
        FAIL(STATUS_USAGE, "head_dim %d: attention on the GPU takes at most 256", args->head_dim);
    Status status = STATUS_OK;
    DISPATCH_DTYPE(backend->base.compute_dtype, T, {
        if (args->head_dim <= 64)
            status = run<T, 64, 32>(backend, args, delta);
        else if (args->head_dim <= 128)
            status = run<T, 128, 32>(backend, args, delta);
        else
            status = run<T, 256, 16>(backend, args, delta);
    });
    return status;
}

Status attention_plain_forward(CudaBackend *backend, const AttentionArgs *args) {
    return dispatch(backend, args, NULL);
}

Status attention_plain_backward(CudaBackend *backend, const AttentionArgs *args,
                                const float *delta) {
    return dispatch(backend, args, delta);
}
