// Residual addition and RMSNorm in one pass over the rows.
//
//   out[h] = x_out[h] · r · w[h],  r = 1 / sqrt(mean(x_out²) + ε)
//   with g[h] = dout[h]·w[h]:  dx[h] += r·g[h] - x_out[h]·r³/H·Σ g·x_out
#include <math.h>
#include "cpu/cpu.h"

static void forward_row(const RmsNormArgs *args, int64_t t) {
    const int64_t hidden = args->hidden_size;
    const float *x = (const float *)args->x + t * hidden, *weight = args->weight;
    const float *y = args->y ? (const float *)args->y + t * hidden : NULL;
    float *x_out = (float *)args->x_out + t * hidden, *out = (float *)args->out + t * hidden;
    double squares = 0;
    if (y) {
#pragma omp simd reduction(+ : squares)
        for (int64_t h = 0; h < hidden; h++) {
            float sum = x[h] + y[h];
            x_out[h] = sum;
            squares += (double)sum * sum;
        }
    } else {
#pragma omp simd reduction(+ : squares)
        for (int64_t h = 0; h < hidden; h++) {
            x_out[h] = x[h];
            squares += (double)x[h] * x[h];
        }
    }
    const float inverse = (float)(1.0 / sqrt(squares / (double)hidden + args->epsilon));
    args->inv_rms[t] = inverse;
#pragma omp simd
    for (int64_t h = 0; h < hidden; h++) out[h] = x_out[h] * inverse * weight[h];
}

Status cpu_rmsnorm_forward(Backend *backend, const RmsNormArgs *args) {
#pragma omp parallel for num_threads(backend->num_threads) schedule(static)
    for (int64_t t = 0; t < args->tokens; t++) forward_row(args, t);
    return STATUS_OK;
}

// One row of the backward; adds the row's share of the weight's gradient to `sums`.
static void backward_row(const RmsNormArgs *args, int64_t t, double *sums) {
    const int64_t hidden = args->hidden_size;
    const float *x = (const float *)args->x_out + t * hidden, *weight = args->weight;
    const float *dout = (const float *)args->dout + t * hidden;
    float *dx = (float *)args->dx + t * hidden;
    const float inverse = args->inv_rms[t];
    double dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t h = 0; h < hidden; h++) {
        float normed = x[h] * inverse;
        dot += (double)(dout[h] * weight[h]) * normed;
        sums[h] += (double)dout[h] * normed;
    }
    const float mean = (float)(dot / (double)hidden);
#pragma omp simd
    for (int64_t h = 0; h < hidden; h++)
        dx[h] += inverse * (dout[h] * weight[h] - x[h] * inverse * mean);
}

static double *norm_sums(const Backend *backend, const RmsNormArgs *args, Workspace *workspace) {
    return workspace_take(workspace, (size_t)backend->num_threads * (size_t)args->hidden_size *
                                         sizeof(double));
}

size_t cpu_rmsnorm_workspace(const Backend *backend, const RmsNormArgs *args) {
    Workspace counter = {NULL, 0};
    norm_sums(backend, args, &counter);
    return counter.used;
}

// Each of num_threads parts of the tokens has its own sums, added up part by part at the end.
Status cpu_rmsnorm_backward(Backend *backend, const RmsNormArgs *args) {
    Workspace workspace = workspace_open(backend);
    double *all_sums = norm_sums(backend, args, &workspace);
    WORKSPACE_FITS(backend, workspace);
    const int64_t hidden = args->hidden_size;
    const int parts = backend->num_threads;
    float *grad_weight = args->grad_weight;
#pragma omp parallel num_threads(parts)
    {
#pragma omp for schedule(static)
        for (int p = 0; p < parts; p++) {
            double *sums = all_sums + p * hidden;
            for (int64_t h = 0; h < hidden; h++) sums[h] = 0;
            const int64_t end = part_begin(args->tokens, parts, p + 1);
            for (int64_t t = part_begin(args->tokens, parts, p); t < end; t++)
                backward_row(args, t, sums);
        }
#pragma omp for schedule(static)
        for (int64_t h = 0; h < hidden; h++) {
            double sum = 0;
            for (int p = 0; p < parts; p++) sum += all_sums[p * hidden + h];
            grad_weight[h] += (float)sum;
        }
    }
    return STATUS_OK;
}
