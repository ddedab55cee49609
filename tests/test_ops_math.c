// The vectorised exponential: accuracy over the whole range, and the special values.
#include "cpu/vector_math.h"
#include <float.h>
#include <math.h>
#include "tests/test.h"

START_TEST(exp_is_accurate) {
    double worst = 0, worst_x = 0;
    enum { COUNT = 2000000 };
    for (int i = 0; i <= COUNT; i++) {
        float x = -87.3f + 176.0f * (float)i / COUNT; // results from FLT_MIN to FLT_MAX
        double exact = exp((double)x);
        if (exact > FLT_MAX || exact < FLT_MIN) continue;
        double error = fabs(exp_f32(x) - exact) / exact;
        if (error > worst) worst = error, worst_x = x;
    }
    // the bound the header promises
    ck_assert_msg(worst <= 2e-7, "relative error %.3g at %.9g", worst, worst_x);
}
END_TEST

START_TEST(exp_of_special_values) {
    ck_assert(exp_f32(0.0f) == 1.0f);
    ck_assert(exp_f32(-0.0f) == 1.0f);
    ck_assert(exp_f32(-INFINITY) == 0.0f);
    ck_assert(exp_f32(INFINITY) == INFINITY);
    ck_assert(exp_f32(1e30f) == INFINITY);
    ck_assert(exp_f32(-1e30f) == 0.0f);
    ck_assert(exp_f32(88.8f) == INFINITY);
    ck_assert(isnan(exp_f32(NAN)));
    ck_assert(isnan(exp_f32(-NAN)));
    for (float x = -103.0f; x < -87.4f; x += 0.1f) // denormal results: within one unit
        ck_assert_msg(fabs(exp_f32(x) - exp((double)x)) <= 1.5e-45, "x %.9g", (double)x);
}
END_TEST

// In a vectorised loop the same values come out.
START_TEST(exp_in_a_loop) {
    enum { COUNT = 103 };
    float x[COUNT], y[COUNT];
    for (int i = 0; i < COUNT; i++) x[i] = (float)i - 50.0f;
    x[7] = NAN, x[20] = INFINITY, x[33] = -INFINITY;
#pragma omp simd
    for (int i = 0; i < COUNT; i++) y[i] = exp_f32(x[i]);
    for (int i = 0; i < COUNT; i++) {
        if (i == 7)
            ck_assert(isnan(y[i]));
        else if (i == 20 || i == 33)
            ck_assert(y[i] == (i == 20 ? INFINITY : 0.0f));
        else
            ck_assert(fabs(y[i] - exp((double)x[i])) <= 2e-7 * exp((double)x[i]));
    }
}
END_TEST

START_TEST(sigmoid_at_the_ends) {
    ck_assert(sigmoid_f32(0.0f) == 0.5f);
    ck_assert(sigmoid_f32(INFINITY) == 1.0f);
    ck_assert(sigmoid_f32(-INFINITY) == 0.0f);
    ck_assert(sigmoid_f32(200.0f) == 1.0f);
    ck_assert(sigmoid_f32(-200.0f) == 0.0f);
    ck_assert(isnan(sigmoid_f32(NAN)));
}
END_TEST

TEST_MAIN("vector math", TEST(exp_is_accurate), TEST(exp_of_special_values), TEST(exp_in_a_loop),
          TEST(sigmoid_at_the_ends))
