// Rows between token and expert order, for the ops of their own and inside the expert MLPs.
#ifndef CUDA_ROWS_H
#define CUDA_ROWS_H

#include "cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

// As the ops do, but row_bytes need only be even: an odd number of bf16 is a row, too.
Status rows_gather(CudaBackend *backend, const GatherRowsArgs *args) NODISCARD;
Status rows_combine(CudaBackend *backend, const CombineRowsArgs *args) NODISCARD;

#ifdef __cplusplus
}
#endif
#endif
