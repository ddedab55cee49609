// Rotary position embedding on packed q|k|v rows, with Qwen3's RMSNorm of each q and k head before.
//
// A pair (a, b) = (n[i], n[i + D/2]) becomes (a·cos - b·sin, b·cos + a·sin); the transpose turns
// the gradient back by the same angle. Cosines and sines depend on the position alone, so each is
// computed once, in double, and used for every sequence and head at that position.
#include <math.h>
#include <string.h>
#include "cpu/cpu.h"

typedef struct RopeScratch {
    double *frequency;       // (D/2)
    float *cosine, *sine;    // (threads, D/2)
    float *normed;           // (threads, D) gradient of one normed head
    double *q_sums, *k_sums; // (threads, D) of the norm weights' gradients
} RopeScratch;

static void rope_layout(const Backend *backend, const RopeArgs *args, Workspace *workspace,
                        RopeScratch *out) {
    const int64_t threads = backend->num_threads, dim = args->head_dim;
    out->frequency = workspace_take(workspace, (size_t)dim / 2 * sizeof(double));
    out->cosine = workspace_floats(workspace, threads * dim / 2);
    out->sine = workspace_floats(workspace, threads * dim / 2);
    out->normed = workspace_floats(workspace, threads * dim);
    out->q_sums = workspace_take(workspace, (size_t)(threads * dim) * sizeof(double));
    out->k_sums = workspace_take(workspace, (size_t)(threads * dim) * sizeof(double));
}

size_t cpu_rope_workspace(const Backend *backend, const RopeArgs *args) {
    Workspace counter = {NULL, 0};
    RopeScratch unused;
    rope_layout(backend, args, &counter, &unused);
    return counter.used;
}

static void set_frequencies(const RopeArgs *args, double *frequency) {
    const int half = args->head_dim / 2;
    for (int i = 0; i < half; i++) frequency[i] = pow(args->theta, -2.0 * i / args->head_dim);
}

static void set_angles(const RopeArgs *args, const double *frequency, int64_t position,
                       float *cosine, float *sine) {
    const int half = args->head_dim / 2;
    for (int i = 0; i < half; i++) {
        const double angle = (double)position * frequency[i];
        cosine[i] = (float)cos(angle);
        sine[i] = (float)sin(angle);
    }
}

// out = n turned by the angles, where n = x·scale·weight (weight NULL: n = x). out may be x.
static void rotate(const float *x, float scale, const float *weight, const float *cosine,
                   const float *sine, int half, float *out) {
#pragma omp simd
    for (int i = 0; i < half; i++) {
        float a = weight ? x[i] * scale * weight[i] : x[i];
        float b = weight ? x[i + half] * scale * weight[i + half] : x[i + half];
        out[i] = a * cosine[i] - b * sine[i];
        out[i + half] = b * cosine[i] + a * sine[i];
    }
}

static void rotate_back(const float *dout, const float *cosine, const float *sine, int half,
                        float *out) {
#pragma omp simd
    for (int i = 0; i < half; i++) {
        float a = dout[i], b = dout[i + half];
        out[i] = a * cosine[i] + b * sine[i];
        out[i + half] = b * cosine[i] - a * sine[i];
    }
}

static float inverse_rms(const float *x, int dim, float epsilon) {
    double squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int i = 0; i < dim; i++) squares += (double)x[i] * x[i];
    return (float)(1.0 / sqrt(squares / dim + epsilon));
}

static int64_t row_width(const RopeArgs *args) {
    return (int64_t)(args->num_heads + 2 * args->num_kv_heads) * args->head_dim;
}

static void forward_row(const RopeArgs *args, int64_t row, const float *cosine, const float *sine) {
    const int dim = args->head_dim, heads = args->num_heads, rotated = heads + args->num_kv_heads;
    const float *in = (const float *)args->qkv + row * row_width(args);
    float *out = (float *)args->out + row * row_width(args);
    for (int h = 0; h < rotated; h++) {
        const float *weight = h < heads ? args->q_norm : args->k_norm;
        float scale = 1.0f;
        if (weight) {
            scale = inverse_rms(in + h * dim, dim, args->epsilon);
            args->inv_rms[row * rotated + h] = scale;
        }
        rotate(in + h * dim, scale, weight, cosine, sine, dim / 2, out + h * dim);
    }
    if (in != out)
        memcpy(out + rotated * dim, in + rotated * dim,
               (size_t)(args->num_kv_heads * dim) * sizeof(float));
}

