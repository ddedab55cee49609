// Planning the activation arena.
//
// One function, lay_out(), walks all buffers in order and hands out places from two arenas. It runs
// first with no memory behind the arenas, which gives their sizes, and again over the allocated
// blocks, which gives the pointers: plan and allocation cannot differ.
//
// Buffers that layers share are laid out per layer from the same starting point, so that dense and
// MoE layers of different widths overlay each other and the arena is as large as the largest.
#include "model/activations.h"

#include <stdlib.h>
#include <string.h>
#include "base/checked.h"

enum {
    ALIGN_BYTES = 256,
    LOGITS_BYTES = 4 << 20, // model_logits works in pieces of about this size
    LOSS_SUMS = 2,          // sum and count before the layers' statistics
};

typedef struct Arena {
    char *base; // NULL while planning
    uint64_t bytes;
    bool overflow;
} Arena;

typedef struct Layout {
    const Model *model;
    Activations *a;
    Arena kept, shared;
    // Where each class of a layer's buffers goes.
    Arena *stream, *inside, *norms;
    bool one_normed_buffer; // for attention and MLP: made again before each use in backward
    bool keep_activation;
    uint64_t tokens; // T
    size_t width;    // bytes of an element of compute dtype
} Layout;

static void *place(Arena *arena, uint64_t count, uint64_t element_bytes) {
    uint64_t at = arena->bytes, bytes;
    if (!checked_mul(count, element_bytes, &bytes) ||
        !checked_round_up(bytes, ALIGN_BYTES, &bytes) ||
        !checked_add(arena->bytes, bytes, &arena->bytes)) {
        arena->overflow = true;
        return NULL;
    }
    return arena->base ? arena->base + at : NULL;
}

// (T, columns) of compute dtype, or of float.
static void *rows(Layout *l, Arena *arena, uint64_t columns) {
    return place(arena, l->tokens * columns, l->width);
}
static float *float_rows(Layout *l, Arena *arena, uint64_t columns) {
    return place(arena, l->tokens * columns, sizeof(float));
}

// --- One layer -----------------------------------------------------------------------------------

static void lay_out_attention(Layout *l, LayerActivations *layer) {
    const ModelConfig *c = &l->model->config;
    uint64_t heads = (uint64_t)c->num_heads, qkv = (uint64_t)config_qkv_size(c);
    layer->qkv = layer->rotated = rows(l, l->inside, qkv);
    if (c->qk_norm) {
        layer->rotated = rows(l, l->inside, qkv);
        layer->qk_inv_rms = float_rows(l, l->inside, heads + (uint64_t)c->num_kv_heads);
    }
    layer->attention = rows(l, l->inside, heads * (uint64_t)c->head_dim);
    layer->log_sum_exp = float_rows(l, l->inside, heads);
}

static void lay_out_routing(Layout *l, const LayerConfig *layer, Routing *routing) {
    uint64_t experts = (uint64_t)layer->num_experts, k = (uint64_t)layer->top_k;
    routing->probabilities = float_rows(l, l->inside, experts);
    routing->log_sum_exp = float_rows(l, l->inside, 1);
    routing->expert = place(l->inside, l->tokens * k, sizeof(int32_t));
    routing->gate = float_rows(l, l->inside, k);
    routing->slot_of_row = place(l->inside, l->tokens * k, sizeof(int32_t));
    routing->row_of_slot = place(l->inside, l->tokens * k, sizeof(int32_t));
    routing->expert_begin = place(l->inside, experts + 1, sizeof(int32_t));
}

