// Every product of Qwen2.5-0.5B by itself on the GPU, bf16, as cuBLASLt computes it: what the ops
// of bench_gpu_ops could reach if their other kernels took no time. dx and wgrad are the products
// of a backward; wgrad adds to an fp32 gradient.
#include "cuda/cuda.h"
#include "tests/gpu/gpu_test.h"

typedef struct Layer {
    const char *name;
    int64_t tokens, in, out;
} Layer;

static const Layer layers[] = {
    {"q, k, v", 32768, 896, 1152},           {"attention output", 32768, 896, 896},
    {"gate, up", 32768, 896, 9728},          {"down", 32768, 4864, 896},
    {"gate, up", 4096, 896, 9728},           {"down", 4096, 4864, 896},
    {"logits", 8192, 896, 151936},           {"logits", 4096, 896, 151936},
    {"square, for scale", 8192, 8192, 8192},
};

// `count` elements: one random block again and again, since a host fills gigabytes too slowly.
enum { BLOCK = 1 << 22 };
static void *random_elements(Backend *gpu, const Pair *block, int64_t count, DType dtype) {
    const int64_t bytes = count * (int64_t)dtype_bytes(dtype);
    const int64_t most = block->count * (int64_t)dtype_bytes(block->dtype);
    char *memory = NULL;
    GPU_OK(gpu->ops->alloc(gpu, (size_t)bytes, (void **)&memory));
    for (int64_t at = 0; at < bytes; at += most) {
        const int64_t size = bytes - at < most ? bytes - at : most;
        GPU_OK(gpu->ops->copy(gpu, memory + at, block->gpu, (size_t)size));
    }
    return memory;
}

static Status run_gemm(Backend *backend, const void *args) {
    return gemm_run(cuda_of(backend), (const Gemm *)args, 0);
}

static void bench(Backend *gpu, const Layer *layer, const char *what, const Gemm *product) {
    const double seconds = gpu_bench(gpu, OP_KIND_COUNT, product, run_gemm); // no workspace
    const double flops = 2.0 * (double)layer->tokens * (double)layer->in * (double)layer->out;
    printf("%-18s T%-6lld %5lld -> %-6lld %-7s %9.3f ms %7.1f TFLOP/s\n", layer->name,
           (long long)layer->tokens, (long long)layer->in, (long long)layer->out, what,
           seconds * 1e3, flops / seconds * 1e-12);
    fflush(stdout);
}

static void bench_layer(Backend *gpu, const Pair *block, const Pair *block_f32,
                        const Layer *layer) {
    const CudaBackend *b = cuda_of(gpu);
    const int64_t t = layer->tokens, in = layer->in, out = layer->out;
    void *x = random_elements(gpu, block, t * in, DTYPE_BF16);
    void *y = random_elements(gpu, block, t * out, DTYPE_BF16);
    void *weight = random_elements(gpu, block, in * out, DTYPE_BF16);
    void *grad = random_elements(gpu, block_f32, in * out, DTYPE_F32);
    Gemm inputs = gemm_of(b, t, in, out, y, weight, x);
    bench(gpu, layer, "dx", &inputs);
    Gemm weights = gemm_of(b, out, in, t, y, x, grad);
    weights.transpose_a = true;
    weights.dtype_c = DTYPE_F32;
    weights.beta = 1.0f;
    bench(gpu, layer, "wgrad", &weights);
    Gemm forward = gemm_of(b, t, out, in, x, weight, y);
    forward.transpose_b = true;
    bench(gpu, layer, "forward", &forward);
    void *all[] = {x, y, weight, grad};
    for (int i = 0; i < 4; i++) gpu->ops->release(gpu, all[i]);
}

int main(void) {
    Backend *gpu = gpu_backend(false);
    // Small enough that repeated products of products stay finite.
    Pair block = pair_random(gpu, DTYPE_BF16, BLOCK, 0.02f);
    Pair block_f32 = pair_random(gpu, DTYPE_F32, BLOCK, 0.02f);
    for (size_t i = 0; i < sizeof layers / sizeof layers[0]; i++)
        bench_layer(gpu, &block, &block_f32, &layers[i]);
    pair_free(&block);
    pair_free(&block_f32);
    backend_destroy(gpu);
    return 0;
}
