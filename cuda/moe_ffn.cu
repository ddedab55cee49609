// The expert MLPs, dropless and without padding.
//
// The rows (token, choice) of x are gathered by expert, each expert's products run over exactly its
// rows, and out[t] is the plain sum of t's rows, found through row_of_slot, without atomics. The
// gate sits inside the activation, A' = g·silu(gate)·up, so that the down product gives the
// weighted output; backward has Σ dA·silu(gate)·up as the gate's gradient and needs no expert
// output.
//
// On a Hopper chip each product runs over all experts at once (hopper_mlp.h, and hopper_grouped.h
// where that fills the chip, else expert by expert). Elsewhere each expert goes through all of its
// products, beside the other experts as cuda/grouped.h arranges it. Both need the counts on the
// host; they arrive while the gather, which does not need them, runs.
#include "cuda/common.cuh"
#include "cuda/grouped.h"
#include "cuda/hopper_grouped.h"
#include "cuda/hopper_mlp.h"
#include "cuda/rows.h"
#include "cuda/swiglu.cuh"

typedef struct MoeScratch {
    void *x;          // (R, H) rows of x by expert; R = T*k
    void *activation; // (R, I) with the gate inside; backward: first its gradient
    void *rows;       // (R, H) forward: weighted expert outputs; backward: dx by row
    void *dout;       // (R, H) rows of dout by expert
    void *dgate_up;   // (R, 2I)
    void *partial;    // of the gates' gradients: hopper_mlp.h
} MoeScratch;

// One op in flight: what its steps share.
typedef struct Moe {
    CudaBackend *b;
    const MoeFfnArgs *args;
    MoeScratch scratch;
    size_t element;       // bytes of a value
    const int32_t *begin; // (N+1) on the host
} Moe;

// --- Rows --------------------------------------------------------------------------------------

// The rows of x or dout by expert.
static Status gather_tokens(const Moe *m, const void *from, void *to) {
    const MoeFfnArgs *args = m->args;
    GatherRowsArgs rows = {};
    rows.rows = args->tokens * args->top_k;
    rows.row_bytes = args->hidden_size * (int64_t)m->element;
    rows.divisor = args->top_k;
    rows.index = args->routing.slot_of_row;
    rows.in = from;
    rows.out = to;
    return rows_gather(m->b, &rows);
}

static Status combine(const Moe *m, void *out) {
    const MoeFfnArgs *args = m->args;
    CombineRowsArgs rows = {};
    rows.tokens = args->tokens;
    rows.hidden_size = args->hidden_size;
    rows.top_k = args->top_k;
    rows.row_of_slot = args->routing.row_of_slot;
    rows.rows = m->scratch.rows;
    rows.out = out;
    return rows_combine(m->b, &rows);
}

// --- Scratch ---------------------------------------------------------------------------------

typedef struct MoeBytes {
    size_t hidden, inner; // of all rows
} MoeBytes;

static MoeBytes moe_bytes(const CudaBackend *b, const MoeFfnArgs *args) {
    const size_t rows = (size_t)(args->tokens * args->top_k) * dtype_bytes(b->base.compute_dtype);
    MoeBytes bytes = {rows * (size_t)args->hidden_size, rows * (size_t)args->intermediate_size};
    return bytes;
}

static size_t partial_bytes(const MoeFfnArgs *args) {
    return (size_t)hopper_mlp_partials(args->tokens * args->top_k, args->intermediate_size) *
           sizeof(float);
}

size_t cuda_moe_ffn_workspace(const CudaBackend *b, const MoeFfnArgs *args) {
    const MoeBytes bytes = moe_bytes(b, args);
    return 3 * scratch_bytes(bytes.hidden) + scratch_bytes(bytes.inner) +
           scratch_bytes(2 * bytes.inner) + scratch_bytes(partial_bytes(args));
}

static Status moe_open(Backend *base, const MoeFfnArgs *args, bool backward, Moe *m) {
    m->b = cuda_of(base);
    m->b->current_op = backward ? "moe_ffn_backward" : "moe_ffn_forward";
    m->args = args;
    m->element = dtype_bytes(base->compute_dtype);
    const MoeBytes bytes = moe_bytes(m->b, args);
    Scratch scratch = scratch_open(m->b);
    TRY(scratch_take(&scratch, bytes.hidden, &m->scratch.x));
    TRY(scratch_take(&scratch, bytes.inner, &m->scratch.activation));
    TRY(scratch_take(&scratch, bytes.hidden, &m->scratch.rows));
    if (!backward) return STATUS_OK;
    TRY(scratch_take(&scratch, bytes.hidden, &m->scratch.dout));
    TRY(scratch_take(&scratch, 2 * bytes.inner, &m->scratch.dgate_up));
    return scratch_take(&scratch, partial_bytes(args), &m->scratch.partial);
}

