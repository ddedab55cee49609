// What works on whole arenas, on the GPU against the CPU backend: AdamW, norms, row similarity,
// addition and casts.
#include "tests/gpu/gpu_test.h"

static const int64_t counts[] = {1, 3, 4, 127, 1024, 1027, 100003, 3000000};
enum { NUM_COUNTS = sizeof counts / sizeof counts[0] };

// --- AdamW ---------------------------------------------------------------------------------------

typedef struct AdamwCase {
    int64_t count;
    int offset; // elements into the arenas: 1 makes every pointer unaligned
    bool copy;
    DType copy_dtype, grad_dtype, state_dtype;
} AdamwCase;

// Where both sides round to bf16, about one element in ten thousand falls on different sides of
// the middle between two numbers, one step (2^-7 at most) apart. Cutting off instead of rounding
// to nearest would make 4e-3.
static double moment_tolerance(DType dtype) {
    return dtype == DTYPE_F32 ? GPU_TOLERANCE_F32 : 1e-3;
}

// The CPU's moments as the GPU keeps them: rounded after each update.
static void round_moments(const Pair *p) {
    void *kept = malloc((size_t)p->count * dtype_bytes(p->dtype));
    dtype_from_f32(p->dtype, p->cpu, kept, (size_t)p->count);
    dtype_to_f32(p->dtype, kept, p->cpu, (size_t)p->count);
    free(kept);
}

// Three updates, so that the moments matter. A gradient in bf16 is rounded before the CPU sees it.
static void check_adamw(Backend *gpu, const AdamwCase *c) {
    char text[96];
    snprintf(text, sizeof text, "adamw %lld, grad %s, moments %s, copy %s%s", (long long)c->count,
             dtype_name(c->grad_dtype), dtype_name(c->state_dtype),
             c->copy ? dtype_name(c->copy_dtype) : "none", c->offset ? ", unaligned" : "");
    const int64_t total = c->count + c->offset;
    Pair master = pair_random(gpu, DTYPE_F32, total, 1.0f);
    Pair m = pair_filled(gpu, c->state_dtype, total, 0.0f);
    Pair v = pair_filled(gpu, c->state_dtype, total, 0.0f);
    Pair copy = pair_poisoned(gpu, c->copy_dtype, total);
    const size_t grad_at = (size_t)c->offset * dtype_bytes(c->grad_dtype);
    const size_t state_at = (size_t)c->offset * dtype_bytes(c->state_dtype);
    const size_t copy_at = (size_t)c->offset * dtype_bytes(c->copy_dtype);
    for (int step = 1; step <= 3; step++) {
        Pair grad = pair_random(gpu, c->grad_dtype, total, 0.1f);
        AdamwArgs host = {.count = c->count,
                          .master = master.cpu + c->offset,
                          .grad = grad.cpu + c->offset,
                          .grad_dtype = DTYPE_F32,
                          .m = m.cpu + c->offset,
                          .v = v.cpu + c->offset,
                          .copy = c->copy ? copy.cpu + c->offset : NULL,
                          .copy_dtype = DTYPE_F32,
                          .learning_rate = 1e-3,
                          .beta1 = 0.9,
                          .beta2 = 0.95,
                          .epsilon = 1e-8,
                          .weight_decay = 0.1,
                          .grad_scale = 0.7,
                          .step = step};
        AdamwArgs args = host;
        args.master = (float *)master.gpu + c->offset;
        args.grad = (char *)grad.gpu + grad_at;
        args.grad_dtype = c->grad_dtype;
        args.m = (char *)m.gpu + state_at;
        args.v = (char *)v.gpu + state_at;
        args.state_dtype = c->state_dtype;
        args.copy = c->copy ? (char *)copy.gpu + copy_at : NULL;
        args.copy_dtype = c->copy_dtype;
        GPU_RUN(gpu_reference(), OP_ADAMW, adamw, &host);
        GPU_RUN(gpu, OP_ADAMW, adamw, &args);
        round_moments(&m);
        round_moments(&v);
        pair_free(&grad);
    }
    pair_check(&master, GPU_TOLERANCE_F32, text, "master");
    pair_check(&m, moment_tolerance(c->state_dtype), text, "m");
    pair_check(&v, moment_tolerance(c->state_dtype), text, "v");
    if (c->copy) {
        copy.cpu[0] = c->offset ? 0.0f : copy.cpu[0]; // poison in front of an unaligned copy
        float *got = pair_download(&copy);
        got[0] = c->offset ? 0.0f : got[0];
        gpu_report(gpu_error_of(got, copy.cpu, total), gpu_tolerance(c->copy_dtype), "%s copy",
                   text);
        free(got);
    }
    Pair *all[] = {&master, &m, &v, &copy};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) pair_free(all[i]);
}

