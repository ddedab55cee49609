// AdamW: one pass over gradient, moments, master weights and the working copy.
#include <type_traits>
#include "cuda/common.cuh"

enum { THREADS = 256 };

// Elements per thread: 16 bytes of the narrowest array that is read.
template <typename G, typename S>
constexpr int PER_THREAD = sizeof(G) == 2 || sizeof(S) == 2 ? Vec<bf16>::SIZE : Vec<float>::SIZE;

// The constants of one update, from doubles on the host. The divisions by (1 - β^step) become
// factors.
typedef struct AdamwStep {
    float grad_scale, beta1, beta2, rest1, rest2; // rest = 1 - beta
    float unbias2, step_size, epsilon, decay;     // step_size = lr/(1-β1^t), decay = lr·wd
} AdamwStep;

static AdamwStep constants_of(const AdamwArgs *args) {
    const double t = (double)args->step;
    AdamwStep c;
    c.grad_scale = (float)args->grad_scale;
    c.beta1 = (float)args->beta1;
    c.beta2 = (float)args->beta2;
    c.rest1 = (float)(1.0 - args->beta1);
    c.rest2 = (float)(1.0 - args->beta2);
    c.unbias2 = (float)(1.0 / (1.0 - pow(args->beta2, t)));
    c.step_size = (float)(args->learning_rate / (1.0 - pow(args->beta1, t)));
    c.epsilon = (float)args->epsilon;
    c.decay = (float)(args->learning_rate * args->weight_decay);
    return c;
}

static __device__ __forceinline__ void update(const AdamwStep &c, float grad, float *master,
                                              float *m, float *v) {
    const float g = grad * c.grad_scale;
    *m = c.beta1 * *m + c.rest1 * g;
    *v = c.beta2 * *v + c.rest2 * (g * g);
    const float direction = *m / (sqrtf(*v * c.unbias2) + c.epsilon);
    *master -= c.step_size * direction + c.decay * *master;
}

// W elements of T in accesses of 16 bytes, or in a single one where they are fewer.
template <typename T, int W> struct alignas(W * sizeof(T) < 16 ? W * sizeof(T) : 16) Chunk {
    T v[W];
};
template <typename T, int W>
using Word = std::conditional_t<W == 1, T, std::conditional_t<W * sizeof(T) == 8, int2, int4>>;
template <typename T, int W> static __device__ __forceinline__ Chunk<T, W> load(const T *p) {
    Chunk<T, W> chunk;
#pragma unroll
    for (int i = 0; i < (int)(sizeof(chunk) / sizeof(Word<T, W>)); i++)
        reinterpret_cast<Word<T, W> *>(&chunk)[i] = reinterpret_cast<const Word<T, W> *>(p)[i];
    return chunk;
}
template <typename T, int W>
static __device__ __forceinline__ void store(T *p, const Chunk<T, W> &chunk) {
#pragma unroll
    for (int i = 0; i < (int)(sizeof(chunk) / sizeof(Word<T, W>)); i++)
        reinterpret_cast<Word<T, W> *>(p)[i] = reinterpret_cast<const Word<T, W> *>(&chunk)[i];
}
template <typename T, int W> static bool chunks_fit(const void *p) {
    return (uintptr_t)p % alignof(Chunk<T, W>) == 0;
}

// G: gradient, S: moments, C: working copy, which may be NULL.
template <typename G, typename S, typename C> struct Arrays {
    const G *grad;
    float *master;
    S *m, *v;
    C *copy;
};

// Elements [begin, begin + W). The weights move by the moments before these are rounded.
template <int W, typename G, typename S, typename C>
static __device__ __forceinline__ void update_chunk(const AdamwStep &c, int64_t begin,
                                                    const Arrays<G, S, C> &a) {
    const Chunk<G, W> g = load<G, W>(a.grad + begin);
    Chunk<float, W> p = load<float, W>(a.master + begin);
    Chunk<S, W> m = load<S, W>(a.m + begin), v = load<S, W>(a.v + begin);
    Chunk<C, W> out;
#pragma unroll
    for (int i = 0; i < W; i++) {
        float m_new = to_float(m.v[i]), v_new = to_float(v.v[i]);
        update(c, to_float(g.v[i]), &p.v[i], &m_new, &v_new);
        m.v[i] = from_float<S>(m_new);
        v.v[i] = from_float<S>(v_new);
        out.v[i] = from_float<C>(p.v[i]);
    }
    store<float, W>(a.master + begin, p);
    store<S, W>(a.m + begin, m);
    store<S, W>(a.v + begin, v);
    if (a.copy) store<C, W>(a.copy + begin, out);
}

// Blocks of THREADS chunks; the elements behind the last whole chunk go one by one.
template <typename G, typename S, typename C>
static __global__ void __launch_bounds__(THREADS)
    adamw_kernel(AdamwStep c, int64_t count, bool wide, Arrays<G, S, C> a) {
    constexpr int W = PER_THREAD<G, S>;
    const int64_t begin = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * W;
    if (wide && begin + W <= count) {
        update_chunk<W>(c, begin, a);
        return;
    }
    for (int64_t i = begin; i < begin + W && i < count; i++) update_chunk<1>(c, i, a);
}

template <typename G, typename S, typename C>
static void launch(const AdamwArgs *args, cudaStream_t stream) {
    constexpr int W = PER_THREAD<G, S>;
    const Arrays<G, S, C> arrays = {(const G *)args->grad, args->master, (S *)args->m, (S *)args->v,
                                    (C *)args->copy};
    const bool wide = chunks_fit<G, W>(args->grad) && chunks_fit<float, W>(args->master) &&
                      chunks_fit<S, W>(args->m) && chunks_fit<S, W>(args->v) &&
                      chunks_fit<C, W>(args->copy);
    const int64_t blocks = div_up(args->count, (int64_t)THREADS * W);
    adamw_kernel<<<(unsigned)blocks, THREADS, 0, stream>>>(constants_of(args), args->count, wide,
                                                           arrays);
}

Status cuda_adamw(Backend *base, const AdamwArgs *args) {
    CudaBackend *backend = cuda_of(base);
    backend->current_op = "adamw";
    INVARIANT(args->grad_dtype != DTYPE_F16 && args->state_dtype != DTYPE_F16);
    INVARIANT(!args->copy || args->copy_dtype != DTYPE_F16);
    if (args->count == 0) return STATUS_OK;
    DISPATCH_DTYPE(args->grad_dtype, G, {
        DISPATCH_DTYPE(args->state_dtype, S, {
            DISPATCH_DTYPE(args->copy ? args->copy_dtype : DTYPE_F32, C,
                           { launch<G, S, C>(args, backend->stream); });
        });
    });
    LAUNCH_TRY(backend);
    return STATUS_OK;
}
