// AdamW over a model's arenas, with gradient clipping and the rules for skipping a step.
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
} OptimizerOptions;

typedef struct Optimizer {
    Model *model;
    OptimizerOptions options;
    float *m, *v;    // (table.total)
    int64_t updates; // AdamW updates made so far (skipped steps do not count)
} Optimizer;

Status optimizer_plan(const TensorTable *table, MemoryPlan *plan) NODISCARD;
Status optimizer_create(Model *model, const OptimizerOptions *options, Optimizer **out) NODISCARD;
void optimizer_destroy(Optimizer *optimizer);

// Global norm of the model's gradients; +inf or NaN when any element is not finite.
Status optimizer_gradient_norm(Optimizer *optimizer, double *norm) NODISCARD;
// One update, gradients scaled so that their norm is at most clip_norm.
Status optimizer_step(Optimizer *optimizer, double learning_rate, double norm) NODISCARD;

// Loss-spike rule: a step whose loss lies more than `sigma` standard deviations above the mean of
// the last `window` kept losses may be skipped. The window is state: it is saved and restored.
enum { SKIP_WINDOW_MAX = 1024 };
typedef struct SkipRule {
    double sigma;       // 0 = off
    int window, warmup; // active once `warmup` losses are known
    int max_in_a_row;   // non-finite or spiking steps before STATUS_NUMERICS
    double losses[SKIP_WINDOW_MAX];
    int64_t seen;    // losses recorded so far
    int in_a_row;    // skipped just now, one after the other
    int64_t skipped; // in the whole run
} SkipRule;
typedef enum SkipReason { SKIP_NONE, SKIP_NON_FINITE, SKIP_SPIKE } SkipReason;
// Decides before AdamW runs, and records the outcome.
SkipReason skip_rule_decide(SkipRule *rule, double loss, double gradient_norm);

#endif
