// Time of the dense products on the GPU, bf16, in the sizes of Qwen2.5-0.5B. FLOPs count two per
// multiply-add of the products; a backward that gives dx and the weight's gradient has twice those
// of its forward. The last column is the FLOPs' share of the H200's and H100's 989 TFLOP/s.
#include "tests/gpu/gpu_test.h"

static const double PEAK = 989e12;

static void print_line(const char *name, const char *shape, double seconds, double flops) {
    printf("%-24s %-30s %9.3f ms %7.1f TFLOP/s %5.1f %%\n", name, shape, seconds * 1e3,
           flops / seconds * 1e-12, 100 * flops / seconds / PEAK);
    fflush(stdout);
}

static void bench_linear(Backend *gpu, int tokens, int in, int out, bool bias) {
    const int64_t weights = (int64_t)in * out;
    char shape[64];
    snprintf(shape, sizeof shape, "T%d %d -> %d%s", tokens, in, out, bias ? " bias" : "");
    Pair x = pair_random(gpu, DTYPE_BF16, (int64_t)tokens * in, 1.0f);
    Pair weight = pair_random(gpu, DTYPE_BF16, weights, 0.03f);
    Pair biases = pair_random(gpu, DTYPE_BF16, out, 1.0f);
    Pair result = pair_poisoned(gpu, DTYPE_BF16, (int64_t)tokens * out);
    Pair dout = pair_random(gpu, DTYPE_BF16, (int64_t)tokens * out, 1.0f);
    Pair dx = pair_poisoned(gpu, DTYPE_BF16, (int64_t)tokens * in);
    Pair grad = pair_filled(gpu, gpu->grad_dtype, weights, 0.0f);
    Pair grad_bias = pair_filled(gpu, gpu->grad_dtype, out, 0.0f);
    LinearArgs args = {.tokens = tokens,
                       .in_features = in,
                       .out_features = out,
                       .x = x.gpu,
                       .weight = weight.gpu,
                       .bias = bias ? biases.gpu : NULL,
                       .out = result.gpu,
                       .dout = dout.gpu,
                       .dx = dx.gpu,
                       .grad_weight = grad.gpu,
                       .grad_bias = bias ? grad_bias.gpu : NULL};
    const double flops = 2.0 * tokens * (double)weights;
    print_line("linear forward", shape, GPU_BENCH(gpu, OP_LINEAR, linear_forward, &args), flops);
    print_line("linear backward", shape, GPU_BENCH(gpu, OP_LINEAR, linear_backward, &args),
               2 * flops);
    Pair *all[] = {&x, &weight, &biases, &result, &dout, &dx, &grad, &grad_bias};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) pair_free(all[i]);
}

static void bench_ffn(Backend *gpu, int tokens, int hidden, int inner, bool keep) {
    const int64_t t = tokens, h = hidden, i = inner;
    char shape[64];
    snprintf(shape, sizeof shape, "T%d H%d I%d%s", tokens, hidden, inner, keep ? " kept" : "");
    Pair x = pair_random(gpu, DTYPE_BF16, t * h, 1.0f), dx = pair_poisoned(gpu, DTYPE_BF16, t * h);
    Pair first = pair_random(gpu, DTYPE_BF16, 2 * i * h, 0.03f);
    Pair second = pair_random(gpu, DTYPE_BF16, h * i, 0.01f);
    Pair out = pair_poisoned(gpu, DTYPE_BF16, t * h);
    Pair dout = pair_random(gpu, DTYPE_BF16, t * h, 1.0f);
    Pair gate_up = pair_poisoned(gpu, DTYPE_BF16, t * 2 * i);
    Pair activation = pair_poisoned(gpu, DTYPE_BF16, t * i);
    Pair grad_first = pair_filled(gpu, gpu->grad_dtype, 2 * i * h, 0.0f);
    Pair grad_second = pair_filled(gpu, gpu->grad_dtype, h * i, 0.0f);
    FfnArgs args = {.tokens = tokens,
                    .hidden_size = hidden,
                    .intermediate_size = inner,
                    .x = x.gpu,
                    .weight_gate_up = first.gpu,
                    .weight_down = second.gpu,
                    .out = out.gpu,
                    .gate_up = gate_up.gpu,
                    .activation = keep ? activation.gpu : NULL,
                    .dout = dout.gpu,
                    .dx = dx.gpu,
                    .grad_gate_up = grad_first.gpu,
                    .grad_down = grad_second.gpu};
    const double flops = 6.0 * (double)(t * h * i);
    print_line("ffn forward", shape, GPU_BENCH(gpu, OP_FFN, ffn_forward, &args), flops);
    print_line("ffn backward", shape, GPU_BENCH(gpu, OP_FFN, ffn_backward, &args), 2 * flops);
    Pair *all[] = {&x,    &dx,      &first,      &second,     &out,
                   &dout, &gate_up, &activation, &grad_first, &grad_second};
    for (size_t n = 0; n < sizeof all / sizeof all[0]; n++) pair_free(all[n]);
}

