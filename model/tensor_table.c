// Builds the tensor table: names, shapes and offsets of every parameter of a config.
//
// The walk below runs twice, first to count the tensors and then to fill them in, so that the order
// of tensors exists in one place. All arithmetic on sizes is checked: a legal config can still ask
// for more elements than an address has bits for.
#include "model/tensor_table.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/checked.h"

// 2^50 elements: far beyond any machine, and times sixteen bytes of training state still inside
// int64_t, so that callers may multiply without care.
static const int64_t MAX_ELEMENTS = INT64_C(1) << 50;

typedef struct Builder {
    TensorTable *table;
    bool counting;   // only count tensors
    int64_t end;     // elements so far, gaps included
    int64_t skipped; // parameters of experts that one token does not use
    bool overflow;
} Builder;

// --- Placing tensors -----------------------------------------------------------------------------

// Starts a packed group: the next tensor lies at a multiple of TENSOR_ALIGN. Returns its offset.
static int64_t begin_group(Builder *b) {
    b->end = (int64_t)round_up((uint64_t)b->end, TENSOR_ALIGN);
    return b->end;
}

static int64_t begin_section(Builder *b) {
    b->end = (int64_t)round_up((uint64_t)b->end, (uint64_t)b->table->layout.section);
    return b->end;
}

static void count_parameters(Builder *b, int64_t count) {
    if (count > MAX_ELEMENTS - b->table->parameters) b->overflow = true;
    if (!b->overflow) b->table->parameters += count;
}

static void add(Builder *b, Tensor tensor, int64_t rows, int64_t columns, const char *format, ...)
    __attribute__((format(printf, 5, 6)));

// Appends a tensor (rows, columns), or (rows) when columns is 0, right after the last one.
static void add(Builder *b, Tensor tensor, int64_t rows, int64_t columns, const char *format, ...) {
    TensorTable *table = b->table;
    tensor.ndim = columns ? 2 : 1;
    tensor.shape[0] = rows;
    tensor.shape[1] = columns;
    // config_validate bounds every dimension by 2^24, so one tensor always fits.
    tensor.count = rows * (columns ? columns : 1);
    tensor.offset = b->end;
    count_parameters(b, tensor.count);
    if (tensor.count > MAX_ELEMENTS - b->end) b->overflow = true;
    if (b->overflow) return;
    b->end += tensor.count;
    if (!b->counting) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(tensor.name, sizeof tensor.name, format, arguments);
        va_end(arguments);
        table->tensors[table->count] = tensor;
    }
    table->count++;
}

// --- The walk ------------------------------------------------------------------------------------

static void add_attention(Builder *b, const ModelConfig *c, int layer, LayerOffsets *at) {
    const Tensor weight = {.role = ROLE_QKV_WEIGHT, .layer = layer, .expert = -1};
    const Tensor output = {.role = ROLE_O_WEIGHT, .layer = layer, .expert = -1};
    const int64_t q = (int64_t)c->num_heads * c->head_dim;
    const int64_t kv = (int64_t)c->num_kv_heads * c->head_dim;
    at->qkv_weight = begin_group(b);
    add(b, weight, q, c->hidden_size, "model.layers.%d.self_attn.q_proj.weight", layer);
    add(b, weight, kv, c->hidden_size, "model.layers.%d.self_attn.k_proj.weight", layer);
    add(b, weight, kv, c->hidden_size, "model.layers.%d.self_attn.v_proj.weight", layer);
    at->o_weight = begin_group(b);
    add(b, output, c->hidden_size, q, "model.layers.%d.self_attn.o_proj.weight", layer);
}

