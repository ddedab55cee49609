// The router: choice, gates, grouping, and the gradients of the gates and the router losses.
#include "tests/ops.h"

static const int thread_counts[] = {1, 2, 3};
enum { THREAD_COUNTS = 3 };

typedef struct RouteRef {
    int64_t tokens;
    int hidden, experts, k;
    RouterGate kind;
    double scale, alpha, zeta; // gate_scale; weights of the balance and the z loss
    Values x, weight, bias, dgate;
    bool has_bias;
    int32_t *expert;        // (T, k) the choice, a constant of the gradient
    const double *stopped;  // (T) Σ of the chosen p, held constant by straight_through
    const double *load;     // (N) f_i, a constant
    double *p, *gate, *lse; // filled by the reference
} RouteRef;

static void route_reference(const RouteRef *r) {
    for (int64_t t = 0; t < r->tokens; t++) {
        double *p = r->p + t * r->experts, highest = -INFINITY, sum = 0, chosen = 0;
        for (int e = 0; e < r->experts; e++) {
            p[e] = 0;
            for (int h = 0; h < r->hidden; h++)
                p[e] += r->x.d[t * r->hidden + h] * r->weight.d[e * r->hidden + h];
            highest = fmax(highest, p[e]);
        }
        for (int e = 0; e < r->experts; e++) sum += p[e] = exp(p[e] - highest);
        for (int e = 0; e < r->experts; e++) p[e] /= sum;
        r->lse[t] = highest + log(sum);
        const int32_t *expert = r->expert + t * r->k;
        for (int j = 0; j < r->k; j++) chosen += p[expert[j]];
        if (r->kind == GATE_STRAIGHT_THROUGH && r->stopped) chosen = r->stopped[t];
        if (r->kind == GATE_SOFTMAX) chosen = 1;
        for (int j = 0; j < r->k; j++) r->gate[t * r->k + j] = r->scale * p[expert[j]] / chosen;
    }
}

// Σ gate·dgate + α·N·Σ_i f_i·P_i + ζ·mean(lse²): METHOD.md §4 and §5, f_i held constant.
static double route_objective(const void *context) {
    const RouteRef *r = context;
    route_reference(r);
    double sum = 0, balance = 0, z = 0;
    for (int64_t i = 0; i < r->tokens * r->k; i++) sum += r->gate[i] * r->dgate.d[i];
    for (int e = 0; e < r->experts; e++)
        for (int64_t t = 0; t < r->tokens; t++)
            balance += r->load[e] * r->p[t * r->experts + e] / (double)r->tokens;
    for (int64_t t = 0; t < r->tokens; t++) z += r->lse[t] * r->lse[t] / (double)r->tokens;
    return sum + r->alpha * r->experts * balance + r->zeta * z;
}

// The k best by p + bias in double; ties do not occur in random data.
static void choose_reference(const RouteRef *r) {
    for (int64_t t = 0; t < r->tokens; t++) {
        for (int j = 0; j < r->k; j++) {
            int best = -1;
            double best_score = 0;
            for (int e = 0; e < r->experts; e++) {
                double score = r->p[t * r->experts + e] + (r->has_bias ? r->bias.d[e] : 0);
                bool taken = false;
                for (int l = 0; l < j; l++) taken = taken || r->expert[t * r->k + l] == e;
                if (!taken && (best < 0 || score > best_score)) best = e, best_score = score;
            }
            r->expert[t * r->k + j] = best;
        }
    }
}

static Routing routing_poisoned(int64_t tokens, int experts, int k) {
    Routing routing = {.probabilities = floats_poisoned(tokens * experts),
                       .log_sum_exp = floats_poisoned(tokens),
                       .expert = test_take(sizeof(int32_t) * (size_t)(tokens * k)),
                       .gate = floats_poisoned(tokens * k),
                       .slot_of_row = test_take(sizeof(int32_t) * (size_t)(tokens * k)),
                       .row_of_slot = test_take(sizeof(int32_t) * (size_t)(tokens * k)),
                       .expert_begin = test_take(sizeof(int32_t) * ((size_t)experts + 1))};
    memset(routing.expert, 0xFF, sizeof(int32_t) * (size_t)(tokens * k));
    return routing;
}

