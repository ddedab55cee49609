// Choosing between algorithms of one product by measurement.
#ifndef CUDA_GEMM_TUNE_CUH
#define CUDA_GEMM_TUNE_CUH

#include "cuda/cuda.h"

enum { GEMM_CANDIDATES = 12 };

// Computes the product with algorithm `index`; what is not supported is not an error here.
typedef cublasStatus_t (*GemmAttempt)(void *context, int index);

// The fastest of `count` algorithms among those that give the same bits as the first, which is the
// heuristic's own choice: the measurement decides about speed and never about results. Computes C
// (rows of `row_bytes`, `stride_bytes` apart) many times over, so it must not be an input.
Status gemm_fastest(CudaBackend *backend, const void *c, int64_t rows, int64_t row_bytes,
                    int64_t stride_bytes, cudaStream_t stream, int count, GemmAttempt attempt,
                    void *context, int *best) NODISCARD;

#endif
