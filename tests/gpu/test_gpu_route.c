// The router on the GPU against the CPU backend: all gate kinds, expert counts of every kernel, odd
// sizes, ties, empty experts; the gradients and the sums of the router losses.
//
// x is rounded to bf16 before either side sees it and everything after is fp32 on both, so that all
// but dx, which is stored in bf16, must agree to fp32 tolerance in either mode.
#include "tests/gpu/gpu_routing.h"

typedef struct Shape {
    int64_t tokens;
    int hidden, experts, k;
    RouterGate gate;
    bool bias, load;
} Shape;

typedef struct Operands {
    Pair x, weight, bias, dgate, load, dx, grad_weight;
    RoutingPair routing;
} Operands;

static RouteArgs args_of(const Shape *s, const Operands *o, bool gpu) {
#define SIDE(pair) (gpu ? (pair).gpu : (void *)(pair).cpu)
    return (RouteArgs){.tokens = s->tokens,
                       .hidden_size = s->hidden,
                       .num_experts = s->experts,
                       .top_k = s->k,
                       .gate_kind = s->gate,
                       .gate_scale = s->gate == GATE_RENORM ? 1.0f : (float)s->experts / s->k,
                       .x = SIDE(o->x),
                       .weight = (const float *)SIDE(o->weight),
                       .selection_bias = s->bias ? (const float *)SIDE(o->bias) : NULL,
                       .routing = gpu ? o->routing.gpu : o->routing.cpu,
                       .dgate = (const float *)SIDE(o->dgate),
                       .balance_scale = 0.3f,
                       .z_scale = 0.2f,
                       .load = s->load ? (const float *)SIDE(o->load) : NULL,
                       .dx = SIDE(o->dx),
                       .grad_weight = (float *)SIDE(o->grad_weight)};
#undef SIDE
}

// Slots whose expert differs although the CPU's scores of the two are not within rounding.
static int64_t wrong_choices(const Shape *s, const Operands *o, const Routing *expected,
                             const Routing *got) {
    int64_t wrong = 0;
    for (int64_t i = 0; i < s->tokens * s->k; i++) {
        const int32_t a = expected->expert[i], b = got->expert[i];
        if (a == b) continue;
        if (b < 0 || b >= s->experts) return s->tokens;
        const float *p = expected->probabilities + i / s->k * s->experts;
        const float bias = s->bias ? o->bias.cpu[a] - o->bias.cpu[b] : 0.0f;
        if (fabsf(p[a] - p[b] + bias) > 1e-5f) wrong++;
    }
    return wrong;
}

// What is wrong with the grouping: 0 when rows and slots are inverse and stable in the token.
static int64_t wrong_rows(const Shape *s, const Routing *r) {
    const int64_t slots = s->tokens * s->k;
    if (r->expert_begin[0] != 0 || r->expert_begin[s->experts] != slots) return slots;
    int64_t wrong = 0;
    for (int e = 0; e < s->experts; e++) {
        for (int32_t row = r->expert_begin[e]; row < r->expert_begin[e + 1]; row++) {
            if (row < 0 || row >= slots) return slots;
            const int32_t slot = r->slot_of_row[row];
            if (slot < 0 || slot >= slots) return slots;
            wrong += r->expert[slot] != e || r->row_of_slot[slot] != row ||
                     (row > r->expert_begin[e] && slot <= r->slot_of_row[row - 1]);
        }
    }
    return wrong;
}

// Gates from the GPU's own choice and probabilities, so that a near tie is no error.
static double gate_error(const Shape *s, const Routing *r, float scale) {
    double worst = 0;
    for (int64_t t = 0; t < s->tokens; t++) {
        double sum = 0;
        for (int j = 0; j < s->k; j++)
            sum += r->probabilities[t * s->experts + r->expert[t * s->k + j]];
        for (int j = 0; j < s->k; j++) {
            double gate = r->probabilities[t * s->experts + r->expert[t * s->k + j]];
            if (s->gate != GATE_SOFTMAX) gate /= sum;
            const double error = fabs(r->gate[t * s->k + j] / (gate * scale) - 1);
            if (!(error <= worst)) worst = isnan(error) ? INFINITY : error;
        }
    }
    return worst;
}

