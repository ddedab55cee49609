// Forward: one walk over the layers for every family and layer kind.
#include "model/forward.h"
#include "model/expert_parallel.h"

// --- One layer -----------------------------------------------------------------------------------

static Status forward_attention(const Pass *p, int layer) {
    Backend *backend = p->model->backend;
    const BackendOps *ops = backend->ops;
    LinearArgs qkv = args_qkv(p, layer), output = args_attention_output(p, layer);
    RopeArgs rope = args_rope(p, layer);
    AttentionArgs attention = args_attention(p, layer);
    TRY(ops->linear_forward(backend, &qkv));
    TRY(ops->rope_forward(backend, &rope));
    TRY(ops->attention_forward(backend, &attention));
    TRY(ops->linear_forward(backend, &output));
    return STATUS_OK;
}

// `again`: only what backward reads, and the statistics have been taken already.
static Status forward_mlp(const Pass *p, int layer, bool again) {
    Backend *backend = p->model->backend;
    const BackendOps *ops = backend->ops;
    if (!config_layer_is_moe(&p->model->config, layer)) {
        FfnArgs ffn = args_ffn(p, layer);
        if (again) ffn.out = NULL;
        TRY(ops->ffn_forward(backend, &ffn));
        return STATUS_OK;
    }
    RouteArgs route = args_route(p, layer);
    TRY(ops->route_forward(backend, &route));
    if (p->statistics && !again) {
        RouterLossArgs loss = args_router_loss(p, layer);
        TRY(ops->router_loss(backend, &loss));
    }
    if (p->model->experts) return expert_parallel_forward(p, layer, again);
    MoeFfnArgs moe = args_moe_ffn(p, layer);
    if (again) moe.out = NULL;
    TRY(ops->moe_ffn_forward(backend, &moe));
    return STATUS_OK;
}

static Status observe(const Pass *p, int layer, ObservePoint point, const void *x) {
    const Activations *a = p->model->activations;
    if (!a->observer || p->weights) return STATUS_OK;
    TRY(a->observer(a->observer_context, layer, point, x, p->tokens));
    return STATUS_OK;
}

static Status forward_layer(const Pass *p, int layer) {
    Backend *backend = p->model->backend;
    RmsNormArgs input = args_input_norm(p, layer), middle = args_middle_norm(p, layer);
    TRY(backend->ops->rmsnorm_forward(backend, &input));
    // The output of a layer exists once the next norm has added its branch to the stream.
    if (layer > 0) TRY(observe(p, layer - 1, OBSERVE_LAYER_OUTPUT, input.x_out));
    TRY(forward_attention(p, layer));
    TRY(backend->ops->rmsnorm_forward(backend, &middle));
    TRY(observe(p, layer, OBSERVE_MLP_INPUT, middle.x_out));
    TRY(forward_mlp(p, layer, false));
    return STATUS_OK;
}

Status forward_layer_again(const Pass *p, int layer) {
    Backend *backend = p->model->backend;
    RmsNormArgs input = args_input_norm(p, layer), middle = args_middle_norm(p, layer);
    input.x = input.x_out; // the sum was kept
    input.y = NULL;
    TRY(backend->ops->rmsnorm_forward(backend, &input));
    TRY(forward_attention(p, layer));
    TRY(backend->ops->rmsnorm_forward(backend, &middle));
    TRY(forward_mlp(p, layer, true));
    return STATUS_OK;
}

Status forward_needs(const Pass *p, int64_t end) {
    const ModelHooks *hooks = p->model->hooks;
    if (!hooks || !hooks->weights_needed || !p->weights) return STATUS_OK;
    TRY(hooks->weights_needed(hooks->context, end));
    return STATUS_OK;
}

