// cuDNN's flash attention, through the headers of cudnn-frontend (C++, kept to this file).
//
// A plan is built once per shape and direction and kept. q, k and v are read straight out of the
// packed qkv by their strides, and dq, dk and dv are written straight into dqkv; cuDNN's softmax
// statistics are our log_sum_exp, so that forward and backward may run on different kernels.
//
// Deterministic backward on Hopper with cuDNN 9 keeps the gradient of the probabilities of all
// heads in memory, 2·B·heads·S² bytes, instead of adding dq atomically. The batch is therefore cut
// into chunks whose share stays under DP_BYTES_MAX: about what the loss takes for its logits, and
// smaller chunks fill the chip worse (16 sequences of 2048 on an H200: 1.13 ms in one chunk, 1.36
// in four). Sequences do not depend on each other. A backend that need not be deterministic lets
// cuDNN add dq in any order and takes the batch whole.
//
// Without cuDNN or the headers (cmake says which) the functions decline, and own kernels run.
#include "cuda/attention.h"

#ifdef D2M_HAVE_CUDNN

#include <cmath>
#include <cstdio>
#include <memory>
#include <unordered_map>
#include <algorithm>
#include <utility>
#define CUDNN_FRONTEND_SKIP_JSON_LIB // serialized plans are not used
#include <cudnn_frontend.h>

extern "C" {
#include "base/log.h"
}

namespace fe = cudnn_frontend;
using Tensor = std::shared_ptr<fe::graph::Tensor_attributes>;

static constexpr int64_t DP_BYTES_MAX = (int64_t)2 << 30;
// A single very long sequence would need tens of gigabytes of dP; the own kernels need none.
static constexpr size_t WORKSPACE_BYTES_MAX = (size_t)5 << 29;
enum { PLANS_MAX = 64 };
// What is bound to memory when a plan runs.
enum Operand { Q = 1, K, V, OUT, STATS, DOUT, DQ, DK, DV };

typedef struct Plan {
    bool backward, deterministic;
    int64_t batch, length;
    int heads, kv_heads, head_dim;
    std::shared_ptr<fe::graph::Graph> graph; // null: cuDNN does not take the shape
    size_t workspace_bytes;
} Plan;

struct AttentionCache {
    cudnnHandle_t handle;
    int count;
    Plan plans[PLANS_MAX];
};

const char *attention_cudnn_about(void) {
    static char text[64];
    const size_t version = cudnnGetVersion();
    snprintf(text, sizeof text, "cuDNN %zu.%zu.%zu", version / 10000, version / 100 % 100,
             version % 100);
    return text;
}

static Status check(CudaBackend *backend, cudnnStatus_t error, const char *call) {
    if (error == CUDNN_STATUS_SUCCESS) return STATUS_OK;
    FAIL(STATUS_INTERNAL, "GPU %d: %s: cuDNN %s", backend->device, call,
         cudnnGetErrorString(error));
}

Status attention_cache_create(CudaBackend *backend) {
    backend->attention = new AttentionCache();
    cudnnHandle_t *handle = &backend->attention->handle;
    TRY(check(backend, cudnnCreate(handle), "cudnnCreate"));
    return check(backend, cudnnSetStream(*handle, backend->stream), "cudnnSetStream");
}

void attention_cache_destroy(CudaBackend *backend) {
    AttentionCache *cache = backend->attention;
    if (!cache) return;
    for (int i = 0; i < cache->count; i++) cache->plans[i].graph.reset(); // before the handle
    if (cache->handle) cudnnDestroy(cache->handle);
    delete cache;
    backend->attention = nullptr;
}

// --- Building a plan ----------------------------------------------------------------------------

// (batch, heads, S, head_dim), where a token's heads lie side by side and tokens `stride` apart.
static void shape_heads(const Plan &p, fe::graph::Tensor_attributes &tensor, int heads,
                        int64_t stride, Operand uid) {
    tensor.set_dim({p.batch, heads, p.length, p.head_dim})
        .set_stride({p.length * stride, p.head_dim, stride, 1})
        .set_uid(uid);
}

static Tensor input(const Plan &p, int heads, int64_t stride, Operand uid) {
    fe::graph::Tensor_attributes tensor;
    shape_heads(p, tensor, heads, stride, uid);
    return p.graph->tensor(tensor);
}

static void output(const Plan &p, const Tensor &tensor, int heads, int64_t stride, Operand uid) {
    tensor->set_output(true);
    shape_heads(p, *tensor, heads, stride, uid);
}

static void shape_stats(const Plan &p, fe::graph::Tensor_attributes &tensor) {
    tensor.set_dim({p.batch, p.heads, p.length, 1})
        .set_stride({p.heads * p.length, p.length, 1, 1})
        .set_data_type(fe::DataType_t::FLOAT)
        .set_uid(STATS);
}

