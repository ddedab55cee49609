// What the GPU driver reports while a run goes on: Xid errors and uncorrectable memory errors, with
// node and GPU, from NVML. Its library is looked for at run time; without it nothing is watched.
#ifndef TRAIN_GPU_EVENTS_H
#define TRAIN_GPU_EVENTS_H

#include <stdbool.h>
#include "base/status.h"

typedef struct GpuEvents GpuEvents;

// Watches all GPUs of this machine in a thread of its own. `library`: a path, or NULL for
// $DENSE2MOE_NVML or the driver's libnvidia-ml.so.1. *out is NULL where there is nothing to watch.
// `say` false: remembers what happens without a log line, for ranks beside one that speaks.
Status gpu_events_start(const char *library, bool say, GpuEvents **out) NODISCARD;
void gpu_events_stop(GpuEvents *events); // NULL is nothing

// Of a failure that the device reported: STATUS_INTERNAL becomes STATUS_COMMUNICATION, "start
// again, elsewhere", when the hardware has reported an error of its own; the message then names it.
// Waits a moment for a report that comes after its consequences. Other failures stay what they are.
Status gpu_events_explain(GpuEvents *events, Status failure);

#endif
