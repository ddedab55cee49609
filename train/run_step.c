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
#include "train/step_sums.h"

typedef struct StepLosses {
    double cross_entropy, balance, z;
    double total; // CE + α·LB + ζ·Z
    double norm;  // of the gradients
} StepLosses;

static Status micro_batch(Trainer *t, const StepBatch *batch, int i, const LossWeights *weights) {
    // Sums of pairs are complete only once all micro-batches have been added.
    bool last = i == batch->num_micro - 1 && !t->pairwise;
    watchdog_beat(t->watchdog, t->state.step + 1, "in the step"); // of which there may be hundreds
    t->model->hooks = t->traffic ? traffic_hooks(t->traffic, i == 0, last) : NULL;
    Status status = model_forward_backward(t->model, &batch->micro[i], weights);
    t->model->hooks = NULL;
    return status;
}

// Gradients and sums of each micro-batch by themselves, added up in pairs.
static Status run_in_pairs(Trainer *t, const StepBatch *batch, const LossWeights *weights) {
    const int layers = t->config.num_layers;
    StepNews none = {.stop = 0};
    for (int i = 0; i < batch->num_micro; i++) {
        TRY(model_zero_gradients(t->model));
        TRY(model_reset_sums(t->model));
        TRY(micro_batch(t, batch, i, weights));
        TRY(model_read_sums(t->model, &t->sums));
        step_sums_pack(&t->sums, layers, &none, t->row);
        TRY(pairwise_add(t->pairwise, t->row));
    }
    TRY(pairwise_finish(t->pairwise, t->row));
    if (t->traffic) TRY(traffic_reduce(t->traffic));
    step_sums_unpack(t->row, layers, &t->sums, &none);
    return STATUS_OK;
}

static Status run_one_by_one(Trainer *t, const StepBatch *batch, const LossWeights *weights) {
    TRY(model_zero_gradients(t->model));
    TRY(model_reset_sums(t->model));
    for (int i = 0; i < batch->num_micro; i++) TRY(micro_batch(t, batch, i, weights));
    if (t->traffic) TRY(traffic_reduce(t->traffic));
    return model_read_sums(t->model, &t->sums);
}

// Where ranks share gradients, those of a micro-batch have left when it ends.
static Status run_and_send(Trainer *t, const StepBatch *batch, const LossWeights *weights) {
    TRY(model_reset_sums(t->model));
    for (int i = 0; i < batch->num_micro; i++) {
        TRY(model_zero_gradients(t->model));
        TRY(micro_batch(t, batch, i, weights));
        TRY(traffic_reduce(t->traffic));
    }
    return model_read_sums(t->model, &t->sums);
}

// Leaves this rank's sums in t->sums, and in the gradients that it owns the sums over all ranks.
static Status forward_backward(Trainer *t, const StepBatch *batch) {
    const Recipe *r = t->recipe;
    LossWeights weights = {
        .target_count = batch->valid_targets > 0 ? (double)batch->valid_targets : 1.0,
        .token_count = (double)recipe_tokens_per_step(r),
        .balance = r->router_balance_weight,
        .z = r->router_z_weight,
        .balance_micro = r->router_balance == BALANCE_MICRO,
    };
    TRY(model_set_load(t->model, t->state.load));
    if (r->router_balance_bias) TRY(model_set_selection_bias(t->model, t->state.bias));
    if (t->pairwise) return run_in_pairs(t, batch, &weights);
    if (t->traffic && t->traffic->sums) return run_and_send(t, batch, &weights);
    return run_one_by_one(t, batch, &weights);
}

Status sum_over_ranks(Trainer *t, StepNews *news) {
    const int layers = t->config.num_layers;
    if (t->team.world == 1) return STATUS_OK;
    step_sums_pack(&t->sums, layers, news, t->row);
    TRY(team_sum(&t->team, t->row, step_sums_count(&t->sums, layers)));
    step_sums_unpack(t->row, layers, &t->sums, news);
    return STATUS_OK;
}

