// What the tests of the GPU backend's ops share: the same args run on the CPU backend and on the
// GPU backend, and every output is compared.
//
// A Pair is one operand on both sides. In bf16 mode random inputs are rounded to bf16 before either
// side sees them, so that only the op's own arithmetic differs. Outputs start as NaN, workspaces
// too and with a canary behind them. An error is ‖gpu - cpu‖ / ‖cpu‖; NaN never passes. One line is
// printed per comparison. Without a device the program says so and exits 77.
#ifndef TESTS_GPU_TEST_H
#define TESTS_GPU_TEST_H

#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/clock.h"
#include "base/dtype.h"
#include "base/random.h"
#include "base/status.h"
#include "cuda/backend.h"
#include "model/backend.h"

// fp32: a few hundred roundings of 6e-8 that partly cancel. bf16: operands and results are rounded
// to 8 bits (4e-3 at most, 2e-3 in the mean).
#define GPU_TOLERANCE_F32  1e-5
#define GPU_TOLERANCE_BF16 1e-2

enum { GPU_SKIP_CODE = 77 };
static int gpu_failures_, gpu_checks_;
static uint64_t gpu_stream_ = 1;

#define GPU_OK(call)                                                                               \
    do {                                                                                           \
        Status gpu_ok_ = (call);                                                                   \
        if (gpu_ok_ != STATUS_OK) {                                                                \
            printf("FAIL %s:%d %s -> %d: %s\n%s\n", __FILE__, __LINE__, #call, (int)gpu_ok_,       \
                   status_message(), status_trace_text());                                         \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

// Ends the program where there is no device.
static inline Backend *gpu_open(const CudaOptions *options) {
    Backend *backend = NULL;
    Status status = backend_cuda(options, &backend);
    if (status == STATUS_USAGE) {
        printf("skipped: %s\n", status_message());
        exit(GPU_SKIP_CODE);
    }
    GPU_OK(status);
    return backend;
}
// The GPU backend in fp32 or bf16.
static inline Backend *gpu_backend(bool fp32) {
    const CudaOptions options = {.device = 0, .fp32 = fp32};
    return gpu_open(&options);
}
// In bf16, with weight gradients in bf16, too.
static inline Backend *gpu_backend_bf16_grads(void) {
    const CudaOptions options = {.device = 0, .grad_dtype = DTYPE_BF16};
    return gpu_open(&options);
}
static inline Backend *gpu_reference(void) {
    static Backend *backend;
    if (!backend) GPU_OK(backend_cpu(0, &backend));
    return backend;
}

// Whether a case is left out: under compute-sanitizer, which makes kernels a hundred times slower,
// scripts/test_gpu.sh sets GPU_TEST_WORK: the most multiply-adds, where an element of an op without
// products counts as a hundred. Smaller cases reach every kernel but those that compare the results
// of timed algorithms (gemm_tune.cu).
static inline bool gpu_skips(double work) {
    const char *most = getenv("GPU_TEST_WORK");
    return most && work > atof(most);
}

// --- Operands -----------------------------------------------------------------------------------

typedef struct Pair {
    Backend *backend; // of gpu
    DType dtype;      // of gpu; the CPU side is always fp32
    int64_t count;
    float *cpu;
    void *gpu;
} Pair;

// cpu -> gpu, first rounding cpu to what gpu can hold.
static inline void pair_upload(const Pair *p) {
    size_t bytes = (size_t)p->count * dtype_bytes(p->dtype);
    void *staged = malloc(bytes + 1);
    dtype_from_f32(p->dtype, p->cpu, staged, (size_t)p->count);
    dtype_to_f32(p->dtype, staged, p->cpu, (size_t)p->count);
    GPU_OK(p->backend->ops->upload(p->backend, p->gpu, staged, bytes));
    free(staged);
}
static inline Pair pair_filled(Backend *backend, DType dtype, int64_t count, float value) {
    Pair p = {backend, dtype, count, (float *)malloc((size_t)count * sizeof(float) + 1), NULL};
    GPU_OK(backend->ops->alloc(backend, (size_t)count * dtype_bytes(dtype), &p.gpu));
    for (int64_t i = 0; i < count; i++) p.cpu[i] = value;
    pair_upload(&p);
    return p;
}
static inline Pair pair_poisoned(Backend *backend, DType dtype, int64_t count) {
    return pair_filled(backend, dtype, count, NAN);
}
static inline Pair pair_random(Backend *backend, DType dtype, int64_t count, float stddev) {
    Pair p = pair_filled(backend, dtype, count, 0.0f);
    random_normal_fill(p.cpu, (size_t)count, 7, gpu_stream_++, 0, 0.0f, stddev);
    pair_upload(&p);
    return p;
}
static inline void pair_free(Pair *p) {
    free(p->cpu);
    p->backend->ops->release(p->backend, p->gpu);
    memset(p, 0, sizeof *p);
}
// The GPU's side as floats; the caller frees it.
static inline float *pair_download(const Pair *p) {
    size_t bytes = (size_t)p->count * dtype_bytes(p->dtype);
    void *staged = malloc(bytes + 1);
    float *out = (float *)malloc((size_t)p->count * sizeof(float) + 1);
    GPU_OK(p->backend->ops->download(p->backend, staged, p->gpu, bytes));
    dtype_to_f32(p->dtype, staged, out, (size_t)p->count);
    free(staged);
    return out;
}
// The CPU's side := the GPU's side: for what a backward op reads as saved by forward.
static inline void pair_adopt(const Pair *p) {
    float *values = pair_download(p);
    memcpy(p->cpu, values, (size_t)p->count * sizeof(float));
    free(values);
}

// Any other array (ids, indices) on the device.
static inline void *gpu_copy_of(Backend *backend, const void *host, size_t bytes) {
    void *device = NULL;
    if (!host) return NULL;
    GPU_OK(backend->ops->alloc(backend, bytes, &device));
    GPU_OK(backend->ops->upload(backend, device, host, bytes));
    return device;
}

static inline int gpu_random_int(int below) {
    return (int)(random_u64(11, gpu_stream_++, 0) % (uint64_t)below);
}

// --- Running ------------------------------------------------------------------------------------

enum { GPU_CANARY_BYTES = 256 };
// Runs op with a workspace of exactly the size it asks for, filled with NaN.
static inline void gpu_run(Backend *backend, OpKind kind, const void *args,
                           Status (*op)(Backend *, const void *)) {
    size_t bytes = backend->ops->workspace_bytes(backend, kind, args);
    size_t total = (bytes + 255) / 256 * 256 + GPU_CANARY_BYTES;
    unsigned char *poison = (unsigned char *)malloc(total);
    void *memory = NULL;
    memset(poison, 0xFF, total);
    GPU_OK(backend->ops->alloc(backend, total, &memory));
    GPU_OK(backend->ops->upload(backend, memory, poison, total));
    backend->ops->set_workspace(backend, memory, bytes);
    GPU_OK(op(backend, args));
    GPU_OK(backend->ops->synchronize(backend));
    GPU_OK(backend->ops->download(backend, poison, memory, total));
    for (size_t i = total - GPU_CANARY_BYTES; i < total; i++) {
        if (poison[i] == 0xFF) continue;
        printf("FAIL op %d wrote %zu bytes past its workspace of %zu\n", (int)kind,
               i - (total - GPU_CANARY_BYTES), bytes);
        gpu_failures_++;
        break;
    }
    backend->ops->set_workspace(backend, NULL, 0);
    backend->ops->release(backend, memory);
    free(poison);
}
// GPU_RUN(backend, OP_ROPE, rope_forward, &args): on either backend.
#define GPU_RUN(backend, kind, op, args)                                                           \
    gpu_run((backend), (kind), (args), (Status(*)(Backend *, const void *))(backend)->ops->op)

// --- Comparing ----------------------------------------------------------------------------------

static inline double gpu_error_of(const float *got, const float *expected, int64_t count) {
    double difference = 0, size = 0;
    for (int64_t i = 0; i < count; i++) {
        double d = (double)got[i] - expected[i];
        difference += d * d;
        size += (double)expected[i] * expected[i];
    }
    if (!isfinite(difference)) return INFINITY;
    return size > 0 ? sqrt(difference / size) : sqrt(difference);
}
static inline void gpu_report(double error, double tolerance, const char *format, ...) {
    char text[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    bool ok = error <= tolerance;
    gpu_checks_++;
    if (!ok) gpu_failures_++;
    printf("%s %-72s error %.2e (at most %.0e)\n", ok ? "PASS" : "FAIL", text, error, tolerance);
    fflush(stdout);
}
static inline double gpu_tolerance(DType dtype) {
    return dtype == DTYPE_F32 ? GPU_TOLERANCE_F32 : GPU_TOLERANCE_BF16;
}
// Of a weight gradient whose sums are made with an error of `sums`. In bf16 the one rounding of
// the result comes on top.
static inline double gpu_grad_tolerance(const Backend *gpu, double sums) {
    return gpu->grad_dtype == DTYPE_F32 ? sums : GPU_TOLERANCE_BF16;
}
// Compares the two sides.
static inline void pair_check(const Pair *p, double tolerance, const char *shape,
                              const char *what) {
    float *got = pair_download(p);
    gpu_report(gpu_error_of(got, p->cpu, p->count), tolerance, "%s %s", shape, what);
    free(got);
}
// Two runs of the same op must give the same bits.
static inline void pair_check_same_bits(const Pair *a, const Pair *b, const char *shape,
                                        const char *what) {
    float *x = pair_download(a), *y = pair_download(b);
    bool same = memcmp(x, y, (size_t)a->count * sizeof(float)) == 0;
    gpu_report(same ? 0 : INFINITY, 0, "%s %s repeats bit for bit", shape, what);
    free(x);
    free(y);
}

// At the end of main.
static inline int gpu_test_result(const char *name) {
    printf("%s: %d checks, %d failed\n", name, gpu_checks_, gpu_failures_);
    return gpu_failures_ > 0 || gpu_checks_ == 0;
}

// --- Benchmarks ---------------------------------------------------------------------------------

// Device memory of random values that repeat after a prime number, cheap to make in any size.
static inline void *gpu_random_memory(Backend *gpu, DType dtype, int64_t count, float stddev) {
    enum { PERIOD = 1000003 };
    Pair part = pair_random(gpu, dtype, PERIOD, stddev);
    char *memory = NULL;
    GPU_OK(gpu->ops->alloc(gpu, (size_t)count * dtype_bytes(dtype), (void **)&memory));
    for (int64_t at = 0; at < count; at += PERIOD) {
        const int64_t length = count - at < PERIOD ? count - at : PERIOD;
        GPU_OK(gpu->ops->copy(gpu, memory + (size_t)at * dtype_bytes(dtype), part.gpu,
                              (size_t)length * dtype_bytes(dtype)));
    }
    GPU_OK(gpu->ops->synchronize(gpu));
    pair_free(&part);
    return memory;
}

enum { GPU_BENCH_ROUNDS = 7 };
// Median over rounds of the mean time of one call, in seconds, after a warm-up. Calls are enqueued
// back to back, so launch latency hides where the op is longer than it.
static inline double gpu_bench(Backend *backend, OpKind kind, const void *args,
                               Status (*op)(Backend *, const void *)) {
    size_t bytes = backend->ops->workspace_bytes(backend, kind, args);
    void *memory = NULL;
    GPU_OK(backend->ops->alloc(backend, bytes, &memory));
    backend->ops->set_workspace(backend, memory, bytes);
    double rounds[GPU_BENCH_ROUNDS], begin = 0, once = 1;
    for (int i = 0; i < 3; i++) { // the last warm-up says how many calls make a round of 20 ms
        begin = clock_seconds();
        GPU_OK(op(backend, args));
        GPU_OK(backend->ops->synchronize(backend));
        once = clock_seconds() - begin;
    }
    int calls = once > 0.02 ? 1 : once < 2e-5 ? 1000 : (int)(0.02 / once) + 1;
    for (int r = 0; r < GPU_BENCH_ROUNDS; r++) {
        begin = clock_seconds();
        for (int i = 0; i < calls; i++) GPU_OK(op(backend, args));
        GPU_OK(backend->ops->synchronize(backend));
        double seconds = (clock_seconds() - begin) / calls;
        int at = r;
        for (; at > 0 && rounds[at - 1] > seconds; at--) rounds[at] = rounds[at - 1];
        rounds[at] = seconds;
    }
    backend->ops->set_workspace(backend, NULL, 0);
    backend->ops->release(backend, memory);
    return rounds[GPU_BENCH_ROUNDS / 2];
}
#define GPU_BENCH(backend, kind, op, args)                                                         \
    gpu_bench((backend), (kind), (args), (Status(*)(Backend *, const void *))(backend)->ops->op)

#endif
