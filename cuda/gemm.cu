// Row-major GEMM through cuBLASLt, with descriptors and the chosen algorithm kept per shape.
//
// cuBLASLt is column-major; a row-major C = A·B is the column-major Cᵀ = Bᵀ·Aᵀ, so operands swap
// places and nothing is ever transposed in memory. The first call of a shape asks the heuristic;
// later calls find the entry in an open-addressing table. An expert's product has a new row count
// in every step: it takes the algorithm chosen for a count that stands for its size, and only the
// layouts, which are cheap, are its own.
//
// Large products are then timed (gemm_tune.cu), on the first call that assigns C: one that adds to
// it cannot be repeated. The result never depends on that. Split sums are only ever combined in
// fp32 and in a fixed order. So a product gives the same bits in every run.
#include <stdlib.h>
#include <string.h>
#include "cuda/common.cuh"
#include "cuda/cuda.h"
#include "cuda/gemm_tune.cuh"

enum { GEMM_CACHE_SLOTS = 1024, GEMM_ROWS_ALIGNMENT = 16 };
// Products below this many multiply-adds end before a better algorithm could show.
static const double TUNE_MIN_PRODUCT = 4e9;

// Everything that decides descriptors and algorithm; compared as bytes, so filled after memset.
typedef struct GemmKey {
    int64_t m, n, k, lda, ldb, ldc;
    int32_t transpose_a, transpose_b, dtype_ab, dtype_c, has_bias;
    int32_t alignment; // of the least aligned pointer, up to 256
} GemmKey;

typedef struct GemmEntry {
    bool used, tuned;
    GemmKey key;
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
} GemmEntry;

struct GemmCache {
    GemmEntry entries[GEMM_CACHE_SLOTS];
    int count;
};

Status gemm_cache_create(CudaBackend *backend) {
    backend->gemms = (GemmCache *)calloc(1, sizeof *backend->gemms);
    if (!backend->gemms) FAIL(STATUS_INTERNAL, "out of memory for the GEMM cache");
    BLAS_TRY(backend, cublasLtCreate(&backend->lt));
    return STATUS_OK;
}

static void entry_free(GemmEntry *entry) {
    if (entry->a) cublasLtMatrixLayoutDestroy(entry->a);
    if (entry->b) cublasLtMatrixLayoutDestroy(entry->b);
    if (entry->c) cublasLtMatrixLayoutDestroy(entry->c);
    if (entry->operation) cublasLtMatmulDescDestroy(entry->operation);
    memset(entry, 0, sizeof *entry);
}

void gemm_cache_destroy(CudaBackend *backend) {
    if (backend->gemms) {
        for (int i = 0; i < GEMM_CACHE_SLOTS; i++)
            if (backend->gemms->entries[i].used) entry_free(&backend->gemms->entries[i]);
        free(backend->gemms);
    }
    if (backend->lt) cublasLtDestroy(backend->lt);
}

static cudaDataType_t cuda_type(int dtype) {
    return dtype == DTYPE_F32 ? CUDA_R_32F : CUDA_R_16BF;
}

static uint64_t key_hash(const GemmKey *key) {
    uint64_t hash = 1469598103934665603u;
    const unsigned char *bytes = (const unsigned char *)key;
    for (size_t i = 0; i < sizeof *key; i++) hash = (hash ^ bytes[i]) * 1099511628211u;
    return hash;
}

static int pointer_alignment(const Gemm *g) {
    uintptr_t bits = (uintptr_t)g->a | (uintptr_t)g->b | (uintptr_t)g->c | (uintptr_t)g->bias;
    int alignment = 256;
    while (alignment > 1 && bits % (uintptr_t)alignment) alignment /= 2;
    return alignment;
}

static GemmKey make_key(const Gemm *g) {
    GemmKey key;
    memset(&key, 0, sizeof key);
    key.m = g->m;
    key.n = g->n;
    key.k = g->k;
    key.lda = g->lda ? g->lda : (g->transpose_a ? g->m : g->k);
    key.ldb = g->ldb ? g->ldb : (g->transpose_b ? g->k : g->n);
    key.ldc = g->ldc ? g->ldc : g->n;
    key.transpose_a = g->transpose_a;
    key.transpose_b = g->transpose_b;
    key.dtype_ab = g->dtype_ab;
    key.dtype_c = g->dtype_c;
    key.has_bias = g->bias != NULL;
    key.alignment = pointer_alignment(g);
    if (g->rows_vary) {
        int64_t *rows = g->transpose_a ? &key.k : &key.m;
        *rows = *rows <= 512 ? 256 : *rows <= 2048 ? 1024 : 8192;
        if (key.alignment > GEMM_ROWS_ALIGNMENT) key.alignment = GEMM_ROWS_ALIGNMENT;
    }
    return key;
}

