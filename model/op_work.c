// The work of each op, as op_work.h counts it. T, H, I, V, N and k as in backend.h; `e` is the size
// of an activation or weight, `g` of a gradient.
#include "model/op_work.h"

enum { F32 = sizeof(float), I32 = sizeof(int32_t) };

typedef struct Sizes {
    double e, g;
} Sizes;

static double at_most(double value, double limit) {
    return value < limit ? value : limit;
}

// An operand of an op that may be NULL.
static double given(const void *operand, double bytes) {
    return operand ? bytes : 0;
}

// --- Embedding and norms -------------------------------------------------------------------------

static OpWork embed_work(Sizes s, const EmbedArgs *a, OpPass pass) {
    double tokens = (double)a->tokens, rows = at_most(tokens, a->vocab_size);
    double touched = pass == PASS_FORWARD ? rows * s.e : 2 * rows * s.g;
    return (OpWork){0, tokens * I32 + (tokens * s.e + touched) * a->hidden_size};
}

static OpWork rmsnorm_work(Sizes s, const RmsNormArgs *a, OpPass pass) {
    double tokens = (double)a->tokens, row = a->hidden_size * s.e;
    if (pass == PASS_BACKWARD) // x_out, dout and dx, which is read and written
        return (OpWork){0, tokens * (4 * row + F32) + row + 2 * a->hidden_size * s.g};
    // Without y and with x_out = x the stream stays as it is.
    int rows = 2 + (a->y ? 1 : 0) + (a->y || a->x_out != a->x ? 1 : 0);
    return (OpWork){0, tokens * (rows * row + F32) + row};
}

// --- Attention -----------------------------------------------------------------------------------

static OpWork linear_work(Sizes s, const LinearArgs *a, OpPass pass) {
    double tokens = (double)a->tokens, in = a->in_features, out = a->out_features;
    double weights = in * out, product = 2 * tokens * weights;
    if (pass == PASS_FORWARD)
        return (OpWork){product, (tokens * (in + out) + weights + given(a->bias, out)) * s.e};
    double bytes =
        tokens * (in + out) * s.e + 2 * weights * s.g + given(a->grad_bias, 2 * out * s.g);
    if (!a->dx) return (OpWork){product, bytes};
    double dx = tokens * in * s.e * (a->dx_accumulate ? 2 : 1);
    return (OpWork){2 * product, bytes + dx + weights * s.e};
}

static OpWork rope_work(Sizes s, const RopeArgs *a, OpPass pass) {
    double tokens = (double)(a->batch * a->sequence_length);
    double turned = a->num_heads + a->num_kv_heads, heads = turned + a->num_kv_heads;
    double head = a->head_dim * s.e;
    bool in_place = pass == PASS_FORWARD ? a->out == a->qkv : a->dqkv == a->dout;
    double bytes = tokens * 2 * (in_place ? turned : heads) * head; // v stays where it is
    if (!a->q_norm) return (OpWork){0, bytes};
    bytes += tokens * turned * F32 + 2 * head;
    if (pass == PASS_BACKWARD) bytes += tokens * turned * head + 2 * 2 * a->head_dim * s.g;
    return (OpWork){0, bytes};
}

static OpWork attention_work(Sizes s, const AttentionArgs *a, OpPass pass) {
    double tokens = (double)(a->batch * a->sequence_length);
    double width = (double)a->num_heads * a->head_dim;
    double row = (width + 2.0 * a->num_kv_heads * a->head_dim) * s.e;
    double product = 2 * tokens * (double)a->sequence_length * width / 2;
    double common =
        tokens * (row + width * s.e + a->num_heads * F32) + given(a->document_start, tokens * I32);
    if (pass == PASS_FORWARD) return (OpWork){2 * product, common};
    return (OpWork){5 * product, common + tokens * (row + width * s.e)};
}

// --- MLPs ----------------------------------------------------------------------------------------

