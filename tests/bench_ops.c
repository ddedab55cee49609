// How fast each op of the CPU backend is, against what this machine can do: the sgemm rate of one
// large product and the bandwidth of a large copy, measured first.
//
//   bench_ops [threads] [op]      all ops, or those whose name begins with `op`
//
// Each time is the best of several runs. FLOPs are those of the matrix products (causal attention
// counts half of S x S); bytes are each operand read or written once.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/clock.h"
#include "base/random.h"
#include "cpu/gemm.h"
#include "model/backend.h"

enum { SECONDS_TENTHS = 3, RUNS_MIN = 5 };

static Backend *backend;
static const char *only = "";
static double peak_flops, peak_bandwidth;

typedef struct Shape {
    const char *name;
    int64_t batch, length;
    int hidden, heads, kv_heads, dim, inner, vocab, experts;
} Shape;

static const Shape shapes[] = {
    {"quickstart, 8 x 256 tokens", 8, 256, 256, 4, 2, 64, 768, 259, 6},
    {"Qwen2.5-0.5B, 1 x 1024 tokens", 1, 1024, 896, 14, 2, 64, 4864, 151936, 2},
};

static void must(Status status) {
    if (status != STATUS_OK) exit(status_report(status, "bench_ops"));
}

static void *take(size_t bytes) {
    void *memory;
    must(backend->ops->alloc(backend, bytes, &memory));
    return memory;
}

static float *normal(int64_t count, float scale) {
    static uint64_t stream = 1;
    float *values = take((size_t)count * sizeof(float));
    random_normal_fill(values, (size_t)count, 5, stream++, 0, 0.0f, scale);
    return values;
}

static float *floats(int64_t count) {
    return take((size_t)count * sizeof(float));
}

// Best time of run(context), in seconds.
static double best_time(Status (*run)(const void *context), const void *context) {
    double best = INFINITY, begin = clock_seconds();
    for (int i = 0; i < RUNS_MIN || clock_seconds() - begin < SECONDS_TENTHS * 0.1; i++) {
        double start = clock_seconds();
        must(run(context));
        best = fmin(best, clock_seconds() - start);
    }
    return best;
}

typedef struct Call {
    Status (*op)(Backend *, const void *);
    const void *args;
} Call;

static Status run_call(const void *context) {
    const Call *call = context;
    return call->op(backend, call->args);
}

// Prints one line; flops or bytes may be 0.
static void bench(const char *name, OpKind kind, Status (*op)(Backend *, const void *),
                  const void *args, double flops, double bytes) {
    if (strncmp(name, only, strlen(only)) != 0) return;
    size_t size = backend->ops->workspace_bytes(backend, kind, args);
    void *workspace = take(size);
    backend->ops->set_workspace(backend, workspace, size);
    const Call call = {op, args};
    const double seconds = best_time(run_call, &call);
    backend->ops->set_workspace(backend, NULL, 0);
    backend->ops->release(backend, workspace);
    printf("  %-24s %9.3f ms", name, seconds * 1e3);
    if (flops > 0)
        printf("  %7.1f GFLOP/s %4.0f %%", flops / seconds * 1e-9,
               100 * flops / seconds / peak_flops);
    else
        printf("  %7.1f GB/s    %4.0f %%", bytes / seconds * 1e-9,
               100 * bytes / seconds / peak_bandwidth);
    printf("\n");
}
#define BENCH(name, kind, op, args, flops, bytes)                                                  \
    bench(name, kind, (Status(*)(Backend *, const void *))backend->ops->op, args, flops, bytes)

// --- What the machine can do --------------------------------------------------------------------

enum { GEMM_SIZE = 2048 };
static const int64_t copy_bytes = 256 << 20;