// Row `row` of a matrix of `width` columns.
static void *row_of(const Moe *m, const void *matrix, int64_t row, int64_t width) {
    return (char *)matrix + (size_t)(row * width) * m->element;
}
// The weight (or its gradient) of expert e.
static void *expert_of(const void *matrix, int e, int64_t rows, int64_t columns, size_t element) {
    return (char *)matrix + (size_t)(e * rows * columns) * element;
}

static Status moe_counts(Moe *m) {
    const MoeFfnArgs *args = m->args;
    return counts_finish(m->b, args->routing.expert_begin, args->num_experts,
                         args->tokens * args->top_k, &m->begin);
}

// --- All experts at once -----------------------------------------------------------------------

// What both passes of the fused kernels read and write; see hopper_mlp.h.
static HopperMlp fused_mlp(const Moe *m) {
    const MoeFfnArgs *args = m->args;
    HopperMlp mlp = {};
    mlp.groups = args->num_experts;
    mlp.begin = m->begin;
    mlp.hidden = args->hidden_size;
    mlp.inner = args->intermediate_size;
    mlp.scale = args->routing.gate;
    mlp.scale_index = args->routing.slot_of_row;
    mlp.gate_up = args->gate_up;
    mlp.activation = m->scratch.activation;
    return mlp;
}

// gate_up and activation of all rows, if *done.
static Status fused_forward(const Moe *m, bool *done) {
    HopperMlp mlp = fused_mlp(m);
    mlp.weight = m->args->weight_gate_up;
    mlp.in = m->scratch.x;
    if (!m->args->out) mlp.activation = NULL;
    *done = hopper_mlp_takes(m->b, &mlp);
    return *done ? hopper_mlp_forward(m->b, &mlp) : STATUS_OK;
}

// dgate_up, activation and dgate, if *done.
static Status fused_backward(const Moe *m, bool *done) {
    HopperMlp mlp = fused_mlp(m);
    mlp.weight = m->args->weight_down;
    mlp.in = m->scratch.dout;
    mlp.dgate_up = m->scratch.dgate_up;
    mlp.dscale = m->args->dgate;
    mlp.partial = (float *)m->scratch.partial;
    *done = hopper_mlp_takes(m->b, &mlp);
    return *done ? hopper_mlp_backward(m->b, &mlp) : STATUS_OK;
}

// out (R, N) = in (R, K) · weight of each expert, if *done.
static Status grouped_rows(const Moe *m, const void *in, int inner, const void *weight, int columns,
                           bool inner_last, void *out, bool *done) {
    HopperRows p = {};
    p.groups = m->args->num_experts;
    p.begin = m->begin;
    p.inner = inner;
    p.columns = columns;
    p.inner_last = inner_last;
    p.in = in;
    p.weight = weight;
    p.out = out;
    *done = hopper_rows_takes(m->b, &p) && hopper_rows_fills(m->b, &p);
    return *done ? hopper_rows(m->b, &p) : STATUS_OK;
}

// grad (M, N) of each expert += leftᵀ · right over its rows, if *done.
static Status grouped_gradient(const Moe *m, const void *left, int out_rows, const void *right,
                               int columns, void *grad, bool *done) {
    HopperGradient p = {};
    p.groups = m->args->num_experts;
    p.begin = m->begin;
    p.m = out_rows;
    p.n = columns;
    p.left = left;
    p.left_stride = out_rows;
    p.right = right;
    p.assign = m->args->grad_assign;
    p.grad = (float *)grad;
    *done = hopper_gradient_takes(m->b, &p) && hopper_gradient_fills(m->b, &p);
    return *done ? hopper_gradient(m->b, &p) : STATUS_OK;
}

// --- One expert ----------------------------------------------------------------------------------

// A product over the rows of one expert.
static Gemm expert_gemm(const Moe *m, int64_t rows, int64_t n, int64_t k, const void *a,
                        const void *weight, void *c) {
    Gemm g = gemm_of(m->b, rows, n, k, a, weight, c);
    g.rows_vary = true;
    return g;
}

static Swiglu expert_swiglu(const Moe *m, int expert) {
    const MoeFfnArgs *args = m->args;
    const int64_t begin = m->begin[expert], inner = args->intermediate_size;
    Swiglu s = {};
    s.rows = m->begin[expert + 1] - begin;
    s.inner = args->intermediate_size;
    s.gate_up = row_of(m, args->gate_up, begin, 2 * inner);
    s.scale = args->routing.gate;
    s.scale_index = args->routing.slot_of_row + begin;
    s.activation = row_of(m, m->scratch.activation, begin, inner);
    return s;
}

static Status over_experts(const Moe *m, ExpertWork work) {
    return experts_run(m->b, m->begin, m->args->num_experts, work, m);
}

