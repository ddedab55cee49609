// The ops that move memory, on the GPU against the CPU backend: embedding, RMSNorm, rotary
// embedding. In fp32 and bf16, in whole vectors and odd widths.
#include "tests/gpu/gpu_test.h"

static void free_pairs(Pair **pairs, size_t count) {
    for (size_t i = 0; i < count; i++) pair_free(pairs[i]);
}
#define FREE_PAIRS(...)                                                                            \
    do {                                                                                           \
        Pair *pairs_[] = {__VA_ARGS__};                                                            \
        free_pairs(pairs_, sizeof pairs_ / sizeof pairs_[0]);                                      \
    } while (0)

// --- Embedding -----------------------------------------------------------------------------------

typedef struct EmbedShape {
    int tokens, hidden, vocab;
    int common; // per cent of the tokens that are one id: runs over many tiles
} EmbedShape;

static const EmbedShape embed_shapes[] = {
    {1, 8, 1, 0},       {1, 896, 1000, 0},       {31, 7, 3, 0},          {32, 64, 5, 50},
    {33, 64, 5, 100},   {500, 33, 40, 30},       {2048, 896, 151936, 5}, {3000, 1030, 700, 60},
    {5000, 128, 2, 50}, {4097, 256, 65536, 100},
};

static void check_embed(Backend *gpu, const EmbedShape *s) {
    if (gpu_skips(100.0 * ((double)s->tokens + s->vocab) * s->hidden)) return;
    const DType dtype = gpu->compute_dtype;
    const int64_t rows = (int64_t)s->tokens * s->hidden, table = (int64_t)s->vocab * s->hidden;
    char text[96];
    snprintf(text, sizeof text, "%s embed T%d H%d V%d, %d %% one id", dtype_name(dtype), s->tokens,
             s->hidden, s->vocab, s->common);
    int32_t *ids = (int32_t *)malloc((size_t)s->tokens * sizeof *ids);
    for (int t = 0; t < s->tokens; t++)
        ids[t] = gpu_random_int(100) < s->common ? s->vocab / 2 : gpu_random_int(s->vocab);
    int32_t *gpu_ids = (int32_t *)gpu_copy_of(gpu, ids, (size_t)s->tokens * sizeof *ids);
    Pair weight = pair_random(gpu, dtype, table, 1.0f), out = pair_poisoned(gpu, dtype, rows);
    Pair dout = pair_random(gpu, dtype, rows, 1.0f);
    Pair grad = pair_random(gpu, gpu->grad_dtype, table, 1.0f);
    Pair again = pair_filled(gpu, gpu->grad_dtype, table, 0.0f);
    memcpy(again.cpu, grad.cpu, (size_t)table * sizeof(float));
    pair_upload(&again);
    EmbedArgs host = {s->tokens, s->hidden, s->vocab, ids, weight.cpu, out.cpu, dout.cpu, grad.cpu};
    EmbedArgs args = {s->tokens,  s->hidden, s->vocab, gpu_ids,
                      weight.gpu, out.gpu,   dout.gpu, grad.gpu};
    GPU_RUN(gpu_reference(), OP_EMBED, embed_forward, &host);
    GPU_RUN(gpu, OP_EMBED, embed_forward, &args);
    pair_check(&out, 0.0, text, "out"); // a copy
    GPU_RUN(gpu_reference(), OP_EMBED, embed_backward, &host);
    GPU_RUN(gpu, OP_EMBED, embed_backward, &args);
    // The sums are fp32 whatever dout is.
    pair_check(&grad, gpu_grad_tolerance(gpu, GPU_TOLERANCE_F32), text, "grad_weight");
    args.grad_weight = again.gpu;
    GPU_RUN(gpu, OP_EMBED, embed_backward, &args);
    pair_check_same_bits(&again, &grad, text, "grad_weight");
    FREE_PAIRS(&weight, &out, &dout, &grad, &again);
    gpu->ops->release(gpu, gpu_ids);
    free(ids);
}

