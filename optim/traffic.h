// The traffic of ZeRO-1: gradients to their owners while the backward pass runs, weights from their
// owners while the next forward pass runs.
//
// Within a step:
//   1. The last micro-batch runs with traffic_hooks(): as soon as the backward pass has finished a
//      bucket, its reduce-scatter starts. Earlier micro-batches only add up on each rank.
//   2. traffic_reduce() starts what is left and makes the compute stream wait for all of it. Each
//      rank now has the sum over ranks of the gradients that it owns, and nothing else of use.
//   3. The optimizer updates its parts bucket by bucket, in the order of the forward pass, and says
//      traffic_gather() after each, which starts the bucket's all-gather.
//   4. The first micro-batch of the next step runs with traffic_hooks(), which wait for a bucket's
//      weights right before a layer reads them. Whoever else reads weights says traffic_settle().
//
// Where ranks share gradients, too (ZeRO-2, ModelOptions.share_gradients), every micro-batch runs
// with hooks and traffic_reduce: what a rank owns of a bucket is added to its fp32 sums as soon as
// it is there, and the model's memory is free for the next layer. traffic_reduce ends each
// micro-batch.
//
// The buckets of shared-out experts (TableLayout.expert_ranks) travel between the ranks that have
// the same experts, all others between all ranks.
#ifndef OPTIM_TRAFFIC_H
#define OPTIM_TRAFFIC_H

#include "model/communicator.h"
#include "model/model.h"
#include "optim/partition.h"

typedef struct Traffic {
    Communicator *communicator; // of all ranks
    Communicator *replicas;     // of those with the same experts; NULL where all have all
    Model *model;
    Partition partition;
    ModelHooks hooks;
    int reduced;              // buckets whose reduce-scatter has been started in this pass
    CommTicket last;          // of the newest collective between all ranks,
    CommTicket last_replicas; // and between those with the same experts
    float *sums;              // (partition.owned) device memory; NULL unless gradients are shared
    bool first;           // this pass is the step's first: its gradients are assigned to the sums
    int collected;        // buckets added to the sums in this pass
    CommTicket *sent;     // (count) of each bucket's newest reduce-scatter
    CommTicket *gathered; // (count) of each bucket's newest all-gather; -1 = waited for
} Traffic;

// The model has been created with ModelOptions.ranks = the communicator's world. A bucket is about
// `bucket_bytes` of gradients. The traffic owns neither communicators nor model. STATUS_USAGE where
// the model shares gradients and its backend cannot add them up.
Status traffic_create(Communicator *communicator, Communicator *replicas, Model *model,
                      int64_t bucket_bytes, Traffic **out) NODISCARD;
void traffic_destroy(Traffic *traffic); // NULL is fine

// Adds "gradient sums" where ranks share gradients.
Status traffic_plan(const TensorTable *table, const ModelOptions *options,
                    MemoryPlan *plan) NODISCARD;

// The hooks of a micro-batch (Model.hooks): waiting for weights in the first of a step, sending
// gradients in the last, or in each where ranks share them; NULL for one that does neither.
const ModelHooks *traffic_hooks(Traffic *traffic, bool first, bool last);
Status traffic_reduce(Traffic *traffic) NODISCARD;
Status traffic_gather(Traffic *traffic, int bucket) NODISCARD;
Status traffic_settle(Traffic *traffic) NODISCARD;

#endif
