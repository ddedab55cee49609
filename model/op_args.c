// Which buffer is what, for every op.
//
// The residual stream x runs through the layers; each half of a layer reads a normed copy of it and
// leaves a branch that the next norm adds:
//
//   input = middle(before) + branch   normed = norm(input)    branch = attention(normed)
//   middle = input + branch           normed = norm(middle)   branch = mlp(normed)
//
// so that adding and norming is one op. Backward keeps the stream's gradient in d_stream: it is the
// gradient of the branch, too, and the norm's backward adds what came back through the branch.
#include "model/op_args.h"

// --- Addresses -----------------------------------------------------------------------------------

static void *at(const Model *model, void *arena, DType dtype, int64_t offset) {
    if (!arena || offset < 0) return NULL;
    return (char *)arena + tensor_table_copy_bytes(&model->table, dtype, offset);
}

static void *weight(const Model *model, int64_t offset) {
    return at(model, model->params, model->backend->compute_dtype, offset);
}

static void *gradient(const Model *model, int64_t offset) {
    if (!model->grads || offset < 0) return NULL;
    return (char *)model->grads + model_gradient_bytes(model, offset);
}

// --- Embedding and norms -------------------------------------------------------------------------

EmbedArgs args_embed(const Pass *p) {
    const Model *m = p->model;
    return (EmbedArgs){
        .tokens = p->tokens,
        .hidden_size = m->config.hidden_size,
        .vocab_size = m->config.vocab_size,
        .ids = m->activations->ids,
        .weight = weight(m, m->table.embed),
        .out = m->activations->layers[0].input,
        .dout = m->activations->d_stream,
        .grad_weight = gradient(m, m->table.embed),
    };
}

// The members that all norms share.
static RmsNormArgs norm_args(const Pass *p, int64_t offset) {
    const Model *m = p->model;
    return (RmsNormArgs){
        .tokens = p->tokens,
        .hidden_size = m->config.hidden_size,
        .epsilon = (float)m->config.rms_norm_eps,
        .y = m->activations->branch,
        .weight = weight(m, offset),
        .dout = m->activations->d_normed,
        .dx = m->activations->d_stream,
        .grad_weight = gradient(m, offset),
    };
}

RmsNormArgs args_input_norm(const Pass *p, int layer) {
    const Activations *a = p->model->activations;
    const LayerActivations *l = &a->layers[layer];
    RmsNormArgs args = norm_args(p, p->model->table.layers[layer].input_norm);
    args.x = layer ? a->layers[layer - 1].middle : l->input; // the embedding is in place already
    if (layer == 0) args.y = NULL;
    args.x_out = l->input;
    args.out = l->input_normed;
    args.inv_rms = l->input_inv_rms;
    return args;
}

RmsNormArgs args_middle_norm(const Pass *p, int layer) {
    const LayerActivations *l = &p->model->activations->layers[layer];
    RmsNormArgs args = norm_args(p, p->model->table.layers[layer].post_norm);
    args.x = l->input;
    args.x_out = l->middle;
    args.out = l->middle_normed;
    args.inv_rms = l->middle_inv_rms;
    return args;
}

RmsNormArgs args_output_norm(const Pass *p) {
    const Activations *a = p->model->activations;
    RmsNormArgs args = norm_args(p, p->model->table.final_norm);
    args.x = a->layers[p->model->config.num_layers - 1].middle;
    args.x_out = a->output;
    args.out = a->output_normed;
    args.inv_rms = a->output_inv_rms;
    return args;
}

// --- Attention -----------------------------------------------------------------------------------

LinearArgs args_qkv(const Pass *p, int layer) {
    const Model *m = p->model;
    const Activations *a = m->activations;
    const LayerOffsets *offsets = &m->table.layers[layer];
    return (LinearArgs){
        .tokens = p->tokens,
        .in_features = m->config.hidden_size,
        .out_features = config_qkv_size(&m->config),
        .x = a->layers[layer].input_normed,
        .weight = weight(m, offsets->qkv_weight),
        .bias = weight(m, offsets->qkv_bias),
        .out = a->layers[layer].qkv,
        .dout = a->d_qkv,
        .dx = a->d_normed,
        .grad_assign = p->first_gradients,
        .grad_weight = gradient(m, offsets->qkv_weight),
        .grad_bias = gradient(m, offsets->qkv_bias),
    };
}