static void measure_peaks(void) {
    const int64_t n = GEMM_SIZE;
    LinearArgs product = {.tokens = n,
                          .in_features = (int)n,
                          .out_features = (int)n,
                          .x = normal(n * n, 1),
                          .weight = normal(n * n, 1),
                          .out = floats(n * n)};
    const Call gemm = {(Status(*)(Backend *, const void *))backend->ops->linear_forward, &product};
    peak_flops = 2.0 * (double)n * (double)n * (double)n / best_time(run_call, &gemm);
    char *from = take((size_t)copy_bytes), *to = take((size_t)copy_bytes);
    memset(from, 1, (size_t)copy_bytes);
    double best = INFINITY;
    for (int i = 0; i < RUNS_MIN; i++) {
        double start = clock_seconds();
        must(backend->ops->copy(backend, to, from, (size_t)copy_bytes));
        best = fmin(best, clock_seconds() - start);
    }
    peak_bandwidth = 2.0 * (double)copy_bytes / best;
    backend->ops->release(backend, from);
    backend->ops->release(backend, to);
    printf("%d threads: sgemm %d^3 %.1f GFLOP/s, copy %.1f GB/s (read + write)\n",
           backend->num_threads, GEMM_SIZE, peak_flops * 1e-9, peak_bandwidth * 1e-9);
}

// --- The ops ------------------------------------------------------------------------------------

static void bench_embed_and_norm(const Shape *s) {
    const int64_t tokens = s->batch * s->length, count = tokens * s->hidden;
    int32_t *ids = take((size_t)tokens * sizeof *ids);
    for (int64_t t = 0; t < tokens; t++)
        ids[t] = (int32_t)(random_u64(1, 2, (uint64_t)t) % (uint64_t)s->vocab);
    EmbedArgs embed = {tokens,
                       s->hidden,
                       s->vocab,
                       ids,
                       floats((int64_t)s->vocab * s->hidden),
                       floats(count),
                       normal(count, 1),
                       floats((int64_t)s->vocab * s->hidden)};
    BENCH("embed forward", OP_EMBED, embed_forward, &embed, 0, 8.0 * (double)count);
    BENCH("embed backward", OP_EMBED, embed_backward, &embed, 0, 12.0 * (double)count);
    RmsNormArgs norm = {tokens,           s->hidden,        1e-6f,
                        normal(count, 1), normal(count, 1), normal(s->hidden, 1),
                        floats(count),    floats(count),    floats(tokens),
                        normal(count, 1), normal(count, 1), floats(s->hidden)};
    BENCH("rmsnorm forward", OP_RMSNORM, rmsnorm_forward, &norm, 0, 16.0 * (double)count);
    BENCH("rmsnorm backward", OP_RMSNORM, rmsnorm_backward, &norm, 0, 16.0 * (double)count);
}

static void bench_linear(const Shape *s, const char *name, int in, int out) {
    const int64_t tokens = s->batch * s->length;
    const double flops = 2.0 * (double)tokens * in * out;
    LinearArgs args = {.tokens = tokens,
                       .in_features = in,
                       .out_features = out,
                       .x = normal(tokens * in, 1),
                       .weight = normal((int64_t)in * out, 1),
                       .bias = normal(out, 1),
                       .out = floats(tokens * out),
                       .dout = normal(tokens * out, 1),
                       .dx = floats(tokens * in),
                       .grad_weight = floats((int64_t)in * out),
                       .grad_bias = floats(out)};
    char label[64];
    snprintf(label, sizeof label, "%s forward", name);
    BENCH(label, OP_LINEAR, linear_forward, &args, flops, 0);
    snprintf(label, sizeof label, "%s backward", name);
    BENCH(label, OP_LINEAR, linear_backward, &args, 2 * flops, 0);
}

