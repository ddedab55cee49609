// Row counts on the host, and experts over streams.
//
// cuBLASLt takes sizes from the host, and tensor maps are made there, so the N+1 row boundaries are
// copied there once per routing.
// The copy runs on a side stream while the compute stream gathers rows, which needs no counts, so
// the wait is hidden unless the micro-batch is tiny. Backward finds what forward kept.
//
// One expert's product fills the chip but for its last wave. The experts are dealt over the side
// streams, largest first to the least loaded, and each expert's chain of work stays on its stream:
// the next expert's blocks then start where the last wave leaves room. Which stream does what has
// no influence on the results.
#include <stdlib.h>
#include <string.h>
#include "cuda/grouped.h"

enum { COUNTS_KEPT = 128 }; // layers; more only means that old ones are copied again

typedef struct CountsEntry {
    const int32_t *device; // expert_begin there; NULL: free
    int experts;
    int32_t begin[CUDA_MAX_EXPERTS + 1];
} CountsEntry;

struct CountsCache {
    CountsEntry entries[COUNTS_KEPT];
    int next; // the one to replace, in turn
};

Status counts_cache_create(CudaBackend *b) {
    b->counts = (CountsCache *)calloc(1, sizeof *b->counts);
    if (!b->counts) FAIL(STATUS_INTERNAL, "out of memory for the row counts");
    return STATUS_OK;
}

void counts_cache_destroy(CudaBackend *b) {
    free(b->counts);
}

void counts_forget(CudaBackend *b, const void *begin, size_t bytes) {
    const uintptr_t from = (uintptr_t)begin;
    for (int i = 0; i < COUNTS_KEPT; i++) {
        CountsEntry *entry = &b->counts->entries[i];
        const uintptr_t at = (uintptr_t)entry->device;
        const uintptr_t end = at + ((size_t)entry->experts + 1) * sizeof(int32_t);
        if (entry->device && at < from + bytes && from < end) entry->device = NULL;
    }
}

static CountsEntry *find_counts(CudaBackend *b, const int32_t *expert_begin, int experts) {
    for (int i = 0; i < COUNTS_KEPT; i++) {
        CountsEntry *entry = &b->counts->entries[i];
        if (entry->device == expert_begin && entry->experts == experts) return entry;
    }
    return NULL;
}

Status counts_start(CudaBackend *b, const int32_t *expert_begin, int experts) {
    INVARIANT(experts <= CUDA_MAX_EXPERTS);
    if (find_counts(b, expert_begin, experts)) return STATUS_OK;
    CUDA_TRY(b, cudaEventRecord(b->fork_event, b->stream));
    CUDA_TRY(b, cudaStreamWaitEvent(b->side[0], b->fork_event, 0));
    CUDA_TRY(b,
             cudaMemcpyAsync(b->host_counts, expert_begin, ((size_t)experts + 1) * sizeof(int32_t),
                             cudaMemcpyDeviceToHost, b->side[0]));
    CUDA_TRY(b, cudaEventRecord(b->join_event[0], b->side[0]));
    return STATUS_OK;
}

Status counts_finish(CudaBackend *b, const int32_t *expert_begin, int experts, int64_t rows,
                     const int32_t **out) {
    CountsEntry *entry = find_counts(b, expert_begin, experts);
    if (!entry) {
        const int32_t *begin = b->host_counts;
        CUDA_TRY(b, cudaEventSynchronize(b->join_event[0]));
        INVARIANT(begin[0] == 0);
        for (int e = 0; e < experts; e++) INVARIANT(begin[e] <= begin[e + 1]);
        entry = &b->counts->entries[b->counts->next];
        b->counts->next = (b->counts->next + 1) % COUNTS_KEPT;
        entry->device = expert_begin;
        entry->experts = experts;
        memcpy(entry->begin, begin, ((size_t)experts + 1) * sizeof(int32_t));
    }
    INVARIANT(entry->begin[experts] == rows);
    *out = entry->begin;
    return STATUS_OK;
}

void experts_by_rows(const int32_t *begin, int experts, int *order) {
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
    experts_by_rows(begin, experts, order);
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
