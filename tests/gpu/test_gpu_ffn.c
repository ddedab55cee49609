// The dense SwiGLU MLP on the GPU against the CPU backend, with the activation kept and recomputed.
#include "tests/gpu/gpu_test.h"

typedef struct Shape {
    int tokens, hidden, inner;
} Shape;

typedef struct Operands {
    Pair x, gate_up_weight, down_weight, out, gate_up, activation;
    Pair dout, dx, grad_gate_up, grad_down;
} Operands;

// The first product has a standard deviation of 1.5, so that silu is met on both sides of 0.
static Operands make_operands(Backend *gpu, const Shape *s) {
    const DType dtype = gpu->compute_dtype, grad = gpu->grad_dtype;
    const int64_t t = s->tokens, h = s->hidden, i = s->inner;
    return (Operands){
        .x = pair_random(gpu, dtype, t * h, 1.0f),
        .gate_up_weight = pair_random(gpu, dtype, 2 * i * h, 1.5f / sqrtf((float)h)),
        .down_weight = pair_random(gpu, dtype, h * i, 1.0f / sqrtf((float)i)),
        .out = pair_poisoned(gpu, dtype, t * h),
        .gate_up = pair_poisoned(gpu, dtype, t * 2 * i),
        .activation = pair_poisoned(gpu, dtype, t * i),
        .dout = pair_random(gpu, dtype, t * h, 1.0f),
        .dx = pair_poisoned(gpu, dtype, t * h),
        .grad_gate_up = pair_random(gpu, grad, 2 * i * h, 1.0f),
        .grad_down = pair_random(gpu, grad, h * i, 1.0f),
    };
}

static void free_operands(Operands *o) {
    Pair *all[] = {
        &o->x,          &o->gate_up_weight, &o->down_weight, &o->out,          &o->gate_up,
        &o->activation, &o->dout,           &o->dx,          &o->grad_gate_up, &o->grad_down};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) pair_free(all[i]);
}

static FfnArgs args_of(const Shape *s, const Operands *o, bool gpu, bool keep) {
#define SIDE(pair) (gpu ? (pair).gpu : (void *)(pair).cpu)
    return (FfnArgs){.tokens = s->tokens,
                     .hidden_size = s->hidden,
                     .intermediate_size = s->inner,
                     .x = SIDE(o->x),
                     .weight_gate_up = SIDE(o->gate_up_weight),
                     .weight_down = SIDE(o->down_weight),
                     .out = SIDE(o->out),
                     .gate_up = SIDE(o->gate_up),
                     .activation = keep ? SIDE(o->activation) : NULL,
                     .dout = SIDE(o->dout),
                     .dx = SIDE(o->dx),
                     .grad_gate_up = SIDE(o->grad_gate_up),
                     .grad_down = SIDE(o->grad_down)};
#undef SIDE
}

// Forward without out, as in a recomputation, leaves what backward reads.
static void check_without_out(Backend *gpu, const Shape *s, const Operands *o, bool keep,
                              const char *text) {
    Pair gate_up = pair_poisoned(gpu, gpu->compute_dtype, o->gate_up.count);
    Pair activation = pair_poisoned(gpu, gpu->compute_dtype, o->activation.count);
    FfnArgs args = args_of(s, o, true, keep);
    args.out = NULL;
    args.gate_up = gate_up.gpu;
    if (keep) args.activation = activation.gpu;
    GPU_RUN(gpu, OP_FFN, ffn_forward, &args);
    pair_check_same_bits(&gate_up, &o->gate_up, text, "gate_up without out");
    if (keep) pair_check_same_bits(&activation, &o->activation, text, "activation without out");
    pair_free(&gate_up);
    pair_free(&activation);
}

