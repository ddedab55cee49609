// The router forward: logits, softmax, top-k, gates (METHOD.md §4), and the rows by expert.
//
// Four kernels. logits_kernel multiplies in fp32: a warp does four tokens against eight experts
// whose weights lie in shared memory, so that x, the only large operand, is read once.
// choose_kernel does the rest of a token and counts the rows of each expert in its block of tokens.
// scan_kernel turns the counts into where each block's rows of each expert begin, and
// scatter_kernel places the slots in token order: a stable counting sort whose only atomics count
// integers, so the result is the same in every run.
#include <float.h>
#include <limits.h>
#include <math.h>
#include "cuda/grouped.h"
#include "cuda/route.cuh"

enum {
    LOGIT_WARPS = 4,
    LOGIT_BLOCKS = 5,   // per multiprocessor
    LOGIT_TOKENS = 4,   // per warp; times ROUTE_CHUNK = 32 sums, one per lane in the end
    LOGIT_WIDTH = 1024, // columns of the weight that are staged at once
    TOKEN_BLOCK = 256,  // tokens of one block of choose_kernel and scatter_kernel
    CHOOSE_THREADS = 1024,
    SCAN_THREADS = 1024,
};

static_assert(LOGIT_TOKENS * ROUTE_CHUNK == 32, "each lane keeps one logit");
static_assert(TOKEN_BLOCK % (CHOOSE_THREADS / 8) == 0, "groups have the same number of tokens");

// --- Logits ----------------------------------------------------------------------------------

// Where column h of a staged weight row lies. A lane reads its W columns as float4s; the halves of
// W = 8 are kept apart so that the lanes' float4s lie side by side, without bank conflicts.
template <int W> static __device__ __forceinline__ int staged_at(int h) {
    if constexpr (W < 8) return h;
    return h / (32 * W) * (32 * W) + h % W / 4 * 128 + h % (32 * W) / W * 4 + h % 4;
}

template <int W>
static __device__ __forceinline__ void stage_weight(const float *__restrict__ weight, int hidden,
                                                    int experts, int first, int begin, int width,
                                                    float *staged) {
    for (int i = threadIdx.x; i < ROUTE_CHUNK * width; i += blockDim.x) {
        const int e = i / width, h = i % width;
        const bool inside = first + e < experts;
        staged[e * LOGIT_WIDTH + staged_at<W>(h)] =
            inside ? weight[(int64_t)(first + e) * hidden + begin + h] : 0.0f;
    }
}

// sums[t][e] += x[t] · w[e] over the lane's columns of [0, width).
template <typename T, int W>
static __device__ __forceinline__ void add_products(const T *const x[LOGIT_TOKENS],
                                                    const float *staged, int width,
                                                    float sums[LOGIT_TOKENS * ROUTE_CHUNK]) {
    constexpr int PART = W < 4 ? W : 4; // columns per shared-memory access
    const int lane = threadIdx.x & 31;
#pragma unroll 1
    for (int base = 0; base < width; base += 32 * W) {
        if (base + lane * W >= width) break;
        Piece<T, W> pieces[LOGIT_TOKENS];
#pragma unroll
        for (int t = 0; t < LOGIT_TOKENS; t++) pieces[t] = load_piece<T, W>(x[t] + base + lane * W);
#pragma unroll
        for (int part = 0; part < W / PART; part++) {
#pragma unroll
            for (int e = 0; e < ROUTE_CHUNK; e++) {
                const Piece<float, PART> w = load_piece<float, PART>(
                    staged + e * LOGIT_WIDTH + base + part * 128 + lane * PART);
#pragma unroll
                for (int t = 0; t < LOGIT_TOKENS; t++)
#pragma unroll
                    for (int i = 0; i < PART; i++)
                        sums[t * ROUTE_CHUNK + e] +=
                            to_float(pieces[t].v[part * PART + i]) * w.v[i];
            }
        }
    }
}

