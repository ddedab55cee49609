// linear_cross_entropy against a plain double-precision reference.
#include "tests/ops.h"

static const int thread_counts[] = {1, 2, 3};
enum { THREAD_COUNTS = 3 };

typedef struct LossRef {
    int64_t tokens;
    int hidden, vocab;
    double scale;
    Values x, weight;
    const int32_t *targets;
    double *losses; // (T) filled by the reference
} LossRef;

static double loss_objective(const void *context) {
    const LossRef *r = context;
    static double logits[8192];
    double total = 0;
    for (int64_t t = 0; t < r->tokens; t++) {
        r->losses[t] = 0;
        if (r->targets[t] < 0) continue;
        double highest = -INFINITY, sum = 0;
        for (int v = 0; v < r->vocab; v++) {
            logits[v] = 0;
            for (int h = 0; h < r->hidden; h++)
                logits[v] += r->x.d[t * r->hidden + h] * r->weight.d[v * r->hidden + h];
            highest = fmax(highest, logits[v]);
        }
        for (int v = 0; v < r->vocab; v++) sum += exp(logits[v] - highest);
        r->losses[t] = highest + log(sum) - logits[r->targets[t]];
        total += r->losses[t];
    }
    return r->scale * total;
}

static int32_t *random_targets(int64_t tokens, int vocab, int ignore_one_in) {
    int32_t *targets = test_take(sizeof(int32_t) * (size_t)tokens);
    for (int64_t t = 0; t < tokens; t++)
        targets[t] = test_random_int(ignore_one_in) == 0 ? -1 : test_random_int(vocab);
    return targets;
}

static void check_loss(Backend *backend, int64_t tokens, int hidden, int vocab, int64_t chunk) {
    LossRef r = {tokens,
                 hidden,
                 vocab,
                 0.125,
                 values_random(tokens * hidden, 1),
                 values_random((int64_t)vocab * hidden, 1),
                 random_targets(tokens, vocab, 5),
                 doubles_zero(tokens)};
    Values before = values_random((int64_t)vocab * hidden, 1);
    float *grad = test_take(sizeof(float) * (size_t)(vocab * hidden));
    memcpy(grad, before.f, sizeof(float) * (size_t)(vocab * hidden));
    double loss_sum = 10, loss_count = 20;
    LinearCrossEntropyArgs args = {tokens,
                                   hidden,
                                   vocab,
                                   chunk,
                                   r.x.f,
                                   r.weight.f,
                                   r.targets,
                                   0.125f,
                                   &loss_sum,
                                   &loss_count,
                                   floats_poisoned(tokens),
                                   floats_poisoned(tokens * hidden),
                                   false,
                                   grad};
    RUN_OP(backend, OP_LINEAR_CROSS_ENTROPY, linear_cross_entropy, &args);
    const double expected = loss_objective(&r) / r.scale;
    double count = 0;
    for (int64_t t = 0; t < tokens; t++) count += r.targets[t] >= 0;
    check_close("token loss", args.token_loss, r.losses, tokens, OPS_TOLERANCE);
    ck_assert_double_eq_tol(loss_sum - 10, expected, OPS_TOLERANCE * (1 + expected));
    ck_assert(loss_count - 20 == count);
    if (count > 0) {
        check_gradient("loss dx", args.dx, NULL, r.x, loss_objective, &r, OPS_TOLERANCE);
        check_gradient("loss weight", grad, before.f, r.weight, loss_objective, &r, OPS_TOLERANCE);
    }
    for (int64_t t = 0; t < tokens; t++) // ignored tokens get exactly nothing
        for (int h = 0; h < hidden && r.targets[t] < 0; h++)
            ck_assert(((float *)args.dx)[t * hidden + h] == 0.0f);

    LinearCrossEntropyArgs assigned = args;
    double unused[2] = {0, 0};
    assigned.loss_sum = &unused[0];
    assigned.loss_count = &unused[1];
    assigned.grad_assign = true;
    assigned.grad_weight = floats_poisoned((int64_t)vocab * hidden);
    RUN_OP(backend, OP_LINEAR_CROSS_ENTROPY, linear_cross_entropy, &assigned);
    if (count > 0)
        check_gradient("loss weight =", assigned.grad_weight, NULL, r.weight, loss_objective, &r,
                       OPS_TOLERANCE);

    // Without gradients: the same losses, bit for bit.
    double loss_only = 10, count_only = 20;
    LinearCrossEntropyArgs forward = args;
    forward.loss_sum = &loss_only;
    forward.loss_count = &count_only;
    forward.token_loss = NULL;
    forward.dx = forward.grad_weight = NULL;
    RUN_OP(backend, OP_LINEAR_CROSS_ENTROPY, linear_cross_entropy, &forward);
    ck_assert(loss_only == loss_sum && count_only == loss_count);
}