// --- Forward -----------------------------------------------------------------------------------

static Status down_expert(const void *context, int e, cudaStream_t, int stream_index) {
    const Moe *m = (const Moe *)context;
    const MoeFfnArgs *args = m->args;
    const int64_t hidden = args->hidden_size, inner = args->intermediate_size;
    const int64_t begin = m->begin[e], rows = m->begin[e + 1] - begin;
    Gemm down = expert_gemm(m, rows, hidden, inner, row_of(m, m->scratch.activation, begin, inner),
                            expert_of(args->weight_down, e, hidden, inner, m->element),
                            row_of(m, m->scratch.rows, begin, hidden));
    down.transpose_b = true;
    return gemm_run(m->b, &down, stream_index);
}

static Status forward_expert(const void *context, int e, cudaStream_t stream, int stream_index) {
    const Moe *m = (const Moe *)context;
    const MoeFfnArgs *args = m->args;
    const int64_t hidden = args->hidden_size, inner = args->intermediate_size;
    const int64_t begin = m->begin[e], rows = m->begin[e + 1] - begin;
    Gemm gate_up = expert_gemm(m, rows, 2 * inner, hidden, row_of(m, m->scratch.x, begin, hidden),
                               expert_of(args->weight_gate_up, e, 2 * inner, hidden, m->element),
                               row_of(m, args->gate_up, begin, 2 * inner));
    gate_up.transpose_b = true;
    TRY(gemm_run(m->b, &gate_up, stream_index));
    if (!args->out) return STATUS_OK;
    const Swiglu swiglu = expert_swiglu(m, e);
    TRY(swiglu_forward(m->b, &swiglu, stream));
    return down_expert(m, e, stream, stream_index);
}

static Status down(const Moe *m) {
    const MoeFfnArgs *args = m->args;
    bool done;
    TRY(grouped_rows(m, m->scratch.activation, args->intermediate_size, args->weight_down,
                     args->hidden_size, true, m->scratch.rows, &done));
    return done ? STATUS_OK : over_experts(m, down_expert);
}

Status cuda_moe_ffn_forward(Backend *base, const MoeFfnArgs *args) {
    if (args->tokens == 0) return STATUS_OK;
    Moe m = {};
    bool fused;
    TRY(moe_open(base, args, false, &m));
    TRY(counts_start(m.b, args->routing.expert_begin, args->num_experts));
    TRY(gather_tokens(&m, args->x, m.scratch.x));
    TRY(moe_counts(&m));
    TRY(fused_forward(&m, &fused));
    if (!fused) TRY(over_experts(&m, forward_expert));
    if (!args->out) return STATUS_OK;
    if (fused) TRY(down(&m));
    return combine(&m, args->out);
}

// --- Backward ----------------------------------------------------------------------------------

// grad (out_rows, columns) of expert e += leftᵀ · right over its rows.
static Status weight_gradient(const Moe *m, int e, int stream_index, const void *left,
                              int64_t out_rows, const void *right, int64_t columns, void *grad) {
    const int64_t begin = m->begin[e];
    const DType type = m->b->base.grad_dtype;
    Gemm g = expert_gemm(m, out_rows, columns, m->begin[e + 1] - begin,
                         row_of(m, left, begin, out_rows), row_of(m, right, begin, columns),
                         expert_of(grad, e, out_rows, columns, dtype_bytes(type)));
    g.dtype_c = type;
    g.transpose_a = true;
    g.beta = m->args->grad_assign ? 0.0f : 1.0f;
    return gemm_run(m->b, &g, stream_index);
}

static Status grad_down_expert(const void *context, int e, cudaStream_t, int stream_index) {
    const Moe *m = (const Moe *)context;
    const MoeFfnArgs *args = m->args;
    return weight_gradient(m, e, stream_index, m->scratch.dout, args->hidden_size,
                           m->scratch.activation, args->intermediate_size, args->grad_down);
}

static Status grad_gate_up_expert(const void *context, int e, cudaStream_t, int stream_index) {
    const Moe *m = (const Moe *)context;
    const MoeFfnArgs *args = m->args;
    return weight_gradient(m, e, stream_index, m->scratch.dgate_up,
                           2 * (int64_t)args->intermediate_size, m->scratch.x, args->hidden_size,
                           args->grad_gate_up);
}

static Status dx_expert(const void *context, int e, cudaStream_t, int stream_index) {
    const Moe *m = (const Moe *)context;
    const MoeFfnArgs *args = m->args;
    const int64_t hidden = args->hidden_size, inner = args->intermediate_size;
    const int64_t begin = m->begin[e], rows = m->begin[e + 1] - begin;
    const Gemm dx =
        expert_gemm(m, rows, hidden, 2 * inner, row_of(m, m->scratch.dgate_up, begin, 2 * inner),
                    expert_of(args->weight_gate_up, e, 2 * inner, hidden, m->element),
                    row_of(m, m->scratch.rows, begin, hidden));
    return gemm_run(m->b, &dx, stream_index);
}

