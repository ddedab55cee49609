#include "cpu/swiglu.h"
#include <stdbool.h>
#include <stddef.h>
#include "cpu/vector_math.h"

void swiglu_forward_row(const float *gate, const float *up, float scale, int64_t columns,
                        float *activation) {
#pragma omp simd
    for (int64_t c = 0; c < columns; c++)
        activation[c] = gate[c] * sigmoid_f32(gate[c]) * (up[c] * scale);
}

// silu'(g) = σ·(1 + g·(1 - σ)). `store` is a constant in each caller, so that the loop has no test.
static inline __attribute__((always_inline)) float
backward_row(const float *gate, const float *up, float scale, int64_t columns, const float *d,
             float *dgate, float *dup, float *activation, bool store) {
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t c = 0; c < columns; c++) {
        const float g = gate[c], u = up[c], sigmoid = sigmoid_f32(g);
        const float silu = g * sigmoid, product = silu * u;
        dot += d[c] * product;
        const float da = d[c] * scale;
        dgate[c] = da * u * (sigmoid * (1.0f + g * (1.0f - sigmoid)));
        dup[c] = da * silu;
        // cppcheck-suppress nullPointer ; `store` says that there is one
        if (store) activation[c] = product * scale;
    }
    return dot;
}

float swiglu_backward_row(const float *gate, const float *up, float scale, int64_t columns,
                          const float *d, float *dgate, float *dup, float *activation) {
    if (activation) return backward_row(gate, up, scale, columns, d, dgate, dup, activation, true);
    return backward_row(gate, up, scale, columns, d, dgate, dup, NULL, false);
}
