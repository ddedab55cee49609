// The expert MLPs on the GPU against the CPU backend: balanced, one expert with everything, empty
// experts, k = N, one token, none, odd sizes, and many row counts in a row; and the rows between
// token and expert order.
#include "tests/gpu/gpu_routing.h"

typedef struct Shape {
    int64_t tokens;
    int hidden, inner, experts, k;
    Spread spread;
} Shape;

typedef struct Operands {
    Pair x, weight_gate_up, weight_down, out, gate_up, dout, dx, dgate, grad_gate_up, grad_down;
    RoutingPair routing;
} Operands;

static MoeFfnArgs args_of(const Shape *s, const Operands *o, bool gpu) {
#define SIDE(pair) (gpu ? (pair).gpu : (void *)(pair).cpu)
    return (MoeFfnArgs){.tokens = s->tokens,
                        .hidden_size = s->hidden,
                        .intermediate_size = s->inner,
                        .num_experts = s->experts,
                        .top_k = s->k,
                        .x = SIDE(o->x),
                        .weight_gate_up = SIDE(o->weight_gate_up),
                        .weight_down = SIDE(o->weight_down),
                        .routing = gpu ? o->routing.gpu : o->routing.cpu,
                        .out = SIDE(o->out),
                        .gate_up = SIDE(o->gate_up),
                        .dout = SIDE(o->dout),
                        .dx = SIDE(o->dx),
                        .dgate = (float *)SIDE(o->dgate),
                        .grad_gate_up = SIDE(o->grad_gate_up),
                        .grad_down = SIDE(o->grad_down)};
#undef SIDE
}

static Operands random_operands(Backend *gpu, const Shape *s) {
    const DType dtype = gpu->compute_dtype, grad = gpu->grad_dtype;
    const int64_t rows = s->tokens * s->k, wide = 2 * s->inner, all = s->tokens * s->hidden;
    const int64_t weights = (int64_t)s->experts * s->inner * s->hidden;
    Operands o = {.x = pair_random(gpu, dtype, all, 1.0f),
                  .weight_gate_up =
                      pair_random(gpu, dtype, 2 * weights, 1.0f / sqrtf((float)s->hidden)),
                  .weight_down = pair_random(gpu, dtype, weights, 1.0f / sqrtf((float)s->inner)),
                  .out = pair_poisoned(gpu, dtype, all),
                  .gate_up = pair_poisoned(gpu, dtype, rows * wide),
                  .dout = pair_random(gpu, dtype, all, 1.0f),
                  .dx = pair_poisoned(gpu, dtype, all),
                  .dgate = pair_poisoned(gpu, DTYPE_F32, rows),
                  .grad_gate_up = pair_random(gpu, grad, 2 * weights, 0.1f),
                  .grad_down = pair_random(gpu, grad, weights, 0.1f),
                  .routing = routing_poisoned(gpu, s->tokens, s->experts, s->k)};
    routing_random(&o.routing, s->spread);
    return o;
}

static void free_operands(Operands *o) {
    Pair *all[] = {
        &o->x,  &o->weight_gate_up, &o->weight_down,  &o->out,      &o->gate_up, &o->dout,
        &o->dx, &o->dgate,          &o->grad_gate_up, &o->grad_down};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) pair_free(all[i]);
    routing_free(&o->routing);
}

static Pair copy_of(const Pair *p) {
    Pair copy = pair_poisoned(p->backend, p->dtype, p->count);
    memcpy(copy.cpu, p->cpu, (size_t)p->count * sizeof(float));
    pair_upload(&copy);
    return copy;
}