// The lowest of several bad positions is named, once, by whatever waits; good rows are right, and
// nothing is added for bad ones.
static void check_bad_ids(Backend *gpu) {
    enum { TOKENS = 300, HIDDEN = 24, VOCAB = 10, FIRST_BAD = 41 };
    int32_t ids[TOKENS];
    for (int t = 0; t < TOKENS; t++) ids[t] = t % VOCAB;
    ids[FIRST_BAD] = VOCAB;
    ids[97] = -1;
    ids[200] = 2000000000;
    int32_t *gpu_ids = (int32_t *)gpu_copy_of(gpu, ids, sizeof ids);
    const DType dtype = gpu->compute_dtype;
    Pair weight = pair_random(gpu, dtype, VOCAB * HIDDEN, 1.0f);
    Pair out = pair_poisoned(gpu, dtype, TOKENS * HIDDEN);
    Pair dout = pair_filled(gpu, dtype, TOKENS * HIDDEN, 1.0f);
    Pair grad = pair_filled(gpu, gpu->grad_dtype, VOCAB * HIDDEN, 0.0f);
    EmbedArgs args = {TOKENS, HIDDEN, VOCAB, gpu_ids, weight.gpu, out.gpu, dout.gpu, grad.gpu};
    GPU_OK(gpu->ops->embed_forward(gpu, &args));
    Status status = gpu->ops->download(gpu, out.cpu, out.gpu, dtype_bytes(dtype));
    bool named = status == STATUS_BAD_DATA && strstr(status_message(), "10 at position 41") != NULL;
    gpu_report(named ? 0 : INFINITY, 0, "%s embed names the first bad id", dtype_name(dtype));
    for (int i = 0; i < TOKENS * HIDDEN; i++) {
        const int id = ids[i / HIDDEN];
        out.cpu[i] = id < 0 || id >= VOCAB ? 0.0f : weight.cpu[id * HIDDEN + i % HIDDEN];
    }
    pair_check(&out, 0.0, dtype_name(dtype), "embed, rows beside bad ids");
    for (int t = 0; t < TOKENS; t++)
        for (int h = 0; h < HIDDEN && ids[t] >= 0 && ids[t] < VOCAB; h++)
            grad.cpu[ids[t] * HIDDEN + h] += 1.0f;
    GPU_RUN(gpu, OP_EMBED, embed_backward, &args);
    pair_check(&grad, 0.0, dtype_name(dtype), "embed, gradient without bad ids"); // whole numbers
    FREE_PAIRS(&weight, &out, &dout, &grad);
    gpu->ops->release(gpu, gpu_ids);
}

// --- RMSNorm -------------------------------------------------------------------------------------

typedef struct NormShape {
    int tokens, hidden;
    bool branch;   // y is there
    bool in_place; // x_out is x
} NormShape;

static const NormShape norm_shapes[] = {
    {1, 8, true, false},      {1, 1, false, false},    {3, 5, true, true},
    {7, 896, true, false},    {700, 896, true, false}, {5000, 896, false, true},
    {333, 1000, false, true}, {64, 1024, true, true},  {64, 1025, true, false},
    {65, 1032, true, false},  {50, 2048, true, false}, {1500, 4096, true, false},
    {33, 5120, false, false}, {17, 8192, true, false}, {9, 8191, true, true},
    {20000, 64, true, false},
};

