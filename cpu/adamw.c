// AdamW: one pass over gradient, moments and weights.
#include <math.h>
#include "cpu/cpu.h"

enum { ADAMW_BLOCK = 16384 }; // elements a thread does before it casts them, still in cache
enum { WIDEN_BLOCK = 1024 };  // 16-bit moments in fp32 at a time

// The constants of one update. The divisions by (1 - β^step) become factors.
typedef struct AdamwStep {
    float grad_scale, beta1, beta2, rest1, rest2; // rest = 1 - beta
    float unbias2, step_size, epsilon, decay;     // step_size = lr/(1-β1^t), decay = lr·wd
} AdamwStep;

static AdamwStep adamw_constants(const AdamwArgs *args) {
    const double t = (double)args->step;
    return (AdamwStep){
        .grad_scale = (float)args->grad_scale,
        .beta1 = (float)args->beta1,
        .beta2 = (float)args->beta2,
        .rest1 = (float)(1.0 - args->beta1),
        .rest2 = (float)(1.0 - args->beta2),
        .unbias2 = (float)(1.0 / (1.0 - pow(args->beta2, t))),
        .step_size = (float)(args->learning_rate / (1.0 - pow(args->beta1, t))),
        .epsilon = (float)args->epsilon,
        .decay = (float)(args->learning_rate * args->weight_decay),
    };
}

static void adamw_block(const AdamwStep *constants, const float *grad, float *master, float *m,
                        float *v, int64_t count) {
    const AdamwStep c = *constants;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        const float g = grad[i] * c.grad_scale;
        const float m_new = c.beta1 * m[i] + c.rest1 * g;
        const float v_new = c.beta2 * v[i] + c.rest2 * (g * g);
        m[i] = m_new;
        v[i] = v_new;
        const float direction = m_new / (sqrtf(v_new * c.unbias2) + c.epsilon);
        master[i] -= c.step_size * direction + c.decay * master[i];
    }
}

// Elements [begin, begin + count) where the moments are kept in 16 bits.
static void adamw_narrow_block(const AdamwStep *constants, const AdamwArgs *args, int64_t begin,
                               int64_t count) {
    float m[WIDEN_BLOCK], v[WIDEN_BLOCK];
    const DType dtype = args->state_dtype;
    for (int64_t end = begin + count; begin < end; begin += WIDEN_BLOCK) {
        const int64_t some = min_i64(WIDEN_BLOCK, end - begin);
        void *kept_m = (uint16_t *)args->m + begin, *kept_v = (uint16_t *)args->v + begin;
        dtype_to_f32(dtype, kept_m, m, (size_t)some);
        dtype_to_f32(dtype, kept_v, v, (size_t)some);
        adamw_block(constants, (const float *)args->grad + begin, args->master + begin, m, v, some);
        dtype_from_f32(dtype, m, kept_m, (size_t)some);
        dtype_from_f32(dtype, v, kept_v, (size_t)some);
    }
}

Status cpu_adamw(Backend *backend, const AdamwArgs *args) {
    INVARIANT(args->grad_dtype == DTYPE_F32 && args->state_dtype != DTYPE_F16);
    const AdamwStep constants = adamw_constants(args);
    const int64_t blocks = divide_up(args->count, ADAMW_BLOCK);
    const size_t copy_size = args->copy ? dtype_bytes(args->copy_dtype) : 0;
#pragma omp parallel for num_threads(backend->num_threads) schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t begin = b * ADAMW_BLOCK;
        const int64_t count = min_i64(ADAMW_BLOCK, args->count - begin);
        if (args->state_dtype == DTYPE_F32)
            adamw_block(&constants, (const float *)args->grad + begin, args->master + begin,
                        (float *)args->m + begin, (float *)args->v + begin, count);
        else
            adamw_narrow_block(&constants, args, begin, count);
        if (args->copy)
            dtype_from_f32(args->copy_dtype, args->master + begin,
                           (char *)args->copy + (size_t)begin * copy_size, (size_t)count);
    }
    return STATUS_OK;
}
