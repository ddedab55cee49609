// Time of the expert MLPs and the router on the GPU, bf16, at the sizes of the LF-UC model.
//
// First each of the six products of an expert MLP over all experts, against one cuBLAS product of
// the same FLOPs; then the whole ops, with the row counts copied to the host as in training and,
// to see what that copy costs, with the counts known already, as backward always finds them.
#include "cuda/cuda.h"
#include "cuda/grouped.h"
#include "tests/gpu/gpu_routing.h"

enum { TOKENS = 32768, EXPERTS = 6, HIDDEN = 896, INNER = 4864 };

// --- Products ----------------------------------------------------------------------------------

// One product per expert: rows of A (or of both operands, with transpose_a) are split by expert.
typedef struct Product {
    const char *name;
    int n, k; // of C; with transpose_a: C is (n, k) and the rows are summed over
    bool transpose_a, transpose_b;
    CudaBackend *backend;
    const int32_t *begin;
    char *a, *b, *c;
} Product;

static Status expert_product(const void *context, int e, cudaStream_t stream, int stream_index) {
    (void)stream;
    const Product *p = (const Product *)context;
    const int64_t begin = p->begin[e], rows = p->begin[e + 1] - begin,
                  weight = (int64_t)p->n * p->k;
    Gemm g = gemm_of(p->backend, rows, p->n, p->k, p->a + begin * p->k * 2, p->b + e * weight * 2,
                     p->c + begin * p->n * 2);
    if (p->transpose_a) {
        g = gemm_of(p->backend, p->n, p->k, rows, p->a + begin * p->n * 2, p->b + begin * p->k * 2,
                    p->c + e * weight * 4);
        g.dtype_c = DTYPE_F32;
        g.beta = 1.0f;
    }
    g.transpose_a = p->transpose_a;
    g.transpose_b = p->transpose_b;
    g.rows_vary = true;
    return gemm_run(p->backend, &g, stream_index);
}

static Status all_experts(Backend *gpu, const void *args) {
    const Product *p = (const Product *)args;
    return experts_run(cuda_of(gpu), p->begin, EXPERTS, expert_product, p);
}

static Status one_product(Backend *gpu, const void *args) {
    static const int32_t all_rows[2] = {0, TOKENS};
    Product whole = *(const Product *)args;
    (void)gpu;
    whole.begin = all_rows;
    return expert_product(&whole, 0, NULL, 0);
}

static void bench_product(Backend *gpu, Product p, const int32_t *even, const int32_t *half) {
    const int64_t rows_a = (int64_t)TOKENS * (p.transpose_a ? p.n : p.k);
    const int64_t weight = (int64_t)EXPERTS * p.n * p.k;
    p.backend = cuda_of(gpu);
    p.a = (char *)gpu_random_memory(gpu, DTYPE_BF16, rows_a, 1.0f);
    p.b = (char *)gpu_random_memory(gpu, DTYPE_BF16, p.transpose_a ? (int64_t)TOKENS * p.k : weight,
                                    0.03f);
    p.c = (char *)gpu_random_memory(gpu, DTYPE_F32,
                                    p.transpose_a ? weight : (int64_t)TOKENS * p.n / 2, 1.0f);
    const double flops = 2.0 * TOKENS * p.n * p.k;
    const double one = gpu_bench(gpu, OP_KIND_COUNT, &p, one_product);
    p.begin = even;
    const double balanced = gpu_bench(gpu, OP_KIND_COUNT, &p, all_experts);
    p.begin = half;
    const double skewed = gpu_bench(gpu, OP_KIND_COUNT, &p, all_experts);
    printf("experts %-24s one GEMM %6.1f TFLOP/s   balanced %6.1f (%5.1f %%)   half on one %6.1f "
           "(%5.1f %%)\n",
           p.name, flops / one * 1e-12, flops / balanced * 1e-12, 100 * one / balanced,
           flops / skewed * 1e-12, 100 * one / skewed);
    fflush(stdout);
    char *all[] = {p.a, p.b, p.c};
    for (int i = 0; i < 3; i++) gpu->ops->release(gpu, all[i]);
}