static void check_norm(Backend *gpu, const NormShape *s) {
    if (gpu_skips(100.0 * s->tokens * s->hidden)) return;
    const DType dtype = gpu->compute_dtype;
    const double tolerance = gpu_tolerance(dtype);
    const int64_t count = (int64_t)s->tokens * s->hidden;
    char text[96];
    snprintf(text, sizeof text, "%s rmsnorm T%d H%d%s%s", dtype_name(dtype), s->tokens, s->hidden,
             s->branch ? " +y" : "", s->in_place ? " in place" : "");
    Pair x = pair_random(gpu, dtype, count, 1.0f), y = pair_random(gpu, dtype, count, 1.0f);
    Pair weight = pair_random(gpu, dtype, s->hidden, 1.0f);
    Pair x_out = pair_poisoned(gpu, dtype, count), out = pair_poisoned(gpu, dtype, count);
    Pair inv_rms = pair_poisoned(gpu, DTYPE_F32, s->tokens);
    Pair dout = pair_random(gpu, dtype, count, 1.0f), dx = pair_random(gpu, dtype, count, 1.0f);
    Pair grad = pair_random(gpu, gpu->grad_dtype, s->hidden, 1.0f);
    Pair again = pair_filled(gpu, gpu->grad_dtype, s->hidden, 0.0f);
    memcpy(again.cpu, grad.cpu, (size_t)s->hidden * sizeof(float));
    pair_upload(&again);
    Pair *sum = s->in_place ? &x : &x_out;
    RmsNormArgs host = {.tokens = s->tokens,
                        .hidden_size = s->hidden,
                        .epsilon = 1e-5f,
                        .x = x.cpu,
                        .y = s->branch ? y.cpu : NULL,
                        .weight = weight.cpu,
                        .x_out = sum->cpu,
                        .out = out.cpu,
                        .inv_rms = inv_rms.cpu,
                        .dout = dout.cpu,
                        .dx = dx.cpu,
                        .grad_weight = grad.cpu};
    RmsNormArgs args = host;
    args.x = x.gpu;
    args.y = s->branch ? y.gpu : NULL;
    args.weight = weight.gpu;
    args.x_out = sum->gpu;
    args.out = out.gpu;
    args.inv_rms = (float *)inv_rms.gpu;
    args.dout = dout.gpu;
    args.dx = dx.gpu;
    args.grad_weight = grad.gpu;
    GPU_RUN(gpu_reference(), OP_RMSNORM, rmsnorm_forward, &host);
    GPU_RUN(gpu, OP_RMSNORM, rmsnorm_forward, &args);
    pair_check(sum, tolerance, text, "x_out");
    pair_check(&out, tolerance, text, "out");
    pair_check(&inv_rms, tolerance, text, "inv_rms");
    pair_adopt(sum); // bf16: backward sees the rounded sum
    pair_adopt(&inv_rms);
    Pair dx_again = pair_filled(gpu, dtype, count, 0.0f);
    memcpy(dx_again.cpu, dx.cpu, (size_t)count * sizeof(float));
    pair_upload(&dx_again);
    GPU_RUN(gpu_reference(), OP_RMSNORM, rmsnorm_backward, &host);
    GPU_RUN(gpu, OP_RMSNORM, rmsnorm_backward, &args);
    pair_check(&dx, tolerance, text, "dx");
    pair_check(&grad, gpu_grad_tolerance(gpu, GPU_TOLERANCE_F32), text, "grad_weight");
    args.dx = dx_again.gpu;
    args.grad_weight = again.gpu;
    GPU_RUN(gpu, OP_RMSNORM, rmsnorm_backward, &args);
    pair_check_same_bits(&dx_again, &dx, text, "dx");
    pair_check_same_bits(&again, &grad, text, "grad_weight");
    FREE_PAIRS(&x, &y, &weight, &x_out, &out, &inv_rms, &dout, &dx, &grad, &again, &dx_again);
}

static void check_norm_too_wide(Backend *gpu) {
    RmsNormArgs args = {.tokens = 1, .hidden_size = 8193};
    Status status = gpu->ops->rmsnorm_forward(gpu, &args);
    gpu_report(status == STATUS_USAGE ? 0 : INFINITY, 0, "rmsnorm refuses H8193");
}

// --- Rotary embedding ----------------------------------------------------------------------------

