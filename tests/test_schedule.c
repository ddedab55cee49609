// Learning-rate schedules: exact where the phases meet, hand-computed in between.
#include "optim/schedule.h"

#include <math.h>
#include "tests/test.h"

// 10 steps of warm-up, then to 110: exact in binary wherever a test compares with ==.
static Schedule example(ScheduleKind kind) {
    return (Schedule){.kind = kind,
                      .peak = 0.3,
                      .final = 0.1,
                      .warmup_steps = 10,
                      .decay_steps = 20,
                      .total_steps = 110};
}

START_TEST(warmup_is_linear_from_zero_to_the_exact_peak) {
    for (int kind = SCHEDULE_COSINE; kind <= SCHEDULE_WSD; kind++) {
        Schedule s = example((ScheduleKind)kind);
        ck_assert_double_eq(schedule_rate(&s, 1), 0.3 * (1.0 / 10.0));
        ck_assert_double_eq(schedule_rate(&s, 5), 0.3 * 0.5);
        ck_assert_double_eq(schedule_rate(&s, 10), 0.3);
    }
}
END_TEST

START_TEST(cosine_ends_at_the_exact_final_rate) {
    Schedule s = example(SCHEDULE_COSINE);
    // A quarter, half and three quarters of the way: (1 + cos(x·pi))/2 = 0.853.., 0.5, 0.146..
    // 1e-15: a few rounding errors of values below 1.
    ck_assert_double_eq_tol(schedule_rate(&s, 35), 0.1 + 0.2 * 0.85355339059327376, 1e-15);
    ck_assert_double_eq_tol(schedule_rate(&s, 60), 0.2, 1e-15);
    ck_assert_double_eq_tol(schedule_rate(&s, 85), 0.1 + 0.2 * 0.14644660940672624, 1e-15);
    ck_assert_double_eq(schedule_rate(&s, 110), 0.1);
    ck_assert_double_eq(schedule_rate(&s, 1000), 0.1);
}
END_TEST

START_TEST(constant_stays_at_the_peak) {
    Schedule s = example(SCHEDULE_CONSTANT);
    ck_assert_double_eq(schedule_rate(&s, 11), 0.3);
    ck_assert_double_eq(schedule_rate(&s, 110), 0.3);
}
END_TEST

START_TEST(wsd_is_stable_then_falls_in_a_line) {
    Schedule s = example(SCHEDULE_WSD);
    ck_assert_double_eq(schedule_rate(&s, 50), 0.3);
    ck_assert_double_eq(schedule_rate(&s, 90), 0.3);
    ck_assert_double_eq_tol(schedule_rate(&s, 100), 0.2, 1e-15); // halfway down; one rounding
    ck_assert_double_eq_tol(schedule_rate(&s, 109), 0.1 + 0.2 / 20, 1e-15);
    ck_assert_double_eq(schedule_rate(&s, 110), 0.1);
    s.decay_steps = 0; // never leaves the peak
    ck_assert_double_eq(schedule_rate(&s, 110), 0.3);
}
END_TEST

START_TEST(rates_never_rise_after_warmup) {
    for (int kind = SCHEDULE_COSINE; kind <= SCHEDULE_WSD; kind++) {
        Schedule s = example((ScheduleKind)kind);
        for (int64_t step = 10; step < 130; step++)
            ck_assert_double_le(schedule_rate(&s, step + 1), schedule_rate(&s, step));
    }
}
END_TEST

START_TEST(edges_divide_by_nothing) {
    Schedule s = {.kind = SCHEDULE_COSINE, .peak = 1, .final = 0.5, .total_steps = 1};
    ck_assert_double_eq(schedule_rate(&s, 1), 0.5); // no warm-up, one step: the end
    s.warmup_steps = 1;
    ck_assert_double_eq(schedule_rate(&s, 1), 1); // the warm-up fills the run
    s.warmup_steps = 4;
    s.total_steps = 2; // longer than the run: still on the way up
    ck_assert_double_eq(schedule_rate(&s, 2), 0.5);
    s = (Schedule){
        .kind = SCHEDULE_WSD, .peak = 1, .final = 0.5, .decay_steps = 9, .total_steps = 3};
    ck_assert_double_eq(schedule_rate(&s, 3), 0.5);
    ck_assert(isfinite(schedule_rate(&s, 0)));
}
END_TEST

TEST_MAIN("schedule", TEST(warmup_is_linear_from_zero_to_the_exact_peak),
          TEST(cosine_ends_at_the_exact_final_rate), TEST(constant_stays_at_the_peak),
          TEST(wsd_is_stable_then_falls_in_a_line), TEST(rates_never_rise_after_warmup),
          TEST(edges_divide_by_nothing))
