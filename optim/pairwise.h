// Sums that have the same bits however many ranks share a step: for tests of everything else.
//
// Floating-point addition is not associative, so "add up one's own micro-batches, then the ranks"
// gives other bits on two ranks than on one. Here the micro-batches of a step are the leaves of a
// binary tree, added in pairs: ((0+1)+(2+3))+((4+5)+(6+7)). A rank computes the subtree of its own
// micro-batches, and the communicator adds the ranks' results as the upper levels of the same tree
// (Communicator.tree). Where every rank has the same power of two of micro-batches, that is the
// tree of one rank alone.
//
// It costs a gradient arena per level of a rank's subtree, and the gradient norm is taken block by
// block, so that its sum, too, has one order. fp32 backends only.
#ifndef OPTIM_PAIRWISE_H
#define OPTIM_PAIRWISE_H

#include "optim/optimizer.h"

typedef struct Pairwise Pairwise;

// Adds "gradients of pairs", what pairwise_create takes on the device for as many micro-batches.
Status pairwise_plan(const TensorTable *table, int micro_batches, MemoryPlan *plan) NODISCARD;
// For steps of at most `micro_batches`, each with `num_sums` sums on the host beside its gradients.
// STATUS_USAGE on a backend that does not compute in fp32.
Status pairwise_create(Model *model, int micro_batches, int64_t num_sums, Pairwise **out) NODISCARD;
void pairwise_destroy(Pairwise *pairwise); // NULL is fine

// Takes the model's gradients and `sums`, which hold one micro-batch's.
Status pairwise_add(Pairwise *pairwise, const double *sums) NODISCARD;
// Leaves the sums of all that was taken in the model's gradients and in `sums`.
Status pairwise_finish(Pairwise *pairwise, double *sums) NODISCARD;

// How many blocks the arena has, and (Σ g², how many are not finite) of each; zeros for those that
// other ranks own. The sums over ranks of these, added up in order, are what optimizer_norm takes.
int64_t pairwise_blocks(const Pairwise *pairwise);
Status pairwise_block_sums(Pairwise *pairwise, const Optimizer *optimizer,
                           double (*blocks)[2]) NODISCARD;

#endif