static void add_nodes(const Plan &p) {
    const int64_t stride = (int64_t)(p.heads + 2 * p.kv_heads) * p.head_dim;
    const int64_t out_stride = (int64_t)p.heads * p.head_dim;
    const float scale = 1.0f / sqrtf((float)p.head_dim);
    Tensor q = input(p, p.heads, stride, Q), k = input(p, p.kv_heads, stride, K);
    Tensor v = input(p, p.kv_heads, stride, V);
    if (!p.backward) {
        fe::graph::SDPA_attributes options;
        options.set_name("attention").set_generate_stats(true).set_causal_mask(true);
        options.set_attn_scale(scale);
        auto [out, stats] = p.graph->sdpa(q, k, v, options);
        output(p, out, p.heads, out_stride, OUT);
        stats->set_output(true);
        shape_stats(p, *stats);
        return;
    }
    fe::graph::Tensor_attributes stats;
    shape_stats(p, stats);
    fe::graph::SDPA_backward_attributes options;
    options.set_name("attention_backward").set_causal_mask(true).set_attn_scale(scale);
    options.set_deterministic_algorithm(p.deterministic);
    auto [dq, dk, dv] = p.graph->sdpa_backward(q, k, v, input(p, p.heads, out_stride, OUT),
                                               input(p, p.heads, out_stride, DOUT),
                                               p.graph->tensor(stats), options);
    output(p, dq, p.heads, stride, DQ);
    output(p, dk, p.kv_heads, stride, DK);
    output(p, dv, p.kv_heads, stride, DV);
}

