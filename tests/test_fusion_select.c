// Choosing blocks: the score, the threshold rule, the exact budget search against brute force,
// manual lists, and demands that cannot be met.
#include <math.h>
#include "base/random.h"
#include "model/fusion.h"
#include "tests/test.h"

static FusionPlan plan_of(int num_layers, int num_experts, int follower_copies) {
    return (FusionPlan){.num_source_layers = num_layers,
                        .num_experts = num_experts,
                        .top_k = 1,
                        .follower_copies = follower_copies,
                        .elsewhere_copies = true,
                        .router_std = 0.02,
                        .router = {.gate = GATE_STRAIGHT_THROUGH, .gate_scale = 1}};
}

static Similarity uniform(int num_layers, int max_block, double cosine, double norm) {
    Similarity s;
    ck_assert_ok(similarity_create(num_layers, max_block, &s));
    s.tokens = 1;
    for (int l = 0; l < num_layers; l++) {
        for (int n = 1; n <= max_block && l + n < num_layers; n++) {
            size_t i = similarity_index(&s, l, n);
            s.s_out[i] = s.s_mlp[i] = cosine;
            s.d_norm[i] = norm;
        }
    }
    return s;
}

static Similarity random_similarity(int num_layers, int max_block, uint64_t seed) {
    Similarity s = uniform(num_layers, max_block, 0, 0);
    for (size_t i = 0; i < (size_t)(num_layers * max_block); i++) {
        if (isnan(s.s_out[i])) continue;
        s.s_out[i] = random_uniform(seed, 0, i);
        s.s_mlp[i] = random_uniform(seed, 1, i);
        s.d_norm[i] = random_uniform(seed, 2, i);
    }
    return s;
}

static void set_pair(Similarity *s, int layer, int n, double out, double mlp, double norm) {
    size_t i = similarity_index(s, layer, n);
    s->s_out[i] = out;
    s->s_mlp[i] = mlp;
    s->d_norm[i] = norm;
}

START_TEST(score_is_the_mean_of_its_followers) {
    Similarity s = uniform(4, 2, 0, 0);
    set_pair(&s, 1, 1, 0.9, 0.7, 0.2);
    set_pair(&s, 1, 2, 0.8, 0.4, 0.1);
    // (0.9+0.7)/2 - 0.5*0.2 = 0.7; (0.8+0.4)/2 - 0.5*0.1 = 0.55. Doubles: rounding only.
    ck_assert_double_eq_tol(fusion_block_score(&s, 0.5, 1, 1), 0.7, 1e-15);
    ck_assert_double_eq_tol(fusion_block_score(&s, 0.5, 1, 2), 0.625, 1e-15);
    ck_assert(isnan(fusion_block_score(&s, 0.5, 1, 3)));
    ck_assert(isnan(fusion_block_score(&s, 0.5, 2, 2)));
    similarity_free(&s);
}
END_TEST

// --- threshold -----------------------------------------------------------------------------------

static const FusionOptions THRESHOLD = {.select = SELECT_THRESHOLD,
                                        .delta = 0.1,
                                        .epsilon = 0.3,
                                        .lambda = 1,
                                        .max_block = 1,
                                        .protect_first = 1,
                                        .protect_last = 1};

START_TEST(threshold_takes_by_score_while_layers_are_free) {
    Similarity s = uniform(8, 1, 0.5, 0);
    set_pair(&s, 2, 1, 0.95, 0.95, 0); // blocked by 3+1
    set_pair(&s, 3, 1, 0.99, 0.99, 0);
    set_pair(&s, 4, 1, 0.97, 0.97, 0); // blocked by 3+1
    set_pair(&s, 5, 1, 0.92, 0.92, 0);
    set_pair(&s, 0, 1, 1.00, 1.00, 0); // protected
    set_pair(&s, 6, 1, 1.00, 1.00, 0); // protected
    FusionPlan plan = plan_of(8, 3, 2);
    ck_assert_ok(fusion_select(&THRESHOLD, &s, &plan));
    ck_assert_int_eq(plan.num_blocks, 2);
    ck_assert_int_eq(plan.blocks[0].base, 3);
    ck_assert_int_eq(plan.blocks[1].base, 5);
    ck_assert_double_eq(plan.blocks[0].score, 0.99);
    ck_assert_int_eq(fusion_target_layers(&plan), 6);
    similarity_free(&s);
}
END_TEST

