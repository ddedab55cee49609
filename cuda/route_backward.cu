// The router backward, and the sums of the router losses.
//
// The gradient of a logit has the closed forms that cpu/route.c derives; dlogits_kernel writes them
// for all tokens (T, N). They then meet the two large operands once each: dx_kernel adds
// dlogits · weight to dx, eight tokens per thread so that a weight column is read once for all of
// them, and grad_weight_kernel sums dlogitsᵀ · x over parts of the tokens, which add_parts_kernel
// adds up in a fixed order. The number of parts depends on the shape alone.
#include <math.h>
#include "cuda/route.cuh"

enum {
    DX_TOKENS = 8,
    GRAD_THREADS = 128,
    GRAD_PARTS = 256,     // at most
    GRAD_MIN_TOKENS = 32, // of a part
    GRAD_TILE = 64,       // tokens whose dlogits are staged at once
    GRAD_BATCH = 8,       // tokens whose x is in flight at once
    ADD_COLUMNS = 32,
    ADD_GROUPS = 8,
};

// --- Gradient of the logits ------------------------------------------------------------------

// Σ_j gate·dgate of one token, and Σ_i p·load, to every lane of its group.
template <int LANES, int PER_LANE>
static __device__ __forceinline__ void
token_sums(const RouteArgs &args, int64_t t, const float p[PER_LANE], const float load[PER_LANE],
           double *dot, double *mean_load) {
    const int k = args.top_k;
    *dot = *mean_load = 0.0;
    for (int j = threadIdx.x % LANES; j < k; j += LANES)
        *dot += (double)args.routing.gate[t * k + j] * args.dgate[t * k + j];
#pragma unroll
    for (int r = 0; r < PER_LANE; r++) *mean_load += (double)p[r] * load[r];
    *dot = group_sum<LANES>(*dot);
    *mean_load = group_sum<LANES>(*mean_load);
}

template <int LANES, int PER_LANE>
static __global__ void __launch_bounds__(ROUTE_THREADS)
    dlogits_kernel(const __grid_constant__ RouteArgs args, float *__restrict__ dlogits) {
    const int lane = threadIdx.x % LANES, experts = args.num_experts, k = args.top_k;
    const int64_t wanted = ((int64_t)blockIdx.x * ROUTE_THREADS + threadIdx.x) / LANES;
    const int64_t t = min(wanted, args.tokens - 1);
    const int32_t *begin = args.routing.expert_begin;
    float p[PER_LANE], load[PER_LANE];
#pragma unroll
    for (int r = 0; r < PER_LANE; r++) {
        const int e = lane + r * LANES;
        p[r] = load[r] = 0.0f;
        if (e >= experts) continue;
        p[r] = args.routing.probabilities[t * experts + e];
        load[r] = args.load ? args.load[e]
                            : (float)((begin[e + 1] - begin[e]) / (double)(args.tokens * k));
    }
    double dot, mean_load;
    token_sums<LANES, PER_LANE>(args, t, p, load, &dot, &mean_load);
    if (wanted != t) return;
    const bool renorm = args.gate_kind == GATE_RENORM;
    const float z = args.z_scale * 2.0f * args.routing.log_sum_exp[t];
    const float share = renorm ? (float)(dot / args.gate_scale) : 0.0f;
#pragma unroll
    for (int r = 0; r < PER_LANE; r++) {
        const int e = lane + r * LANES;
        if (e >= experts) continue;
        const float excess = load[r] - (float)mean_load;
        float d = p[r] * (args.balance_scale * excess + z - (renorm ? 0.0f : (float)dot));
        for (int j = 0; j < k; j++)
            if (args.routing.expert[t * k + j] == e)
                d += args.routing.gate[t * k + j] * (args.dgate[t * k + j] - share);
        dlogits[t * experts + e] = d;
    }
}

// --- dx --------------------------------------------------------------------------------------

// W consecutive floats.
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

// --- Gradient of the weight --------------------------------------------------------------------

// sums[e][i] += dlogit[t][e] · x[t][i] over GRAD_BATCH tokens, of which `count` exist; staged is 0
// beyond them.
template <typename T, int W>
static __device__ __forceinline__ void add_outer(const T *__restrict__ x, int64_t hidden, int count,
                                                 const float (*staged)[ROUTE_CHUNK],
                                                 float sums[ROUTE_CHUNK][W]) {
    Piece<T, W> pieces[GRAD_BATCH];
#pragma unroll
    for (int t = 0; t < GRAD_BATCH; t++)
        pieces[t] = load_piece<T, W>(x + (int64_t)min(t, count - 1) * hidden);
#pragma unroll
    for (int t = 0; t < GRAD_BATCH; t++) {
        if (t >= count) continue;
        float d[ROUTE_CHUNK];
        load_floats<ROUTE_CHUNK>(staged[t], d);
#pragma unroll
        for (int e = 0; e < ROUTE_CHUNK; e++)
#pragma unroll
            for (int i = 0; i < W; i++) sums[e][i] += d[e] * to_float(pieces[t].v[i]);
    }
}

