// What the tests of the backend's ops share.
//
// Every op is compared with a plain double-precision reference written in the test: forward
// directly, backward through finite differences of the reference. The objective is L = Σ out·dout
// with random dout, so that the op's backward must give dL/d(input) for every input and weight.
// Central differences in double with a step of 1e-5 are exact to about 1e-9, so the tolerance is
// that of fp32 arithmetic alone.
#ifndef TESTS_OPS_H
#define TESTS_OPS_H

#include <math.h>
#include <stdint.h>
#include "base/random.h"
#include "model/backend.h"
#include "tests/test.h"

// fp32 rounding is 6e-8 per operation; sums of a few hundred terms and one or two chained products
// stay within 100 roundings of the largest element.
#define OPS_TOLERANCE 1e-5

// Memory that lives as long as the test process; kept reachable for the leak checker.
typedef struct TestBlock {
    struct TestBlock *next;
    max_align_t data[];
} TestBlock;
static TestBlock *test_blocks_;
static inline void *test_take(size_t bytes) {
    TestBlock *block = malloc(sizeof *block + bytes);
    if (!block) abort();
    block->next = test_blocks_;
    test_blocks_ = block;
    return block->data;
}

// The same numbers as floats for the op and as doubles for the reference.
typedef struct Values {
    int64_t count;
    float *f;
    double *d;
} Values;

static uint64_t test_stream_ = 1;
static inline Values values_random(int64_t count, double scale) {
    Values v = {count, test_take((size_t)count * sizeof(float)),
                test_take((size_t)count * sizeof(double))};
    random_normal_fill(v.f, (size_t)count, 7, test_stream_++, 0, 0.0f, (float)scale);
    for (int64_t i = 0; i < count; i++) v.d[i] = v.f[i];
    return v;
}
static inline float *floats_filled(int64_t count, float value) {
    float *f = test_take((size_t)count * sizeof(float));
    for (int64_t i = 0; i < count; i++) f[i] = value;
    return f;
}
// What an op must overwrite without reading.
static inline float *floats_poisoned(int64_t count) {
    return floats_filled(count, NAN);
}
static inline double *doubles_zero(int64_t count) {
    double *d = test_take((size_t)count * sizeof(double));
    for (int64_t i = 0; i < count; i++) d[i] = 0;
    return d;
}
static inline int test_random_int(int below) {
    return (int)(random_u64(11, test_stream_++, 0) % (uint64_t)below);
}

// --- Backends and workspace ---------------------------------------------------------------------

static inline Backend *test_backend(int threads) {
    static Backend *backends[9];
    ck_assert(threads >= 1 && threads <= 8);
    if (!backends[threads]) ck_assert_ok(backend_cpu(threads, &backends[threads]));
    return backends[threads];
}

enum { CANARY_BYTES = 64 };
// Sets a workspace of exactly the size the op asks for, filled with NaN, with a canary behind it.
static inline char *test_set_workspace(Backend *backend, OpKind op, const void *args,
                                       size_t *bytes) {
    *bytes = backend->ops->workspace_bytes(backend, op, args);
    char *memory = NULL; // aligned as device memory is
    ck_assert_int_eq(posix_memalign((void **)&memory, 256, *bytes + CANARY_BYTES), 0);
    memset(memory, 0xFF, *bytes + CANARY_BYTES);
    backend->ops->set_workspace(backend, memory, *bytes);
    return memory;
}
static inline void test_drop_workspace(Backend *backend, char *memory, size_t bytes) {
    for (int i = 0; i < CANARY_BYTES; i++) ck_assert_int_eq((unsigned char)memory[bytes + i], 0xFF);
    backend->ops->set_workspace(backend, NULL, 0);
    free(memory);
}
#define RUN_OP(backend, kind, op, args)                                                            \
    do {                                                                                           \
        size_t run_bytes_;                                                                         \
        char *run_memory_ = test_set_workspace((backend), (kind), (args), &run_bytes_);            \
        ck_assert_ok((backend)->ops->op((backend), (args)));                                       \
        test_drop_workspace((backend), run_memory_, run_bytes_);                                   \
    } while (0)

