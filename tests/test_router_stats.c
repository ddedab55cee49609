// Expert load, entropy and the balance loss, from sums whose answer is known by hand.
#include "tests/test.h"

#include <math.h>
#include "train/router_stats.h"

enum { LAYERS = 3, STRIDE = 4 };

// Layer 0 dense, layer 1 with 4 experts, layer 2 with 2; 10 tokens, top 1.
static ModelConfig config;
static double assignments[LAYERS * STRIDE], probability[LAYERS * STRIDE];
static double entropy[LAYERS], z[LAYERS];
static ModelSums sums = {.tokens = 10,
                         .stride = STRIDE,
                         .assignments = assignments,
                         .probability = probability,
                         .entropy = entropy,
                         .z = z};

static void fill(void) {
    config.num_layers = LAYERS;
    config.layers[1] = (LayerConfig){.num_experts = 4, .top_k = 1};
    config.layers[2] = (LayerConfig){.num_experts = 2, .top_k = 1};
    static const double counts[2][STRIDE] = {{5, 3, 2, 0}, {5, 5}};
    static const double probabilities[2][STRIDE] = {{4, 3, 2, 1}, {5, 5}};
    for (int l = 0; l < 2; l++) {
        memcpy(assignments + (l + 1) * STRIDE, counts[l], sizeof counts[l]);
        memcpy(probability + (l + 1) * STRIDE, probabilities[l], sizeof probabilities[l]);
    }
    entropy[1] = 12.5, entropy[2] = 10 * log(2);
    z[1] = 40, z[2] = 20;
}

START_TEST(an_uneven_layer) {
    fill();
    LayerStats stats;
    router_layer_stats(&config, &sums, 1, &stats);
    ck_assert_int_eq(stats.num_experts, 4);
    ck_assert(stats.load[0] == 0.5 && stats.load[1] == 0.3 && stats.load[3] == 0);
    ck_assert(stats.max_load == 0.5 && stats.max_over_mean == 2.0);
    ck_assert(stats.entropy == 1.25 && stats.z == 4.0);
    ck_assert_int_eq(stats.dead, 1);
    // 4 · (0.5·0.4 + 0.3·0.3 + 0.2·0.2) = 1.32; the tolerance is rounding of a few doubles.
    ck_assert_double_eq_tol(stats.balance, 1.32, 1e-14);
}
END_TEST

START_TEST(a_balanced_layer_is_one) {
    fill();
    LayerStats stats;
    router_layer_stats(&config, &sums, 2, &stats);
    ck_assert(stats.balance == 1.0 && stats.max_over_mean == 1.0);
    ck_assert_int_eq(stats.dead, 0);
    ck_assert_double_eq_tol(router_balance(&config, &sums), 2.32, 1e-14);
    ck_assert_double_eq_tol(router_z(&config, &sums), 6.0, 1e-14);
    ck_assert_int_eq(router_moe_layers(&config), 2);
}
END_TEST

START_TEST(top_k_does_not_change_the_scale) {
    fill();
    for (int i = 0; i < 2 * STRIDE; i++) assignments[STRIDE + i] *= 2; // k = 2: twice the rows
    LayerStats stats;
    router_layer_stats(&config, &sums, 2, &stats);
    ck_assert(stats.balance == 1.0 && stats.load[0] == 0.5);
}
END_TEST

START_TEST(dense_layers_and_empty_sums_are_zero) {
    fill();
    LayerStats stats;
    router_layer_stats(&config, &sums, 0, &stats);
    ck_assert(stats.num_experts == 0 && stats.balance == 0 && stats.dead == 0);
    memset(assignments, 0, sizeof assignments);
    sums.tokens = 0;
    router_layer_stats(&config, &sums, 1, &stats);
    ck_assert(stats.balance == 0 && stats.max_over_mean == 0 && stats.entropy == 0);
    ck_assert_int_eq(stats.dead, 4);
}
END_TEST

TEST_MAIN("router_stats", TEST(an_uneven_layer), TEST(a_balanced_layer_is_one),
          TEST(top_k_does_not_change_the_scale), TEST(dense_layers_and_empty_sums_are_zero))
