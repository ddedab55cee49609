// The GPU backend: device, streams, memory, errors, and the table that names every op.
//
// One backend owns one device and one compute stream; ops run in the order they are called. Memory
// is taken with plain cudaMalloc at creation time of its users and never during a step. A CUDA
// error is sticky: it is reported with the op that was running and nothing is retried.
#include <stdlib.h>
#include <string.h>
#include "cuda/common.cuh"
#include "cuda/cuda.h"
#include "cuda/grouped.h"

extern "C" {
#include "cuda/backend.h"
}

// --- Errors ----------------------------------------------------------------------------------

Status cuda_check(CudaBackend *backend, cudaError_t error, const char *file, int line,
                  const char *call) {
    if (error == cudaSuccess) return STATUS_OK;
    const char *op = backend && backend->current_op ? backend->current_op : "set-up";
    if (error == cudaErrorMemoryAllocation) {
        size_t free_bytes = 0, total_bytes = 0;
        cudaMemGetInfo(&free_bytes, &total_bytes);
        return status_fail(file, line, STATUS_INTERNAL,
                           "GPU %d: out of memory in %s (%.2f GB of %.2f GB free); see the memory "
                           "table of train --dry-run",
                           backend ? backend->device : 0, op, (double)free_bytes / 1e9,
                           (double)total_bytes / 1e9);
    }
    return status_fail(file, line, STATUS_INTERNAL, "GPU %d, op %s: %s: %s (%s)",
                       backend ? backend->device : 0, op, call, cudaGetErrorString(error),
                       cudaGetErrorName(error));
}

Status cuda_check_blas(CudaBackend *backend, cublasStatus_t error, const char *file, int line,
                       const char *call) {
    if (error == CUBLAS_STATUS_SUCCESS) return STATUS_OK;
    return status_fail(file, line, STATUS_INTERNAL, "GPU %d, op %s: %s: cuBLAS %s", backend->device,
                       backend->current_op ? backend->current_op : "set-up", call,
                       cublasLtGetStatusString(error));
}

// --- Workspace -------------------------------------------------------------------------------

Scratch scratch_open(CudaBackend *backend) {
    char *begin = (char *)backend->workspace;
    return Scratch{begin, begin + backend->workspace_bytes};
}

Status scratch_take(Scratch *scratch, size_t bytes, void **out) {
    INVARIANT((size_t)(scratch->end - scratch->next) >= bytes);
    *out = scratch->next;
    scratch->next += scratch_bytes(bytes);
    return STATUS_OK;
}

static size_t workspace_bytes(Backend *base, OpKind op, const void *args) {
    const CudaBackend *b = cuda_of(base);
    switch (op) {
    case OP_EMBED:
        return cuda_embed_workspace(b, (const EmbedArgs *)args);
    case OP_RMSNORM:
        return cuda_rmsnorm_workspace(b, (const RmsNormArgs *)args);
    case OP_LINEAR:
        return cuda_linear_workspace(b, (const LinearArgs *)args);
    case OP_ROPE:
        return cuda_rope_workspace(b, (const RopeArgs *)args);
    case OP_ATTENTION:
        return cuda_attention_workspace(b, (const AttentionArgs *)args);
    case OP_FFN:
        return cuda_ffn_workspace(b, (const FfnArgs *)args);
    case OP_ROUTE:
        return cuda_route_workspace(b, (const RouteArgs *)args);
    case OP_ROUTER_LOSS:
        return cuda_router_loss_workspace(b, (const RouterLossArgs *)args);
    case OP_MOE_FFN:
        return cuda_moe_ffn_workspace(b, (const MoeFfnArgs *)args);
    case OP_LINEAR_CROSS_ENTROPY:
        return cuda_linear_cross_entropy_workspace(b, (const LinearCrossEntropyArgs *)args);
    case OP_NORM2:
        return cuda_norm2_workspace(b, (const int64_t *)args);
    case OP_ROW_SIMILARITY:
        return cuda_row_similarity_workspace(b, (const RowSimilarityArgs *)args);
    case OP_ADAMW:
    case OP_GATHER_ROWS:
    case OP_COMBINE_ROWS:
    case OP_KIND_COUNT:
        break;
    }
    return 0;
}

static void set_workspace(Backend *base, void *device, size_t bytes) {
    cuda_of(base)->workspace = device;
    cuda_of(base)->workspace_bytes = bytes;
}

// --- Memory ----------------------------------------------------------------------------------

