// Between the files of attention: attention.cu chooses, the others compute.
//
//   attention_cudnn.cpp  cuDNN's flash attention: bf16, no document mask
//   attention_flash.cu   own tensor-core kernels: bf16, head_dim a multiple of 8 up to 128
//   attention_plain.cu   own plain kernels: fp32 or bf16, any head_dim up to 256
#ifndef CUDA_ATTENTION_H
#define CUDA_ATTENTION_H

#include "cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

// Elements from one token to the next in qkv.
static inline int64_t attention_qkv_stride(const AttentionArgs *args) {
    return (int64_t)(args->num_heads + 2 * args->num_kv_heads) * args->head_dim;
}

bool attention_flash_takes(const CudaBackend *backend, const AttentionArgs *args);
Status attention_flash_forward(CudaBackend *backend, const AttentionArgs *args) NODISCARD;
Status attention_flash_backward(CudaBackend *backend, const AttentionArgs *args,
                                const float *delta) NODISCARD;

Status attention_plain_forward(CudaBackend *backend, const AttentionArgs *args) NODISCARD;
Status attention_plain_backward(CudaBackend *backend, const AttentionArgs *args,
                                const float *delta) NODISCARD;

// False also where cuDNN has no plan for the shape or the workspace set is too small for it. Plans
// are built the first time a shape is asked for. Pointers of args are ignored.
bool attention_cudnn_takes(const CudaBackend *backend, const AttentionArgs *args, bool backward);
// What attention_cudnn_takes wants, both directions; 0 where cuDNN has no plan.
size_t attention_cudnn_workspace(const CudaBackend *backend, const AttentionArgs *args);
Status attention_cudnn_forward(CudaBackend *backend, const AttentionArgs *args) NODISCARD;
Status attention_cudnn_backward(CudaBackend *backend, const AttentionArgs *args) NODISCARD;
// "cuDNN 9.19.0", or that the build has none.
const char *attention_cudnn_about(void);

#ifdef __cplusplus
}
#endif
#endif
