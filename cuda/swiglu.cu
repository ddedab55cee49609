// SwiGLU kernels: one block per row, so that the gradient of a row's scale is one block sum.
#include "cuda/swiglu.cuh"

enum { SWIGLU_THREADS_MAX = 256 };

// As many threads as make equal rounds over `items`.
static unsigned threads_for(int64_t items) {
    int64_t rounds = div_up(items, SWIGLU_THREADS_MAX);
    return (unsigned)(div_up(div_up(items, rounds), 32) * 32);
}

// W consecutive elements per access (Piece).
template <typename T, int W>
static __global__ void __launch_bounds__(SWIGLU_THREADS_MAX)
    forward_kernel(int inner, const T *__restrict__ gate_up, const float *__restrict__ scales,
                   const int32_t *__restrict__ scale_index, T *__restrict__ activation) {
    const int64_t row = blockIdx.x;
    const T *gate = gate_up + row * 2 * inner, *up = gate + inner;
    T *out = activation + row * inner;
    const float scale = scales ? scales[scale_index ? scale_index[row] : row] : 1.0f;
#pragma unroll 2
    for (int c = threadIdx.x * W; c < inner; c += blockDim.x * W) {
        const Piece<T, W> g = load_piece<T, W>(gate + c), u = load_piece<T, W>(up + c);
        Piece<T, W> a;
#pragma unroll
        for (int i = 0; i < W; i++)
            a.v[i] = from_float<T>(swiglu_of(to_float(g.v[i]), to_float(u.v[i])) * scale);
        store_piece<T, W>(out + c, a);
    }
}

// `activation` may be `dactivation`: each thread reads a place before it writes it.
template <typename T, int W>
static __global__ void __launch_bounds__(SWIGLU_THREADS_MAX)
    backward_kernel(int inner, const T *__restrict__ gate_up, const float *__restrict__ scales,
                    const int32_t *__restrict__ scale_index, const T *dactivation, T *activation,
                    T *__restrict__ dgate_up, float *__restrict__ dscales) {
    __shared__ float shared[32];
    const int64_t row = blockIdx.x, place = scale_index ? scale_index[row] : row;
    const T *gate = gate_up + row * 2 * inner, *up = gate + inner, *d = dactivation + row * inner;
    T *dgate = dgate_up + row * 2 * inner, *dup = dgate + inner;
    const float scale = scales ? scales[place] : 1.0f;
    float dot = 0.0f;
    for (int c = threadIdx.x * W; c < inner; c += blockDim.x * W) {
        const Piece<T, W> gs = load_piece<T, W>(gate + c), us = load_piece<T, W>(up + c);
        const Piece<T, W> ds = load_piece<T, W>(d + c);
        Piece<T, W> a, dgs, dus;
#pragma unroll
        for (int i = 0; i < W; i++) {
            const float da = to_float(ds.v[i]);
            float dg, du;
            const float product =
                swiglu_gradients(to_float(gs.v[i]), to_float(us.v[i]), da * scale, &dg, &du);
            dot += da * product;
            dgs.v[i] = from_float<T>(dg);
            dus.v[i] = from_float<T>(du);
            a.v[i] = from_float<T>(product * scale);
        }
        store_piece<T, W>(dgate + c, dgs);
        store_piece<T, W>(dup + c, dus);
        if (activation) store_piece<T, W>(activation + row * inner + c, a);
    }
    if (!dscales) return;
    dot = block_sum(dot, shared);
    if (threadIdx.x == 0) dscales[place] = dot;
}

template <typename T> static bool wide_ok(const Swiglu *s) {
    const uintptr_t bits = (uintptr_t)s->gate_up | (uintptr_t)s->activation |
                           (uintptr_t)s->dactivation | (uintptr_t)s->dgate_up;
    return vec_ok<T>((const void *)bits, s->inner);
}

Status swiglu_forward(CudaBackend *backend, const Swiglu *s, cudaStream_t stream) {
    if (s->rows == 0) return STATUS_OK;
    DISPATCH_DTYPE(backend->base.compute_dtype, T, {
        constexpr int WIDE = Vec<T>::SIZE;
        const bool wide = wide_ok<T>(s);
        auto kernel = wide ? forward_kernel<T, WIDE> : forward_kernel<T, 1>;
        const unsigned threads = threads_for(wide ? s->inner / WIDE : s->inner);
        kernel<<<(unsigned)s->rows, threads, 0, stream>>>(s->inner, (const T *)s->gate_up, s->scale,
                                                          s->scale_index, (T *)s->activation);
    });
    LAUNCH_TRY(backend);
    return STATUS_OK;
}

Status swiglu_backward(CudaBackend *backend, const Swiglu *s, cudaStream_t stream) {
    if (s->rows == 0) return STATUS_OK;
    DISPATCH_DTYPE(backend->base.compute_dtype, T, {
        constexpr int WIDE = Vec<T>::SIZE;
        const bool wide = wide_ok<T>(s);
        auto kernel = wide ? backward_kernel<T, WIDE> : backward_kernel<T, 1>;
        const unsigned threads = threads_for(wide ? s->inner / WIDE : s->inner);
        kernel<<<(unsigned)s->rows, threads, 0, stream>>>(
            s->inner, (const T *)s->gate_up, s->scale, s->scale_index, (const T *)s->dactivation,
            (T *)s->activation, (T *)s->dgate_up, s->dscale);
    });
    LAUNCH_TRY(backend);
    return STATUS_OK;
}