// Column-major views: our B is (n, k) or its transpose, our A is (k, m) or its transpose.
typedef struct GemmViews {
    uint64_t rows_a, columns_a, rows_b, columns_b, rows_c, columns_c;
} GemmViews;

static GemmViews make_views(const GemmKey *key, int64_t m, int64_t n, int64_t k) {
    GemmViews v;
    v.rows_a = (uint64_t)(key->transpose_b ? k : n);
    v.columns_a = (uint64_t)(key->transpose_b ? n : k);
    v.rows_b = (uint64_t)(key->transpose_a ? m : k);
    v.columns_b = (uint64_t)(key->transpose_a ? k : m);
    v.rows_c = (uint64_t)n;
    v.columns_c = (uint64_t)m;
    return v;
}

static Status set_bias(CudaBackend *backend, const GemmEntry *entry, const void *bias) {
    BLAS_TRY(backend, cublasLtMatmulDescSetAttribute(
                          entry->operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias));
    return STATUS_OK;
}

// cuBLAS adds the bias over the rows of its column-major result, which are our columns.
static Status set_epilogue(CudaBackend *backend, const Gemm *g, const GemmEntry *entry) {
    if (!g->bias) return STATUS_OK;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    cudaDataType_t type = cuda_type(g->dtype_ab);
    BLAS_TRY(backend,
             cublasLtMatmulDescSetAttribute(entry->operation, CUBLASLT_MATMUL_DESC_EPILOGUE,
                                            &epilogue, sizeof epilogue));
    BLAS_TRY(backend,
             cublasLtMatmulDescSetAttribute(entry->operation, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE,
                                            &type, sizeof type));
    return set_bias(backend, entry, g->bias); // the heuristic looks at the pointer, too
}