// --- Comparing ----------------------------------------------------------------------------------

// Largest |got - expected| over the largest |expected|.
static inline void check_close(const char *what, const float *got, const double *expected,
                               int64_t count, double tolerance) {
    double largest = 0, worst = 0;
    int64_t where = 0;
    for (int64_t i = 0; i < count; i++) {
        largest = fmax(largest, fabs(expected[i]));
        double error = fabs((double)got[i] - expected[i]);
        if (!(error <= worst)) worst = error, where = i; // a NaN is the worst
    }
    ck_assert_msg(worst <= tolerance * largest || worst == 0,
                  "%s: element %lld is %.9g, expected %.9g (error %.2g of the largest, %.3g)", what,
                  (long long)where, (double)got[where], expected[where], worst / largest, largest);
}

static inline void check_equal(const char *what, const void *a, const void *b, size_t bytes) {
    ck_assert_msg(memcmp(a, b, bytes) == 0, "%s: two runs differ", what);
}

// The objective: a double function of the reference's current inputs.
typedef double (*Objective)(const void *context);

static inline double slope(Objective f, const void *context, double *x, const double *direction,
                           int64_t count) {
    const double step = 1e-5;
    for (int64_t i = 0; i < count; i++) x[i] += step * direction[i];
    double up = f(context);
    for (int64_t i = 0; i < count; i++) x[i] -= 2 * step * direction[i];
    double down = f(context);
    for (int64_t i = 0; i < count; i++) x[i] += step * direction[i];
    return (up - down) / (2 * step);
}

// `got` (minus `before` where the op accumulates) against the derivative of f by x: element by
// element for small inputs, along random directions for all.
enum { ELEMENTWISE_MAX = 300, DIRECTIONS = 3 };
static inline void check_gradient(const char *what, const float *got, const float *before, Values x,
                                  Objective f, const void *context, double tolerance) {
    double *saved = test_take((size_t)x.count * sizeof(double));
    double *direction = test_take((size_t)x.count * sizeof(double));
    memcpy(saved, x.d, (size_t)x.count * sizeof(double));
    double square = 0;
    for (int64_t i = 0; i < x.count; i++) {
        double g = (double)got[i] - (before ? before[i] : 0);
        ck_assert_msg(isfinite(g), "%s: gradient %lld is not finite", what, (long long)i);
        square += g * g + (before ? (double)before[i] * before[i] : 0); // += rounds the sum
    }
    for (int n = 0; n < DIRECTIONS; n++) {
        double along = 0;
        float z[2];
        for (int64_t i = 0; i < x.count; i++) {
            random_normal_fill(z, 1, 13, (uint64_t)n, (uint64_t)i, 0.0f, 1.0f);
            direction[i] = z[0];
            along += direction[i] * ((double)got[i] - (before ? before[i] : 0));
        }
        double expected = slope(f, context, x.d, direction, x.count);
        memcpy(x.d, saved, (size_t)x.count * sizeof(double));
        // <g, z> for standard normal z is of the size of |g|; errors likewise
        ck_assert_msg(fabs(along - expected) <= 5 * tolerance * sqrt(square) + 1e-9,
                      "%s: slope %.9g, expected %.9g (size %.3g)", what, along, expected,
                      sqrt(square));
    }
    if (x.count > ELEMENTWISE_MAX) return;
    double *expected = test_take((size_t)x.count * sizeof(double));
    for (int64_t i = 0; i < x.count; i++) direction[i] = 0;
    for (int64_t i = 0; i < x.count; i++) {
        direction[i] = 1;
        expected[i] = slope(f, context, x.d, direction, x.count) + (before ? before[i] : 0);
        direction[i] = 0;
        x.d[i] = saved[i];
    }
    check_close(what, got, expected, x.count, tolerance);
}

#endif
