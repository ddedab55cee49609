// embed, linear, rmsnorm, adamw, the utilities, memory and workspace of a backend.
#include <omp.h>
#include "tests/ops.h"

static const int thread_counts[] = {1, 2, 3};
enum { THREAD_COUNTS = 3 };

// --- Memory and workspace -----------------------------------------------------------------------

static bool all_zero(const void *memory, size_t bytes) {
    const char *at = memory;
    return bytes == 0 || (at[0] == 0 && memcmp(at, at + 1, bytes - 1) == 0);
}

START_TEST(memory_is_zeroed_and_aligned) {
    Backend *backend = test_backend(2);
    const size_t sizes[] = {0, 1, 1000, 3 << 20, (20 << 20) + 12345};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        for (int host = 0; host < 2; host++) {
            char *memory = NULL;
            ck_assert_ok((host ? backend->ops->host_alloc : backend->ops->alloc)(backend, sizes[i],
                                                                                 (void **)&memory));
            ck_assert_uint_eq((uintptr_t)memory % 256, 0);
            ck_assert(all_zero(memory, sizes[i]));
            if (sizes[i]) memory[0] = memory[sizes[i] - 1] = 1;
            (host ? backend->ops->host_release : backend->ops->release)(backend, memory);
        }
    }
    backend->ops->release(backend, NULL);
    void *memory;
    ck_assert_fails(backend->ops->alloc(backend, SIZE_MAX - 100, &memory), STATUS_INTERNAL,
                    "out of memory");
}
END_TEST

START_TEST(copies_and_zero) {
    Backend *backend = test_backend(3);
    enum { BYTES = (2 << 20) + 77 }; // more than two parts, the last one short
    unsigned char *a = test_take(BYTES), *b = test_take(BYTES), *c = test_take(BYTES);
    for (int i = 0; i < BYTES; i++) a[i] = (unsigned char)(i * 31 + i / 251);
    ck_assert_ok(backend->ops->upload(backend, b, a, BYTES));
    ck_assert_ok(backend->ops->copy(backend, c, b, BYTES));
    ck_assert_ok(backend->ops->zero(backend, b, BYTES));
    ck_assert(all_zero(b, BYTES));
    ck_assert_ok(backend->ops->download(backend, b, c, BYTES));
    check_equal("copies", a, b, BYTES);
    ck_assert_ok(backend->ops->copy(backend, b, a, 0));
    ck_assert_ok(backend->ops->synchronize(backend));
}
END_TEST

START_TEST(small_workspace_is_refused) {
    Backend *backend = test_backend(2);
    Values x = values_random(4 * 8, 1);
    RmsNormArgs args = {.tokens = 4,
                        .hidden_size = 8,
                        .epsilon = 1e-6f,
                        .x = x.f,
                        .weight = x.f,
                        .x_out = x.f,
                        .out = floats_poisoned(32),
                        .inv_rms = floats_poisoned(4),
                        .dout = x.f,
                        .dx = floats_filled(32, 0),
                        .grad_weight = floats_filled(8, 0)};
    size_t bytes = backend->ops->workspace_bytes(backend, OP_RMSNORM, &args);
    ck_assert_uint_gt(bytes, 0);
    void *memory;
    ck_assert_ok(backend->ops->alloc(backend, bytes, &memory));
    backend->ops->set_workspace(backend, memory, bytes - 1);
    ck_assert_fails(backend->ops->rmsnorm_backward(backend, &args), STATUS_INTERNAL, "workspace");
    backend->ops->set_workspace(backend, memory, bytes);
    ck_assert_ok(backend->ops->rmsnorm_backward(backend, &args));
    backend->ops->release(backend, memory);
}
END_TEST

START_TEST(threads_are_fixed_at_creation) {
    Backend *backend;
    ck_assert_ok(backend_cpu(3, &backend));
    ck_assert_int_eq(backend->num_threads, 3);
    ck_assert_str_eq(backend->name, "cpu");
    ck_assert_int_eq(backend->compute_dtype, DTYPE_F32);
    backend_destroy(backend);
    omp_set_num_threads(5);                   // as OMP_NUM_THREADS does
    for (int again = 0; again < 2; again++) { // creating a backend leaves the default as it was
        ck_assert_ok(backend_cpu(0, &backend));
        ck_assert_int_eq(backend->num_threads, 5);
        backend_destroy(backend);
    }
    ck_assert_ok(backend_cpu(1, &backend));
    backend_destroy(backend);
    backend_destroy(NULL);
}
END_TEST

