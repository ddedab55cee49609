// cuDNN's flash attention; without cuDNN and its frontend's headers, functions that decline.
#include "cuda/attention.h"

bool attention_cudnn_takes(const CudaBackend *, const AttentionArgs *) {
    return false;
}
size_t attention_cudnn_workspace(const CudaBackend *, const AttentionArgs *) {
    return 0;
}
Status attention_cudnn_forward(CudaBackend *, const AttentionArgs *) {
    FAIL(STATUS_INTERNAL, "this build has no cuDNN");
}
Status attention_cudnn_backward(CudaBackend *, const AttentionArgs *) {
    FAIL(STATUS_INTERNAL, "this build has no cuDNN");
}
const char *attention_cudnn_about(void) {
    return "not in this build";
}
Status attention_cache_create(CudaBackend *) {
    return STATUS_OK;
}
void attention_cache_destroy(CudaBackend *) {}