static Status device_alloc(Backend *base, size_t bytes, void **out) {
    CudaBackend *b = cuda_of(base);
    *out = NULL;
    CUDA_TRY(b, cudaMalloc(out, bytes ? bytes : 1));
    CUDA_TRY(b, cudaMemsetAsync(*out, 0, bytes, b->stream));
    return STATUS_OK;
}

static void device_release(Backend *base, void *pointer) {
    counts_forget(cuda_of(base), NULL, SIZE_MAX); // its size is not known
    cudaFree(pointer);
}

static Status host_alloc(Backend *base, size_t bytes, void **out) {
    CudaBackend *b = cuda_of(base);
    *out = NULL;
    CUDA_TRY(b, cudaHostAlloc(out, bytes ? bytes : 1, cudaHostAllocDefault));
    memset(*out, 0, bytes);
    return STATUS_OK;
}

static void host_release(Backend *base, void *pointer) {
    (void)base;
    cudaFreeHost(pointer);
}

// Waits for everything before it. Also looks at the word in which embed notes a bad token id, so
// that nothing that was computed from one reaches the host.
static Status synchronize(Backend *base) {
    CudaBackend *b = cuda_of(base);
    CUDA_TRY(b, cudaMemcpyAsync(b->host_bad_id, b->bad_id, sizeof *b->bad_id,
                                cudaMemcpyDeviceToHost, b->stream));
    CUDA_TRY(b, cudaStreamSynchronize(b->stream));
    const uint64_t word = *b->host_bad_id;
    if (word == 0) return STATUS_OK;
    CUDA_TRY(b, cudaMemsetAsync(b->bad_id, 0, sizeof *b->bad_id, b->stream));
    FAIL(STATUS_BAD_DATA, "token id %d at position %d of the micro-batch is outside the vocabulary",
         (int)(uint32_t)word, INT32_MAX - (int)(word >> 32 & INT32_MAX));
}

static Status upload_staged(CudaBackend *b, void *device, const void *host, size_t bytes) {
    Staging *staging = &b->staging;
    char *piece = staging->memory + (size_t)staging->next * STAGING_BYTES;
    cudaEvent_t sent = staging->sent[staging->next];
    staging->next = (staging->next + 1) % STAGING_PIECES;
    CUDA_TRY(b, cudaEventSynchronize(sent));
    memcpy(piece, host, bytes);
    CUDA_TRY(b, cudaMemcpyAsync(device, piece, bytes, cudaMemcpyHostToDevice, b->stream));
    CUDA_TRY(b, cudaEventRecord(sent, b->stream));
    return STATUS_OK;
}

// The caller may reuse `host` at once, so a large copy is waited for.
static Status upload(Backend *base, void *device, const void *host, size_t bytes) {
    CudaBackend *b = cuda_of(base);
    counts_forget(b, device, bytes);
    if (bytes <= STAGING_BYTES) return upload_staged(b, device, host, bytes);
    CUDA_TRY(b, cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, b->stream));
    CUDA_TRY(b, cudaStreamSynchronize(b->stream));
    return STATUS_OK;
}

static Status download(Backend *base, void *host, const void *device, size_t bytes) {
    CudaBackend *b = cuda_of(base);
    CUDA_TRY(b, cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, b->stream));
    return synchronize(base);
}

static Status memory(Backend *base, uint64_t *free_bytes, uint64_t *total_bytes) {
    size_t free_now = 0, total = 0;
    CUDA_TRY(cuda_of(base), cudaMemGetInfo(&free_now, &total));
    *free_bytes = free_now;
    *total_bytes = total;
    return STATUS_OK;
}

static Status copy(Backend *base, void *to, const void *from, size_t bytes) {
    CudaBackend *b = cuda_of(base);
    counts_forget(b, to, bytes);
    CUDA_TRY(b, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, b->stream));
    return STATUS_OK;
}

static Status zero(Backend *base, void *device, size_t bytes) {
    CudaBackend *b = cuda_of(base);
    counts_forget(b, device, bytes);
    CUDA_TRY(b, cudaMemsetAsync(device, 0, bytes, b->stream));
    return STATUS_OK;
}

// --- Creation --------------------------------------------------------------------------------