// --- embed --------------------------------------------------------------------------------------

START_TEST(embed_gathers_and_scatters) {
    enum { TOKENS = 23, HIDDEN = 5, VOCAB = 7 };
    for (int n = 0; n < THREAD_COUNTS; n++) {
        Backend *backend = test_backend(thread_counts[n]);
        int32_t ids[TOKENS];
        for (int t = 0; t < TOKENS; t++) ids[t] = test_random_int(VOCAB);
        Values weight = values_random(VOCAB * HIDDEN, 1), dout = values_random(TOKENS * HIDDEN, 1);
        Values before = values_random(VOCAB * HIDDEN, 1);
        float *grad = test_take(sizeof(float) * VOCAB * HIDDEN);
        memcpy(grad, before.f, sizeof(float) * VOCAB * HIDDEN);
        EmbedArgs args = {TOKENS, HIDDEN, VOCAB, ids, weight.f, floats_poisoned(TOKENS * HIDDEN),
                          dout.f, grad};
        RUN_OP(backend, OP_EMBED, embed_forward, &args);
        RUN_OP(backend, OP_EMBED, embed_backward, &args);
        for (int t = 0; t < TOKENS; t++)
            check_equal("embed", (float *)args.out + t * HIDDEN, weight.f + ids[t] * HIDDEN,
                        sizeof(float) * HIDDEN);
        for (int t = 0; t < TOKENS; t++)
            for (int h = 0; h < HIDDEN; h++)
                before.d[ids[t] * HIDDEN + h] += dout.d[t * HIDDEN + h];
        check_close("embedding gradient", grad, before.d, VOCAB * HIDDEN, OPS_TOLERANCE);
    }
}
END_TEST

START_TEST(embed_refuses_bad_ids) {
    Backend *backend = test_backend(2);
    float weight[8] = {0}, out[6];
    for (int bad = 0; bad < 2; bad++) {
        int32_t ids[3] = {0, 3, bad ? 4 : -1};
        EmbedArgs args = {.tokens = 3,
                          .hidden_size = 2,
                          .vocab_size = 4,
                          .ids = ids,
                          .weight = weight,
                          .out = out};
        ck_assert_fails(backend->ops->embed_forward(backend, &args), STATUS_BAD_DATA,
                        bad ? "token id 4 at position 2" : "token id -1 at position 2");
    }
}
END_TEST

// --- linear -------------------------------------------------------------------------------------

typedef struct LinearRef {
    int64_t tokens, in, out;
    Values x, weight, bias, dout;
    bool has_bias;
} LinearRef;

static double linear_element(const LinearRef *r, int64_t t, int64_t o) {
    double sum = r->has_bias ? r->bias.d[o] : 0;
    for (int64_t i = 0; i < r->in; i++) sum += r->x.d[t * r->in + i] * r->weight.d[o * r->in + i];
    return sum;
}
static double linear_objective(const void *context) {
    const LinearRef *r = context;
    double sum = 0;
    for (int64_t t = 0; t < r->tokens; t++)
        for (int64_t o = 0; o < r->out; o++)
            sum += linear_element(r, t, o) * r->dout.d[t * r->out + o];
    return sum;
}