static void check_adamw_cases(Backend *gpu) {
    for (int i = 0; i < NUM_COUNTS; i++) {
        for (int offset = 0; offset < 2; offset++) {
            const AdamwCase wide = {counts[i], offset, true, DTYPE_BF16, DTYPE_F32, DTYPE_F32};
            const AdamwCase narrow = {counts[i], offset, true, DTYPE_BF16, DTYPE_F32, DTYPE_BF16};
            check_adamw(gpu, &wide);
            check_adamw(gpu, &narrow);
        }
    }
    // Every combination of types, with and without a copy, aligned and not.
    for (int bits = 0; bits < 32; bits++) {
        const DType copy = bits & 1 ? DTYPE_BF16 : DTYPE_F32;
        const DType grad = bits & 2 ? DTYPE_BF16 : DTYPE_F32;
        const DType state = bits & 4 ? DTYPE_BF16 : DTYPE_F32;
        const AdamwCase c = {1030, bits >> 3 & 1, bits >> 4 & 1, copy, grad, state};
        check_adamw(gpu, &c);
    }
}

// --- Sums ----------------------------------------------------------------------------------------

// Runs norm2 into sums that hold (1, 2) already.
static void norm2(Backend *backend, DType dtype, const void *values, int64_t count,
                  double sums[2]) {
    const double before[2] = {1.0, 2.0};
    void *device = gpu_copy_of(backend, before, sizeof before), *workspace = NULL;
    size_t bytes = backend->ops->workspace_bytes(backend, OP_NORM2, &count);
    GPU_OK(backend->ops->alloc(backend, bytes, &workspace));
    backend->ops->set_workspace(backend, workspace, bytes);
    GPU_OK(backend->ops->norm2(backend, dtype, values, count, (double *)device));
    GPU_OK(backend->ops->download(backend, sums, device, 2 * sizeof *sums));
    backend->ops->set_workspace(backend, NULL, 0);
    backend->ops->release(backend, workspace);
    backend->ops->release(backend, device);
}

static void check_norm2(Backend *gpu, DType dtype, int64_t count, int offset) {
    char text[96];
    snprintf(text, sizeof text, "norm2 %s %lld%s", dtype_name(dtype), (long long)count,
             offset ? ", unaligned" : "");
    Pair values = pair_random(gpu, dtype, count + offset, 1.0f);
    const void *device = (char *)values.gpu + (size_t)offset * dtype_bytes(dtype);
    double expected[2], got[2], again[2];
    norm2(gpu_reference(), DTYPE_F32, values.cpu + offset, count, expected);
    norm2(gpu, dtype, device, count, got);
    norm2(gpu, dtype, device, count, again);
    // Both sides add exact squares in double.
    gpu_report(fabs(got[0] - expected[0]) / expected[0], 1e-12, "%s sum", text);
    gpu_report(fabs(got[1] - 2.0), 0.0, "%s counts nothing", text);
    gpu_report(got[0] == again[0] ? 0.0 : INFINITY, 0.0, "%s repeats bit for bit", text);
    values.cpu[offset] = INFINITY;
    values.cpu[offset + count / 2] = NAN; // the same one when there is only one
    values.cpu[offset + count - 1] = -INFINITY;
    pair_upload(&values);
    norm2(gpu_reference(), DTYPE_F32, values.cpu + offset, count, expected);
    norm2(gpu, dtype, device, count, got);
    gpu_report(fabs(got[1] - expected[1]), 0.0, "%s counts %.0f non-finite values", text,
               expected[1] - 2.0);
    pair_free(&values);
}

static void check_similarity(Backend *gpu, int tokens, int hidden) {
    const DType dtype = gpu->compute_dtype;
    const int64_t count = (int64_t)tokens * hidden;
    const double before[2] = {1.0, 2.0};
    Pair a = pair_random(gpu, dtype, count, 1.0f), b = pair_random(gpu, dtype, count, 1.0f);
    for (int64_t i = 0; i < count; i++) b.cpu[i] += a.cpu[i];
    if (tokens > 2)
        for (int h = 0; h < hidden; h++) a.cpu[h] = a.cpu[hidden + h] = b.cpu[hidden + h] = 0.0f;
    pair_upload(&a);
    pair_upload(&b);
    double expected[2] = {1.0, 2.0}, got[2];
    void *sums = gpu_copy_of(gpu, before, sizeof before);
    RowSimilarityArgs host = {tokens, hidden, a.cpu, b.cpu, expected};
    RowSimilarityArgs args = {tokens, hidden, a.gpu, b.gpu, (double *)sums};
    GPU_RUN(gpu_reference(), OP_ROW_SIMILARITY, row_similarity, &host);
    GPU_RUN(gpu, OP_ROW_SIMILARITY, row_similarity, &args);
    GPU_OK(gpu->ops->download(gpu, got, sums, sizeof got));
    for (int i = 0; i < 2; i++) // both sides in double from the same values
        gpu_report(fabs(got[i] - expected[i]) / fabs(expected[i]), 1e-10,
                   "row_similarity %s T%d H%d sum %d", dtype_name(dtype), tokens, hidden, i);
    gpu->ops->release(gpu, sums);
    pair_free(&a);
    pair_free(&b);
}

