// The life of a model: plan, allocate, free; statistics and router state.
//
// model_plan and model_create share everything up to the allocation itself: a model without memory
// is built, its sizes are read off, and then it is either thrown away or given memory.
#include "model/model.h"

#include <stdlib.h>
#include <string.h>
#include "model/activations.h"
#include "model/op_args.h"
#include "model/replay.h"

// --- Planning ------------------------------------------------------------------------------------

// Assignments are numbered in int32 (Routing), so tokens times top_k must fit.
// With shared-out experts a rank may receive the rows of all.
static Status check_options(const ModelConfig *config, const ModelOptions *o) {
    const int group = o->expert_ranks > 1 ? o->expert_ranks : 1;
    int64_t top_k = 1, tokens;
    if (group > MODEL_EXPERT_RANKS_MAX)
        FAIL(STATUS_USAGE, "parallel.expert = %d: expected at most %d", group,
             MODEL_EXPERT_RANKS_MAX);
    if (group > 1 && !config_has_moe(config))
        FAIL(STATUS_USAGE, "parallel.expert = %d, but the model has no experts; set it to 1",
             group);
    for (int i = 0; i < config->num_layers; i++)
        if (config->layers[i].top_k > top_k) top_k = config->layers[i].top_k;
    if (o->micro_batch < 1 || o->sequence_length < 1) {
        FAIL(STATUS_USAGE, "micro_batch %lld x sequence_length %lld: expected at least 1 each",
             (long long)o->micro_batch, (long long)o->sequence_length);
    }
    if (__builtin_mul_overflow(o->micro_batch, o->sequence_length, &tokens) ||
        tokens > INT32_MAX / (top_k * group)) {
        FAIL(STATUS_USAGE,
             "micro_batch %lld x sequence_length %lld x top_k %lld x expert ranks %d is more than "
             "2^31 - 1; use a smaller micro_batch",
             (long long)o->micro_batch, (long long)o->sequence_length, (long long)top_k, group);
    }
    return STATUS_OK;
}

Status model_table(const ModelConfig *config, const ModelOptions *options, TensorTable *out) {
    const int ranks = options->ranks > 1 ? options->ranks : 1;
    const bool by_section = options->share_gradients || options->expert_ranks > 1;
    const TableLayout layout = {.section = (by_section ? ranks : 1) * (int64_t)TENSOR_ALIGN,
                                .expert_ranks = options->expert_ranks,
                                .expert_rank = options->expert_rank};
    TRY(tensor_table_build_layout(config, &layout, out));
    Status status = tensor_table_pad(out, ranks);
    if (status != STATUS_OK) tensor_table_free(out);
    return status;
}

// A model with a table and a layout, but no device memory.
static Status create_shell(Backend *backend, const ModelConfig *config, const ModelOptions *options,
                           Model **out) {
    TRY(config_validate(config, "model"));
    TRY(check_options(config, options));
    Status status = STATUS_OK;
    Model *model = calloc(1, sizeof *model);
    if (!model) FAIL(STATUS_INTERNAL, "out of memory for a model");
    model->backend = backend;
    model->config = *config;
    model->options = *options;
    TRY_GOTO(model_table(config, options, &model->table), fail);
    if (options->share_gradients) model->window = gradient_window(&model->table);
    TRY_GOTO(activations_create(model), fail);
    model->activations->workspace_bytes = args_workspace_bytes(model);
    *out = model;
    return STATUS_OK;
fail:
    model_destroy(model);
    return status;
}

static uint64_t arena_bytes(const Model *model, DType dtype) {
    return tensor_table_copy_bytes(&model->table, dtype, model->table.total);
}

// AdamW needs fp32 weights; where the working copy is fp32 it is the master itself, and where ranks
// share the master each one's optimizer has its parts.
static bool has_own_master(const Model *model) {
    const ModelOptions *o = &model->options;
    return o->training && o->ranks <= 1 && model->backend->compute_dtype != DTYPE_F32;
}

static Status plan_shell(const Model *model, MemoryPlan *plan) {
    const Activations *a = model->activations;
    const Backend *backend = model->backend;
    TRY(memory_plan_add(plan, "parameters", arena_bytes(model, backend->compute_dtype)));
    if (has_own_master(model))
        TRY(memory_plan_add(plan, "master weights", arena_bytes(model, DTYPE_F32)));
    if (model->options.training)
        TRY(memory_plan_add(plan, "gradients", model_gradient_bytes(model, model->table.total)));
    if (a->kept_bytes) TRY(memory_plan_add(plan, "activations", a->kept_bytes));
    TRY(memory_plan_add(plan, "activation buffers", a->shared_bytes));
    if (a->workspace_bytes) TRY(memory_plan_add(plan, "workspace", a->workspace_bytes));
    return STATUS_OK;
}

Status model_plan(Backend *backend, const ModelConfig *config, const ModelOptions *options,
                  MemoryPlan *plan) {
    Model *model;
    TRY(create_shell(backend, config, options, &model));
    Status status = plan_shell(model, plan);
    model_destroy(model);
    return status;
}

// --- Life ----------------------------------------------------------------------------------------

