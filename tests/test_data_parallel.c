// Several ranks train one model: the same losses and weights as one, to the bit where the sums have
// one order, also when their number changes on the way. What may go wrong: test_parallel_faults.c.
#include "tests/parallel_job.h"

#include <math.h>
#include "model/config.h"

// A recipe of four micro-batches a step, on `world` ranks.
static void run_named(const char *name, int world, bool pairwise) {
    Job job = job_of(tiny_moe_recipe(name));
    tiny_set(&job.recipe, "train.micro_batch=1");
    tiny_set(&job.recipe, "checkpoint.dtype=f32");
    tiny_set(&job.recipe, "parallel.pairwise=%s", pairwise ? "true" : "false");
    run_ok(world, &job);
}

// --- Comparing runs of different worlds ----------------------------------------------------------

typedef struct Slices {
    json_t *state;
    ModelConfig config;
    TensorTable table;
    SliceSet set;
} Slices;

static int64_t open_newest(const char *name, Slices *out) {
    char path[IO_PATH_MAX];
    json_t *config;
    int64_t step;
    ck_assert_ok(checkpoint_find(tiny_run_path(name, "checkpoints"), &step, path));
    ck_assert_msg(step >= 0, "%s has no checkpoint", name);
    ck_assert_ok(checkpoint_read_state(path, &out->state));
    ck_assert_ok(json_get_object(out->state, path, "config", &config));
    ck_assert_ok(config_from_canonical(config, path, &out->config));
    ck_assert_ok(tensor_table_build(&out->config, &out->table));
    ck_assert_ok(slices_open(path, &out->table, &out->set));
    return step;
}

static void close_slices(Slices *s) {
    slices_close(&s->set);
    tensor_table_free(&s->table);
    json_decref(s->state);
}

// The largest difference between weights, m and v of the newest checkpoints, relative to the
// largest value of the tensor.
static double state_difference(const char *a, const char *b) {
    Slices x, y;
    double worst = 0;
    ck_assert_int_eq(open_newest(a, &x), open_newest(b, &y));
    for (int i = 0; i < x.table.count; i++) {
        const Tensor *tensor = &x.table.tensors[i];
        size_t bytes = (size_t)tensor->count * sizeof(float);
        float *p = malloc(bytes), *q = malloc(bytes);
        ck_assert(p && q);
        for (int kind = 0; kind < SLICE_KINDS; kind++) {
            double largest = 0, difference = 0;
            ck_assert_ok(slices_read(&x.set, (SliceKind)kind, tensor, 0, tensor->count, p));
            ck_assert_ok(
                slices_read(&y.set, (SliceKind)kind, &y.table.tensors[i], 0, tensor->count, q));
            for (int64_t j = 0; j < tensor->count; j++) {
                largest = fmax(largest, fabs((double)p[j]));
                difference = fmax(difference, fabs((double)p[j] - (double)q[j]));
            }
            // Equal bits, also of zeros: a difference of values would not see their sign.
            if (memcmp(p, q, bytes) == 0) continue;
            ck_assert_msg(largest > 0, "%s of %s is all zeros", tensor->name, a);
            worst = fmax(worst, fmax(difference / largest, 1e-30));
        }
        free(p);
        free(q);
    }
    // The same samples have been used, whoever used them.
    ck_assert(json_equal(json_object_get(json_object_get(x.state, "data"), "consumed"),
                         json_object_get(json_object_get(y.state, "data"), "consumed")));
    close_slices(&x);
    close_slices(&y);
    return worst;
}

// Largest relative difference of the losses of two logs with the same records.
static double loss_difference(const char *a, const char *b, const char *kind) {
    json_t *x = tiny_log(a, kind), *y = tiny_log(b, kind), *record;
    size_t index;
    double worst = 0;
    ck_assert_uint_gt(json_array_size(x), 0);
    ck_assert_uint_eq(json_array_size(x), json_array_size(y));
    json_array_foreach(x, index, record) {
        const json_t *other = json_array_get(y, index);
        double p = json_number_value(json_object_get(record, "loss"));
        double q = json_number_value(json_object_get(other, "loss"));
        ck_assert(json_equal(json_object_get(record, "step"), json_object_get(other, "step")));
        ck_assert(p > 0 && q > 0);
        worst = fmax(worst, fabs(p - q) / p);
    }
    json_decref(x);
    json_decref(y);
    return worst;
}