// blockIdx: part of the tokens, ROUTE_CHUNK experts, columns.
template <typename T, int W>
static __global__ void __launch_bounds__(GRAD_THREADS)
    grad_weight_kernel(int64_t tokens, int hidden, int experts, const T *__restrict__ x,
                       const float *__restrict__ dlogits, float *__restrict__ partial) {
    __shared__ __align__(16) float staged[GRAD_TILE][ROUTE_CHUNK];
    const int first = blockIdx.y * ROUTE_CHUNK;
    const int h = (int)(blockIdx.z * GRAD_THREADS + threadIdx.x) * W;
    const int64_t end = part_begin(tokens, gridDim.x, (int64_t)blockIdx.x + 1);
    float sums[ROUTE_CHUNK][W] = {};
    for (int64_t base = part_begin(tokens, gridDim.x, blockIdx.x); base < end; base += GRAD_TILE) {
        const int count = (int)min(end - base, (int64_t)GRAD_TILE);
        __syncthreads();
        for (int i = threadIdx.x; i < GRAD_TILE * ROUTE_CHUNK; i += GRAD_THREADS) {
            const int t = i / ROUTE_CHUNK, e = first + i % ROUTE_CHUNK;
            staged[t][i % ROUTE_CHUNK] =
                t < count && e < experts ? dlogits[(base + t) * experts + e] : 0.0f;
        }
        __syncthreads();
        if (h >= hidden) continue;
#pragma unroll 1
        for (int t = 0; t < count; t += GRAD_BATCH)
            add_outer<T, W>(x + (base + t) * hidden + h, hidden, count - t, staged + t, sums);
    }
    if (h >= hidden) return;
#pragma unroll
    for (int e = 0; e < ROUTE_CHUNK; e++) {
        if (first + e >= experts) continue;
        float *to = partial + ((int64_t)blockIdx.x * experts + first + e) * hidden + h;
#pragma unroll
        for (int i = 0; i < W; i++) to[i] = sums[e][i];
    }
}

// grad[i] += Σ_part partial[part][i]: ADD_GROUPS interleaved sums, then their sum.
static __global__ void __launch_bounds__(ADD_COLUMNS *ADD_GROUPS)
    add_parts_kernel(int64_t count, int parts, const float *__restrict__ partial,
                     float *__restrict__ grad) {
    __shared__ float sums[ADD_GROUPS][ADD_COLUMNS];
    const int64_t i = (int64_t)blockIdx.x * ADD_COLUMNS + threadIdx.x;
    float sum = 0.0f;
    if (i < count) {
#pragma unroll 8
        for (int part = threadIdx.y; part < parts; part += ADD_GROUPS)
            sum += partial[part * count + i];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || i >= count) return;
    for (int g = 1; g < ADD_GROUPS; g++) sum += sums[g][threadIdx.x];
    grad[i] += sum;
}

// --- The op ----------------------------------------------------------------------------------

template <typename T>
static void launch_products(CudaBackend *b, const RouteArgs *args, const RouteScratch *scratch,
                            int parts) {
    const int hidden = args->hidden_size, experts = args->num_experts;
    const uintptr_t bits = (uintptr_t)args->x | (uintptr_t)args->dx | (uintptr_t)args->weight;
    const bool wide = vec_ok<T>((const void *)bits, hidden);
    const int width = wide ? Vec<T>::SIZE : 1;
    auto dx = wide ? dx_kernel<T, Vec<T>::SIZE> : dx_kernel<T, 1>;
    dx<<<(unsigned)div_up(args->tokens, DX_TOKENS), GRAD_THREADS, 0, b->stream>>>(
        args->tokens, hidden, experts, args->weight, scratch->logits, (T *)args->dx);
    auto grad_weight = wide ? grad_weight_kernel<T, Vec<T>::SIZE> : grad_weight_kernel<T, 1>;
    dim3 grid((unsigned)parts, (unsigned)div_up(experts, ROUTE_CHUNK),
              (unsigned)div_up(hidden, GRAD_THREADS * width));
    grad_weight<<<grid, GRAD_THREADS, 0, b->stream>>>(
        args->tokens, hidden, experts, (const T *)args->x, scratch->logits, scratch->partial);
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
    DISPATCH_GROUP(args->num_experts, LANES, PER_LANE, {
        const int64_t blocks = div_up(args->tokens * LANES, ROUTE_THREADS);
        dlogits_kernel<LANES, PER_LANE>
            <<<(unsigned)blocks, ROUTE_THREADS, 0, b->stream>>>(*args, scratch.logits);
    });
    LAUNCH_TRY(b);
    DISPATCH_DTYPE(base->compute_dtype, T, launch_products<T>(b, args, &scratch, (int)parts));
    LAUNCH_TRY(b);
    const int64_t count = (int64_t)args->num_experts * args->hidden_size;
    add_parts_kernel<<<(unsigned)div_up(count, ADD_COLUMNS), dim3(ADD_COLUMNS, ADD_GROUPS), 0,
                       b->stream>>>(count, (int)parts, scratch.partial, args->grad_weight);
    LAUNCH_TRY(b);
    return STATUS_OK;
}