static void bench_attention(const Shape *s) {
    const int64_t tokens = s->batch * s->length;
    const int64_t width = (int64_t)(s->heads + 2 * s->kv_heads) * s->dim, out = s->heads * s->dim;
    RopeArgs rope = {.batch = s->batch,
                     .sequence_length = s->length,
                     .num_heads = s->heads,
                     .num_kv_heads = s->kv_heads,
                     .head_dim = s->dim,
                     .theta = 1e6,
                     .epsilon = 1e-6f,
                     .qkv = normal(tokens * width, 1),
                     .out = floats(tokens * width),
                     .dout = normal(tokens * width, 1),
                     .dqkv = floats(tokens * width)};
    BENCH("rope forward", OP_ROPE, rope_forward, &rope, 0, 8.0 * (double)(tokens * width));
    BENCH("rope backward", OP_ROPE, rope_backward, &rope, 0, 8.0 * (double)(tokens * width));
    AttentionArgs args = {s->batch,
                          s->length,
                          s->heads,
                          s->kv_heads,
                          s->dim,
                          rope.qkv,
                          NULL,
                          floats(tokens * out),
                          floats(tokens * s->heads),
                          normal(tokens * out, 1),
                          floats(tokens * width)};
    const double flops = 2.0 * 2.0 * (double)tokens * (double)(s->length + 1) / 2 * (double)out;
    BENCH("attention forward", OP_ATTENTION, attention_forward, &args, flops, 0);
    BENCH("attention backward", OP_ATTENTION, attention_backward, &args, 2.5 * flops, 0);
}

static void bench_ffn(const Shape *s) {
    const int64_t tokens = s->batch * s->length, matrix = (int64_t)s->inner * s->hidden;
    const double flops = 6.0 * (double)tokens * (double)matrix;
    FfnArgs args = {tokens,
                    s->hidden,
                    s->inner,
                    normal(tokens * s->hidden, 1),
                    normal(2 * matrix, 0.05f),
                    normal(matrix, 0.05f),
                    floats(tokens * s->hidden),
                    floats(tokens * 2 * s->inner),
                    floats(tokens * s->inner),
                    normal(tokens * s->hidden, 1),
                    floats(tokens * s->hidden),
                    false,
                    floats(2 * matrix),
                    floats(matrix)};
    BENCH("ffn forward", OP_FFN, ffn_forward, &args, flops, 0);
    BENCH("ffn backward", OP_FFN, ffn_backward, &args, 2 * flops, 0);
}

static void bench_experts(const Shape *s) {
    const int64_t tokens = s->batch * s->length, matrix = (int64_t)s->inner * s->hidden;
    const int n = s->experts;
    const size_t ints = (size_t)tokens * sizeof(int32_t);
    Routing routing = {floats(tokens * n),
                       floats(tokens),
                       take(ints),
                       floats(tokens),
                       take(ints),
                       take(ints),
                       take(((size_t)n + 1) * sizeof(int32_t))};
    RouteArgs route = {.tokens = tokens,
                       .hidden_size = s->hidden,
                       .num_experts = n,
                       .top_k = 1,
                       .gate_kind = GATE_SOFTMAX,
                       .gate_scale = 1,
                       .x = normal(tokens * s->hidden, 1),
                       .weight = normal(n * s->hidden, 0.02f),
                       .routing = routing,
                       .dgate = normal(tokens, 1),
                       .dx = floats(tokens * s->hidden),
                       .grad_weight = floats(n * s->hidden)};
    const double bytes = 4.0 * (double)tokens * s->hidden;
    size_t size = backend->ops->workspace_bytes(backend, OP_ROUTE, &route);
    void *workspace = take(size);
    backend->ops->set_workspace(backend, workspace, size);
    must(backend->ops->route_forward(backend, &route));
    BENCH("route forward", OP_ROUTE, route_forward, &route, 0, bytes);
    BENCH("route backward", OP_ROUTE, route_backward, &route, 0, 3 * bytes);
    const double flops = 6.0 * (double)tokens * (double)matrix;
    MoeFfnArgs args = {tokens,
                       s->hidden,
                       s->inner,
                       n,
                       1,
                       route.x,
                       normal(2 * n * matrix, 0.05f),
                       normal(n * matrix, 0.05f),
                       routing,
                       floats(tokens * s->hidden),
                       floats(tokens * 2 * s->inner),
                       normal(tokens * s->hidden, 1),
                       floats(tokens * s->hidden),
                       floats(tokens),
                       false,
                       floats(2 * n * matrix),
                       floats(n * matrix)};
    BENCH("moe_ffn forward", OP_MOE_FFN, moe_ffn_forward, &args, flops, 0);
    BENCH("moe_ffn backward", OP_MOE_FFN, moe_ffn_backward, &args, 2 * flops, 0);
}

