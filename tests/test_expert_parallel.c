// Experts shared out among ranks: the same training as without, checkpoints that fit any number of
// expert ranks, and what is refused.
#include "tests/parallel_job.h"

// Four experts, and one micro-batch a step on each of `world` ranks. Without clipping: the norm of
// the gradients is added up in another order where they are owned by other ranks.
static Job expert_job(const char *name, int world, int expert_ranks) {
    Job job = job_of(tiny_moe_recipe(name));
    tiny_set(&job.recipe, "lfuc.num_experts=4");
    tiny_set(&job.recipe, "lfuc.follower_copies=2");
    tiny_set(&job.recipe, "train.global_batch=%d", 2 * world);
    tiny_set(&job.recipe, "optim.clip_norm=0");
    tiny_set(&job.recipe, "checkpoint.dtype=f32");
    tiny_set(&job.recipe, "export.dtype=f32");
    tiny_set(&job.recipe, "parallel.expert=%d", expert_ranks);
    return job;
}

static double logged(const json_t *record, const char *key) {
    return json_number_value(json_object_get(record, key));
}

// Losses of two runs, relative: at most `tolerance`, 0 for the same bits.
static void expect_losses(const char *a, const char *b, const char *kind, double tolerance) {
    json_t *x = tiny_log(a, kind), *y = tiny_log(b, kind), *record;
    size_t i;
    ck_assert_uint_gt(json_array_size(x), 0);
    ck_assert_uint_eq(json_array_size(x), json_array_size(y));
    json_array_foreach(x, i, record) {
        double p = logged(record, "loss"), q = logged(json_array_get(y, i), "loss");
        ck_assert_msg(fabs(p - q) <= tolerance * q, "%s %zu: %s has %.17g, %s %.17g", kind, i, a, p,
                      b, q);
    }
    json_decref(x);
    json_decref(y);
}

static void expect_same_file(const char *a, const char *b, const char *file) {
    char path[IO_PATH_MAX], x[HASH_HEX_SIZE], y[HASH_HEX_SIZE];
    uint64_t bytes;
    ck_assert_ok(io_path(path, "%s", tiny_run_path(a, file)));
    ck_assert_ok(hash_file(path, x, &bytes, NULL, NULL));
    ck_assert_ok(io_path(path, "%s", tiny_run_path(b, file)));
    ck_assert_ok(hash_file(path, y, &bytes, NULL, NULL));
    ck_assert_msg(strcmp(x, y) == 0, "%s of %s and %s differ", file, a, b);
}

static void expect_same_weights(const char *a, const char *b) {
    char x[HASH_HEX_SIZE], y[HASH_HEX_SIZE];
    ck_assert_int_eq(tiny_newest(a, "model.safetensors", x),
                     tiny_newest(b, "model.safetensors", y));
    ck_assert_msg(strcmp(x, y) == 0, "weights of %s and %s differ", a, b);
    expect_same_file(a, b, "export/model.safetensors");
}

// --- The same as without -------------------------------------------------------------------------

typedef struct Variant {
    const char *name, *settings[3];
} Variant;

// In fp32, to the bit: rows of one rank are computed by themselves, and gradients added up in the
// order of the ranks, as without.
START_TEST(shared_experts_train_to_the_same_bits) {
    // expert_room: none of the layers fits, some do, all do. Places in the pool are multiples of
    // 128 rows, so that some fit only where there are as many.
    static const Variant variants[] = {
        {"none", {"parallel.expert_room=0", NULL}},
        {"one", {"parallel.expert_room=0.01", "data.sequence_length=96", NULL}},
        {"some", {"parallel.expert_room=0.2", "lfuc.top_k=2", "data.sequence_length=96"}},
        {"k1", {NULL}},
        {"k2", {"lfuc.top_k=2", "router.gate=renorm", NULL}},
        {"again", {"lfuc.top_k=3", "train.recompute=layer", "router.gate=straight_through"}},
        {"thin", {"router.balance=micro", "train.recompute=norms", "lfuc.elsewhere=dense"}},
    };
    tiny_prepare();
    for (size_t v = 0; v < sizeof variants / sizeof variants[0]; v++) {
        for (int world = 2; world <= 4; world += 2) {
            char name[2][32];
            for (int shared = 0; shared < 2; shared++) {
                snprintf(name[shared], 32, "%s-%d-%d", variants[v].name, world, shared);
                Job job = expert_job(name[shared], world, shared ? world : 1);
                for (int i = 0; i < 3 && variants[v].settings[i]; i++)
                    tiny_set(&job.recipe, "%s", variants[v].settings[i]);
                run_ok(world, &job);
            }
            expect_losses(name[0], name[1], "step", 0);
            expect_losses(name[0], name[1], "eval", 0);
            expect_same_weights(name[0], name[1]);
        }
    }
}
END_TEST