// --- The ops -----------------------------------------------------------------------------------

static void bench_time(const char *what, double seconds, double flops, double bytes) {
    printf("%-44s %8.3f ms", what, seconds * 1e3);
    if (flops > 0) printf("  %6.1f TFLOP/s", flops / seconds * 1e-12);
    if (bytes > 0) printf("  %6.0f GB/s", bytes / seconds * 1e-9);
    printf("\n");
    fflush(stdout);
}

// Forward as after route_forward: the host has to fetch the row counts.
static Status forward_unknown(Backend *gpu, const void *args) {
    counts_forget(cuda_of(gpu), NULL, SIZE_MAX);
    return gpu->ops->moe_ffn_forward(gpu, (const MoeFfnArgs *)args);
}

static void bench_moe(Backend *gpu, int64_t tokens, Spread spread, const char *name) {
    RoutingPair routing = routing_poisoned(gpu, tokens, EXPERTS, 1);
    routing_random(&routing, spread);
    const int64_t weights = (int64_t)EXPERTS * INNER * HIDDEN, all = tokens * HIDDEN;
    MoeFfnArgs args = {.tokens = tokens,
                       .hidden_size = HIDDEN,
                       .intermediate_size = INNER,
                       .num_experts = EXPERTS,
                       .top_k = 1,
                       .x = gpu_random_memory(gpu, DTYPE_BF16, all, 1.0f),
                       .weight_gate_up = gpu_random_memory(gpu, DTYPE_BF16, 2 * weights, 0.03f),
                       .weight_down = gpu_random_memory(gpu, DTYPE_BF16, weights, 0.015f),
                       .routing = routing.gpu,
                       .out = gpu_random_memory(gpu, DTYPE_BF16, all, 1.0f),
                       .gate_up = gpu_random_memory(gpu, DTYPE_BF16, tokens * 2 * INNER, 1.0f),
                       .dout = gpu_random_memory(gpu, DTYPE_BF16, all, 1.0f),
                       .dx = gpu_random_memory(gpu, DTYPE_BF16, all, 1.0f),
                       .dgate = (float *)gpu_random_memory(gpu, DTYPE_F32, tokens, 1.0f),
                       .grad_gate_up = gpu_random_memory(gpu, gpu->grad_dtype, 2 * weights, 1.0f),
                       .grad_down = gpu_random_memory(gpu, gpu->grad_dtype, weights, 1.0f)};
    const double flops = 6.0 * (double)tokens * HIDDEN * INNER;
    char what[80];
    snprintf(what, sizeof what, "moe_ffn forward  T%d %s", (int)tokens, name);
    bench_time(what, gpu_bench(gpu, OP_MOE_FFN, &args, forward_unknown), flops, 0);
    snprintf(what, sizeof what, "moe_ffn forward  T%d %s, counts known", (int)tokens, name);
    bench_time(what, GPU_BENCH(gpu, OP_MOE_FFN, moe_ffn_forward, &args), flops, 0);
    snprintf(what, sizeof what, "moe_ffn backward T%d %s", (int)tokens, name);
    bench_time(what, GPU_BENCH(gpu, OP_MOE_FFN, moe_ffn_backward, &args), 2 * flops, 0);
    void *memory[] = {(void *)args.x,
                      (void *)args.weight_gate_up,
                      (void *)args.weight_down,
                      args.out,
                      args.gate_up,
                      (void *)args.dout,
                      args.dx,
                      args.dgate,
                      args.grad_gate_up,
                      args.grad_down};
    for (size_t i = 0; i < sizeof memory / sizeof memory[0]; i++) gpu->ops->release(gpu, memory[i]);
    routing_free(&routing);
}