// Lane l ends with the sum over the warp of values[l]: 31 shuffles where 32 sums would take 160.
// Each step halves the values a lane looks after. WIDTH is a template parameter because the
// compiler does not unroll a loop that halves, and would keep the array in memory.
template <int WIDTH>
static __device__ __forceinline__ float warp_sum_each(float values[2 * WIDTH]) {
    const bool upper = threadIdx.x & WIDTH;
    float half[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
        const float low = values[i], high = values[i + WIDTH];
        half[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, WIDTH);
    }
    if constexpr (WIDTH == 1)
        return half[0];
    else
        return warp_sum_each<WIDTH / 2>(half);
}

// blockIdx.y: which ROUTE_CHUNK experts.
template <typename T, int W>
static __global__ void __launch_bounds__(LOGIT_WARPS * 32, LOGIT_BLOCKS)
    logits_kernel(int64_t tokens, int hidden, int experts, const T *__restrict__ x,
                  const float *__restrict__ weight, float *__restrict__ logits) {
    __shared__ __align__(16) float staged[ROUTE_CHUNK * LOGIT_WIDTH];
    const int lane = threadIdx.x & 31, first = blockIdx.y * ROUTE_CHUNK;
    const int64_t step = (int64_t)gridDim.x * LOGIT_WARPS * LOGIT_TOKENS;
    bool is_staged = false;
    for (int64_t base = (int64_t)blockIdx.x * LOGIT_WARPS * LOGIT_TOKENS; base < tokens;
         base += step) {
        const int64_t token = base + threadIdx.x / 32 * LOGIT_TOKENS;
        float sums[LOGIT_TOKENS * ROUTE_CHUNK] = {};
        for (int begin = 0; begin < hidden; begin += LOGIT_WIDTH) {
            const int width = min(hidden - begin, LOGIT_WIDTH);
            if (!is_staged || hidden > LOGIT_WIDTH) { // a weight that fits stays
                __syncthreads();
                stage_weight<W>(weight, hidden, experts, first, begin, width, staged);
                __syncthreads();
                is_staged = true;
            }
            const T *rows[LOGIT_TOKENS]; // the last token again beyond the end
#pragma unroll
            for (int t = 0; t < LOGIT_TOKENS; t++)
                rows[t] = x + min(token + t, tokens - 1) * hidden + begin;
            add_products<T, W>(rows, staged, width, sums);
        }
        const float logit = warp_sum_each<16>(sums);
        const int64_t t = token + lane / ROUTE_CHUNK;
        const int e = first + lane % ROUTE_CHUNK;
        if (t < tokens && e < experts) logits[t * experts + e] = logit;
    }
}

template <typename T>
static void launch_logits(CudaBackend *b, const RouteArgs *args, float *logits) {
    const bool wide = vec_ok<T>(args->x, args->hidden_size);
    auto kernel = wide ? logits_kernel<T, Vec<T>::SIZE> : logits_kernel<T, 1>;
    const int64_t groups = div_up(args->tokens, LOGIT_WARPS * LOGIT_TOKENS);
    const int64_t resident = (int64_t)b->num_sms * LOGIT_BLOCKS;
    dim3 grid((unsigned)(groups < resident ? groups : resident),
              (unsigned)div_up(args->num_experts, ROUTE_CHUNK));
    kernel<<<grid, LOGIT_WARPS * 32, 0, b->stream>>>(args->tokens, args->hidden_size,
                                                     args->num_experts, (const T *)args->x,
                                                     args->weight, logits);
}

// --- Softmax, choice, gates ----------------------------------------------------------------------

// p: the lane's probabilities, 0 beyond the last expert. Returns the log of the sum of
// exponentials.
template <int LANES, int PER_LANE>
static __device__ __forceinline__ float softmax_group(const float *__restrict__ logits, int experts,
                                                      float p[PER_LANE]) {
    const int lane = threadIdx.x % LANES;
    float highest = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int r = 0; r < PER_LANE; r++) {
        const int e = lane + r * LANES;
        p[r] = e < experts ? logits[e] : -INFINITY;
        highest = fmaxf(highest, p[r]);
    }
    highest = group_max<LANES>(highest);
