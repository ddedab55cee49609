// The learning rate of every step, as a pure function of the step number: nothing to save, nothing
// to restore.
//
//   rate  peak ─      ╭───╮                     Warm-up is linear and reaches the peak at step
//                    ╱     ╲   cosine           warmup_steps. Cosine and wsd end at exactly
//        final ─    ╱       ╰──                 `final` at step total_steps. wsd stays at the peak
//            0 ─   ╱                            until decay_steps before the end, then falls in a
//                  warm-up   total              straight line (Hu et al. 2024, MiniCPM).
#include "optim/schedule.h"

#include <math.h>

static double cosine_rate(const Schedule *s, int64_t step) {
    double done = (double)(step - s->warmup_steps) / (double)(s->total_steps - s->warmup_steps);
    return s->final + (s->peak - s->final) * 0.5 * (1.0 + cos(M_PI * done));
}

static double wsd_rate(const Schedule *s, int64_t step) {
    int64_t left = s->total_steps - step;
    if (left >= s->decay_steps) return s->peak;
    return s->final + (s->peak - s->final) * ((double)left / (double)s->decay_steps);
}

double schedule_rate(const Schedule *schedule, int64_t step) {
    if (step > schedule->total_steps) step = schedule->total_steps;
    if (step < schedule->warmup_steps)
        return schedule->peak * ((double)step / (double)schedule->warmup_steps);
    // Exact where the phases meet: (peak - final) + final need not round back to peak.
    if (step == schedule->warmup_steps) return schedule->peak;
    switch (schedule->kind) {
    case SCHEDULE_COSINE:
        return cosine_rate(schedule, step);
    case SCHEDULE_WSD:
        return wsd_rate(schedule, step);
    case SCHEDULE_CONSTANT:
        break;
    }
    return schedule->peak;
}
