// The order of samples: a permutation per epoch, and exact shares of sources.
#include <math.h>
#include "base/random.h"
#include "data/mixture.h"
#include "data/order.h"
#include "tests/test.h"

enum { MAX_COUNT = 5000 };

static bool is_bijection(const Order *order, unsigned char *seen) {
    memset(seen, 0, order->count);
    for (uint64_t i = 0; i < order->count; i++) {
        uint64_t image = order_at(order, i);
        if (image >= order->count || seen[image]) return false;
        seen[image] = 1;
    }
    return true;
}

START_TEST(every_order_is_a_bijection) {
    static unsigned char seen[MAX_COUNT];
    for (uint64_t count = 1; count <= MAX_COUNT; count += count < 300 ? 1 : 47) {
        for (uint64_t key = 0; key < 3; key++) {
            Order order;
            order_init(&order, count, 17 + key, key, 2 * key);
            ck_assert_msg(is_bijection(&order, seen), "count %lu key %lu", (unsigned long)count,
                          (unsigned long)key);
        }
    }
    Order order;
    order_init(&order, MAX_COUNT, 1, 0, 0);
    ck_assert(is_bijection(&order, seen));
}
END_TEST

START_TEST(large_counts_stay_inside) {
    const uint64_t counts[] = {(UINT64_C(1) << 32) + 1, UINT64_C(225000000000),
                               (UINT64_C(1) << 62) - 1};
    for (int c = 0; c < 3; c++) {
        Order order;
        order_init(&order, counts[c], 5, 0, 0);
        for (uint64_t i = 0; i < 1000; i++) ck_assert_uint_lt(order_at(&order, i), counts[c]);
    }
}
END_TEST

// How many of the first 1000 positions two orders agree on.
static int agreements(const Order *a, const Order *b) {
    int same = 0;
    for (uint64_t i = 0; i < 1000; i++) same += order_at(a, i) == order_at(b, i);
    return same;
}

START_TEST(orders_differ_from_identity_and_each_other) {
    Order base, seed, source, epoch;
    order_init(&base, 1000, 1, 0, 0);
    order_init(&seed, 1000, 2, 0, 0);
    order_init(&source, 1000, 1, 1, 0);
    order_init(&epoch, 1000, 1, 0, 1);
    int fixed = 0, neighbours = 0;
    for (uint64_t i = 0; i < 1000; i++) {
        fixed += order_at(&base, i) == i;
        if (i > 0) neighbours += order_at(&base, i) == order_at(&base, i - 1) + 1;
    }
    // Agreements of random permutations are Poisson with mean 1: ten or more has p < 1.2e-7.
    ck_assert_int_lt(fixed, 10);
    ck_assert_int_lt(neighbours, 10);
    ck_assert_int_lt(agreements(&base, &seed), 10);
    ck_assert_int_lt(agreements(&base, &source), 10);
    ck_assert_int_lt(agreements(&base, &epoch), 10);
}
END_TEST

// Over many keys, where position 0 and the last go, and which pair (0, 1) goes to, is uniform.
START_TEST(images_are_uniform) {
    enum { COUNT = 12, KEYS = 26400 };
    static int single[2][COUNT], pair[COUNT][COUNT];
    for (int key = 0; key < KEYS; key++) {
        Order order;
        order_init(&order, COUNT, (uint64_t)key, 0, 0);
        single[0][order_at(&order, 0)]++;
        single[1][order_at(&order, COUNT - 1)]++;
        pair[order_at(&order, 0)][order_at(&order, 1)]++;
    }
    for (int p = 0; p < 2; p++) {
        double chi = 0, expected = (double)KEYS / COUNT;
        for (int i = 0; i < COUNT; i++) chi += pow(single[p][i] - expected, 2) / expected;
        ck_assert_double_lt(chi, 31.3); // 11 degrees of freedom, p = 0.001
    }
    double chi = 0, expected = (double)KEYS / (COUNT * (COUNT - 1));
    for (int i = 0; i < COUNT; i++)
        for (int j = 0; j < COUNT; j++)
            if (i != j) chi += pow(pair[i][j] - expected, 2) / expected;
    ck_assert_double_lt(chi, 187.0); // 131 degrees of freedom, p = 0.001
}
END_TEST