static void destroy(Backend *base) {
    CudaBackend *b = cuda_of(base);
    cudaDeviceSynchronize();
    gemm_cache_destroy(b);
    attention_cache_destroy(b);
    counts_cache_destroy(b);
    trace_destroy(b);
    for (int i = 0; i < CUDA_SIDE_STREAMS; i++) {
        if (b->join_event[i]) cudaEventDestroy(b->join_event[i]);
        if (b->side[i]) cudaStreamDestroy(b->side[i]);
    }
    for (int i = 0; i < STAGING_PIECES; i++)
        if (b->staging.sent[i]) cudaEventDestroy(b->staging.sent[i]);
    if (b->staging.memory) cudaFreeHost(b->staging.memory);
    if (b->fork_event) cudaEventDestroy(b->fork_event);
    if (b->stream) cudaStreamDestroy(b->stream);
    cudaFree(b->gemm_workspace);
    cudaFree(b->tune_hash);
    cudaFree(b->bad_id);
    cudaFree(b->turns);
    if (b->host_bad_id) cudaFreeHost(b->host_bad_id);
    if (b->host_counts) cudaFreeHost(b->host_counts);
    free(b);
}

static const BackendOps ops = {
    .alloc = device_alloc,
    .release = device_release,
    .host_alloc = host_alloc,
    .host_release = host_release,
    .upload = upload,
    .download = download,
    .copy = copy,
    .zero = zero,
    .synchronize = synchronize,
    .memory = memory,
    .capture_begin = cuda_capture_begin,
    .capture_end = cuda_capture_end,
    .graph_launch = cuda_graph_launch,
    .graph_release = cuda_graph_release,
    .timestamp = cuda_timestamp,
    .elapsed_ms = cuda_elapsed_ms,
    .range = cuda_range,
    .workspace_bytes = workspace_bytes,
    .set_workspace = set_workspace,
    .embed_forward = cuda_embed_forward,
    .embed_backward = cuda_embed_backward,
    .rmsnorm_forward = cuda_rmsnorm_forward,
    .rmsnorm_backward = cuda_rmsnorm_backward,
    .linear_forward = cuda_linear_forward,
    .linear_backward = cuda_linear_backward,
    .rope_forward = cuda_rope_forward,
    .rope_backward = cuda_rope_backward,
    .attention_forward = cuda_attention_forward,
    .attention_backward = cuda_attention_backward,
    .ffn_forward = cuda_ffn_forward,
    .ffn_backward = cuda_ffn_backward,
    .route_forward = cuda_route_forward,
    .route_backward = cuda_route_backward,
    .router_loss = cuda_router_loss,
    .moe_ffn_forward = cuda_moe_ffn_forward,
    .moe_ffn_backward = cuda_moe_ffn_backward,
    .linear_cross_entropy = cuda_linear_cross_entropy,
    .adamw = cuda_adamw,
    .norm2 = cuda_norm2,
    .row_similarity = cuda_row_similarity,
    .gather_rows = cuda_gather_rows,
    .combine_rows = cuda_combine_rows,
    .accumulate = cuda_accumulate,
    .add = cuda_add,
    .cast = cuda_cast,
    .destroy = destroy,
};

// Driver and device are asked before anything else, so that each problem has its own message.
static Status check_device(int device, cudaDeviceProp *properties) {
    int count = 0, driver = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaErrorInsufficientDriver) {
        cudaDriverGetVersion(&driver);
        if (driver == 0) FAIL(STATUS_USAGE, "no NVIDIA driver found; use --device cpu");
        FAIL(STATUS_USAGE,
             "the NVIDIA driver is too old: it supports CUDA %d.%d, this build needs "
             "%d.%d; update the driver or use --device cpu",
             driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    }
    if (error != cudaSuccess || count == 0)
        FAIL(STATUS_USAGE, "no CUDA device found (%s); use --device cpu",
             cudaGetErrorString(error));
    if (device >= count) FAIL(STATUS_USAGE, "GPU %d asked for, %d present", device, count);
    if (cudaGetDeviceProperties(properties, device) != cudaSuccess)
        FAIL(STATUS_INTERNAL, "GPU %d: cannot read its properties", device);
    if (properties->major < 8)
        FAIL(STATUS_USAGE,
             "GPU %d (%s) has compute capability %d.%d; bf16 training needs 8.0 or newer; use "
             "--device cpu",
             device, properties->name, properties->major, properties->minor);
    return STATUS_OK;
}

static __global__ void probe_kernel(void) {}

