// Final linear layer and cross-entropy on the GPU against the CPU backend: chunks, vocabularies
// that are no multiple of a vector, rows longer than shared memory, ignored and invalid targets.
#include "tests/gpu/gpu_test.h"

typedef struct Shape {
    int tokens, hidden, vocab, chunk;
    int ignored; // of 100 targets
} Shape;

typedef struct Operands {
    Pair x, weight, dx, grad_weight, token_loss;
    int32_t *targets, *gpu_targets; // (T)
    double sums[2], *gpu_sums;      // loss_sum, loss_count
} Operands;

static Operands make_operands(Backend *gpu, const Shape *s) {
    const DType dtype = gpu->compute_dtype;
    const int64_t tokens = s->tokens, hidden = s->hidden, vocab = s->vocab;
    Operands o = {.x = pair_random(gpu, dtype, tokens * hidden, 1.0f),
                  .weight = pair_random(gpu, dtype, vocab * hidden, 1.0f / sqrtf((float)hidden)),
                  .dx = pair_poisoned(gpu, dtype, tokens * hidden),
                  .grad_weight = pair_random(gpu, gpu->grad_dtype, vocab * hidden, 1e-3f),
                  .token_loss = pair_poisoned(gpu, DTYPE_F32, tokens),
                  .sums = {2.5, 3.0}}; // both are added to
    o.targets = (int32_t *)malloc((size_t)tokens * sizeof *o.targets);
    for (int64_t t = 0; t < tokens; t++)
        o.targets[t] = gpu_random_int(100) < s->ignored ? -1 : gpu_random_int(s->vocab);
    o.targets[tokens - 1] = s->ignored < 100 ? s->vocab - 1 : -1;
    o.gpu_targets = (int32_t *)gpu_copy_of(gpu, o.targets, (size_t)tokens * sizeof *o.targets);
    o.gpu_sums = (double *)gpu_copy_of(gpu, o.sums, sizeof o.sums);
    return o;
}

static void free_operands(Backend *gpu, Operands *o) {
    Pair *all[] = {&o->x, &o->weight, &o->dx, &o->grad_weight, &o->token_loss};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) pair_free(all[i]);
    gpu->ops->release(gpu, o->gpu_targets);
    gpu->ops->release(gpu, o->gpu_sums);
    free(o->targets);
}

static LinearCrossEntropyArgs args_of(const Shape *s, Operands *o, bool gpu) {
#define SIDE(pair) (gpu ? (pair).gpu : (void *)(pair).cpu)
    double *sums = gpu ? o->gpu_sums : o->sums;
    return (LinearCrossEntropyArgs){.tokens = s->tokens,
                                    .hidden_size = s->hidden,
                                    .vocab_size = s->vocab,
                                    .chunk_tokens = s->chunk,
                                    .x = SIDE(o->x),
                                    .weight = SIDE(o->weight),
                                    .targets = gpu ? o->gpu_targets : o->targets,
                                    .grad_scale = 1.0f / (float)s->tokens,
                                    .loss_sum = &sums[0],
                                    .loss_count = &sums[1],
                                    .token_loss = (float *)SIDE(o->token_loss),
                                    .dx = SIDE(o->dx),
                                    .grad_weight = SIDE(o->grad_weight)};
#undef SIDE
}

// loss_sum against `expected`, the count exactly.
static void check_sums(Backend *gpu, const double *gpu_sums, const double *expected,
                       double tolerance, const char *text) {
    double got[2];
    GPU_OK(gpu->ops->download(gpu, got, gpu_sums, sizeof got));
    gpu_report(fabs(got[0] - expected[0]) / expected[0], tolerance, "%s loss_sum", text);
    gpu_report(fabs(got[1] - expected[1]), 0, "%s loss_count", text);
}