// Gradients of the replicas of a group's experts are added up group by group, and clipping sees a
// norm that was: sums of a few numbers in another order, through 40 steps.
START_TEST(groups_beside_each_other_train_alike) {
    static const double rounding = 1e-5;
    tiny_prepare();
    Job plain = expert_job("plain", 4, 1), grouped = expert_job("grouped", 4, 2);
    Job three = expert_job("three", 3, 3);
    tiny_set(&plain.recipe, "optim.clip_norm=0.5");
    tiny_set(&grouped.recipe, "optim.clip_norm=0.5");
    run_ok(4, &plain);
    run_ok(4, &grouped);
    expect_losses("plain", "grouped", "step", rounding);
    expect_losses("plain", "grouped", "eval", rounding);
    // The experts of three ranks are three.
    tiny_set(&three.recipe, "lfuc.num_experts=3");
    tiny_set(&three.recipe, "lfuc.follower_copies=1");
    run_ok(3, &three);
    Job alone = three;
    tiny_set(&alone.recipe, "run.name=alone");
    tiny_set(&alone.recipe, "parallel.expert=1");
    run_ok(1, &alone);
    expect_losses("alone", "three", "step", rounding);
}
END_TEST

// --- What is told once ---------------------------------------------------------------------------

// All-gathers of the rank's group of experts, which is how ranks tell each other their routing.
static const CommunicatorOps *plain_ops_;

static Status counted_all_gather(Communicator *c, void *values, int64_t part, CommType type,
                                 CommTicket *ticket) {
    atomic_fetch_add(&rank_results_[c->rank].checkpoint, 1);
    return plain_ops_->all_gather(c, values, part, type, ticket);
}

// The first split makes the groups of experts.
static Status counted_split(Communicator *c, int color, Communicator **out) {
    static CommunicatorOps counted;
    static int splits;
    TRY(plain_ops_->split(c, color, out));
    if (splits++ > 0) return STATUS_OK;
    counted = *(*out)->ops;
    counted.all_gather = counted_all_gather;
    (*out)->ops = &counted;
    return STATUS_OK;
}

static Status count_gathers(const Recipe *recipe, const RunOptions *options) {
    static CommunicatorOps ops;
    plain_ops_ = options->communicator->ops;
    ops = *plain_ops_;
    ops.split = counted_split;
    options->communicator->ops = &ops;
    return run_training(recipe, options);
}

// Backward makes layers again, or their rows travel again: with train.recompute or without room in
// the pool all but the last, with little room some. The routing of a layer and micro-batch is known
// by then. Two micro-batches a step on each rank, and no evaluations.
START_TEST(routing_is_told_once_per_layer_and_pass) {
    enum { STEPS = 12, MICRO_BATCHES = 2, LAYERS = 3 };
    static const Variant variants[] = {
        {"kept", {NULL}},
        {"layer", {"train.recompute=layer", NULL}},
        {"none", {"parallel.expert_room=0", NULL}},
        {"little", {"parallel.expert_room=0.2", NULL}},
    };
    tiny_prepare();
    for (size_t v = 0; v < sizeof variants / sizeof variants[0]; v++) {
        char name[2][32];
        snprintf(name[0], 32, "told-%s", variants[0].name);
        snprintf(name[1], 32, "told-%s", variants[v].name);
        Job job = expert_job(name[1], 2, 2);
        tiny_set(&job.recipe, "train.global_batch=%d", 2 * 2 * MICRO_BATCHES);
        tiny_set(&job.recipe, "train.steps=%d", STEPS);
        tiny_set(&job.recipe, "data.valid=");
        tiny_set(&job.recipe, "data.sequence_length=96");
        for (int i = 0; i < 3 && variants[v].settings[i]; i++)
            tiny_set(&job.recipe, "%s", variants[v].settings[i]);
        job.victim = 1;
        job.train = count_gathers;
        run_ok(2, &job);
        ck_assert_int_eq(atomic_load(&rank_results_[1].checkpoint), STEPS * MICRO_BATCHES * LAYERS);
        expect_losses(name[0], name[1], "step", 0);
        expect_same_weights(name[0], name[1]);
    }
}
END_TEST

// --- Checkpoints ---------------------------------------------------------------------------------