static void check_grouping(const Routing *routing, int64_t tokens, int experts, int k) {
    ck_assert_int_eq(routing->expert_begin[0], 0);
    ck_assert_int_eq(routing->expert_begin[experts], tokens * k);
    for (int e = 0; e < experts; e++) {
        for (int32_t row = routing->expert_begin[e]; row < routing->expert_begin[e + 1]; row++) {
            const int32_t slot = routing->slot_of_row[row];
            ck_assert_int_eq(routing->expert[slot], e);
            ck_assert_int_eq(routing->row_of_slot[slot], row);
            if (row > routing->expert_begin[e])
                ck_assert_int_gt(slot, routing->slot_of_row[row - 1]); // stable in t
        }
    }
}

static RouteRef random_route(int64_t tokens, int hidden, int experts, int k, RouterGate kind,
                             bool bias) {
    RouteRef r = {.tokens = tokens,
                  .hidden = hidden,
                  .experts = experts,
                  .k = k,
                  .kind = kind,
                  .scale = kind == GATE_RENORM ? 1.0 : (double)experts / k,
                  .alpha = 0.3,
                  .zeta = 0.2,
                  .x = values_random(tokens * hidden, 1),
                  .weight = values_random(experts * hidden, 0.5),
                  .bias = values_random(experts, 0.3),
                  .dgate = values_random(tokens * k, 1),
                  .has_bias = bias};
    r.expert = test_take(sizeof(int32_t) * (size_t)(tokens * k));
    memset(r.expert, 0, sizeof(int32_t) * (size_t)(tokens * k));
    r.p = doubles_zero(tokens * experts);
    r.gate = doubles_zero(tokens * k);
    r.lse = doubles_zero(tokens);
    route_reference(&r); // probabilities first, then the choice made from them
    choose_reference(&r);
    route_reference(&r);
    double *stopped = doubles_zero(tokens), *load = doubles_zero(experts);
    for (int64_t slot = 0; slot < tokens * k; slot++) {
        stopped[slot / k] += r.p[slot / k * experts + r.expert[slot]];
        load[r.expert[slot]] += 1.0 / (double)(tokens * k);
    }
    for (int e = 0; e < experts; e++) load[e] = (float)load[e];
    r.stopped = stopped;
    r.load = load;
    return r;
}

static void check_route(Backend *backend, int64_t tokens, int hidden, int experts, int k,
                        RouterGate kind, bool bias) {
    RouteRef r = random_route(tokens, hidden, experts, k, kind, bias);
    float *load = floats_poisoned(experts);
    for (int e = 0; e < experts; e++) load[e] = (float)r.load[e];
    Values weight_before = values_random(experts * hidden, 1);
    Values dx_before = values_random(tokens * hidden, 1);
    float *grad_weight = test_take(sizeof(float) * (size_t)(experts * hidden));
    float *dx = test_take(sizeof(float) * (size_t)(tokens * hidden));
    memcpy(grad_weight, weight_before.f, sizeof(float) * (size_t)(experts * hidden));
    memcpy(dx, dx_before.f, sizeof(float) * (size_t)(tokens * hidden));
    RouteArgs args = {.tokens = tokens,
                      .hidden_size = hidden,
                      .num_experts = experts,
                      .top_k = k,
                      .gate_kind = kind,
                      .gate_scale = (float)r.scale,
                      .x = r.x.f,
                      .weight = r.weight.f,
                      .selection_bias = bias ? r.bias.f : NULL,
                      .routing = routing_poisoned(tokens, experts, k),
                      .dgate = r.dgate.f,
                      .balance_scale = (float)(r.alpha * experts / (double)tokens),
                      .z_scale = (float)(r.zeta / (double)tokens),
                      // given, or NULL: the routing's own, which is the same here
                      .load = bias ? load : NULL,
                      .dx = dx,
                      .grad_weight = grad_weight};
    RUN_OP(backend, OP_ROUTE, route_forward, &args);
    check_close("p", args.routing.probabilities, r.p, tokens * experts, OPS_TOLERANCE);
    check_close("lse", args.routing.log_sum_exp, r.lse, tokens, OPS_TOLERANCE);
    for (int64_t slot = 0; slot < tokens * k; slot++)
        ck_assert_int_eq(args.routing.expert[slot], r.expert[slot]);
    check_close("gate", args.routing.gate, r.gate, tokens * k, OPS_TOLERANCE);
    check_grouping(&args.routing, tokens, experts, k);
    RUN_OP(backend, OP_ROUTE, route_backward, &args);
    // gradients are differences of larger terms, e.g. dg_i - Σ g·dg: 5 times the usual bound
    check_gradient("route dx", dx, dx_before.f, r.x, route_objective, &r, 5 * OPS_TOLERANCE);
    check_gradient("route weight", grad_weight, weight_before.f, r.weight, route_objective, &r,
                   5 * OPS_TOLERANCE);
}

