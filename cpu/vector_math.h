// exp and silu that a `#pragma omp simd` loop vectorises: no branch, no call, no table.
//
// exp_f32: relative error below 2e-7 where the result is normal (tests/test_ops_math.c); results
// under FLT_MIN are denormal and then 0; exp(-inf) = 0, exp(+inf) = inf, NaN stays NaN. The build
// does not use -ffast-math, so these hold in every loop.
#ifndef CPU_VECTOR_MATH_H
#define CPU_VECTOR_MATH_H

#include <stdint.h>
#include <string.h>

static inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float exp_f32(float x) {
    // Beyond these the result is inf or 0 anyway. The comparisons let NaN pass.
    x = x > 89.0f ? 89.0f : x;
    x = x < -104.0f ? -104.0f : x;
    // n = round(x / ln 2): adding 1.5·2^23 leaves the integer in the low bits of the mantissa.
    const float magic = 12582912.0f;
    float shifted = x * 1.44269504f + magic;
    float n = shifted - magic;
    // r = x - n·ln 2 in [-ln2/2, ln2/2]; the first part of ln 2 has 9 bits, so n times it is exact.
    float r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    // e^r = 1 + r + r²·q(r), q a minimax fit of degree 4: relative error 3e-9 before rounding.
    float q = 1.381454e-3f;
    q = q * r + 8.368745e-3f;
    q = q * r + 4.1668390e-2f;
    q = q * r + 1.6666521e-1f;
    q = q * r + 4.9999994e-1f;
    float p = q * (r * r) + r + 1.0f;
    // Times 2^n in two factors, so that neither leaves the range of normal numbers.
    uint32_t exponent = bits_of_float(shifted) - 0x4B400000u; // n in two's complement
    uint32_t half = (uint32_t)((int32_t)exponent >> 1);
    float low = float_of_bits((half + 127u) << 23);
    float high = float_of_bits((exponent - half + 127u) << 23);
    return p * low * high;
}

static inline float sigmoid_f32(float x) {
    return 1.0f / (1.0f + exp_f32(-x));
}

#endif
