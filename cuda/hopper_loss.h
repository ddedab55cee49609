// Final linear layer with softmax inside, on Hopper chips: no pass over the logits.
//
// With c_r near row r's largest logit, e_rv = exp(logit_rv - c_r) can be written as soon as a tile
// of logits is there, before the row's sum Z_r = Σ_v e_rv is known, and
//   loss_r = log Z_r + c_r - logit_r,target
//   ∂loss_r/∂logit_rv = d_rv / Z_r,   d_rv = e_rv - [v = target]·Z_r.
// So the product that makes the logits stores e; then only the target's element of each row is
// changed, and 1/Z_r moves out of both products of the backward pass:
//   ∂/∂weight = dᵀ · (x·s/Z),   ∂/∂x = (d · weight)·s/Z.
// c is the target's own logit. A row whose largest logit is so far above it that e might overflow
// (a token of more than about 41 nats) is seen by its sums, and a second product, which otherwise
// ends at once, repeats the chunk with that row's largest logit as its c. Logits beyond ±2^15,
// whose neighbours in bf16 are 128 and more apart, are not covered: c and the product's logit may
// be rounded to different ones.
#ifndef CUDA_HOPPER_LOSS_H
#define CUDA_HOPPER_LOSS_H

#include "cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    HOPPER_LOSS_ROWS_MAX = 8192, // of a chunk: what bounds the scratch memory
    HOPPER_LOSS_LOG2 = 60,       // the sum of e over a tile's columns stays below 2^60
};

// A chunk of tokens. Logits are rounded to bf16, as a product that stores them would.
typedef struct HopperLoss {
    int64_t rows, first;    // R <= HOPPER_LOSS_ROWS_MAX; first: of the micro-batch, for messages
    int hidden, vocab;      // H, V
    const void *x;          // (R, H)
    const void *weight;     // (V, H)
    const int32_t *targets; // (R), -1 = ignored: its loss and its row of every gradient are zero
    float grad_scale;       // s
    float *losses;          // (R)
    void *gradient;         // (R, stride) d; NULL: losses alone, and no x_scaled
    int64_t stride;         // a multiple of 8, >= V
    void *x_scaled;         // (R, H) x·s/Z
    float *factor;          // (R) s/Z
    void *scratch;          // hopper_loss_scratch()
} HopperLoss;

#ifdef D2M_HAVE_HOPPER
// Whether the backend can use it: bf16, compute capability 9.0.
bool hopper_loss_runs(const CudaBackend *backend);
// Whether these shapes and pointers can, too: H a multiple of 64, 16-byte aligned rows. dx: where
// hopper_loss_dx() writes, or NULL.
bool hopper_loss_takes(const CudaBackend *backend, int hidden, int vocab, const void *x,
                       const void *weight, const void *dx);
// Bytes for at most `rows` rows; grows with both.
size_t hopper_loss_scratch(int64_t rows, int64_t vocab);
Status hopper_loss(CudaBackend *backend, const HopperLoss *loss) NODISCARD;
// dx (rows, hidden) bf16 = product (rows, hidden) fp32 · factor (rows).
Status hopper_loss_dx(CudaBackend *backend, int64_t rows, int hidden, const float *product,
                      const float *factor, void *dx) NODISCARD;
#else // a build without code for these chips
static inline bool hopper_loss_runs(const CudaBackend *) {
    return false;
}
static inline bool hopper_loss_takes(const CudaBackend *, int, int, const void *, const void *,
                                     const void *) {
    return false;
}
static inline size_t hopper_loss_scratch(int64_t, int64_t) {
    return 0;
}
static inline Status hopper_loss(CudaBackend *, const HopperLoss *) {
    return STATUS_INTERNAL;
}
static inline Status hopper_loss_dx(CudaBackend *, int64_t, int, const float *, const float *,
                                    void *) {
    return STATUS_INTERNAL;
}
#endif

#ifdef __cplusplus
}
#endif
#endif