static void check_forward(const Shape *s, Operands *o, const char *text) {
    RouteArgs cpu_args = args_of(s, o, false), gpu_args = args_of(s, o, true);
    GPU_RUN(gpu_reference(), OP_ROUTE, route_forward, &cpu_args);
    GPU_RUN(o->x.backend, OP_ROUTE, route_forward, &gpu_args);
    RoutingPair got = routing_poisoned(o->x.backend, s->tokens, s->experts, s->k);
    Routing own = got.gpu;
    got.gpu = o->routing.gpu;
    routing_download(&got);
    const Routing *expected = &o->routing.cpu;
    gpu_report(gpu_error_of(got.cpu.probabilities, expected->probabilities, s->tokens * s->experts),
               GPU_TOLERANCE_F32, "%s probabilities", text);
    gpu_report(gpu_error_of(got.cpu.log_sum_exp, expected->log_sum_exp, s->tokens),
               GPU_TOLERANCE_F32, "%s log_sum_exp", text);
    const int64_t wrong = wrong_choices(s, o, expected, &got.cpu);
    gpu_report((double)wrong, 0, "%s wrong choices", text);
    if (wrong == 0) {
        gpu_report(gate_error(s, &got.cpu, gpu_args.gate_scale), GPU_TOLERANCE_F32, "%s gate",
                   text);
        gpu_report((double)wrong_rows(s, &got.cpu), 0, "%s wrong rows", text);
    }
    got.gpu = own;
    routing_free(&got);
    routing_download(&o->routing); // backward of both sides starts from the same routing
}

static void check_backward(const Shape *s, Operands *o, const char *text) {
    Backend *gpu = o->x.backend;
    Pair dx_again = pair_poisoned(gpu, o->dx.dtype, o->dx.count);
    Pair grad_again = pair_poisoned(gpu, DTYPE_F32, o->grad_weight.count);
    memcpy(dx_again.cpu, o->dx.cpu, (size_t)o->dx.count * sizeof(float));
    memcpy(grad_again.cpu, o->grad_weight.cpu, (size_t)o->grad_weight.count * sizeof(float));
    pair_upload(&dx_again);
    pair_upload(&grad_again);
    RouteArgs cpu_args = args_of(s, o, false), gpu_args = args_of(s, o, true);
    GPU_RUN(gpu_reference(), OP_ROUTE, route_backward, &cpu_args);
    GPU_RUN(gpu, OP_ROUTE, route_backward, &gpu_args);
    pair_check(&o->dx, gpu_tolerance(gpu->compute_dtype), text, "dx");
    pair_check(&o->grad_weight, GPU_TOLERANCE_F32, text, "grad_weight");
    gpu_args.dx = dx_again.gpu;
    gpu_args.grad_weight = (float *)grad_again.gpu;
    GPU_RUN(gpu, OP_ROUTE, route_backward, &gpu_args);
    pair_check_same_bits(&dx_again, &o->dx, text, "dx");
    pair_check_same_bits(&grad_again, &o->grad_weight, text, "grad_weight");
    pair_free(&dx_again);
    pair_free(&grad_again);
}

// Both sides add to the same start values; double against double, in another order.
static void check_loss(const Shape *s, Operands *o, const char *text) {
    Backend *gpu = o->x.backend;
    const size_t count = 2 * (size_t)s->experts + 2, bytes = count * sizeof(double);
    double *cpu = (double *)malloc(bytes), *got = (double *)malloc(bytes);
    for (size_t i = 0; i < count; i++) cpu[i] = 1.0 + (double)i;
    double *device = (double *)gpu_copy_of(gpu, cpu, bytes);
    RouterLossArgs args = {s->tokens,
                           s->experts,
                           s->k,
                           o->routing.cpu,
                           {cpu, cpu + s->experts, cpu + 2 * s->experts, cpu + 2 * s->experts + 1}};
    GPU_RUN(gpu_reference(), OP_ROUTER_LOSS, router_loss, &args);
    args.routing = o->routing.gpu;
    args.sums = (RouterSums){device, device + s->experts, device + 2 * s->experts,
                             device + 2 * s->experts + 1};
    GPU_RUN(gpu, OP_ROUTER_LOSS, router_loss, &args);
    GPU_OK(gpu->ops->download(gpu, got, device, bytes));
    double worst = 0;
    for (size_t i = 0; i < count; i++) {
        const double error = fabs(got[i] / cpu[i] - 1);
        if (!(error <= worst)) worst = isnan(error) ? INFINITY : error;
    }
    gpu_report(worst, 1e-11, "%s loss sums", text);
    gpu->ops->release(gpu, device);
    free(cpu);
    free(got);
}

static Operands random_operands(Backend *gpu, const Shape *s) {
    const int64_t weights = (int64_t)s->experts * s->hidden;
    return (Operands){.x = pair_random(gpu, gpu->compute_dtype, s->tokens * s->hidden, 1.0f),
                      .weight =
                          pair_random(gpu, DTYPE_F32, weights, 2.0f / sqrtf((float)s->hidden)),
                      .bias = pair_random(gpu, DTYPE_F32, s->experts, 0.3f),
                      .dgate = pair_random(gpu, DTYPE_F32, s->tokens * s->k, 1.0f),
                      .load = pair_random(gpu, DTYPE_F32, s->experts, 1.0f),
                      .dx = pair_random(gpu, gpu->compute_dtype, s->tokens * s->hidden, 0.5f),
                      .grad_weight = pair_random(gpu, DTYPE_F32, weights, 1.0f),
                      .routing = routing_poisoned(gpu, s->tokens, s->experts, s->k)};
}