static void lay_out_mlp(Layout *l, const LayerConfig *config, LayerActivations *layer) {
    const ModelConfig *c = &l->model->config;
    if (config->num_experts > 0) {
        lay_out_routing(l, config, &layer->routing);
        uint64_t width = 2 * (uint64_t)c->moe_intermediate_size, k = (uint64_t)config->top_k;
        uint64_t ranks = (uint64_t)l->model->options.expert_ranks;
        if (ranks > 1) {
            uint64_t borders = ranks * ((uint64_t)config->num_experts / ranks + 1);
            layer->received.expert_begin = place(l->inside, borders, sizeof(int32_t));
            return;
        }
        layer->gate_up = rows(l, l->inside, k * width);
        return;
    }
    layer->gate_up = rows(l, l->inside, 2 * (uint64_t)c->intermediate_size);
    if (l->keep_activation) layer->activation = rows(l, l->inside, (uint64_t)c->intermediate_size);
}

static void lay_out_layer(Layout *l, int index) {
    const ModelConfig *c = &l->model->config;
    LayerActivations *layer = &l->a->layers[index];
    uint64_t hidden = (uint64_t)c->hidden_size;
    memset(layer, 0, sizeof *layer);
    layer->input = l->stream == &l->kept ? rows(l, &l->kept, hidden) : l->a->stream;
    layer->middle = l->inside == &l->kept ? rows(l, &l->kept, hidden) : l->a->stream;
    layer->input_inv_rms = float_rows(l, l->inside, 1);
    layer->middle_inv_rms = float_rows(l, l->inside, 1);
    layer->input_normed = rows(l, l->norms, hidden);
    layer->middle_normed = l->one_normed_buffer ? layer->input_normed : rows(l, l->norms, hidden);
    lay_out_attention(l, layer);
    lay_out_mlp(l, &c->layers[index], layer);
}

// --- Outside the layers --------------------------------------------------------------------------

static void lay_out_ends(Layout *l) {
    const ModelConfig *c = &l->model->config;
    Activations *a = l->a;
    uint64_t hidden = (uint64_t)c->hidden_size, vocab = (uint64_t)c->vocab_size;
    bool training = l->model->options.training;
    a->ids = place(&l->shared, l->tokens, sizeof(int32_t));
    a->targets = place(&l->shared, l->tokens, sizeof(int32_t));
    a->document_start = place(&l->shared, l->tokens, sizeof(int32_t));
    a->stream = l->inside == &l->shared ? rows(l, &l->shared, hidden) : NULL;
    a->branch = rows(l, &l->shared, hidden);
    a->output = training ? rows(l, &l->shared, hidden) : a->stream;
    a->output_inv_rms = float_rows(l, &l->shared, 1);
    a->output_normed = rows(l, &l->shared, hidden);

    int64_t fit = (int64_t)(LOGITS_BYTES / (vocab * sizeof(float)));
    if (fit < 1) fit = 1;
    a->logits_rows = fit < (int64_t)l->tokens ? fit : (int64_t)l->tokens;
    uint64_t logits = (uint64_t)a->logits_rows * vocab;
    a->logits_f32 = place(&l->shared, logits, sizeof(float));
    a->logits =
        l->width == sizeof(float) ? (void *)a->logits_f32 : place(&l->shared, logits, l->width);
}

static int largest_top_k(const ModelConfig *c) {
    int top_k = 0;
    for (int i = 0; i < c->num_layers; i++)
        if (c->layers[i].top_k > top_k) top_k = c->layers[i].top_k;
    return top_k;
}

static void lay_out_rows(Layout *l, Arena *arena, uint64_t count, RowBuffers *out) {
    const ModelConfig *c = &l->model->config;
    out->x = place(arena, count * (uint64_t)c->hidden_size, l->width);
    out->gate_up = place(arena, count * 2 * (uint64_t)c->moe_intermediate_size, l->width);
    out->gate = place(arena, count, sizeof(float));
    out->slot_of_row = place(arena, count, sizeof(int32_t));
    out->row_of_slot = place(arena, count, sizeof(int32_t));
}

// What the options give room for, and never more than all layers can receive.
static int64_t rows_of_pool(const Layout *l) {
    const ModelConfig *c = &l->model->config;
    const ModelOptions *o = &l->model->options;
    const double room = o->expert_room < o->expert_ranks ? o->expert_room : o->expert_ranks;
    double even = 0;
    for (int i = 0; i < c->num_layers; i++) even += (double)l->tokens * c->layers[i].top_k;
    return room > 0 ? (int64_t)(even * room) + c->num_layers * TRAVEL_ROWS_ALIGN : 0;
}

