// What the files of the CPU backend share: its state, the workspace layout, and the ops by name.
//
// The backend is the reference of model/backend.h in fp32. Memory is ordinary host memory; "device"
// pointers are plain pointers. Every op runs to its end before it returns.
//
// Threads. The team size is fixed when the backend is created and named in every parallel region,
// so that changing OMP_NUM_THREADS later changes nothing. OpenBLAS runs on one thread; the ops cut
// their outputs into tiles and hand those to the team (cpu/gemm.h). A tile's value does not depend
// on which thread computes it, so tiles may be scheduled dynamically and results still repeat bit
// for bit.
//
// Scratch. Each op describes its scratch memory once, in a layout function that takes pieces from
// a Workspace. With base NULL the same function only counts, which is what workspace_bytes wants.
#ifndef CPU_CPU_H
#define CPU_CPU_H

#include <stddef.h>
#include <stdint.h>
#include "model/backend.h"

typedef struct CpuBackend {
    Backend base; // first, so that a Backend * is a CpuBackend *
    char *workspace;
    size_t workspace_bytes;
    int64_t *stamps_ns; // (num_stamps) of timestamp()
    int64_t num_stamps;
} CpuBackend;

typedef struct Workspace {
    char *base; // NULL: only count
    size_t used;
} Workspace;

enum { WORKSPACE_ALIGN = 64 };

static inline void *workspace_take(Workspace *workspace, size_t bytes) {
    void *piece = workspace->base ? workspace->base + workspace->used : NULL;
    workspace->used += (bytes + WORKSPACE_ALIGN - 1) / WORKSPACE_ALIGN * WORKSPACE_ALIGN;
    return piece;
}

static inline float *workspace_floats(Workspace *workspace, int64_t count) {
    return workspace_take(workspace, (size_t)count * sizeof(float));
}

static inline Workspace workspace_open(const Backend *backend) {
    return (Workspace){((const CpuBackend *)backend)->workspace, 0};
}

// After an op took its pieces and before it touches them.
#define WORKSPACE_FITS(backend, workspace)                                                         \
    do {                                                                                           \
        if ((workspace).used > ((const CpuBackend *)(backend))->workspace_bytes)                   \
            FAIL(STATUS_INTERNAL, "%s needs %zu bytes of workspace, %zu are set", __func__,        \
                 (workspace).used, ((const CpuBackend *)(backend))->workspace_bytes);              \
    } while (0)

static inline int64_t min_i64(int64_t a, int64_t b) {
    return a < b ? a : b;
}
static inline int64_t max_i64(int64_t a, int64_t b) {
    return a > b ? a : b;
}
static inline int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Part `index` of `parts` nearly equal pieces of [0, count): where it begins. The piece ends where
// the next begins.
static inline int64_t part_begin(int64_t count, int64_t parts, int64_t index) {
    return count / parts * index + min_i64(count % parts, index);
}

// --- Memory (memory.c) --------------------------------------------------------------------------
Status cpu_alloc(Backend *backend, size_t bytes, void **out) NODISCARD;
void cpu_release(Backend *backend, void *pointer);
Status cpu_copy(Backend *backend, void *to, const void *from, size_t bytes) NODISCARD;
Status cpu_zero(Backend *backend, void *memory, size_t bytes) NODISCARD;

// --- Time (trace.c) -----------------------------------------------------------------------------
Status cpu_timestamp(Backend *backend, int64_t slot) NODISCARD;
Status cpu_elapsed_ms(Backend *backend, int64_t from, int64_t to, double *ms) NODISCARD;
void cpu_range(Backend *backend, const char *name);

// --- Ops, one family per file -------------------------------------------------------------------
// x_workspace says what x needs, forward and backward alike.
Status cpu_embed_forward(Backend *backend, const EmbedArgs *args) NODISCARD;
Status cpu_embed_backward(Backend *backend, const EmbedArgs *args) NODISCARD;

size_t cpu_rmsnorm_workspace(const Backend *backend, const RmsNormArgs *args);
Status cpu_rmsnorm_forward(Backend *backend, const RmsNormArgs *args) NODISCARD;
Status cpu_rmsnorm_backward(Backend *backend, const RmsNormArgs *args) NODISCARD;

Status cpu_linear_forward(Backend *backend, const LinearArgs *args) NODISCARD;
Status cpu_linear_backward(Backend *backend, const LinearArgs *args) NODISCARD;

size_t cpu_rope_workspace(const Backend *backend, const RopeArgs *args);
Status cpu_rope_forward(Backend *backend, const RopeArgs *args) NODISCARD;
Status cpu_rope_backward(Backend *backend, const RopeArgs *args) NODISCARD;

size_t cpu_attention_workspace(const Backend *backend, const AttentionArgs *args);
Status cpu_attention_forward(Backend *backend, const AttentionArgs *args) NODISCARD;
Status cpu_attention_backward(Backend *backend, const AttentionArgs *args) NODISCARD;

size_t cpu_ffn_workspace(const Backend *backend, const FfnArgs *args);
Status cpu_ffn_forward(Backend *backend, const FfnArgs *args) NODISCARD;
Status cpu_ffn_backward(Backend *backend, const FfnArgs *args) NODISCARD;

size_t cpu_route_workspace(const Backend *backend, const RouteArgs *args);
Status cpu_route_forward(Backend *backend, const RouteArgs *args) NODISCARD;
Status cpu_route_backward(Backend *backend, const RouteArgs *args) NODISCARD;

size_t cpu_router_loss_workspace(const Backend *backend, const RouterLossArgs *args);
Status cpu_router_loss(Backend *backend, const RouterLossArgs *args) NODISCARD;

size_t cpu_moe_ffn_workspace(const Backend *backend, const MoeFfnArgs *args);
Status cpu_moe_ffn_forward(Backend *backend, const MoeFfnArgs *args) NODISCARD;
Status cpu_moe_ffn_backward(Backend *backend, const MoeFfnArgs *args) NODISCARD;

Status cpu_gather_rows(Backend *backend, const GatherRowsArgs *args) NODISCARD;
Status cpu_combine_rows(Backend *backend, const CombineRowsArgs *args) NODISCARD;

size_t cpu_cross_entropy_workspace(const Backend *backend, const LinearCrossEntropyArgs *args);
Status cpu_linear_cross_entropy(Backend *backend, const LinearCrossEntropyArgs *args) NODISCARD;

Status cpu_adamw(Backend *backend, const AdamwArgs *args) NODISCARD;
Status cpu_norm2(Backend *backend, DType dtype, const void *grad, int64_t count,
                 double *sums) NODISCARD;
Status cpu_row_similarity(Backend *backend, const RowSimilarityArgs *args) NODISCARD;
Status cpu_accumulate(Backend *, float *sum, DType, const void *values, int64_t count);
Status cpu_add(Backend *backend, void *a, const void *b, int64_t count) NODISCARD;
Status cpu_cast(Backend *backend, DType to, void *out, DType from, const void *in,
                int64_t count) NODISCARD;

#endif