// --- Elementwise ---------------------------------------------------------------------------------

static void check_add(Backend *gpu, int64_t count, int offset) {
    const DType dtype = gpu->compute_dtype;
    char text[96];
    snprintf(text, sizeof text, "add %s %lld%s", dtype_name(dtype), (long long)count,
             offset ? ", unaligned" : "");
    Pair a = pair_random(gpu, dtype, count + offset, 1.0f);
    Pair b = pair_random(gpu, dtype, count + offset, 1.0f);
    const size_t at = (size_t)offset * dtype_bytes(dtype);
    GPU_OK(gpu_reference()->ops->add(gpu_reference(), a.cpu + offset, b.cpu + offset, count));
    GPU_OK(gpu->ops->add(gpu, (char *)a.gpu + at, (char *)b.gpu + at, count));
    pair_check(&a, gpu_tolerance(dtype), text, "a");
    pair_free(&a);
    pair_free(&b);
}

// One addition in fp32 per element: the same bits on both sides.
static void check_accumulate(Backend *gpu, DType dtype, int64_t count, int offset) {
    char text[96];
    snprintf(text, sizeof text, "accumulate %s %lld%s", dtype_name(dtype), (long long)count,
             offset ? ", unaligned" : "");
    Pair sum = pair_random(gpu, DTYPE_F32, count + offset, 1.0f);
    Pair values = pair_random(gpu, dtype, count + offset, 1.0f);
    const size_t at = (size_t)offset * dtype_bytes(dtype);
    Backend *cpu = gpu_reference();
    GPU_OK(cpu->ops->accumulate(cpu, sum.cpu + offset, DTYPE_F32, values.cpu + offset, count));
    GPU_OK(gpu->ops->accumulate(gpu, (float *)sum.gpu + offset, dtype, (char *)values.gpu + at,
                                count));
    pair_check(&sum, 0.0, text, "sum");
    pair_free(&sum);
    pair_free(&values);
}

// Rounding is defined to the bit, and so is what the CPU does.
static void check_cast(Backend *gpu, DType to, DType from, int64_t count) {
    const Backend *cpu = gpu_reference();
    Pair in = pair_random(gpu, from, count, 30.0f), out = pair_poisoned(gpu, to, count);
    char *host_in = (char *)malloc((size_t)count * 4),
         *host_out = (char *)malloc((size_t)count * 4);
    dtype_from_f32(from, in.cpu, host_in, (size_t)count);
    GPU_OK(cpu->ops->cast(gpu_reference(), to, host_out, from, host_in, count));
    dtype_to_f32(to, host_out, out.cpu, (size_t)count);
    GPU_OK(gpu->ops->cast(gpu, to, out.gpu, from, in.gpu, count));
    char text[96];
    snprintf(text, sizeof text, "cast %s to %s, %lld", dtype_name(from), dtype_name(to),
             (long long)count);
    pair_check(&out, 0.0, text, "out");
    pair_free(&in);
    pair_free(&out);
    free(host_in);
    free(host_out);
}

int main(void) {
    static const DType dtypes[] = {DTYPE_F32, DTYPE_BF16, DTYPE_F16};
    for (int fp32 = 1; fp32 >= 0; fp32--) {
        Backend *gpu = gpu_backend(fp32);
        for (int i = 0; i < NUM_COUNTS; i++) {
            check_add(gpu, counts[i], 0);
            check_add(gpu, counts[i], 1);
        }
        check_similarity(gpu, 1, 64);
        check_similarity(gpu, 3, 7);
        check_similarity(gpu, 10000, 33);
        check_similarity(gpu, 4096, 896);
        backend_destroy(gpu);
    }
    Backend *gpu = gpu_backend(false); // these do not depend on the compute dtype
    check_adamw_cases(gpu);
    for (int i = 0; i < NUM_COUNTS; i++) {
        for (int offset = 0; offset < 2; offset++) {
            check_accumulate(gpu, DTYPE_F32, counts[i], offset);
            check_accumulate(gpu, DTYPE_BF16, counts[i], offset);
        }
        check_norm2(gpu, DTYPE_F32, counts[i], 0);
        check_norm2(gpu, DTYPE_F32, counts[i], 1);
        check_norm2(gpu, DTYPE_BF16, counts[i], 0);
    }
    for (int i = 0; i < 9; i++) {
        check_cast(gpu, dtypes[i / 3], dtypes[i % 3], 5);
        check_cast(gpu, dtypes[i / 3], dtypes[i % 3], 100003);
    }
    backend_destroy(gpu);
    return gpu_test_result("optimizer ops");
}