static void expect_same_bits(const char *a, const char *b) {
    char x[HASH_HEX_SIZE], y[HASH_HEX_SIZE];
    expect_same_log(a, b, "step");
    ck_assert_int_eq(tiny_newest(a, "model.safetensors", x),
                     tiny_newest(b, "model.safetensors", y));
    ck_assert_msg(strcmp(x, y) == 0, "the weights of %s and %s differ", a, b);
    ck_assert(state_difference(a, b) == 0);
    // Evaluations are summed in another order, in double.
    ck_assert_double_lt(loss_difference(a, b, "eval"), 1e-12);
}

// --- Equality ------------------------------------------------------------------------------------

START_TEST(one_two_and_four_ranks_give_the_same_bits) {
    tiny_prepare();
    run_named("one", 1, true);
    run_named("two", 2, true);
    run_named("four", 4, true);
    expect_same_bits("one", "two");
    expect_same_bits("one", "four");
    // Summing in pairs is a choice: without it the order, and so the bits, are others.
    run_named("plain", 1, false);
    ck_assert(state_difference("one", "plain") > 0);
    ck_assert_double_lt(loss_difference("one", "plain", "step"), 1e-4);
}
END_TEST

// Selection bias, micro balance, z-loss, document masks with their uneven targets, moments in bf16.
START_TEST(every_option_gives_the_same_bits) {
    tiny_prepare();
    for (int variant = 0; variant < 3; variant++) {
        char names[2][32];
        for (int i = 0; i < 2; i++) {
            snprintf(names[i], sizeof names[i], "option%d_%d", variant, i);
            Job job = job_of(tiny_moe_recipe(names[i]));
            tiny_set(&job.recipe, "train.micro_batch=1");
            tiny_set(&job.recipe, "train.steps=12");
            tiny_set(&job.recipe, "parallel.pairwise=true");
            job.recipe.export_hf = variant != 0; // a selection bias has no Hugging Face form
            if (variant == 0) tiny_set(&job.recipe, "router.balance_bias=true");
            if (variant == 0) tiny_set(&job.recipe, "data.mask_documents=true");
            if (variant == 1) tiny_set(&job.recipe, "router.balance=micro");
            if (variant == 1) tiny_set(&job.recipe, "router.z_weight=1e-3");
            if (variant == 1) tiny_set(&job.recipe, "train.recompute=layer");
            if (variant == 2) tiny_set(&job.recipe, "optim.state_dtype=bf16");
            if (variant == 2) tiny_set(&job.recipe, "optim.clip_norm=0.1");
            run_ok(i ? 4 : 1, &job);
        }
        expect_same_bits(names[0], names[1]);
    }
}
END_TEST

static Job job_of_twelve(const char *name) {
    Job job = job_of(tiny_moe_recipe(name));
    tiny_set(&job.recipe, "train.micro_batch=1");
    tiny_set(&job.recipe, "train.global_batch=12");
    tiny_set(&job.recipe, "optim.schedule=constant");
    tiny_set(&job.recipe, "train.log_every=10");
    return job;
}

// Three ranks own parts of which no tensor's size is a multiple; sums have another order.
START_TEST(other_numbers_of_ranks_agree_within_rounding) {
    static const int worlds[] = {2, 3, 6};
    tiny_prepare();
    Job alone = job_of_twelve("alone");
    run_ok(1, &alone);
    for (int i = 0; i < 3; i++) {
        char name[32];
        snprintf(name, sizeof name, "world%d", worlds[i]);
        Job job = job_of_twelve(name);
        run_ok(worlds[i], &job);
        // fp32 sums of 12 gradients differ by 1e-7 of them; 40 steps of AdamW and the choices of
        // experts that they decide make more of it.
        ck_assert_double_lt(loss_difference("alone", name, "step"), 1e-4);
        ck_assert_double_lt(loss_difference("alone", name, "eval"), 1e-4);
        ck_assert(state_difference("alone", name) > 0);
    }
}
END_TEST

// Weights are not read, and gradients not sent, before their time: what a communicator with a
// stream of its own relies on. Dense, MoE and untied models; one and several micro-batches a rank.
START_TEST(collectives_may_happen_at_the_last_moment) {
    tiny_prepare();
    for (int variant = 0; variant < 6; variant++) {
        char names[2][32];
        for (int lazy = 0; lazy < 2; lazy++) {
            snprintf(names[lazy], sizeof names[lazy], "lazy%d_%d", variant, lazy);
            Job job =
                job_of(variant < 2 ? tiny_moe_recipe(names[lazy]) : tiny_dense_recipe(names[lazy]));
            if (variant % 2) tiny_set(&job.recipe, "train.micro_batch=1");
            if (variant == 1) tiny_set(&job.recipe, "train.recompute=layer");
            if (variant > 1) tiny_set(&job.recipe, "model.tie_word_embeddings=false");
            if (variant == 3) tiny_set(&job.recipe, "parallel.pairwise=true");
            if (variant > 3) tiny_set(&job.recipe, "parallel.zero=2");
            job.lazy = lazy;
            run_ok(2, &job);
            // Many buckets are on their way at the same time, while passes run.
            for (int r = 0; r < 2 && lazy; r++)
                ck_assert_int_ge(atomic_load(&rank_results_[r].checkpoint), 8);
        }
        expect_same_run_of(2, names[0], names[1]);
    }
}
END_TEST

