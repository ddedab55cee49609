// One process per rank on this machine, started and watched by a parent that computes nothing.
//
// The parent starts the program again, once per rank, with the variables of train/launch.h. Rank
// 0's output is the program's; lines of the others go to stderr with the rank in front. SIGTERM,
// SIGINT and SIGUSR1 are passed on. When a rank fails, or on a second request to stop, the others
// get some seconds to notice and say so, then they are killed; when the parent dies, they are asked
// to save and stop.
#ifndef TRAIN_SUPERVISOR_H
#define TRAIN_SUPERVISOR_H

#include <sys/types.h>
#include "base/status.h"

enum { SUPERVISOR_RANKS_MAX = 1024 };

typedef struct SupervisorOptions {
    int processes;
    // After a lost rank (STATUS_COMMUNICATION or a death by a signal) all are started again, at
    // most so many times.
    int max_restarts;
    double grace_seconds;    // 0: the default
    char *const *arguments;  // argv of the ranks, NULL-terminated
    char *const *on_restart; // argv after a restart; NULL: the same
    const char *program;     // NULL: this very program
} SupervisorOptions;

typedef struct SupervisorEnd {
    int exit_code; // of the whole
    int insisted;  // the signal of a second request to stop; 0: none
    pid_t first;   // rank 0's process, of the last start
} SupervisorEnd;

// Runs the ranks to their end. The exit code is of all ranks' the worst, what no repetition can
// mend before what one may. A rank that a signal has killed counts as
// STATUS_COMMUNICATION: its work is lost, the run can go on. Fails only when a rank cannot be
// started. What a second request ends counts as STATUS_PREEMPTED.
Status supervise(const SupervisorOptions *options, SupervisorEnd *out) NODISCARD;

// The worse of two exit codes, by the same order.
int supervisor_worse(int a, int b);

#endif
