// Arguments of every op of a pass, with forward and backward operands filled in. One place knows
// which buffer is what; forward.c, backward.c and the planning of the workspace all call it.
// Functions return what a layer's normal forward and backward use; a recomputation changes a member
// or two. While the model has no memory yet (planning), all pointers are NULL.
#ifndef MODEL_OP_ARGS_H
#define MODEL_OP_ARGS_H

#include "model/activations.h"

// One forward (and backward) call.
typedef struct Pass {
    Model *model;
    int64_t batch, sequence_length, tokens; // B, S, B*S of this call
    bool documents;                         // document_start is set
    const LossWeights *weights;             // NULL: forward only
    bool statistics;                        // adds to the sums
    bool first_gradients; // of the step: those of matrices are assigned, not accumulated
} Pass;

EmbedArgs args_embed(const Pass *p);
RmsNormArgs args_input_norm(const Pass *p, int layer);
LinearArgs args_qkv(const Pass *p, int layer);
RopeArgs args_rope(const Pass *p, int layer);
AttentionArgs args_attention(const Pass *p, int layer);
LinearArgs args_attention_output(const Pass *p, int layer);
RmsNormArgs args_middle_norm(const Pass *p, int layer);
FfnArgs args_ffn(const Pass *p, int layer);
RouteArgs args_route(const Pass *p, int layer);
RouterLossArgs args_router_loss(const Pass *p, int layer);
MoeFfnArgs args_moe_ffn(const Pass *p, int layer);
// The same over received rows [begin, begin + rows) of this rank's experts, whose routing is number
// `call` of the layer's (model/expert_parallel.c).
MoeFfnArgs args_received(const Pass *p, int layer, int64_t begin, int64_t rows, int call);
RmsNormArgs args_output_norm(const Pass *p);
LinearCrossEntropyArgs args_loss(const Pass *p);
// Rows [first, first + rows) of the logits into the logits buffer.
LinearArgs args_logits(const Pass *p, int64_t first, int64_t rows);

// The largest workspace that any op needs for any pass the model's options allow, optimizer
// included.
size_t args_workspace_bytes(Model *model);

#endif