static void bench_route(Backend *gpu, int experts, int k) {
    RoutingPair routing = routing_poisoned(gpu, TOKENS, experts, k);
    const int64_t all = (int64_t)TOKENS * HIDDEN, weights = (int64_t)experts * HIDDEN;
    RouteArgs args = {.tokens = TOKENS,
                      .hidden_size = HIDDEN,
                      .num_experts = experts,
                      .top_k = k,
                      .gate_kind = GATE_SOFTMAX,
                      .gate_scale = (float)experts / (float)k,
                      .x = gpu_random_memory(gpu, DTYPE_BF16, all, 1.0f),
                      .weight = (const float *)gpu_random_memory(gpu, DTYPE_F32, weights, 0.03f),
                      .routing = routing.gpu,
                      .dgate = (const float *)gpu_random_memory(gpu, DTYPE_F32, TOKENS * k, 1.0f),
                      .balance_scale = 0.01f,
                      .z_scale = 0.001f,
                      .dx = gpu_random_memory(gpu, DTYPE_BF16, all, 1.0f),
                      .grad_weight = (float *)gpu_random_memory(gpu, DTYPE_F32, weights, 1.0f)};
    double *sums = (double *)gpu_random_memory(gpu, DTYPE_F32, 4 * experts + 4, 0.0f);
    RouterLossArgs loss = {TOKENS,
                           experts,
                           k,
                           routing.gpu,
                           {sums, sums + experts, sums + 2 * experts, sums + 2 * experts + 1}};
    const double row_bytes = 2.0 * (double)all; // one pass over x or dx
    char what[64];
    snprintf(what, sizeof what, "route forward  N%d k%d", experts, k);
    bench_time(what, GPU_BENCH(gpu, OP_ROUTE, route_forward, &args), 0, row_bytes);
    snprintf(what, sizeof what, "route backward N%d k%d", experts, k);
    bench_time(what, GPU_BENCH(gpu, OP_ROUTE, route_backward, &args), 0, 3 * row_bytes);
    snprintf(what, sizeof what, "router_loss    N%d k%d", experts, k);
    bench_time(what, GPU_BENCH(gpu, OP_ROUTER_LOSS, router_loss, &loss), 0,
               4.0 * TOKENS * (experts + 1));
    void *memory[] = {(void *)args.x, (void *)args.weight, (void *)args.dgate,
                      args.dx,        args.grad_weight,    sums};
    for (size_t i = 0; i < sizeof memory / sizeof memory[0]; i++) gpu->ops->release(gpu, memory[i]);
    routing_free(&routing);
}

int main(void) {
    Backend *gpu = gpu_backend(false);
    int32_t even[EXPERTS + 1] = {0}, half[EXPERTS + 1] = {0};
    for (int e = 0; e < EXPERTS; e++) { // not exactly even: routed counts never are
        even[e + 1] = TOKENS * (e + 1) / EXPERTS + (e + 1 < EXPERTS ? (e * 37) % 101 : 0);
        half[e + 1] = TOKENS / 2 + TOKENS / 2 * e / (EXPERTS - 1);
    }
    const Product products[] = {
        {.name = "gate_up", .n = 2 * INNER, .k = HIDDEN, .transpose_b = true},
        {.name = "down", .n = HIDDEN, .k = INNER, .transpose_b = true},
        {.name = "d activation", .n = INNER, .k = HIDDEN},
        {.name = "d x", .n = HIDDEN, .k = 2 * INNER},
        {.name = "gradient of gate_up", .n = 2 * INNER, .k = HIDDEN, .transpose_a = true},
        {.name = "gradient of down", .n = HIDDEN, .k = INNER, .transpose_a = true}};
    for (size_t i = 0; i < sizeof products / sizeof products[0]; i++)
        bench_product(gpu, products[i], even, half);
    bench_moe(gpu, TOKENS, SPREAD_EVEN, "balanced");
    bench_moe(gpu, TOKENS, SPREAD_HALF, "half on one");
    bench_moe(gpu, 4096, SPREAD_EVEN, "balanced");
    bench_route(gpu, EXPERTS, 1);
    bench_route(gpu, 64, 8);
    backend_destroy(gpu);
    return 0;
}