static void check_linear(Backend *backend, int64_t tokens, int in, int out, bool has_bias) {
    LinearRef r = {tokens,
                   in,
                   out,
                   values_random(tokens * in, 1),
                   values_random(out * in, 1),
                   values_random(out, 1),
                   values_random(tokens * out, 1),
                   has_bias};
    Values weight_before = values_random(out * in, 1), bias_before = values_random(out, 1);
    Values dx_before = values_random(tokens * in, 1);
    float *grad_weight = test_take(sizeof(float) * (size_t)(out * in));
    float *grad_bias = test_take(sizeof(float) * (size_t)out);
    memcpy(grad_weight, weight_before.f, sizeof(float) * (size_t)(out * in));
    memcpy(grad_bias, bias_before.f, sizeof(float) * (size_t)out);
    LinearArgs args = {.tokens = tokens,
                       .in_features = in,
                       .out_features = out,
                       .x = r.x.f,
                       .weight = r.weight.f,
                       .bias = has_bias ? r.bias.f : NULL,
                       .out = floats_poisoned(tokens * out),
                       .dout = r.dout.f,
                       .dx = floats_poisoned(tokens * in),
                       .grad_weight = grad_weight,
                       .grad_bias = has_bias ? grad_bias : NULL};
    RUN_OP(backend, OP_LINEAR, linear_forward, &args);
    double *expected = doubles_zero(tokens * out);
    for (int64_t i = 0; i < tokens * out; i++) expected[i] = linear_element(&r, i / out, i % out);
    check_close("linear", args.out, expected, tokens * out, OPS_TOLERANCE);

    RUN_OP(backend, OP_LINEAR, linear_backward, &args);
    check_gradient("linear dx", args.dx, NULL, r.x, linear_objective, &r, OPS_TOLERANCE);
    check_gradient("linear weight", grad_weight, weight_before.f, r.weight, linear_objective, &r,
                   OPS_TOLERANCE);
    if (has_bias)
        check_gradient("linear bias", grad_bias, bias_before.f, r.bias, linear_objective, &r,
                       OPS_TOLERANCE);
    // dx_accumulate adds; dx = NULL leaves the weights' gradients the same
    float *dx = test_take(sizeof(float) * (size_t)(tokens * in));
    memcpy(dx, dx_before.f, sizeof(float) * (size_t)(tokens * in));
    args.dx = dx;
    args.dx_accumulate = true;
    RUN_OP(backend, OP_LINEAR, linear_backward, &args);
    check_gradient("linear dx +=", dx, dx_before.f, r.x, linear_objective, &r, OPS_TOLERANCE);
    args.dx = NULL;
    memcpy(grad_weight, weight_before.f, sizeof(float) * (size_t)(out * in));
    RUN_OP(backend, OP_LINEAR, linear_backward, &args);
    check_gradient("linear weight without dx", grad_weight, weight_before.f, r.weight,
                   linear_objective, &r, OPS_TOLERANCE);
    args.grad_assign = true;
    args.grad_weight = floats_poisoned(out * in);
    RUN_OP(backend, OP_LINEAR, linear_backward, &args);
    check_gradient("linear weight =", args.grad_weight, NULL, r.weight, linear_objective, &r,
                   OPS_TOLERANCE);
}

START_TEST(linear_matches_reference) {
    for (int n = 0; n < THREAD_COUNTS; n++) {
        Backend *backend = test_backend(thread_counts[n]);
        check_linear(backend, 1, 1, 1, true);
        check_linear(backend, 1, 9, 300, true); // one token: tiles side by side
        check_linear(backend, 7, 5, 3, true);
        check_linear(backend, 65, 17, 33, false);
        check_linear(backend, 333, 12, 41, true); // several tiles of rows
    }
}
END_TEST

// --- rmsnorm ------------------------------------------------------------------------------------

typedef struct NormRef {
    int64_t tokens, hidden;
    double epsilon;
    Values x, y, weight, dout, dx_out; // dx_out: what reaches x_out from later on
    bool has_y;
} NormRef;

static double norm_row(const NormRef *r, int64_t t, double *x_out, double *out) {
    double squares = 0;
    for (int64_t h = 0; h < r->hidden; h++) {
        int64_t i = t * r->hidden + h;
        x_out[h] = r->x.d[i] + (r->has_y ? r->y.d[i] : 0);
        squares += x_out[h] * x_out[h];
    }
    double inverse = 1 / sqrt(squares / (double)r->hidden + r->epsilon);
    for (int64_t h = 0; h < r->hidden; h++) out[h] = x_out[h] * inverse * r->weight.d[h];
    return inverse;
}
static double norm_objective(const void *context) {
    const NormRef *r = context;
    double sum = 0, x_out[64], out[64];
    for (int64_t t = 0; t < r->tokens; t++) {
        norm_row(r, t, x_out, out);
        for (int64_t h = 0; h < r->hidden; h++) {
            int64_t i = t * r->hidden + h;
            sum += out[h] * r->dout.d[i] + x_out[h] * r->dx_out.d[i];
        }
    }
    return sum;
}

