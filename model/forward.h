// The forward pass in the pieces that the backward pass needs again. model/ only.
#ifndef MODEL_FORWARD_H
#define MODEL_FORWARD_H

#include "model/op_args.h"

// Checks the micro-batch against the plan, uploads it and fills `p`. `weights` NULL: forward only.
Status forward_begin(Model *model, const MicroBatch *batch, const LossWeights *weights,
                     Pass *p) NODISCARD;
// Embedding, all layers and the output norm; adds to the router statistics if p->statistics.
Status forward_layers(const Pass *p) NODISCARD;
// Tells the hooks of a pass with gradients, if there are any, that the matrices' elements [0, end)
// are read next.
Status forward_needs(const Pass *p, int64_t end) NODISCARD;
// What backward reads of one layer, computed again from the layer's input.
Status forward_layer_again(const Pass *p, int layer) NODISCARD;

#endif