Status cpu_rope_forward(Backend *backend, const RopeArgs *args) {
    Workspace workspace = workspace_open(backend);
    RopeScratch scratch;
    rope_layout(backend, args, &workspace, &scratch);
    WORKSPACE_FITS(backend, workspace);
    INVARIANT(args->head_dim % 2 == 0);
    set_frequencies(args, scratch.frequency);
    const int parts = backend->num_threads, half = args->head_dim / 2;
#pragma omp parallel for num_threads(parts) schedule(static)
    for (int p = 0; p < parts; p++) {
        float *cosine = scratch.cosine + p * half, *sine = scratch.sine + p * half;
        const int64_t end = part_begin(args->sequence_length, parts, p + 1);
        for (int64_t s = part_begin(args->sequence_length, parts, p); s < end; s++) {
            set_angles(args, scratch.frequency, s, cosine, sine);
            for (int64_t b = 0; b < args->batch; b++)
                forward_row(args, b * args->sequence_length + s, cosine, sine);
        }
    }
    return STATUS_OK;
}

// dx of n = x·r·w from dn, as in cpu/norm.c; adds dn·x·r to `sums`.
static void norm_backward(const float *x, float inverse, const float *weight, const float *dn,
                          int dim, double *sums, float *dx) {
    double dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int i = 0; i < dim; i++) {
        float normed = x[i] * inverse;
        dot += (double)(dn[i] * weight[i]) * normed;
        sums[i] += (double)dn[i] * normed;
    }
    const float mean = (float)(dot / dim);
#pragma omp simd
    for (int i = 0; i < dim; i++) dx[i] = inverse * (dn[i] * weight[i] - x[i] * inverse * mean);
}

static void backward_row(const RopeArgs *args, int64_t row, const float *cosine, const float *sine,
                         float *normed, double *q_sums, double *k_sums) {
    const int dim = args->head_dim, heads = args->num_heads, rotated = heads + args->num_kv_heads;
    const float *dout = (const float *)args->dout + row * row_width(args);
    float *dqkv = (float *)args->dqkv + row * row_width(args);
    for (int h = 0; h < rotated; h++) {
        const float *weight = h < heads ? args->q_norm : args->k_norm;
        if (!weight) {
            rotate_back(dout + h * dim, cosine, sine, dim / 2, dqkv + h * dim);
            continue;
        }
        rotate_back(dout + h * dim, cosine, sine, dim / 2, normed);
        const float *x = (const float *)args->qkv + row * row_width(args) + h * dim;
        norm_backward(x, args->inv_rms[row * rotated + h], weight, normed, dim,
                      h < heads ? q_sums : k_sums, dqkv + h * dim);
    }
    if (dout != dqkv)
        memcpy(dqkv + rotated * dim, dout + rotated * dim,
               (size_t)(args->num_kv_heads * dim) * sizeof(float));
}

static void add_norm_gradient(const double *sums, int parts, int dim, float *grad) {
    for (int i = 0; i < dim; i++) {
        double sum = 0;
        for (int p = 0; p < parts; p++) sum += sums[p * dim + i];
        grad[i] += (float)sum;
    }
}

Status cpu_rope_backward(Backend *backend, const RopeArgs *args) {
    Workspace workspace = workspace_open(backend);
    RopeScratch scratch;
    rope_layout(backend, args, &workspace, &scratch);
    WORKSPACE_FITS(backend, workspace);
    INVARIANT(args->head_dim % 2 == 0);
    set_frequencies(args, scratch.frequency);
    const int parts = backend->num_threads, dim = args->head_dim;
#pragma omp parallel for num_threads(parts) schedule(static)
    for (int p = 0; p < parts; p++) {
        float *cosine = scratch.cosine + p * (dim / 2), *sine = scratch.sine + p * (dim / 2);
        double *q_sums = scratch.q_sums + p * dim, *k_sums = scratch.k_sums + p * dim;
        for (int i = 0; i < dim; i++) q_sums[i] = k_sums[i] = 0;
        const int64_t end = part_begin(args->sequence_length, parts, p + 1);
        for (int64_t s = part_begin(args->sequence_length, parts, p); s < end; s++) {
            set_angles(args, scratch.frequency, s, cosine, sine);
            for (int64_t b = 0; b < args->batch; b++)
                backward_row(args, b * args->sequence_length + s, cosine, sine,
                             scratch.normed + p * dim, q_sums, k_sums);
        }
    }
    if (args->q_norm) {
        add_norm_gradient(scratch.q_sums, parts, dim, args->grad_q_norm);
        add_norm_gradient(scratch.k_sums, parts, dim, args->grad_k_norm);
    }
    return STATUS_OK;
}