static OpWork ffn_work(Sizes s, const FfnArgs *a, OpPass pass) {
    double tokens = (double)a->tokens, hidden = a->hidden_size, inner = a->intermediate_size;
    double weights = 3 * hidden * inner, product = 2 * tokens * hidden * inner;
    double kept = tokens * (2 * inner + given(a->activation, inner));
    if (pass == PASS_BACKWARD)
        return (OpWork){6 * product,
                        (3 * tokens * hidden + kept + weights) * s.e + 2 * weights * s.g};
    if (!a->out) weights = 2 * hidden * inner;
    double rows = tokens * hidden * (a->out ? 2 : 1);
    return (OpWork){(a->out ? 3 : 2) * product, (rows + kept + weights) * s.e};
}

// expert, slot_of_row and row_of_slot, and where each expert begins.
static double routing_bytes(double slots, int experts) {
    return (3 * slots + experts + 1) * I32;
}

static OpWork route_work(Sizes s, const RouteArgs *a, OpPass pass) {
    double tokens = (double)a->tokens, experts = a->num_experts, slots = tokens * a->top_k;
    double weights = a->hidden_size * experts, product = 2 * tokens * weights;
    double row = a->hidden_size * s.e;
    double bytes = tokens * (row + experts * F32 + F32) + weights * F32 + slots * F32;
    if (pass == PASS_FORWARD)
        return (OpWork){product, bytes + routing_bytes(slots, a->num_experts) +
                                     given(a->selection_bias, experts * F32)};
    // Read: the experts chosen, dgate, the load; dx and the gradient are read and written.
    return (OpWork){2 * product, bytes + slots * (I32 + F32) + experts * F32 + 2 * tokens * row +
                                     2 * weights * F32};
}

static OpWork router_loss_work(const RouterLossArgs *a) {
    double tokens = (double)a->tokens, sums = 2 * (2.0 * a->num_experts + 2) * sizeof(double);
    return (OpWork){0, tokens * (a->num_experts + 1) * F32 + (a->num_experts + 1) * I32 + sums};
}

static OpWork moe_ffn_work(Sizes s, const MoeFfnArgs *a, OpPass pass) {
    double tokens = (double)a->tokens, hidden = a->hidden_size, inner = a->intermediate_size;
    double rows = tokens * a->top_k, reached = at_most(a->num_experts, rows);
    double weights = 3 * hidden * inner * reached, product = 2 * rows * hidden * inner;
    double kept = rows * 2 * inner, lists = routing_bytes(rows, a->num_experts);
    if (pass == PASS_BACKWARD)
        return (OpWork){6 * product, (3 * tokens * hidden + kept + weights) * s.e +
                                         2 * weights * s.g + 2 * rows * F32 + lists};
    if (!a->out)
        return (OpWork){2 * product, (tokens * hidden + kept + weights * 2 / 3) * s.e + lists};
    return (OpWork){3 * product, (2 * tokens * hidden + kept + weights) * s.e + rows * F32 + lists};
}

// An index names no value twice, so that `divisor` rows of out share one of in.
static OpWork gather_rows_work(const GatherRowsArgs *a) {
    double rows = (double)a->rows, read = (double)((a->rows + a->divisor - 1) / a->divisor);
    return (OpWork){0, rows * I32 + (read + rows) * (double)a->row_bytes};
}

static OpWork combine_rows_work(Sizes s, const CombineRowsArgs *a) {
    double tokens = (double)a->tokens, slots = tokens * a->top_k;
    return (OpWork){0, slots * I32 + (slots + tokens) * a->hidden_size * s.e};
}

// --- The end of the model, and the optimizer -----------------------------------------------------

static OpWork cross_entropy_work(Sizes s, const LinearCrossEntropyArgs *a) {
    double tokens = (double)a->tokens, hidden = a->hidden_size;
    double weights = hidden * a->vocab_size, product = 2 * tokens * weights;
    int products = 1 + (a->dx ? 1 : 0) + (a->grad_weight ? 1 : 0);
    double bytes = (tokens * hidden + weights + given(a->dx, tokens * hidden)) * s.e +
                   given(a->grad_weight, 2 * weights * s.g) + tokens * I32 +
                   given(a->token_loss, tokens * F32);
    return (OpWork){products * product, bytes};
}

static OpWork adamw_work(const AdamwArgs *a) {
    double copy = given(a->copy, (double)dtype_bytes(a->copy_dtype));
    double each = 3 * 2 * F32 + (double)dtype_bytes(a->grad_dtype) + copy;
    return (OpWork){0, (double)a->count * each};
}