#pragma unroll
    for (int r = 0; r < PER_LANE; r++) {
        p[r] = lane + r * LANES < experts ? expf(p[r] - highest) : 0.0f;
        sum += p[r];
    }
    sum = group_sum<LANES>(sum);
    const float inverse = 1.0f / sum;
#pragma unroll
    for (int r = 0; r < PER_LANE; r++) p[r] *= inverse;
    return highest + logf(sum);
}

typedef struct Candidate {
    float score, p;
    int expert; // INT_MAX: none
} Candidate;

static __device__ __forceinline__ bool better(const Candidate &a, const Candidate &b) {
    if (a.expert == INT_MAX || b.expert == INT_MAX) return a.expert < b.expert;
    return a.score > b.score || (a.score == b.score && a.expert < b.expert);
}

// The best of the group's experts that are not taken. A NaN counts as the lowest score, so that the
// k experts are always valid and distinct.
template <int LANES, int PER_LANE>
static __device__ __forceinline__ Candidate best_of_group(const float p[PER_LANE],
                                                          const float score[PER_LANE], int experts,
                                                          unsigned taken) {
    Candidate best = {0.0f, 0.0f, INT_MAX};
#pragma unroll
    for (int r = 0; r < PER_LANE; r++) {
        const int e = (int)(threadIdx.x % LANES) + r * LANES;
        if (e >= experts || (taken >> r & 1)) continue;
        const Candidate here = {isnan(score[r]) ? -INFINITY : score[r], p[r], e};
        if (better(here, best)) best = here;
    }
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset >>= 1) {
        Candidate other;
        other.score = __shfl_xor_sync(0xffffffffu, best.score, offset);
        other.p = __shfl_xor_sync(0xffffffffu, best.p, offset);
        other.expert = __shfl_xor_sync(0xffffffffu, best.expert, offset);
        if (better(other, best)) best = other;
    }
    return best;
}

// The choice and the gates of token t. Every lane of the warp takes part; `valid` says whether its
// group's token exists. Lane j % LANES looks after choice j.
template <int LANES, int PER_LANE>
static __device__ __forceinline__ void choose_group(const RouteArgs &args, int64_t t, bool valid,
                                                    const float p[PER_LANE], int32_t *rows) {
    const int lane = threadIdx.x % LANES, k = args.top_k;
    float score[PER_LANE], sum = 0.0f;
#pragma unroll
    for (int r = 0; r < PER_LANE; r++) {
        const int e = lane + r * LANES;
        score[r] = p[r];
        if (args.selection_bias && e < args.num_experts) score[r] += args.selection_bias[e];
    }
    unsigned taken = 0;
    for (int j = 0; j < k; j++) {
        const Candidate best = best_of_group<LANES, PER_LANE>(p, score, args.num_experts, taken);
        if (best.expert % LANES == lane) taken |= 1u << (best.expert / LANES);
        sum += best.p;
        if (!valid || lane != j % LANES) continue;
        args.routing.expert[t * k + j] = best.expert;
        args.routing.gate[t * k + j] = best.p;
        atomicAdd(&rows[best.expert], 1);
    }
    if (!valid) return;
    for (int j = lane; j < k; j += LANES) {
        float *gate = &args.routing.gate[t * k + j]; // this lane wrote it
        float value = *gate;
        // Σ p = 0 can only follow from a bias that chose experts of probability 0: share equally.
        if (args.gate_kind != GATE_SOFTMAX) value = sum == 0.0f ? 1.0f / (float)k : value / sum;
        *gate = args.gate_scale * value;
    }
}