// The order is part of every run that was ever started: it must not change by accident.
START_TEST(order_is_frozen) {
    const uint64_t expected[] = {57, 83, 48, 50, 31, 38, 74, 3};
    Order order;
    order_init(&order, 100, 1234, 2, 3);
    for (uint64_t i = 0; i < 8; i++) ck_assert_uint_eq(order_at(&order, i), expected[i]);
}
END_TEST

// The largest distance of any source from its share over `samples` samples.
static double worst_error(const double *weights, int count, int samples) {
    uint64_t consumed[LOADER_MAX_SOURCES] = {0};
    double worst = 0;
    Mixture mixture;
    ck_assert_ok(mixture_init(&mixture, weights, count));
    for (int n = 1; n <= samples; n++) {
        consumed[mixture_next(&mixture, consumed)]++;
        for (int i = 0; i < count; i++) {
            double share = (double)n * (double)mixture.weight[i] / (double)mixture.total;
            worst = fmax(worst, fabs((double)consumed[i] - share));
        }
    }
    return worst;
}

START_TEST(shares_are_exact_within_a_sample) {
    const double even[] = {1, 1, 1}, skewed[] = {1000, 1, 1, 1, 1, 1, 1, 1}, one[] = {7};
    ck_assert_double_lt(worst_error(even, 3, 3000), 1);
    ck_assert_double_lt(worst_error(skewed, 8, 20000), 1);
    ck_assert_double_lt(worst_error(one, 1, 100), 1);
    for (uint64_t trial = 0; trial < 200; trial++) {
        double weights[LOADER_MAX_SOURCES];
        int count = 2 + (int)(random_u64(1, trial, 0) % (LOADER_MAX_SOURCES - 1));
        for (int i = 0; i < count; i++)
            weights[i] = exp(8 * random_uniform(1, trial, (uint64_t)i + 1)); // over three decades
        ck_assert_double_lt(worst_error(weights, count, 3000), 1);
    }
}
END_TEST

START_TEST(shares_near_the_end_of_counting) {
    // A state of 2^61 samples: products of counts and weights need more than 64 bits.
    const double weights[] = {3, 1};
    uint64_t consumed[2] = {UINT64_C(3) << 59, UINT64_C(1) << 59};
    int taken[2] = {0, 0};
    Mixture mixture;
    ck_assert_ok(mixture_init(&mixture, weights, 2));
    for (int n = 0; n < 400; n++) {
        int source = mixture_next(&mixture, consumed);
        consumed[source]++;
        taken[source]++;
    }
    ck_assert_int_eq(taken[0], 300);
    ck_assert_int_eq(taken[1], 100);
}
END_TEST

START_TEST(bad_weights_are_refused) {
    Mixture mixture;
    const double zero[] = {1, 0}, negative[] = {-1}, not_a_number[] = {NAN},
                 huge[] = {1e308, 1e308};
    ck_assert_fails(mixture_init(&mixture, zero, 2), STATUS_USAGE, "source 2 is 0");
    ck_assert_fails(mixture_init(&mixture, negative, 1), STATUS_USAGE, "expected a number above 0");
    ck_assert_fails(mixture_init(&mixture, not_a_number, 1), STATUS_USAGE, "nan");
    ck_assert_fails(mixture_init(&mixture, huge, 2), STATUS_USAGE, "infinity");
}
END_TEST

TEST_MAIN("order", TEST(every_order_is_a_bijection), TEST(large_counts_stay_inside),
          TEST(orders_differ_from_identity_and_each_other), TEST(images_are_uniform),
          TEST(order_is_frozen), TEST(shares_are_exact_within_a_sample),
          TEST(shares_near_the_end_of_counting), TEST(bad_weights_are_refused))
