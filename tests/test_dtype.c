// bf16 and fp16 conversions, exhaustively over the 65,536 values of each format and over the
// points between neighbours where rounding decides.
#include "tests/test.h"

#include <math.h>
#include "base/dtype.h"

// The value of a 16-bit float from its definition, in double.
static double value_of(DType dtype, uint16_t half) {
    int mantissa_bits = dtype == DTYPE_BF16 ? 7 : 10, bias = dtype == DTYPE_BF16 ? 127 : 15;
    int exponent_mask = dtype == DTYPE_BF16 ? 0xff : 0x1f;
    int exponent = half >> mantissa_bits & exponent_mask;
    int mantissa = half & ((1 << mantissa_bits) - 1);
    double sign = half >> 15 ? -1 : 1;
    if (exponent == exponent_mask) return mantissa ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * ldexp(mantissa, 1 - bias - mantissa_bits);
    return sign * ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

static uint16_t infinity_of(DType dtype) {
    return dtype == DTYPE_BF16 ? 0x7f80 : 0x7c00;
}

static uint16_t round_one(DType dtype, float value) {
    uint16_t half;
    dtype_from_f32(dtype, &value, &half, 1);
    return half;
}

static const DType halves[] = {DTYPE_BF16, DTYPE_F16};

static void check_widening(DType dtype) {
    for (uint32_t i = 0; i < 65536; i++) {
        uint16_t half = (uint16_t)i;
        float wide;
        dtype_to_f32(dtype, &half, &wide, 1);
        double expected = value_of(dtype, half);
        if (isnan(expected)) {
            uint16_t back = round_one(dtype, wide);
            ck_assert_msg(isnan(wide) && isnan(value_of(dtype, back)), "%04x -> %04x", half, back);
            ck_assert_int_eq(back >> 15, half >> 15);
            continue;
        }
        ck_assert_msg((double)wide == expected && !!signbit(wide) == half >> 15, "%04x: %a, not %a",
                      half, (double)wide, expected);
        ck_assert_int_eq(round_one(dtype, wide), half);
    }
}

START_TEST(every_half_widens_exactly_and_comes_back) {
    for (int i = 0; i < 2; i++) check_widening(halves[i]);
}
END_TEST

// Between two neighbours the middle goes to the even one, and the next floats around the middle go
// to the nearer one.
static void check_ties(DType dtype) {
    for (uint32_t low = 0; low < infinity_of(dtype); low++) {
        uint32_t high = low + 1;
        double top = value_of(dtype, (uint16_t)low), below = value_of(dtype, (uint16_t)(low - 1));
        // Above the largest finite value, one more step would lie where infinity is.
        double above =
            high == infinity_of(dtype) ? 2 * top - below : value_of(dtype, (uint16_t)high);
        float middle = (float)((top + above) / 2);
        uint16_t even = (uint16_t)(low % 2 ? high : low);
        ck_assert_int_eq(round_one(dtype, middle), even);
        ck_assert_int_eq(round_one(dtype, nextafterf(middle, 0)), (int)low);
        ck_assert_int_eq(round_one(dtype, nextafterf(middle, INFINITY)), (int)high);
        ck_assert_int_eq(round_one(dtype, -middle), even | 0x8000);
        ck_assert_int_eq(round_one(dtype, -nextafterf(middle, INFINITY)), (int)(high | 0x8000));
    }
}

START_TEST(ties_go_to_even_between_all_neighbours) {
    for (int i = 0; i < 2; i++) check_ties(halves[i]);
}
END_TEST

START_TEST(extremes) {
    ck_assert_int_eq(round_one(DTYPE_F16, 65504), 0x7bff);
    ck_assert_int_eq(round_one(DTYPE_F16, 65519.996f), 0x7bff);
    ck_assert_int_eq(round_one(DTYPE_F16, 65520), 0x7c00);
    ck_assert_int_eq(round_one(DTYPE_F16, 3e38f), 0x7c00);
    ck_assert_int_eq(round_one(DTYPE_F16, 1e-30f), 0);
    ck_assert_int_eq(round_one(DTYPE_BF16, 3.4028235e38f), 0x7f80);
    for (int i = 0; i < 2; i++) {
        ck_assert_int_eq(round_one(halves[i], INFINITY), infinity_of(halves[i]));
        ck_assert_int_eq(round_one(halves[i], -INFINITY), infinity_of(halves[i]) | 0x8000);
        ck_assert_int_eq(round_one(halves[i], -0.0f), 0x8000);
    }
    // A NaN whose mantissa has only its lowest bit must not become an infinity.
    uint32_t bits = 0x7f800001;
    float nan_value;
    memcpy(&nan_value, &bits, sizeof bits);
    ck_assert(isnan(value_of(DTYPE_BF16, round_one(DTYPE_BF16, nan_value))));
    ck_assert(isnan(value_of(DTYPE_F16, round_one(DTYPE_F16, nan_value))));
}
END_TEST

START_TEST(arrays_at_odd_addresses) {
    enum { N = 37 };
    float values[N], back[N];
    char stored[4 * N + 1];
    for (int i = 0; i < N; i++) values[i] = (float)(i - 18) * 0.25f; // exact in all formats
    for (DType dtype = DTYPE_F32; dtype <= DTYPE_F16; dtype++) {
        memset(stored, 0, sizeof stored);
        dtype_from_f32(dtype, values, stored + 1, N);
        dtype_to_f32(dtype, stored + 1, back, N);
        ck_assert_mem_eq(values, back, sizeof values);
        dtype_from_f32(dtype, NULL, NULL, 0);
        dtype_to_f32(dtype, NULL, NULL, 0);
    }
}
END_TEST

START_TEST(names_and_sizes) {
    for (DType dtype = DTYPE_F32; dtype <= DTYPE_F16; dtype++) {
        DType parsed;
        ck_assert(dtype_parse(dtype_name(dtype), &parsed));
        ck_assert_int_eq(parsed, dtype);
        ck_assert_uint_eq(dtype_bytes(dtype), dtype == DTYPE_F32 ? 4 : 2);
    }
    DType parsed;
    ck_assert(!dtype_parse("F64", &parsed));
    ck_assert(!dtype_parse("bf16", &parsed));
    ck_assert(!dtype_parse("", &parsed));
}
END_TEST

TEST_MAIN("dtype", TEST(every_half_widens_exactly_and_comes_back),
          TEST(ties_go_to_even_between_all_neighbours), TEST(extremes),
          TEST(arrays_at_odd_addresses), TEST(names_and_sizes))