template <int LANES, int PER_LANE>
static __global__ void __launch_bounds__(CHOOSE_THREADS)
    choose_kernel(const __grid_constant__ RouteArgs args, const float *__restrict__ logits,
                  int32_t *__restrict__ counts) {
    __shared__ int32_t rows[CUDA_MAX_EXPERTS];
    const int experts = args.num_experts, lane = threadIdx.x % LANES;
    for (int e = threadIdx.x; e < experts; e += CHOOSE_THREADS) rows[e] = 0;
    __syncthreads();
    for (int i = threadIdx.x / LANES; i < TOKEN_BLOCK; i += CHOOSE_THREADS / LANES) {
        const int64_t wanted = (int64_t)blockIdx.x * TOKEN_BLOCK + i;
        const bool valid = wanted < args.tokens;
        const int64_t t = valid ? wanted : args.tokens - 1;
        float p[PER_LANE];
        const float log_sum = softmax_group<LANES, PER_LANE>(logits + t * experts, experts, p);
        if (valid) {
#pragma unroll
            for (int r = 0; r < PER_LANE; r++)
                if (lane + r * LANES < experts)
                    args.routing.probabilities[t * experts + lane + r * LANES] = p[r];
            if (lane == 0) args.routing.log_sum_exp[t] = log_sum;
        }
        choose_group<LANES, PER_LANE>(args, t, valid, p, rows);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += CHOOSE_THREADS)
        counts[(int64_t)e * gridDim.x + blockIdx.x] = rows[e];
}

// --- Grouping --------------------------------------------------------------------------------

