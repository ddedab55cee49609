// Requests to stop: SIGTERM, SIGUSR1 (Slurm's --signal) and SIGINT ask the run to finish its step,
// save and exit with STATUS_PREEMPTED. A second one ends the process at once; in a rank that
// train/supervisor.h has started, one that comes some seconds later. Meanwhile output that nobody
// reads any more is lost and ends nothing (SIGPIPE).
#ifndef TRAIN_STOP_SIGNAL_H
#define TRAIN_STOP_SIGNAL_H

#include <stdbool.h>

void stop_signal_install(void); // forgets earlier requests
void stop_signal_restore(void); // back to the handlers before
bool stop_requested(void);
const char *stop_signal_name(void); // "SIGTERM", ...; "" when none came

#endif
