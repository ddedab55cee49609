// Row counts on the host, and experts over streams.
//
// cuBLASLt takes sizes from the host, so the N+1 row boundaries are copied once per op. The copy
// runs on a side stream while the compute stream gathers rows, which needs no counts, so the wait
// is hidden unless the micro-batch is tiny.
//
// One expert's product fills the chip but for its last wave. The experts are dealt over the side
// streams, largest first to the least loaded, and each expert's chain of work stays on its stream:
// the next expert's blocks then start where the last wave leaves room. Which stream does what has
// no influence on the results.
#include "cuda/grouped.h"

Status counts_start(CudaBackend *b, const int32_t *expert_begin, int experts) {
    INVARIANT(experts <= CUDA_MAX_EXPERTS);
    if (b->keep_counts) return STATUS_OK;
    CUDA_TRY(b, cudaEventRecord(b->fork_event, b->stream));
    CUDA_TRY(b, cudaStreamWaitEvent(b->side[0], b->fork_event, 0));
    CUDA_TRY(b,
             cudaMemcpyAsync(b->host_counts, expert_begin, ((size_t)experts + 1) * sizeof(int32_t),
                             cudaMemcpyDeviceToHost, b->side[0]));
    CUDA_TRY(b, cudaEventRecord(b->join_event[0], b->side[0]));
    return STATUS_OK;
}

Status counts_finish(CudaBackend *b, int experts, int64_t rows) {
    const int32_t *begin = b->host_counts;
    if (!b->keep_counts) CUDA_TRY(b, cudaEventSynchronize(b->join_event[0]));
    INVARIANT(begin[0] == 0 && begin[experts] == rows);
    for (int e = 0; e < experts; e++) INVARIANT(begin[e] <= begin[e + 1]);
    return STATUS_OK;
}

// Experts by falling row count, the lower index first among equals.
static void sort_experts(const int32_t *begin, int experts, int *order) {
    for (int e = 0; e < experts; e++) {
        const int32_t rows = begin[e + 1] - begin[e];
        int at = e;
        for (; at > 0 && begin[order[at - 1] + 1] - begin[order[at - 1]] < rows; at--)
            order[at] = order[at - 1];
        order[at] = e;
    }
}

Status experts_run(CudaBackend *b, const int32_t *begin, int experts, ExpertWork work,
                   const void *context) {
    int order[CUDA_MAX_EXPERTS];
    int64_t load[CUDA_SIDE_STREAMS] = {};
    INVARIANT(experts <= CUDA_MAX_EXPERTS);
    sort_experts(begin, experts, order);
    CUDA_TRY(b, cudaEventRecord(b->fork_event, b->stream));
    for (int i = 0; i < experts; i++) {
        const int64_t rows = begin[order[i] + 1] - begin[order[i]];
        if (rows == 0) break;
        int side = 0;
        for (int s = 1; s < CUDA_SIDE_STREAMS; s++)
            if (load[s] < load[side]) side = s;
        if (load[side] == 0) CUDA_TRY(b, cudaStreamWaitEvent(b->side[side], b->fork_event, 0));
        load[side] += rows;
        TRY(work(context, order[i], b->side[side], 1 + side));
    }
    for (int s = 0; s < CUDA_SIDE_STREAMS; s++) {
        if (load[s] == 0) continue;
        CUDA_TRY(b, cudaEventRecord(b->join_event[s], b->side[s]));
        CUDA_TRY(b, cudaStreamWaitEvent(b->stream, b->join_event[s], 0));
    }
    return STATUS_OK;
}