static void lay_out_travel(Layout *l) {
    const ModelConfig *c = &l->model->config;
    TravelBuffers *travel = &l->a->rows;
    uint64_t k = (uint64_t)largest_top_k(c), hidden = (uint64_t)c->hidden_size;
    uint64_t ranks = (uint64_t)l->model->options.expert_ranks;
    if (ranks <= 1) return;
    travel->most = (int64_t)(l->tokens * k * ranks);
    travel->pool_rows = l->inside == &l->kept ? rows_of_pool(l) : 0;
    lay_out_rows(l, &l->kept, (uint64_t)travel->pool_rows, &travel->pool);
    lay_out_rows(l, &l->shared, (uint64_t)travel->most, &travel->scratch);
    travel->sent = rows(l, &l->shared, k * hidden);
    travel->sent_floats = float_rows(l, &l->shared, k);
    travel->out = rows(l, &l->shared, k * ranks * hidden);
    travel->begin = place(&l->shared, ranks * (uint64_t)(l->a->stride + 1), sizeof(int32_t));
    if (!l->model->options.training) return;
    travel->dout = rows(l, &l->shared, k * ranks * hidden);
    travel->d_gate = float_rows(l, &l->shared, k * ranks);
}

static void lay_out_gradients(Layout *l) {
    const ModelConfig *c = &l->model->config;
    Activations *a = l->a;
    int top_k = largest_top_k(c);
    a->d_stream = rows(l, &l->shared, (uint64_t)c->hidden_size);
    a->d_normed = rows(l, &l->shared, (uint64_t)c->hidden_size);
    a->d_qkv = rows(l, &l->shared, (uint64_t)config_qkv_size(c));
    a->d_attention = rows(l, &l->shared, (uint64_t)c->num_heads * (uint64_t)c->head_dim);
    a->d_gate = float_rows(l, &l->shared, (uint64_t)top_k);
}

static void lay_out_statistics(Layout *l) {
    Activations *a = l->a;
    uint64_t layers = (uint64_t)l->model->config.num_layers;
    a->sums = place(&l->shared, activations_sums_count(l->model), sizeof(double));
    a->load = place(&l->shared, layers * (uint64_t)a->stride, sizeof(float));
    a->selection_bias = place(&l->shared, layers * (uint64_t)a->stride, sizeof(float));
}

// --- The whole arena -----------------------------------------------------------------------------

// Sets every pointer of `a` from the bases of the two arenas, and their sizes.
static Status lay_out(const Model *model, Activations *a, char *kept, char *shared) {
    const ModelOptions *o = &model->options;
    bool keeps_inside = o->training && !o->recompute.layer;
    Layout l = {.model = model, .a = a, .kept.base = kept, .shared.base = shared};
    l.stream = o->training ? &l.kept : &l.shared;
    l.inside = keeps_inside ? &l.kept : &l.shared;
    l.norms = keeps_inside && !o->recompute.norms ? &l.kept : &l.shared;
    l.one_normed_buffer = !o->training || (keeps_inside && o->recompute.norms);
    l.keep_activation = keeps_inside && !o->recompute.swiglu;
    l.tokens = (uint64_t)o->micro_batch * (uint64_t)o->sequence_length;
    l.width = dtype_bytes(model->backend->compute_dtype);

    lay_out_ends(&l);
    if (o->training) lay_out_gradients(&l);
    lay_out_travel(&l);
    lay_out_statistics(&l);
    uint64_t start = l.shared.bytes, largest = start;
    for (int i = 0; i < model->config.num_layers; i++) {
        l.shared.bytes = start;
        lay_out_layer(&l, i);
        if (l.shared.bytes > largest) largest = l.shared.bytes;
    }
    if (l.kept.overflow || l.shared.overflow) {
        FAIL(STATUS_USAGE,
             "activations of %lld sequences of %lld tokens need more bytes than 64 bits count; "
             "use a smaller micro_batch or sequence_length",
             (long long)o->micro_batch, (long long)o->sequence_length);
    }
    a->kept_bytes = l.kept.bytes;
    a->shared_bytes = largest;
    return STATUS_OK;
}