// Shared gradients. With one micro-batch a rank the sums are the same ones; the norm, which would
// scale them, is added up over other buckets.
START_TEST(shared_gradients_train_the_same) {
    tiny_prepare();
    for (int shared = 0; shared < 2; shared++) {
        Job job = job_of(tiny_moe_recipe(shared ? "shared" : "kept"));
        tiny_set(&job.recipe, "optim.clip_norm=0");
        tiny_set(&job.recipe, "parallel.zero=%d", shared + 1);
        run_ok(2, &job);
        Job many = job_of_twelve(shared ? "shared12" : "kept12");
        tiny_set(&many.recipe, "parallel.zero=%d", shared + 1);
        run_ok(3, &many);
    }
    ck_assert(state_difference("kept", "shared") == 0);
    ck_assert(loss_difference("kept", "shared", "step") == 0);
    ck_assert(state_difference("kept12", "shared12") > 0);
    ck_assert_double_lt(loss_difference("kept12", "shared12", "step"), 1e-4);
    // Continued where gradients are kept, by another number of ranks.
    Job job = job_of_twelve("shared12");
    tiny_set(&job.recipe, "train.steps=%d", TINY_STEPS + 8);
    run_ok(4, &job);
    Job refused = job_of_twelve("refused");
    tiny_set(&refused.recipe, "parallel.zero=2");
    tiny_set(&refused.recipe, "parallel.pairwise=true");
    ranks_start(2, &comm_options, run_rank, &refused);
    ranks_join(2);
    for (int r = 0; r < 2; r++) ranks_expect(r, STATUS_USAGE, "parallel.zero = 2");
}
END_TEST

// --- Other numbers of ranks on the way -----------------------------------------------------------

START_TEST(resumes_with_any_number_of_ranks) {
    static const int worlds[] = {4, 2, 3, 1};
    char hex[HASH_HEX_SIZE];
    tiny_prepare();
    Job whole = job_of_twelve("whole");
    run_ok(1, &whole);
    for (int i = 0; i < 4; i++) {
        char file[64];
        Job job = job_of_twelve("changing");
        tiny_set(&job.recipe, "train.steps=%d", (i + 1) * TINY_STEPS / 4);
        run_ok(worlds[i], &job);
        ck_assert_ok(slices_file_name(worlds[i] - 1, worlds[i], file));
        ck_assert_int_eq(tiny_newest("changing", file, hex), (i + 1) * TINY_STEPS / 4);
    }
    ck_assert_double_lt(loss_difference("whole", "changing", "step"), 1e-4);
    ck_assert_double_lt(state_difference("whole", "changing"), 0.05); // and the same samples
}
END_TEST

START_TEST(resumes_with_the_same_bits_where_sums_have_one_order) {
    static const int worlds[] = {4, 1, 2};
    tiny_prepare();
    for (int i = 0; i < 4; i++) {
        Job job = job_of(tiny_moe_recipe(i < 3 ? "changing" : "whole"));
        tiny_set(&job.recipe, "train.micro_batch=1");
        tiny_set(&job.recipe, "optim.schedule=constant");
        tiny_set(&job.recipe, "parallel.pairwise=true");
        tiny_set(&job.recipe, "train.steps=%d", i < 3 ? 8 * (i + 1) : 24);
        tiny_set(&job.recipe, "train.log_every=8");
        run_ok(i < 3 ? worlds[i] : 1, &job);
    }
    ck_assert(state_difference("whole", "changing") == 0);
    expect_same_log("whole", "changing", "step");
}
END_TEST

TEST_MAIN_TIMEOUT("data parallel", 300, TEST(one_two_and_four_ranks_give_the_same_bits),
                  TEST(every_option_gives_the_same_bits),
                  TEST(other_numbers_of_ranks_agree_within_rounding),
                  TEST(collectives_may_happen_at_the_last_moment),
                  TEST(shared_gradients_train_the_same), TEST(resumes_with_any_number_of_ranks),
                  TEST(resumes_with_the_same_bits_where_sums_have_one_order))
