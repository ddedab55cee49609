// The router backward.
//
// The gradient of a logit has the closed forms that cpu/route.c derives. It meets the two large
// operands once each: dx += dlogits · weight, and the weight's gradient is the sum of dlogitsᵀ · x
// over parts of the tokens, which are then added up in a fixed order. The number of parts depends
// on the shape alone.
//
// With up to ROUTE_CHUNK experts one kernel does all of that for its part: products_kernel works
// out the dlogits of its tokens and keeps its columns of the weight and of the weight's gradient in
// registers while x and dx stream past. With more experts these do not fit: dlogits_kernel writes
// the dlogits (T, N), dx_kernel takes eight tokens per thread so that a weight column is read once
// for all of them, and products_kernel is left with the weight's gradient, eight experts at a time.
#include <math.h>
#include "cuda/route.cuh"

enum {
    DX_TOKENS = 8,
    GRAD_THREADS = 128,
    GRAD_BLOCKS = 2,      // per multiprocessor: half of the registers each
    GRAD_PARTS = 256,     // at most
    GRAD_MIN_TOKENS = 32, // of a part
    GRAD_TILE = 128,      // tokens whose dlogits are staged at once
    GRAD_BATCH = 4,       // tokens that are computed while as many are in flight
};
static_assert(GRAD_TILE % GRAD_BATCH == 0, "a batch lies in one tile");

// --- Floats of a row, 16 bytes at a time where W > 1 -----------------------------------------

template <int W>
static __device__ __forceinline__ void load_floats(const float *__restrict__ from, float to[W]) {
    constexpr int PART = W < 4 ? W : 4;
#pragma unroll
    for (int i = 0; i < W; i += PART) {
        const Piece<float, PART> piece = load_piece<float, PART>(from + i);
#pragma unroll
        for (int l = 0; l < PART; l++) to[i + l] = piece.v[l];
    }
}

template <int W>
static __device__ __forceinline__ void store_floats(float *__restrict__ to, const float from[W]) {
    constexpr int PART = W < 4 ? W : 4;
#pragma unroll
    for (int i = 0; i < W; i += PART) {
        Piece<float, PART> piece;
#pragma unroll
        for (int l = 0; l < PART; l++) piece.v[l] = from[i + l];
        store_piece<float, PART>(to + i, piece);
    }
}

// --- Gradient of the logits ------------------------------------------------------------------

// Σ_j gate·dgate of one token, and Σ_i p·load, to every lane of its group.
template <int LANES, int PER_LANE>
static __device__ __forceinline__ void
token_sums(const RouteArgs &args, int64_t t, const float p[PER_LANE], const float load[PER_LANE],
           double *dot, double *mean_load) {
    const int k = args.top_k;
    *dot = *mean_load = 0.0;
#pragma unroll 1
    for (int j = threadIdx.x % LANES; j < k; j += LANES)
        *dot += (double)args.routing.gate[t * k + j] * args.dgate[t * k + j];
#pragma unroll
    for (int r = 0; r < PER_LANE; r++) *mean_load += (double)p[r] * load[r];
    *dot = group_sum<LANES>(*dot);
    *mean_load = group_sum<LANES>(*mean_load);
}

// f_e: the share of the assignments that goes to expert e.
static __device__ __forceinline__ float load_of(const RouteArgs &args, int e) {
    if (args.load) return args.load[e];
    const int32_t *begin = args.routing.expert_begin;
    return (float)((begin[e + 1] - begin[e]) / (double)(args.tokens * args.top_k));
}

// d: the gradient of token t's logits, 0 beyond the last expert, as is `load`. The whole group
// calls it.
template <int LANES, int PER_LANE>
static __device__ __forceinline__ void
token_dlogits(const RouteArgs &args, int64_t t, const float load[PER_LANE], float d[PER_LANE]) {
    const int lane = threadIdx.x % LANES, experts = args.num_experts, k = args.top_k;
    float p[PER_LANE];
#pragma unroll
    for (int r = 0; r < PER_LANE; r++) {
        const int e = lane + r * LANES;
        p[r] = e < experts ? args.routing.probabilities[t * experts + e] : 0.0f;
    }
    double dot, mean_load;
    token_sums<LANES, PER_LANE>(args, t, p, load, &dot, &mean_load);
    const bool renorm = args.gate_kind == GATE_RENORM;
    const float z = args.z_scale * 2.0f * args.routing.log_sum_exp[t];
    const float share = renorm ? (float)(dot / args.gate_scale) : 0.0f;
#pragma unroll
    for (int r = 0; r < PER_LANE; r++) {
        const float excess = load[r] - (float)mean_load;
        d[r] = p[r] * (args.balance_scale * excess + z - (renorm ? 0.0f : (float)dot));
    }
    for (int j = 0; j < k; j++) {
        const int32_t expert = args.routing.expert[t * k + j];
        const float own = args.routing.gate[t * k + j] * (args.dgate[t * k + j] - share);
#pragma unroll
        for (int r = 0; r < PER_LANE; r++)
            if (lane + r * LANES == expert) d[r] += own;
    }
}

