// The rows of each expert as work for the GPU: their counts on the host, and the experts over the
// side streams.
#ifndef CUDA_GROUPED_H
#define CUDA_GROUPED_H

#include "cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

// Starts the copy of expert_begin (experts + 1) into backend->host_counts once everything before it
// on the compute stream is done; what is launched there afterwards does not wait for it.
Status counts_start(CudaBackend *backend, const int32_t *expert_begin, int experts) NODISCARD;
// Waits for the copy and checks that it describes `rows` rows.
Status counts_finish(CudaBackend *backend, int experts, int64_t rows) NODISCARD;

// Launches all work of one expert on the stream: index `stream_index` of gemm_run().
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
