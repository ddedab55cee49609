// The run's lines on the console, as text.
#ifndef TRAIN_CONSOLE_H
#define TRAIN_CONSOLE_H

#include <stddef.h>
#include <stdint.h>
#include "train/report.h"

enum { CONSOLE_LINE_MAX = 512, DURATION_TEXT_SIZE = 32 };

// "0:07", "12:03", "1:02:03", "5d 01:02:03"; "-" when it is not known (negative, not finite).
const char *duration_text(double seconds, char text[DURATION_TEXT_SIZE]);
// "812", "12.3k", "1.25M": three digits. "-" when it is not finite.
const char *rate_text(double per_second, char text[DURATION_TEXT_SIZE]);

// "step 10/100 | loss 3.2101 CE 3.2001 LB 19.42/19 | ppl 24.5 | lr 1.00e-04 | grad 0.912 |
// 12.3k tok/s | wait 0.4% | ETA 1:02:03 | skipped 0". LB is the sum over MoE layers, followed by
// what a balanced model would have; left out (moe_layers = 0) for a dense model.
void console_step_line(char line[CONSOLE_LINE_MAX], const StepReport *step, int moe_layers);
// "[=====>    ]  52% step 52/100 loss 3.21 12.3k tok/s ETA 0:41".
void console_progress_line(char line[CONSOLE_LINE_MAX], int64_t step, int64_t total_steps,
                           double loss, double tokens_per_second, double eta_seconds);

#endif