static void bench_cross_entropy(Backend *gpu, int tokens, int hidden, int vocab, int chunk) {
    char shape[64];
    snprintf(shape, sizeof shape, "T%d H%d V%d chunk %d", tokens, hidden, vocab, chunk);
    Pair x = pair_random(gpu, DTYPE_BF16, (int64_t)tokens * hidden, 1.0f);
    Pair weight = pair_random(gpu, DTYPE_BF16, (int64_t)vocab * hidden, 0.03f);
    Pair dx = pair_poisoned(gpu, DTYPE_BF16, (int64_t)tokens * hidden);
    Pair grad = pair_filled(gpu, gpu->grad_dtype, (int64_t)vocab * hidden, 0.0f);
    int32_t *targets = (int32_t *)malloc((size_t)tokens * sizeof *targets);
    for (int t = 0; t < tokens; t++) targets[t] = gpu_random_int(vocab);
    void *gpu_targets = gpu_copy_of(gpu, targets, (size_t)tokens * sizeof *targets), *sums = NULL;
    GPU_OK(gpu->ops->alloc(gpu, 2 * sizeof(double), &sums));
    LinearCrossEntropyArgs args = {.tokens = tokens,
                                   .hidden_size = hidden,
                                   .vocab_size = vocab,
                                   .chunk_tokens = chunk,
                                   .x = x.gpu,
                                   .weight = weight.gpu,
                                   .targets = (const int32_t *)gpu_targets,
                                   .grad_scale = 1.0f / (float)tokens,
                                   .loss_sum = (double *)sums,
                                   .loss_count = (double *)sums + 1,
                                   .dx = dx.gpu,
                                   .grad_weight = grad.gpu};
    const double flops = 2.0 * tokens * (double)hidden * vocab;
    print_line("cross-entropy fwd+bwd", shape,
               GPU_BENCH(gpu, OP_LINEAR_CROSS_ENTROPY, linear_cross_entropy, &args), 3 * flops);
    args.dx = NULL;
    print_line("cross-entropy without dx", shape,
               GPU_BENCH(gpu, OP_LINEAR_CROSS_ENTROPY, linear_cross_entropy, &args), 2 * flops);
    args.grad_weight = NULL;
    print_line("cross-entropy loss only", shape,
               GPU_BENCH(gpu, OP_LINEAR_CROSS_ENTROPY, linear_cross_entropy, &args), flops);
    Pair *all[] = {&x, &weight, &dx, &grad};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) pair_free(all[i]);
    gpu->ops->release(gpu, gpu_targets);
    gpu->ops->release(gpu, sums);
    free(targets);
}

int main(void) {
    Backend *gpu = gpu_backend(false);
    bench_linear(gpu, 32768, 896, 1152, true);
    bench_linear(gpu, 32768, 896, 896, false);
    bench_linear(gpu, 4096, 896, 1152, true);
    bench_ffn(gpu, 32768, 896, 4864, false);
    bench_ffn(gpu, 32768, 896, 4864, true);
    bench_ffn(gpu, 4096, 896, 4864, true);
    const int chunks[] = {0, 4096, 2048};
    for (int i = 0; i < 3; i++) bench_cross_entropy(gpu, 8192, 896, 151936, chunks[i]);
    bench_cross_entropy(gpu, 32768, 896, 151936, 0);
    bench_cross_entropy(gpu, 4096, 896, 151936, 0);
    backend_destroy(gpu);
    return 0;
}
