// Time of the grouped products of Hopper chips at the sizes of the LF-UC model and of the LM head,
// beside one cuBLAS product of the same FLOPs.
#include "cuda/hopper_grouped.h"
extern "C" {
#include "tests/gpu/gpu_test.h"
}

enum { TOKENS = 32768, EXPERTS = 6, HIDDEN = 896, INNER = 4864, VOCAB = 151936, CHUNK = 8192 };

static Status run_rows(Backend *gpu, const void *args) {
    return hopper_rows(cuda_of(gpu), (const HopperRows *)args);
}
static Status run_gradient(Backend *gpu, const void *args) {
    return hopper_gradient(cuda_of(gpu), (const HopperGradient *)args);
}
static Status run_gemm(Backend *gpu, const void *args) {
    return gemm_run(cuda_of(gpu), (const Gemm *)args, 0);
}

static void print_line(const char *name, double flops, double ours, double one) {
    printf("%-28s %7.3f ms %6.1f TFLOP/s   one GEMM %7.3f ms %6.1f TFLOP/s   %5.1f %%\n", name,
           ours * 1e3, flops / ours * 1e-12, one * 1e3, flops / one * 1e-12, 100 * one / ours);
    fflush(stdout);
}

static void bench_rows(Backend *gpu, const char *name, const int32_t *begin, int k, int n,
                       bool inner_last) {
    void *in = gpu_random_memory(gpu, DTYPE_BF16, (int64_t)TOKENS * k, 1.0f);
    void *weight = gpu_random_memory(gpu, DTYPE_BF16, (int64_t)EXPERTS * n * k, 0.03f);
    void *out = gpu_random_memory(gpu, DTYPE_BF16, (int64_t)TOKENS * n, 1.0f);
    HopperRows p = {};
    p.groups = EXPERTS;
    p.begin = begin;
    p.inner = k;
    p.columns = n;
    p.inner_last = inner_last;
    p.in = in;
    p.weight = weight;
    p.out = out;
    Gemm gemm = gemm_of(cuda_of(gpu), TOKENS, n, k, in, weight, out);
    gemm.transpose_b = inner_last;
    const double one = gpu_bench(gpu, OP_KIND_COUNT, &gemm, run_gemm);
    print_line(name, 2.0 * TOKENS * k * n, gpu_bench(gpu, OP_KIND_COUNT, &p, run_rows), one);
    for (void *memory : {in, weight, out}) gpu->ops->release(gpu, memory);
}

static void bench_gradient(Backend *gpu, const char *name, const int32_t *begin, int groups, int m,
                           int n, bool assign) {
    const int64_t rows = begin[groups];
    void *left = gpu_random_memory(gpu, DTYPE_BF16, rows * m, 1.0f);
    void *right = gpu_random_memory(gpu, DTYPE_BF16, rows * n, 1.0f);
    void *grad = gpu_random_memory(gpu, DTYPE_F32, (int64_t)groups * m * n, 1.0f);
    HopperGradient p = {};
    p.groups = groups;
    p.begin = begin;
    p.m = m;
    p.n = n;
    p.left = left;
    p.left_stride = m;
    p.right = right;
    p.assign = assign;
    p.grad = (float *)grad;
    Gemm gemm = gemm_of(cuda_of(gpu), m, n, rows, left, right, grad);
    gemm.transpose_a = true;
    gemm.dtype_c = DTYPE_F32;
    gemm.beta = assign ? 0.0f : 1.0f;
    const double one = gpu_bench(gpu, OP_KIND_COUNT, &gemm, run_gemm);
    print_line(name, 2.0 * (double)rows * m * n, gpu_bench(gpu, OP_KIND_COUNT, &p, run_gradient),
               one);
    for (void *memory : {left, right, grad}) gpu->ops->release(gpu, memory);
}

int main(void) {
    Backend *gpu = gpu_backend(false);
    int32_t even[EXPERTS + 1] = {0}, half[EXPERTS + 1] = {0};
    const int32_t chunk[] = {0, CHUNK}, all[] = {0, TOKENS};
    HopperRows any = {};
    any.groups = 1;
    any.begin = all;
    if (!hopper_rows_takes(cuda_of(gpu), &any)) return 77;
    for (int e = 0; e < EXPERTS; e++) { // not exactly even: routed counts never are
        even[e + 1] = TOKENS * (e + 1) / EXPERTS + (e + 1 < EXPERTS ? (e * 37) % 101 : 0);
        half[e + 1] = TOKENS / 2 + TOKENS / 2 * e / (EXPERTS - 1);
    }
    bench_rows(gpu, "down", even, INNER, HIDDEN, true);
    bench_rows(gpu, "down, half on one", half, INNER, HIDDEN, true);
    bench_rows(gpu, "d x", even, 2 * INNER, HIDDEN, false);
    bench_rows(gpu, "d x, half on one", half, 2 * INNER, HIDDEN, false);
    bench_gradient(gpu, "gate_up", even, EXPERTS, 2 * INNER, HIDDEN, true);
    bench_gradient(gpu, "gate_up, added", even, EXPERTS, 2 * INNER, HIDDEN, false);
    bench_gradient(gpu, "gate_up, half on one", half, EXPERTS, 2 * INNER, HIDDEN, true);
    bench_gradient(gpu, "down's gradient", even, EXPERTS, HIDDEN, INNER, true);
    bench_gradient(gpu, "down's gradient, added", even, EXPERTS, HIDDEN, INNER, false);
    bench_gradient(gpu, "LM head, chunk", chunk, 1, VOCAB, HIDDEN, false);
    bench_gradient(gpu, "dense gate_up", all, 1, 2 * INNER, HIDDEN, true);
    bench_gradient(gpu, "dense down", all, 1, HIDDEN, INNER, true);
    backend_destroy(gpu);
    return 0;
}