typedef struct RopeShape {
    int batch, length, heads, kv_heads, dim;
    bool normed, in_place;
} RopeShape;

static const RopeShape rope_shapes[] = {
    {1, 1, 1, 1, 2, false, false},     {2, 3, 2, 1, 6, false, true},
    {1, 33, 3, 1, 10, true, false},    {2, 100, 14, 2, 64, false, true},
    {2, 100, 14, 2, 64, false, false}, {3, 77, 14, 2, 64, true, false},
    {2, 130, 16, 8, 128, true, false}, {2, 130, 16, 8, 128, false, true},
    {1, 50, 5, 5, 96, false, false},   {1, 50, 5, 5, 96, true, false},
    {1, 19, 3, 1, 80, true, false},    {1, 9, 2, 1, 512, true, false},
    {1, 9, 2, 1, 512, false, true},    {1, 9, 2, 1, 256, false, false},
    {1, 7, 1, 1, 250, true, false},    {16, 1, 40, 8, 128, true, false},
    {1, 5000, 1, 1, 64, false, true},  {4, 1000, 7, 3, 64, true, false},
};

static int64_t rope_width(const RopeShape *s) {
    return (int64_t)(s->heads + 2 * s->kv_heads) * s->dim;
}

typedef struct RopeOperands {
    Pair qkv, out, inv_rms, dout, dqkv, q_norm, k_norm, grad_q, grad_k;
} RopeOperands;

static RopeArgs rope_args(const RopeShape *s, const RopeOperands *o, bool gpu) {
#define SIDE(pair) (gpu ? (pair).gpu : (void *)(pair).cpu)
    return (RopeArgs){.batch = s->batch,
                      .sequence_length = s->length,
                      .num_heads = s->heads,
                      .num_kv_heads = s->kv_heads,
                      .head_dim = s->dim,
                      .theta = 1e6,
                      .epsilon = 1e-6f,
                      .qkv = SIDE(o->qkv),
                      .q_norm = s->normed ? SIDE(o->q_norm) : NULL,
                      .k_norm = s->normed ? SIDE(o->k_norm) : NULL,
                      .out = s->in_place ? SIDE(o->qkv) : SIDE(o->out),
                      .inv_rms = (float *)SIDE(o->inv_rms),
                      .dout = SIDE(o->dout),
                      .dqkv = s->in_place ? SIDE(o->dout) : SIDE(o->dqkv),
                      .grad_q_norm = s->normed ? SIDE(o->grad_q) : NULL,
                      .grad_k_norm = s->normed ? SIDE(o->grad_k) : NULL};
#undef SIDE
}

// A second run over fresh copies gives the same bits.
static void check_rope_repeats(Backend *gpu, const RopeShape *s, const RopeOperands *o,
                               const RopeArgs *args, const char *text) {
    if (!s->normed) return; // no sums
    Pair dqkv = pair_poisoned(gpu, gpu->compute_dtype, o->dqkv.count);
    Pair grad_q = pair_filled(gpu, gpu->grad_dtype, s->dim, 1.0f);
    Pair grad_k = pair_filled(gpu, gpu->grad_dtype, s->dim, 1.0f);
    RopeArgs again = *args;
    again.dqkv = dqkv.gpu;
    again.grad_q_norm = grad_q.gpu;
    again.grad_k_norm = grad_k.gpu;
    GPU_RUN(gpu, OP_ROPE, rope_backward, &again);
    pair_check_same_bits(&dqkv, &o->dqkv, text, "dqkv");
    pair_check_same_bits(&grad_q, &o->grad_q, text, "grad_q_norm");
    pair_check_same_bits(&grad_k, &o->grad_k, text, "grad_k_norm");
    FREE_PAIRS(&dqkv, &grad_q, &grad_k);
}

