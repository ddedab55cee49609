// Which steps are thrown away before AdamW touches its state (METHOD.md §6).
#ifndef OPTIM_SKIP_RULE_H
#define OPTIM_SKIP_RULE_H

#include <stdbool.h>
#include <stdint.h>

// A step whose loss or gradient norm is not finite is always skipped. With sigma > 0 so is a step
// whose loss lies more than `sigma` standard deviations above the mean of the last `window` kept
// losses. losses, seen, in_a_row and skipped are state: a checkpoint saves and restores them.
enum { SKIP_WINDOW_MAX = 1024 };
typedef struct SkipRule {
    double sigma;     // 0 = no spike rule
    int window;       // 2 .. SKIP_WINDOW_MAX
    int warmup;       // the spike rule is active once this many losses are kept (at least 2)
    int max_in_a_row; // skipped steps in a row that stop the run
    double losses[SKIP_WINDOW_MAX]; // ring: kept loss i is at i mod window
    int64_t seen;                   // losses kept so far
    int in_a_row;                   // steps skipped just now, one after the other
    int64_t skipped;                // in the whole run
} SkipRule;

typedef enum SkipReason { SKIP_NONE, SKIP_NON_FINITE, SKIP_SPIKE, SKIP_ASKED_FOR } SkipReason;

// Sets the rule and an empty window; the spike rule starts when half the window is filled.
void skip_rule_init(SkipRule *rule, double sigma, int window, int max_in_a_row);
// Decides on a step and records the outcome. Only the loss of a kept step enters the window, so a
// NaN never does.
SkipReason skip_rule_decide(SkipRule *rule, double loss, double gradient_norm);
// Records a step that is skipped because somebody said so: it is no sign of a run gone wrong, so it
// neither lengthens nor ends a row.
void skip_rule_ask(SkipRule *rule);
// True when max_in_a_row steps have been skipped one after the other.
bool skip_rule_exhausted(const SkipRule *rule);
const char *skip_reason_name(SkipReason reason); // as it is told

#endif