START_TEST(route_matches_reference) {
    const RouterGate kinds[] = {GATE_SOFTMAX, GATE_RENORM, GATE_STRAIGHT_THROUGH};
    for (int n = 0; n < THREAD_COUNTS; n++) {
        Backend *backend = test_backend(thread_counts[n]);
        for (int kind = 0; kind < 3; kind++) {
            for (int bias = 0; bias < 2; bias++) {
                check_route(backend, 1, 3, 4, 1, kinds[kind], bias);
                check_route(backend, 9, 5, 6, 1, kinds[kind], bias);
                check_route(backend, 9, 5, 6, 2, kinds[kind], bias);
                check_route(backend, 7, 4, 3, 3, kinds[kind], bias); // k = N
                check_route(backend, 200, 11, 5, 2, kinds[kind], bias);
            }
        }
    }
}
END_TEST

// METHOD.md §4: with k = 1 straight_through has g = 1 and dg/dlogits = 1[j] - p.
START_TEST(straight_through_with_one_expert) {
    Backend *backend = test_backend(1);
    float x[1] = {1}, weight[3] = {0.5f, 2.0f, -1.0f}, dgate[1] = {1}, dx[1] = {0};
    float grad[3] = {0};
    RouteArgs args = {.tokens = 1,
                      .hidden_size = 1,
                      .num_experts = 3,
                      .top_k = 1,
                      .gate_kind = GATE_STRAIGHT_THROUGH,
                      .gate_scale = 1,
                      .x = x,
                      .weight = weight,
                      .routing = routing_poisoned(1, 3, 1),
                      .dgate = dgate,
                      .dx = dx,
                      .grad_weight = grad};
    RUN_OP(backend, OP_ROUTE, route_forward, &args);
    RUN_OP(backend, OP_ROUTE, route_backward, &args);
    ck_assert(args.routing.gate[0] == 1.0f);
    for (int e = 0; e < 3; e++) {
        double expected = (e == 1) - (double)args.routing.probabilities[e];
        ck_assert_double_eq_tol(grad[e], expected, 1e-6); // x = 1: the logits' gradient itself
    }
    // and renorm gives no gradient at all
    args.gate_kind = GATE_RENORM;
    memset(grad, 0, sizeof grad);
    RUN_OP(backend, OP_ROUTE, route_forward, &args);
    RUN_OP(backend, OP_ROUTE, route_backward, &args);
    ck_assert(args.routing.gate[0] == 1.0f);
    for (int e = 0; e < 3; e++) ck_assert(grad[e] == 0.0f);
}
END_TEST

START_TEST(ties_go_to_the_lower_expert) {
    Backend *backend = test_backend(2);
    Values x = values_random(5 * 4, 1);
    float *weight = floats_filled(6 * 4, 0); // all logits are equal
    RouteArgs args = {.tokens = 5,
                      .hidden_size = 4,
                      .num_experts = 6,
                      .top_k = 3,
                      .gate_kind = GATE_SOFTMAX,
                      .gate_scale = 1,
                      .x = x.f,
                      .weight = weight,
                      .routing = routing_poisoned(5, 6, 3)};
    RUN_OP(backend, OP_ROUTE, route_forward, &args);
    for (int t = 0; t < 5; t++)
        for (int j = 0; j < 3; j++) ck_assert_int_eq(args.routing.expert[t * 3 + j], j);
}
END_TEST

