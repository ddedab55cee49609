// Bandwidth of the ops that are bound by memory, bf16, in the sizes of Qwen2.5-0.5B (norms and
// rotary embedding with norms also in those of Qwen3-0.6B). Bytes count each input read once and
// each output written once; the last column is their rate over that of a device-to-device copy of
// the same run.
#include "tests/gpu/gpu_test.h"

static double copy_rate;

static void print_line(const char *name, const char *shape, double seconds, double bytes) {
    printf("%-22s %-30s %9.1f us %7.0f GB/s %5.1f %% of copy\n", name, shape, seconds * 1e6,
           bytes / seconds * 1e-9, 100 * bytes / seconds / copy_rate);
    fflush(stdout);
}

// What has no args struct of its own. The count is first: OP_NORM2's args, which say how much
// workspace any of these needs.
typedef struct Flat {
    int64_t count;
    void *a, *b;
    double *sums;
} Flat;
static Status run_copy(Backend *gpu, const void *args) {
    const Flat *f = (const Flat *)args;
    return gpu->ops->copy(gpu, f->a, f->b, (size_t)f->count * 4);
}
static Status run_zero(Backend *gpu, const void *args) {
    const Flat *f = (const Flat *)args;
    return gpu->ops->zero(gpu, f->a, (size_t)f->count * 4);
}
static Status run_add(Backend *gpu, const void *args) {
    const Flat *f = (const Flat *)args;
    return gpu->ops->add(gpu, f->a, f->b, f->count);
}
static Status run_cast(Backend *gpu, const void *args) {
    const Flat *f = (const Flat *)args;
    return gpu->ops->cast(gpu, DTYPE_BF16, f->a, DTYPE_F32, f->b, f->count);
}
static Status run_norm2(Backend *gpu, const void *args) {
    const Flat *f = (const Flat *)args;
    return gpu->ops->norm2(gpu, DTYPE_F32, f->a, f->count, f->sums);
}
static double bench_flat(Backend *gpu, const Flat *f, Status (*op)(Backend *, const void *)) {
    return gpu_bench(gpu, OP_NORM2, f, op);
}

static void *device_zeros(Backend *gpu, int64_t bytes) {
    void *out = NULL;
    GPU_OK(gpu->ops->alloc(gpu, (size_t)bytes, &out));
    return out;
}

// A few random numbers again and again, so that no operand is all zeros.
static void fill(Backend *gpu, void *to, const Pair *random, int64_t floats) {
    for (int64_t at = 0; at < floats; at += random->count) {
        int64_t now = floats - at < random->count ? floats - at : random->count;
        GPU_OK(gpu->ops->copy(gpu, (float *)to + at, random->gpu, (size_t)now * 4));
    }
}

// Whole arenas: as many elements as Qwen2.5-0.5B has.
static void bench_arenas(Backend *gpu) {
    const int64_t count = 494032768;
    const char *shape = "494 M elements";
    Pair random = pair_random(gpu, DTYPE_F32, 1 << 22, 0.01f);
    void *arenas[4], *copy = device_zeros(gpu, count * 2);
    for (int i = 0; i < 4; i++) {
        arenas[i] = device_zeros(gpu, count * 4);
        fill(gpu, arenas[i], &random, count);
    }
    Flat f = {count, arenas[0], arenas[1], (double *)device_zeros(gpu, 16)};
    double seconds = bench_flat(gpu, &f, run_copy);
    copy_rate = 8.0 * (double)count / seconds;
    print_line("copy", shape, seconds, 8.0 * (double)count);
    print_line("zero", shape, bench_flat(gpu, &f, run_zero), 4.0 * (double)count);
    fill(gpu, arenas[0], &random, count);
    print_line("norm2", shape, bench_flat(gpu, &f, run_norm2), 4.0 * (double)count);
    AdamwArgs adamw = {.count = count,
                       .master = (float *)arenas[1],
                       .grad = arenas[0],
                       .grad_dtype = DTYPE_F32,
                       .m = arenas[2],
                       .v = arenas[3],
                       .copy = copy,
                       .copy_dtype = DTYPE_BF16,
                       .learning_rate = 1e-4,
                       .beta1 = 0.9,
                       .beta2 = 0.95,
                       .epsilon = 1e-8,
                       .weight_decay = 0.1,
                       .grad_scale = 1.0,
                       .step = 10};
    print_line("adamw", shape, GPU_BENCH(gpu, OP_ADAMW, adamw, &adamw), 30.0 * (double)count);
    // Moments in bf16 from zero on, in the lower halves; gradients in bf16 behind one of them.
    for (int i = 2; i < 4; i++) GPU_OK(gpu->ops->zero(gpu, arenas[i], (size_t)count * 2));
    adamw.state_dtype = DTYPE_BF16;
    print_line("adamw, bf16 moments", shape, GPU_BENCH(gpu, OP_ADAMW, adamw, &adamw),
               22.0 * (double)count);
    char *grad = (char *)arenas[3] + (size_t)count * 2;
    GPU_OK(gpu->ops->cast(gpu, DTYPE_BF16, grad, DTYPE_F32, arenas[0], count));
    adamw.grad = grad;
    adamw.grad_dtype = DTYPE_BF16;
    print_line("adamw, and gradients", shape, GPU_BENCH(gpu, OP_ADAMW, adamw, &adamw),
               20.0 * (double)count);
    Flat cast = {count, copy, arenas[0], NULL};
    print_line("cast f32 to bf16", shape, bench_flat(gpu, &cast, run_cast), 6.0 * (double)count);
    for (int i = 0; i < 4; i++) gpu->ops->release(gpu, arenas[i]);
    gpu->ops->release(gpu, copy);
    gpu->ops->release(gpu, f.sums);
    pair_free(&random);
}

