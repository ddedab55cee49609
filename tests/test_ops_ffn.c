// The dense and the expert SwiGLU MLP against plain double-precision references.
#include "tests/ops.h"

static const int thread_counts[] = {1, 2, 3};
enum { THREAD_COUNTS = 3 };

static float *floats_copied(Values v) {
    float *f = test_take(sizeof(float) * (size_t)v.count);
    memcpy(f, v.f, sizeof(float) * (size_t)v.count);
    return f;
}

// out[o] += scale · MLP(x)[o], one token.
static void mlp_reference(const double *x, const double *gate_up, const double *down, int hidden,
                          int inner, double scale, double *out) {
    for (int i = 0; i < inner; i++) {
        double gate = 0, up = 0;
        for (int h = 0; h < hidden; h++) {
            gate += x[h] * gate_up[i * hidden + h];
            up += x[h] * gate_up[(inner + i) * hidden + h];
        }
        const double activation = gate / (1 + exp(-gate)) * up * scale;
        for (int h = 0; h < hidden; h++) out[h] += activation * down[h * inner + i];
    }
}

// --- ffn ----------------------------------------------------------------------------------------

typedef struct FfnRef {
    int64_t tokens;
    int hidden, inner;
    Values x, gate_up, down, dout;
} FfnRef;

static void ffn_reference(const FfnRef *r, double *out) {
    for (int64_t i = 0; i < r->tokens * r->hidden; i++) out[i] = 0;
    for (int64_t t = 0; t < r->tokens; t++)
        mlp_reference(r->x.d + t * r->hidden, r->gate_up.d, r->down.d, r->hidden, r->inner, 1,
                      out + t * r->hidden);
}
static double ffn_objective(const void *context) {
    const FfnRef *r = context;
    static double out[20000];
    ffn_reference(r, out);
    double sum = 0;
    for (int64_t i = 0; i < r->dout.count; i++) sum += out[i] * r->dout.d[i];
    return sum;
}

static void check_ffn(Backend *backend, int64_t tokens, int hidden, int inner, bool keep) {
    FfnRef r = {tokens,
                hidden,
                inner,
                values_random(tokens * hidden, 1),
                values_random(2 * inner * hidden, 0.7),
                values_random(hidden * inner, 1),
                values_random(tokens * hidden, 1)};
    Values gate_up_before = values_random(2 * inner * hidden, 1);
    Values down_before = values_random(hidden * inner, 1);
    FfnArgs args = {tokens,
                    hidden,
                    inner,
                    r.x.f,
                    r.gate_up.f,
                    r.down.f,
                    floats_poisoned(tokens * hidden),
                    floats_poisoned(tokens * 2 * inner),
                    keep ? floats_poisoned(tokens * inner) : NULL,
                    r.dout.f,
                    floats_poisoned(tokens * hidden),
                    false,
                    floats_copied(gate_up_before),
                    floats_copied(down_before)};
    RUN_OP(backend, OP_FFN, ffn_forward, &args);
    double *out = doubles_zero(tokens * hidden);
    ffn_reference(&r, out);
    check_close("ffn", args.out, out, tokens * hidden, OPS_TOLERANCE);
    RUN_OP(backend, OP_FFN, ffn_backward, &args);
    check_gradient("ffn dx", args.dx, NULL, r.x, ffn_objective, &r, OPS_TOLERANCE);
    check_gradient("ffn gate_up", args.grad_gate_up, gate_up_before.f, r.gate_up, ffn_objective, &r,
                   OPS_TOLERANCE);
    check_gradient("ffn down", args.grad_down, down_before.f, r.down, ffn_objective, &r,
                   OPS_TOLERANCE);
    FfnArgs again = args;
    again.dx = floats_poisoned(tokens * hidden);
    again.grad_gate_up = floats_copied(gate_up_before);
    again.grad_down = floats_copied(down_before);
    RUN_OP(backend, OP_FFN, ffn_backward, &again);
    check_equal("ffn dx", again.dx, args.dx, sizeof(float) * (size_t)(tokens * hidden));
    check_equal("ffn gate_up", again.grad_gate_up, args.grad_gate_up,
                sizeof(float) * (size_t)(2 * inner * hidden));
    again.grad_assign = true;
    again.grad_gate_up = floats_poisoned(2 * inner * hidden);
    again.grad_down = floats_poisoned(hidden * inner);
    RUN_OP(backend, OP_FFN, ffn_backward, &again);
    check_gradient("ffn gate_up =", again.grad_gate_up, NULL, r.gate_up, ffn_objective, &r,
                   OPS_TOLERANCE);
    check_gradient("ffn down =", again.grad_down, NULL, r.down, ffn_objective, &r, OPS_TOLERANCE);
    again.out = NULL; // only what backward reads
    again.gate_up = floats_poisoned(tokens * 2 * inner);
    again.activation = keep ? floats_poisoned(tokens * inner) : NULL;
    RUN_OP(backend, OP_FFN, ffn_forward, &again);
    check_equal("ffn saved gate_up", again.gate_up, args.gate_up,
                sizeof(float) * (size_t)(tokens * 2 * inner));
    if (keep)
        check_equal("ffn saved activation", again.activation, args.activation,
                    sizeof(float) * (size_t)(tokens * inner));
}