static Status allocate(Model *model) {
    Backend *backend = model->backend;
    const BackendOps *ops = backend->ops;
    TRY(ops->alloc(backend, arena_bytes(model, backend->compute_dtype), &model->params));
    if (has_own_master(model))
        TRY(ops->alloc(backend, arena_bytes(model, DTYPE_F32), (void **)&model->master));
    else if (backend->compute_dtype == DTYPE_F32)
        model->master = model->params;
    if (model->options.training) {
        TRY(ops->alloc(backend, model_gradient_bytes(model, model->table.total), &model->grads));
        TRY(replay_create(&model->replay));
    }
    return activations_allocate(model);
}

Status model_create(Backend *backend, const ModelConfig *config, const ModelOptions *options,
                    Model **out) {
    Model *model;
    TRY(create_shell(backend, config, options, &model));
    Status status = allocate(model);
    if (status != STATUS_OK) {
        model_destroy(model);
        return status;
    }
    *out = model;
    return STATUS_OK;
}

void model_destroy(Model *model) {
    if (!model) return;
    Backend *backend = model->backend;
    replay_free(model->replay, backend);
    activations_destroy(model);
    if (model->grads) backend->ops->release(backend, model->grads);
    if (model->master && model->master != model->params)
        backend->ops->release(backend, model->master);
    if (model->params) backend->ops->release(backend, model->params);
    tensor_table_free(&model->table);
    free(model);
}

size_t model_gradient_bytes(const Model *model, int64_t offset) {
    return gradient_bytes(&model->table, &model->window, model->backend->grad_dtype, offset);
}

// Elements [begin, end) of the gradients.
static Status zero_range(Model *model, int64_t begin, int64_t end) {
    Backend *backend = model->backend;
    const size_t first = model_gradient_bytes(model, begin);
    const size_t last = model_gradient_bytes(model, end);
    return backend->ops->zero(backend, (char *)model->grads + first, last - first);
}

// Everything but the matrices; the embedding is one only where it is the LM head, too.
Status model_zero_gradients(Model *model) {
    INVARIANT(model->grads != NULL);
    const TensorTable *table = &model->table;
    model->no_gradients_yet = true;
    if (table->lm_head != table->embed)
        TRY(zero_range(model, table->embed, table->layers[0].qkv_weight));
    return zero_range(model, table->vectors_begin, table->total);
}

void model_set_observer(Model *model, ModelObserver observer, void *context) {
    model->activations->observer = observer;
    model->activations->observer_context = context;
}

// --- Router state --------------------------------------------------------------------------------

int model_sums_stride(const Model *model) {
    return model->activations->stride;
}

static size_t per_expert_bytes(const Model *model) {
    return (size_t)model->config.num_layers * (size_t)model->activations->stride * sizeof(float);
}

Status model_set_load(Model *model, const float *load) {
    Backend *backend = model->backend;
    return backend->ops->upload(backend, model->activations->load, load, per_expert_bytes(model));
}

Status model_set_selection_bias(Model *model, const float *bias) {
    Activations *a = model->activations;
    Backend *backend = model->backend;
    a->use_selection_bias = bias != NULL;
    if (bias) TRY(backend->ops->upload(backend, a->selection_bias, bias, per_expert_bytes(model)));
    return STATUS_OK;
}

// --- Statistics ----------------------------------------------------------------------------------

static size_t sums_bytes(const Model *model) {
    return activations_sums_count(model) * sizeof(double);
}

Status model_reset_sums(Model *model) {
    Backend *backend = model->backend;
    model->activations->router_tokens = 0;
    return backend->ops->zero(backend, model->activations->sums, sums_bytes(model));
}

Status model_sums_create(const Model *model, ModelSums *out) {
    size_t layers = (size_t)model->config.num_layers, stride = (size_t)model_sums_stride(model);
    *out = (ModelSums){.stride = (int)stride};
    out->assignments = calloc(layers * stride, sizeof(double));
    out->probability = calloc(layers * stride, sizeof(double));
    out->entropy = calloc(layers, sizeof(double));
    out->z = calloc(layers, sizeof(double));
    if (!out->assignments || !out->probability || !out->entropy || !out->z) {
        model_sums_free(out);
        FAIL(STATUS_INTERNAL, "out of memory for the sums of %zu layers", layers);
    }
    return STATUS_OK;
}

void model_sums_free(ModelSums *sums) {
    free(sums->assignments);
    free(sums->probability);
    free(sums->entropy);
    free(sums->z);
    memset(sums, 0, sizeof *sums);
}

Status model_read_sums(Model *model, ModelSums *out) {
    const Activations *a = model->activations;
    Backend *backend = model->backend;
    size_t stride = (size_t)a->stride;
    INVARIANT(out->stride == a->stride);
    TRY(backend->ops->download(backend, a->host_sums, a->sums, sums_bytes(model)));
    out->loss_sum = a->host_sums[0];
    out->loss_count = a->host_sums[1];
    out->tokens = a->router_tokens;
    for (int layer = 0; layer < model->config.num_layers; layer++) {
        const double *from = a->host_sums + activations_sums_index(model, layer);
        memcpy(out->assignments + (size_t)layer * stride, from, stride * sizeof(double));
        memcpy(out->probability + (size_t)layer * stride, from + stride, stride * sizeof(double));
        out->entropy[layer] = from[2 * stride];
        out->z[layer] = from[2 * stride + 1];
    }
    return STATUS_OK;
}
