// Dense SwiGLU MLP: two products with one elementwise pass between them; in the backward, four
// products and one pass.
#include "cuda/cuda.h"
#include "cuda/swiglu.cuh"

static size_t activation_bytes(const CudaBackend *backend, const FfnArgs *args) {
    return (size_t)args->tokens * (size_t)args->intermediate_size *
           dtype_bytes(backend->base.compute_dtype);
}

// Backward: d(activation), later the activation itself in the same place, and d(gate_up).
size_t cuda_ffn_workspace(const CudaBackend *backend, const FfnArgs *args) {
    const size_t bytes = activation_bytes(backend, args);
    return scratch_bytes(bytes) + scratch_bytes(2 * bytes);
}

Status cuda_ffn_forward(Backend *base, const FfnArgs *args) {
    CudaBackend *backend = cuda_of(base);
    backend->current_op = "ffn_forward";
    const int64_t tokens = args->tokens, hidden = args->hidden_size;
    const int64_t inner = args->intermediate_size;
    Gemm gate_up =
        gemm_of(backend, tokens, 2 * inner, hidden, args->x, args->weight_gate_up, args->gate_up);
    gate_up.transpose_b = true;
    TRY(gemm_run(backend, &gate_up, 0));
    if (!args->out && !args->activation) return STATUS_OK;
    void *activation = args->activation;
    if (!activation) {
        Scratch scratch = scratch_open(backend);
        TRY(scratch_take(&scratch, activation_bytes(backend, args), &activation));
    }
    const Swiglu swiglu = {.rows = tokens,
                           .inner = args->intermediate_size,
                           .gate_up = args->gate_up,
                           .activation = activation};
    TRY(swiglu_forward(backend, &swiglu, backend->stream));
    if (!args->out) return STATUS_OK;
    Gemm down = gemm_of(backend, tokens, hidden, inner, activation, args->weight_down, args->out);
    down.transpose_b = true;
    return gemm_run(backend, &down, 0);
}

Status cuda_ffn_backward(Backend *base, const FfnArgs *args) {
    CudaBackend *backend = cuda_of(base);
    backend->current_op = "ffn_backward";
    const int64_t tokens = args->tokens, hidden = args->hidden_size;
    const int64_t inner = args->intermediate_size;
    Scratch scratch = scratch_open(backend);
    void *dactivation, *dgate_up;
    TRY(scratch_take(&scratch, activation_bytes(backend, args), &dactivation));
    TRY(scratch_take(&scratch, 2 * activation_bytes(backend, args), &dgate_up));
    const Gemm down =
        gemm_of(backend, tokens, inner, hidden, args->dout, args->weight_down, dactivation);
    TRY(gemm_run(backend, &down, 0));
    const Swiglu swiglu = {.rows = tokens,
                           .inner = args->intermediate_size,
                           .gate_up = args->gate_up,
                           .activation = args->activation ? NULL : dactivation,
                           .dactivation = dactivation,
                           .dgate_up = dgate_up};
    TRY(swiglu_backward(backend, &swiglu, backend->stream));
    const void *activation = args->activation ? args->activation : dactivation;
    TRY(gemm_weight_gradient(backend, tokens, hidden, inner, args->dout, activation,
                             args->grad_assign, args->grad_down));
    TRY(gemm_weight_gradient(backend, tokens, 2 * inner, hidden, dgate_up, args->x,
                             args->grad_assign, args->grad_gate_up));
    const Gemm inputs =
        gemm_of(backend, tokens, hidden, 2 * inner, dgate_up, args->weight_gate_up, args->dx);
    return gemm_run(backend, &inputs, 0);
}