START_TEST(ffn_matches_reference) {
    for (int n = 0; n < THREAD_COUNTS; n++) {
        Backend *backend = test_backend(thread_counts[n]);
        for (int keep = 0; keep < 2; keep++) {
            check_ffn(backend, 1, 1, 1, keep);
            check_ffn(backend, 1, 5, 300, keep); // one token: tiles side by side
            check_ffn(backend, 7, 6, 9, keep);
            check_ffn(backend, 290, 12, 21, keep); // several tiles of rows
        }
    }
}
END_TEST

// --- moe_ffn ------------------------------------------------------------------------------------

typedef struct MoeRef {
    int64_t tokens;
    int hidden, inner, experts, k;
    Values x, gate_up, down, gate, dout;
    const int32_t *expert; // (T, k)
} MoeRef;

static void moe_reference(const MoeRef *r, double *out) {
    for (int64_t i = 0; i < r->tokens * r->hidden; i++) out[i] = 0;
    for (int64_t slot = 0; slot < r->tokens * r->k; slot++) {
        const int64_t t = slot / r->k, matrix = (int64_t)r->inner * r->hidden;
        mlp_reference(r->x.d + t * r->hidden, r->gate_up.d + r->expert[slot] * 2 * matrix,
                      r->down.d + r->expert[slot] * matrix, r->hidden, r->inner, r->gate.d[slot],
                      out + t * r->hidden);
    }
}
static double moe_objective(const void *context) {
    const MoeRef *r = context;
    static double out[20000];
    moe_reference(r, out);
    double sum = 0;
    for (int64_t i = 0; i < r->dout.count; i++) sum += out[i] * r->dout.d[i];
    return sum;
}

// The grouping that route_forward would make of `expert`.
static Routing routing_of(const MoeRef *r, int32_t *expert) {
    const int64_t slots = r->tokens * r->k;
    Routing routing = {.expert = expert, .gate = r->gate.f};
    routing.slot_of_row = test_take(sizeof(int32_t) * (size_t)slots);
    routing.row_of_slot = test_take(sizeof(int32_t) * (size_t)slots);
    routing.expert_begin = test_take(sizeof(int32_t) * ((size_t)r->experts + 1));
    int32_t row = 0;
    for (int e = 0; e < r->experts; e++) {
        routing.expert_begin[e] = row;
        for (int64_t slot = 0; slot < slots; slot++) {
            if (expert[slot] != e) continue;
            routing.row_of_slot[slot] = row;
            routing.slot_of_row[row++] = (int32_t)slot;
        }
    }
    routing.expert_begin[r->experts] = row;
    return routing;
}

