// The grouped products of Hopper chips against sums in double precision: group sizes that are no
// multiple of anything, groups without rows, every width of tile, edges in both directions.
#include "cuda/hopper_grouped.h"
extern "C" {
#include "tests/gpu/gpu_test.h"
}

enum { GROUPS_MAX = 6 };

typedef struct Case {
    int groups, begin[GROUPS_MAX + 1];
    int k, n; // of a product; of a gradient its M and N
} Case;

// The last five have more tiles than an H200 does at a time, in nearly whole rounds, so that
// clusters go from tile to tile.
static const Case cases[] = {
    {1, {0, 1}, 8, 8},                               // less than any tile
    {1, {0, 300}, 200, 512},                         // tiles of 256 columns
    {3, {0, 100, 100, 517}, 136, 896},               // of 224, an empty group
    {6, {0, 64, 320, 321, 700, 700, 1200}, 72, 576}, // of 192
    {2, {0, 0, 777}, 896, 1000},                     // the last tile stands over
    {4, {0, 257, 257, 258, 600}, 608, 232},
    {2, {0, 5, 9}, 4864, 64},
    {1, {0, 8192}, 64, 896},
    {1, {0, 11264}, 64, 576},
    {1, {0, 16896}, 64, 512},
    {3, {0, 200, 330, 390}, 4096, 896},
    {2, {0, 37, 100}, 896, 4096},
};

static int group_of(const Case *c, int row) {
    int g = 0;
    while (row >= c->begin[g + 1]) g++;
    return g;
}

static void reference_rows(const Case *c, bool inner_last, const float *in, const float *weight,
                           float *out) {
    double *sums = (double *)malloc((size_t)c->n * sizeof *sums);
    for (int64_t r = 0; r < c->begin[c->groups]; r++) {
        const float *w = weight + (int64_t)group_of(c, (int)r) * c->n * c->k, *x = in + r * c->k;
        for (int n = 0; n < c->n; n++) sums[n] = 0;
        for (int n = 0; n < c->n && inner_last; n++)
            for (int k = 0; k < c->k; k++) sums[n] += (double)x[k] * w[(int64_t)n * c->k + k];
        for (int k = 0; k < c->k && !inner_last; k++)
            for (int n = 0; n < c->n; n++) sums[n] += (double)x[k] * w[(int64_t)k * c->n + n];
        for (int n = 0; n < c->n; n++) out[r * c->n + n] = (float)sums[n];
    }
    free(sums);
}

static void check_rows(Backend *gpu, const Case *c, bool inner_last) {
    const int64_t rows = c->begin[c->groups], n = c->n, k = c->k;
    char text[96];
    snprintf(text, sizeof text, "%d groups, %d rows, K%d N%d, weight's K %s", c->groups, (int)rows,
             c->k, c->n, inner_last ? "last" : "first");
    Pair in = pair_random(gpu, DTYPE_BF16, rows * k, 1.0f);
    Pair weight = pair_random(gpu, DTYPE_BF16, c->groups * n * k, 1.0f / sqrtf((float)k));
    Pair out = pair_poisoned(gpu, DTYPE_BF16, rows * n);
    HopperRows p = {};
    p.groups = c->groups;
    p.begin = c->begin;
    p.inner = c->k;
    p.columns = c->n;
    p.inner_last = inner_last;
    p.in = in.gpu;
    p.weight = weight.gpu;
    p.out = out.gpu;
    gpu_report(hopper_rows_takes(cuda_of(gpu), &p) ? 0 : 1, 0, "%s is taken", text);
    GPU_OK(hopper_rows(cuda_of(gpu), &p));
    reference_rows(c, inner_last, in.cpu, weight.cpu, out.cpu);
    pair_check(&out, gpu_tolerance(DTYPE_BF16), text, "product");
    Pair *all[] = {&in, &weight, &out};
    for (Pair *pair : all) pair_free(pair);
}

// Products of bf16 are exact in fp32. An instruction adds 16 of them to a sum that it does not
// round but cut off after 24 bits (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores"):
// half a unit each time on average, and always towards zero, so that the error grows with the rows.
static double sum_tolerance(int64_t rows) {
    return fmax(gpu_tolerance(DTYPE_F32), (double)rows / 16 * 0x1p-24);
}