Status activations_create(Model *model) {
    Activations *a = calloc(1, sizeof *a);
    if (!a) FAIL(STATUS_INTERNAL, "out of memory for the activation plan");
    model->activations = a;
    a->stride = 1;
    int layers = model->config.num_layers;
    for (int i = 0; i < layers; i++)
        if (model->config.layers[i].num_experts > a->stride)
            a->stride = model->config.layers[i].num_experts;
    a->layers = calloc((size_t)layers, sizeof *a->layers);
    a->host_sums = calloc(activations_sums_count(model), sizeof *a->host_sums);
    if (!a->layers || !a->host_sums)
        FAIL(STATUS_INTERNAL, "out of memory for the activation plan of %d layers", layers);
    return lay_out(model, a, NULL, NULL);
}

// What the host keeps of where rows travel.
static Status allocate_begins(Model *model) {
    Activations *a = model->activations;
    const size_t ranks = (size_t)model->options.expert_ranks, most = (size_t)a->rows.most;
    const size_t borders = ranks * ((size_t)a->stride + 1);
    const size_t layers = (size_t)model->config.num_layers;
    if (ranks <= 1) return STATUS_OK;
    a->host_begins = calloc(layers * borders, sizeof *a->host_begins);
    a->rows.host_index = calloc(2 * most + ranks * borders, sizeof *a->rows.host_index);
    a->rows.used = calloc(ranks, sizeof *a->rows.used);
    if (!a->host_begins || !a->rows.host_index || !a->rows.used)
        FAIL(STATUS_INTERNAL, "out of memory for the rows of %zu expert ranks", ranks);
    for (size_t i = 0; i < layers; i++) a->layers[i].received.begin = a->host_begins + i * borders;
    return STATUS_OK;
}

Status activations_allocate(Model *model) {
    Activations *a = model->activations;
    Backend *backend = model->backend;
    if (a->kept_bytes) TRY(backend->ops->alloc(backend, a->kept_bytes, &a->kept));
    TRY(backend->ops->alloc(backend, a->shared_bytes, &a->shared));
    if (a->workspace_bytes) TRY(backend->ops->alloc(backend, a->workspace_bytes, &a->workspace));
    TRY(lay_out(model, a, a->kept, a->shared));
    return allocate_begins(model);
}

void activations_destroy(Model *model) {
    Activations *a = model->activations;
    if (!a) return;
    Backend *backend = model->backend;
    if (a->workspace) backend->ops->release(backend, a->workspace);
    if (a->shared) backend->ops->release(backend, a->shared);
    if (a->kept) backend->ops->release(backend, a->kept);
    free(a->rows.host_index);
    free(a->rows.used);
    free(a->host_begins);
    free(a->host_sums);
    free(a->layers);
    free(a);
    model->activations = NULL;
}

// --- Statistics ----------------------------------------------------------------------------------

static size_t sums_per_layer(const Model *model) {
    return 2 * (size_t)model->activations->stride + 2;
}

size_t activations_sums_count(const Model *model) {
    return LOSS_SUMS + (size_t)model->config.num_layers * sums_per_layer(model);
}

size_t activations_sums_index(const Model *model, int layer) {
    return LOSS_SUMS + (size_t)layer * sums_per_layer(model);
}

RouterSums activations_layer_sums(const Model *model, int layer) {
    const Activations *a = model->activations;
    double *base = a->sums;
    if (!base) return (RouterSums){0};
    base += activations_sums_index(model, layer);
    int stride = a->stride;
    return (RouterSums){base, base + stride, base + 2 * stride, base + 2 * stride + 1};
}