// One block. counts (N, blocks): from the rows of an expert in a token block to those in the token
// blocks before it.
static __global__ void __launch_bounds__(SCAN_THREADS)
    scan_kernel(int experts, int64_t blocks, int32_t *__restrict__ counts,
                int32_t *__restrict__ expert_begin) {
    __shared__ int32_t total[CUDA_MAX_EXPERTS];
    const int lane = threadIdx.x & 31;
    for (int e = threadIdx.x / 32; e < experts; e += SCAN_THREADS / 32) {
        int32_t before = 0;
        for (int64_t base = 0; base < blocks; base += 32) {
            int32_t *place = counts + e * blocks + base + lane;
            const bool inside = base + lane < blocks;
            const int32_t own = inside ? *place : 0;
            int32_t through = own; // inclusive scan over the lanes
#pragma unroll
            for (int offset = 1; offset < 32; offset <<= 1) {
                const int32_t left = __shfl_up_sync(0xffffffffu, through, offset);
                if (lane >= offset) through += left;
            }
            if (inside) *place = before + through - own;
            before += __shfl_sync(0xffffffffu, through, 31);
        }
        if (lane == 0) total[e] = before;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    int32_t begin = 0;
    for (int e = 0; e < experts; e++) {
        expert_begin[e] = begin;
        begin += total[e];
    }
    expert_begin[experts] = begin;
}

// A block does the slots of one token block, ROUTE_THREADS at a time and in order. `earlier` is
// what scan_kernel left in counts.
static __global__ void __launch_bounds__(ROUTE_THREADS)
    scatter_kernel(int64_t slots, int64_t slots_per_block, int experts,
                   const int32_t *__restrict__ earlier, const __grid_constant__ Routing routing) {
    __shared__ int32_t next[CUDA_MAX_EXPERTS];
    __shared__ int32_t in_warp[ROUTE_THREADS / 32][CUDA_MAX_EXPERTS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    for (int e = threadIdx.x; e < experts; e += ROUTE_THREADS) {
        next[e] = routing.expert_begin[e] + earlier[(int64_t)e * gridDim.x + blockIdx.x];
        for (int w = 0; w < ROUTE_THREADS / 32; w++) in_warp[w][e] = 0;
    }
    const int64_t begin = blockIdx.x * slots_per_block, end = min(begin + slots_per_block, slots);
    for (int64_t base = begin; base < end; base += ROUTE_THREADS) {
        __syncthreads();
        const int64_t slot = base + threadIdx.x;
        const int32_t e = slot < end ? routing.expert[slot] : -1;
        const unsigned same = __match_any_sync(0xffffffffu, e);
        const int rank = __popc(same & ((1u << lane) - 1)); // among the warp's slots of e
        if (e >= 0 && rank == 0) in_warp[warp][e] = __popc(same);
        __syncthreads();
        if (e >= 0) {
            int32_t row = next[e] + rank;
            for (int w = 0; w < warp; w++) row += in_warp[w][e];
            routing.slot_of_row[row] = (int32_t)slot;
            routing.row_of_slot[slot] = row;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < experts; i += ROUTE_THREADS) {
            for (int w = 0; w < ROUTE_THREADS / 32; w++) {
                next[i] += in_warp[w][i];
                in_warp[w][i] = 0;
            }
        }
    }
}

// --- The op ----------------------------------------------------------------------------------

Status cuda_route_forward(Backend *base, const RouteArgs *args) {
    CudaBackend *b = cuda_of(base);
    b->current_op = "route_forward";
    INVARIANT(args->top_k >= 1 && args->top_k <= args->num_experts);
    INVARIANT(args->num_experts <= CUDA_MAX_EXPERTS);
    INVARIANT(args->tokens * args->top_k <= INT32_MAX);
    counts_forget(b, args->routing.expert_begin, ((size_t)args->num_experts + 1) * sizeof(int32_t));
    if (args->tokens == 0)
        return base->ops->zero(base, args->routing.expert_begin,
                               ((size_t)args->num_experts + 1) * sizeof(int32_t));
    RouteScratch scratch;
    TRY(route_scratch(b, args, &scratch));
    const int64_t blocks = div_up(args->tokens, TOKEN_BLOCK), slots = args->tokens * args->top_k;
    DISPATCH_DTYPE(base->compute_dtype, T, launch_logits<T>(b, args, scratch.logits));
    LAUNCH_TRY(b);
    DISPATCH_GROUP(args->num_experts, LANES, PER_LANE, {
        choose_kernel<LANES, PER_LANE><<<(unsigned)blocks, CHOOSE_THREADS, 0, b->stream>>>(
            *args, scratch.logits, scratch.counts);
    });
    LAUNCH_TRY(b);
    scan_kernel<<<1, SCAN_THREADS, 0, b->stream>>>(args->num_experts, blocks, scratch.counts,
                                                   args->routing.expert_begin);
    LAUNCH_TRY(b);
    scatter_kernel<<<(unsigned)blocks, ROUTE_THREADS, 0, b->stream>>>(
        slots, (int64_t)TOKEN_BLOCK * args->top_k, args->num_experts, scratch.counts,
        args->routing);
    LAUNCH_TRY(b);
    return STATUS_OK;
}

// The partial sums' room is fixed, or one part's where that is more: it never shrinks with a shape.
static const size_t ROUTE_PARTIAL_BYTES = 8 << 20;

static size_t partial_bytes(const RouteArgs *args) {
    const size_t one = (size_t)args->num_experts * (size_t)args->hidden_size * sizeof(float);
    return one > ROUTE_PARTIAL_BYTES ? one : ROUTE_PARTIAL_BYTES;
}
static size_t logits_bytes(const RouteArgs *args) {
    return (size_t)args->tokens * (size_t)args->num_experts * sizeof(float);
}
static size_t counts_bytes(const RouteArgs *args) {
    return (size_t)div_up(args->tokens, TOKEN_BLOCK) * (size_t)args->num_experts * sizeof(int32_t);
}

size_t cuda_route_workspace(const CudaBackend *, const RouteArgs *args) {
    return scratch_bytes(logits_bytes(args)) + scratch_bytes(counts_bytes(args)) +
           scratch_bytes(partial_bytes(args));
}

Status route_scratch(CudaBackend *backend, const RouteArgs *args, RouteScratch *out) {
    Scratch scratch = scratch_open(backend);
    const int64_t one = (int64_t)args->num_experts * args->hidden_size * (int64_t)sizeof(float);
    TRY(scratch_take(&scratch, logits_bytes(args), (void **)&out->logits));
    TRY(scratch_take(&scratch, counts_bytes(args), (void **)&out->counts));
    TRY(scratch_take(&scratch, partial_bytes(args), (void **)&out->partial));
    out->parts = (int64_t)partial_bytes(args) / one;
    return STATUS_OK;
}