// Code is chosen when the first kernel is looked up.
static Status check_code(int device, const cudaDeviceProp *properties) {
    cudaFuncAttributes attributes;
    if (cudaSetDevice(device) != cudaSuccess)
        FAIL(STATUS_INTERNAL, "GPU %d (%s) cannot be opened: %s", device, properties->name,
             cudaGetErrorString(cudaGetLastError()));
    cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
    if (error == cudaSuccess) return STATUS_OK;
    FAIL(STATUS_USAGE,
         "GPU %d (%s): this build has no code for compute capability %d.%d (%s); build with "
         "-DCMAKE_CUDA_ARCHITECTURES=%d%d or use --device cpu",
         device, properties->name, properties->major, properties->minor, cudaGetErrorString(error),
         properties->major, properties->minor);
}

bool backend_cuda_present(void) {
    int count = 0, driver = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaErrorInsufficientDriver)
        return cudaDriverGetVersion(&driver) == cudaSuccess && driver > 0;
    return error == cudaSuccess && count > 0;
}

int backend_cuda_count(void) {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

Status backend_cuda_check(int device) {
    cudaDeviceProp properties;
    TRY(check_device(device, &properties));
    return check_code(device, &properties);
}

static Status create_parts(CudaBackend *b) {
    CUDA_TRY(b, cudaSetDevice(b->device));
    CUDA_TRY(b, cudaStreamCreateWithFlags(&b->stream, cudaStreamNonBlocking));
    CUDA_TRY(b, cudaEventCreateWithFlags(&b->fork_event, cudaEventDisableTiming));
    for (int i = 0; i < CUDA_SIDE_STREAMS; i++) {
        CUDA_TRY(b, cudaStreamCreateWithFlags(&b->side[i], cudaStreamNonBlocking));
        CUDA_TRY(b, cudaEventCreateWithFlags(&b->join_event[i], cudaEventDisableTiming));
    }
    CUDA_TRY(
        b, cudaMalloc(&b->gemm_workspace, (size_t)GEMM_WORKSPACE_BYTES * (1 + CUDA_SIDE_STREAMS)));
    CUDA_TRY(b, cudaHostAlloc((void **)&b->staging.memory, (size_t)STAGING_PIECES * STAGING_BYTES,
                              cudaHostAllocDefault));
    for (int i = 0; i < STAGING_PIECES; i++)
        CUDA_TRY(b, cudaEventCreateWithFlags(&b->staging.sent[i], cudaEventDisableTiming));
    CUDA_TRY(b, cudaMalloc((void **)&b->tune_hash, sizeof *b->tune_hash));
    CUDA_TRY(b, cudaMalloc((void **)&b->bad_id, sizeof *b->bad_id));
    CUDA_TRY(b, cudaMemsetAsync(b->bad_id, 0, sizeof *b->bad_id, b->stream));
    CUDA_TRY(b, cudaMalloc((void **)&b->turns, sizeof *b->turns));
    CUDA_TRY(b, cudaMemsetAsync(b->turns, 0, sizeof *b->turns, b->stream));
    CUDA_TRY(b,
             cudaHostAlloc((void **)&b->host_bad_id, sizeof *b->host_bad_id, cudaHostAllocDefault));
    CUDA_TRY(b, cudaHostAlloc((void **)&b->host_counts, 4096, cudaHostAllocDefault));
    TRY(gemm_cache_create(b));
    TRY(counts_cache_create(b));
    return attention_cache_create(b);
}

Status backend_cuda(const CudaOptions *options, Backend **out) {
    cudaDeviceProp properties;
    INVARIANT(options->grad_dtype == DTYPE_F32 ||
              (options->grad_dtype == DTYPE_BF16 && !options->fp32));
    TRY(check_device(options->device, &properties));
    TRY(check_code(options->device, &properties));
    CudaBackend *b = (CudaBackend *)calloc(1, sizeof *b);
    if (!b) FAIL(STATUS_INTERNAL, "out of memory for the GPU backend");
    b->base.ops = &ops;
    b->base.name = "cuda";
    b->base.device_name = strcpy(b->device_name, properties.name);
    b->base.compute_dtype = options->fp32 ? DTYPE_F32 : DTYPE_BF16;
    b->base.grad_dtype = options->grad_dtype;
    b->base.num_threads = 1;
    b->base.can_capture = options->graphs;
    b->deterministic = !options->any_order;
    b->device = options->device;
    b->num_sms = properties.multiProcessorCount;
    b->capability = 10 * properties.major + properties.minor;
    Status status = create_parts(b);
    if (status != STATUS_OK) {
        destroy(&b->base);
        return status;
    }
    *out = &b->base;
    return STATUS_OK;
}