static void free_operands(Operands *o) {
    Pair *all[] = {&o->x, &o->weight, &o->bias, &o->dgate, &o->load, &o->dx, &o->grad_weight};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) pair_free(all[i]);
    routing_free(&o->routing);
}

static void check_shape(Backend *gpu, const Shape *s) {
    if (gpu_skips((double)s->tokens * s->hidden * s->experts)) return;
    static const char *const gates[] = {"softmax", "renorm", "straight"};
    char text[128];
    snprintf(text, sizeof text, "%s route T%d H%d N%d k%d %s%s%s", dtype_name(gpu->compute_dtype),
             (int)s->tokens, s->hidden, s->experts, s->k, gates[s->gate], s->bias ? " bias" : "",
             s->load ? " load" : "");
    Operands o = random_operands(gpu, s);
    check_forward(s, &o, text);
    check_backward(s, &o, text);
    check_loss(s, &o, text);
    free_operands(&o);
}

// Equal weights make equal probabilities: the lower index wins. A bias on the last expert sends all
// tokens there and leaves the others empty.
static void check_ties(Backend *gpu, int experts, bool last) {
    const Shape s = {1000, 40, experts, 1, GATE_SOFTMAX, last, false};
    Operands o = random_operands(gpu, &s);
    for (int64_t i = 0; i < o.weight.count; i++) o.weight.cpu[i] = o.weight.cpu[i % s.hidden];
    for (int e = 0; e < experts; e++) o.bias.cpu[e] = e == experts - 1 ? 5.0f : 0.0f;
    pair_upload(&o.weight);
    pair_upload(&o.bias);
    RouteArgs args = args_of(&s, &o, true);
    GPU_RUN(gpu, OP_ROUTE, route_forward, &args);
    routing_download(&o.routing);
    int64_t wrong = wrong_rows(&s, &o.routing.cpu);
    for (int64_t t = 0; t < s.tokens; t++)
        wrong += o.routing.cpu.expert[t] != (last ? experts - 1 : 0);
    gpu_report((double)wrong, 0, "%s route N%d %s", dtype_name(gpu->compute_dtype), experts,
               last ? "all tokens to the last expert" : "ties go to expert 0");
    free_operands(&o);
}

static const Shape shapes[] = {
    {1, 64, 6, 1, GATE_SOFTMAX, false, false},
    {1, 1, 1, 1, GATE_SOFTMAX, false, false},
    {7, 33, 2, 2, GATE_RENORM, true, true},
    {255, 896, 6, 1, GATE_SOFTMAX, false, false},
    {257, 896, 6, 1, GATE_STRAIGHT_THROUGH, true, true},
    {3000, 896, 6, 2, GATE_RENORM, false, true},
    {513, 100, 8, 8, GATE_RENORM, false, false},
    {300, 37, 5, 3, GATE_STRAIGHT_THROUGH, true, false},
    {1000, 128, 9, 2, GATE_RENORM, true, true},
    {700, 2048, 32, 4, GATE_SOFTMAX, false, true},
    {260, 1032, 33, 3, GATE_RENORM, false, false},
    {400, 256, 64, 8, GATE_STRAIGHT_THROUGH, true, true},
    {300, 1300, 256, 16, GATE_RENORM, true, false},
    {20, 72, 256, 256, GATE_SOFTMAX, false, true},
    // Either side of the most experts that one kernel does all of, and of the two fewer.
    {1000, 72, 7, 3, GATE_STRAIGHT_THROUGH, true, false},
    {2100, 256, 8, 1, GATE_SOFTMAX, true, false},
    {33, 2048, 8, 4, GATE_RENORM, false, true},
    {1500, 128, 9, 9, GATE_SOFTMAX, false, false},
    // A round of a block's tokens, less one and one more.
    {31, 896, 6, 6, GATE_RENORM, false, true},
    {32, 100, 6, 1, GATE_STRAIGHT_THROUGH, false, false},
    {33, 33, 3, 1, GATE_SOFTMAX, true, false},
    // Several rounds, with a weight that fits and with one that does not.
    {20011, 264, 6, 1, GATE_STRAIGHT_THROUGH, false, false},
    {9001, 1032, 6, 2, GATE_RENORM, false, false},
    // Parts of a tile and of one token more; blocks that choose for more than the fewest tokens.
    {33000, 40, 6, 1, GATE_SOFTMAX, false, true},
    {140001, 8, 9, 1, GATE_SOFTMAX, false, false},
};

int main(void) {
    for (int fp32 = 1; fp32 >= 0; fp32--) {
        Backend *gpu = gpu_backend(fp32);
        for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) check_shape(gpu, &shapes[i]);
        const int experts[] = {6, 8, 20, 100};
        for (int i = 0; i < 8; i++) check_ties(gpu, experts[i / 2], i % 2 == 1);
        backend_destroy(gpu);
    }
    backend_destroy(gpu_reference());
    return gpu_test_result("test_gpu_route");
}
