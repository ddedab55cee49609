// AdamW over a model's arenas, with gradient clipping.
#ifndef OPTIM_OPTIMIZER_H
#define OPTIM_OPTIMIZER_H

#include <stdbool.h>
#include <stdint.h>
#include "base/memory_plan.h"
#include "base/status.h"
#include "model/model.h"

typedef struct OptimizerOptions {
    double beta1, beta2, epsilon, weight_decay, clip_norm; // clip_norm 0 = off
    bool decay_embeddings;
    DType state_dtype; // of m and v
} OptimizerOptions;

// Neighbouring tensors that one AdamW call can update: same weight decay, same dtype of gradient
// and working copy. Gaps between them hold zeros and stay zero.
typedef struct OptimizerRun {
    int64_t begin, count; // elements of the arenas
    bool decays;
    bool router; // in the fp32 tail
} OptimizerRun;

typedef struct Optimizer {
    Model *model;
    OptimizerOptions options;
    void *m, *v;     // (table.total) of state_dtype, device memory
    int64_t updates; // AdamW updates made so far (skipped steps do not count)
    OptimizerRun *runs;
    int num_runs;
    double *sums; // (2) device memory for the norm
} Optimizer;

// Adds "optimizer state" (m and v).
Status optimizer_plan(const TensorTable *table, const OptimizerOptions *options,
                      MemoryPlan *plan) NODISCARD;
Status optimizer_create(Model *model, const OptimizerOptions *options, Optimizer **out) NODISCARD;
void optimizer_destroy(Optimizer *optimizer);

// Global norm of the model's gradients; +inf when any element is not finite.
Status optimizer_gradient_norm(Optimizer *optimizer, double *norm) NODISCARD;
// One update, gradients scaled so that their norm is at most clip_norm. `norm` must be finite: the
// caller skips the step otherwise (optim/skip_rule.h).
Status optimizer_step(Optimizer *optimizer, double learning_rate, double norm) NODISCARD;

#endif
