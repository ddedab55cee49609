// rope (with and without q/k norms) and attention against plain double-precision references.
#include "tests/ops.h"

static const int thread_counts[] = {1, 2, 3};
enum { THREAD_COUNTS = 3 };

// --- rope ---------------------------------------------------------------------------------------

typedef struct RopeRef {
    int64_t batch, length;
    int heads, kv_heads, dim;
    double theta, epsilon;
    Values qkv, q_norm, k_norm, dout;
    bool has_norm;
} RopeRef;

static int64_t rope_width(const RopeRef *r) {
    return (int64_t)(r->heads + 2 * r->kv_heads) * r->dim;
}

static void rope_reference(const RopeRef *r, double *out) {
    const int64_t width = rope_width(r);
    double n[64];
    for (int64_t row = 0; row < r->batch * r->length; row++) {
        for (int h = 0; h < r->heads + 2 * r->kv_heads; h++) {
            const double *x = r->qkv.d + row * width + h * r->dim;
            double *y = out + row * width + h * r->dim;
            if (h >= r->heads + r->kv_heads) {
                memcpy(y, x, sizeof(double) * (size_t)r->dim);
                continue;
            }
            const double *weight = h < r->heads ? r->q_norm.d : r->k_norm.d;
            double squares = 0;
            for (int i = 0; i < r->dim; i++) squares += x[i] * x[i];
            double scale = 1 / sqrt(squares / r->dim + r->epsilon);
            for (int i = 0; i < r->dim; i++) n[i] = r->has_norm ? x[i] * scale * weight[i] : x[i];
            for (int i = 0; i < r->dim / 2; i++) {
                double angle = (double)(row % r->length) * pow(r->theta, -2.0 * i / r->dim);
                y[i] = n[i] * cos(angle) - n[i + r->dim / 2] * sin(angle);
                y[i + r->dim / 2] = n[i + r->dim / 2] * cos(angle) + n[i] * sin(angle);
            }
        }
    }
}
static double rope_objective(const void *context) {
    const RopeRef *r = context;
    static double out[40000];
    rope_reference(r, out);
    double sum = 0;
    for (int64_t i = 0; i < r->qkv.count; i++) sum += out[i] * r->dout.d[i];
    return sum;
}

static void check_rope(Backend *backend, int64_t batch, int64_t length, int heads, int kv_heads,
                       int dim, bool norm) {
    RopeRef r = {batch,
                 length,
                 heads,
                 kv_heads,
                 dim,
                 1000.0,
                 1e-3,
                 {0},
                 values_random(dim, 1),
                 values_random(dim, 1),
                 {0},
                 norm};
    const int64_t count = batch * length * rope_width(&r);
    r.qkv = values_random(count, 1);
    r.dout = values_random(count, 1);
    Values q_before = values_random(dim, 1), k_before = values_random(dim, 1);
    float *grad_q = test_take(sizeof(float) * (size_t)dim);
    float *grad_k = test_take(sizeof(float) * (size_t)dim);
    memcpy(grad_q, q_before.f, sizeof(float) * (size_t)dim);
    memcpy(grad_k, k_before.f, sizeof(float) * (size_t)dim);
    RopeArgs args = {.batch = batch,
                     .sequence_length = length,
                     .num_heads = heads,
                     .num_kv_heads = kv_heads,
                     .head_dim = dim,
                     .theta = 1000.0,
                     .epsilon = 1e-3f,
                     .qkv = r.qkv.f,
                     .q_norm = norm ? r.q_norm.f : NULL,
                     .k_norm = norm ? r.k_norm.f : NULL,
                     .out = floats_poisoned(count),
                     .inv_rms = floats_poisoned(batch * length * (heads + kv_heads)),
                     .dout = r.dout.f,
                     .dqkv = floats_poisoned(count),
                     .grad_q_norm = norm ? grad_q : NULL,
                     .grad_k_norm = norm ? grad_k : NULL};
    RUN_OP(backend, OP_ROPE, rope_forward, &args);
    double *expected = doubles_zero(count);
    rope_reference(&r, expected);
    check_close("rope", args.out, expected, count, OPS_TOLERANCE);
    RUN_OP(backend, OP_ROPE, rope_backward, &args);
    check_gradient("rope dqkv", args.dqkv, NULL, r.qkv, rope_objective, &r, OPS_TOLERANCE);
    if (norm) {
        check_gradient("q_norm", grad_q, q_before.f, r.q_norm, rope_objective, &r, OPS_TOLERANCE);
        check_gradient("k_norm", grad_k, k_before.f, r.k_norm, rope_objective, &r, OPS_TOLERANCE);
    }
    // In place, as the header allows: the same bits.
    float *dqkv = test_take(sizeof(float) * (size_t)count);
    memcpy(dqkv, r.dout.f, sizeof(float) * (size_t)count);
    RopeArgs in_place = args;
    in_place.dout = in_place.dqkv = dqkv;
    RUN_OP(backend, OP_ROPE, rope_backward, &in_place);
    check_equal("rope backward in place", dqkv, args.dqkv, sizeof(float) * (size_t)count);
    if (norm) return;
    float *qkv = test_take(sizeof(float) * (size_t)count);
    memcpy(qkv, r.qkv.f, sizeof(float) * (size_t)count);
    in_place.qkv = in_place.out = qkv;
    RUN_OP(backend, OP_ROPE, rope_forward, &in_place);
    check_equal("rope in place", qkv, args.out, sizeof(float) * (size_t)count);
}