// Losses alone: nothing but them changes, and they are the same numbers.
static void check_loss_only(Backend *gpu, const Shape *s, Operands *o, const char *text) {
    const double zero[2] = {0, 0};
    double with_gradient[2], alone[2];
    GPU_OK(gpu->ops->download(gpu, with_gradient, o->gpu_sums, sizeof with_gradient));
    GPU_OK(gpu->ops->upload(gpu, o->gpu_sums, zero, sizeof zero));
    Pair losses = pair_poisoned(gpu, DTYPE_F32, s->tokens);
    LinearCrossEntropyArgs args = args_of(s, o, true);
    args.dx = args.grad_weight = NULL;
    args.token_loss = (float *)losses.gpu;
    GPU_RUN(gpu, OP_LINEAR_CROSS_ENTROPY, linear_cross_entropy, &args);
    pair_check_same_bits(&losses, &o->token_loss, text, "token_loss without gradients");
    args.token_loss = NULL; // may be left out
    GPU_RUN(gpu, OP_LINEAR_CROSS_ENTROPY, linear_cross_entropy, &args);
    GPU_OK(gpu->ops->download(gpu, alone, o->gpu_sums, sizeof alone));
    // Sums of the same floats in another association of doubles.
    double expected = 2 * (with_gradient[0] - 2.5);
    gpu_report(fabs(alone[0] - expected) / fmax(expected, 1), 1e-12, "%s loss_sum, twice", text);
    pair_free(&losses);
}

static void check_repeats(Backend *gpu, const Shape *s, Operands *o, const char *text) {
    Pair dx = pair_poisoned(gpu, gpu->compute_dtype, o->dx.count);
    Pair grads[3]; // twice added to zeros, and assigned
    LinearCrossEntropyArgs args = args_of(s, o, true);
    for (int i = 0; i < 3; i++) {
        args.grad_assign = i == 2;
        grads[i] = i < 2 ? pair_filled(gpu, gpu->grad_dtype, o->grad_weight.count, 0.0f)
                         : pair_poisoned(gpu, gpu->grad_dtype, o->grad_weight.count);
        args.grad_weight = grads[i].gpu;
        args.dx = dx.gpu;
        GPU_RUN(gpu, OP_LINEAR_CROSS_ENTROPY, linear_cross_entropy, &args);
    }
    pair_check_same_bits(&dx, &o->dx, text, "dx");
    pair_check_same_bits(&grads[0], &grads[1], text, "grad_weight");
    pair_check_same_bits(&grads[0], &grads[2], text, "grad_weight assigned");
    Pair *all[] = {&dx, &grads[0], &grads[1], &grads[2]};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) pair_free(all[i]);
}

static void check_operands(Backend *gpu, const Shape *s, Operands *o, const char *name) {
    const double tolerance = gpu_tolerance(gpu->compute_dtype);
    char text[128];
    snprintf(text, sizeof text, "%s %s T%d H%d V%d chunk %d ignored %d%%",
             dtype_name(gpu->compute_dtype), name, s->tokens, s->hidden, s->vocab, s->chunk,
             s->ignored);
    LinearCrossEntropyArgs cpu_args = args_of(s, o, false), gpu_args = args_of(s, o, true);
    GPU_RUN(gpu_reference(), OP_LINEAR_CROSS_ENTROPY, linear_cross_entropy, &cpu_args);
    GPU_RUN(gpu, OP_LINEAR_CROSS_ENTROPY, linear_cross_entropy, &gpu_args);
    check_sums(gpu, o->gpu_sums, o->sums, tolerance, text);
    pair_check(&o->token_loss, tolerance, text, "token_loss");
    pair_check(&o->dx, tolerance, text, "dx");
    pair_check(&o->grad_weight, tolerance, text, "grad_weight");
    check_loss_only(gpu, s, o, text);
    check_repeats(gpu, s, o, text);
}

static void check_shape(Backend *gpu, const Shape *s) {
    if (gpu_skips((double)s->tokens * s->hidden * s->vocab)) return;
    Operands o = make_operands(gpu, s);
    check_operands(gpu, s, &o, "cross-entropy");
    free_operands(gpu, &o);
}

// Random signs of one size.
static void fill_signs(Pair *pair, float size) {
    for (int64_t i = 0; i < pair->count; i++) pair->cpu[i] = gpu_random_int(2) ? size : -size;
    pair_upload(pair);
}

// Losses of up to 100 nats beside small ones, so that no power of the target's logit alone can hold
// a row. The logits are whole multiples of 4 up to 256, which bf16 has: rounded ones would differ
// from the reference by more than their softmax bears.
static void check_large_logits(Backend *gpu) {
    const Shape s = {300, 64, 1003, 0, 10};
    Operands o = make_operands(gpu, &s);
    fill_signs(&o.x, 4.0f);
    fill_signs(&o.weight, 1.0f);
    for (int i = 0; i < s.hidden * 100; i++) o.x.cpu[i] /= 16; // 100 tokens of small logits
    pair_upload(&o.x);
    check_operands(gpu, &s, &o, "large logits");
    free_operands(gpu, &o);
}

