// The console's lines, letter by letter.
#include "tests/test.h"

#include <math.h>
#include "train/console.h"

START_TEST(durations) {
    static const struct {
        double seconds;
        const char *text;
    } cases[] = {
        {0, "0:00"},    {6.6, "0:07"},     {59.4, "0:59"},           {59.6, "1:00"},
        {723, "12:03"}, {3723, "1:02:03"}, {86399.7, "1d 00:00:00"}, {435723, "5d 01:02:03"},
        {-1, "-"},      {NAN, "-"},        {INFINITY, "-"},          {1e12, "-"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char text[DURATION_TEXT_SIZE];
        ck_assert_str_eq(duration_text(cases[i].seconds, text), cases[i].text);
    }
}
END_TEST

START_TEST(rates) {
    static const struct {
        double rate;
        const char *text;
    } cases[] = {
        {0, "0"},           {812.4, "812"},   {999.4, "999"},   {999.6, "1.00k"}, {12345, "12.3k"},
        {1250000, "1.25M"}, {3.2e9, "3.20G"}, {5e13, "50000G"}, {NAN, "-"},       {-1, "-"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char text[DURATION_TEXT_SIZE];
        ck_assert_str_eq(rate_text(cases[i].rate, text), cases[i].text);
    }
}
END_TEST

START_TEST(step_line) {
    StepReport step = {.step = 10,
                       .total_steps = 100,
                       .loss = 3.21014,
                       .cross_entropy = 3.2,
                       .balance = 19.4182,
                       .learning_rate = 1e-4,
                       .gradient_norm = 0.9124,
                       .tokens_per_second = 12345,
                       .data_wait = 0.0042,
                       .eta_seconds = 3723,
                       .skipped = 2};
    char line[CONSOLE_LINE_MAX];
    console_step_line(line, &step, 19);
    ck_assert_str_eq(line, "step 10/100 | loss 3.2101 CE 3.2000 LB 19.42/19 | ppl 24.53 | "
                           "lr 1.00e-04 | grad 0.912 | 12.3k tok/s | wait 0.4% | ETA 1:02:03 | "
                           "skipped 2");
    // A dense model has no balance loss, and whatever went wrong, the line is printed.
    step.loss = NAN, step.gradient_norm = INFINITY, step.eta_seconds = -1;
    console_step_line(line, &step, 0);
    ck_assert_str_eq(line, "step 10/100 | loss nan CE 3.2000 | ppl 24.53 | lr 1.00e-04 | "
                           "grad inf | 12.3k tok/s | wait 0.4% | ETA - | skipped 2");
}
END_TEST

START_TEST(extreme_numbers_fit) {
    StepReport step = {.step = INT64_MIN, .total_steps = INT64_MIN, .skipped = INT64_MIN};
    step.loss = step.cross_entropy = step.balance = -1.7e308;
    step.learning_rate = step.gradient_norm = step.data_wait = -1.7e308;
    char line[CONSOLE_LINE_MAX];
    memset(line, 'x', sizeof line);
    console_step_line(line, &step, 1000);
    ck_assert_ptr_nonnull(memchr(line, '\0', sizeof line));
    console_progress_line(line, INT64_MAX, 1, 1e300, 1e300, 1e300);
    ck_assert_ptr_nonnull(memchr(line, '\0', sizeof line));
}
END_TEST

START_TEST(progress_bar) {
    char line[CONSOLE_LINE_MAX];
    console_progress_line(line, 0, 100, 3.2, 900, 41);
    ck_assert_str_eq(line,
                     "[>                       ]   0% step 0/100 loss 3.2 900 tok/s ETA 0:41");
    console_progress_line(line, 52, 100, 3.2101, 12345, 41);
    ck_assert_str_eq(line,
                     "[============>           ]  52% step 52/100 loss 3.21 12.3k tok/s ETA 0:41");
    console_progress_line(line, 100, 100, 3, 900, 0);
    ck_assert_ptr_nonnull(strstr(line, "[========================] 100%"));
    console_progress_line(line, 5, 0, 3, 900, 0); // nothing to do
    ck_assert_ptr_nonnull(strstr(line, "  0%"));
}
END_TEST

TEST_MAIN("console", TEST(durations), TEST(rates), TEST(step_line), TEST(extreme_numbers_fit),
          TEST(progress_bar))
