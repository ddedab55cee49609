// Conversions between fp32 and the two 16-bit formats, bit by bit, so that every compiler and CPU
// gives the same result. Sources and destinations may have any alignment: tensors inside a
// safetensors file start where the file says.
#include "base/dtype.h"

#include <string.h>

size_t dtype_bytes(DType dtype) {
    return dtype == DTYPE_F32 ? 4 : 2;
}

static const char *const names[] = {"F32", "BF16", "F16"};

const char *dtype_name(DType dtype) {
    return names[dtype];
}

bool dtype_parse(const char *name, DType *out) {
    for (int i = 0; i < (int)(sizeof names / sizeof names[0]); i++) {
        if (strcmp(name, names[i]) != 0) continue;
        *out = (DType)i;
        return true;
    }
    return false;
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// The 16 low bits go: adding just under half of a unit, plus the last bit kept, rounds to nearest
// with ties to even; the carry runs into the exponent and up to infinity by itself.
static inline uint16_t to_bf16(uint32_t bits) {
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    uint32_t quiet_nan = bits >> 16 | 0x40; // a NaN whose payload was in the low bits stays one
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded);
}

// fp16 has 5 exponent bits (bias 15) and 10 of mantissa; its subnormals are multiples of 2^-24.
static inline uint16_t to_f16(uint32_t bits) {
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
    if (magnitude >= 0x477ff000) return sign | 0x7c00; // 65520 and above round to infinity
    if (magnitude < 0x38800000) {                      // below 2^-14: subnormal or zero
        // Adding 0.5 puts the unit of the last place at 2^-24, so the FPU rounds for us.
        return (uint16_t)(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
    }
    uint32_t rebiased = magnitude - ((127 - 15) << 23);
    return (uint16_t)(sign | (rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13);
}

static inline float from_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 0x1f;
    uint32_t mantissa = half & 0x3ff;
    if (exponent == 0x1f) return float_of(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) return float_of(sign | bits_of((float)mantissa * 0x1p-24f));
    return float_of(sign | (exponent + 127 - 15) << 23 | mantissa << 13);
}

void dtype_to_f32(DType from, const void *source, float *destination, size_t count) {
    if (from == DTYPE_F32) {
        if (count) memcpy(destination, source, count * sizeof *destination);
        return;
    }
    const char *bytes = source;
    for (size_t i = 0; i < count; i++) {
        uint16_t half;
        memcpy(&half, bytes + 2 * i, sizeof half);
        destination[i] = from == DTYPE_BF16 ? float_of((uint32_t)half << 16) : from_f16(half);
    }
}

void dtype_from_f32(DType to, const float *source, void *destination, size_t count) {
    if (to == DTYPE_F32) {
        if (count) memcpy(destination, source, count * sizeof *source);
        return;
    }
    char *bytes = destination;
    const char *values = (const char *)source;
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, values + 4 * i, sizeof bits);
        uint16_t half = to == DTYPE_BF16 ? to_bf16(bits) : to_f16(bits);
        memcpy(bytes + 2 * i, &half, sizeof half);
    }
}