typedef enum Spread { SPREAD_RANDOM, SPREAD_ONE_EXPERT, SPREAD_ONE_EMPTY } Spread;

// k different experts for every token.
static int32_t *choose(int64_t tokens, int experts, int k, Spread spread) {
    int32_t *expert = test_take(sizeof(int32_t) * (size_t)(tokens * k));
    for (int64_t t = 0; t < tokens; t++) {
        int first = spread == SPREAD_ONE_EXPERT ? experts - 1 : test_random_int(experts);
        if (spread == SPREAD_ONE_EMPTY && first == 1) first = 2;
        for (int j = 0; j < k; j++) expert[t * k + j] = (first + j) % experts;
    }
    return expert;
}

static void check_moe(Backend *backend, int64_t tokens, int hidden, int inner, int experts, int k,
                      Spread spread) {
    const int64_t matrix = (int64_t)inner * hidden, rows = tokens * k;
    MoeRef r = {tokens,
                hidden,
                inner,
                experts,
                k,
                values_random(tokens * hidden, 1),
                values_random(experts * 2 * matrix, 0.7),
                values_random(experts * matrix, 1),
                values_random(rows, 1),
                values_random(tokens * hidden, 1),
                NULL};
    int32_t *expert = choose(tokens, experts, k, spread);
    r.expert = expert;
    Values gate_up_before = values_random(experts * 2 * matrix, 1);
    Values down_before = values_random(experts * matrix, 1);
    MoeFfnArgs args = {tokens,
                       hidden,
                       inner,
                       experts,
                       k,
                       r.x.f,
                       r.gate_up.f,
                       r.down.f,
                       routing_of(&r, expert),
                       floats_poisoned(tokens * hidden),
                       floats_poisoned(rows * 2 * inner),
                       r.dout.f,
                       floats_poisoned(tokens * hidden),
                       floats_poisoned(rows),
                       false,
                       floats_copied(gate_up_before),
                       floats_copied(down_before)};
    RUN_OP(backend, OP_MOE_FFN, moe_ffn_forward, &args);
    double *out = doubles_zero(tokens * hidden);
    moe_reference(&r, out);
    check_close("moe_ffn", args.out, out, tokens * hidden, OPS_TOLERANCE);
    RUN_OP(backend, OP_MOE_FFN, moe_ffn_backward, &args);
    check_gradient("moe dx", args.dx, NULL, r.x, moe_objective, &r, OPS_TOLERANCE);
    check_gradient("moe dgate", args.dgate, NULL, r.gate, moe_objective, &r, OPS_TOLERANCE);
    check_gradient("moe gate_up", args.grad_gate_up, gate_up_before.f, r.gate_up, moe_objective, &r,
                   OPS_TOLERANCE);
    check_gradient("moe down", args.grad_down, down_before.f, r.down, moe_objective, &r,
                   OPS_TOLERANCE);
    MoeFfnArgs again = args;
    again.dx = floats_poisoned(tokens * hidden);
    again.dgate = floats_poisoned(rows);
    again.grad_gate_up = floats_copied(gate_up_before);
    again.grad_down = floats_copied(down_before);
    RUN_OP(backend, OP_MOE_FFN, moe_ffn_backward, &again);
    check_equal("moe dx", again.dx, args.dx, sizeof(float) * (size_t)(tokens * hidden));
    check_equal("moe dgate", again.dgate, args.dgate, sizeof(float) * (size_t)rows);
    check_equal("moe down", again.grad_down, args.grad_down,
                sizeof(float) * (size_t)(experts * matrix));
    again.grad_assign = true;
    again.grad_gate_up = floats_poisoned(experts * 2 * matrix);
    again.grad_down = floats_poisoned(experts * matrix);
    RUN_OP(backend, OP_MOE_FFN, moe_ffn_backward, &again);
    check_gradient("moe gate_up =", again.grad_gate_up, NULL, r.gate_up, moe_objective, &r,
                   OPS_TOLERANCE);
    check_gradient("moe down =", again.grad_down, NULL, r.down, moe_objective, &r, OPS_TOLERANCE);
    again.out = NULL; // only what backward reads
    again.gate_up = floats_poisoned(rows * 2 * inner);
    RUN_OP(backend, OP_MOE_FFN, moe_ffn_forward, &again);
    check_equal("moe saved gate_up", again.gate_up, args.gate_up,
                sizeof(float) * (size_t)(rows * 2 * inner));
}

