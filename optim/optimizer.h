// AdamW over a model's arenas, with gradient clipping. With several ranks each has the moments of
// the elements that it owns (optim/partition.h) and updates only those.
#ifndef OPTIM_OPTIMIZER_H
#define OPTIM_OPTIMIZER_H

#include <stdbool.h>
#include <stdint.h>
#include "base/memory_plan.h"
#include "base/status.h"
#include "model/model.h"
#include "optim/traffic.h"

typedef struct OptimizerOptions {
    double beta1, beta2, epsilon, weight_decay, clip_norm; // clip_norm 0 = off
    bool decay_embeddings;
    DType state_dtype; // of m and v
} OptimizerOptions;

// Neighbouring tensors, or parts of them, that one AdamW call can update: same weight decay, same
// dtype of gradient and working copy. Gaps between them hold zeros and stay zero.
typedef struct OptimizerRun {
    int64_t begin, count; // elements of the arenas
    int64_t state;        // the first one's place in m and v
    bool decays;
    bool router; // in the fp32 tail
    int bucket;  // of the partition
} OptimizerRun;

typedef struct Optimizer {
    Model *model;
    OptimizerOptions options;
    Traffic *traffic;           // NULL with one rank
    const Partition *partition; // the traffic's, or `alone`
    Partition alone;
    void *m, *v;              // (partition->owned) of state_dtype, device memory
    float *master;            // (partition->owned) fp32 weights; NULL where the model has them all
    MasterPart *master_parts; // (partition->count) the same for the model's loader
    int64_t updates;          // AdamW updates made so far (skipped steps do not count)
    OptimizerRun *runs;       // by rising begin
    int num_runs;
    double *sums; // (2) device memory for the norm
} Optimizer;

// Adds "optimizer state" (m and v) of one of `ranks` ranks, and "master weights" where they share
// those: the table is padded for as many.
Status optimizer_plan(const TensorTable *table, const OptimizerOptions *options, DType compute,
                      int ranks, MemoryPlan *plan) NODISCARD;
// `traffic` NULL: this rank is alone and owns everything. With traffic, create the optimizer
// before the model is loaded.
Status optimizer_create(Model *model, const OptimizerOptions *options, Traffic *traffic,
                        Optimizer **out) NODISCARD;
void optimizer_destroy(Optimizer *optimizer);

// Over the gradients that this rank owns: sums[0] = Σ g², sums[1] = how many are not finite. Their
// sums over the ranks go to optimizer_norm.
Status optimizer_gradient_sums(Optimizer *optimizer, double sums[2]) NODISCARD;
// The norm; +inf when any element was not finite.
double optimizer_norm(const double sums[2]);
// Both, for one rank.
Status optimizer_gradient_norm(Optimizer *optimizer, double *norm) NODISCARD;
// One update, gradients scaled so that their norm is at most clip_norm. `norm` must be finite: the
// caller skips the step otherwise (optim/skip_rule.h). With traffic the new weights are on
// their way to the other ranks when it returns (traffic_settle).
Status optimizer_step(Optimizer *optimizer, double learning_rate, double norm) NODISCARD;

#endif