START_TEST(rope_matches_reference) {
    for (int n = 0; n < THREAD_COUNTS; n++) {
        Backend *backend = test_backend(thread_counts[n]);
        for (int norm = 0; norm < 2; norm++) {
            check_rope(backend, 1, 1, 1, 1, 2, norm);
            check_rope(backend, 2, 3, 3, 1, 6, norm);
            check_rope(backend, 3, 17, 4, 2, 16, norm);
            check_rope(backend, 1, 100, 2, 2, 64, norm);
        }
    }
}
END_TEST

// --- attention ----------------------------------------------------------------------------------

typedef struct AttentionRef {
    int64_t batch, length;
    int heads, kv_heads, dim;
    Values qkv, dout;
    const int32_t *document_start;
} AttentionRef;

// out and log_sum_exp (NULL to skip) of the whole batch.
static void attention_reference(const AttentionRef *r, double *out, double *log_sum_exp) {
    const int64_t width = (int64_t)(r->heads + 2 * r->kv_heads) * r->dim;
    static double p[1024];
    for (int64_t b = 0; b < r->batch; b++) {
        for (int h = 0; h < r->heads; h++) {
            const double *q = r->qkv.d + b * r->length * width + h * r->dim;
            const double *k = r->qkv.d + b * r->length * width +
                              (r->heads + h / (r->heads / r->kv_heads)) * r->dim;
            const double *v = k + r->kv_heads * r->dim;
            for (int64_t s = 0; s < r->length; s++) {
                int64_t first = r->document_start ? r->document_start[b * r->length + s] : 0;
                double highest = -INFINITY, sum = 0;
                for (int64_t j = first; j <= s; j++) {
                    p[j] = 0;
                    for (int d = 0; d < r->dim; d++) p[j] += q[s * width + d] * k[j * width + d];
                    p[j] /= sqrt(r->dim);
                    highest = fmax(highest, p[j]);
                }
                for (int64_t j = first; j <= s; j++) sum += p[j] = exp(p[j] - highest);
                double *o = out + ((b * r->length + s) * r->heads + h) * r->dim;
                for (int d = 0; d < r->dim; d++) o[d] = 0;
                for (int64_t j = first; j <= s; j++)
                    for (int d = 0; d < r->dim; d++) o[d] += p[j] / sum * v[j * width + d];
                if (log_sum_exp)
                    log_sum_exp[(b * r->heads + h) * r->length + s] = highest + log(sum);
            }
        }
    }
}
static double attention_objective(const void *context) {
    const AttentionRef *r = context;
    static double out[200000];
    attention_reference(r, out, NULL);
    double sum = 0;
    for (int64_t i = 0; i < r->dout.count; i++) sum += out[i] * r->dout.d[i];
    return sum;
}

// Documents of random length, or NULL.
static const int32_t *random_documents(int64_t batch, int64_t length, int average) {
    if (average == 0) return NULL;
    int32_t *start = test_take(sizeof(int32_t) * (size_t)(batch * length));
    for (int64_t b = 0; b < batch; b++) {
        int32_t begin = 0;
        for (int64_t s = 0; s < length; s++) {
            if (s > 0 && test_random_int(average) == 0) begin = (int32_t)s;
            start[b * length + s] = begin;
        }
    }
    return start;
}