Status forward_layers(const Pass *p) {
    Model *model = p->model;
    Backend *backend = model->backend;
    EmbedArgs embed = args_embed(p);
    TRY(forward_needs(p, model->table.layers[0].qkv_weight));
    TRY(backend->ops->embed_forward(backend, &embed));
    for (int layer = 0; layer < model->config.num_layers; layer++) {
        TRY(forward_needs(p, tensor_table_layer_end(&model->table, layer)));
        TRY(forward_layer(p, layer));
    }
    RmsNormArgs output = args_output_norm(p);
    TRY(backend->ops->rmsnorm_forward(backend, &output));
    TRY(observe(p, model->config.num_layers - 1, OBSERVE_LAYER_OUTPUT, output.x_out));
    return STATUS_OK;
}

// --- The call ------------------------------------------------------------------------------------

static Status upload_ids(Backend *backend, int32_t *device, const int32_t *host, int64_t tokens) {
    return backend->ops->upload(backend, device, host, (size_t)tokens * sizeof *host);
}

Status forward_begin(Model *model, const MicroBatch *batch, const LossWeights *weights, Pass *p) {
    const ModelOptions *o = &model->options;
    const Activations *a = model->activations;
    int64_t rows = batch->batch, length = batch->sequence_length;
    bool as_planned =
        rows >= 1 && rows <= o->micro_batch && length >= 1 && length <= o->sequence_length;
    bool one_row = rows == 1 && length >= 1 && length <= o->micro_batch * o->sequence_length;
    if (!as_planned && !one_row) {
        FAIL(STATUS_INTERNAL,
             "a micro-batch of %lld x %lld tokens does not fit the %lld x %lld that memory was "
             "planned for",
             (long long)rows, (long long)length, (long long)o->micro_batch,
             (long long)o->sequence_length);
    }
    *p = (Pass){
        .model = model,
        .batch = rows,
        .sequence_length = length,
        .tokens = rows * length,
        .documents = batch->document_start != NULL,
        .weights = weights,
        .statistics = true,
    };
    Backend *backend = model->backend;
    expert_parallel_begin(model);
    backend->ops->set_workspace(backend, a->workspace, a->workspace_bytes);
    TRY(upload_ids(backend, a->ids, batch->tokens, p->tokens));
    if (batch->targets) TRY(upload_ids(backend, a->targets, batch->targets, p->tokens));
    if (batch->document_start)
        TRY(upload_ids(backend, a->document_start, batch->document_start, p->tokens));
    return STATUS_OK;
}

Status model_forward(Model *model, const MicroBatch *batch) {
    Pass p;
    TRY(forward_begin(model, batch, NULL, &p));
    model->activations->router_tokens += (double)p.tokens;
    TRY(forward_layers(&p));
    if (batch->targets) {
        LinearCrossEntropyArgs loss = args_loss(&p);
        TRY(model->backend->ops->linear_cross_entropy(model->backend, &loss));
    }
    return STATUS_OK;
}

Status model_logits(Model *model, const int32_t *ids, int64_t tokens, float *logits) {
    const Activations *a = model->activations;
    Backend *backend = model->backend;
    MicroBatch batch = {.batch = 1, .sequence_length = tokens, .tokens = ids};
    int64_t vocab = model->config.vocab_size;
    Pass p;
    TRY(forward_begin(model, &batch, NULL, &p));
    p.statistics = false;
    TRY(forward_layers(&p));
    for (int64_t first = 0; first < tokens; first += a->logits_rows) {
        int64_t rows = tokens - first < a->logits_rows ? tokens - first : a->logits_rows;
        LinearArgs linear = args_logits(&p, first, rows);
        TRY(backend->ops->linear_forward(backend, &linear));
        if (a->logits != (void *)a->logits_f32)
            TRY(backend->ops->cast(backend, DTYPE_F32, a->logits_f32, backend->compute_dtype,
                                   a->logits, rows * vocab));
        TRY(backend->ops->download(backend, logits + first * vocab, a->logits_f32,
                                   (size_t)(rows * vocab) * sizeof(float)));
    }
    return STATUS_OK;
}
