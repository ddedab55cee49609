// The SwiGLU elementwise step, activation = silu(gate)·up, shared by the dense and the expert MLP.
// One call does `columns` columns of one row.
#ifndef CPU_SWIGLU_H
#define CPU_SWIGLU_H

#include <stdint.h>

// activation = scale·silu(gate)·up
void swiglu_forward_row(const float *gate, const float *up, float scale, int64_t columns,
                        float *activation);

// From d = d(activation) to dgate and dup; dgate may be d. Returns Σ d·silu(gate)·up, the gradient
// of scale. Also writes the activation, unless it is NULL.
float swiglu_backward_row(const float *gate, const float *up, float scale, int64_t columns,
                          const float *d, float *dgate, float *dup, float *activation);

#endif