START_TEST(cross_entropy_matches_reference) {
    for (int n = 0; n < THREAD_COUNTS; n++) {
        Backend *backend = test_backend(thread_counts[n]);
        check_loss(backend, 1, 3, 2, 0);
        check_loss(backend, 9, 4, 11, 0);
        check_loss(backend, 9, 4, 11, 2); // chunks, the last one short
        check_loss(backend, 5, 3, 19, 1000);
        check_loss(backend, 300, 8, 259, 0);
        check_loss(backend, 300, 8, 33, 64);
        check_loss(backend, 3, 2, 5000, 0); // several tiles of columns
    }
}
END_TEST

START_TEST(all_targets_ignored) {
    Backend *backend = test_backend(2);
    Values x = values_random(4 * 3, 1), weight = values_random(7 * 3, 1);
    int32_t targets[4] = {-1, -1, -1, -1};
    double sum = 0, count = 0;
    float *grad = floats_filled(21, 2.0f);
    LinearCrossEntropyArgs args = {4,
                                   3,
                                   7,
                                   0,
                                   x.f,
                                   weight.f,
                                   targets,
                                   1,
                                   &sum,
                                   &count,
                                   floats_poisoned(4),
                                   floats_poisoned(12),
                                   false,
                                   grad};
    RUN_OP(backend, OP_LINEAR_CROSS_ENTROPY, linear_cross_entropy, &args);
    ck_assert(sum == 0 && count == 0);
    for (int i = 0; i < 12; i++) ck_assert(((float *)args.dx)[i] == 0.0f);
    for (int i = 0; i < 21; i++) ck_assert(grad[i] == 2.0f);
}
END_TEST

START_TEST(bad_targets_are_refused) {
    Backend *backend = test_backend(2);
    Values x = values_random(2 * 3, 1), weight = values_random(7 * 3, 1);
    double sum = 0, count = 0;
    int32_t targets[2] = {6, 7};
    LinearCrossEntropyArgs args = {.tokens = 2,
                                   .hidden_size = 3,
                                   .vocab_size = 7,
                                   .x = x.f,
                                   .weight = weight.f,
                                   .targets = targets,
                                   .loss_sum = &sum,
                                   .loss_count = &count};
    size_t bytes;
    char *memory = test_set_workspace(backend, OP_LINEAR_CROSS_ENTROPY, &args, &bytes);
    ck_assert_fails(backend->ops->linear_cross_entropy(backend, &args), STATUS_BAD_DATA,
                    "target 7 at position 1");
    ck_assert(sum == 0 && count == 0);
    test_drop_workspace(backend, memory, bytes);
}
END_TEST

// Logits of ±1e4 neither overflow nor lose the loss.
START_TEST(large_logits) {
    Backend *backend = test_backend(1);
    float x[1] = {100}, weight[3] = {100, -100, 99.9f};
    int32_t targets[1] = {1};
    double sum = 0, count = 0;
    float dx[1] = {NAN}, grad[3] = {0};
    LinearCrossEntropyArgs args = {1, 1,    3,      0,    x,  weight, targets,
                                   1, &sum, &count, NULL, dx, false,  grad};
    RUN_OP(backend, OP_LINEAR_CROSS_ENTROPY, linear_cross_entropy, &args);
    ck_assert_double_eq_tol(sum, 20000, 0.01); // fp32 logits of 1e4
    ck_assert(isfinite(dx[0]) && grad[1] == -100.0f);
}
END_TEST

START_TEST(nan_reaches_the_loss) {
    Backend *backend = test_backend(2);
    Values x = values_random(3 * 2, 1), weight = values_random(40 * 2, 1);
    weight.f[20] = NAN;
    int32_t targets[3] = {0, 1, 2};
    double sum = 0, count = 0;
    LinearCrossEntropyArgs args = {3,       2,
                                   40,      0,
                                   x.f,     weight.f,
                                   targets, 1,
                                   &sum,    &count,
                                   NULL,    floats_poisoned(6),
                                   false,   floats_filled(80, 0)};
    RUN_OP(backend, OP_LINEAR_CROSS_ENTROPY, linear_cross_entropy, &args);
    ck_assert(isnan(sum));
}
END_TEST

TEST_MAIN("linear cross-entropy", TEST(cross_entropy_matches_reference), TEST(all_targets_ignored),
          TEST(bad_targets_are_refused), TEST(large_logits), TEST(nan_reaches_the_loss))
