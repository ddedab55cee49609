// What the ranks of a run tell each other between collectives of weights and gradients: how many
// targets a step has, whether its loss is finite, who was asked to stop, whose write failed.
//
// These are few bytes of host memory. They travel through a small piece of device memory, because
// that is what a communicator sees. With one rank every function returns at once.
#ifndef TRAIN_TEAM_H
#define TRAIN_TEAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "base/status.h"
#include "model/communicator.h"

typedef struct Team {
    Communicator *communicator; // NULL with one rank; not owned
    Backend *backend;
    int rank, world;
    void *device; // TEAM_DEVICE_BYTES
} Team;

enum { TEAM_DEVICE_BYTES = 1 << 16, TEAM_RANKS_MAX = 4096, TEAM_GATHER_MAX = 8192 };

// At most TEAM_RANKS_MAX ranks.
Status team_open(Backend *backend, Communicator *communicator, Team *out) NODISCARD;
void team_close(Team *team); // safe on zeroed memory

// Each value becomes its sum over the ranks; every rank gets the same bits.
Status team_sum(const Team *team, double *values, int64_t count) NODISCARD;
// Rank 0's bytes to all.
Status team_broadcast(const Team *team, void *data, size_t bytes) NODISCARD;
// all: (world, bytes), row r is rank r's; this rank's own row is filled on entry. At most
// TEAM_GATHER_MAX bytes a row.
Status team_gather(const Team *team, void *all, size_t bytes) NODISCARD;

// How `status`, which each rank brings with its own error record, went for all: STATUS_OK where all
// succeeded; else every rank fails with the code of the first rank that did, and its message, with
// the ranks that failed in front unless all failed alike. A failure of the communicator itself is
// returned as it is, at once.
Status team_agree(const Team *team, Status status) NODISCARD;

#endif