static void check_attention(Backend *backend, int64_t batch, int64_t length, int heads,
                            int kv_heads, int dim, int documents) {
    AttentionRef r = {batch, length, heads, kv_heads,
                      dim,   {0},    {0},   random_documents(batch, length, documents)};
    const int64_t rows = batch * length, width = (int64_t)(heads + 2 * kv_heads) * dim;
    r.qkv = values_random(rows * width, 1.5);
    r.dout = values_random(rows * heads * dim, 1);
    AttentionArgs args = {batch,
                          length,
                          heads,
                          kv_heads,
                          dim,
                          r.qkv.f,
                          r.document_start,
                          floats_poisoned(rows * heads * dim),
                          floats_poisoned(rows * heads),
                          r.dout.f,
                          floats_poisoned(rows * width)};
    RUN_OP(backend, OP_ATTENTION, attention_forward, &args);
    double *out = doubles_zero(rows * heads * dim), *lse = doubles_zero(rows * heads);
    attention_reference(&r, out, lse);
    check_close("attention", args.out, out, rows * heads * dim, OPS_TOLERANCE);
    check_close("log_sum_exp", args.log_sum_exp, lse, rows * heads, OPS_TOLERANCE);
    RUN_OP(backend, OP_ATTENTION, attention_backward, &args);
    check_gradient("attention dqkv", args.dqkv, NULL, r.qkv, attention_objective, &r,
                   OPS_TOLERANCE);

    float *again = floats_poisoned(rows * width);
    AttentionArgs repeat = args;
    repeat.dqkv = again;
    RUN_OP(backend, OP_ATTENTION, attention_backward, &repeat);
    check_equal("attention backward", again, args.dqkv, sizeof(float) * (size_t)(rows * width));
}

START_TEST(attention_matches_reference) {
    for (int n = 0; n < THREAD_COUNTS; n++) {
        Backend *backend = test_backend(thread_counts[n]);
        check_attention(backend, 1, 1, 1, 1, 2, 0);
        check_attention(backend, 2, 3, 2, 1, 4, 0);
        check_attention(backend, 1, 7, 4, 2, 5, 0); // odd head size
        check_attention(backend, 2, 63, 3, 3, 8, 0);
        check_attention(backend, 1, 65, 6, 2, 8, 0);   // one row in the second query tile
        check_attention(backend, 1, 300, 2, 1, 16, 0); // more than one key tile
    }
}
END_TEST

START_TEST(attention_inside_documents) {
    for (int n = 0; n < THREAD_COUNTS; n++) {
        Backend *backend = test_backend(thread_counts[n]);
        check_attention(backend, 1, 9, 2, 1, 4, 1); // every token its own document
        check_attention(backend, 2, 12, 2, 2, 4, 4);
        check_attention(backend, 1, 130, 2, 1, 8, 20);
        check_attention(backend, 1, 400, 2, 1, 8, 150);
    }
}
END_TEST

// Scores of ±1e4: the softmax is a choice of one, nothing overflows.
START_TEST(attention_with_large_scores) {
    Backend *backend = test_backend(2);
    AttentionRef r = {1, 90, 2, 1, 4, values_random(90 * 16, 100), values_random(90 * 8, 1), NULL};
    AttentionArgs args = {1,
                          90,
                          2,
                          1,
                          4,
                          r.qkv.f,
                          NULL,
                          floats_poisoned(90 * 8),
                          floats_poisoned(180),
                          r.dout.f,
                          floats_poisoned(90 * 16)};
    RUN_OP(backend, OP_ATTENTION, attention_forward, &args);
    RUN_OP(backend, OP_ATTENTION, attention_backward, &args);
    double *out = doubles_zero(90 * 8);
    attention_reference(&r, out, NULL);
    // a score of 3e4 has an absolute rounding error of 2e-3 in fp32, which exp turns into a
    // relative one
    check_close("attention", args.out, out, 90 * 8, 5e-3);
    for (int i = 0; i < 90 * 16; i++) ck_assert(isfinite(((float *)args.dqkv)[i]));
}
END_TEST

// A NaN in one key reaches the queries that see it and no others.
START_TEST(attention_passes_nan_on) {
    Backend *backend = test_backend(2);
    Values qkv = values_random(80 * 12, 1);
    qkv.f[40 * 12 + 4] = NAN; // key 40
    AttentionArgs args = {.batch = 1,
                          .sequence_length = 80,
                          .num_heads = 1,
                          .num_kv_heads = 1,
                          .head_dim = 4,
                          .qkv = qkv.f,
                          .out = floats_poisoned(80 * 4),
                          .log_sum_exp = floats_poisoned(80)};
    RUN_OP(backend, OP_ATTENTION, attention_forward, &args);
    for (int s = 0; s < 80; s++)
        for (int d = 0; d < 4; d++)
            ck_assert_int_eq(isnan(((float *)args.out)[s * 4 + d]) != 0, s >= 40);
}
END_TEST

TEST_MAIN("rope and attention", TEST(rope_matches_reference), TEST(attention_matches_reference),
          TEST(attention_inside_documents), TEST(attention_with_large_scores),
          TEST(attention_passes_nan_on))
