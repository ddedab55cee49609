// Expert parallelism: the experts of a layer are shared out among a group of E ranks, and each row
// travels to the rank that has its expert and back (GShard, Lepikhin et al. 2020; dropless). For
// the passes of model/ only.
//
//   rank r of the group has experts [r N/E, (r+1) N/E)
//   forward    rows of x, by expert -> all-to-all -> the experts' MLPs -> all-to-all -> out[t]
//   backward   rows of dout -> all-to-all -> the experts' backward -> all-to-all -> dx[t], dgate
//
// The gate travels with its row, so that what comes back needs only to be added up, and dgate comes
// back in the same way. How many rows go where is known once the ranks of a group have told each
// other their routing; the host waits for that once per layer and forward pass, and keeps it for
// what backward does again.
//
// A rank may receive all the rows of its group in one layer, and few in the next. There is room for
// all of one layer; what the backward pass reads is kept in a pool that the layers fill one after
// the other, and as large as ModelOptions.expert_room says. The rows of a layer that do not fit
// there, on any rank of the group, travel again in the backward pass.
//
// In fp32 the rows of each rank are computed by themselves, in the order of the ranks: weight
// gradients are then sums in the order of data parallelism, and the results the same to the bit
// where each rank has one micro-batch a step and a group is all there is. In bf16 they are computed
// all at once.
#ifndef MODEL_EXPERT_PARALLEL_H
#define MODEL_EXPERT_PARALLEL_H

#include "model/op_args.h"
#include "model/tensor_table.h"

// In place of the backend's moe_ffn_forward and moe_ffn_backward. `again`: what backward reads and
// no more. All ranks of the group (Model.experts) make the same calls.
void expert_parallel_begin(Model *model); // before a pass; nothing without Model.experts
Status expert_parallel_forward(const Pass *p, int layer, bool again) NODISCARD;
Status expert_parallel_backward(const Pass *p, int layer) NODISCARD;

// The weights of the whole model, as Model.params of a model of its own would have them: `weights`
// is host memory laid out by `whole`, and NULL on other ranks than the group's first, which send it
// their experts. Uses the buffers of a pass, so none may be running.
Status expert_parallel_collect(Model *model, const TensorTable *whole, void *weights) NODISCARD;

#endif