// A second backward gives the same dx; with grad_assign it needs no gradients to add to.
static void check_again(Backend *gpu, const Shape *s, const Operands *o, bool keep,
                        const char *text) {
    const double tolerance = gpu_tolerance(gpu->compute_dtype);
    Operands again = *o;
    again.dx = pair_poisoned(gpu, o->dx.dtype, o->dx.count);
    again.grad_gate_up = pair_poisoned(gpu, o->grad_gate_up.dtype, o->grad_gate_up.count);
    again.grad_down = pair_poisoned(gpu, o->grad_down.dtype, o->grad_down.count);
    FfnArgs cpu_args = args_of(s, &again, false, keep), gpu_args = args_of(s, &again, true, keep);
    cpu_args.grad_assign = gpu_args.grad_assign = true;
    GPU_RUN(gpu_reference(), OP_FFN, ffn_backward, &cpu_args);
    GPU_RUN(gpu, OP_FFN, ffn_backward, &gpu_args);
    pair_check_same_bits(&again.dx, &o->dx, text, "dx");
    pair_check(&again.grad_gate_up, tolerance, text, "grad_gate_up assigned");
    pair_check(&again.grad_down, tolerance, text, "grad_down assigned");
    Pair *all[] = {&again.dx, &again.grad_gate_up, &again.grad_down};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) pair_free(all[i]);
}

static void check_shape(Backend *gpu, const Shape *s, bool keep) {
    if (gpu_skips((double)s->tokens * s->hidden * s->inner * 3)) return;
    const double tolerance = gpu_tolerance(gpu->compute_dtype);
    char text[128];
    snprintf(text, sizeof text, "%s ffn T%d H%d I%d%s", dtype_name(gpu->compute_dtype), s->tokens,
             s->hidden, s->inner, keep ? " activation kept" : "");
    Operands o = make_operands(gpu, s);
    FfnArgs cpu_args = args_of(s, &o, false, keep), gpu_args = args_of(s, &o, true, keep);
    GPU_RUN(gpu_reference(), OP_FFN, ffn_forward, &cpu_args);
    GPU_RUN(gpu, OP_FFN, ffn_forward, &gpu_args);
    pair_check(&o.gate_up, tolerance, text, "gate_up");
    if (keep) pair_check(&o.activation, tolerance, text, "activation");
    pair_check(&o.out, tolerance, text, "out");
    check_without_out(gpu, s, &o, keep, text);

    GPU_RUN(gpu_reference(), OP_FFN, ffn_backward, &cpu_args);
    GPU_RUN(gpu, OP_FFN, ffn_backward, &gpu_args);
    pair_check(&o.dx, tolerance, text, "dx");
    pair_check(&o.grad_gate_up, tolerance, text, "grad_gate_up");
    pair_check(&o.grad_down, tolerance, text, "grad_down");

    check_again(gpu, s, &o, keep, text);
    free_operands(&o);
}

// 1024 tokens: the sizes of Qwen2.5-0.5B. Odd sizes last: no row of theirs is aligned.
// The smallest ones in fp32 only: bf16 roundings of so few elements do not average out.
static const Shape shapes[] = {
    {1, 8, 8},       {1, 64, 88},       {64, 64, 176},  {500, 128, 344},
    {257, 96, 2104}, {1024, 896, 4864}, {129, 72, 300}, {33, 24, 20},
    {100, 40, 257},  {3, 7, 5},         {1, 1, 1},
};

int main(void) {
    Backend *bf16 = gpu_backend(false), *f32 = gpu_backend(true);
    Backend *bf16_grads = gpu_backend_bf16_grads();
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        for (int keep = 0; keep < 2; keep++) {
            check_shape(f32, &shapes[i], keep);
            if (shapes[i].inner > 8) check_shape(bf16, &shapes[i], keep);
            if (shapes[i].inner > 8) check_shape(bf16_grads, &shapes[i], keep);
        }
    }
    backend_destroy(bf16_grads);
    backend_destroy(bf16);
    backend_destroy(f32);
    return gpu_test_result("ffn");
}