// Leaves plan->graph null when cuDNN declines.
static void build(const AttentionCache *cache, Plan *plan) {
    plan->graph = std::make_shared<fe::graph::Graph>();
    plan->graph->set_io_data_type(fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    add_nodes(*plan);
    auto error = plan->graph->build(cache->handle, {fe::HeurMode_t::A, fe::HeurMode_t::FALLBACK});
    int64_t bytes = 0;
    if (error.is_good()) error = plan->graph->get_workspace_size(bytes);
    plan->workspace_bytes = (size_t)bytes;
    if (error.is_good()) return;
    log_info("cuDNN declines attention %s B %lld, S %lld, heads %d/%d x %d: %s",
             plan->backward ? "backward" : "forward", (long long)plan->batch,
             (long long)plan->length, plan->heads, plan->kv_heads, plan->head_dim,
             error.get_message().c_str());
    plan->graph.reset();
}

// By value: a later search may empty the cache, and the copy keeps the graph alive.
static Plan find_plan(const CudaBackend *backend, const AttentionArgs *args, int64_t batch,
                      bool backward) {
    AttentionCache *cache = backend->attention;
    for (int i = 0; i < cache->count; i++) {
        const Plan &p = cache->plans[i];
        if (p.backward == backward && p.batch == batch && p.length == args->sequence_length &&
            p.heads == args->num_heads && p.kv_heads == args->num_kv_heads &&
            p.head_dim == args->head_dim)
            return p;
    }
    if (cache->count == PLANS_MAX) { // a run has a handful of shapes
        for (int i = 0; i < PLANS_MAX; i++) cache->plans[i] = Plan{};
        cache->count = 0;
    }
    Plan plan = {};
    plan.backward = backward;
    plan.deterministic = backend->deterministic;
    plan.batch = batch;
    plan.length = args->sequence_length;
    plan.heads = args->num_heads;
    plan.kv_heads = args->num_kv_heads;
    plan.head_dim = args->head_dim;
    build(cache, &plan);
    cache->plans[cache->count++] = plan;
    return plan;
}

// --- Running ------------------------------------------------------------------------------------

// How a batch is cut: chunks of `plan`, then one of `rest` where they do not divide it.
typedef struct Cut {
    Plan plan, rest;
} Cut;

// Sequences per chunk. A chunk's statistics must start on 16 bytes, so some shapes need a multiple
// of `step` sequences.
static int64_t chunk_step(const AttentionArgs *args) {
    const int64_t statistics = args->num_heads * args->sequence_length;
    return statistics % 4 == 0 ? 1 : statistics % 2 == 0 ? 2 : 4;
}

static int64_t chunk_size(const CudaBackend *backend, const AttentionArgs *args, bool backward) {
    const int64_t step = chunk_step(args), length = args->sequence_length;
    const int64_t fit = DP_BYTES_MAX / (2 * args->num_heads * length * length);
    if (!backward || !backend->deterministic || fit >= args->batch) return args->batch;
    const int64_t size = fit / step * step > step ? fit / step * step : step;
    return size < args->batch ? size : args->batch;
}

// The largest chunks whose plans fit `available`. A workspace that was sized for longer sequences
// may hold fewer of the shorter ones than chunk_size says, but always one step.
static bool find_cut(const CudaBackend *backend, const AttentionArgs *args, bool backward,
                     size_t available, Cut *cut) {
    if (backend->base.compute_dtype != DTYPE_BF16 || args->head_dim % 8 || args->head_dim > 256 ||
        args->batch * args->sequence_length == 0)
        return false;
    const int64_t step = chunk_step(args);
    available = std::min(available, WORKSPACE_BYTES_MAX);
    for (int64_t size = chunk_size(backend, args, backward); size > 0;
         size = size / 2 / step * step) {
        cut->plan = find_plan(backend, args, size, backward);
        if (!cut->plan.graph) return false;
        if (cut->plan.workspace_bytes > available) continue;
        const int64_t rest = args->batch % size;
        if (rest == 0) return true;
        cut->rest = find_plan(backend, args, rest, backward);
        return cut->rest.graph && cut->rest.workspace_bytes <= available;
    }
    return false;
}

bool attention_cudnn_takes(const CudaBackend *backend, const AttentionArgs *args, bool backward) {
    Cut cut = {};
    return find_cut(backend, args, backward, backend->workspace_bytes, &cut);
}

size_t attention_cudnn_workspace(const CudaBackend *backend, const AttentionArgs *args) {
    size_t most = 0;
    for (int backward = 0; backward < 2; backward++) {
        Cut cut = {};
        if (!find_cut(backend, args, backward, SIZE_MAX, &cut)) continue;
        if (cut.plan.workspace_bytes > most) most = cut.plan.workspace_bytes;
        if (cut.rest.workspace_bytes > most) most = cut.rest.workspace_bytes;
    }
    return most;
}

// Sequences [first, first + plan.batch).
static Status execute(CudaBackend *backend, const AttentionArgs *args, const Plan &plan,
                      int64_t first) {
    const int64_t tokens = first * args->sequence_length, heads = args->num_heads;
    const int64_t qkv_at = tokens * attention_qkv_stride(args);
    const int64_t out_at = tokens * heads * args->head_dim;
    const int64_t k_at = heads * args->head_dim;
    const int64_t v_at = k_at + (int64_t)args->num_kv_heads * args->head_dim;
    uint16_t *qkv = (uint16_t *)args->qkv + qkv_at; // bf16
    std::unordered_map<int64_t, void *> operands = {{Q, qkv},
                                                    {K, qkv + k_at},
                                                    {V, qkv + v_at},
                                                    {OUT, (uint16_t *)args->out + out_at},
                                                    {STATS, args->log_sum_exp + tokens * heads}};
    if (plan.backward) {
        uint16_t *dqkv = (uint16_t *)args->dqkv + qkv_at;
        operands[DOUT] = (uint16_t *)args->dout + out_at;
        operands[DQ] = dqkv;
        operands[DK] = dqkv + k_at;
        operands[DV] = dqkv + v_at;
    }
    auto error = plan.graph->execute(backend->attention->handle, operands, backend->workspace);
    if (error.is_good()) return STATUS_OK;
    FAIL(STATUS_INTERNAL, "GPU %d, op %s: cuDNN: %s", backend->device, backend->current_op,
         error.get_message().c_str());
}

static Status run(CudaBackend *backend, const AttentionArgs *args, bool backward) {
    Cut cut = {};
    INVARIANT(find_cut(backend, args, backward, backend->workspace_bytes, &cut));
    int64_t first = 0;
    for (; first + cut.plan.batch <= args->batch; first += cut.plan.batch)
        TRY(execute(backend, args, cut.plan, first));
    if (first < args->batch) TRY(execute(backend, args, cut.rest, first));
    return STATUS_OK;
}

Status attention_cudnn_forward(CudaBackend *backend, const AttentionArgs *args) {
    return run(backend, args, false);
}

Status attention_cudnn_backward(CudaBackend *backend, const AttentionArgs *args) {
    return run(backend, args, true);
}

#else

Status attention_cache_create(CudaBackend *) {
    return STATUS_OK;
}
void attention_cache_destroy(CudaBackend *) {}
bool attention_cudnn_takes(const CudaBackend *, const AttentionArgs *, bool) {
    return false;
}
size_t attention_cudnn_workspace(const CudaBackend *, const AttentionArgs *) {
    return 0;
}
Status attention_cudnn_forward(CudaBackend *, const AttentionArgs *) {
    FAIL(STATUS_INTERNAL, "this build has no cuDNN");
}
Status attention_cudnn_backward(CudaBackend *, const AttentionArgs *) {
    FAIL(STATUS_INTERNAL, "this build has no cuDNN");
}
const char *attention_cudnn_about(void) {
    return "this build has no cuDNN";
}

#endif