// What is not a number stays visible in the token's loss, and only there.
static void check_not_a_number(Backend *gpu) {
    const Shape s = {40, 64, 500, 0, 0};
    Operands o = make_operands(gpu, &s);
    o.x.cpu[0] = NAN;
    o.x.cpu[(int64_t)s.hidden * 7] = INFINITY;
    pair_upload(&o.x);
    LinearCrossEntropyArgs args = args_of(&s, &o, true);
    GPU_RUN(gpu, OP_LINEAR_CROSS_ENTROPY, linear_cross_entropy, &args);
    float *losses = pair_download(&o.token_loss);
    int wrong = 0;
    for (int t = 0; t < s.tokens; t++) wrong += !isfinite(losses[t]) != (t == 0 || t == 7);
    gpu_report(wrong, 0, "%s not a number in 2 of 40 tokens", dtype_name(gpu->compute_dtype));
    free(losses);
    free_operands(gpu, &o);
}

// A target outside the vocabulary is never read through; synchronize() names it.
static void check_bad_target(Backend *gpu, int hidden, int32_t target) {
    const Shape s = {12, hidden, 50, 5, 0};
    Operands o = make_operands(gpu, &s);
    o.targets[7] = target;
    GPU_OK(gpu->ops->upload(gpu, o.gpu_targets, o.targets, sizeof *o.targets * 12));
    LinearCrossEntropyArgs args = args_of(&s, &o, true);
    void *workspace = NULL;
    size_t bytes = gpu->ops->workspace_bytes(gpu, OP_LINEAR_CROSS_ENTROPY, &args);
    GPU_OK(gpu->ops->alloc(gpu, bytes, &workspace));
    gpu->ops->set_workspace(gpu, workspace, bytes);
    Status status = gpu->ops->linear_cross_entropy(gpu, &args);
    if (status == STATUS_OK) status = gpu->ops->synchronize(gpu);
    char expected[64];
    snprintf(expected, sizeof expected, "%d at position 7", (int)target);
    bool named = status == STATUS_BAD_DATA && strstr(status_message(), expected) != NULL;
    gpu_report(named ? 0 : INFINITY, 0, "%s target %d is named", dtype_name(gpu->compute_dtype),
               (int)target);
    GPU_OK(gpu->ops->synchronize(gpu)); // told once
    gpu->ops->set_workspace(gpu, NULL, 0);
    gpu->ops->release(gpu, workspace);
    free_operands(gpu, &o);
}

// Hidden sizes that are multiples of 64 take the fused products where there are such.
static const Shape shapes[] = {
    {1, 8, 8, 0, 0},       {64, 32, 4096, 64, 50}, {130, 40, 32000, 50, 5},  {50, 64, 151936, 0, 5},
    {3000, 32, 300, 0, 5}, {7, 16, 1000, 3, 20},   {33, 64, 1003, 0, 10},    {100, 24, 517, 7, 100},
    {300, 48, 8191, 0, 5}, {37, 16, 200001, 0, 5}, {1, 8, 5, 0, 0},          {1, 1, 2, 0, 0},
    {9000, 64, 520, 0, 5}, {515, 192, 5000, 0, 5}, {700, 896, 2051, 300, 5}, {1, 64, 257, 0, 0},
    {257, 64, 40, 0, 100}, {4400, 128, 512, 0, 5}, {500, 896, 8448, 200, 5},
};

int main(void) {
    Backend *bf16 = gpu_backend(false), *f32 = gpu_backend(true);
    Backend *bf16_grads = gpu_backend_bf16_grads();
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        check_shape(f32, &shapes[i]);
        // bf16 roundings of fewer elements do not average out.
        if (shapes[i].vocab > 8) check_shape(bf16, &shapes[i]);
        if (shapes[i].vocab > 8) check_shape(bf16_grads, &shapes[i]);
    }
    backend_destroy(bf16_grads);
    check_large_logits(bf16);
    check_large_logits(f32);
    check_not_a_number(bf16);
    check_not_a_number(f32);
    check_bad_target(bf16, 16, 50);
    check_bad_target(bf16, 64, 50);
    check_bad_target(bf16, 64, -2);
    check_bad_target(bf16, 16, -2);
    check_bad_target(f32, 16, 2000000000);
    check_bad_target(bf16, 64, 2000000000);
    backend_destroy(bf16);
    backend_destroy(f32);
    return gpu_test_result("cross-entropy");
}