static void check_backward(const Shape *s, Operands *o, const char *text) {
    Backend *gpu = o->x.backend;
    const double tolerance = gpu_tolerance(gpu->compute_dtype);
    Operands again = *o; // a second run must give the same bits
    again.dx = copy_of(&o->dx);
    again.dgate = copy_of(&o->dgate);
    again.grad_gate_up = copy_of(&o->grad_gate_up);
    again.grad_down = copy_of(&o->grad_down);
    Pair *const first[] = {&o->dx, &o->dgate, &o->grad_gate_up, &o->grad_down};
    Pair *const second[] = {&again.dx, &again.dgate, &again.grad_gate_up, &again.grad_down};
    static const char *const names[] = {"dx", "dgate", "grad_gate_up", "grad_down"};
    pair_adopt(&o->gate_up);
    MoeFfnArgs cpu_args = args_of(s, o, false), gpu_args = args_of(s, o, true);
    MoeFfnArgs again_args = args_of(s, &again, true);
    GPU_RUN(gpu_reference(), OP_MOE_FFN, moe_ffn_backward, &cpu_args);
    GPU_RUN(gpu, OP_MOE_FFN, moe_ffn_backward, &gpu_args);
    GPU_RUN(gpu, OP_MOE_FFN, moe_ffn_backward, &again_args);
    for (int i = 0; i < 4; i++) {
        pair_check(first[i], tolerance, text, names[i]);
        pair_check_same_bits(second[i], first[i], text, names[i]);
        pair_free(second[i]);
    }
}

// The gradients of every expert are assigned, zeros for one without rows.
static void check_assigned(const Shape *s, const Operands *o, const char *text) {
    Backend *gpu = o->x.backend;
    const double tolerance = gpu_tolerance(gpu->compute_dtype);
    Operands assigned = *o;
    assigned.grad_gate_up = pair_poisoned(gpu, o->grad_gate_up.dtype, o->grad_gate_up.count);
    assigned.grad_down = pair_poisoned(gpu, o->grad_down.dtype, o->grad_down.count);
    MoeFfnArgs cpu_args = args_of(s, &assigned, false), gpu_args = args_of(s, &assigned, true);
    cpu_args.grad_assign = gpu_args.grad_assign = true;
    GPU_RUN(gpu_reference(), OP_MOE_FFN, moe_ffn_backward, &cpu_args);
    GPU_RUN(gpu, OP_MOE_FFN, moe_ffn_backward, &gpu_args);
    pair_check(&assigned.grad_gate_up, tolerance, text, "grad_gate_up assigned");
    pair_check(&assigned.grad_down, tolerance, text, "grad_down assigned");
    pair_free(&assigned.grad_gate_up);
    pair_free(&assigned.grad_down);
}

static void check_shape(Backend *gpu, const Shape *s) {
    if (gpu_skips((double)s->tokens * s->k * s->hidden * s->inner * 3)) return;
    static const char *const spreads[] = {"even", "one", "half", "gaps"};
    const double tolerance = gpu_tolerance(gpu->compute_dtype);
    char text[128];
    snprintf(text, sizeof text, "%s moe T%d H%d I%d N%d k%d %s", dtype_name(gpu->compute_dtype),
             (int)s->tokens, s->hidden, s->inner, s->experts, s->k, spreads[s->spread]);
    Operands o = random_operands(gpu, s);
    MoeFfnArgs cpu_args = args_of(s, &o, false), gpu_args = args_of(s, &o, true);
    GPU_RUN(gpu_reference(), OP_MOE_FFN, moe_ffn_forward, &cpu_args);
    GPU_RUN(gpu, OP_MOE_FFN, moe_ffn_forward, &gpu_args);
    pair_check(&o.gate_up, tolerance, text, "gate_up");
    pair_check(&o.out, tolerance, text, "out");
    Pair gate_up = pair_poisoned(gpu, gpu->compute_dtype, o.gate_up.count);
    gpu_args.out = NULL; // only what backward reads
    gpu_args.gate_up = gate_up.gpu;
    GPU_RUN(gpu, OP_MOE_FFN, moe_ffn_forward, &gpu_args);
    pair_check_same_bits(&gate_up, &o.gate_up, text, "gate_up without out");
    pair_free(&gate_up);
    check_backward(s, &o, text);
    check_assigned(s, &o, text);
    free_operands(&o);
}