static void check_norm(Backend *backend, int64_t tokens, int hidden, bool has_y, bool in_place) {
    const int64_t count = tokens * hidden;
    NormRef r = {tokens,
                 hidden,
                 1e-3,
                 values_random(count, 1),
                 values_random(count, 1),
                 values_random(hidden, 1),
                 values_random(count, 1),
                 values_random(count, 1),
                 has_y};
    Values before = values_random(hidden, 1);
    float *grad = test_take(sizeof(float) * (size_t)hidden), *dx = r.dx_out.f;
    memcpy(grad, before.f, sizeof(float) * (size_t)hidden);
    RmsNormArgs args = {tokens,
                        hidden,
                        1e-3f,
                        r.x.f,
                        has_y ? r.y.f : NULL,
                        r.weight.f,
                        in_place ? r.x.f : floats_poisoned(count),
                        floats_poisoned(count),
                        floats_poisoned(tokens),
                        r.dout.f,
                        dx,
                        grad};
    RUN_OP(backend, OP_RMSNORM, rmsnorm_forward, &args);
    double *x_out = doubles_zero(count), *out = doubles_zero(count),
           *inverse = doubles_zero(tokens);
    for (int64_t t = 0; t < tokens; t++)
        inverse[t] = norm_row(&r, t, x_out + t * hidden, out + t * hidden);
    check_close("x_out", args.x_out, x_out, count, OPS_TOLERANCE);
    check_close("rmsnorm", args.out, out, count, OPS_TOLERANCE);
    check_close("inv_rms", args.inv_rms, inverse, tokens, OPS_TOLERANCE);

    RUN_OP(backend, OP_RMSNORM, rmsnorm_backward, &args);
    check_gradient("rmsnorm dx", dx, NULL, r.x, norm_objective, &r, OPS_TOLERANCE);
    check_gradient("rmsnorm weight", grad, before.f, r.weight, norm_objective, &r, OPS_TOLERANCE);
}

START_TEST(rmsnorm_matches_reference) {
    for (int n = 0; n < THREAD_COUNTS; n++) {
        Backend *backend = test_backend(thread_counts[n]);
        for (int y = 0; y < 2; y++) {
            for (int in_place = 0; in_place < 2; in_place++) {
                check_norm(backend, 1, 1, y, in_place);
                check_norm(backend, 1, 7, y, in_place);
                check_norm(backend, 5, 33, y, in_place);
                check_norm(backend, 41, 64, y, in_place);
            }
        }
    }
}
END_TEST

// --- adamw --------------------------------------------------------------------------------------

START_TEST(adamw_matches_reference) {
    enum { COUNT = 40001 }; // more than two blocks
    Backend *backend = test_backend(2);
    Values p = values_random(COUNT, 1), m = values_random(COUNT, 0.1), v = values_random(COUNT, 1);
    Values g = values_random(COUNT, 1);
    for (int i = 0; i < COUNT; i++) v.f[i] = v.f[i] * v.f[i] * 0.01f, v.d[i] = v.f[i];
    uint16_t *copy = test_take(sizeof(uint16_t) * COUNT), *expected = test_take(2 * COUNT);
    AdamwArgs args = {.count = COUNT,
                      .master = p.f,
                      .grad = g.f,
                      .grad_dtype = DTYPE_F32,
                      .m = m.f,
                      .v = v.f,
                      .copy = copy,
                      .copy_dtype = DTYPE_BF16,
                      .learning_rate = 3e-3,
                      .beta1 = 0.9,
                      .beta2 = 0.95,
                      .epsilon = 1e-8,
                      .weight_decay = 0.1,
                      .grad_scale = 0.7,
                      .step = 3};
    RUN_OP(backend, OP_ADAMW, adamw, &args);
    for (int i = 0; i < COUNT; i++) {
        double grad = 0.7 * g.d[i];
        m.d[i] = 0.9 * m.d[i] + 0.1 * grad;
        v.d[i] = 0.95 * v.d[i] + 0.05 * grad * grad;
        double m_hat = m.d[i] / (1 - pow(0.9, 3)), v_hat = v.d[i] / (1 - pow(0.95, 3));
        p.d[i] -= 3e-3 * (m_hat / (sqrt(v_hat) + 1e-8) + 0.1 * p.d[i]);
    }
    // elementwise arithmetic only: a few roundings of 6e-8
    check_close("m", m.f, m.d, COUNT, 1e-6);
    check_close("v", v.f, v.d, COUNT, 1e-6);
    check_close("master", p.f, p.d, COUNT, 1e-6);
    dtype_from_f32(DTYPE_BF16, p.f, expected, COUNT);
    check_equal("bf16 copy", copy, expected, 2 * COUNT);
}
END_TEST

