#include "model/gradient_window.h"

// Where the matrices of layer `layer` begin; behind the last layer, where those of all end.
static int64_t layer_begin(const TensorTable *table, int layer) {
    if (layer < table->num_layers) return table->layers[layer].qkv_weight;
    return table->lm_head != table->embed ? table->lm_head : table->vectors_begin;
}

GradientWindow gradient_window(const TensorTable *table) {
    GradientWindow window = {.layer = 0};
    for (int layer = 0; layer < table->num_layers; layer++) {
        int64_t length = layer_begin(table, layer + 1) - layer_begin(table, layer);
        if (length > window.layer) window.layer = length;
    }
    window.body = layer_begin(table, 0) + 2 * window.layer + table->router_begin -
                  layer_begin(table, table->num_layers);
    return window;
}

static int64_t place(const TensorTable *table, const GradientWindow *window, int64_t offset) {
    const int64_t first = layer_begin(table, 0), behind = layer_begin(table, table->num_layers);
    if (offset < first) return offset;
    if (offset >= behind) return first + 2 * window->layer + offset - behind;
    int layer = table->num_layers - 1;
    while (layer_begin(table, layer) > offset) layer--;
    return first + layer % 2 * window->layer + offset - layer_begin(table, layer);
}

size_t gradient_bytes(const TensorTable *table, const GradientWindow *window, DType dtype,
                      int64_t offset) {
    if (window->layer == 0) return tensor_table_copy_bytes(table, dtype, offset);
    if (offset < table->router_begin)
        return (size_t)place(table, window, offset) * dtype_bytes(dtype);
    return (size_t)window->body * dtype_bytes(dtype) +
           (size_t)(offset - table->router_begin) * sizeof(float);
}

// Tensors are listed by rising offset (tensor_table.c), and only packed groups, of which a layer
// has four, have gaps between them.
int gradient_gaps(const TensorTable *table, int layer, GradientGap gaps[GRADIENT_GAPS_MAX]) {
    const int64_t end = layer_begin(table, layer + 1);
    int64_t at = layer_begin(table, layer);
    int count = 0;
    for (int i = 0; i < table->count; i++) {
        const Tensor *tensor = &table->tensors[i];
        if (tensor->offset < at || tensor->offset >= end) continue;
        if (tensor->offset > at) gaps[count++] = (GradientGap){at, tensor->offset - at};
        at = tensor->offset + tensor->count;
    }
    if (at < end) gaps[count++] = (GradientGap){at, end - at};
    return count;
}
