// Checked arithmetic at its edges.
#include "tests/test.h"

#include "base/checked.h"

START_TEST(add) {
    uint64_t out;
    ck_assert(checked_add(UINT64_MAX - 1, 1, &out) && out == UINT64_MAX);
    ck_assert(!checked_add(UINT64_MAX, 1, &out));
    ck_assert(!checked_add(UINT64_MAX, UINT64_MAX, &out));
    ck_assert(checked_add(0, 0, &out) && out == 0);
}
END_TEST

START_TEST(mul) {
    uint64_t out;
    ck_assert(checked_mul(UINT32_MAX, UINT32_MAX, &out) && out == 0xfffffffe00000001u);
    ck_assert(!checked_mul((uint64_t)1 << 32, (uint64_t)1 << 32, &out));
    ck_assert(!checked_mul(UINT64_MAX, 2, &out));
    ck_assert(checked_mul(UINT64_MAX, 1, &out) && out == UINT64_MAX);
    ck_assert(checked_mul(0, UINT64_MAX, &out) && out == 0);
}
END_TEST

START_TEST(rounding_up) {
    uint64_t out;
    ck_assert(checked_round_up(0, 64, &out) && out == 0);
    ck_assert(checked_round_up(1, 64, &out) && out == 64);
    ck_assert(checked_round_up(64, 64, &out) && out == 64);
    ck_assert(checked_round_up(65, 7, &out) && out == 70);
    ck_assert(checked_round_up(UINT64_MAX - 63, 64, &out) && out == UINT64_MAX - 63);
    ck_assert(!checked_round_up(UINT64_MAX - 62, 64, &out));
    ck_assert(checked_round_up(UINT64_MAX, 1, &out) && out == UINT64_MAX);
    ck_assert_uint_eq(round_up(65, 64), 128);
    ck_assert_uint_eq(round_up(128, 64), 128);
}
END_TEST

TEST_MAIN("checked", TEST(add), TEST(mul), TEST(rounding_up))