static void check_out(const Shape *s, Operands *o, const char *text) {
    MoeFfnArgs cpu_args = args_of(s, o, false), gpu_args = args_of(s, o, true);
    GPU_RUN(gpu_reference(), OP_MOE_FFN, moe_ffn_forward, &cpu_args);
    GPU_RUN(o->x.backend, OP_MOE_FFN, moe_ffn_forward, &gpu_args);
    pair_check(&o->out, gpu_tolerance(o->x.dtype), text, "out");
}

// A routing that changes in place, by an upload and by the router, is never taken for the old one.
static void check_new_routing(Backend *gpu) {
    const Shape s = {500, 64, 48, 6, 2, SPREAD_EVEN};
    char text[64];
    snprintf(text, sizeof text, "%s moe, same routing memory", dtype_name(gpu->compute_dtype));
    Operands o = random_operands(gpu, &s);
    check_out(&s, &o, text);
    routing_random(&o.routing, SPREAD_HALF);
    check_out(&s, &o, text);
    Pair weight = pair_random(gpu, DTYPE_F32, (int64_t)s.experts * s.hidden, 0.3f);
    const RouteArgs route = {.tokens = s.tokens,
                             .hidden_size = s.hidden,
                             .num_experts = s.experts,
                             .top_k = s.k,
                             .gate_kind = GATE_RENORM,
                             .gate_scale = 1.0f,
                             .x = o.x.gpu,
                             .weight = (const float *)weight.gpu,
                             .routing = o.routing.gpu};
    GPU_RUN(gpu, OP_ROUTE, route_forward, &route);
    routing_download(&o.routing);
    check_out(&s, &o, text);
    pair_free(&weight);
    free_operands(&o);
}

// --- Rows between the orders -------------------------------------------------------------------

// Of `type`, and where the two ends are `offset` elements behind the beginning of their memory.
static void check_gather(Backend *gpu, DType type, const RoutingPair *routing, int width,
                         int divisor, int offset) {
    const int64_t rows = routing->tokens * routing->k, in_rows = rows / divisor;
    const int64_t bytes = (int64_t)dtype_bytes(type);
    char text[128];
    snprintf(text, sizeof text, "%s gather_rows R%d width %d / %d + %d", dtype_name(type),
             (int)rows, width, divisor, offset);
    Pair in = pair_random(gpu, type, in_rows * width + offset, 1.0f);
    Pair out = pair_poisoned(gpu, type, rows * width + offset);
    GatherRowsArgs cpu_args = {.rows = rows,
                               .row_bytes = width * (int64_t)sizeof(float),
                               .divisor = divisor,
                               .index = routing->cpu.slot_of_row,
                               .in = in.cpu + offset,
                               .out = out.cpu + offset};
    GatherRowsArgs gpu_args = cpu_args;
    gpu_args.row_bytes = width * bytes;
    gpu_args.index = routing->gpu.slot_of_row;
    gpu_args.in = (char *)in.gpu + offset * bytes;
    gpu_args.out = (char *)out.gpu + offset * bytes;
    for (int i = 0; i < offset; i++) out.cpu[i] = 0.0f;
    pair_upload(&out);
    GPU_RUN(gpu_reference(), OP_GATHER_ROWS, gather_rows, &cpu_args);
    GPU_RUN(gpu, OP_GATHER_ROWS, gather_rows, &gpu_args);
    pair_check(&out, 0, text, "out");
    pair_free(&in);
    pair_free(&out);
}

static void check_combine(Backend *gpu, const RoutingPair *routing, int hidden) {
    const DType type = gpu->compute_dtype;
    char text[128];
    snprintf(text, sizeof text, "%s combine_rows T%d H%d k%d", dtype_name(type),
             (int)routing->tokens, hidden, routing->k);
    Pair rows = pair_random(gpu, type, routing->tokens * routing->k * hidden, 1.0f);
    Pair out = pair_poisoned(gpu, type, routing->tokens * hidden);
    Pair again = pair_poisoned(gpu, type, out.count);
    CombineRowsArgs cpu_args = {.tokens = routing->tokens,
                                .hidden_size = hidden,
                                .top_k = routing->k,
                                .row_of_slot = routing->cpu.row_of_slot,
                                .rows = rows.cpu,
                                .out = out.cpu};
    CombineRowsArgs gpu_args = cpu_args;
    gpu_args.row_of_slot = routing->gpu.row_of_slot;
    gpu_args.rows = rows.gpu;
    gpu_args.out = out.gpu;
    GPU_RUN(gpu_reference(), OP_COMBINE_ROWS, combine_rows, &cpu_args);
    GPU_RUN(gpu, OP_COMBINE_ROWS, combine_rows, &gpu_args);
    pair_check(&out, gpu_tolerance(type), text, "out");
    gpu_args.out = again.gpu;
    GPU_RUN(gpu, OP_COMBINE_ROWS, combine_rows, &gpu_args);
    pair_check_same_bits(&again, &out, text, "out");
    pair_free(&rows);
    pair_free(&out);
    pair_free(&again);
}

