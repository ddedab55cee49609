// Which steps are skipped, and that a NaN never gets into the window.
#include "optim/skip_rule.h"

#include <math.h>
#include "tests/test.h"

// Losses 1.9, 2.1, 1.9, ...: mean 2, deviation about 0.1.
static void feed(SkipRule *rule, int count) {
    for (int i = 0; i < count; i++)
        ck_assert_int_eq(skip_rule_decide(rule, i % 2 ? 2.1 : 1.9, 1.0), SKIP_NONE);
}

START_TEST(non_finite_steps_are_skipped_and_never_recorded) {
    SkipRule rule;
    skip_rule_init(&rule, 6, 8, 10);
    feed(&rule, 8);
    SkipRule before = rule;
    const double bad[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        ck_assert_int_eq(skip_rule_decide(&rule, bad[i], 1.0), SKIP_NON_FINITE);
        ck_assert_int_eq(skip_rule_decide(&rule, 2.0, bad[i]), SKIP_NON_FINITE);
    }
    ck_assert_mem_eq(rule.losses, before.losses, sizeof rule.losses);
    ck_assert_int_eq(rule.seen, before.seen);
    ck_assert_int_eq(rule.in_a_row, 6);
    ck_assert_int_eq(rule.skipped, 6);
    // The rule still works afterwards: this is what a NaN in the window would break.
    ck_assert_int_eq(skip_rule_decide(&rule, 100.0, 1.0), SKIP_SPIKE);
    ck_assert_int_eq(skip_rule_decide(&rule, 2.0, 1.0), SKIP_NONE);
    ck_assert_int_eq(rule.in_a_row, 0);
    ck_assert_int_eq(rule.skipped, 7);
}
END_TEST

START_TEST(spikes_are_measured_in_deviations) {
    SkipRule rule;
    skip_rule_init(&rule, 6, 8, 10);
    feed(&rule, 8);
    // Mean 2, deviation sqrt(8·0.01/7) = 0.1069: the limit is 2.6414.
    SkipRule at = rule;
    ck_assert_int_eq(skip_rule_decide(&at, 2.641, 1.0), SKIP_NONE);
    at = rule;
    ck_assert_int_eq(skip_rule_decide(&at, 2.642, 1.0), SKIP_SPIKE);
    ck_assert_int_eq(at.seen, rule.seen); // a spike does not widen the window
    at = rule;
    ck_assert_int_eq(skip_rule_decide(&at, -50.0, 1.0), SKIP_NONE); // only upwards
}
END_TEST

START_TEST(spike_rule_waits_for_half_a_window) {
    SkipRule rule;
    skip_rule_init(&rule, 1, 8, 10);
    ck_assert_int_eq(rule.warmup, 4);
    feed(&rule, 3);
    ck_assert_int_eq(skip_rule_decide(&rule, 1e6, 1.0), SKIP_NONE); // the fourth
    feed(&rule, 8);                                                 // pushes it out of the ring
    ck_assert_int_eq(skip_rule_decide(&rule, 3.0, 1.0), SKIP_SPIKE);
}
END_TEST

START_TEST(off_by_default_and_safe_on_equal_losses) {
    SkipRule rule;
    skip_rule_init(&rule, 0, 8, 10);
    feed(&rule, 20);
    ck_assert_int_eq(skip_rule_decide(&rule, 1e9, 1.0), SKIP_NONE);
    skip_rule_init(&rule, 6, 8, 10);
    for (int i = 0; i < 8; i++) ck_assert_int_eq(skip_rule_decide(&rule, 2, 1), SKIP_NONE);
    ck_assert_int_eq(skip_rule_decide(&rule, 2.0000001, 1), SKIP_NONE);
}
END_TEST

START_TEST(too_many_in_a_row_exhaust_the_rule) {
    SkipRule rule;
    skip_rule_init(&rule, 0, 128, 3);
    for (int i = 0; i < 2; i++) skip_rule_decide(&rule, NAN, 1);
    ck_assert(!skip_rule_exhausted(&rule));
    skip_rule_decide(&rule, 1, 1);
    for (int i = 0; i < 3; i++) {
        ck_assert(!skip_rule_exhausted(&rule));
        skip_rule_decide(&rule, NAN, 1);
    }
    ck_assert(skip_rule_exhausted(&rule));
    ck_assert_int_eq(rule.skipped, 5);
}
END_TEST

TEST_MAIN("skip_rule", TEST(non_finite_steps_are_skipped_and_never_recorded),
          TEST(spikes_are_measured_in_deviations), TEST(spike_rule_waits_for_half_a_window),
          TEST(off_by_default_and_safe_on_equal_losses), TEST(too_many_in_a_row_exhaust_the_rule))
