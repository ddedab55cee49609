// The rows of each expert as work for the GPU: their counts on the host, and the experts over the
// side streams.
#ifndef CUDA_GROUPED_H
#define CUDA_GROUPED_H

#include "cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

// The row counts of the routings that the host has seen, by where expert_begin lies on the device,
// so that a backward pass does not wait for what its forward pass knew. An entry is good until that
// memory is written: by route_forward or gather_rows, or through the backend's memory functions.
Status counts_cache_create(CudaBackend *backend) NODISCARD;
void counts_cache_destroy(CudaBackend *backend);
// The device memory [begin, begin + bytes) is about to change.
void counts_forget(CudaBackend *backend, const void *begin, size_t bytes);

// Starts the copy of expert_begin (experts + 1) to the host once everything before it on the
// compute stream is done; what is launched there afterwards does not wait for it.
Status counts_start(CudaBackend *backend, const int32_t *expert_begin, int experts) NODISCARD;
// Waits for the copy, checks that it describes `rows` rows, and gives expert_begin on the host,
// which stays until the next counts_finish().
Status counts_finish(CudaBackend *backend, const int32_t *expert_begin, int experts, int64_t rows,
                     const int32_t **out) NODISCARD;

// Experts by falling row count, the lower index first among equals.
void experts_by_rows(const int32_t *begin, int experts, int *order);

// Launches work of one expert on the stream: index `stream_index` of gemm_run().
typedef Status (*ExpertWork)(const void *context, int expert, cudaStream_t stream,
                             int stream_index);
// Runs the work of every expert that has rows, between what was launched on the compute stream
// before and what is launched there later.
Status experts_run(CudaBackend *backend, const int32_t *begin, int experts, ExpertWork work,
                   const void *context) NODISCARD;

#ifdef __cplusplus
}
#endif
#endif