// Against the op with fp32 moments, which start from the same values: the weights move by the
// moments before these are rounded, so they are the same to the bit, and what is kept is the fp32
// result rounded. And against doubles, which the fp32 test above has not seen for three updates in
// a row, each from rounded moments.
START_TEST(adamw_with_bf16_moments) {
    enum { COUNT = 40001 };
    Values p = values_random(COUNT, 1);
    float *p_f32 = test_take(sizeof(float) * COUNT), *m_f32 = floats_filled(COUNT, 0);
    float *v_f32 = floats_filled(COUNT, 0);
    uint16_t *m = test_take(2 * COUNT), *v = test_take(2 * COUNT), *rounded = test_take(2 * COUNT);
    memset(m, 0, 2 * COUNT);
    memset(v, 0, 2 * COUNT);
    memcpy(p_f32, p.f, sizeof(float) * COUNT);
    for (int step = 1; step <= 3; step++) {
        Values g = values_random(COUNT, 1);
        AdamwArgs args = {.count = COUNT,
                          .master = p.f,
                          .grad = g.f,
                          .grad_dtype = DTYPE_F32,
                          .m = m,
                          .v = v,
                          .state_dtype = DTYPE_BF16,
                          .learning_rate = 3e-3,
                          .beta1 = 0.9,
                          .beta2 = 0.95,
                          .epsilon = 1e-8,
                          .weight_decay = 0.1,
                          .grad_scale = 0.7,
                          .step = step};
        AdamwArgs wide = args;
        wide.master = p_f32, wide.m = m_f32, wide.v = v_f32, wide.state_dtype = DTYPE_F32;
        for (int i = 0; i < COUNT; i++) {
            double grad = 0.7 * g.d[i], m_d = 0.9 * m_f32[i] + 0.1 * grad;
            double v_d = 0.95 * v_f32[i] + 0.05 * grad * grad;
            double m_hat = m_d / (1 - pow(0.9, step)), v_hat = v_d / (1 - pow(0.95, step));
            p.d[i] -= 3e-3 * (m_hat / (sqrt(v_hat) + 1e-8) + 0.1 * p.d[i]);
        }
        RUN_OP(test_backend(1), OP_ADAMW, adamw, &wide);
        RUN_OP(test_backend(2), OP_ADAMW, adamw, &args);
        check_equal("master", p.f, p_f32, sizeof(float) * COUNT);
        check_close("master", p.f, p.d, COUNT, 1e-6); // fp32 roundings of 6e-8
        dtype_from_f32(DTYPE_BF16, m_f32, rounded, COUNT);
        check_equal("m", m, rounded, 2 * COUNT);
        dtype_to_f32(DTYPE_BF16, m, m_f32, COUNT);
        dtype_from_f32(DTYPE_BF16, v_f32, rounded, COUNT);
        check_equal("v", v, rounded, 2 * COUNT);
        dtype_to_f32(DTYPE_BF16, v, v_f32, COUNT);
    }
}
END_TEST

// A gradient of zero on fresh state moves nothing but the decay: 0/(sqrt(0)+ε) is 0, not NaN.
START_TEST(adamw_of_zero_gradient) {
    Backend *backend = test_backend(1);
    float p[3] = {1, -2, 0}, g[3] = {0}, m[3] = {0}, v[3] = {0};
    AdamwArgs args = {.count = 3,
                      .master = p,
                      .grad = g,
                      .grad_dtype = DTYPE_F32,
                      .m = m,
                      .v = v,
                      .learning_rate = 0.5,
                      .beta1 = 0.9,
                      .beta2 = 0.95,
                      .epsilon = 1e-8,
                      .weight_decay = 0.5,
                      .grad_scale = 1,
                      .step = 1};
    RUN_OP(backend, OP_ADAMW, adamw, &args);
    ck_assert(p[0] == 0.75f && p[1] == -1.5f && p[2] == 0.0f);
}
END_TEST

// --- Utilities ----------------------------------------------------------------------------------

START_TEST(norm2_counts_non_finite) {
    const int64_t counts[] = {0, 1, 100, 1000003};
    for (int n = 0; n < THREAD_COUNTS; n++) {
        Backend *backend = test_backend(thread_counts[n]);
        for (int c = 0; c < 4; c++) {
            Values x = values_random(counts[c] + 1, 1e20); // squares overflow fp32, not double
            double sums[2] = {5, 7}, expected = 5;
            for (int64_t i = 0; i < counts[c]; i++) expected += x.d[i] * x.d[i];
            ck_assert_ok(backend->ops->norm2(backend, DTYPE_F32, x.f, counts[c], sums));
            ck_assert_double_eq_tol(sums[0], expected, 1e-12 * expected); // summed in double
            ck_assert(sums[1] == 7);
        }
        Values x = values_random(5000, 1);
        x.f[0] = NAN, x.f[3210] = INFINITY, x.f[4999] = -INFINITY;
        double sums[2] = {0, 0};
        ck_assert_ok(backend->ops->norm2(backend, DTYPE_F32, x.f, 5000, sums));
        ck_assert(sums[1] == 3);
        ck_assert(!isfinite(sums[0]));
    }
}
END_TEST

