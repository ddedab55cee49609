// Skipping bad steps. One non-finite gradient that reaches AdamW poisons m, v and the weights for
// ever, and one poisoned loss in the window would switch the spike rule off for ever (every
// comparison with NaN is false). So the decision comes first and everything else follows from it.
#include "optim/skip_rule.h"

#include <math.h>
#include <string.h>

void skip_rule_init(SkipRule *rule, double sigma, int window, int max_in_a_row) {
    memset(rule, 0, sizeof *rule);
    rule->sigma = sigma;
    rule->window = window < 2 ? 2 : window > SKIP_WINDOW_MAX ? SKIP_WINDOW_MAX : window;
    rule->warmup = rule->window / 2 < 2 ? 2 : rule->window / 2;
    rule->max_in_a_row = max_in_a_row;
}

static bool is_spike(const SkipRule *rule, double loss) {
    if (rule->sigma <= 0 || rule->seen < rule->warmup) return false;
    int known = rule->seen < rule->window ? (int)rule->seen : rule->window;
    // Always in slot order: the sum must not depend on where the ring happens to start.
    double sum = 0, squares = 0;
    for (int i = 0; i < known; i++) sum += rule->losses[i];
    double mean = sum / known;
    for (int i = 0; i < known; i++) squares += (rule->losses[i] - mean) * (rule->losses[i] - mean);
    double deviation = sqrt(squares / (known - 1));
    // Equal losses have no scale to measure a spike with.
    return deviation > 0 && loss > mean + rule->sigma * deviation;
}

SkipReason skip_rule_decide(SkipRule *rule, double loss, double gradient_norm) {
    SkipReason reason = SKIP_NONE;
    if (!isfinite(loss) || !isfinite(gradient_norm))
        reason = SKIP_NON_FINITE;
    else if (is_spike(rule, loss))
        reason = SKIP_SPIKE;
    if (reason != SKIP_NONE) {
        rule->in_a_row++;
        rule->skipped++;
        return reason;
    }
    rule->losses[rule->seen % rule->window] = loss;
    rule->seen++;
    rule->in_a_row = 0;
    return SKIP_NONE;
}

void skip_rule_ask(SkipRule *rule) {
    rule->skipped++;
}

bool skip_rule_exhausted(const SkipRule *rule) {
    return rule->in_a_row >= rule->max_in_a_row;
}

const char *skip_reason_name(SkipReason reason) {
    static const char *const names[] = {"none", "non-finite", "spike", "asked for"};
    return names[reason];
}
