// Columns that stay where they are from line to line, so that an eye running down a log sees what
// changes. Rates and times have three digits: more would only flicker.
#include "train/console.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { BAR_CELLS = 24 };

const char *duration_text(double seconds, char text[DURATION_TEXT_SIZE]) {
    // 1e9 seconds are 31 years: an estimate from a first, slow step can say anything.
    if (!(seconds >= 0 && seconds < 1e9)) return strcpy(text, "-");
    int64_t s = (int64_t)(seconds + 0.5);
    int64_t days = s / 86400, hours = s / 3600 % 24, minutes = s / 60 % 60;
    int rest = (int)(s % 60);
    if (days > 0) {
        snprintf(text, DURATION_TEXT_SIZE, "%dd %02d:%02d:%02d", (int)days, (int)hours,
                 (int)minutes, rest);
    } else if (hours > 0) {
        snprintf(text, DURATION_TEXT_SIZE, "%d:%02d:%02d", (int)hours, (int)minutes, rest);
    } else {
        snprintf(text, DURATION_TEXT_SIZE, "%d:%02d", (int)minutes, rest);
    }
    return text;
}

const char *rate_text(double per_second, char text[DURATION_TEXT_SIZE]) {
    static const char *const units[] = {"", "k", "M", "G"};
    if (!isfinite(per_second) || per_second < 0) return strcpy(text, "-");
    int unit = 0;
    while (per_second >= 999.5 && unit < 3) per_second /= 1000, unit++;
    int decimals = unit == 0 || per_second >= 99.95 ? 0 : per_second >= 9.995 ? 1 : 2;
    snprintf(text, DURATION_TEXT_SIZE, "%.*f%s", decimals, per_second, units[unit]);
    return text;
}

void console_step_line(char line[CONSOLE_LINE_MAX], const StepReport *step, int moe_layers) {
    char balance[32] = "", rate[DURATION_TEXT_SIZE], eta[DURATION_TEXT_SIZE];
    if (moe_layers > 0) snprintf(balance, sizeof balance, " LB %.2f/%d", step->balance, moe_layers);
    snprintf(line, CONSOLE_LINE_MAX,
             "step %" PRId64 "/%" PRId64
             " | loss %.4f CE %.4f%s | ppl %.4g | lr %.2e | grad %.3g | "
             "%s tok/s | wait %.1f%% | ETA %s | skipped %" PRId64,
             step->step, step->total_steps, step->loss, step->cross_entropy, balance,
             exp(step->cross_entropy), step->learning_rate, step->gradient_norm,
             rate_text(step->tokens_per_second, rate), 100 * step->data_wait,
             duration_text(step->eta_seconds, eta), step->skipped);
}

void console_progress_line(char line[CONSOLE_LINE_MAX], int64_t step, int64_t total_steps,
                           double loss, double tokens_per_second, double eta_seconds) {
    double share = total_steps > 0 ? (double)step / (double)total_steps : 0;
    share = share < 0 ? 0 : share > 1 ? 1 : share;
    int cells = (int)(share * BAR_CELLS);
    char bar[BAR_CELLS + 1], rate[DURATION_TEXT_SIZE], eta[DURATION_TEXT_SIZE];
    for (int i = 0; i < BAR_CELLS; i++) bar[i] = i < cells ? '=' : i == cells ? '>' : ' ';
    bar[BAR_CELLS] = '\0';
    snprintf(line, CONSOLE_LINE_MAX,
             "[%s] %3d%% step %" PRId64 "/%" PRId64 " loss %.4g %s tok/s ETA %s", bar,
             (int)(100 * share), step, total_steps, loss, rate_text(tokens_per_second, rate),
             duration_text(eta_seconds, eta));
}
