// One optimizer step: a global batch in micro-batches, the decision whether it counts, AdamW.
//
// A skipped step still is a step: it has used its samples, it moves the schedule, and it is
// counted. Only weights, m, v, the balance load and the loss window stay as they were.
#include "train/trainer.h"

#include <inttypes.h>
#include <math.h>
#include "base/clock.h"
#include "base/log.h"
#include "train/router_stats.h"

typedef struct StepLosses {
    double cross_entropy, balance, z;
    double total; // CE + α·LB + ζ·Z
    double norm;  // of the gradients
} StepLosses;

static Status forward_backward(Trainer *t, const StepBatch *batch) {
    const Recipe *r = t->recipe;
    LossWeights weights = {
        .target_count = batch->valid_targets > 0 ? (double)batch->valid_targets : 1.0,
        .token_count = (double)recipe_tokens_per_step(r),
        .balance = r->router_balance_weight,
        .z = r->router_z_weight,
        .balance_micro = r->router_balance == BALANCE_MICRO,
    };
    TRY(model_zero_gradients(t->model));
    TRY(model_reset_sums(t->model));
    TRY(model_set_load(t->model, t->state.load));
    if (r->router_balance_bias) TRY(model_set_selection_bias(t->model, t->state.bias));
    for (int i = 0; i < batch->num_micro; i++)
        TRY(model_forward_backward(t->model, &batch->micro[i], &weights));
    return model_read_sums(t->model, &t->sums);
}

static Status measure(Trainer *t, StepLosses *out) {
    const ModelSums *sums = &t->sums;
    out->balance = router_balance(&t->config, sums);
    out->z = router_z(&t->config, sums);
    out->cross_entropy = sums->loss_count > 0 ? sums->loss_sum / sums->loss_count : 0;
    out->total = out->cross_entropy + t->recipe->router_balance_weight * out->balance +
                 t->recipe->router_z_weight * out->z;
    return optimizer_gradient_norm(t->optimizer, &out->norm);
}

// The latest kept global batch decides f_i of the next one, and moves the selection bias
// (Wang et al. 2024, auxiliary-loss-free balancing).
static void update_balance(Trainer *t) {
    RunState *state = &t->state;
    for (int l = 0; l < t->config.num_layers; l++) {
        int experts = t->config.layers[l].num_experts;
        const double *assignments = t->sums.assignments + l * t->sums.stride;
        float *load = state->load + l * state->stride, *bias = state->bias + l * state->stride;
        double all = 0;
        for (int e = 0; e < experts; e++) all += assignments[e];
        for (int e = 0; e < experts && all > 0; e++) {
            double mean = all / experts, rate = t->recipe->router_bias_rate;
            load[e] = (float)(assignments[e] / all);
            if (!t->recipe->router_balance_bias || assignments[e] == mean) continue;
            bias[e] += (float)(assignments[e] < mean ? rate : -rate);
        }
    }
}

static Status keep(Trainer *t, const StepLosses *losses) {
    t->learning_rate = schedule_rate(&t->schedule, t->state.step + 1);
    TRY(optimizer_step(t->optimizer, t->learning_rate, losses->norm));
    t->state.updates = t->optimizer->updates;
    update_balance(t);
    run_interval_add(&t->state, &t->sums, losses->balance, losses->z, losses->norm);
    return STATUS_OK;
}

static Status skip(Trainer *t, const StepBatch *batch, SkipReason reason,
                   const StepLosses *losses) {
    const SkipRule *rule = &t->state.skip;
    int64_t step = t->state.step + 1, samples = t->recipe->train_global_batch;
    uint64_t first = batch->first_sample, last = first + (uint64_t)samples - 1;
    char text[256];
    snprintf(text, sizeof text,
             "%s: loss %.6g, gradient norm %.6g, samples %" PRIu64 " to %" PRIu64 ", %d in a row",
             skip_reason_name(reason), losses->total, losses->norm, first, last, rule->in_a_row);
    log_warn("step %" PRId64 " skipped, %s", step, text);
    report_event(t->report, step, "skip", text);
    if (!skip_rule_exhausted(rule)) return STATUS_OK;
    uint64_t row = (uint64_t)(rule->in_a_row - 1) * (uint64_t)samples;
    FAIL(STATUS_NUMERICS,
         "steps %" PRId64 " to %" PRId64 " were all skipped (optim.max_skipped = %d in a row), "
         "samples %" PRIu64 " to %" PRIu64 " of the run's order; last: %s, loss %.6g, gradient "
         "norm %.6g; lower optim.lr or continue from an earlier checkpoint with --resume DIR",
         step - rule->in_a_row + 1, step, rule->max_in_a_row, first > row ? first - row : 0, last,
         skip_reason_name(reason), losses->total, losses->norm);
}

