// Bandwidth of the SwiGLU kernels on the GPU, bf16, beside that of a device-to-device copy: the
// bytes each must move (every operand once) over the time. On a Hopper chip also the products that
// have SwiGLU inside, over several inner dimensions: how their time grows with it is the product's
// own share, and what is left at the shortest is the rest's.
#include "cuda/hopper_mlp.h"
#include "cuda/swiglu.cuh"
extern "C" {
#include "tests/gpu/gpu_test.h"
}

static void print_line(const char *name, int64_t rows, int inner, double bytes, double seconds) {
    printf("%-24s R%-6lld I%-5d %9.3f ms %7.0f GB/s\n", name, (long long)rows, inner, seconds * 1e3,
           bytes / seconds * 1e-9);
    fflush(stdout);
}

// As ops, so that gpu_bench can time them; they ask for no workspace.
static Status run_forward(Backend *backend, const void *args) {
    return swiglu_forward(cuda_of(backend), (const Swiglu *)args, cuda_of(backend)->stream);
}
static Status run_backward(Backend *backend, const void *args) {
    return swiglu_backward(cuda_of(backend), (const Swiglu *)args, cuda_of(backend)->stream);
}
static Status run_copy(Backend *backend, const void *args) {
    const Swiglu *s = (const Swiglu *)args;
    return backend->ops->copy(backend, s->dgate_up, s->gate_up,
                              (size_t)(s->rows * s->inner) * 2 * sizeof(bf16));
}

static void bench(Backend *gpu, int64_t rows, int inner) {
    const OpKind none = OP_KIND_COUNT; // no workspace
    const int64_t count = rows * inner;
    const double bytes = (double)count * sizeof(bf16);
    Pair gate_up = pair_random(gpu, DTYPE_BF16, 2 * count, 1.0f);
    Pair d = pair_random(gpu, DTYPE_BF16, count, 1.0f);
    Pair activation = pair_poisoned(gpu, DTYPE_BF16, count);
    Pair dgate_up = pair_poisoned(gpu, DTYPE_BF16, 2 * count);
    Pair scale = pair_random(gpu, DTYPE_F32, rows, 1.0f);
    Pair dscale = pair_poisoned(gpu, DTYPE_F32, rows);
    Swiglu s = {};
    s.rows = rows;
    s.inner = inner;
    s.gate_up = gate_up.gpu;
    s.activation = activation.gpu;
    s.dactivation = d.gpu;
    s.dgate_up = dgate_up.gpu;
    print_line("copy", rows, inner, 4 * bytes, gpu_bench(gpu, none, &s, run_copy));
    print_line("forward", rows, inner, 3 * bytes, gpu_bench(gpu, none, &s, run_forward));
    print_line("backward, recompute", rows, inner, 6 * bytes,
               gpu_bench(gpu, none, &s, run_backward));
    s.scale = (const float *)scale.gpu;
    s.dscale = (float *)dscale.gpu;
    print_line("backward, scaled", rows, inner, 6 * bytes, gpu_bench(gpu, none, &s, run_backward));
    s.activation = NULL;
    s.scale = NULL;
    s.dscale = NULL;
    print_line("backward", rows, inner, 5 * bytes, gpu_bench(gpu, none, &s, run_backward));
    Pair *all[] = {&gate_up, &d, &activation, &dgate_up, &scale, &dscale};
    for (Pair *pair : all) pair_free(pair);
}

static Status run_product_forward(Backend *backend, const void *args) {
    return hopper_mlp_forward(cuda_of(backend), (const HopperMlp *)args);
}
static Status run_product_backward(Backend *backend, const void *args) {
    return hopper_mlp_backward(cuda_of(backend), (const HopperMlp *)args);
}

static void bench_products(Backend *gpu, int64_t rows, int inner) {
    const int hidden[] = {64, 448, 896, 1792}, most = 1792;
    const int32_t all_rows[] = {0, (int32_t)rows};
    const OpKind none = OP_KIND_COUNT; // no workspace
    Pair in = pair_random(gpu, DTYPE_BF16, rows * most, 1.0f);
    Pair weight = pair_random(gpu, DTYPE_BF16, (int64_t)2 * inner * most, 0.03f);
    Pair gate_up = pair_random(gpu, DTYPE_BF16, rows * 2 * inner, 1.0f);
    Pair activation = pair_poisoned(gpu, DTYPE_BF16, rows * inner);
    Pair dgate_up = pair_poisoned(gpu, DTYPE_BF16, rows * 2 * inner);
    for (int h : hidden) {
        HopperMlp m = {};
        m.groups = 1;
        m.begin = all_rows;
        m.hidden = h;
        m.inner = inner;
        m.in = in.gpu;
        m.weight = weight.gpu;
        m.gate_up = gate_up.gpu;
        m.activation = activation.gpu;
        m.dgate_up = dgate_up.gpu;
        if (!hopper_mlp_takes(cuda_of(gpu), &m)) break;
        const double flops = 2.0 * (double)rows * h * inner;
        const double backward = gpu_bench(gpu, none, &m, run_product_backward);
        const double forward = gpu_bench(gpu, none, &m, run_product_forward);
        printf("product and SwiGLU       R%-6lld H%-5d I%-5d forward %.3f ms %4.0f TFLOP/s, "
               "backward %.3f ms %4.0f TFLOP/s\n",
               (long long)rows, h, inner, forward * 1e3, 2 * flops / forward * 1e-12,
               backward * 1e3, flops / backward * 1e-12);
    }
    Pair *all[] = {&in, &weight, &gate_up, &activation, &dgate_up};
    for (Pair *pair : all) pair_free(pair);
}

int main(void) {
    Backend *gpu = gpu_backend(false);
    bench_products(gpu, 32768, 4864);
    bench(gpu, 32768, 4864);
    bench(gpu, 8192, 4864);
    bench(gpu, 65536, 768);
    backend_destroy(gpu);
    return 0;
}