static void bench_embed(Backend *gpu, int tokens, int hidden, int vocab) {
    const int64_t rows = (int64_t)tokens * hidden, table = (int64_t)vocab * hidden;
    char shape[64];
    snprintf(shape, sizeof shape, "T%d H%d V%d", tokens, hidden, vocab);
    int32_t *ids = (int32_t *)malloc((size_t)tokens * sizeof *ids);
    char *seen = (char *)calloc((size_t)vocab, 1);
    double distinct = 0;
    for (int t = 0; t < tokens; t++) {
        ids[t] = gpu_random_int(vocab);
        if (t % 10 == 0) ids[t] = gpu_random_int(20); // as text: a few words over and over
        if (!seen[ids[t]]) distinct++;
        seen[ids[t]] = 1;
    }
    int32_t *gpu_ids = (int32_t *)gpu_copy_of(gpu, ids, (size_t)tokens * sizeof *ids);
    Pair weight = pair_random(gpu, DTYPE_BF16, table, 1.0f);
    Pair out = pair_poisoned(gpu, DTYPE_BF16, rows);
    Pair dout = pair_random(gpu, DTYPE_BF16, rows, 1.0f);
    Pair grad = pair_filled(gpu, DTYPE_F32, table, 0.0f);
    EmbedArgs args = {tokens, hidden, vocab, gpu_ids, weight.gpu, out.gpu, dout.gpu, grad.gpu};
    print_line("embed forward", shape, GPU_BENCH(gpu, OP_EMBED, embed_forward, &args),
               2.0 * (distinct * hidden + (double)rows));
    print_line("embed backward", shape, GPU_BENCH(gpu, OP_EMBED, embed_backward, &args),
               2.0 * (double)rows + 8.0 * distinct * hidden);
    Pair *all[] = {&weight, &out, &dout, &grad};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) pair_free(all[i]);
    gpu->ops->release(gpu, gpu_ids);
    free(ids);
    free(seen);
}

static void bench_norm(Backend *gpu, int tokens, int hidden) {
    const int64_t count = (int64_t)tokens * hidden;
    char shape[64];
    snprintf(shape, sizeof shape, "T%d H%d", tokens, hidden);
    Pair random = pair_random(gpu, DTYPE_F32, 1 << 20, 1.0f); // fewer than `count`
    Pair weight = pair_random(gpu, DTYPE_BF16, hidden, 1.0f);
    Pair grad = pair_filled(gpu, DTYPE_F32, hidden, 0.0f);
    void *rows[6];
    for (int i = 0; i < 6; i++) { // x, y, x_out, out, dout, dx
        rows[i] = device_zeros(gpu, count * 2);
        GPU_OK(gpu->ops->cast(gpu, DTYPE_BF16, rows[i], DTYPE_F32, random.gpu, random.count));
        for (int64_t at = random.count; at < count; at += random.count) {
            int64_t now = count - at < random.count ? count - at : random.count;
            GPU_OK(gpu->ops->copy(gpu, (char *)rows[i] + at * 2, rows[i], (size_t)now * 2));
        }
    }
    RmsNormArgs args = {.tokens = tokens,
                        .hidden_size = hidden,
                        .epsilon = 1e-6f,
                        .x = rows[0],
                        .y = rows[1],
                        .weight = weight.gpu,
                        .x_out = rows[2],
                        .out = rows[3],
                        .inv_rms = (float *)device_zeros(gpu, (int64_t)tokens * 4),
                        .dout = rows[4],
                        .dx = rows[5],
                        .grad_weight = grad.gpu};
    print_line("rmsnorm forward", shape, GPU_BENCH(gpu, OP_RMSNORM, rmsnorm_forward, &args),
               8.0 * (double)count);
    print_line("rmsnorm backward", shape, GPU_BENCH(gpu, OP_RMSNORM, rmsnorm_backward, &args),
               8.0 * (double)count);
    Flat f = {count, rows[0], rows[1], NULL};
    print_line("add", shape, bench_flat(gpu, &f, run_add), 6.0 * (double)count);
    for (int i = 0; i < 6; i++) gpu->ops->release(gpu, rows[i]);
    gpu->ops->release(gpu, args.inv_rms);
    Pair *all[] = {&random, &weight, &grad};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) pair_free(all[i]);
}