START_TEST(row_similarity_matches_reference) {
    enum { TOKENS = 301, HIDDEN = 19 };
    Values a = values_random(TOKENS * HIDDEN, 1), b = values_random(TOKENS * HIDDEN, 2);
    for (int h = 0; h < HIDDEN; h++) { // row 0: a zero; row 1: both zero
        a.f[h] = 0, a.f[HIDDEN + h] = b.f[HIDDEN + h] = 0;
        a.d[h] = 0, a.d[HIDDEN + h] = b.d[HIDDEN + h] = 0;
    }
    double cosine = 10, ratio = 20; // the op accumulates
    for (int t = 0; t < TOKENS; t++) {
        double aa = 0, bb = 0, ab = 0;
        for (int h = 0; h < HIDDEN; h++) {
            double x = a.d[t * HIDDEN + h], y = b.d[t * HIDDEN + h];
            aa += x * x, bb += y * y, ab += x * y;
        }
        if (aa > 0 && bb > 0) cosine += ab / sqrt(aa * bb);
        if (bb > 0) ratio += fabs(sqrt(aa) - sqrt(bb)) / sqrt(bb);
    }
    for (int n = 0; n < THREAD_COUNTS; n++) {
        double sums[2] = {10, 20};
        RowSimilarityArgs args = {TOKENS, HIDDEN, a.f, b.f, sums};
        RUN_OP(test_backend(thread_counts[n]), OP_ROW_SIMILARITY, row_similarity, &args);
        ck_assert_double_eq_tol(sums[0], cosine, 1e-10); // sums in double of a few hundred rows
        ck_assert_double_eq_tol(sums[1], ratio, 1e-10);
    }
}
END_TEST

START_TEST(add_and_cast) {
    enum { COUNT = 10007 };
    Backend *backend = test_backend(2);
    Values a = values_random(COUNT, 1), b = values_random(COUNT, 1);
    ck_assert_ok(backend->ops->add(backend, a.f, b.f, COUNT));
    for (int i = 0; i < COUNT; i++) ck_assert(a.f[i] == (float)a.d[i] + b.f[i]);

    const DType types[] = {DTYPE_F32, DTYPE_BF16, DTYPE_F16};
    for (int from = 0; from < 3; from++) {
        for (int to = 0; to < 3; to++) {
            void *in = test_take(4 * COUNT), *out = test_take(4 * COUNT);
            float *back = test_take(4 * COUNT), *expected = test_take(4 * COUNT);
            void *rounded = test_take(4 * COUNT);
            ck_assert_ok(backend->ops->cast(backend, types[from], in, DTYPE_F32, b.f, COUNT));
            ck_assert_ok(backend->ops->cast(backend, types[to], out, types[from], in, COUNT));
            ck_assert_ok(backend->ops->cast(backend, DTYPE_F32, back, types[to], out, COUNT));
            dtype_from_f32(types[from], b.f, rounded, COUNT);
            dtype_to_f32(types[from], rounded, expected, COUNT);
            dtype_from_f32(types[to], expected, rounded, COUNT);
            dtype_to_f32(types[to], rounded, expected, COUNT);
            check_equal("cast", back, expected, 4 * COUNT);
        }
    }
}
END_TEST

TEST_MAIN("basic ops", TEST(memory_is_zeroed_and_aligned), TEST(copies_and_zero),
          TEST(small_workspace_is_refused), TEST(threads_are_fixed_at_creation),
          TEST(embed_gathers_and_scatters), TEST(embed_refuses_bad_ids),
          TEST(linear_matches_reference), TEST(rmsnorm_matches_reference),
          TEST(adamw_matches_reference), TEST(adamw_with_bf16_moments),
          TEST(adamw_of_zero_gradient), TEST(norm2_counts_non_finite),
          TEST(row_similarity_matches_reference), TEST(add_and_cast))
