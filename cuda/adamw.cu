// AdamW: one pass over gradient, moments, master weights and the working copy.
#include "cuda/common.cuh"

enum { THREADS = 256, PER_THREAD = 4 };

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

// W elements of T in one access of W·sizeof(T) bytes.
template <typename T, int W> struct alignas(W * sizeof(T)) Chunk { T v[W]; };
template <typename T, int W> static __device__ __forceinline__ Chunk<T, W> load(const T *p) {
    Chunk<T, W> chunk;
    if constexpr (sizeof(chunk) == 16)
        *reinterpret_cast<int4 *>(&chunk) = *reinterpret_cast<const int4 *>(p);
    else if constexpr (sizeof(chunk) == 8)
        *reinterpret_cast<int2 *>(&chunk) = *reinterpret_cast<const int2 *>(p);
    else
        chunk.v[0] = *p;
    return chunk;
}
template <typename T, int W>
static __device__ __forceinline__ void store(T *p, const Chunk<T, W> &chunk) {
    if constexpr (sizeof(chunk) == 16)
        *reinterpret_cast<int4 *>(p) = *reinterpret_cast<const int4 *>(&chunk);
    else if constexpr (sizeof(chunk) == 8)
        *reinterpret_cast<int2 *>(p) = *reinterpret_cast<const int2 *>(&chunk);
    else
        *p = chunk.v[0];
}

// Elements [begin, begin + W). G: gradient, C: working copy, which may be NULL.
template <typename G, typename C, int W>
static __device__ __forceinline__ void update_chunk(const AdamwStep &c, int64_t begin,
                                                    const G *grad, float *master, float *m,
                                                    float *v, C *copy) {
    const Chunk<G, W> g = load<G, W>(grad + begin);
    Chunk<float, W> p = load<float, W>(master + begin), m_old = load<float, W>(m + begin),
                    v_old = load<float, W>(v + begin);
    Chunk<C, W> out;
#pragma unroll
    for (int i = 0; i < W; i++) {
        update(c, to_float(g.v[i]), &p.v[i], &m_old.v[i], &v_old.v[i]);
        out.v[i] = from_float<C>(p.v[i]);
    }
    store<float, W>(master + begin, p);
    store<float, W>(m + begin, m_old);
    store<float, W>(v + begin, v_old);
    if (copy) store<C, W>(copy + begin, out);
}

// Blocks of THREADS chunks; the elements behind the last whole chunk go one by one.
template <typename G, typename C>
static __global__ void __launch_bounds__(THREADS)
    adamw_kernel(AdamwStep c, int64_t count, bool wide, const G *__restrict__ grad,
                 float *__restrict__ master, float *__restrict__ m, float *__restrict__ v,
                 C *__restrict__ copy) {
    const int64_t begin = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * PER_THREAD;
    if (wide && begin + PER_THREAD <= count) {
        update_chunk<G, C, PER_THREAD>(c, begin, grad, master, m, v, copy);
        return;
    }
    for (int64_t i = begin; i < begin + PER_THREAD && i < count; i++)
        update_chunk<G, C, 1>(c, i, grad, master, m, v, copy);
}

template <typename G, typename C> static void launch(const AdamwArgs *args, cudaStream_t stream) {
    const uintptr_t floats = (uintptr_t)args->master | (uintptr_t)args->m | (uintptr_t)args->v;
    const bool wide = floats % (PER_THREAD * sizeof(float)) == 0 &&
                      (uintptr_t)args->grad % (PER_THREAD * sizeof(G)) == 0 &&
                      (uintptr_t)args->copy % (PER_THREAD * sizeof(C)) == 0;
    const int64_t blocks = div_up(args->count, (int64_t)THREADS * PER_THREAD);
    adamw_kernel<G, C><<<(unsigned)blocks, THREADS, 0, stream>>>(
        constants_of(args), args->count, wide, (const G *)args->grad, args->master, args->m,
        args->v, (C *)args->copy);
}

Status cuda_adamw(Backend *base, const AdamwArgs *args) {
    CudaBackend *backend = cuda_of(base);
    backend->current_op = "adamw";
    INVARIANT(args->grad_dtype != DTYPE_F16 && (!args->copy || args->copy_dtype != DTYPE_F16));
    if (args->count == 0) return STATUS_OK;
    DISPATCH_DTYPE(args->grad_dtype, G, {
        DISPATCH_DTYPE(args->copy ? args->copy_dtype : DTYPE_F32, C,
                       { launch<G, C>(args, backend->stream); });
    });
    LAUNCH_TRY(backend);
    return STATUS_OK;
}