static void bench_rope(Backend *gpu, int batch, int length, int heads, int kv_heads, int dim,
                       bool normed) {
    const double tokens = (double)batch * length, turned = (double)(heads + kv_heads) * dim;
    const int64_t count = (int64_t)batch * length * (heads + 2 * kv_heads) * dim;
    char shape[64];
    snprintf(shape, sizeof shape, "T%d heads %d/%d x %d", batch * length, heads, kv_heads, dim);
    Pair qkv = pair_random(gpu, DTYPE_BF16, count, 1.0f);
    Pair out = pair_poisoned(gpu, DTYPE_BF16, normed ? count : 1);
    Pair dqkv = pair_poisoned(gpu, DTYPE_BF16, normed ? count : 1);
    Pair dout = pair_random(gpu, DTYPE_BF16, count, 1.0f);
    Pair weight = pair_random(gpu, DTYPE_BF16, dim, 1.0f);
    Pair grad = pair_filled(gpu, DTYPE_F32, 2 * dim, 0.0f);
    Pair inv_rms = pair_filled(gpu, DTYPE_F32, (int64_t)tokens * (heads + kv_heads), 1.0f);
    RopeArgs args = {.batch = batch,
                     .sequence_length = length,
                     .num_heads = heads,
                     .num_kv_heads = kv_heads,
                     .head_dim = dim,
                     .theta = 1e6,
                     .epsilon = 1e-6f,
                     .qkv = qkv.gpu,
                     .q_norm = normed ? weight.gpu : NULL,
                     .k_norm = normed ? weight.gpu : NULL,
                     .out = normed ? out.gpu : qkv.gpu,
                     .inv_rms = (float *)inv_rms.gpu,
                     .dout = dout.gpu,
                     .dqkv = normed ? dqkv.gpu : dout.gpu,
                     .grad_q_norm = grad.gpu,
                     .grad_k_norm = (float *)grad.gpu + dim};
    const double forward = normed ? 4.0 * (double)count : 4.0 * tokens * turned;
    const double backward = normed ? forward + 2.0 * tokens * turned : forward;
    print_line(normed ? "rope forward, normed" : "rope forward", shape,
               GPU_BENCH(gpu, OP_ROPE, rope_forward, &args), forward);
    print_line(normed ? "rope backward, normed" : "rope backward", shape,
               GPU_BENCH(gpu, OP_ROPE, rope_backward, &args), backward);
    Pair *all[] = {&qkv, &out, &dqkv, &dout, &weight, &grad, &inv_rms};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) pair_free(all[i]);
}

int main(void) {
    Backend *gpu = gpu_backend(false);
    bench_arenas(gpu);
    bench_norm(gpu, 32768, 896);
    bench_norm(gpu, 131072, 896);
    bench_norm(gpu, 32768, 1024);
    bench_norm(gpu, 16384, 4096);
    bench_norm(gpu, 4096, 896);
    bench_rope(gpu, 16, 2048, 14, 2, 64, false);
    bench_rope(gpu, 64, 2048, 14, 2, 64, false);
    bench_rope(gpu, 16, 2048, 16, 8, 128, true);
    bench_rope(gpu, 4, 1024, 14, 2, 64, false);
    bench_embed(gpu, 32768, 896, 151936);
    bench_embed(gpu, 4096, 896, 151936);
    backend_destroy(gpu);
    return 0;
}