// A bias may choose an expert whose probability underflows to 0; gates and gradients stay finite.
START_TEST(expert_of_probability_zero) {
    Backend *backend = test_backend(1);
    float x[1] = {1}, weight[3] = {500, -500, -500}, bias[3] = {-3, 0, 0.5f};
    float dgate[2] = {1, -2}, dx[1] = {0}, grad[3] = {0};
    for (int kind = GATE_SOFTMAX; kind <= GATE_STRAIGHT_THROUGH; kind++) {
        RouteArgs args = {.tokens = 1,
                          .hidden_size = 1,
                          .num_experts = 3,
                          .top_k = 2,
                          .gate_kind = (RouterGate)kind,
                          .gate_scale = 1,
                          .x = x,
                          .weight = weight,
                          .selection_bias = bias,
                          .routing = routing_poisoned(1, 3, 2),
                          .dgate = dgate,
                          .dx = dx,
                          .grad_weight = grad};
        RUN_OP(backend, OP_ROUTE, route_forward, &args);
        RUN_OP(backend, OP_ROUTE, route_backward, &args);
        ck_assert_int_eq(args.routing.expert[0], 2);
        ck_assert_int_eq(args.routing.expert[1], 1);
        for (int j = 0; j < 2; j++)
            ck_assert(args.routing.gate[j] == (kind == GATE_SOFTMAX ? 0.0f : 0.5f));
        ck_assert(isfinite(dx[0]) && isfinite(grad[0]) && isfinite(grad[1]) && isfinite(grad[2]));
    }
}
END_TEST

// NaN logits: the probabilities say so, and the choice is still k valid, distinct experts.
START_TEST(nan_logits_keep_the_choice_valid) {
    Backend *backend = test_backend(2);
    float x[2] = {NAN, 1}, *weight = floats_filled(4, 1);
    RouteArgs args = {.tokens = 2,
                      .hidden_size = 1,
                      .num_experts = 4,
                      .top_k = 2,
                      .gate_kind = GATE_RENORM,
                      .gate_scale = 1,
                      .x = x,
                      .weight = weight,
                      .routing = routing_poisoned(2, 4, 2)};
    RUN_OP(backend, OP_ROUTE, route_forward, &args);
    ck_assert(isnan(args.routing.probabilities[0]));
    ck_assert(args.routing.probabilities[4] == 0.25f);
    check_grouping(&args.routing, 2, 4, 2);
    ck_assert_int_ne(args.routing.expert[0], args.routing.expert[1]);
}
END_TEST

// --- router_loss --------------------------------------------------------------------------------

START_TEST(router_loss_sums) {
    enum { EXPERTS = 5, K = 2 };
    const int64_t sizes[] = {1, 17, 333};
    for (int n = 0; n < 3; n++) {
        const int64_t tokens = sizes[n];
        RouteRef r = random_route(tokens, 7, EXPERTS, K, GATE_SOFTMAX, false);
        RouteArgs route = {.tokens = tokens,
                           .hidden_size = 7,
                           .num_experts = EXPERTS,
                           .top_k = K,
                           .gate_kind = GATE_SOFTMAX,
                           .gate_scale = 1,
                           .x = r.x.f,
                           .weight = r.weight.f,
                           .routing = routing_poisoned(tokens, EXPERTS, K)};
        Backend *backend = test_backend(thread_counts[n]);
        RUN_OP(backend, OP_ROUTE, route_forward, &route);
        double assignments[EXPERTS], probability[EXPERTS], entropy = 3, z = 4;
        for (int e = 0; e < EXPERTS; e++) assignments[e] = 1, probability[e] = 2;
        RouterLossArgs args = {
            tokens, EXPERTS, K, route.routing, {assignments, probability, &entropy, &z}};
        RUN_OP(backend, OP_ROUTER_LOSS, router_loss, &args);
        double expected_entropy = 3, expected_z = 4;
        for (int e = 0; e < EXPERTS; e++) {
            double count = 1, sum = 2;
            for (int64_t slot = 0; slot < tokens * K; slot++) count += r.expert[slot] == e;
            for (int64_t t = 0; t < tokens; t++) {
                double p = r.p[t * EXPERTS + e];
                sum += p;
                expected_entropy -= p * log(p);
            }
            ck_assert(assignments[e] == count); // exact
            // fp32 probabilities, summed in double
            ck_assert_double_eq_tol(probability[e], sum, 1e-6 * sum);
        }
        for (int64_t t = 0; t < tokens; t++) expected_z += r.lse[t] * r.lse[t];
        ck_assert_double_eq_tol(entropy, expected_entropy, 1e-6 * expected_entropy);
        ck_assert_double_eq_tol(z, expected_z, 1e-6 * expected_z);
    }
}
END_TEST

TEST_MAIN("router", TEST(route_matches_reference), TEST(straight_through_with_one_expert),
          TEST(ties_go_to_the_lower_expert), TEST(expert_of_probability_zero),
          TEST(nan_logits_keep_the_choice_valid), TEST(router_loss_sums))