START_TEST(threshold_needs_all_three_measures_of_every_follower) {
    const struct {
        double out, mlp, norm;
        int blocks;
    } cases[] = {
        {0.95, 0.95, 0.2, 1},
        {0.9, 0.95, 0.2, 0}, // exactly 1 - delta is not above it
        {0.95, 0.9, 0.2, 0},
        {0.95, 0.95, 0.3, 0}, // exactly epsilon is not below it
    };
    FusionOptions options = THRESHOLD;
    options.delta = 1 - 0.9; // the same rounding as in 1 - delta > s
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        Similarity s = uniform(6, 1, 0, 0);
        set_pair(&s, 2, 1, cases[i].out, cases[i].mlp, cases[i].norm);
        FusionPlan plan = plan_of(6, 3, 2);
        ck_assert_ok(fusion_select(&options, &s, &plan));
        ck_assert_msg(plan.num_blocks == cases[i].blocks, "case %zu: %d blocks", i,
                      plan.num_blocks);
        similarity_free(&s);
    }
    // 1+2 fails through its first follower although the second passes; 4+1 remains.
    Similarity s = uniform(7, 2, 0, 0);
    set_pair(&s, 1, 2, 0.99, 0.99, 0);
    set_pair(&s, 4, 1, 0.95, 0.95, 0);
    options.max_block = 2;
    FusionPlan plan = plan_of(7, 5, 2);
    ck_assert_ok(fusion_select(&options, &s, &plan));
    ck_assert_int_eq(plan.num_blocks, 1);
    ck_assert_int_eq(plan.blocks[0].base, 4);
    similarity_free(&s);
}
END_TEST

START_TEST(threshold_breaks_ties_by_depth) {
    Similarity s = uniform(9, 2, 0.95, 0.1);
    FusionOptions options = THRESHOLD;
    options.max_block = 2;
    FusionPlan plan = plan_of(9, 5, 2);
    ck_assert_ok(fusion_select(&options, &s, &plan));
    ck_assert_int_eq(plan.num_blocks, 3); // 1+1, 3+1, 5+1: lowest first, smallest first
    for (int i = 0; i < 3; i++) {
        ck_assert_int_eq(plan.blocks[i].base, 1 + 2 * i);
        ck_assert_int_eq(plan.blocks[i].followers, 1);
    }
    similarity_free(&s);
}
END_TEST

// --- budget --------------------------------------------------------------------------------------

typedef struct Search {
    const FusionOptions *options;
    const Similarity *s;
    int end;
    double best;
} Search;

// Every set of blocks in layers layer..end-1 that prunes exactly `prune`, one after the other.
static void try_all(Search *search, int layer, int prune, double total) {
    if (layer >= search->end) {
        if (prune == 0 && total > search->best) search->best = total;
        return;
    }
    try_all(search, layer + 1, prune, total);
    for (int n = 1; n <= search->options->max_block && n <= prune; n++) {
        if (layer + n >= search->end) break;
        double gain = n * fusion_block_score(search->s, search->options->lambda, layer, n);
        try_all(search, layer + n + 1, prune - n, total + gain);
    }
}

static double brute_force(const FusionOptions *options, const Similarity *s, int num_layers) {
    Search search = {options, s, num_layers - options->protect_last, -INFINITY};
    try_all(&search, options->protect_first, options->prune_layers, 0);
    return search.best;
}

static void check_budget(const FusionOptions *options, const Similarity *s, int num_layers) {
    FusionPlan plan = plan_of(num_layers, 13, 4);
    double best = brute_force(options, s, num_layers);
    if (best == -INFINITY) {
        ck_assert_fails(fusion_select(options, s, &plan), STATUS_USAGE, "at most");
        return;
    }
    ck_assert_ok(fusion_select(options, s, &plan));
    double total = 0;
    for (int i = 0; i < plan.num_blocks; i++) {
        const FusionBlock *block = &plan.blocks[i];
        ck_assert_int_ge(block->base, options->protect_first);
        ck_assert_int_lt(block->base + block->followers, num_layers - options->protect_last);
        total += block->followers * block->score;
    }
    ck_assert_int_eq(num_layers - fusion_target_layers(&plan), options->prune_layers);
    // The two sum the same few terms in another order.
    ck_assert_double_eq_tol(total, best, 1e-12);
}

