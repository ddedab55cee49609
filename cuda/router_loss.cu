// Sums over the tokens for the router losses and the report, in double and in a fixed order.
//
// A block sums one part of the tokens for ROUTE_CHUNK experts: their probabilities, their share of
// the entropy, and Σ lse² with the first experts. add_sums_kernel adds the parts, one warp per sum.
// The number of parts is fixed, so the sums are the same on every device.
#include <math.h>
#include "cuda/route.cuh"

enum { LOSS_PARTS = 128, LOSS_SUMS = ROUTE_CHUNK + 2 }; // + entropy, Σ lse²

// partial (chunks, LOSS_SUMS, LOSS_PARTS)
static __global__ void __launch_bounds__(ROUTE_THREADS)
    sum_kernel(int64_t tokens, int experts, const float *__restrict__ probabilities,
               const float *__restrict__ log_sum_exp, double *__restrict__ partial) {
    __shared__ double shared[32];
    const int first = blockIdx.y * ROUTE_CHUNK, width = min(experts - first, (int)ROUTE_CHUNK);
    const int64_t end = part_begin(tokens, LOSS_PARTS, (int64_t)blockIdx.x + 1);
    double sums[LOSS_SUMS] = {};
    for (int64_t t = part_begin(tokens, LOSS_PARTS, blockIdx.x) + threadIdx.x; t < end;
         t += ROUTE_THREADS) {
#pragma unroll
        for (int i = 0; i < ROUTE_CHUNK; i++) {
            if (i >= width) continue;
            const double p = probabilities[t * experts + first + i];
            sums[i] += p;
            if (p != 0.0) sums[ROUTE_CHUNK] -= p * log(p);
        }
        const double z = log_sum_exp[t];
        if (first == 0) sums[ROUTE_CHUNK + 1] += z * z;
    }
#pragma unroll
    for (int i = 0; i < LOSS_SUMS; i++) {
        const double sum = block_sum(sums[i], shared);
        if (threadIdx.x == 0)
            partial[((int64_t)blockIdx.y * LOSS_SUMS + i) * LOSS_PARTS + blockIdx.x] = sum;
    }
}

static __device__ __forceinline__ double sum_parts(const double *__restrict__ partial) {
    double sum = 0.0;
    for (int part = threadIdx.x & 31; part < LOSS_PARTS; part += 32) sum += partial[part];
    return warp_sum(sum);
}

// Warps 0..N-1: one expert each; warp N: the entropy; warp N + 1: Σ lse².
static __global__ void __launch_bounds__(ROUTE_THREADS)
    add_sums_kernel(int experts, const double *__restrict__ partial,
                    const int32_t *__restrict__ expert_begin,
                    const __grid_constant__ RouterSums to) {
    const int warp = (int)(blockIdx.x * ROUTE_THREADS + threadIdx.x) / 32;
    const bool writes = (threadIdx.x & 31) == 0;
    if (warp < experts) {
        const int64_t row = (int64_t)(warp / ROUTE_CHUNK) * LOSS_SUMS + warp % ROUTE_CHUNK;
        const double sum = sum_parts(partial + row * LOSS_PARTS);
        if (!writes) return;
        to.probability[warp] += sum;
        to.assignments[warp] += expert_begin[warp + 1] - expert_begin[warp];
    } else if (warp == experts) {
        double sum = 0.0;
        for (int chunk = 0; chunk * ROUTE_CHUNK < experts; chunk++)
            sum += sum_parts(partial + ((int64_t)chunk * LOSS_SUMS + ROUTE_CHUNK) * LOSS_PARTS);
        if (writes) to.entropy[0] += sum;
    } else if (warp == experts + 1) {
        const double sum = sum_parts(partial + (int64_t)(ROUTE_CHUNK + 1) * LOSS_PARTS);
        if (writes) to.z[0] += sum;
    }
}

size_t cuda_router_loss_workspace(const CudaBackend *, const RouterLossArgs *args) {
    const size_t chunks = (size_t)div_up(args->num_experts, ROUTE_CHUNK);
    return scratch_bytes(chunks * LOSS_SUMS * LOSS_PARTS * sizeof(double));
}

Status cuda_router_loss(Backend *base, const RouterLossArgs *args) {
    CudaBackend *b = cuda_of(base);
    b->current_op = "router_loss";
    if (args->tokens == 0) return STATUS_OK;
    Scratch scratch = scratch_open(b);
    double *partial;
    TRY(scratch_take(&scratch, cuda_router_loss_workspace(b, args), (void **)&partial));
    dim3 grid(LOSS_PARTS, (unsigned)div_up(args->num_experts, ROUTE_CHUNK));
    sum_kernel<<<grid, ROUTE_THREADS, 0, b->stream>>>(args->tokens, args->num_experts,
                                                      args->routing.probabilities,
                                                      args->routing.log_sum_exp, partial);
    LAUNCH_TRY(b);
    const unsigned blocks = (unsigned)div_up(args->num_experts + 2, ROUTE_THREADS / 32);
    add_sums_kernel<<<blocks, ROUTE_THREADS, 0, b->stream>>>(
        args->num_experts, partial, args->routing.expert_begin, args->sums);
    LAUNCH_TRY(b);
    return STATUS_OK;
}
