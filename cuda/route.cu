// The router forward: logits, softmax, top-k, gates (METHOD.md §4), and the rows by expert.
//
// logits_kernel multiplies in fp32: a warp does four tokens against eight experts whose weights lie
// in shared memory, so that x, the only large operand, is read once. In the end lane 8t + e of the
// warp holds the logit of token t and expert e. With no more than eight experts that is all a token
// needs: the same lanes go on to its softmax, choice and gates, and no logit goes to memory. With
// more experts the logits do, and choose_kernel does the rest.
//
// Whichever kernel chooses also counts the rows of each expert in its block of tokens. From these
// counts every block of scatter_kernel works out where its rows begin, and it places its slots in
// token order: a stable counting sort whose only atomics count integers, so the result is the same
// in every run.
#include <float.h>
#include <limits.h>
#include <math.h>
#include "cuda/grouped.h"
#include "cuda/route.cuh"

enum {
    LOGIT_THREADS = 256,
    LOGIT_BLOCKS = 2, // per multiprocessor
    LOGIT_TOKENS = 4, // per warp; times ROUTE_CHUNK = 32 sums, one per lane in the end
    LOGIT_ROUND = LOGIT_THREADS / 32 * LOGIT_TOKENS, // tokens that a block does at a time
    LOGIT_WIDTH = 1024,                              // columns of the weight staged at once
    CHOOSE_THREADS = 1024,
    CHOOSE_TOKENS = 256,
    CHOOSE_BLOCKS = 512, // at most: every block of scatter_kernel reads the counts of all
};

static_assert(LOGIT_TOKENS * ROUTE_CHUNK == 32, "each lane keeps one logit");
static_assert(LOGIT_WIDTH % (32 * 8) == 0, "a warp's columns are staged together");
static_assert(CHOOSE_TOKENS % (CHOOSE_THREADS / 32) == 0, "warps have the same number of tokens");

// --- Logits ----------------------------------------------------------------------------------

// Where column h of a staged weight row lies. A lane reads its W columns as float4s; the halves of
// W = 8 are kept apart so that the lanes' float4s lie side by side, without bank conflicts.
template <int W> static __device__ __forceinline__ int staged_at(int h) {
    if constexpr (W < 8) return h;
    return h / (32 * W) * (32 * W) + h % W / 4 * 128 + h % (32 * W) / W * 4 + h % 4;
}

// Columns [begin, begin + LOGIT_WIDTH) of the weights of experts first, first + 1, ...; 0 beyond
// the last expert. All experts of a column are in flight at once.
template <int W, int EXPERTS>
static __device__ __forceinline__ void stage_weight(const float *__restrict__ weight, int hidden,
                                                    int experts, int first, int begin,
                                                    float *staged) {
    constexpr int PART = W < 4 ? W : 4; // columns per access
    const int width = min(hidden - begin, (int)LOGIT_WIDTH);
    for (int h = threadIdx.x * PART; h < width; h += LOGIT_THREADS * PART) {
        Piece<float, PART> pieces[EXPERTS] = {};
#pragma unroll
        for (int e = 0; e < EXPERTS; e++)
            if (first + e < experts)
                pieces[e] =
                    load_piece<float, PART>(weight + (int64_t)(first + e) * hidden + begin + h);
#pragma unroll
        for (int e = 0; e < EXPERTS; e++)
            store_piece<float, PART>(staged + e * LOGIT_WIDTH + staged_at<W>(h), pieces[e]);
    }
}

// Where a warp's tokens begin, from the one at `token` on: the last token again beyond the end.
template <typename T> struct TokenRows { const T *x[LOGIT_TOKENS]; };
template <typename T>
static __device__ __forceinline__ TokenRows<T> token_rows(const RouteArgs &args, int token) {
    TokenRows<T> rows;
#pragma unroll
    for (int t = 0; t < LOGIT_TOKENS; t++)
        rows.x[t] =
            (const T *)args.x + (int64_t)min(token + t, (int)args.tokens - 1) * args.hidden_size;
    return rows;
}

// W columns of each of these tokens, from column h on: the last ones beyond the end.
template <typename T, int W> struct TokenPieces { Packed<T, W> of[LOGIT_TOKENS]; };
template <typename T, int W>
static __device__ __forceinline__ TokenPieces<T, W> load_tokens(const TokenRows<T> &rows, int h,
                                                                int hidden) {
    TokenPieces<T, W> pieces;
#pragma unroll
    for (int t = 0; t < LOGIT_TOKENS; t++)
        pieces.of[t] = load_packed<T, W>(rows.x[t] + min(h, hidden - W));
    return pieces;
}

