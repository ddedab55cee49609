// The allocation list and how sizes are printed.
#include "tests/test.h"

#include "base/memory_plan.h"

START_TEST(items_of_one_name_add_up) {
    MemoryPlan plan = {.count = 0};
    ck_assert_ok(memory_plan_add(&plan, "parameters", 10));
    ck_assert_ok(memory_plan_add(&plan, "gradients", 5));
    ck_assert_ok(memory_plan_add(&plan, "parameters", 7));
    ck_assert_int_eq(plan.count, 2);
    ck_assert_str_eq(plan.items[0].name, "parameters");
    ck_assert_uint_eq(plan.items[0].bytes, 17);
    ck_assert_uint_eq(memory_plan_total(&plan), 22);
}
END_TEST

START_TEST(overflow_is_refused) {
    MemoryPlan plan = {.count = 0};
    ck_assert_ok(memory_plan_add(&plan, "a", UINT64_MAX - 5));
    ck_assert_fails(memory_plan_add(&plan, "b", 6), STATUS_USAGE, "for b");
    ck_assert_ok(memory_plan_add(&plan, "b", 5));
    ck_assert_uint_eq(memory_plan_total(&plan), UINT64_MAX);
}
END_TEST

START_TEST(a_full_plan_is_refused) {
    MemoryPlan plan = {.count = 0};
    char name[MEMORY_NAME_MAX + 8];
    for (int i = 0; i < MEMORY_PLAN_MAX; i++) {
        snprintf(name, sizeof name, "item %d", i);
        ck_assert_ok(memory_plan_add(&plan, name, 1));
    }
    ck_assert_fails(memory_plan_add(&plan, "one more", 1), STATUS_INTERNAL, "MEMORY_PLAN_MAX");
    ck_assert_ok(memory_plan_add(&plan, "item 3", 1)); // existing items still grow
    memset(name, 'n', sizeof name);
    name[MEMORY_NAME_MAX] = '\0';
    plan.count = 1;
    ck_assert_fails(memory_plan_add(&plan, name, 1), STATUS_INTERNAL, "MEMORY_NAME_MAX");
}
END_TEST

START_TEST(sizes_have_three_digits) {
    static const struct {
        uint64_t bytes;
        const char *text;
    } cases[] = {
        {0, "0 B"},
        {999, "999 B"},
        {1000, "1.00 kB"},
        {1655000000, "1.66 GB"},
        {12000000, "12.0 MB"},
        {123456, "123 kB"},
        {9994, "9.99 kB"},
        {9996, "10.0 kB"},
        {99960, "100 kB"},
        {999499, "999 kB"},
        {999500, "1.00 MB"},
        {UINT64_MAX, "18.4 EB"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char text[BYTES_TEXT_SIZE];
        ck_assert_str_eq(bytes_text(cases[i].bytes, text), cases[i].text);
    }
}
END_TEST

TEST_MAIN("memory_plan", TEST(items_of_one_name_add_up), TEST(overflow_is_refused),
          TEST(a_full_plan_is_refused), TEST(sizes_have_three_digits))
