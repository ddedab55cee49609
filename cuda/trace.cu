// Time on the GPU backend: stamps are CUDA events on the compute stream, ranges are NVTX's, which
// Nsight Systems draws. NVTX is a header that looks for a tool at its first call and does nothing
// without one.
#include <stdlib.h>
#ifdef D2M_HAVE_NVTX
#include <nvtx3/nvToolsExt.h>
#endif
#include "cuda/cuda.h"

// Growing takes a while; callers that know how many slots they need ask for the last one first.
static Status grow_stamps(CudaBackend *b, int64_t slot) {
    int64_t count = slot + 1 > 2 * b->num_stamps ? slot + 1 : 2 * b->num_stamps;
    cudaEvent_t *stamps = (cudaEvent_t *)realloc(b->stamps, (size_t)count * sizeof *stamps);
    if (!stamps) FAIL(STATUS_INTERNAL, "out of memory for %lld time stamps", (long long)count);
    b->stamps = stamps;
    for (; b->num_stamps < count; b->num_stamps++)
        CUDA_TRY(b, cudaEventCreate(&stamps[b->num_stamps]));
    return STATUS_OK;
}

Status cuda_timestamp(Backend *base, int64_t slot) {
    CudaBackend *b = cuda_of(base);
    INVARIANT(slot >= 0);
    if (slot >= b->num_stamps) TRY(grow_stamps(b, slot));
    CUDA_TRY(b, cudaEventRecord(b->stamps[slot], b->stream));
    return STATUS_OK;
}

Status cuda_elapsed_ms(Backend *base, int64_t from, int64_t to, double *ms) {
    CudaBackend *b = cuda_of(base);
    float elapsed = 0;
    INVARIANT(from >= 0 && from < b->num_stamps && to >= 0 && to < b->num_stamps);
    CUDA_TRY(b, cudaEventElapsedTime(&elapsed, b->stamps[from], b->stamps[to]));
    *ms = elapsed;
    return STATUS_OK;
}

void cuda_range(Backend *base, const char *name) {
    (void)base;
#ifdef D2M_HAVE_NVTX
    if (name)
        nvtxRangePushA(name);
    else
        nvtxRangePop();
#else
    (void)name;
#endif
}

void trace_destroy(CudaBackend *b) {
    for (int64_t i = 0; i < b->num_stamps; i++) cudaEventDestroy(b->stamps[i]);
    free(b->stamps);
}