RopeArgs args_rope(const Pass *p, int layer) {
    const Model *m = p->model;
    const Activations *a = m->activations;
    const LayerOffsets *offsets = &m->table.layers[layer];
    return (RopeArgs){
        .batch = p->batch,
        .sequence_length = p->sequence_length,
        .num_heads = m->config.num_heads,
        .num_kv_heads = m->config.num_kv_heads,
        .head_dim = m->config.head_dim,
        .theta = m->config.rope_theta,
        .epsilon = (float)m->config.rms_norm_eps,
        .qkv = a->layers[layer].qkv,
        .q_norm = weight(m, offsets->q_norm),
        .k_norm = weight(m, offsets->k_norm),
        .out = a->layers[layer].rotated,
        .inv_rms = a->layers[layer].qk_inv_rms,
        .dout = a->d_qkv,
        .dqkv = a->d_qkv,
        .grad_q_norm = gradient(m, offsets->q_norm),
        .grad_k_norm = gradient(m, offsets->k_norm),
    };
}

AttentionArgs args_attention(const Pass *p, int layer) {
    const Model *m = p->model;
    const Activations *a = m->activations;
    const LayerActivations *l = &a->layers[layer];
    return (AttentionArgs){
        .batch = p->batch,
        .sequence_length = p->sequence_length,
        .num_heads = m->config.num_heads,
        .num_kv_heads = m->config.num_kv_heads,
        .head_dim = m->config.head_dim,
        .qkv = l->rotated,
        .document_start = p->documents ? a->document_start : NULL,
        .out = l->attention,
        .log_sum_exp = l->log_sum_exp,
        .dout = a->d_attention,
        .dqkv = a->d_qkv,
    };
}

LinearArgs args_attention_output(const Pass *p, int layer) {
    const Model *m = p->model;
    const Activations *a = m->activations;
    int64_t offset = m->table.layers[layer].o_weight;
    return (LinearArgs){
        .tokens = p->tokens,
        .in_features = m->config.num_heads * m->config.head_dim,
        .out_features = m->config.hidden_size,
        .x = a->layers[layer].attention,
        .weight = weight(m, offset),
        .out = a->branch,
        .dout = a->d_stream,
        .dx = a->d_attention,
        .grad_assign = p->first_gradients,
        .grad_weight = gradient(m, offset),
    };
}

// --- MLPs ----------------------------------------------------------------------------------------

FfnArgs args_ffn(const Pass *p, int layer) {
    const Model *m = p->model;
    const Activations *a = m->activations;
    const LayerActivations *l = &a->layers[layer];
    const LayerOffsets *offsets = &m->table.layers[layer];
    return (FfnArgs){
        .tokens = p->tokens,
        .hidden_size = m->config.hidden_size,
        .intermediate_size = m->config.intermediate_size,
        .x = l->middle_normed,
        .weight_gate_up = weight(m, offsets->gate_up),
        .weight_down = weight(m, offsets->down),
        .out = a->branch,
        .gate_up = l->gate_up,
        .activation = l->activation,
        .dout = a->d_stream,
        .dx = a->d_normed,
        .grad_assign = p->first_gradients,
        .grad_gate_up = gradient(m, offsets->gate_up),
        .grad_down = gradient(m, offsets->down),
    };
}

RouteArgs args_route(const Pass *p, int layer) {
    const Model *m = p->model;
    const Activations *a = m->activations;
    const LayerActivations *l = &a->layers[layer];
    const LayerConfig *config = &m->config.layers[layer];
    const RouterConfig *router = &m->config.router;
    int64_t offset = m->table.layers[layer].router;
    RouteArgs args = {
        .tokens = p->tokens,
        .hidden_size = m->config.hidden_size,
        .num_experts = config->num_experts,
        .top_k = config->top_k,
        .gate_kind = router->gate,
        .gate_scale = router->gate_scale,
        .x = router->input_is_raw ? l->middle : l->middle_normed,
        .weight = weight(m, offset),
        .routing = l->routing,
        .dgate = a->d_gate,
        // The MLP's backward has left its gradient in d_normed; that of a raw input goes straight
        // to the stream.
        .dx = router->input_is_raw ? a->d_stream : a->d_normed,
        .grad_weight = gradient(m, offset),
    };
    if (a->use_selection_bias) args.selection_bias = a->selection_bias + layer * a->stride;
    if (p->weights) {
        double tokens = p->weights->token_count;
        args.balance_scale = (float)(p->weights->balance * config->num_experts / tokens);
        args.z_scale = (float)(p->weights->z / tokens);
        if (!p->weights->balance_micro) args.load = a->load + layer * a->stride;
    }
    return args;
}

