// Algorithms of one product, timed on its own operands.
//
// cuBLASLt's heuristic orders algorithms by a model of the chip and is now and then several percent
// off. Timing decides better, but a choice that depends on a clock must not change what is
// computed: a run has to give the same bits as the run before. So only those algorithms compete
// whose whole output equals that of the heuristic's first, which holds for tilings that add up in
// the same order and fails for other splits of the sum.
#include "cuda/common.cuh"
#include "cuda/gemm_tune.cuh"

extern "C" {
#include "base/log.h"
}

enum { HASH_THREADS = 256, HASH_BLOCKS = 1024, TIMED_RUNS = 4 };
// A change of the algorithm must pay more than two measurements differ.
static const float WORTH_IT = 0.985f;

static __device__ __forceinline__ uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

// A sum of mixed (place, value) pairs in whole numbers: the same in any order. T: 2 or 4 bytes.
template <typename T>
static __global__ void __launch_bounds__(HASH_THREADS)
    hash_kernel(const T *c, int64_t rows, int64_t columns, int64_t stride, uint64_t *hash) {
    uint64_t sum = 0;
    for (int64_t row = blockIdx.y; row < rows; row += gridDim.y)
        for (int64_t i = (int64_t)blockIdx.x * HASH_THREADS + threadIdx.x; i < columns;
             i += (int64_t)gridDim.x * HASH_THREADS)
            sum += mix((uint64_t)(row * columns + i) << 32 | c[row * stride + i]);
    for (int offset = 16; offset > 0; offset >>= 1)
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == 0) atomicAdd((unsigned long long *)hash, (unsigned long long)sum);
}

typedef struct Trial {
    CudaBackend *backend;
    const void *c;
    int64_t rows, row_bytes, stride_bytes;
    cudaStream_t stream;
    uint64_t *hash; // on the device
    cudaEvent_t begin, end;
} Trial;

static Status hash_output(const Trial *t, uint64_t *out) {
    const int64_t most = HASH_BLOCKS, blocks = t->rows < most ? t->rows : most;
    const dim3 grid(4, (unsigned)blocks);
    CUDA_TRY(t->backend, cudaMemsetAsync(t->hash, 0, sizeof *t->hash, t->stream));
    if ((t->row_bytes | t->stride_bytes) % 4 == 0)
        hash_kernel<uint32_t><<<grid, HASH_THREADS, 0, t->stream>>>(
            (const uint32_t *)t->c, t->rows, t->row_bytes / 4, t->stride_bytes / 4, t->hash);
    else
        hash_kernel<uint16_t><<<grid, HASH_THREADS, 0, t->stream>>>(
            (const uint16_t *)t->c, t->rows, t->row_bytes / 2, t->stride_bytes / 2, t->hash);
    LAUNCH_TRY(t->backend);
    CUDA_TRY(t->backend,
             cudaMemcpyAsync(out, t->hash, sizeof *out, cudaMemcpyDeviceToHost, t->stream));
    CUDA_TRY(t->backend, cudaStreamSynchronize(t->stream));
    return STATUS_OK;
}

// Milliseconds of one product, the least of several; INFINITY where the algorithm declines.
static Status time_algorithm(const Trial *t, GemmAttempt attempt, void *context, int index,
                             float *out) {
    *out = INFINITY;
    for (int run = 0; run < TIMED_RUNS; run++) {
        float ms;
        CUDA_TRY(t->backend, cudaEventRecord(t->begin, t->stream));
        if (attempt(context, index) != CUBLAS_STATUS_SUCCESS) return STATUS_OK;
        CUDA_TRY(t->backend, cudaEventRecord(t->end, t->stream));
        CUDA_TRY(t->backend, cudaEventSynchronize(t->end));
        CUDA_TRY(t->backend, cudaEventElapsedTime(&ms, t->begin, t->end));
        if (ms < *out) *out = ms;
    }
    return STATUS_OK;
}

static Status compete(const Trial *t, int count, GemmAttempt attempt, void *context, int *best) {
    uint64_t reference = 0, hash;
    float fastest = INFINITY, first = INFINITY, other = INFINITY, ms;
    *best = 0;
    for (int i = 0; i < count; i++) {
        TRY(time_algorithm(t, attempt, context, i, &ms));
        if (i == 0) first = ms;
        if (i > 0 && !(ms < fastest * WORTH_IT)) continue;
        TRY(hash_output(t, &hash));
        if (i == 0) reference = hash;
        if (hash != reference) {
            if (ms < other) other = ms;
            continue;
        }
        fastest = ms;
        *best = i;
    }
    log_debug("GEMM with %lld rows of %lld bytes: %.4f ms by the heuristic, %.4f of equal results, "
              "%.4f of others",
              (long long)t->rows, (long long)t->row_bytes, first, fastest, other);
    return STATUS_OK;
}

Status gemm_fastest(CudaBackend *backend, const void *c, int64_t rows, int64_t row_bytes,
                    int64_t stride_bytes, cudaStream_t stream, int count, GemmAttempt attempt,
                    void *context, int *best) {
    Trial t = {backend, c, rows, row_bytes, stride_bytes, stream, backend->tune_hash, NULL, NULL};
    CUDA_TRY(backend, cudaDeviceSynchronize()); // nothing beside it while the clock runs
    CUDA_TRY(backend, cudaEventCreate(&t.begin));
    cudaError_t error = cudaEventCreate(&t.end);
    Status status = cuda_check(backend, error, __FILE__, __LINE__, "cudaEventCreate");
    if (status == STATUS_OK) {
        status = compete(&t, count, attempt, context, best);
        cudaEventDestroy(t.end);
    }
    cudaEventDestroy(t.begin);
    return status;
}