// A warp per token.
template <int PER_LANE>
static __global__ void __launch_bounds__(ROUTE_THREADS)
    dlogits_kernel(const __grid_constant__ RouteArgs args, float *__restrict__ dlogits) {
    const int64_t t = ((int64_t)blockIdx.x * ROUTE_THREADS + threadIdx.x) / 32;
    if (t >= args.tokens) return;
    const int lane = threadIdx.x & 31;
    float load[PER_LANE], d[PER_LANE];
#pragma unroll
    for (int r = 0; r < PER_LANE; r++) {
        const int e = lane + r * 32;
        load[r] = e < args.num_experts ? load_of(args, e) : 0.0f;
    }
    token_dlogits<32, PER_LANE>(args, t, load, d);
#pragma unroll
    for (int r = 0; r < PER_LANE; r++) {
        const int e = lane + r * 32;
        if (e < args.num_experts) dlogits[t * args.num_experts + e] = d[r];
    }
}

// --- dx of many experts ----------------------------------------------------------------------

// A block does DX_TOKENS tokens, a thread W columns of all of them.
template <typename T, int W>
static __global__ void __launch_bounds__(GRAD_THREADS)
    dx_kernel(int64_t tokens, int hidden, int experts, const float *__restrict__ weight,
              const float *__restrict__ dlogits, T *__restrict__ dx) {
    __shared__ __align__(16) float staged[CUDA_MAX_EXPERTS][DX_TOKENS];
    const int64_t first = (int64_t)blockIdx.x * DX_TOKENS;
    const int count = (int)min(tokens - first, (int64_t)DX_TOKENS);
    for (int i = threadIdx.x; i < DX_TOKENS * experts; i += GRAD_THREADS)
        staged[i % experts][i / experts] =
            i < count * experts ? dlogits[first * experts + i] : 0.0f;
    __syncthreads();
    for (int h = threadIdx.x * W; h < hidden; h += GRAD_THREADS * W) {
        float sums[DX_TOKENS][W];
        T *to = dx + first * hidden + h;
#pragma unroll
        for (int t = 0; t < DX_TOKENS; t++) { // the last token again beyond the end
            const Piece<T, W> piece = load_piece<T, W>(to + (int64_t)min(t, count - 1) * hidden);
#pragma unroll
            for (int i = 0; i < W; i++) sums[t][i] = to_float(piece.v[i]);
        }
#pragma unroll 1
        for (int e = 0; e < experts; e++) {
            float w[W], d[DX_TOKENS];
            load_floats<W>(weight + (int64_t)e * hidden + h, w);
            load_floats<DX_TOKENS>(staged[e], d);
#pragma unroll
            for (int t = 0; t < DX_TOKENS; t++)
#pragma unroll
                for (int i = 0; i < W; i++) sums[t][i] += d[t] * w[i];
        }
#pragma unroll
        for (int t = 0; t < DX_TOKENS; t++) {
            if (t >= count) continue;
            Piece<T, W> piece;
#pragma unroll
            for (int i = 0; i < W; i++) piece.v[i] = from_float<T>(sums[t][i]);
            store_piece<T, W>(to + (int64_t)t * hidden, piece);
        }
    }
}

// --- Gradient of the weight, and dx of few experts -----------------------------------------------

// W columns of x and of dx of GRAD_BATCH tokens.
template <typename T, int W> struct Batch { Packed<T, W> x[GRAD_BATCH], dx[GRAD_BATCH]; };

// Columns from h on of the tokens from t on: token end - 1 again from there on.
template <typename T, int W, bool DX>
static __device__ __forceinline__ void load_batch(const RouteArgs &args, int h, int t, int end,
                                                  Batch<T, W> *out) {
    const int hidden = args.hidden_size, last = end - 1 - t;
    const int64_t at = (int64_t)t * hidden + h;
    const T *x = (const T *)args.x + at, *dx = (const T *)args.dx + at;
#pragma unroll
    for (int i = 0; i < GRAD_BATCH; i++) {
        const int row = min(i, last) * hidden;
        out->x[i] = load_packed<T, W>(x + row);
        if constexpr (DX) out->dx[i] = load_packed<T, W>(dx + row);
    }
}

