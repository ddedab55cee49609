// The run directory runs/<name>/: layout, lock, status (METHOD.md §8).
#ifndef TRAIN_RUNDIR_H
#define TRAIN_RUNDIR_H

#include <stdint.h>
#include "base/file.h"
#include "base/status.h"

typedef struct RunDir {
    char path[IO_PATH_MAX];
    int lock_fd; // held for the life of the process; -1 = not locked
    int attempt; // 1 for the first start, counted in run_status.json
} RunDir;

// Creates the directory and takes its lock: flock on `lock`, whose text names host, pid, job id and
// start. A lock held by a living process is STATUS_USAGE naming the holder; a directory that cannot
// be written is STATUS_CANNOT_WRITE. Appends an attempt to run_status.json; three attempts in a row
// that made no progress are STATUS_NO_PROGRESS. That refusal ends the row, so whoever has looked
// into the cause just starts the run again. So do an end that a person asked for (not SIGUSR1,
// which is a scheduler's: "preempted" with that word in its message) and one over a mistake.
Status rundir_open(RunDir *dir, const char *parent, const char *name) NODISCARD;
void rundir_close(RunDir *dir);
// Records how this attempt goes or ended: state "running", "done", "preempted", "failed". `step` is
// the newest step that a later attempt can resume from (its checkpoint is complete): an attempt
// has made progress when that is beyond every attempt before it.
Status rundir_status(RunDir *dir, const char *state, int64_t step, Status code,
                     const char *message) NODISCARD;
// The same for the attempt of process `pid` of this host, which was killed before it could say
// anything, by whoever has waited for its end. Nothing where it has said how it ended.
Status rundir_close_attempt(const char *parent, const char *name, long pid, const char *state,
                            Status code, const char *message) NODISCARD;

#endif