static void show_progress(Trainer *t, double loss) {
    double seconds = t->interval_seconds / (double)t->interval_steps;
    double rate = seconds > 0 ? (double)recipe_tokens_per_step(t->recipe) / seconds : 0;
    report_progress(t->report, t->state.step, t->total_steps, loss, rate,
                    seconds * (double)(t->total_steps - t->state.step));
}

// A named part of the step on the time line of a tool; NULL ends it. A failed step leaves its range
// open, and the run ends.
static void range(Trainer *t, const char *name) {
    t->backend->ops->range(t->backend, name);
}

static Status update(Trainer *t, const StepBatch *batch, StepLosses *losses) {
    TRY(measure(t, losses));
    SkipReason reason = skip_rule_decide(&t->state.skip, losses->total, losses->norm);
    return reason == SKIP_NONE ? keep(t, losses) : skip(t, batch, reason, losses);
}

Status train_step(Trainer *t) {
    const StepBatch *batch;
    StepLosses losses;
    double start = clock_seconds();
    range(t, "step");
    range(t, "wait for data");
    TRY(loader_next(t->loader, &batch));
    range(t, NULL);
    range(t, "forward and backward");
    TRY(forward_backward(t, batch));
    range(t, NULL);
    range(t, "optimizer");
    TRY(update(t, batch, &losses));
    range(t, NULL);
    range(t, NULL);
    t->state.step++;
    t->state.tokens += recipe_tokens_per_step(t->recipe);
    t->state.data = batch->after;
    t->unsaved = true;
    t->interval_steps++;
    t->interval_wait += batch->wait_seconds;
    t->interval_seconds += clock_seconds() - start;
    show_progress(t, losses.total);
    return STATUS_OK;
}

void report_interval(Trainer *t) {
    const Recipe *r = t->recipe;
    const RunInterval *interval = &t->state.interval;
    double steps = (double)interval->steps; // 0 when all were skipped: means are NaN then
    double seconds = t->interval_seconds;
    ModelSums sums = {.loss_sum = interval->loss_sum,
                      .loss_count = interval->loss_count,
                      .tokens = interval->tokens,
                      .stride = t->state.stride,
                      .assignments = interval->assignments,
                      .probability = interval->probability,
                      .entropy = interval->entropy,
                      .z = interval->router_z};
    bool load_due = t->state.step / r->train_log_every % r->report_expert_load_every == 0;
    StepReport report = {
        .step = t->state.step,
        .total_steps = t->total_steps,
        .tokens = t->state.tokens,
        .cross_entropy = interval->loss_sum / interval->loss_count,
        .balance = interval->balance / steps,
        .z = interval->z / steps,
        .learning_rate = t->learning_rate,
        .gradient_norm = interval->norm / steps,
        .tokens_per_second =
            (double)t->interval_steps * (double)recipe_tokens_per_step(r) / seconds,
        .data_wait = t->interval_wait / seconds,
        .eta_seconds =
            seconds / (double)t->interval_steps * (double)(t->total_steps - t->state.step),
        .skipped = t->state.skip.skipped,
        .sums = config_has_moe(&t->config) && load_due ? &sums : NULL,
    };
    report.loss = report.cross_entropy + r->router_balance_weight * report.balance +
                  r->router_z_weight * report.z;
    report_step(t->report, &report);
    run_interval_reset(&t->state);
    t->interval_seconds = t->interval_wait = 0;
    t->interval_steps = 0;
}