START_TEST(budget_equals_brute_force) {
    for (int num_layers = 1; num_layers <= 10; num_layers++) {
        for (int max_block = 1; max_block <= 3; max_block++) {
            Similarity s = random_similarity(num_layers, max_block, (uint64_t)num_layers);
            for (int ends = 0; ends <= 2; ends++) {
                for (int prune = 0; prune < num_layers + 1; prune++) {
                    FusionOptions options = {.select = SELECT_BUDGET,
                                             .prune_layers = prune,
                                             .lambda = 0.7,
                                             .max_block = max_block,
                                             .protect_first = ends,
                                             .protect_last = ends / 2};
                    check_budget(&options, &s, num_layers);
                }
            }
            similarity_free(&s);
        }
    }
}
END_TEST

// Two single blocks have the greater Σ Score (1.8 against 0.99), but each of their pruned layers
// is a worse match than the two of the pair.
START_TEST(budget_does_not_prefer_many_small_blocks) {
    Similarity s = uniform(8, 2, 0.9, 0);
    set_pair(&s, 2, 1, 0.99, 0.99, 0);
    set_pair(&s, 2, 2, 0.99, 0.99, 0);
    FusionOptions options = {.select = SELECT_BUDGET, .prune_layers = 2, .max_block = 2};
    FusionPlan plan = plan_of(8, 5, 2);
    ck_assert_ok(fusion_select(&options, &s, &plan));
    ck_assert_int_eq(plan.num_blocks, 1);
    ck_assert_int_eq(plan.blocks[0].base, 2);
    ck_assert_int_eq(plan.blocks[0].followers, 2);
    similarity_free(&s);
}
END_TEST

START_TEST(budget_beats_greedy_where_greedy_is_wrong) {
    Similarity s = uniform(6, 1, 0.1, 0);
    set_pair(&s, 1, 1, 0.9, 0.9, 0);
    set_pair(&s, 2, 1, 1.0, 1.0, 0); // greedy would take this, and then only 0.1 is left
    set_pair(&s, 3, 1, 0.9, 0.9, 0);
    FusionOptions options = {.select = SELECT_BUDGET,
                             .prune_layers = 2,
                             .max_block = 1,
                             .protect_first = 1,
                             .protect_last = 1};
    FusionPlan plan = plan_of(6, 3, 2);
    ck_assert_ok(fusion_select(&options, &s, &plan));
    ck_assert_int_eq(plan.blocks[0].base, 1);
    ck_assert_int_eq(plan.blocks[1].base, 3);
    similarity_free(&s);
}
END_TEST

START_TEST(impossible_budget_says_how_many_could_be_pruned) {
    Similarity s = uniform(24, 2, 0.9, 0);
    FusionOptions options = {.select = SELECT_BUDGET,
                             .prune_layers = 12,
                             .max_block = 1,
                             .protect_first = 1,
                             .protect_last = 1};
    FusionPlan plan = plan_of(24, 6, 2);
    ck_assert_fails(fusion_select(&options, &s, &plan), STATUS_USAGE,
                    "prune_layers = 12: at most 11 of 24 layers");
    options.protect_first = 1000; // more than there are
    ck_assert_fails(fusion_select(&options, &s, &plan), STATUS_USAGE, "at most 0 of 24");
    options.prune_layers = 0;
    ck_assert_ok(fusion_select(&options, NULL, &plan)); // nothing to choose, nothing to measure
    ck_assert_int_eq(plan.num_blocks, 0);
    ck_assert_int_eq(fusion_most_prunable(22, 3), 16); // 5 x 4 layers prune 15, 2 more prune 1
    similarity_free(&s);
}
END_TEST

START_TEST(demands_that_do_not_fit_are_named) {
    Similarity s = uniform(8, 2, 0.9, 0);
    FusionOptions options = {.select = SELECT_BUDGET, .prune_layers = 2, .max_block = 2};
    FusionPlan plan = plan_of(8, 4, 2);
    ck_assert_fails(fusion_select(&options, &s, &plan), STATUS_USAGE, "num_experts of at least 5");
    plan = plan_of(8, 6, 2);
    options.max_block = 3;
    ck_assert_fails(fusion_select(&options, &s, &plan), STATUS_USAGE, "blocks of 1 to 2");
    options.max_block = 2;
    ck_assert_fails(fusion_select(&options, NULL, &plan), STATUS_USAGE, "only manual");
    plan = plan_of(9, 6, 2);
    ck_assert_fails(fusion_select(&options, &s, &plan), STATUS_USAGE, "8 layers");
    plan = plan_of(8, 6, 2);
    plan.top_k = 7;
    ck_assert_fails(fusion_select(&options, &s, &plan), STATUS_USAGE, "top_k is 7");
    similarity_free(&s);
}
END_TEST