static void check_rows(Backend *gpu) {
    const int64_t tokens[] = {0, 1, 77, 1000};
    const int widths[] = {896, 100, 3};
    for (int t = 0; t < 4; t++) {
        for (int k = 1; k <= 3; k += 2) {
            RoutingPair routing = routing_poisoned(gpu, tokens[t], 6, k);
            routing_random(&routing, SPREAD_EVEN);
            for (int w = 0; w < 3; w++) {
                const int even = widths[w] + widths[w] % 2; // a multiple of 4 bytes in bf16, too
                check_gather(gpu, gpu->compute_dtype, &routing, even, k, 0);
                check_gather(gpu, gpu->compute_dtype, &routing, even, 1, 2); // 16 bytes no more
                check_combine(gpu, &routing, widths[w]);
            }
            check_gather(gpu, DTYPE_F32, &routing, 3, k, 0);
            check_gather(gpu, DTYPE_F32, &routing, 1, 1, 0); // as gates are gathered
            check_gather(gpu, DTYPE_F32, &routing, 1, 1, 1);
            routing_free(&routing);
        }
    }
}

static const Shape shapes[] = {
    {1, 64, 96, 6, 1, SPREAD_EVEN},
    {1, 64, 96, 4, 4, SPREAD_EVEN},
    {1, 8, 8, 1, 1, SPREAD_ONE},
    {5, 33, 17, 3, 2, SPREAD_EVEN},
    {300, 128, 200, 6, 1, SPREAD_EVEN},
    {300, 128, 200, 6, 1, SPREAD_ONE},
    {300, 128, 200, 6, 2, SPREAD_HALF},
    {301, 128, 200, 6, 3, SPREAD_GAPS},
    {150, 72, 40, 5, 5, SPREAD_EVEN},
    {513, 896, 608, 6, 1, SPREAD_EVEN},
    {700, 256, 264, 6, 2, SPREAD_ONE},
    {400, 64, 32, 64, 4, SPREAD_EVEN},
    {200, 100, 50, 256, 2, SPREAD_GAPS},
    {3000, 128, 1544, 6, 1, SPREAD_HALF},
    {0, 64, 96, 6, 1, SPREAD_EVEN},
    {0, 33, 17, 3, 2, SPREAD_EVEN},
    // Many tiles: what fills an H200 is done for all experts at once (hopper_grouped.h).
    {8192, 896, 2048, 2, 1, SPREAD_EVEN},
    {8192, 896, 2048, 3, 1, SPREAD_GAPS},
};

static void check_all(Backend *gpu) {
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) check_shape(gpu, &shapes[i]);
    // Row counts around the multiple of 256 that a product's algorithm is chosen for.
    const int64_t tokens[] = {15, 16, 255, 256, 257, 511, 513};
    for (size_t i = 0; i < sizeof tokens / sizeof tokens[0]; i++) {
        const Shape s = {tokens[i], 256, 128, 2, 1, SPREAD_ONE};
        check_shape(gpu, &s);
    }
    check_new_routing(gpu);
    check_rows(gpu);
    backend_destroy(gpu);
}

int main(void) {
    check_all(gpu_backend(true));
    check_all(gpu_backend(false));
    check_all(gpu_backend_bf16_grads());
    backend_destroy(gpu_reference());
    return gpu_test_result("test_gpu_moe");
}