// Block by block over all ranks, then in the order of the arena.
static Status sum_blocks(Trainer *t, double gradient[2]) {
    const int64_t count = pairwise_blocks(t->pairwise);
    double(*blocks)[2] = calloc((size_t)count, sizeof *blocks);
    if (!blocks) FAIL(STATUS_INTERNAL, "out of memory for %" PRId64 " block sums", count);
    Status status = pairwise_block_sums(t->pairwise, t->optimizer, blocks);
    if (status == STATUS_OK) status = team_sum(&t->team, &blocks[0][0], 2 * count);
    gradient[0] = gradient[1] = 0;
    for (int64_t i = 0; i < count; i++) {
        gradient[0] += blocks[i][0];
        gradient[1] += blocks[i][1];
    }
    free(blocks);
    return status;
}

// All that decides whether the step counts goes through one sum over the ranks, so that all ranks
// decide the same: a NaN on one is a NaN on all.
static Status measure(Trainer *t, StepLosses *out) {
    const ModelSums *sums = &t->sums;
    StepNews news = ranks_news(t);
    TRY(optimizer_gradient_sums(t->optimizer, news.gradient));
    TRY(sum_over_ranks(t, &news));
    if (t->pairwise) TRY(sum_blocks(t, news.gradient));
    TRY(ranks_hear(t, &news));
    out->balance = router_balance(&t->config, sums);
    out->z = router_z(&t->config, sums);
    out->cross_entropy = sums->loss_count > 0 ? sums->loss_sum / sums->loss_count : 0;
    out->total = out->cross_entropy + t->recipe->router_balance_weight * out->balance +
                 t->recipe->router_z_weight * out->z;
    out->norm = optimizer_norm(news.gradient);
    return STATUS_OK;
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
    char text[256], so_far[32] = "";
    if (reason != SKIP_ASKED_FOR) snprintf(so_far, sizeof so_far, ", %d in a row", rule->in_a_row);
    snprintf(text, sizeof text,
             "%s: loss %.6g, gradient norm %.6g, samples %" PRIu64 " to %" PRIu64 "%s",
             skip_reason_name(reason), losses->total, losses->norm, first, last, so_far);
    if (t->team.rank == 0) log_warn("step %" PRId64 " skipped, %s", step, text);
    report_event(t->report, step, "skip", text);
    if (reason == SKIP_ASKED_FOR || !skip_rule_exhausted(rule)) return STATUS_OK;
    uint64_t row = (uint64_t)(rule->in_a_row - 1) * (uint64_t)samples;
    Status status = status_fail(
        __FILE__, __LINE__, STATUS_NUMERICS,
        "steps %" PRId64 " to %" PRId64 " were all skipped (optim.max_skipped = %d in a row), "
        "samples %" PRIu64 " to %" PRIu64 " of the run's order; last: %s, loss %.6g, gradient "
        "norm %.6g; lower optim.lr or continue from an earlier checkpoint with --resume DIR",
        step - rule->in_a_row + 1, step, rule->max_in_a_row, first > row ? first - row : 0, last,
        skip_reason_name(reason), losses->total, losses->norm);
    if (t->team.rank > 0) status_told(); // all ranks have the same numbers, and rank 0 says so
    return status;
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
    if (step_ranges_have(&t->skip_steps, t->state.step + 1)) {
        skip_rule_ask(&t->state.skip);
        return skip(t, batch, SKIP_ASKED_FOR, losses);
    }
    SkipReason reason = skip_rule_decide(&t->state.skip, losses->total, losses->norm);
    return reason == SKIP_NONE ? keep(t, losses) : skip(t, batch, reason, losses);
}

Status train_step(Trainer *t) {
    const StepBatch *batch;
    StepLosses losses;
    const Communicator *c = t->team.communicator;
    double start = clock_seconds(), waited = c ? c->waited_seconds : 0;
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
    double seconds = clock_seconds() - start;
    t->interval_seconds += seconds;
    // Waits are told of a little late, those of an evaluation perhaps in the step behind it.
    if (c) step_times_add(&t->own_times, fmax(0, seconds - (c->waited_seconds - waited)));
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