static void check_rope(Backend *gpu, const RopeShape *s) {
    if (gpu_skips(100.0 * s->batch * s->length * s->heads * s->dim)) return;
    const DType dtype = gpu->compute_dtype;
    const double tolerance = gpu_tolerance(dtype);
    const int64_t rows = (int64_t)s->batch * s->length, count = rows * rope_width(s);
    char text[96];
    snprintf(text, sizeof text, "%s rope B%d S%d heads %d/%d x %d%s%s", dtype_name(dtype), s->batch,
             s->length, s->heads, s->kv_heads, s->dim, s->normed ? " normed" : "",
             s->in_place ? " in place" : "");
    RopeOperands o = {.qkv = pair_random(gpu, dtype, count, 1.0f),
                      .out = pair_poisoned(gpu, dtype, count),
                      .inv_rms = pair_poisoned(gpu, DTYPE_F32, rows * (s->heads + s->kv_heads)),
                      .dout = pair_random(gpu, dtype, count, 1.0f),
                      .dqkv = pair_poisoned(gpu, dtype, count),
                      .q_norm = pair_random(gpu, dtype, s->dim, 1.0f),
                      .k_norm = pair_random(gpu, dtype, s->dim, 1.0f),
                      .grad_q = pair_filled(gpu, gpu->grad_dtype, s->dim, 1.0f),
                      .grad_k = pair_filled(gpu, gpu->grad_dtype, s->dim, 1.0f)};
    RopeArgs host = rope_args(s, &o, false), args = rope_args(s, &o, true);
    GPU_RUN(gpu_reference(), OP_ROPE, rope_forward, &host);
    GPU_RUN(gpu, OP_ROPE, rope_forward, &args);
    pair_check(s->in_place ? &o.qkv : &o.out, tolerance, text, "out");
    if (s->normed) {
        pair_check(&o.inv_rms, tolerance, text, "inv_rms");
        pair_adopt(&o.inv_rms);
    }
    GPU_RUN(gpu_reference(), OP_ROPE, rope_backward, &host);
    GPU_RUN(gpu, OP_ROPE, rope_backward, &args);
    pair_check(s->in_place ? &o.dout : &o.dqkv, tolerance, text, "dqkv");
    if (s->normed) {
        const double grad_tolerance = gpu_grad_tolerance(gpu, GPU_TOLERANCE_F32);
        pair_check(&o.grad_q, grad_tolerance, text, "grad_q_norm");
        pair_check(&o.grad_k, grad_tolerance, text, "grad_k_norm");
    }
    check_rope_repeats(gpu, s, &o, &args, text);
    FREE_PAIRS(&o.qkv, &o.out, &o.inv_rms, &o.dout, &o.dqkv, &o.q_norm, &o.k_norm, &o.grad_q,
               &o.grad_k);
}

static void check_rope_too_large(Backend *gpu) {
    RopeArgs args = {.batch = 1, .sequence_length = 1, .num_heads = 1, .num_kv_heads = 1};
    args.head_dim = 514;
    Status status = gpu->ops->rope_forward(gpu, &args);
    gpu_report(status == STATUS_USAGE ? 0 : INFINITY, 0, "rope refuses heads of 514");
}

static void check_all(Backend *gpu) {
    for (size_t i = 0; i < sizeof embed_shapes / sizeof embed_shapes[0]; i++)
        check_embed(gpu, &embed_shapes[i]);
    check_bad_ids(gpu);
    for (size_t i = 0; i < sizeof norm_shapes / sizeof norm_shapes[0]; i++)
        check_norm(gpu, &norm_shapes[i]);
    check_norm_too_wide(gpu);
    for (size_t i = 0; i < sizeof rope_shapes / sizeof rope_shapes[0]; i++)
        check_rope(gpu, &rope_shapes[i]);
    check_rope_too_large(gpu);
    backend_destroy(gpu);
}

int main(void) {
    check_all(gpu_backend(true));
    check_all(gpu_backend(false));
    check_all(gpu_backend_bf16_grads());
    return gpu_test_result("memory ops");
}