START_TEST(checkpoints_fit_any_expert_ranks) {
    static const int worlds[] = {4, 2, 4, 1, 2, 4}, groups[] = {2, 2, 4, 1, 1, 2};
    tiny_prepare();
    Job whole = expert_job("whole", 4, 1), job = expert_job("moves", 4, 2);
    run_ok(4, &whole);
    int64_t step = 0;
    char hex[HASH_HEX_SIZE];
    for (int i = 0; i < 6; i++) {
        Trigger trigger = {.path = "log.jsonl", .number = 8, .signal = SIGUSR1};
        tiny_set(&job.recipe, "parallel.expert=%d", groups[i]);
        job.victim = i < 5 ? 0 : ALL_RANKS;
        job.hook = on_operation;
        job.context = &trigger;
        ranks_start(worlds[i], &comm_options, run_rank, &job);
        ranks_join(worlds[i]);
        for (int r = 0; r < worlds[i]; r++)
            ranks_expect(r, i < 5 ? STATUS_PREEMPTED : STATUS_OK, "");
        const int64_t before = step;
        step = tiny_newest("moves", "state.json", hex);
        ck_assert_int_gt(step, before); // there is something to move
    }
    expect_losses("whole", "moves", "step", 1e-5); // sums in another order
}
END_TEST

START_TEST(an_interrupted_run_ends_with_the_same_bits) {
    tiny_prepare();
    Job whole = expert_job("whole", 4, 2);
    run_ok(4, &whole);
    Job killed = expert_job("killed", 4, 2);
    Trigger trigger = {.number = 150, .signal = SIGKILL};
    killed.victim = 3;
    killed.hook = on_operation;
    killed.context = &trigger;
    ranks_start(4, &comm_options, run_rank, &killed);
    ranks_join(4);
    ck_assert_int_eq(rank_results_[3].status, RANK_KILLED + SIGKILL);
    for (int r = 0; r < 3; r++) {
        ranks_expect(r, STATUS_COMMUNICATION, "rank ");
        ck_assert_double_lt(rank_results_[r].seconds, 25);
    }
    killed.victim = ALL_RANKS;
    run_ok(4, &killed);
    expect_same_run_of(4, "whole", "killed");
    expect_same_weights("whole", "killed");
}
END_TEST

// A run that starts at the end of another has nothing to save, and exports all the same.
START_TEST(the_end_of_another_run_is_exported) {
    char path[IO_PATH_MAX];
    int64_t step;
    tiny_prepare();
    Job first = expert_job("first", 2, 2), second = expert_job("second", 2, 2);
    run_ok(2, &first);
    ck_assert_ok(checkpoint_find(tiny_run_path("first", "checkpoints"), &step, path));
    second.options.resume = RESUME_FROM;
    second.options.resume_path = path;
    run_ok(2, &second);
    expect_same_file("first", "second", "export/model.safetensors");
}
END_TEST

// --- Bad input -----------------------------------------------------------------------------------

static void expect_refused(const Job *job, int world, const char *text) {
    Job copy = *job;
    ranks_start(world, &comm_options, run_rank, &copy);
    ranks_join(world);
    for (int r = 0; r < world; r++) ranks_expect(r, STATUS_USAGE, text);
}

START_TEST(what_does_not_divide_is_refused_by_all) {
    tiny_prepare();
    Job job = expert_job("bad", 2, 3);
    expect_refused(&job, 2, "parallel.expert = 3 does not divide 2 ranks");
    job = expert_job("bad", 3, 3);
    expect_refused(&job, 3, "parallel.expert = 3 does not divide lfuc.num_experts = 4");
    ck_assert(!io_exists(tiny_run_path("bad", "plan"))); // before anything is measured
    job = expert_job("bad", 2, 2);
    tiny_set(&job.recipe, "parallel.zero=2");
    expect_refused(&job, 2, "does not go with parallel.zero = 2");
    job = expert_job("bad", 2, 2);
    tiny_set(&job.recipe, "parallel.pairwise=true");
    expect_refused(&job, 2, "does not go with parallel.pairwise = true");
    Job dense = job_of(tiny_dense_recipe("dense"));
    tiny_set(&dense.recipe, "parallel.expert=2");
    expect_refused(&dense, 2, "the model has no experts");
    expect_exit(&dense.recipe, NULL, STATUS_USAGE);
    expect_message(&dense.recipe, "parallel.expert = 2 does not divide 1 ranks");
}
END_TEST

TEST_MAIN_TIMEOUT("expert parallel", 300, TEST(shared_experts_train_to_the_same_bits),
                  TEST(groups_beside_each_other_train_alike),
                  TEST(routing_is_told_once_per_layer_and_pass),
                  TEST(checkpoints_fit_any_expert_ranks),
                  TEST(an_interrupted_run_ends_with_the_same_bits),
                  TEST(the_end_of_another_run_is_exported),
                  TEST(what_does_not_divide_is_refused_by_all))