START_TEST(the_deepest_model_is_searched) {
    Similarity s = random_similarity(MODEL_MAX_LAYERS, 8, 5);
    FusionOptions options = {.select = SELECT_BUDGET, .prune_layers = 700, .max_block = 8};
    FusionPlan plan = plan_of(MODEL_MAX_LAYERS, 9, 1);
    ck_assert_ok(fusion_select(&options, &s, &plan));
    ck_assert_int_eq(fusion_target_layers(&plan), MODEL_MAX_LAYERS - 700);
    similarity_free(&s);
}
END_TEST

// --- manual --------------------------------------------------------------------------------------

static Status select_manual_text(const char *text, FusionPlan *plan) {
    FusionOptions options = {
        .select = SELECT_MANUAL, .blocks = text, .protect_first = 1, .protect_last = 1};
    *plan = plan_of(12, 6, 2);
    return fusion_select(&options, NULL, plan);
}

START_TEST(manual_blocks_are_read_in_any_order) {
    FusionPlan plan;
    ck_assert_ok(select_manual_text("  9+1 ,3 + 2", &plan));
    ck_assert_int_eq(plan.num_blocks, 2);
    ck_assert_int_eq(plan.blocks[0].base, 3);
    ck_assert_int_eq(plan.blocks[0].followers, 2);
    ck_assert_int_eq(plan.blocks[1].base, 9);
    ck_assert(isnan(plan.blocks[0].score));
}
END_TEST

START_TEST(bad_manual_blocks_are_named) {
    const struct {
        const char *text, *message;
    } cases[] = {
        {"", "empty"},
        {"   ", "empty"},
        {"3", "at \"3\""},
        {"3+", "at \"3+\""},
        {"3+0", "at \"3+0\""},
        {"-3+1", "at \"-3+1\""},
        {"3+1,", "at \"\""},
        {"3+1 9+1", "at \"3+1 9+1\""},
        {"3+1;9+1", "at \"3+1;9+1\""},
        {"3+99999999999999999999", "at \"3+999"},
        {"3+2, 4+1", "blocks 3+2 and 4+1 overlap"},
        {"3+1, 3+1", "overlap"},
        {"3+3", "num_experts of at least 7"},
        {"11+1", "ends at layer 12"},
        {"0+1", "protect_first = 1"},
        {"10+1", "protect_last = 1"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        FusionPlan plan;
        ck_assert_fails(select_manual_text(cases[i].text, &plan), STATUS_USAGE, cases[i].message);
    }
}
END_TEST

START_TEST(manual_blocks_get_a_score_where_there_is_one) {
    Similarity s = uniform(12, 1, 0.8, 0.1);
    FusionOptions options = {.select = SELECT_MANUAL, .blocks = "3+1, 6+2", .lambda = 1};
    FusionPlan plan = plan_of(12, 6, 2);
    ck_assert_ok(fusion_select(&options, &s, &plan));
    ck_assert_double_eq_tol(plan.blocks[0].score, 0.7, 1e-15); // rounding of one subtraction
    ck_assert(isnan(plan.blocks[1].score));                    // wider than what was measured
    similarity_free(&s);
}
END_TEST

TEST_MAIN("fusion_select", TEST(score_is_the_mean_of_its_followers),
          TEST(threshold_takes_by_score_while_layers_are_free),
          TEST(threshold_needs_all_three_measures_of_every_follower),
          TEST(threshold_breaks_ties_by_depth), TEST(budget_equals_brute_force),
          TEST(budget_does_not_prefer_many_small_blocks),
          TEST(budget_beats_greedy_where_greedy_is_wrong),
          TEST(impossible_budget_says_how_many_could_be_pruned),
          TEST(demands_that_do_not_fit_are_named), TEST(the_deepest_model_is_searched),
          TEST(manual_blocks_are_read_in_any_order), TEST(bad_manual_blocks_are_named),
          TEST(manual_blocks_get_a_score_where_there_is_one))
