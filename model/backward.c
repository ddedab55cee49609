// Backward: the same walk in reverse, over what the forward pass kept or can make again.
//
// d_stream is the gradient of the residual stream at the point reached so far. A branch's gradient
// is the stream's own, so each half of a layer sends d_stream back through its branch into
// d_normed, and the norm's backward adds the result to d_stream (op_args.c).
#include "model/expert_parallel.h"
#include "model/forward.h"
#include "model/replay.h"

// With `norms` recomputed, the normed rows are made again right before they are read. The stream
// holds the sum already, so this is the forward op without its addition.
static Status norm_again(const Pass *p, RmsNormArgs args) {
    const Recompute *recompute = &p->model->options.recompute;
    if (!recompute->norms || recompute->layer) return STATUS_OK;
    args.x = args.x_out;
    args.y = NULL;
    TRY(p->model->backend->ops->rmsnorm_forward(p->model->backend, &args));
    return STATUS_OK;
}

static Status backward_mlp(const Pass *p, int layer) {
    Backend *backend = p->model->backend;
    const BackendOps *ops = backend->ops;
    RmsNormArgs norm = args_middle_norm(p, layer);
    TRY(norm_again(p, norm));
    if (config_layer_is_moe(&p->model->config, layer)) {
        MoeFfnArgs moe = args_moe_ffn(p, layer);
        RouteArgs route = args_route(p, layer);
        if (p->model->experts)
            TRY(expert_parallel_backward(p, layer));
        else
            TRY(ops->moe_ffn_backward(backend, &moe));
        TRY(ops->route_backward(backend, &route));
    } else {
        FfnArgs ffn = args_ffn(p, layer);
        TRY(ops->ffn_backward(backend, &ffn));
    }
    TRY(ops->rmsnorm_backward(backend, &norm));
    return STATUS_OK;
}

static Status backward_attention(const Pass *p, int layer) {
    Backend *backend = p->model->backend;
    const BackendOps *ops = backend->ops;
    RmsNormArgs norm = args_input_norm(p, layer);
    LinearArgs qkv = args_qkv(p, layer), output = args_attention_output(p, layer);
    RopeArgs rope = args_rope(p, layer);
    AttentionArgs attention = args_attention(p, layer);
    TRY(ops->linear_backward(backend, &output));
    TRY(ops->attention_backward(backend, &attention));
    TRY(ops->rope_backward(backend, &rope));
    TRY(norm_again(p, norm));
    TRY(ops->linear_backward(backend, &qkv));
    TRY(ops->rmsnorm_backward(backend, &norm));
    return STATUS_OK;
}

// Nothing more is added to the matrices' gradients from element `from` on.
static Status final_from(const Pass *p, int64_t from) {
    const ModelHooks *hooks = p->model->hooks;
    if (!hooks || !hooks->gradients_final) return STATUS_OK;
    TRY(hooks->gradients_final(hooks->context, from));
    return STATUS_OK;
}

// Where ranks share gradients, those of the layer after the next lie where this layer's will.
static Status reuse(const Pass *p, int layer) {
    const Model *model = p->model;
    Backend *backend = model->backend;
    GradientGap gaps[GRADIENT_GAPS_MAX];
    if (model->window.layer == 0) return STATUS_OK;
    if (layer + 2 < model->config.num_layers)
        TRY(model->hooks->gradients_reused(model->hooks->context,
                                           model->table.layers[layer + 2].qkv_weight));
    const int count = gradient_gaps(&model->table, layer, gaps);
    for (int i = 0; i < count; i++)
        TRY(backend->ops->zero(backend,
                               (char *)model->grads + model_gradient_bytes(model, gaps[i].begin),
                               (size_t)gaps[i].count * dtype_bytes(backend->grad_dtype)));
    return STATUS_OK;
}

static Status backward_layer(const Pass *p, int layer) {
    Model *model = p->model;
    const LayerOffsets *at = &model->table.layers[layer];
    // The last layer's buffers still hold what the forward pass left there.
    if (model->options.recompute.layer && layer < model->config.num_layers - 1)
        TRY(forward_layer_again(p, layer));
    TRY(reuse(p, layer));
    TRY(backward_mlp(p, layer));
    TRY(final_from(p, at->gate_up));
    TRY(backward_attention(p, layer));
    return final_from(p, at->qkv_weight);
}

static Status backward_layers(const Pass *p) {
    Model *model = p->model;
    Backend *backend = model->backend;
    const Activations *a = model->activations;
    RmsNormArgs output = args_output_norm(p);
    size_t row_bytes = (size_t)model->config.hidden_size * dtype_bytes(backend->compute_dtype);
    TRY(backend->ops->zero(backend, a->d_stream, (size_t)p->tokens * row_bytes));
    TRY(backend->ops->rmsnorm_backward(backend, &output));
    for (int layer = model->config.num_layers - 1; layer >= 0; layer--)
        TRY(backward_layer(p, layer));
    EmbedArgs embed = args_embed(p);
    TRY(backend->ops->embed_backward(backend, &embed));
    return final_from(p, 0);
}

static Status run_pass(const Pass *p) {
    Backend *backend = p->model->backend;
    TRY(forward_layers(p));
    LinearCrossEntropyArgs loss = args_loss(p);
    TRY(forward_needs(p, p->model->table.vectors_begin));
    TRY(backend->ops->linear_cross_entropy(backend, &loss));
    if (p->model->table.lm_head != p->model->table.embed)
        TRY(final_from(p, p->model->table.lm_head));
    return backward_layers(p);
}

Status model_forward_backward(Model *model, const MicroBatch *batch, const LossWeights *weights) {
    INVARIANT(model->options.training && batch->targets != NULL);
    INVARIANT(weights->token_count > 0); // a divisor of the router losses' gradients
    INVARIANT(model->window.layer == 0 ||
              (model->no_gradients_yet && model->hooks && model->hooks->gradients_reused));
    Pass p;
    TRY(forward_begin(model, batch, weights, &p));
    p.first_gradients = model->no_gradients_yet;
    model->no_gradients_yet = false;
    model->activations->router_tokens += (double)p.tokens;
    return replay_run(model->replay, &p, run_pass);
}