OpWork op_work_norm2(DType dtype, int64_t count) {
    return (OpWork){0, (double)count * (double)dtype_bytes(dtype)};
}

OpWork op_work_add(DType dtype, int64_t count) {
    return (OpWork){0, 3 * (double)count * (double)dtype_bytes(dtype)};
}

OpWork op_work_cast(DType to, DType from, int64_t count) {
    return (OpWork){0, (double)count * (double)(dtype_bytes(to) + dtype_bytes(from))};
}

// --- By name -------------------------------------------------------------------------------------

OpWork op_work(const Backend *backend, OpKind op, OpPass pass, const void *args) {
    Sizes s = {(double)dtype_bytes(backend->compute_dtype),
               (double)dtype_bytes(backend->grad_dtype)};
    switch (op) {
    case OP_EMBED:
        return embed_work(s, args, pass);
    case OP_RMSNORM:
        return rmsnorm_work(s, args, pass);
    case OP_LINEAR:
        return linear_work(s, args, pass);
    case OP_ROPE:
        return rope_work(s, args, pass);
    case OP_ATTENTION:
        return attention_work(s, args, pass);
    case OP_FFN:
        return ffn_work(s, args, pass);
    case OP_ROUTE:
        return route_work(s, args, pass);
    case OP_ROUTER_LOSS:
        return router_loss_work(args);
    case OP_MOE_FFN:
        return moe_ffn_work(s, args, pass);
    case OP_LINEAR_CROSS_ENTROPY:
        return cross_entropy_work(s, args);
    case OP_ADAMW:
        return adamw_work(args);
    case OP_NORM2:
        return op_work_norm2(backend->grad_dtype, *(const int64_t *)args);
    case OP_ROW_SIMILARITY: {
        const RowSimilarityArgs *rows = args;
        return (OpWork){0, 2 * (double)rows->tokens * rows->hidden_size * s.e};
    }
    case OP_GATHER_ROWS:
        return gather_rows_work(args);
    case OP_COMBINE_ROWS:
        return combine_rows_work(s, args);
    case OP_KIND_COUNT:
        break;
    }
    return (OpWork){0, 0};
}

const char *op_name(OpKind op) {
    static const char *const names[OP_KIND_COUNT] = {
        [OP_EMBED] = "embed",
        [OP_RMSNORM] = "rmsnorm",
        [OP_LINEAR] = "linear",
        [OP_ROPE] = "rope",
        [OP_ATTENTION] = "attention",
        [OP_FFN] = "ffn",
        [OP_ROUTE] = "route",
        [OP_ROUTER_LOSS] = "router_loss",
        [OP_MOE_FFN] = "moe_ffn",
        [OP_LINEAR_CROSS_ENTROPY] = "linear_cross_entropy",
        [OP_ADAMW] = "adamw",
        [OP_NORM2] = "norm2",
        [OP_ROW_SIMILARITY] = "row_similarity",
        [OP_GATHER_ROWS] = "gather_rows",
        [OP_COMBINE_ROWS] = "combine_rows",
    };
    return names[op];
}

bool op_has_backward(OpKind op) {
    return op <= OP_MOE_FFN && op != OP_ROUTER_LOSS;
}

bool op_is_product(OpKind op) {
    return op == OP_LINEAR || op == OP_ATTENTION || op == OP_FFN || op == OP_MOE_FFN ||
           op == OP_LINEAR_CROSS_ENTROPY;
}

double model_flops_per_token(const ModelConfig *c, int64_t sequence_length) {
    double hidden = c->hidden_size, width = (double)c->num_heads * c->head_dim;
    double attention = hidden * (config_qkv_size(c) + width);
    double parameters = hidden * c->vocab_size + c->num_layers * attention;
    for (int l = 0; l < c->num_layers; l++) {
        const LayerConfig *layer = &c->layers[l];
        bool moe = config_layer_is_moe(c, l);
        double inner = moe ? (double)c->moe_intermediate_size * layer->top_k : c->intermediate_size;
        parameters += 3 * hidden * inner + (moe ? hidden * layer->num_experts : 0);
    }
    return 6 * parameters + 6 * c->num_layers * width * (double)sequence_length;
}