// grad += leftᵀ · right.
static void reference_gradient(const Case *c, const float *left, const float *right, float *grad) {
    const int64_t m = c->k, n = c->n;
    double *sums = (double *)malloc((size_t)(m * n) * sizeof *sums);
    for (int g = 0; g < c->groups; g++, grad += m * n) {
        for (int64_t i = 0; i < m * n; i++) sums[i] = grad[i];
        for (int64_t r = c->begin[g]; r < c->begin[g + 1]; r++)
            for (int64_t i = 0; i < m; i++)
                for (int64_t j = 0; j < n; j++)
                    sums[i * n + j] += (double)left[r * m + i] * right[r * n + j];
        for (int64_t i = 0; i < m * n; i++) grad[i] = (float)sums[i];
    }
    free(sums);
}

static void check_gradient(Backend *gpu, const Case *c) {
    const int64_t rows = c->begin[c->groups], m = c->k, n = c->n;
    char text[96];
    snprintf(text, sizeof text, "%d groups, %d rows, gradient of %d by %d", c->groups, (int)rows,
             c->k, c->n);
    Pair left = pair_random(gpu, DTYPE_BF16, rows * m, 1.0f);
    Pair right = pair_random(gpu, DTYPE_BF16, rows * n, 1.0f);
    Pair assigned = pair_poisoned(gpu, DTYPE_F32, c->groups * m * n);
    Pair added = pair_random(gpu, DTYPE_F32, c->groups * m * n, 10.0f);
    HopperGradient p = {};
    p.groups = c->groups;
    p.begin = c->begin;
    p.m = c->k;
    p.n = c->n;
    p.left = left.gpu;
    p.left_stride = m;
    p.right = right.gpu;
    p.assign = true;
    p.grad = (float *)assigned.gpu;
    gpu_report(hopper_gradient_takes(cuda_of(gpu), &p) ? 0 : 1, 0, "%s is taken", text);
    GPU_OK(hopper_gradient(cuda_of(gpu), &p));
    p.assign = false;
    p.grad = (float *)added.gpu;
    GPU_OK(hopper_gradient(cuda_of(gpu), &p));
    memset(assigned.cpu, 0, (size_t)assigned.count * sizeof(float));
    reference_gradient(c, left.cpu, right.cpu, assigned.cpu);
    reference_gradient(c, left.cpu, right.cpu, added.cpu);
    const double tolerance = sum_tolerance(rows);
    pair_check(&assigned, tolerance, text, "assigned");
    pair_check(&added, tolerance, text, "added");
    Pair *all[] = {&left, &right, &assigned, &added};
    for (Pair *pair : all) pair_free(pair);
}

// A matrix whose rows are longer than what is read of them, as logits are; one group.
static void check_stride(Backend *gpu) {
    const Case c = {1, {0, 190}, 1003 / 8 * 8, 896};
    const int64_t rows = 190, stride = 1024;
    Pair padded = pair_random(gpu, DTYPE_BF16, rows * stride, 1.0f);
    Pair right = pair_random(gpu, DTYPE_BF16, rows * c.n, 1.0f);
    Pair grad = pair_filled(gpu, DTYPE_F32, (int64_t)c.k * c.n, 0.0f);
    float *left = (float *)malloc((size_t)(rows * c.k) * sizeof *left);
    for (int64_t r = 0; r < rows; r++)
        memcpy(left + r * c.k, padded.cpu + r * stride, (size_t)c.k * sizeof *left);
    HopperGradient p = {};
    p.groups = c.groups;
    p.begin = c.begin;
    p.m = c.k;
    p.n = c.n;
    p.left = padded.gpu;
    p.left_stride = stride;
    p.right = right.gpu;
    p.grad = (float *)grad.gpu;
    GPU_OK(hopper_gradient(cuda_of(gpu), &p));
    reference_gradient(&c, left, right.cpu, grad.cpu);
    pair_check(&grad, sum_tolerance(rows), "rows of 1024 values", "1000 of them");
    free(left);
    Pair *all[] = {&padded, &right, &grad};
    for (Pair *pair : all) pair_free(pair);
}

int main(void) {
    Backend *gpu = gpu_backend(false);
    const int32_t one_row[] = {0, 1};
    HopperRows any = {};
    any.groups = 1;
    any.begin = one_row;
    if (!hopper_rows_takes(cuda_of(gpu), &any)) {
        printf("grouped: this GPU has no such kernels; skipped\n");
        return 77;
    }
    for (const Case &c : cases) {
        check_rows(gpu, &c, true);
        check_rows(gpu, &c, false);
        check_gradient(gpu, &c);
    }
    check_stride(gpu);
    backend_destroy(gpu);
    return gpu_test_result("grouped");
}
