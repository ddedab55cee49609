// Dense SwiGLU MLP: two products with one elementwise pass between them; in the backward, four
// products and one pass.
#include "cuda/cuda.h"
#include "cuda/hopper_mlp.h"
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

// gate_up and, where it is not NULL, activation.
static Status first_half(CudaBackend *backend, const FfnArgs *args, void *activation) {
    const int32_t all[] = {0, (int32_t)args->tokens};
    const HopperMlp mlp = {.groups = 1,
                           .begin = all,
                           .hidden = args->hidden_size,
                           .inner = args->intermediate_size,
                           .weight = args->weight_gate_up,
                           .in = args->x,
                           .gate_up = args->gate_up,
                           .activation = activation};
    if (hopper_mlp_takes(backend, &mlp)) return hopper_mlp_forward(backend, &mlp);
    Gemm gate_up = gemm_of(backend, args->tokens, 2 * (int64_t)args->intermediate_size,
                           args->hidden_size, args->x, args->weight_gate_up, args->gate_up);
    gate_up.transpose_b = true;
    TRY(gemm_run(backend, &gate_up, 0));
    if (!activation) return STATUS_OK;
    const Swiglu swiglu = {.rows = args->tokens,
                           .inner = args->intermediate_size,
                           .gate_up = args->gate_up,
                           .activation = activation};
    return swiglu_forward(backend, &swiglu, backend->stream);
}

Status cuda_ffn_forward(Backend *base, const FfnArgs *args) {
    CudaBackend *backend = cuda_of(base);
    backend->current_op = "ffn_forward";
    const int64_t tokens = args->tokens, hidden = args->hidden_size;
    const int64_t inner = args->intermediate_size;
    void *activation = args->activation;
    if (!activation && args->out) {
        Scratch scratch = scratch_open(backend);
        TRY(scratch_take(&scratch, activation_bytes(backend, args), &activation));
    }
    TRY(first_half(backend, args, activation));
    if (!args->out) return STATUS_OK;
    Gemm down = gemm_of(backend, tokens, hidden, inner, activation, args->weight_down, args->out);
    down.transpose_b = true;
    return gemm_run(backend, &down, 0);
}

// dgate_up and, where it was not kept, the activation, which takes dactivation's place.
static Status second_half_backward(CudaBackend *backend, const FfnArgs *args, void *dactivation,
                                   void *dgate_up) {
    void *activation = args->activation ? NULL : dactivation;
    const int32_t all[] = {0, (int32_t)args->tokens};
    const HopperMlp mlp = {.groups = 1,
                           .begin = all,
                           .hidden = args->hidden_size,
                           .inner = args->intermediate_size,
                           .weight = args->weight_down,
                           .in = args->dout,
                           .gate_up = args->gate_up,
                           .activation = activation,
                           .dgate_up = dgate_up};
    if (hopper_mlp_takes(backend, &mlp)) return hopper_mlp_backward(backend, &mlp);
    const Gemm down = gemm_of(backend, args->tokens, args->intermediate_size, args->hidden_size,
                              args->dout, args->weight_down, dactivation);
    TRY(gemm_run(backend, &down, 0));
    const Swiglu swiglu = {.rows = args->tokens,
                           .inner = args->intermediate_size,
                           .gate_up = args->gate_up,
                           .activation = activation,
                           .dactivation = dactivation,
                           .dgate_up = dgate_up};
    return swiglu_backward(backend, &swiglu, backend->stream);
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
    TRY(second_half_backward(backend, args, dactivation, dgate_up));
    const void *activation = args->activation ? args->activation : dactivation;
    TRY(gemm_weight_gradient(backend, tokens, hidden, inner, args->dout, activation,
                             args->grad_assign, args->grad_down));
    TRY(gemm_weight_gradient(backend, tokens, 2 * inner, hidden, dgate_up, args->x,
                             args->grad_assign, args->grad_gate_up));
    const Gemm inputs =
        gemm_of(backend, tokens, hidden, 2 * inner, dgate_up, args->weight_gate_up, args->dx);
    return gemm_run(backend, &inputs, 0);
}