static Status make_descriptors(CudaBackend *backend, const GemmKey *key, GemmEntry *entry) {
    cudaDataType_t ab = cuda_type(key->dtype_ab), c = cuda_type(key->dtype_c);
    cublasOperation_t op_a = key->transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasOperation_t op_b = key->transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    BLAS_TRY(backend, cublasLtMatmulDescCreate(&entry->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    BLAS_TRY(backend, cublasLtMatmulDescSetAttribute(entry->operation, CUBLASLT_MATMUL_DESC_TRANSA,
                                                     &op_a, sizeof op_a));
    BLAS_TRY(backend, cublasLtMatmulDescSetAttribute(entry->operation, CUBLASLT_MATMUL_DESC_TRANSB,
                                                     &op_b, sizeof op_b));
    GemmViews v = make_views(key, key->m, key->n, key->k);
    BLAS_TRY(backend, cublasLtMatrixLayoutCreate(&entry->a, ab, v.rows_a, v.columns_a, key->ldb));
    BLAS_TRY(backend, cublasLtMatrixLayoutCreate(&entry->b, ab, v.rows_b, v.columns_b, key->lda));
    BLAS_TRY(backend, cublasLtMatrixLayoutCreate(&entry->c, c, v.rows_c, v.columns_c, key->ldc));
    return STATUS_OK;
}

static Status set_preferences(CudaBackend *backend, const GemmKey *key,
                              cublasLtMatmulPreference_t preference) {
    size_t workspace = GEMM_WORKSPACE_BYTES;
    uint32_t alignment = (uint32_t)key->alignment;
    uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    const cublasLtMatmulPreferenceAttributes_t alignments[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    BLAS_TRY(backend, cublasLtMatmulPreferenceSetAttribute(preference,
                                                           CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                           &workspace, sizeof workspace));
    // Of the schemes for split sums, the in-place one adds in no fixed order and the one of the
    // output's type rounds the parts to bf16.
    BLAS_TRY(backend,
             cublasLtMatmulPreferenceSetAttribute(
                 preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes, sizeof schemes));
    for (cublasLtMatmulPreferenceAttributes_t attribute : alignments)
        BLAS_TRY(backend, cublasLtMatmulPreferenceSetAttribute(preference, attribute, &alignment,
                                                               sizeof alignment));
    return STATUS_OK;
}

// The heuristic's best algorithms, best first; at least one.
static Status ask_heuristic(CudaBackend *backend, const GemmEntry *entry, int wanted,
                            cublasLtMatmulHeuristicResult_t *results, int *found) {
    const GemmKey *key = &entry->key;
    cublasLtMatmulPreference_t preference;
    *found = 0;
    BLAS_TRY(backend, cublasLtMatmulPreferenceCreate(&preference));
    Status status = set_preferences(backend, key, preference);
    if (status == STATUS_OK)
        status = cuda_check_blas(
            backend,
            cublasLtMatmulAlgoGetHeuristic(backend->lt, entry->operation, entry->a, entry->b,
                                           entry->c, entry->c, preference, wanted, results, found),
            __FILE__, __LINE__, "cublasLtMatmulAlgoGetHeuristic");
    cublasLtMatmulPreferenceDestroy(preference);
    TRY(status);
    if (*found == 0)
        FAIL(STATUS_INTERNAL,
             "cuBLASLt has no algorithm for a (%lld x %lld) x (%lld x %lld) product",
             (long long)key->m, (long long)key->k, (long long)key->k, (long long)key->n);
    return STATUS_OK;
}

static Status fill_entry(CudaBackend *backend, const Gemm *g, GemmEntry *entry) {
    cublasLtMatmulHeuristicResult_t result;
    int found;
    TRY(make_descriptors(backend, &entry->key, entry));
    TRY(set_epilogue(backend, g, entry));
    TRY(ask_heuristic(backend, entry, 1, &result, &found));
    entry->algorithm = result.algo;
    return STATUS_OK;
}

static Status find_entry(CudaBackend *backend, const Gemm *g, GemmEntry **out) {
    const GemmKey made = make_key(g), *key = &made;
    GemmCache *cache = backend->gemms;
    uint64_t slot = key_hash(key) % GEMM_CACHE_SLOTS;
    while (cache->entries[slot].used) {
        *out = &cache->entries[slot];
        if (memcmp(&(*out)->key, key, sizeof *key) == 0) return STATUS_OK;
        slot = (slot + 1) % GEMM_CACHE_SLOTS;
    }
    if (cache->count > GEMM_CACHE_SLOTS / 2) { // expert GEMMs have ever new row counts
        for (int i = 0; i < GEMM_CACHE_SLOTS; i++)
            if (cache->entries[i].used) entry_free(&cache->entries[i]);
        cache->count = 0;
        slot = key_hash(key) % GEMM_CACHE_SLOTS;
    }
    GemmEntry *entry = &cache->entries[slot];
    entry->used = true;
    entry->key = *key;
    cache->count++;
    Status status = fill_entry(backend, g, entry);
    if (status != STATUS_OK) {
        entry_free(entry);
        cache->count--;
        return status;
    }
    *out = entry;
    return STATUS_OK;
}

static cudaStream_t stream_of(const CudaBackend *backend, int index) {
    return index == 0 ? backend->stream : backend->side[index - 1];
}

// The product itself, with one of the entry's algorithms and layouts of the call's own row count.
static cublasStatus_t multiply(CudaBackend *backend, const Gemm *g, const GemmEntry *entry,
                               const cublasLtMatmulAlgo_t *algorithm, int stream_index) {
    const GemmKey *key = &entry->key;
    cublasLtMatrixLayout_t a = entry->a, b = entry->b, c = entry->c;
    cublasLtMatrixLayoutOpaque_t own[3];
    if (g->m != key->m || g->k != key->k) {
        cudaDataType_t type = cuda_type(key->dtype_ab), type_c = cuda_type(key->dtype_c);
        GemmViews v = make_views(key, g->m, g->n, g->k);
        a = &own[0], b = &own[1], c = &own[2];
        cublasLtMatrixLayoutInit(a, type, v.rows_a, v.columns_a, key->ldb);
        cublasLtMatrixLayoutInit(b, type, v.rows_b, v.columns_b, key->lda);
        cublasLtMatrixLayoutInit(c, type_c, v.rows_c, v.columns_c, key->ldc);
    }
    char *workspace = (char *)backend->gemm_workspace + (size_t)stream_index * GEMM_WORKSPACE_BYTES;
    return cublasLtMatmul(backend->lt, entry->operation, &g->alpha, g->b, a, g->a, b, &g->beta,
                          g->c, c, g->c, c, algorithm, workspace, GEMM_WORKSPACE_BYTES,
                          stream_of(backend, stream_index));
}

// --- The choice by measurement -----------------------------------------------------------------

typedef struct Contest {
    CudaBackend *backend;
    const Gemm *gemm;
    const GemmEntry *entry;
    const cublasLtMatmulHeuristicResult_t *results;
    int stream_index;
} Contest;

static cublasStatus_t attempt(void *context, int index) {
    const Contest *c = (const Contest *)context;
    return multiply(c->backend, c->gemm, c->entry, &c->results[index].algo, c->stream_index);
}

// Once per shape, on the first call that can be repeated; fp32, which is for comparisons, is left
// alone. Where row counts vary, the algorithms are compared on this call's count and are those of
// the count that stands for it. Equal bits carry over to other counts: how the terms of one output
// element are added up does not depend on how many rows there are.
static Status tune(CudaBackend *backend, const Gemm *g, GemmEntry *entry, int stream_index) {
    const double size = (double)g->m * (double)g->n * (double)g->k;
    if (entry->tuned || g->beta != 0.0f || g->dtype_ab == DTYPE_F32 || size < TUNE_MIN_PRODUCT ||
        backend->capturing)
        return STATUS_OK;
    cublasLtMatmulHeuristicResult_t results[GEMM_CANDIDATES];
    int found, best;
    const int64_t bytes = (int64_t)dtype_bytes(g->dtype_c);
    entry->tuned = true;
    TRY(ask_heuristic(backend, entry, GEMM_CANDIDATES, results, &found));
    Contest contest = {backend, g, entry, results, stream_index};
    TRY(gemm_fastest(backend, g->c, g->m, g->n * bytes, entry->key.ldc * bytes,
                     stream_of(backend, stream_index), found, attempt, &contest, &best));
    entry->algorithm = results[best].algo;
    return STATUS_OK;
}

// --- The call ----------------------------------------------------------------------------------

// A sum over nothing, which cuBLASLt does not take: an expert without tokens.
static Status empty_sum(CudaBackend *backend, const Gemm *g, cudaStream_t stream) {
    INVARIANT(!g->bias);
    if (g->beta == 1.0f) return STATUS_OK;
    INVARIANT(g->beta == 0.0f);
    const size_t bytes = dtype_bytes(g->dtype_c), width = (size_t)(g->ldc ? g->ldc : g->n);
    CUDA_TRY(backend,
             cudaMemset2DAsync(g->c, width * bytes, 0, (size_t)g->n * bytes, (size_t)g->m, stream));
    return STATUS_OK;
}

Status gemm_run(CudaBackend *backend, const Gemm *g, int stream_index) {
    if (g->m == 0 || g->n == 0) return STATUS_OK;
    if (g->k == 0) return empty_sum(backend, g, stream_of(backend, stream_index));
    GemmEntry *entry;
    TRY(find_entry(backend, g, &entry));
    if (g->bias) TRY(set_bias(backend, entry, g->bias));
    TRY(tune(backend, g, entry, stream_index));
    cublasStatus_t error = multiply(backend, g, entry, &entry->algorithm, stream_index);
    if (g->rows_vary &&
        (error == CUBLAS_STATUS_NOT_SUPPORTED || error == CUBLAS_STATUS_INVALID_VALUE)) {
        Gemm exact = *g; // the algorithm of the rounded count does not do this one
        exact.rows_vary = false;
        return gemm_run(backend, &exact, stream_index);
    }
    BLAS_TRY(backend, error);
    return STATUS_OK;
}

Gemm gemm_of(const CudaBackend *backend, int64_t m, int64_t n, int64_t k, const void *a,
             const void *b, void *c) {
    return Gemm{.m = m,
                .n = n,
                .k = k,
                .dtype_ab = backend->base.compute_dtype,
                .dtype_c = backend->base.compute_dtype,
                .a = a,
                .b = b,
                .c = c,
                .alpha = 1.0f};
}

Status gemm_weight_gradient(CudaBackend *backend, int64_t tokens, int64_t m, int64_t n,
                            const void *dout, const void *x, bool assign, void *grad) {
    Gemm product = gemm_of(backend, m, n, tokens, dout, x, grad);
    product.transpose_a = true;
    product.dtype_c = backend->base.grad_dtype;
    product.beta = assign ? 0.0f : 1.0f;
    return gemm_run(backend, &product, 0);
}
