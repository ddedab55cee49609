// Who this process is among the ranks of a run, and how they come to be.
//
//  - Somebody else starts one process per rank: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
//    MASTER_PORT say so, as torchrun's users know them; or Slurm's srun, by its SLURM_* variables.
//  - Nobody does: the program starts the ranks of this machine itself, one process each, and stays
//    as their parent (train/supervisor.h). Alone with one rank it just runs.
#ifndef TRAIN_LAUNCH_H
#define TRAIN_LAUNCH_H

#include <stdbool.h>
#include "base/net.h"
#include "base/status.h"
#include "train/rendezvous.h"

// Variables that the parent sets for the ranks it starts.
#define LAUNCH_JOB      "DENSE2MOE_JOB"          // what the ranks of one start have in common
#define LAUNCH_LISTENER "DENSE2MOE_LISTENER_FD"  // rank 0: an inherited socket at MASTER_PORT
#define LAUNCH_PARENT   "DENSE2MOE_LAUNCHER_PID" // there is one, and who

typedef enum LaunchKind {
    LAUNCH_NONE,  // started alone: no variable says otherwise
    LAUNCH_HAND,  // RANK, WORLD_SIZE, ...
    LAUNCH_SLURM, // a task of srun
} LaunchKind;

typedef struct Launch {
    LaunchKind kind;
    int rank, world, local_rank;
    char master_host[NET_HOST_MAX];
    int master_port;
    int listener; // inherited, or -1
    char job[RENDEZVOUS_ID_MAX];
} Launch;

// Reads the environment. STATUS_USAGE names the variable that is missing or no number.
Status launch_from_environment(Launch *out) NODISCARD;

// The first host of Slurm's list ("gpu[003-005,9],login" -> "gpu003").
Status launch_first_host(const char *list, char *out, size_t room) NODISCARD;

// Whether all ranks of a run are on this machine, as far as this process can tell: it starts them
// itself, or its parent has.
bool launch_all_here(void);

// What each of so many processes on this machine has of the cores that this one may use.
int launch_cores_for(int processes);

#endif