START_TEST(moe_ffn_matches_reference) {
    for (int n = 0; n < THREAD_COUNTS; n++) {
        Backend *backend = test_backend(thread_counts[n]);
        check_moe(backend, 1, 1, 1, 1, 1, SPREAD_RANDOM);
        check_moe(backend, 1, 3, 5, 4, 1, SPREAD_RANDOM); // one token
        check_moe(backend, 9, 4, 3, 3, 2, SPREAD_RANDOM);
        check_moe(backend, 5, 3, 4, 3, 3, SPREAD_RANDOM); // k = N
        check_moe(backend, 40, 6, 7, 4, 1, SPREAD_ONE_EXPERT);
        check_moe(backend, 40, 6, 7, 4, 1, SPREAD_ONE_EMPTY);
        check_moe(backend, 300, 6, 9, 3, 1, SPREAD_RANDOM);
        check_moe(backend, 330, 5, 3, 2, 1, SPREAD_ONE_EXPERT); // several tiles of one expert
    }
}
END_TEST

// An inner size above the widest tile: dgate is a sum over tiles.
START_TEST(moe_ffn_with_wide_experts) {
    check_moe(test_backend(2), 3, 2, 2100, 2, 2, SPREAD_RANDOM);
    check_ffn(test_backend(2), 3, 2, 2100, false);
}
END_TEST

// No token chose any of the experts: nothing to read or write but the gradients, which are zeros.
START_TEST(moe_ffn_without_tokens) {
    enum { HIDDEN = 6, INNER = 5, EXPERTS = 3, MATRIX = EXPERTS * HIDDEN * INNER };
    int32_t begin[EXPERTS + 1] = {0};
    for (int n = 0; n < THREAD_COUNTS; n++) {
        Backend *backend = test_backend(thread_counts[n]);
        Values gate_up = values_random(2 * MATRIX, 1), down = values_random(MATRIX, 1);
        float *grad_gate_up = floats_copied(gate_up), *grad_down = floats_copied(down), none[1];
        MoeFfnArgs args = {.tokens = 0,
                           .hidden_size = HIDDEN,
                           .intermediate_size = INNER,
                           .num_experts = EXPERTS,
                           .top_k = 1,
                           .x = none,
                           .weight_gate_up = gate_up.f,
                           .weight_down = down.f,
                           .routing = {.expert_begin = begin},
                           .out = none,
                           .gate_up = none,
                           .dout = none,
                           .dx = none,
                           .dgate = none,
                           .grad_gate_up = grad_gate_up,
                           .grad_down = grad_down};
        RUN_OP(backend, OP_MOE_FFN, moe_ffn_forward, &args);
        RUN_OP(backend, OP_MOE_FFN, moe_ffn_backward, &args);
        check_equal("gate_up +=", grad_gate_up, gate_up.f, sizeof(float) * 2 * MATRIX);
        check_equal("down +=", grad_down, down.f, sizeof(float) * MATRIX);
        args.grad_assign = true;
        args.grad_gate_up = grad_gate_up = floats_poisoned(2 * MATRIX);
        args.grad_down = grad_down = floats_poisoned(MATRIX);
        RUN_OP(backend, OP_MOE_FFN, moe_ffn_backward, &args);
        for (int i = 0; i < 2 * MATRIX; i++) ck_assert(grad_gate_up[i] == 0.0f);
        for (int i = 0; i < MATRIX; i++) ck_assert(grad_down[i] == 0.0f);
    }
}
END_TEST

