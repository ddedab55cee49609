// Attention: which kernels run, and what they share.
//
// bf16 without documents goes to cuDNN where the build has it and it takes the shape; everything
// else to the own kernels, on the tensor cores where storage and head_dim allow it. What runs is
// logged once per kind, so that a slow fallback never goes unseen.
#include "cuda/attention.h"
#include "cuda/common.cuh"

extern "C" {
#include "base/log.h"
}

typedef enum AttentionKind { ATTENTION_CUDNN, ATTENTION_FLASH, ATTENTION_PLAIN } AttentionKind;

static AttentionKind choose(const CudaBackend *backend, const AttentionArgs *args, bool backward) {
    if (!args->document_start && attention_cudnn_takes(backend, args, backward))
        return ATTENTION_CUDNN;
    return attention_flash_takes(backend, args) ? ATTENTION_FLASH : ATTENTION_PLAIN;
}

static void announce(AttentionKind kind, const AttentionArgs *args, bool backward) {
    static bool announced[3][2]; // one thread per process calls ops
    if (announced[kind][backward]) return;
    announced[kind][backward] = true;
    const char *const what[] = {attention_cudnn_about(), "own kernel on tensor cores",
                                "own kernel in fp32 arithmetic"};
    log_info("attention %s: %s (head_dim %d%s; %s)", backward ? "backward" : "forward", what[kind],
             args->head_dim, args->document_start ? ", documents" : "", attention_cudnn_about());
}

// --- delta = Σ dout·out per row -----------------------------------------------------------------

enum { DELTA_LANES = 8, DELTA_THREADS = 256 };

// Rows are (token, head) in memory order; eight lanes each. VECTOR: 16-byte loads.
template <typename T, bool VECTOR>
static __global__ void __launch_bounds__(DELTA_THREADS)
    delta_kernel(float *delta, const T *out, const T *dout, int64_t rows, int64_t length, int heads,
                 int head_dim) {
    const int64_t row = ((int64_t)blockIdx.x * DELTA_THREADS + threadIdx.x) / DELTA_LANES;
    const int lane = threadIdx.x % DELTA_LANES;
    float sum = 0.0f;
    if (row < rows) {
        const T *o = out + row * head_dim, *d = dout + row * head_dim;
        constexpr int WIDTH = VECTOR ? Vec<T>::SIZE : 1;
        for (int at = lane * WIDTH; at < head_dim; at += DELTA_LANES * WIDTH) {
            if constexpr (VECTOR) {
                const Vec<T> x = load_vec(o + at), y = load_vec(d + at);
#pragma unroll
                for (int i = 0; i < WIDTH; i++) sum += to_float(x.v[i]) * to_float(y.v[i]);
            } else {
                sum += to_float(o[at]) * to_float(d[at]);
            }
        }
    }
    for (int offset = DELTA_LANES / 2; offset > 0; offset >>= 1)
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (row >= rows || lane != 0) return;
    const int64_t token = row / heads, batch = token / length;
    delta[(batch * heads + row % heads) * length + token % length] = sum;
}

static Status launch_delta(CudaBackend *backend, const AttentionArgs *args, float *delta) {
    const int64_t rows = args->batch * args->sequence_length * args->num_heads;
    const unsigned blocks = (unsigned)div_up(rows * DELTA_LANES, DELTA_THREADS);
    DISPATCH_DTYPE(backend->base.compute_dtype, T, {
        const bool vector =
            vec_ok<T>(args->out, args->head_dim) && ((uintptr_t)args->dout & 15) == 0;
        auto kernel = vector ? delta_kernel<T, true> : delta_kernel<T, false>;
        kernel<<<blocks, DELTA_THREADS, 0, backend->stream>>>(
            delta, (const T *)args->out, (const T *)args->dout, rows, args->sequence_length,
            args->num_heads, args->head_dim);
    });
    LAUNCH_TRY(backend);
    return STATUS_OK;
}

static size_t delta_bytes(const AttentionArgs *args) {
    return (size_t)(args->batch * args->num_heads * args->sequence_length) * sizeof(float);
}

// --- The op -------------------------------------------------------------------------------------

// Covers both a call with documents and one without.
size_t cuda_attention_workspace(const CudaBackend *backend, const AttentionArgs *args) {
    size_t own = scratch_bytes(delta_bytes(args)), cudnn = attention_cudnn_workspace(backend, args);
    return own > cudnn ? own : cudnn;
}

Status cuda_attention_forward(Backend *base, const AttentionArgs *args) {
    CudaBackend *backend = cuda_of(base);
    backend->current_op = "attention_forward";
    if (args->batch * args->sequence_length == 0) return STATUS_OK;
    AttentionKind kind = choose(backend, args, false);
    announce(kind, args, false);
    if (kind == ATTENTION_CUDNN) return attention_cudnn_forward(backend, args);
    return kind == ATTENTION_FLASH ? attention_flash_forward(backend, args)
                                   : attention_plain_forward(backend, args);
}

Status cuda_attention_backward(Backend *base, const AttentionArgs *args) {
    CudaBackend *backend = cuda_of(base);
    backend->current_op = "attention_backward";
    if (args->batch * args->sequence_length == 0) return STATUS_OK;
    AttentionKind kind = choose(backend, args, true);
    announce(kind, args, true);
    if (kind == ATTENTION_CUDNN) return attention_cudnn_backward(backend, args);
    Scratch scratch = scratch_open(backend);
    float *delta;
    TRY(scratch_take(&scratch, delta_bytes(args), (void **)&delta));
    TRY(launch_delta(backend, args, delta));
    return kind == ATTENTION_FLASH ? attention_flash_backward(backend, args, delta)
                                   : attention_plain_backward(backend, args, delta);
}
