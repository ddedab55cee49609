// Time of attention on the GPU, bf16: what the build prefers (cuDNN where it has it), deterministic
// and in any order, and the own kernels, which a document mask of one document selects. FLOPs count
// the causal half: 2 B heads S² head_dim forward (two products), 2.5 times that backward (five
// products).
#include "tests/gpu/gpu_test.h"

typedef struct Shape {
    int batch, length, heads, kv_heads, head_dim;
} Shape;

static const Shape shapes[] = {
    {16, 2048, 14, 2, 64}, {32, 1024, 14, 2, 64}, {8, 4096, 14, 2, 64},
    {4, 8192, 14, 2, 64},  {4, 1024, 14, 2, 64},  {8, 2048, 16, 8, 128},
};

static void bench_shape(Backend *gpu, const Shape *s, const char *what, bool own) {
    const int64_t tokens = (int64_t)s->batch * s->length, out = tokens * s->heads * s->head_dim;
    const int64_t width = (int64_t)(s->heads + 2 * s->kv_heads) * s->head_dim;
    Pair qkv = pair_random(gpu, DTYPE_BF16, tokens * width, 1.0f);
    Pair dout = pair_random(gpu, DTYPE_BF16, out, 1.0f);
    Pair result = pair_poisoned(gpu, DTYPE_BF16, out);
    Pair dqkv = pair_poisoned(gpu, DTYPE_BF16, tokens * width);
    Pair lse = pair_poisoned(gpu, DTYPE_F32, tokens * s->heads);
    void *documents = NULL; // zeroed: one document
    GPU_OK(gpu->ops->alloc(gpu, (size_t)tokens * sizeof(int32_t), &documents));
    AttentionArgs args = {.batch = s->batch,
                          .sequence_length = s->length,
                          .num_heads = s->heads,
                          .num_kv_heads = s->kv_heads,
                          .head_dim = s->head_dim,
                          .qkv = qkv.gpu,
                          .document_start = own ? (const int32_t *)documents : NULL,
                          .out = result.gpu,
                          .log_sum_exp = (float *)lse.gpu,
                          .dout = dout.gpu,
                          .dqkv = dqkv.gpu};
    double forward = GPU_BENCH(gpu, OP_ATTENTION, attention_forward, &args);
    double backward = GPU_BENCH(gpu, OP_ATTENTION, attention_backward, &args);
    double flops = 2.0 * (double)out * s->length;
    printf("attention %-9s B%-3d S%-5d heads %2d/%d x %-3d  forward %8.3f ms %6.1f TFLOP/s  "
           "backward %8.3f ms %6.1f TFLOP/s  workspace %.0f MB\n",
           what, s->batch, s->length, s->heads, s->kv_heads, s->head_dim, forward * 1e3,
           flops / forward * 1e-12, backward * 1e3, 2.5 * flops / backward * 1e-12,
           (double)gpu->ops->workspace_bytes(gpu, OP_ATTENTION, &args) * 1e-6);
    fflush(stdout);
    Pair *all[] = {&qkv, &dout, &result, &dqkv, &lse};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) pair_free(all[i]);
    gpu->ops->release(gpu, documents);
}

int main(void) {
    const CudaOptions any_order = {.device = 0, .any_order = true};
    Backend *gpu = gpu_backend(false), *free_gpu = gpu_open(&any_order);
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        bench_shape(gpu, &shapes[i], "preferred", false);
        bench_shape(free_gpu, &shapes[i], "any order", false);
        bench_shape(gpu, &shapes[i], "own", true);
    }
    backend_destroy(free_gpu);
    backend_destroy(gpu);
    return 0;
}