static void add_dense(Builder *b, const ModelConfig *c, int layer, LayerOffsets *at) {
    const Tensor gate = {.role = ROLE_GATE, .layer = layer, .expert = -1};
    const Tensor up = {.role = ROLE_UP, .layer = layer, .expert = -1};
    const Tensor down = {.role = ROLE_DOWN, .layer = layer, .expert = -1};
    int64_t hidden = c->hidden_size, width = c->intermediate_size;
    at->gate_up = begin_group(b);
    add(b, gate, width, hidden, "model.layers.%d.mlp.gate_proj.weight", layer);
    add(b, up, width, hidden, "model.layers.%d.mlp.up_proj.weight", layer);
    at->down = begin_group(b);
    add(b, down, hidden, width, "model.layers.%d.mlp.down_proj.weight", layer);
}

static void add_experts(Builder *b, const ModelConfig *c, int layer, LayerOffsets *at) {
    const TableLayout *layout = &b->table->layout;
    int experts = c->layers[layer].num_experts, ranks = layout->expert_ranks;
    int first = layout->expert_rank * (experts / ranks), end = first + experts / ranks;
    int64_t hidden = c->hidden_size, width = c->moe_intermediate_size;
    at->gate_up = ranks > 1 ? begin_section(b) : begin_group(b);
    for (int e = first; e < end; e++) {
        const Tensor gate = {.role = ROLE_GATE, .layer = layer, .expert = e};
        const Tensor up = {.role = ROLE_UP, .layer = layer, .expert = e};
        add(b, gate, width, hidden, "model.layers.%d.mlp.experts.%d.gate_proj.weight", layer, e);
        add(b, up, width, hidden, "model.layers.%d.mlp.experts.%d.up_proj.weight", layer, e);
    }
    at->down = begin_group(b);
    for (int e = first; e < end; e++) {
        const Tensor down = {.role = ROLE_DOWN, .layer = layer, .expert = e};
        add(b, down, hidden, width, "model.layers.%d.mlp.experts.%d.down_proj.weight", layer, e);
    }
    for (int e = end - first; e < experts; e++) count_parameters(b, 3 * hidden * width);
    if (!b->overflow) b->skipped += (experts - c->layers[layer].top_k) * 3 * hidden * width;
}

static void add_vectors(Builder *b, const ModelConfig *c, int layer, LayerOffsets *at) {
    const Tensor norm = {.role = ROLE_NORM, .layer = layer, .expert = -1};
    const Tensor bias = {.role = ROLE_QKV_BIAS, .layer = layer, .expert = -1};
    const int64_t q = (int64_t)c->num_heads * c->head_dim;
    const int64_t kv = (int64_t)c->num_kv_heads * c->head_dim;
    at->input_norm = begin_group(b);
    add(b, norm, c->hidden_size, 0, "model.layers.%d.input_layernorm.weight", layer);
    if (c->qkv_bias) {
        at->qkv_bias = begin_group(b);
        add(b, bias, q, 0, "model.layers.%d.self_attn.q_proj.bias", layer);
        add(b, bias, kv, 0, "model.layers.%d.self_attn.k_proj.bias", layer);
        add(b, bias, kv, 0, "model.layers.%d.self_attn.v_proj.bias", layer);
    }
    if (c->qk_norm) {
        at->q_norm = begin_group(b);
        add(b, norm, c->head_dim, 0, "model.layers.%d.self_attn.q_norm.weight", layer);
        at->k_norm = begin_group(b);
        add(b, norm, c->head_dim, 0, "model.layers.%d.self_attn.k_norm.weight", layer);
    }
    at->post_norm = begin_group(b);
    add(b, norm, c->hidden_size, 0, "model.layers.%d.post_attention_layernorm.weight", layer);
}