static void bench_loss_and_update(const Shape *s) {
    const int64_t tokens = s->batch * s->length, weights = (int64_t)s->vocab * s->hidden;
    int32_t *targets = take((size_t)tokens * sizeof *targets);
    double sum = 0, count = 0;
    LinearCrossEntropyArgs loss = {tokens,
                                   s->hidden,
                                   s->vocab,
                                   0,
                                   normal(tokens * s->hidden, 1),
                                   normal(weights, 0.05f),
                                   targets,
                                   1,
                                   &sum,
                                   &count,
                                   NULL,
                                   floats(tokens * s->hidden),
                                   false,
                                   floats(weights)};
    BENCH("linear_cross_entropy", OP_LINEAR_CROSS_ENTROPY, linear_cross_entropy, &loss,
          6.0 * (double)tokens * (double)weights, 0);
    const int64_t parameters = 16 << 20;
    AdamwArgs adamw = {.count = parameters,
                       .master = normal(parameters, 1),
                       .grad = normal(parameters, 1),
                       .grad_dtype = DTYPE_F32,
                       .m = floats(parameters),
                       .v = floats(parameters),
                       .learning_rate = 1e-4,
                       .beta1 = 0.9,
                       .beta2 = 0.95,
                       .epsilon = 1e-8,
                       .weight_decay = 0.1,
                       .grad_scale = 1,
                       .step = 1};
    BENCH("adamw, 16 M parameters", OP_ADAMW, adamw, &adamw, 0, 28.0 * (double)parameters);
    AdamwArgs narrow = adamw;
    narrow.state_dtype = DTYPE_BF16; // in the same memory, from zero on
    memset(narrow.m, 0, (size_t)parameters * 2);
    memset(narrow.v, 0, (size_t)parameters * 2);
    BENCH("adamw, bf16 moments", OP_ADAMW, adamw, &narrow, 0, 20.0 * (double)parameters);
    if (strncmp("norm2", only, strlen(only)) == 0) {
        double sums[2] = {0, 0}, best = INFINITY;
        for (int i = 0; i < 2 * RUNS_MIN; i++) {
            double start = clock_seconds();
            must(backend->ops->norm2(backend, DTYPE_F32, adamw.grad, parameters, sums));
            best = fmin(best, clock_seconds() - start);
        }
        printf("  %-24s %9.3f ms  %7.1f GB/s    %4.0f %%\n", "norm2, 16 M", best * 1e3,
               4e-9 * (double)parameters / best,
               400.0 * (double)parameters / best / peak_bandwidth);
    }
}

int main(int argc, char **argv) {
    must(backend_cpu(argc > 1 ? atoi(argv[1]) : 0, &backend));
    if (argc > 2) only = argv[2];
    measure_peaks();
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        const Shape *s = &shapes[i];
        printf("%s\n", s->name);
        bench_embed_and_norm(s);
        bench_linear(s, "qkv", s->hidden, (s->heads + 2 * s->kv_heads) * s->dim);
        bench_linear(s, "o", s->heads * s->dim, s->hidden);
        bench_attention(s);
        bench_ffn(s);
        bench_experts(s);
        bench_loss_and_update(s);
    }
    backend_destroy(backend);
    return 0;
}
