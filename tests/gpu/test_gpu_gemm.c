// The linear layer on the GPU against the CPU backend: the three products (forward, dgrad, wgrad),
// bias and bias gradient, accumulation, in sizes that are and are not multiples of a vector.
#include "tests/gpu/gpu_test.h"

typedef struct Shape {
    int tokens, in, out;
    bool bias, dx_accumulate;
} Shape;

typedef struct Operands {
    Pair x, weight, bias, out, dout, dx, grad_weight, grad_bias;
} Operands;

static Operands make_operands(Backend *gpu, const Shape *s) {
    const DType dtype = gpu->compute_dtype, grad = gpu->grad_dtype;
    const int64_t in = (int64_t)s->tokens * s->in, out = (int64_t)s->tokens * s->out;
    const int64_t weights = (int64_t)s->in * s->out;
    const float scale = 1.0f / sqrtf((float)s->in);
    return (Operands){.x = pair_random(gpu, dtype, in, 1.0f),
                      .weight = pair_random(gpu, dtype, weights, scale),
                      .bias = pair_random(gpu, dtype, s->out, 1.0f),
                      .out = pair_poisoned(gpu, dtype, out),
                      .dout = pair_random(gpu, dtype, out, 1.0f),
                      .dx = s->dx_accumulate ? pair_random(gpu, dtype, in, 1.0f)
                                             : pair_poisoned(gpu, dtype, in),
                      .grad_weight = pair_random(gpu, grad, weights, 1.0f),
                      .grad_bias = pair_random(gpu, grad, s->out, 1.0f)};
}

static void free_operands(Operands *o) {
    Pair *all[] = {&o->x,    &o->weight, &o->bias,        &o->out,
                   &o->dout, &o->dx,     &o->grad_weight, &o->grad_bias};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) pair_free(all[i]);
}

static LinearArgs args_of(const Shape *s, const Operands *o, bool gpu) {
#define SIDE(pair) (gpu ? (pair).gpu : (void *)(pair).cpu)
    return (LinearArgs){.tokens = s->tokens,
                        .in_features = s->in,
                        .out_features = s->out,
                        .x = SIDE(o->x),
                        .weight = SIDE(o->weight),
                        .bias = s->bias ? SIDE(o->bias) : NULL,
                        .out = SIDE(o->out),
                        .dout = SIDE(o->dout),
                        .dx = SIDE(o->dx),
                        .dx_accumulate = s->dx_accumulate,
                        .grad_weight = SIDE(o->grad_weight),
                        .grad_bias = s->bias ? SIDE(o->grad_bias) : NULL};
#undef SIDE
}

// From fresh accumulators, the same call gives the same bits.
static void check_repeats(Backend *gpu, const Shape *s, const char *text) {
    const int64_t weights = (int64_t)s->in * s->out;
    Operands o = make_operands(gpu, s);
    Pair first = pair_filled(gpu, gpu->grad_dtype, weights, 0.0f);
    Pair second = pair_filled(gpu, gpu->grad_dtype, weights, 0.0f);
    Pair first_bias = pair_filled(gpu, gpu->grad_dtype, s->out, 0.0f);
    Pair second_bias = pair_filled(gpu, gpu->grad_dtype, s->out, 0.0f);
    LinearArgs args = args_of(s, &o, true);
    args.dx = NULL; // may be left out
    args.grad_weight = first.gpu, args.grad_bias = s->bias ? first_bias.gpu : NULL;
    GPU_RUN(gpu, OP_LINEAR, linear_backward, &args);
    args.grad_weight = second.gpu, args.grad_bias = s->bias ? second_bias.gpu : NULL;
    GPU_RUN(gpu, OP_LINEAR, linear_backward, &args);
    pair_check_same_bits(&first, &second, text, "grad_weight");
    pair_check_same_bits(&first_bias, &second_bias, text, "grad_bias");
    Pair *all[] = {&first, &second, &first_bias, &second_bias};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) pair_free(all[i]);
    free_operands(&o);
}

static void check_shape(Backend *gpu, const Shape *s) {
    if (gpu_skips((double)s->tokens * s->in * s->out)) return;
    const double tolerance = gpu_tolerance(gpu->compute_dtype);
    char text[128];
    snprintf(text, sizeof text, "%s linear T%d %d -> %d%s%s", dtype_name(gpu->compute_dtype),
             s->tokens, s->in, s->out, s->bias ? " bias" : "", s->dx_accumulate ? " dx +=" : "");
    Operands o = make_operands(gpu, s);
    LinearArgs cpu_args = args_of(s, &o, false), gpu_args = args_of(s, &o, true);
    GPU_RUN(gpu_reference(), OP_LINEAR, linear_forward, &cpu_args);
    GPU_RUN(gpu, OP_LINEAR, linear_forward, &gpu_args);
    pair_check(&o.out, tolerance, text, "out");
    GPU_RUN(gpu_reference(), OP_LINEAR, linear_backward, &cpu_args);
    GPU_RUN(gpu, OP_LINEAR, linear_backward, &gpu_args);
    pair_check(&o.dx, tolerance, text, "dx");
    // Weight gradients are fp32 sums of exact products in bf16, too, but the tensor cores cut sums
    // off instead of rounding them.
    bool f32 = gpu->compute_dtype == DTYPE_F32;
    pair_check(&o.grad_weight, gpu_grad_tolerance(gpu, f32 ? tolerance : 1e-4), text,
               "grad_weight");
    if (s->bias)
        pair_check(&o.grad_bias, gpu_grad_tolerance(gpu, GPU_TOLERANCE_F32), text, "grad_bias");
    free_operands(&o);
    check_repeats(gpu, s, text);
}

// 2048 tokens: the sizes of Qwen2.5-0.5B, q, k, v with bias and the attention output. Odd sizes
// last: no row of theirs is aligned.
static const Shape shapes[] = {
    {1, 8, 8, true, false},        {64, 128, 256, false, true},    {63, 24, 40, true, true},
    {257, 96, 264, true, true},    {5000, 48, 16, true, false},    {1, 896, 1152, true, false},
    {2048, 896, 896, false, true}, {2048, 896, 1152, true, false}, {65, 100, 36, true, false},
    {2, 64, 3, false, false},      {1000, 72, 1, true, false},     {513, 255, 130, true, false},
    {17, 33, 31, true, false},     {3, 5, 7, true, true},          {1, 1, 1, true, false},
};

int main(void) {
    Backend *bf16 = gpu_backend(false), *f32 = gpu_backend(true);
    Backend *bf16_grads = gpu_backend_bf16_grads();
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        check_shape(f32, &shapes[i]);
        check_shape(bf16, &shapes[i]);
        check_shape(bf16_grads, &shapes[i]);
    }
    backend_destroy(bf16_grads);
    backend_destroy(bf16);
    backend_destroy(f32);
    return gpu_test_result("gemm");
}
