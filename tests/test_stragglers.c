// Which ranks are said to hold up the others, and when.
#include "tests/test.h"
#include "train/stragglers.h"

START_TEST(median_and_maximum_of_an_interval) {
    StepTimes times = {.count = 0};
    double median, maximum;
    step_times_take(&times, &median, &maximum);
    ck_assert(median == 0 && maximum == 0);
    const double seconds[] = {5, 1, 3};
    for (int i = 0; i < 3; i++) step_times_add(&times, seconds[i]);
    step_times_take(&times, &median, &maximum);
    ck_assert(median == 3 && maximum == 5);
    step_times_add(&times, 2); // the interval before is forgotten
    step_times_add(&times, 4);
    step_times_take(&times, &median, &maximum);
    ck_assert(median == 3 && maximum == 4);
    for (int i = 0; i < 3 * STRAGGLER_STEPS_MAX; i++) // only the latest count
        step_times_add(&times, i < 2 * STRAGGLER_STEPS_MAX ? 100 : 7);
    step_times_take(&times, &median, &maximum);
    ck_assert(median == 7 && maximum == 7);
}
END_TEST

// The ranks named for these medians over ten steps, as bits.
static int judge(Stragglers *stragglers, double a, double b, double c, double d) {
    const double medians[] = {a, b, c, d};
    bool slow[4];
    int bits = 0, count = stragglers_judge(stragglers, medians, 10, slow);
    for (int r = 0; r < stragglers->world; r++) {
        bits |= slow[r] << r;
        count -= slow[r];
    }
    ck_assert_int_eq(count, 0);
    return bits;
}

START_TEST(named_after_some_steps_and_once) {
    Stragglers s;
    ck_assert_ok(stragglers_open(4, 1.5, 30, &s));
    ck_assert_int_eq(judge(&s, 1, 1, 1.4, 1), 0); // below the ratio
    for (int i = 0; i < 2; i++) ck_assert_int_eq(judge(&s, 1, 1, 1.6, 1), 0);
    ck_assert_int_eq(judge(&s, 1, 1, 1, 1), 0); // caught up: counts anew
    for (int i = 0; i < 2; i++) ck_assert_int_eq(judge(&s, 1, 1, 1.6, 1), 0);
    ck_assert_int_eq(judge(&s, 1, 1, 1.6, 1), 4);
    for (int i = 0; i < 9; i++) ck_assert_int_eq(judge(&s, 1, 1, 1.6, 1), 0);
    ck_assert_int_eq(judge(&s, 1, 1, 1, 1), 0); // and again
    for (int i = 0; i < 2; i++) ck_assert_int_eq(judge(&s, 9, 1, 1.6, 1), 0);
    ck_assert_int_eq(judge(&s, 9, 1, 1.6, 1), 5);
    stragglers_close(&s);
}
END_TEST

START_TEST(two_ranks_and_none) {
    Stragglers s;
    ck_assert_ok(stragglers_open(2, 1.5, 10, &s));
    ck_assert_int_eq(judge(&s, 1, 1.4, 0, 0), 0);
    ck_assert_int_eq(judge(&s, 1, 1.6, 0, 0), 2);
    ck_assert_int_eq(judge(&s, 1.6, 1, 0, 0), 1);
    stragglers_close(&s);
    ck_assert_ok(stragglers_open(2, 0, 10, &s)); // switched off
    ck_assert_int_eq(judge(&s, 1, 100, 0, 0), 0);
    stragglers_close(&s);
}
END_TEST

TEST_MAIN("stragglers", TEST(median_and_maximum_of_an_interval),
          TEST(named_after_some_steps_and_once), TEST(two_ranks_and_none))
