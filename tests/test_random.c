// Philox against its authors' vectors, and what is made from it.
#include "tests/test.h"

#include <math.h>
#include <stdbool.h>
#include "base/random.h"

// Random123 1.14, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, result.
static const uint32_t vectors[3][10] = {
    {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
    {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
    {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb,
     0x5001e420, 0x24126ea1},
};

START_TEST(published_vectors) {
    for (int i = 0; i < 3; i++) {
        const uint32_t *v = vectors[i];
        uint32_t out[4];
        random_block((uint64_t)v[5] << 32 | v[4], (uint64_t)v[3] << 32 | v[2],
                     (uint64_t)v[1] << 32 | v[0], out);
        ck_assert_mem_eq(out, v + 6, sizeof out);
        ck_assert_uint_eq(random_u64((uint64_t)v[5] << 32 | v[4], (uint64_t)v[3] << 32 | v[2],
                                     (uint64_t)v[1] << 32 | v[0]),
                          (uint64_t)v[7] << 32 | v[6]);
    }
}
END_TEST

START_TEST(uniform_is_in_range_and_flat) {
    enum { N = 100000, BINS = 10 };
    int bins[BINS] = {0};
    for (uint64_t i = 0; i < N; i++) {
        double value = random_uniform(7, 3, i);
        ck_assert(value >= 0 && value < 1);
        bins[(int)(value * BINS)]++;
    }
    // A bin's standard deviation is sqrt(N * 0.1 * 0.9) = 95; five of them never fail by chance.
    for (int i = 0; i < BINS; i++) ck_assert_int_lt(abs(bins[i] - N / BINS), 5 * 95);
}
END_TEST

START_TEST(normal_has_the_right_moments) {
    enum { N = 200000 };
    float *values = malloc(N * sizeof *values);
    random_normal_fill(values, N, 11, random_stream("x"), 0, 2.0f, 3.0f);
    double sum = 0, squares = 0, cubes = 0, inside = 0;
    for (int i = 0; i < N; i++) {
        double z = (values[i] - 2.0) / 3.0;
        ck_assert(isfinite(z));
        sum += z, squares += z * z, cubes += z * z * z, inside += fabs(z) < 1;
    }
    // Standard errors of the estimates: 1, sqrt(2), sqrt(15), 0.465 over sqrt(N) = 447; limits are
    // five of them.
    ck_assert_double_lt(fabs(sum / N), 5 * 1.0 / 447);
    ck_assert_double_lt(fabs(squares / N - 1), 5 * 1.4143 / 447);
    ck_assert_double_lt(fabs(cubes / N), 5 * 3.873 / 447);
    ck_assert_double_lt(fabs(inside / N - 0.6826895), 5 * 0.4655 / 447);
    free(values);
}
END_TEST

START_TEST(normal_does_not_depend_on_how_it_is_cut) {
    float whole[101], part[101];
    random_normal_fill(whole, 101, 5, 9, 3, 0, 1);
    for (size_t cut = 0; cut <= 101; cut++) {
        random_normal_fill(part, cut, 5, 9, 3, 0, 1);
        random_normal_fill(part + cut, 101 - cut, 5, 9, 3 + cut, 0, 1);
        ck_assert_mem_eq(whole, part, sizeof whole);
    }
}
END_TEST

START_TEST(seeds_and_streams_differ) {
    ck_assert_uint_ne(random_u64(1, 0, 0), random_u64(2, 0, 0));
    ck_assert_uint_ne(random_u64(1, 0, 0), random_u64(1, 1, 0));
    ck_assert_uint_ne(random_u64(1, 0, 0), random_u64(1, 0, 1));
    // FNV-1a, 64 bit, of its reference page.
    ck_assert_uint_eq(random_stream(""), 0xcbf29ce484222325u);
    ck_assert_uint_eq(random_stream("a"), 0xaf63dc4c8601ec8cu);
    ck_assert_uint_eq(random_stream("foobar"), 0x85944171f73967e8u);
}
END_TEST

TEST_MAIN("random", TEST(published_vectors), TEST(uniform_is_in_range_and_flat),
          TEST(normal_has_the_right_moments), TEST(normal_does_not_depend_on_how_it_is_cut),
          TEST(seeds_and_streams_differ))