// One expert and a gate of 1 is the dense MLP.
START_TEST(one_expert_is_the_dense_mlp) {
    Backend *backend = test_backend(2);
    enum { TOKENS = 70, HIDDEN = 8, INNER = 12 };
    int32_t expert[TOKENS] = {0};
    MoeRef r = {TOKENS,
                HIDDEN,
                INNER,
                1,
                1,
                values_random(TOKENS * HIDDEN, 1),
                values_random(2 * INNER * HIDDEN, 1),
                values_random(INNER * HIDDEN, 1),
                values_random(TOKENS, 1),
                {0},
                expert};
    for (int t = 0; t < TOKENS; t++) r.gate.f[t] = 1.0f;
    MoeFfnArgs moe = {.tokens = TOKENS,
                      .hidden_size = HIDDEN,
                      .intermediate_size = INNER,
                      .num_experts = 1,
                      .top_k = 1,
                      .x = r.x.f,
                      .weight_gate_up = r.gate_up.f,
                      .weight_down = r.down.f,
                      .routing = routing_of(&r, expert),
                      .out = floats_poisoned(TOKENS * HIDDEN),
                      .gate_up = floats_poisoned(TOKENS * 2 * INNER)};
    FfnArgs dense = {.tokens = TOKENS,
                     .hidden_size = HIDDEN,
                     .intermediate_size = INNER,
                     .x = r.x.f,
                     .weight_gate_up = r.gate_up.f,
                     .weight_down = r.down.f,
                     .out = floats_poisoned(TOKENS * HIDDEN),
                     .gate_up = floats_poisoned(TOKENS * 2 * INNER)};
    RUN_OP(backend, OP_MOE_FFN, moe_ffn_forward, &moe);
    RUN_OP(backend, OP_FFN, ffn_forward, &dense);
    double *expected = doubles_zero(TOKENS * HIDDEN);
    for (int i = 0; i < TOKENS * HIDDEN; i++) expected[i] = ((float *)dense.out)[i];
    check_close("one expert", moe.out, expected, TOKENS * HIDDEN, OPS_TOLERANCE);
}
END_TEST

// Memory is planned for the most tokens; a call with fewer must not need more.
START_TEST(moe_workspace_never_shrinks_with_tokens) {
    static const int widths[][2] = {{64, 608}, {896, 608}, {896, 4864}}, threads[] = {1, 8, 32};
    for (int t = 0; t < 3; t++) {
        Backend *backend;
        ck_assert_ok(backend_cpu(threads[t], &backend));
        for (int w = 0; w < 3; w++) {
            size_t before = 0;
            for (int64_t tokens = 0; tokens < 4200; tokens++) {
                const MoeFfnArgs args = {.tokens = tokens,
                                         .hidden_size = widths[w][0],
                                         .intermediate_size = widths[w][1],
                                         .num_experts = 6,
                                         .top_k = 1};
                size_t bytes = backend->ops->workspace_bytes(backend, OP_MOE_FFN, &args);
                ck_assert_msg(bytes >= before,
                              "%d threads, %d x %d: %zu bytes for %lld tokens, "
                              "%zu for one fewer",
                              threads[t], widths[w][0], widths[w][1], bytes, (long long)tokens,
                              before);
                before = bytes;
            }
        }
        backend_destroy(backend);
    }
}
END_TEST

TEST_MAIN("dense and expert MLP", TEST(ffn_matches_reference), TEST(moe_ffn_matches_reference),
          TEST(moe_ffn_with_wide_experts), TEST(moe_ffn_without_tokens),
          TEST(one_expert_is_the_dense_mlp), TEST(moe_workspace_never_shrinks_with_tokens))