// sums[t][e] += x[t] · w[e] over the lane's W columns; `staged` is where the lane's begin.
template <int W, int EXPERTS>
static __device__ __forceinline__ void add_products(const float x[LOGIT_TOKENS][W],
                                                    const float *staged,
                                                    float sums[LOGIT_TOKENS * ROUTE_CHUNK]) {
    constexpr int PART = W < 4 ? W : 4; // columns per shared-memory access
#pragma unroll
    for (int part = 0; part < W / PART; part++) {
#pragma unroll
        for (int e = 0; e < EXPERTS; e++) {
            const Piece<float, PART> w =
                load_piece<float, PART>(staged + e * LOGIT_WIDTH + part * 128);
#pragma unroll
            for (int t = 0; t < LOGIT_TOKENS; t++)
#pragma unroll
                for (int i = 0; i < PART; i++)
                    sums[t * ROUTE_CHUNK + e] += x[t][part * PART + i] * w.v[i];
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

// --- Softmax, choice, gates ----------------------------------------------------------------------

// p: from the lane's logits to its probabilities, 0 beyond the last expert. Returns the log of the
// sum of exponentials.
template <int LANES, int PER_LANE>
static __device__ __forceinline__ float softmax_group(int experts, float p[PER_LANE]) {
    const int lane = threadIdx.x % LANES;
    float highest = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int r = 0; r < PER_LANE; r++) {
        if (lane + r * LANES < experts) highest = fmaxf(highest, p[r]);
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
    float score;
    int expert; // INT_MAX: none
} Candidate;

static __device__ __forceinline__ bool better(const Candidate &a, const Candidate &b) {
    return (a.score > b.score) | ((a.score == b.score) & (a.expert < b.expert)); // no branch
}

// The best of the group's experts that are not taken. A NaN counts as the lowest score, and no
// expert as worse than that, so that the k experts are always valid and distinct.
template <int LANES, int PER_LANE>
static __device__ __forceinline__ int best_of_group(const float score[PER_LANE], int experts,
                                                    unsigned taken) {
    Candidate best = {-INFINITY, INT_MAX};
#pragma unroll
    for (int r = 0; r < PER_LANE; r++) {
        const int e = (int)(threadIdx.x % LANES) + r * LANES;
        if (e >= experts || (taken >> r & 1)) continue;
        const Candidate here = {isnan(score[r]) ? -INFINITY : score[r], e};
        if (better(here, best)) best = here;
    }
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset >>= 1) {
        Candidate other;
        other.score = __shfl_xor_sync(0xffffffffu, best.score, offset);
        other.expert = __shfl_xor_sync(0xffffffffu, best.expert, offset);
        if (better(other, best)) best = other;
    }
    return best.expert;
}

// The value of an expert that every lane of the group names. The lane that has it finds it in a
// loop, because an index that varies would put the array in memory.
template <int LANES, int PER_LANE>
static __device__ __forceinline__ float value_of(const float values[PER_LANE], int expert) {
    float value = 0.0f;
#pragma unroll
    for (int r = 0; r < PER_LANE; r++)
        value = expert == (int)(threadIdx.x % LANES) + r * LANES ? values[r] : value;
    return __shfl_sync(0xffffffffu, value, expert % LANES, LANES);
}

// The choice and the gates of token t, counted by expert. Every lane of the warp takes part;
// `valid` says whether its group's token exists. Lane j % LANES looks after choice j.
template <int LANES, int PER_LANE>
static __device__ __forceinline__ void choose_group(const RouteArgs &args, int64_t t, bool valid,
                                                    const float p[PER_LANE], int32_t *counted) {
    const int lane = threadIdx.x % LANES, k = args.top_k;
    float score[PER_LANE], chosen[PER_LANE] = {}, sum = 0.0f;
#pragma unroll
    for (int r = 0; r < PER_LANE; r++) {
        const int e = lane + r * LANES;
        score[r] = p[r];
        if (args.selection_bias && e < args.num_experts) score[r] += args.selection_bias[e];
    }
    unsigned taken = 0;
#pragma unroll 1
    for (int j = 0; j < k; j++) {
        const int best = best_of_group<LANES, PER_LANE>(score, args.num_experts, taken);
        const float best_p = value_of<LANES, PER_LANE>(p, best);
        if (best % LANES == lane) taken |= 1u << (best / LANES);
        sum += best_p;
#pragma unroll
        for (int r = 0; r < PER_LANE; r++) chosen[r] = j == lane + r * LANES ? best_p : chosen[r];
        if (!valid || lane != j % LANES) continue;
        args.routing.expert[t * k + j] = best;
        atomicAdd(&counted[best], 1);
    }
#pragma unroll
    for (int r = 0; r < PER_LANE; r++) {
        const int j = lane + r * LANES;
        if (!valid || j >= k) continue;
        float value = chosen[r];
        // Σ p = 0 can only follow from a bias that chose experts of probability 0: share equally.
        if (args.gate_kind != GATE_SOFTMAX) value = sum == 0.0f ? 1.0f / (float)k : value / sum;
        args.routing.gate[t * k + j] = args.gate_scale * value;
    }
}

// All of token t but its logits, which the group's lanes hold in p.
template <int LANES, int PER_LANE>
static __device__ __forceinline__ void route_group(const RouteArgs &args, int64_t t,
                                                   float p[PER_LANE], int32_t *counted) {
    const int lane = threadIdx.x % LANES, experts = args.num_experts;
    const bool valid = t < args.tokens;
    const float log_sum = softmax_group<LANES, PER_LANE>(experts, p);
    if (valid && lane == 0) args.routing.log_sum_exp[t] = log_sum;
#pragma unroll
    for (int r = 0; r < PER_LANE; r++) {
        const int e = lane + r * LANES;
        if (valid && e < experts) args.routing.probabilities[t * experts + e] = p[r];
    }
    choose_group<LANES, PER_LANE>(args, t, valid, p, counted);
}

// --- The kernels that choose -------------------------------------------------------------------

// A block does block_tokens tokens, a multiple of LOGIT_ROUND, against EXPERTS of the experts from
// blockIdx.y * ROUTE_CHUNK on. With CHOOSES these are all the experts there are, and it leaves the
// block's row of counts (blocks, N), else the logits. x is loaded one step ahead of its use, over
// the end of a round as well: while a block stages the weight or chooses, memory works.
template <typename T, int W, int EXPERTS, bool CHOOSES>
static __global__ void __launch_bounds__(LOGIT_THREADS, LOGIT_BLOCKS)
    logits_kernel(const __grid_constant__ RouteArgs args, int block_tokens,
                  float *__restrict__ logits, int32_t *__restrict__ counts) {
    constexpr int STEP = 32 * W; // columns that a warp does at a time
    __shared__ __align__(16) float staged[EXPERTS * LOGIT_WIDTH];
    __shared__ int32_t counted[ROUTE_CHUNK];
    const int hidden = args.hidden_size, experts = args.num_experts;
    const int lane = threadIdx.x & 31, first = blockIdx.y * ROUTE_CHUNK;
    const int begin = (int)blockIdx.x * block_tokens;
    const int end = min(begin + block_tokens, (int)args.tokens);
    int token = begin + (int)threadIdx.x / 32 * LOGIT_TOKENS; // the warp's first
    TokenRows<T> rows = token_rows<T>(args, token);
    TokenPieces<T, W> next = load_tokens<T, W>(rows, lane * W, hidden);
    if (threadIdx.x < ROUTE_CHUNK) counted[threadIdx.x] = 0; // seen once the weight is staged
    grid_dependents_start(); // when all blocks run, so the next kernel takes nobody's place
    for (int base = begin; base < end; base += LOGIT_ROUND, token += LOGIT_ROUND) {
        float sums[LOGIT_TOKENS * ROUTE_CHUNK] = {};
#pragma unroll 1
        for (int column = 0; column < hidden; column += STEP) {
            const int at = column % LOGIT_WIDTH;
            if (at == 0 && (base == begin || hidden > LOGIT_WIDTH)) { // a weight that fits stays
                __syncthreads();
                stage_weight<W, EXPERTS>(args.weight, hidden, experts, first, column, staged);
                __syncthreads();
            }
            float x[LOGIT_TOKENS][W];
#pragma unroll
            for (int t = 0; t < LOGIT_TOKENS; t++) unpack<T, W>(next.of[t], x[t]);
            const int h = column + lane * W;
            const bool wraps = column + STEP >= hidden; // to the next tokens, or for nothing
            if (wraps && base + LOGIT_ROUND < end) rows = token_rows<T>(args, token + LOGIT_ROUND);
            next = load_tokens<T, W>(rows, wraps ? lane * W : h + STEP, hidden);
            if (h < hidden) add_products<W, EXPERTS>(x, staged + at + lane * (W < 4 ? W : 4), sums);
        }
        float logit[1] = {warp_sum_each<16>(sums)};
        const int t = token + lane / ROUTE_CHUNK, e = first + lane % ROUTE_CHUNK;
        if constexpr (CHOOSES)
            route_group<ROUTE_CHUNK, 1>(args, t, logit, counted);
        else if (t < args.tokens && e < experts)
            logits[(int64_t)t * experts + e] = logit[0];
    }
    if constexpr (CHOOSES) {
        __syncthreads();
        if (threadIdx.x < experts)
            counts[(int64_t)blockIdx.x * experts + threadIdx.x] = counted[threadIdx.x];
    }
}

// A block does block_tokens tokens, a multiple of CHOOSE_TOKENS, a warp one at a time.
template <int PER_LANE>
static __global__ void __launch_bounds__(CHOOSE_THREADS)
    choose_kernel(const __grid_constant__ RouteArgs args, int64_t block_tokens,
                  const float *__restrict__ logits, int32_t *__restrict__ counts) {
    __shared__ int32_t counted[CUDA_MAX_EXPERTS];
    const int experts = args.num_experts, lane = threadIdx.x & 31;
    grid_dependents_start();
    for (int e = threadIdx.x; e < experts; e += CHOOSE_THREADS) counted[e] = 0;
    __syncthreads();
    const int64_t begin = blockIdx.x * block_tokens;
    const int64_t end = min(begin + block_tokens, args.tokens);
    for (int64_t t = begin + threadIdx.x / 32; t < end; t += CHOOSE_THREADS / 32) {
        float p[PER_LANE];
#pragma unroll
        for (int r = 0; r < PER_LANE; r++) {
            const int e = lane + r * 32;
            p[r] = e < experts ? logits[t * experts + e] : 0.0f;
        }
        route_group<32, PER_LANE>(args, t, p, counted);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += CHOOSE_THREADS)
        counts[(int64_t)blockIdx.x * experts + e] = counted[e];
}

// --- Grouping --------------------------------------------------------------------------------

// next[e]: the first row of expert e's slots in this block of scatter_kernel, whose tokens begin
// with row `first` of counts (blocks, N). The first block also says where each expert's rows begin.
static __device__ __forceinline__ void find_rows(int experts, int blocks, int first,
                                                 const int32_t *counts, int32_t *expert_begin,
                                                 int32_t *next) {
    __shared__ int32_t total[CUDA_MAX_EXPERTS];
    const int thread = threadIdx.x, step = ROUTE_THREADS / experts * experts;
    if (thread < experts) next[thread] = total[thread] = 0;
    __syncthreads();
    if (thread < step) { // each step is a number of whole rows, so a thread keeps its expert
        int32_t all = 0, earlier = 0;
#pragma unroll 8
        for (int i = thread; i < blocks * experts; i += step) {
            const int32_t count = counts[i];
            all += count;
            earlier += i < first * experts ? count : 0;
        }
        atomicAdd(&total[thread % experts], all);
        atomicAdd(&next[thread % experts], earlier);
    }
    __syncthreads();
    if (thread >= experts) return;
    int32_t begin = 0;
    for (int e = 0; e < thread; e++) begin += total[e];
    next[thread] += begin;
    if (blockIdx.x != 0) return;
    if (thread == 0) expert_begin[0] = 0;
    expert_begin[thread + 1] = begin + total[thread];
}
static_assert((int)CUDA_MAX_EXPERTS <= (int)ROUTE_THREADS, "a thread per expert");

// A block does the tokens of `rows` rows of counts (blocks, N), block_slots slots each,
// ROUTE_THREADS slots at a time and in order. It starts while the kernel that chooses ends.
static __global__ void __launch_bounds__(ROUTE_THREADS)
    scatter_kernel(int64_t slots, int64_t block_slots, int rows, int experts, int blocks,
                   const int32_t *counts, const __grid_constant__ Routing routing) {
    __shared__ int32_t next[CUDA_MAX_EXPERTS];
    __shared__ int32_t in_warp[ROUTE_THREADS / 32][CUDA_MAX_EXPERTS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, first = blockIdx.x * rows;
    for (int e = threadIdx.x; e < experts; e += ROUTE_THREADS)
        for (int w = 0; w < ROUTE_THREADS / 32; w++) in_warp[w][e] = 0;
    grid_dependency_wait();
    find_rows(experts, blocks, first, counts, routing.expert_begin, next);
    const int64_t begin = first * block_slots, end = min(begin + rows * block_slots, slots);
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

// How the tokens are cut for the kernel that chooses, and so the rows of counts (blocks, N).
typedef struct TokenBlocks {
    int64_t tokens; // of a block
    int64_t count;
} TokenBlocks;

// At most `most` blocks of whole `unit`s of tokens, all but the last of the same size.
static TokenBlocks token_blocks(int64_t tokens, int64_t unit, int64_t most) {
    TokenBlocks blocks;
    blocks.tokens = div_up(div_up(tokens, unit), most) * unit;
    blocks.count = div_up(tokens, blocks.tokens);
    return blocks;
}

// The logits, or with up to ROUTE_CHUNK experts all but the grouping.
template <typename T>
static TokenBlocks launch_logits(CudaBackend *b, const RouteArgs *args,
                                 const RouteScratch *scratch) {
    // Resident all at once, so that the blocks end together.
    const TokenBlocks blocks =
        token_blocks(args->tokens, LOGIT_ROUND, (int64_t)b->num_sms * LOGIT_BLOCKS);
    constexpr int WIDE = Vec<T>::SIZE;
    const uintptr_t bits = (uintptr_t)args->x | (uintptr_t)args->weight;
    const bool wide = vec_ok<T>((const void *)bits, args->hidden_size);
    auto kernel =
        wide ? logits_kernel<T, WIDE, ROUTE_CHUNK, false> : logits_kernel<T, 1, ROUTE_CHUNK, false>;
    if (args->num_experts <= ROUTE_CHUNK)
        kernel = wide ? logits_kernel<T, WIDE, ROUTE_CHUNK, true>
                      : logits_kernel<T, 1, ROUTE_CHUNK, true>;
    if (args->num_experts <= ROUTE_FEW)
        kernel =
            wide ? logits_kernel<T, WIDE, ROUTE_FEW, true> : logits_kernel<T, 1, ROUTE_FEW, true>;
    dim3 grid((unsigned)blocks.count, (unsigned)div_up(args->num_experts, ROUTE_CHUNK));
    kernel<<<grid, LOGIT_THREADS, 0, b->stream>>>(*args, (int)blocks.tokens, scratch->logits,
                                                  scratch->counts);
    return blocks;
}

static TokenBlocks launch_choose(CudaBackend *b, const RouteArgs *args,
                                 const RouteScratch *scratch) {
    const TokenBlocks blocks = token_blocks(args->tokens, CHOOSE_TOKENS, CHOOSE_BLOCKS);
    DISPATCH_PER_LANE(args->num_experts, PER_LANE, {
        choose_kernel<PER_LANE><<<(unsigned)blocks.count, CHOOSE_THREADS, 0, b->stream>>>(
            *args, blocks.tokens, scratch->logits, scratch->counts);
    });
    return blocks;
}

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
    TokenBlocks blocks;
    DISPATCH_DTYPE(base->compute_dtype, T, blocks = launch_logits<T>(b, args, &scratch));
    LAUNCH_TRY(b);
    if (args->num_experts > ROUTE_CHUNK) blocks = launch_choose(b, args, &scratch);
    LAUNCH_TRY(b);
    const int64_t block_slots = blocks.tokens * args->top_k; // small blocks are taken together
    const int64_t rows = block_slots < ROUTE_THREADS ? ROUTE_THREADS / block_slots : 1;
    return launch_early<scatter_kernel>(
        b, dim3((unsigned)div_up(blocks.count, rows)), dim3(ROUTE_THREADS),
        args->tokens * args->top_k, block_slots, (int)rows, args->num_experts, (int)blocks.count,
        (const int32_t *)scratch.counts, args->routing);
}

// The partial sums' room is fixed, or one part's where that is more: it never shrinks with a shape.
static const size_t ROUTE_PARTIAL_BYTES = 8 << 20;

static size_t partial_bytes(const RouteArgs *args) {
    const size_t one = (size_t)args->num_experts * (size_t)args->hidden_size * sizeof(float);
    return one > ROUTE_PARTIAL_BYTES ? one : ROUTE_PARTIAL_BYTES;
}
// Up to ROUTE_CHUNK experts no logit goes to memory.
static size_t logits_bytes(const RouteArgs *args) {
    if (args->num_experts <= ROUTE_CHUNK) return 0;
    return (size_t)args->tokens * (size_t)args->num_experts * sizeof(float);
}
// As if every block had the fewest tokens it can have.
static size_t counts_bytes(const RouteArgs *args) {
    return (size_t)div_up(args->tokens, LOGIT_ROUND) * (size_t)args->num_experts * sizeof(int32_t);
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