RouterLossArgs args_router_loss(const Pass *p, int layer) {
    const Model *m = p->model;
    return (RouterLossArgs){
        .tokens = p->tokens,
        .num_experts = m->config.layers[layer].num_experts,
        .top_k = m->config.layers[layer].top_k,
        .routing = m->activations->layers[layer].routing,
        .sums = activations_layer_sums(m, layer),
    };
}

MoeFfnArgs args_moe_ffn(const Pass *p, int layer) {
    const Model *m = p->model;
    const Activations *a = m->activations;
    const LayerActivations *l = &a->layers[layer];
    const LayerOffsets *offsets = &m->table.layers[layer];
    return (MoeFfnArgs){
        .tokens = p->tokens,
        .hidden_size = m->config.hidden_size,
        .intermediate_size = m->config.moe_intermediate_size,
        .num_experts = m->config.layers[layer].num_experts,
        .top_k = m->config.layers[layer].top_k,
        .x = l->middle_normed,
        .weight_gate_up = weight(m, offsets->gate_up),
        .weight_down = weight(m, offsets->down),
        .routing = l->routing,
        .out = a->branch,
        .gate_up = l->gate_up,
        .dout = a->d_stream,
        .dx = a->d_normed,
        .dgate = a->d_gate,
        .grad_assign = p->first_gradients,
        .grad_gate_up = gradient(m, offsets->gate_up),
        .grad_down = gradient(m, offsets->down),
    };
}

// Rows of a matrix (R, width) of the compute dtype.
static void *rows_from(const Model *m, const void *matrix, int64_t row, int64_t width) {
    const int64_t element = (int64_t)dtype_bytes(m->backend->compute_dtype);
    return matrix ? (char *)matrix + row * width * element : NULL;
}

MoeFfnArgs args_received(const Pass *p, int layer, int64_t begin, int64_t rows, int call) {
    const Model *m = p->model;
    const TravelBuffers *travel = &m->activations->rows;
    const ReceivedRows *received = &m->activations->layers[layer].received;
    const RowBuffers *kept = received->place < 0 ? &travel->scratch : &travel->pool;
    const int64_t at = begin + (received->place < 0 ? 0 : received->place);
    MoeFfnArgs args = args_moe_ffn(p, layer);
    args.tokens = rows;
    args.num_experts /= m->options.expert_ranks;
    args.top_k = 1;
    args.x = rows_from(m, kept->x, at, args.hidden_size);
    args.gate_up = rows_from(m, kept->gate_up, at, 2 * (int64_t)args.intermediate_size);
    args.out = args.dx = rows_from(m, travel->out, begin, args.hidden_size);
    args.dout = rows_from(m, travel->dout, begin, args.hidden_size);
    args.dgate = travel->d_gate ? travel->d_gate + begin : NULL;
    args.routing = (Routing){0};
    if (!kept->gate) return args; // planning
    args.routing.gate = kept->gate + at;
    args.routing.slot_of_row = kept->slot_of_row + at;
    args.routing.row_of_slot = kept->row_of_slot + at;
    args.routing.expert_begin = received->expert_begin + call * (args.num_experts + 1);
    return args;
}

// --- The end -------------------------------------------------------------------------------------

