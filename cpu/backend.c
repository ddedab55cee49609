// The CPU backend's table, creation and workspace.
#include <omp.h>
#include <stdlib.h>
#include "cpu/cpu.h"
#include "cpu/gemm.h"

// Everything has happened when an op returns.
static Status synchronize(Backend *backend) {
    (void)backend;
    return STATUS_OK;
}

static Status memory(Backend *backend, uint64_t *free_bytes, uint64_t *total_bytes) {
    (void)backend;
    *free_bytes = *total_bytes = 0;
    return STATUS_OK;
}

static size_t workspace_bytes(Backend *backend, OpKind op, const void *args) {
    switch (op) {
    case OP_RMSNORM:
        return cpu_rmsnorm_workspace(backend, args);
    case OP_ROPE:
        return cpu_rope_workspace(backend, args);
    case OP_ATTENTION:
        return cpu_attention_workspace(backend, args);
    case OP_FFN:
        return cpu_ffn_workspace(backend, args);
    case OP_ROUTE:
        return cpu_route_workspace(backend, args);
    case OP_ROUTER_LOSS:
        return cpu_router_loss_workspace(backend, args);
    case OP_MOE_FFN:
        return cpu_moe_ffn_workspace(backend, args);
    case OP_LINEAR_CROSS_ENTROPY:
        return cpu_cross_entropy_workspace(backend, args);
    case OP_EMBED:
    case OP_LINEAR:
    case OP_ADAMW:
    case OP_NORM2:
    case OP_ROW_SIMILARITY:
    case OP_GATHER_ROWS:
    case OP_COMBINE_ROWS:
    case OP_KIND_COUNT:
        break;
    }
    return 0;
}

static void set_workspace(Backend *backend, void *device, size_t bytes) {
    CpuBackend *cpu = (CpuBackend *)backend;
    cpu->workspace = device;
    cpu->workspace_bytes = bytes;
}

static void destroy(Backend *backend) {
    free(((CpuBackend *)backend)->stamps_ns);
    free(backend);
}

static const BackendOps cpu_ops = {
    .alloc = cpu_alloc,
    .release = cpu_release,
    .host_alloc = cpu_alloc,
    .host_release = cpu_release,
    .upload = cpu_copy,
    .download = cpu_copy,
    .copy = cpu_copy,
    .zero = cpu_zero,
    .synchronize = synchronize,
    .memory = memory,
    .timestamp = cpu_timestamp,
    .elapsed_ms = cpu_elapsed_ms,
    .range = cpu_range,
    .workspace_bytes = workspace_bytes,
    .set_workspace = set_workspace,
    .embed_forward = cpu_embed_forward,
    .embed_backward = cpu_embed_backward,
    .rmsnorm_forward = cpu_rmsnorm_forward,
    .rmsnorm_backward = cpu_rmsnorm_backward,
    .linear_forward = cpu_linear_forward,
    .linear_backward = cpu_linear_backward,
    .rope_forward = cpu_rope_forward,
    .rope_backward = cpu_rope_backward,
    .attention_forward = cpu_attention_forward,
    .attention_backward = cpu_attention_backward,
    .ffn_forward = cpu_ffn_forward,
    .ffn_backward = cpu_ffn_backward,
    .route_forward = cpu_route_forward,
    .route_backward = cpu_route_backward,
    .router_loss = cpu_router_loss,
    .moe_ffn_forward = cpu_moe_ffn_forward,
    .moe_ffn_backward = cpu_moe_ffn_backward,
    .linear_cross_entropy = cpu_linear_cross_entropy,
    .adamw = cpu_adamw,
    .norm2 = cpu_norm2,
    .row_similarity = cpu_row_similarity,
    .gather_rows = cpu_gather_rows,
    .combine_rows = cpu_combine_rows,
    .accumulate = cpu_accumulate,
    .add = cpu_add,
    .cast = cpu_cast,
    .destroy = destroy,
};

Status backend_cpu(int threads, Backend **out) {
    CpuBackend *cpu = calloc(1, sizeof *cpu);
    if (!cpu) FAIL(STATUS_INTERNAL, "out of memory: %zu bytes", sizeof *cpu);
    gemm_use_one_thread();
    cpu->base = (Backend){
        .ops = &cpu_ops,
        .name = "cpu",
        .device_name = "CPU",
        .compute_dtype = DTYPE_F32,
        .grad_dtype = DTYPE_F32,
        .num_threads = threads > 0 ? threads : omp_get_max_threads(),
    };
    *out = &cpu->base;
    return STATUS_OK;
}