static void walk_matrices(Builder *b, const ModelConfig *c) {
    const Tensor embed = {.role = ROLE_EMBED, .layer = -1, .expert = -1};
    const Tensor head = {.role = ROLE_LM_HEAD, .layer = -1, .expert = -1};
    TensorTable *table = b->table;
    table->embed = begin_group(b);
    add(b, embed, c->vocab_size, c->hidden_size, "model.embed_tokens.weight");
    for (int layer = 0; layer < c->num_layers; layer++) {
        LayerOffsets *at = &table->layers[layer];
        *at = (LayerOffsets){-1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
        begin_section(b);
        add_attention(b, c, layer, at);
        if (config_layer_is_moe(c, layer))
            add_experts(b, c, layer, at);
        else
            add_dense(b, c, layer, at);
    }
    table->lm_head = table->embed;
    if (c->tie_word_embeddings) return;
    table->lm_head = begin_section(b);
    add(b, head, c->vocab_size, c->hidden_size, "lm_head.weight");
}

static void walk(Builder *b, const ModelConfig *c) {
    const Tensor norm = {.role = ROLE_NORM, .layer = -1, .expert = -1};
    TensorTable *table = b->table;
    walk_matrices(b, c);
    table->vectors_begin = begin_section(b);
    for (int layer = 0; layer < c->num_layers; layer++)
        add_vectors(b, c, layer, &table->layers[layer]);
    table->final_norm = begin_group(b);
    add(b, norm, c->hidden_size, 0, "model.norm.weight");
    table->router_begin = begin_group(b);
    for (int layer = 0; layer < c->num_layers; layer++) {
        if (!config_layer_is_moe(c, layer)) continue;
        const Tensor router = {.role = ROLE_ROUTER, .layer = layer, .expert = -1};
        table->layers[layer].router = begin_group(b);
        add(b, router, c->layers[layer].num_experts, c->hidden_size,
            "model.layers.%d.mlp.gate.weight", layer);
    }
    table->total = begin_group(b);
}

// --- The table -----------------------------------------------------------------------------------

static int compare_names(const void *a, const void *b) {
    return strcmp((*(const Tensor *const *)a)->name, (*(const Tensor *const *)b)->name);
}

static Status fill(const ModelConfig *config, TensorTable *out) {
    Builder counter = {.table = out, .counting = true};
    walk(&counter, config);
    if (counter.overflow)
        FAIL(STATUS_BAD_DATA, "the model has more than 2^50 parameters, expected fewer");
    int count = out->count;
    out->tensors = malloc((size_t)count * sizeof *out->tensors);
    out->by_name = malloc((size_t)count * sizeof(Tensor *));
    if (!out->tensors || !out->by_name)
        FAIL(STATUS_INTERNAL, "out of memory for a table of %d tensors", count);

    out->count = 0;
    out->parameters = 0;
    Builder builder = {.table = out};
    walk(&builder, config);
    INVARIANT(out->count == count);
    out->active_parameters = out->parameters - builder.skipped;
    for (int i = 0; i < count; i++) out->by_name[i] = &out->tensors[i];
    qsort(out->by_name, (size_t)count, sizeof *out->by_name, compare_names);
    return STATUS_OK;
}

static Status check_expert_ranks(const ModelConfig *config, int ranks) {
    for (int l = 0; l < config->num_layers; l++) {
        const int experts = config->layers[l].num_experts;
        if (experts % ranks != 0)
            FAIL(STATUS_USAGE,
                 "parallel.expert = %d does not divide the %d experts of layer %d; set a divisor "
                 "of %d",
                 ranks, experts, l, experts);
    }
    return STATUS_OK;
}

static void sum_expert_elements(TensorTable *table) {
    for (int l = 0; l < table->num_layers; l++)
        if (tensor_table_shares_experts(table, l))
            table->expert_elements += tensor_table_layer_end(table, l) - table->layers[l].gate_up;
}

Status tensor_table_build(const ModelConfig *config, TensorTable *out) {
    return tensor_table_build_layout(config, &(TableLayout){0}, out);
}

Status tensor_table_build_layout(const ModelConfig *config, const TableLayout *layout,
                                 TensorTable *out) {
    memset(out, 0, sizeof *out);
    out->layout = *layout;
    if (layout->section == 0) out->layout.section = TENSOR_ALIGN;
    if (layout->expert_ranks == 0) out->layout.expert_ranks = 1;
    INVARIANT(out->layout.section > 0 && out->layout.section % TENSOR_ALIGN == 0);
    TRY(check_expert_ranks(config, out->layout.expert_ranks));
    out->num_layers = config->num_layers;
    out->layers = malloc((size_t)config->num_layers * sizeof *out->layers);
    if (!out->layers)
        FAIL(STATUS_INTERNAL, "out of memory for the offsets of %d layers", config->num_layers);
    Status status = fill(config, out);
    if (status != STATUS_OK)
        tensor_table_free(out);
    else
        sum_expert_elements(out);
    return status;
}

Status tensor_table_pad(TensorTable *table, int ranks) {
    INVARIANT(ranks >= 1);
    const uint64_t unit = (uint64_t)ranks * TENSOR_ALIGN;
    const int64_t tail = table->total - table->router_begin;
    const int64_t begin = (int64_t)round_up((uint64_t)table->router_begin, unit);
    const int64_t shift = begin - table->router_begin;
    if (begin + (int64_t)unit > MAX_ELEMENTS - tail)
        FAIL(STATUS_USAGE, "%d ranks with %" PRId64 " parameters: more than 2^50 elements", ranks,
             table->parameters);
    for (int i = 0; i < table->count; i++)
        if (table->tensors[i].role == ROLE_ROUTER) table->tensors[i].offset += shift;
    for (int layer = 0; layer < table->num_layers; layer++)
        if (table->layers[layer].router >= 0) table->layers[layer].router += shift;
    table->router_begin = begin;
    table->total = begin + (int64_t)round_up((uint64_t)tail, unit);
    return STATUS_OK;
}

void tensor_table_free(TensorTable *table) {
    free(table->by_name);
    free(table->tensors);
    free(table->layers);
    memset(table, 0, sizeof *table);
}

int64_t tensor_table_layer_end(const TensorTable *table, int layer) {
    if (layer + 1 < table->num_layers) return table->layers[layer + 1].qkv_weight;
    return table->lm_head != table->embed ? table->lm_head : table->vectors_begin;
}

bool tensor_table_shares_experts(const TensorTable *table, int layer) {
    return table->layout.expert_ranks > 1 && table->layers[layer].router >= 0;
}

static int compare_key(const void *name, const void *entry) {
    return strcmp(name, (*(const Tensor *const *)entry)->name);
}

const Tensor *tensor_table_find(const TensorTable *table, const char *name) {
    const Tensor *const *found =
        bsearch(name, table->by_name, (size_t)table->count, sizeof *table->by_name, compare_key);
    return found ? *found : NULL;
}

size_t tensor_table_copy_bytes(const TensorTable *table, DType compute, int64_t offset) {
    int64_t body = offset < table->router_begin ? offset : table->router_begin;
    return (size_t)body * dtype_bytes(compute) + (size_t)(offset - body) * sizeof(float);
}

int64_t tensor_part(const Tensor *tensor, int64_t begin, int64_t end, int64_t *first) {
    const int64_t from = tensor->offset > begin ? tensor->offset : begin;
    const int64_t last = tensor->offset + tensor->count, to = last < end ? last : end;
    *first = from - tensor->offset;
    return to > from ? to - from : 0;
}

bool tensor_decays(const Tensor *tensor, bool decay_embeddings) {
    switch (tensor->role) {
    case ROLE_QKV_WEIGHT:
    case ROLE_O_WEIGHT:
    case ROLE_GATE:
    case ROLE_UP:
    case ROLE_DOWN:
        return true;
    case ROLE_EMBED:
    case ROLE_LM_HEAD:
        return decay_embeddings;
    case ROLE_NORM:
    case ROLE_QKV_BIAS:
    case ROLE_ROUTER:
        break;
    }
    return false;
}