// With weights, the same call makes the gradients: d_normed is that of the output norm's rows, and
// the weight's goes to the LM head, which is the embedding's own when they are tied.
LinearCrossEntropyArgs args_loss(const Pass *p) {
    const Model *m = p->model;
    const Activations *a = m->activations;
    LinearCrossEntropyArgs args = {
        .tokens = p->tokens,
        .hidden_size = m->config.hidden_size,
        .vocab_size = m->config.vocab_size,
        .chunk_tokens = m->options.loss_chunk_tokens,
        .x = a->output_normed,
        .weight = weight(m, m->table.lm_head),
        .targets = a->targets,
        .loss_sum = a->sums,
        .loss_count = a->sums ? a->sums + 1 : NULL,
    };
    if (p->weights) {
        args.grad_scale =
            p->weights->target_count > 0 ? (float)(1.0 / p->weights->target_count) : 0.0f;
        args.dx = a->d_normed;
        args.grad_assign = p->first_gradients;
        args.grad_weight = gradient(m, m->table.lm_head);
    }
    return args;
}

LinearArgs args_logits(const Pass *p, int64_t first, int64_t rows) {
    const Model *m = p->model;
    const Activations *a = m->activations;
    size_t row_bytes = (size_t)m->config.hidden_size * dtype_bytes(m->backend->compute_dtype);
    return (LinearArgs){
        .tokens = rows,
        .in_features = m->config.hidden_size,
        .out_features = m->config.vocab_size,
        .x = a->output_normed ? (char *)a->output_normed + (size_t)first * row_bytes : NULL,
        .weight = weight(m, m->table.lm_head),
        .out = a->logits,
    };
}

// --- Workspace -----------------------------------------------------------------------------------

typedef struct Need {
    Backend *backend;
    size_t bytes;
} Need;

static void need(Need *n, OpKind op, const void *args) {
    size_t bytes = n->backend->ops->workspace_bytes(n->backend, op, args);
    if (bytes > n->bytes) n->bytes = bytes;
}

static void need_layer(Need *n, const Pass *p, int layer) {
    RmsNormArgs norm = args_input_norm(p, layer);
    LinearArgs qkv = args_qkv(p, layer), output = args_attention_output(p, layer);
    RopeArgs rope = args_rope(p, layer);
    AttentionArgs attention = args_attention(p, layer);
    need(n, OP_RMSNORM, &norm);
    need(n, OP_LINEAR, &qkv);
    need(n, OP_LINEAR, &output);
    need(n, OP_ROPE, &rope);
    need(n, OP_ATTENTION, &attention);
    if (!config_layer_is_moe(&p->model->config, layer)) {
        FfnArgs ffn = args_ffn(p, layer);
        need(n, OP_FFN, &ffn);
        return;
    }
    RouteArgs route = args_route(p, layer);
    RouterLossArgs loss = args_router_loss(p, layer);
    const int group = p->model->options.expert_ranks;
    const int64_t most = p->tokens * route.top_k * group;
    MoeFfnArgs moe = group > 1 ? args_received(p, layer, 0, most, 0) : args_moe_ffn(p, layer);
    need(n, OP_ROUTE, &route);
    need(n, OP_ROUTER_LOSS, &loss);
    need(n, OP_MOE_FFN, &moe);
}

static void need_pass(Need *n, const Pass *p) {
    const Model *m = p->model;
    EmbedArgs embed = args_embed(p);
    LinearCrossEntropyArgs loss = args_loss(p);
    LinearArgs logits = args_logits(p, 0, m->activations->logits_rows);
    RowSimilarityArgs similarity = {.tokens = p->tokens, .hidden_size = m->config.hidden_size};
    for (int layer = 0; layer < m->config.num_layers; layer++) need_layer(n, p, layer);
    need(n, OP_EMBED, &embed);
    need(n, OP_LINEAR_CROSS_ENTROPY, &loss);
    need(n, OP_LINEAR, &logits);
    need(n, OP_ROW_SIMILARITY, &similarity);
}

// A micro-batch holds up to B sequences of S tokens, or one sequence of up to B*S (model_logits).
size_t args_workspace_bytes(Model *model) {
    const ModelOptions *o = &model->options;
    int64_t tokens = o->micro_batch * o->sequence_length, elements = model->table.total;
    Need n = {.backend = model->backend};
    Pass batch = {model, o->micro_batch, o->sequence_length, tokens, true, NULL, false, false};
    Pass single = {model, 1, tokens, tokens, true, NULL, false, false};
    need_pass(&n, &batch);
    need_pass(&n, &single);
    if (o->training) {
        AdamwArgs adamw = {.count = elements};
        need(&n, OP_ADAMW, &adamw);
        need(&n, OP_NORM2, &elements);
    }
    return n.bytes;
}