// staged[i] = the dlogits of token base + i, of which `count` exist, for experts first, first + 1,
// ...; 0 where there is no token or expert. With DX these are all experts and their dlogits are
// worked out here, a token per thread, else they come from memory.
template <bool DX>
static __device__ __forceinline__ void
stage_dlogits(const RouteArgs &args, const float *__restrict__ dlogits, const float *load, int base,
              int count, int first, float (*staged)[ROUTE_CHUNK]) {
    if constexpr (DX) {
        for (int i = threadIdx.x; i < GRAD_TILE; i += GRAD_THREADS) {
            float d[ROUTE_CHUNK] = {};
            if (i < count) token_dlogits<1, ROUTE_CHUNK>(args, base + i, load, d);
            store_floats<ROUTE_CHUNK>(staged[i], d);
        }
    } else {
        const int experts = args.num_experts;
        for (int i = threadIdx.x; i < GRAD_TILE * ROUTE_CHUNK; i += GRAD_THREADS) {
            const int t = i / ROUTE_CHUNK, e = first + i % ROUTE_CHUNK;
            staged[t][i % ROUTE_CHUNK] =
                t < count && e < experts ? dlogits[(int64_t)(base + t) * experts + e] : 0.0f;
        }
    }
}

// For the batch's tokens, whose dlogits are 0 beyond the `count` that exist:
// sums[e] += dlogit[t][e] · x[t], and with DX  to[t] = dx[t] + Σ_e dlogit[t][e] · weight[e].
template <typename T, int W, int EXPERTS, bool DX>
static __device__ __forceinline__ void
add_batch(const Batch<T, W> &batch, const float (*staged)[ROUTE_CHUNK],
          const float weight[EXPERTS][W], int count, int hidden, T *to, float sums[EXPERTS][W]) {
#pragma unroll
    for (int t = 0; t < GRAD_BATCH; t++) {
        float d[ROUTE_CHUNK], x[W];
        load_floats<ROUTE_CHUNK>(staged[t], d);
        unpack<T, W>(batch.x[t], x);
#pragma unroll
        for (int e = 0; e < EXPERTS; e++)
#pragma unroll
            for (int i = 0; i < W; i++) sums[e][i] += d[e] * x[i];
        if constexpr (DX) {
            float dx[W];
            unpack<T, W>(batch.dx[t], dx);
            Piece<T, W> piece;
#pragma unroll
            for (int i = 0; i < W; i++) {
#pragma unroll
                for (int e = 0; e < EXPERTS; e++) dx[i] += d[e] * weight[e][i];
                piece.v[i] = from_float<T>(dx[i]);
            }
            if (t < count) store_piece<T, W>(to + t * hidden, piece);
        }
    }
}

// blockIdx: part of the tokens, ROUTE_CHUNK experts (EXPERTS of which may exist), columns, W per
// thread. A batch is loaded before the one ahead of it is computed. Tokens fit an int, as slots do.
template <typename T, int W, int EXPERTS, bool DX>
static __global__ void __launch_bounds__(GRAD_THREADS, GRAD_BLOCKS)
    products_kernel(const __grid_constant__ RouteArgs args, const float *__restrict__ dlogits,
                    float *__restrict__ partial) {
    __shared__ __align__(16) float staged[GRAD_TILE][ROUTE_CHUNK];
    __shared__ float load[ROUTE_CHUNK];
    const int hidden = args.hidden_size, experts = args.num_experts;
    const int first = blockIdx.y * ROUTE_CHUNK;
    const int h = (int)(blockIdx.z * GRAD_THREADS + threadIdx.x) * W;
    const int begin = (int)part_begin(args.tokens, gridDim.x, blockIdx.x);
    const int end = (int)part_begin(args.tokens, gridDim.x, (int64_t)blockIdx.x + 1);
    float sums[EXPERTS][W] = {}, weight[EXPERTS][W] = {};
    Batch<T, W> next;
    grid_dependents_start(); // when all blocks run, so the next kernel takes nobody's place
    if (h < hidden) {
        load_batch<T, W, DX>(args, h, begin, end, &next);
#pragma unroll
        for (int e = 0; e < EXPERTS; e++)
            if (DX && e < experts) load_floats<W>(args.weight + (int64_t)e * hidden + h, weight[e]);
    }
    if (DX && threadIdx.x < ROUTE_CHUNK)
        load[threadIdx.x] = threadIdx.x < experts ? load_of(args, threadIdx.x) : 0.0f;
    for (int base = begin; base < end; base += GRAD_TILE) {
        const int count = min(end - base, (int)GRAD_TILE);
        __syncthreads();
        stage_dlogits<DX>(args, dlogits, load, base, count, first, staged);
        __syncthreads();
        if (h >= hidden) continue;
#pragma unroll 1
        for (int t = 0; t < count; t += GRAD_BATCH) {
            const Batch<T, W> batch = next;
            if (base + t + GRAD_BATCH < end)
                load_batch<T, W, DX>(args, h, base + t + GRAD_BATCH, end, &next);
            add_batch<T, W, EXPERTS, DX>(batch, staged + t, weight, count - t, hidden,
                                         (T *)args.dx + (int64_t)(base + t) * hidden + h, sums);
        }
    }
    if (h >= hidden) return;
#pragma unroll
    for (int e = 0; e < EXPERTS; e++)
        if (first + e < experts)
            store_floats<W>(partial + ((int64_t)blockIdx.x * experts + first + e) * hidden + h,
                            sums[e]);
}