static Status backward_expert(const void *context, int e, cudaStream_t stream, int stream_index) {
    const Moe *m = (const Moe *)context;
    const MoeFfnArgs *args = m->args;
    const MoeScratch *scratch = &m->scratch;
    const int64_t hidden = args->hidden_size, inner = args->intermediate_size;
    const int64_t begin = m->begin[e], rows = m->begin[e + 1] - begin;
    const Gemm dactivation =
        expert_gemm(m, rows, inner, hidden, row_of(m, scratch->dout, begin, hidden),
                    expert_of(args->weight_down, e, hidden, inner, m->element),
                    row_of(m, scratch->activation, begin, inner));
    TRY(gemm_run(m->b, &dactivation, stream_index));
    Swiglu swiglu = expert_swiglu(m, e);
    swiglu.dactivation = swiglu.activation; // in place
    swiglu.dgate_up = row_of(m, scratch->dgate_up, begin, 2 * inner);
    swiglu.dscale = args->dgate;
    TRY(swiglu_backward(m->b, &swiglu, stream));
    TRY(dx_expert(m, e, stream, stream_index));
    TRY(grad_down_expert(m, e, stream, stream_index));
    return grad_gate_up_expert(m, e, stream, stream_index);
}

// over_experts() has nothing to do for an expert without rows, whose gradient is zeros then.
static Status zero_idle(const Moe *m, ExpertWork gradient) {
    for (int e = 0; e < m->args->num_experts && m->args->grad_assign; e++)
        if (m->begin[e + 1] == m->begin[e]) TRY(gradient(m, e, m->b->stream, 0));
    return STATUS_OK;
}

static Status dx(const Moe *m) {
    const MoeFfnArgs *args = m->args;
    bool done;
    TRY(grouped_rows(m, m->scratch.dgate_up, 2 * args->intermediate_size, args->weight_gate_up,
                     args->hidden_size, false, m->scratch.rows, &done));
    return done ? STATUS_OK : over_experts(m, dx_expert);
}

static Status grad_down(const Moe *m) {
    const MoeFfnArgs *args = m->args;
    bool done;
    TRY(grouped_gradient(m, m->scratch.dout, args->hidden_size, m->scratch.activation,
                         args->intermediate_size, args->grad_down, &done));
    if (done) return STATUS_OK;
    TRY(over_experts(m, grad_down_expert));
    return zero_idle(m, grad_down_expert);
}

static Status grad_gate_up(const Moe *m) {
    const MoeFfnArgs *args = m->args;
    bool done;
    TRY(grouped_gradient(m, m->scratch.dgate_up, 2 * args->intermediate_size, m->scratch.x,
                         args->hidden_size, args->grad_gate_up, &done));
    if (done) return STATUS_OK;
    TRY(over_experts(m, grad_gate_up_expert));
    return zero_idle(m, grad_gate_up_expert);
}

// Without a token nobody has rows, and nothing is launched.
static Status zero_all_gradients(CudaBackend *b, const MoeFfnArgs *args) {
    const size_t down = (size_t)args->num_experts * (size_t)args->hidden_size *
                        (size_t)args->intermediate_size * dtype_bytes(b->base.grad_dtype);
    b->current_op = "moe_ffn_backward";
    CUDA_TRY(b, cudaMemsetAsync(args->grad_gate_up, 0, 2 * down, b->stream));
    CUDA_TRY(b, cudaMemsetAsync(args->grad_down, 0, down, b->stream));
    return STATUS_OK;
}

static Status products_of_each(const Moe *m) {
    TRY(over_experts(m, backward_expert));
    TRY(zero_idle(m, grad_down_expert));
    return zero_idle(m, grad_gate_up_expert);
}

static Status products_of_all(const Moe *m) {
    TRY(dx(m));
    TRY(grad_down(m));
    return grad_gate_up(m);
}

Status cuda_moe_ffn_backward(Backend *base, const MoeFfnArgs *args) {
    if (args->tokens == 0)
        return args->grad_assign ? zero_all_gradients(cuda_of(base), args) : STATUS_OK;
    Moe m = {};
    bool fused;
    TRY(moe_open(base, args, true, &m));
    TRY(counts_start(m.b, args->routing.expert_begin, args->num_experts));
    TRY(gather_tokens(&m, args->dout, m.scratch.dout));
    TRY(gather_tokens(&m, args->x, m.scratch.x));
    TRY(moe_counts(&m));
    TRY(fused_backward(&m, &fused));
    TRY(fused ? products_of_all(&m) : products_of_each(&m));
    return combine(&m, args->dx);
}
