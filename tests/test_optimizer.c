// AdamW over the arenas against a reference in doubles, element by element.
#include "optim/optimizer.h"

#include <math.h>
#include "tests/tiny_trainer.h"

// Gradients of the CPU backend are fp32 at the table's element offsets.
static float *grads(const TinyTrainer *t) {
    return t->model->grads;
}

typedef struct Reference {
    double *p, *m, *v, *g; // (total)
} Reference;

// Takes `host`.
static double *widen(const TinyTrainer *t, float *host) {
    double *wide = malloc((size_t)t->model->table.total * sizeof *wide);
    ck_assert_ptr_nonnull(wide);
    for (int64_t i = 0; i < t->model->table.total; i++) wide[i] = host[i];
    free(host);
    return wide;
}

static Reference take_reference(const TinyTrainer *t) {
    return (Reference){widen(t, download_arena(t, t->model->master)),
                       widen(t, download_moments(t, t->optimizer->m)),
                       widen(t, download_moments(t, t->optimizer->v)),
                       widen(t, download_arena(t, grads(t)))};
}

static void free_reference(Reference *r) {
    free(r->p);
    free(r->m);
    free(r->v);
    free(r->g);
}

static double reference_norm(const TinyTrainer *t, const Reference *r) {
    double sum = 0;
    for (int64_t i = 0; i < t->model->table.total; i++) sum += r->g[i] * r->g[i];
    return sqrt(sum);
}

// The formula of model/backend.h on one tensor.
static void reference_step(const OptimizerOptions *o, const Tensor *tensor, bool decays, double lr,
                           double scale, int64_t step, Reference *r) {
    for (int64_t i = tensor->offset; i < tensor->offset + tensor->count; i++) {
        double g = scale * r->g[i];
        r->m[i] = o->beta1 * r->m[i] + (1 - o->beta1) * g;
        r->v[i] = o->beta2 * r->v[i] + (1 - o->beta2) * g * g;
        double m_hat = r->m[i] / (1 - pow(o->beta1, (double)step));
        double v_hat = r->v[i] / (1 - pow(o->beta2, (double)step));
        double decay = decays ? o->weight_decay * r->p[i] : 0;
        r->p[i] -= lr * (m_hat / (sqrt(v_hat) + o->epsilon) + decay);
    }
}

// 2e-6: a handful of fp32 roundings (2^-24 = 6e-8 each) of values up to a few times `scale`. bf16
// has 8 significant bits, so what is rounded to it moves by up to 2^-8 of itself. Takes `host`.
static void compare(const char *what, const TinyTrainer *t, DType dtype, float *host,
                    const double *expected, double scale) {
    const double rounding = dtype == DTYPE_BF16 ? 1.0 / 256 : 0;
    for (int64_t i = 0; i < t->model->table.total; i++)
        ck_assert_msg(fabs(host[i] - expected[i]) <= 2e-6 * scale + rounding * fabs(expected[i]),
                      "%s[%ld] is %.9g, expected %.9g", what, (long)i, host[i], expected[i]);
    free(host);
}

static bool should_decay(const Tensor *tensor, bool embeddings) {
    bool is_embedding = tensor->role == ROLE_EMBED || tensor->role == ROLE_LM_HEAD;
    if (is_embedding) return embeddings;
    return tensor->ndim == 2 && tensor->role != ROLE_ROUTER;
}

// Three updates with fresh gradients of the given size, compared after each.
static void check_updates(const OptimizerOptions *options, float gradient_size) {
    ModelConfig config = tiny_config();
    TinyTrainer t = tiny_trainer(&config, options, 1);
    const TensorTable *table = &t.model->table;
    for (int64_t step = 1; step <= 3; step++) {
        double norm, lr = 1e-2 / (double)step;
        fill_arena(&t, grads(&t), 10 + (uint64_t)step, 0, gradient_size);
        Reference r = take_reference(&t);
        ck_assert_ok(optimizer_gradient_norm(t.optimizer, &norm));
        double expected = reference_norm(&t, &r);
        ck_assert_double_eq_tol(norm, expected, 1e-12 * expected); // sums of doubles, other order
        double clip = options->clip_norm;
        double scale = clip > 0 && expected > clip ? clip / expected : 1;
        for (int i = 0; i < table->count; i++)
            reference_step(options, &table->tensors[i],
                           should_decay(&table->tensors[i], options->decay_embeddings), lr, scale,
                           step, &r);
        ck_assert_ok(optimizer_step(t.optimizer, lr, norm));
        ck_assert_int_eq(t.optimizer->updates, step);
        // Gaps were zero in the reference, so this also checks that they stay zero.
        double size = gradient_size * scale;
        DType state = options->state_dtype;
        compare("weight", &t, DTYPE_F32, download_arena(&t, t.model->master), r.p, 1);
        compare("m", &t, state, download_moments(&t, t.optimizer->m), r.m, size);
        compare("v", &t, state, download_moments(&t, t.optimizer->v), r.v, size * size);
        free_reference(&r);
    }
    tiny_trainer_free(&t);
}