// --- The op ----------------------------------------------------------------------------------

template <typename T>
static void launch_products(CudaBackend *b, const RouteArgs *args, const RouteScratch *scratch,
                            int parts) {
    constexpr int WIDE = Vec<T>::SIZE;
    const int hidden = args->hidden_size, experts = args->num_experts;
    const uintptr_t bits = (uintptr_t)args->x | (uintptr_t)args->dx | (uintptr_t)args->weight;
    const bool wide = vec_ok<T>((const void *)bits, hidden);
    auto kernel = wide ? products_kernel<T, WIDE, ROUTE_CHUNK, false>
                       : products_kernel<T, 1, ROUTE_CHUNK, false>;
    if (experts <= ROUTE_FEW) {
        kernel = wide ? products_kernel<T, WIDE, ROUTE_FEW, true>
                      : products_kernel<T, 1, ROUTE_FEW, true>;
    } else if (experts <= ROUTE_CHUNK) {
        kernel = wide ? products_kernel<T, WIDE, ROUTE_CHUNK, true>
                      : products_kernel<T, 1, ROUTE_CHUNK, true>;
    } else {
        auto dx = wide ? dx_kernel<T, WIDE> : dx_kernel<T, 1>;
        dx<<<(unsigned)div_up(args->tokens, DX_TOKENS), GRAD_THREADS, 0, b->stream>>>(
            args->tokens, hidden, experts, args->weight, scratch->logits, (T *)args->dx);
    }
    dim3 grid((unsigned)parts, (unsigned)div_up(experts, ROUTE_CHUNK),
              (unsigned)div_up(hidden, GRAD_THREADS * (wide ? WIDE : 1)));
    kernel<<<grid, GRAD_THREADS, 0, b->stream>>>(*args, scratch->logits, scratch->partial);
}

Status cuda_route_backward(Backend *base, const RouteArgs *args) {
    CudaBackend *b = cuda_of(base);
    b->current_op = "route_backward";
    INVARIANT(args->num_experts <= CUDA_MAX_EXPERTS);
    if (args->tokens == 0) return STATUS_OK;
    RouteScratch scratch;
    TRY(route_scratch(b, args, &scratch));
    int64_t parts = div_up(args->tokens, GRAD_MIN_TOKENS);
    if (parts > GRAD_PARTS) parts = GRAD_PARTS;
    if (parts > scratch.parts) parts = scratch.parts;
    if (args->num_experts > ROUTE_CHUNK) {
        const int64_t blocks = div_up(args->tokens, ROUTE_THREADS / 32);
        DISPATCH_PER_LANE(args->num_experts, PER_LANE, {
            dlogits_kernel<PER_LANE>
                <<<(unsigned)blocks, ROUTE_THREADS, 0, b->stream>>>(*args, scratch.logits);
        });
        LAUNCH_TRY(b);
    }
    DISPATCH_DTYPE(base->compute_dtype, T, launch_products<T>(b, args, &scratch, (int)parts));
    LAUNCH_TRY(b);
    const int64_t count = (int64_t)args->num_experts * args->hidden_size;
    return add_column_sums(b, scratch.partial, parts, count, count, DTYPE_F32, args->grad_weight);
}
