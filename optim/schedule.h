// Learning-rate schedules (METHOD.md §6).
#ifndef OPTIM_SCHEDULE_H
#define OPTIM_SCHEDULE_H

#include <stdint.h>

typedef enum ScheduleKind { SCHEDULE_COSINE, SCHEDULE_CONSTANT, SCHEDULE_WSD } ScheduleKind;

typedef struct Schedule {
    ScheduleKind kind;
    double peak, final;   // learning rates
    int64_t warmup_steps; // linear from 0
    int64_t decay_steps;  // wsd: length of the linear decay at the end
    int64_t total_steps;
} Schedule;

// The rate for the update that makes step `step` (1-based). Exactly `peak` at step warmup_steps
// and, for cosine and wsd, exactly `final` from step total_steps on. A step that is skipped keeps
// its number: the schedule follows steps, not updates.
double schedule_rate(const Schedule *schedule, int64_t step);

#endif