START_TEST(update_matches_the_reference_without_clipping) {
    OptimizerOptions options = tiny_options();
    check_updates(&options, 1e-3f); // norm about 0.2: below the limit
    options.clip_norm = 0;          // off
    check_updates(&options, 1.0f);
}
END_TEST

START_TEST(gradients_above_the_limit_are_scaled_to_it) {
    OptimizerOptions options = tiny_options();
    options.clip_norm = 0.5;
    check_updates(&options, 1.0f);
}
END_TEST

START_TEST(embeddings_decay_only_on_request) {
    OptimizerOptions options = tiny_options();
    options.decay_embeddings = true;
    check_updates(&options, 1e-3f);
}
END_TEST

// Every tensor, the routers at the end among them.
START_TEST(moments_in_bf16_follow_the_same_formula) {
    OptimizerOptions options = tiny_options();
    options.state_dtype = DTYPE_BF16;
    check_updates(&options, 1e-3f);
}
END_TEST

START_TEST(runs_cover_every_tensor_once_with_its_decay_flag) {
    ModelConfig config = tiny_config();
    config.tie_word_embeddings = false;
    OptimizerOptions options = tiny_options();
    TinyTrainer t = tiny_trainer(&config, &options, 1);
    const TensorTable *table = &t.model->table;
    for (int i = 0; i < table->count; i++) {
        const Tensor *tensor = &table->tensors[i];
        int inside = 0;
        for (int j = 0; j < t.optimizer->num_runs; j++) {
            const OptimizerRun *run = &t.optimizer->runs[j];
            bool overlaps = tensor->offset < run->begin + run->count &&
                            run->begin < tensor->offset + tensor->count;
            if (!overlaps) continue;
            inside++;
            ck_assert_int_ge(tensor->offset, run->begin);
            ck_assert_int_le(tensor->offset + tensor->count, run->begin + run->count);
            ck_assert_msg(run->decays == should_decay(tensor, false), "%s", tensor->name);
            ck_assert_int_eq(run->router, tensor->role == ROLE_ROUTER);
        }
        ck_assert_msg(inside == 1, "%s is in %d runs", tensor->name, inside);
    }
    ck_assert_int_lt(t.optimizer->num_runs, table->count); // neighbours do share calls
    tiny_trainer_free(&t);
}
END_TEST

START_TEST(one_bad_gradient_anywhere_makes_the_norm_infinite) {
    const float bad[] = {NAN, INFINITY, -INFINITY};
    ModelConfig config = tiny_config();
    OptimizerOptions options = tiny_options();
    TinyTrainer t = tiny_trainer(&config, &options, 1);
    const TensorTable *table = &t.model->table;
    for (int i = 0; i < table->count; i++) {
        const Tensor *tensor = &table->tensors[i];
        double norm;
        fill_arena(&t, grads(&t), 3, 0, 1);
        float *last = grads(&t) + tensor->offset + tensor->count - 1;
        ck_assert_ok(t.backend->ops->upload(t.backend, last, &bad[i % 3], sizeof *last));
        ck_assert_ok(optimizer_gradient_norm(t.optimizer, &norm));
        ck_assert_msg(!isfinite(norm), "%s: norm %g", tensor->name, norm);
        // Such a norm is a caller's bug, and nothing has been touched.
        ck_assert_fails(optimizer_step(t.optimizer, 1, norm), STATUS_INTERNAL, "invariant");
        ck_assert_int_eq(t.optimizer->updates, 0);
    }
    tiny_trainer_free(&t);
}
END_TEST

START_TEST(plan_says_what_create_takes) {
    ModelConfig config = tiny_config();
    TensorTable table;
    MemoryPlan plan = {.count = 0};
    ck_assert_ok(tensor_table_build(&config, &table));
    OptimizerOptions options = tiny_options();
    ck_assert_ok(optimizer_plan(&table, &options, DTYPE_F32, 1, &plan));
    ck_assert_int_eq(memory_plan_total(&plan), (uint64_t)table.total * 8);
    options.state_dtype = DTYPE_BF16;
    plan.count = 0;
    ck_assert_ok(optimizer_plan(&table, &options, DTYPE_F32, 1, &plan));
    ck_assert_int_eq(memory_plan_total(&plan), (uint64_t)table.total * 4);
    tensor_table_free(&table);
}
END_TEST

TEST_MAIN("optimizer", TEST(update_matches_the_reference_without_clipping),
          TEST(gradients_above_the_limit_are_scaled_to_it), TEST(embeddings_decay_only_on_request),
          TEST(moments_in_bf16_follow_the_same_formula),
          TEST(runs_cover_every_tensor_once_with_its_decay_flag),
          TEST(one_bad_gradient_anywhere_makes_the_norm_infinite),
          TEST(plan_says_what_create_takes))
