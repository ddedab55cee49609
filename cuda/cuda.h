// What the files of the GPU backend share: the backend's state, error mapping, the list of ops.
//
// One kernel family per .cu file; each op is a function `Status cuda_<op>(Backend *, const Args *)`
// that checks nothing but its own limits, launches on the compute stream and returns. Storage is
// float or bf16 as the backend was created (`compute_dtype`); arithmetic is fp32. Nothing here
// allocates: scratch comes from the workspace, whose size each family reports (cuda_*_workspace).
#ifndef CUDA_CUDA_H
#define CUDA_CUDA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cublasLt.h>
#include <cuda_runtime.h>

#ifdef __cplusplus
extern "C" {
#endif
#include "model/backend.h"

typedef struct GemmCache GemmCache;           // gemm.cu
typedef struct CountsCache CountsCache;       // grouped.cu
typedef struct AttentionCache AttentionCache; // attention_cudnn.cpp, or NULL without cuDNN

enum { CUDA_SIDE_STREAMS = 4, CUDA_MAX_EXPERTS = 256 };

// Page-locked memory through which small uploads (token ids) go, so that the host runs ahead of the
// device instead of waiting for it at every micro-batch. A piece is free again when `sent` has
// happened.
enum { STAGING_BYTES = 1 << 20, STAGING_PIECES = 8 };
typedef struct Staging {
    char *memory; // STAGING_PIECES of STAGING_BYTES
    cudaEvent_t sent[STAGING_PIECES];
    int next;
} Staging;

typedef struct CudaBackend {
    Backend base;
    int device;
    char device_name[256];
    int num_sms;
    int capability; // 90 = compute capability 9.0
    bool deterministic;
    cudaStream_t stream; // every op, in order
    // Work that may overlap inside one op (the experts' GEMMs) forks from `stream` to these and
    // joins again before the op returns.
    cudaStream_t side[CUDA_SIDE_STREAMS];
    cudaEvent_t fork_event, join_event[CUDA_SIDE_STREAMS];
    cublasLtHandle_t lt;
    GemmCache *gemms;
    AttentionCache *attention;
    Staging staging;
    uint64_t *tune_hash;  // on the device: gemm_tune.cu
    bool capturing;       // launches are recorded, not run: graph.cu
    void *gemm_workspace; // one region per stream: 0 for `stream`, 1 + i for side[i]
    void *workspace;
    size_t workspace_bytes;
    int32_t *host_counts; // pinned: where expert_begin arrives
    CountsCache *counts;
    // 0, or a token id outside the vocabulary and where it stands (note_bad_id in common.cuh); read
    // whenever the host waits for the device.
    uint64_t *bad_id;
    uint64_t *host_bad_id;  // pinned copy
    int *turns;             // on the device: what hopper_product.cuh takes tiles by
    const char *current_op; // named when a CUDA call fails
    cudaEvent_t *stamps;    // (num_stamps) of timestamp(), created when first asked for
    int64_t num_stamps;
} CudaBackend;

static inline CudaBackend *cuda_of(Backend *backend) {
    return (CudaBackend *)backend;
}

// Turns a CUDA / cuBLAS error into STATUS_INTERNAL naming the op and the call.
Status cuda_check(CudaBackend *backend, cudaError_t error, const char *file, int line,
                  const char *call) NODISCARD;
Status cuda_check_blas(CudaBackend *backend, cublasStatus_t error, const char *file, int line,
                       const char *call) NODISCARD;
#define CUDA_TRY(backend, call)                                                                    \
    do {                                                                                           \
        Status cuda_try_ = cuda_check((backend), (call), __FILE__, __LINE__, #call);               \
        if (cuda_try_ != STATUS_OK) return cuda_try_;                                              \
    } while (0)
#define BLAS_TRY(backend, call)                                                                    \
    do {                                                                                           \
        Status cuda_try_ = cuda_check_blas((backend), (call), __FILE__, __LINE__, #call);          \
        if (cuda_try_ != STATUS_OK) return cuda_try_;                                              \
    } while (0)
// After a kernel launch.
#define LAUNCH_TRY(backend) CUDA_TRY(backend, cudaGetLastError())

// A piece of the workspace, 256-byte aligned; fails when the op's own count was too small.
typedef struct Scratch {
    char *next, *end;
} Scratch;
Scratch scratch_open(CudaBackend *backend);
Status scratch_take(Scratch *scratch, size_t bytes, void **out) NODISCARD;
static inline size_t scratch_bytes(size_t bytes) {
    return (bytes + 255) / 256 * 256;
}

// --- gemm.cu: row-major GEMM through cuBLASLt, descriptors and algorithm cached per shape -------

// C = alpha · op(A) · op(B) + beta · C (+ bias over columns), all row-major and packed unless a
// leading dimension says otherwise; op(A) is (m, k), op(B) is (k, n), C is (m, n).
typedef struct Gemm {
    int64_t m, n, k;
    bool transpose_a, transpose_b; // A is stored (k, m), B is stored (n, k)
    DType dtype_ab, dtype_c;
    const void *a, *b;
    void *c;
    const void *bias;      // (n) of dtype_ab, or NULL; only with dtype_c = dtype_ab
    int64_t lda, ldb, ldc; // 0 = packed
    float alpha, beta;
    // The row count (m; k with transpose_a) is new in every step, as an expert's is: a few counts
    // stand for all when the algorithm is chosen, so that no step waits for that.
    bool rows_vary;
} Gemm;
enum { GEMM_WORKSPACE_BYTES = 32 << 20 };
Status gemm_run(CudaBackend *backend, const Gemm *gemm, int stream_index) NODISCARD;
// C = A · B with everything in compute_dtype, to be changed where it differs and run.
Gemm gemm_of(const CudaBackend *backend, int64_t m, int64_t n, int64_t k, const void *a,
             const void *b, void *c);
// grad (m, n) += doutᵀ · x, or = with assign, for dout (T, m) and x (T, n), grad of grad_dtype.
Status gemm_weight_gradient(CudaBackend *backend, int64_t tokens, int64_t m, int64_t n,
                            const void *dout, const void *x, bool assign, void *grad) NODISCARD;
Status gemm_cache_create(CudaBackend *backend) NODISCARD;
void gemm_cache_destroy(CudaBackend *backend);

// --- attention_cudnn.cpp (empty functions when the build has no cuDNN) --------------------------
Status attention_cache_create(CudaBackend *backend) NODISCARD;
void attention_cache_destroy(CudaBackend *backend);

// --- trace.cu -----------------------------------------------------------------------------------
Status cuda_timestamp(Backend *, int64_t slot);
Status cuda_elapsed_ms(Backend *, int64_t from, int64_t to, double *ms);
void cuda_range(Backend *, const char *name);
void trace_destroy(CudaBackend *backend);

// --- Ops, by file ---------------------------------------------------------------------------

// graph.cu
Status cuda_capture_begin(Backend *);
Status cuda_capture_end(Backend *, bool keep, void **out);
Status cuda_graph_launch(Backend *, void *graph);
void cuda_graph_release(Backend *, void *graph);
// embed.cu
Status cuda_embed_forward(Backend *, const EmbedArgs *);
Status cuda_embed_backward(Backend *, const EmbedArgs *);
size_t cuda_embed_workspace(const CudaBackend *, const EmbedArgs *);
// norm.cu
enum { CUDA_NORM_WIDTH_MAX = 8192 }; // a row fits the registers of a block
Status cuda_rmsnorm_forward(Backend *, const RmsNormArgs *);
Status cuda_rmsnorm_backward(Backend *, const RmsNormArgs *);
size_t cuda_rmsnorm_workspace(const CudaBackend *, const RmsNormArgs *);
// grad[c] += Σ_r parts[r * stride + c], in a fixed order.
Status add_column_sums(CudaBackend *backend, const float *parts, int64_t rows, int64_t stride,
                       int64_t columns, DType grad_dtype, void *grad) NODISCARD;
// linear.cu
Status cuda_linear_forward(Backend *, const LinearArgs *);
Status cuda_linear_backward(Backend *, const LinearArgs *);
size_t cuda_linear_workspace(const CudaBackend *, const LinearArgs *);
// rope.cu
Status cuda_rope_forward(Backend *, const RopeArgs *);
Status cuda_rope_backward(Backend *, const RopeArgs *);
size_t cuda_rope_workspace(const CudaBackend *, const RopeArgs *);
// attention.cu chooses between attention_cudnn.cpp, attention_flash.cu and attention_plain.cu
Status cuda_attention_forward(Backend *, const AttentionArgs *);
Status cuda_attention_backward(Backend *, const AttentionArgs *);
size_t cuda_attention_workspace(const CudaBackend *, const AttentionArgs *);
// ffn.cu
Status cuda_ffn_forward(Backend *, const FfnArgs *);
Status cuda_ffn_backward(Backend *, const FfnArgs *);
size_t cuda_ffn_workspace(const CudaBackend *, const FfnArgs *);
// route.cu, route_backward.cu
Status cuda_route_forward(Backend *, const RouteArgs *);
Status cuda_route_backward(Backend *, const RouteArgs *);
size_t cuda_route_workspace(const CudaBackend *, const RouteArgs *);
// router_loss.cu
Status cuda_router_loss(Backend *, const RouterLossArgs *);
size_t cuda_router_loss_workspace(const CudaBackend *, const RouterLossArgs *);
// moe_ffn.cu
Status cuda_moe_ffn_forward(Backend *, const MoeFfnArgs *);
Status cuda_moe_ffn_backward(Backend *, const MoeFfnArgs *);
size_t cuda_moe_ffn_workspace(const CudaBackend *, const MoeFfnArgs *);
// rows.cu
Status cuda_gather_rows(Backend *, const GatherRowsArgs *);
Status cuda_combine_rows(Backend *, const CombineRowsArgs *);
// cross_entropy.cu
Status cuda_linear_cross_entropy(Backend *, const LinearCrossEntropyArgs *);
size_t cuda_linear_cross_entropy_workspace(const CudaBackend *, const LinearCrossEntropyArgs *);
// adamw.cu
Status cuda_adamw(Backend *, const AdamwArgs *);
// reduce.cu
Status cuda_norm2(Backend *, DType, const void *, int64_t, double *);
size_t cuda_norm2_workspace(const CudaBackend *, const int64_t *count);
Status cuda_row_similarity(Backend *, const RowSimilarityArgs *);
size_t cuda_row_similarity_workspace(const CudaBackend *, const RowSimilarityArgs *);
// elementwise.cu
Status cuda_add(Backend *, void *, const void *, int64_t);
Status cuda_accumulate(Backend *, float *, DType, const void *, int64_t);
Status cuda_cast(Backend *, DType, void *, DType, const void *, int64_t);

#ifdef __cplusplus
}
#endif
#endif
