// Where the ranks of a run find each other: own TCP rendezvous, on rank 0.
//
// Rank 0 listens on the master port; the others come, each saying who it is: rank, world size, job,
// recipe, build, host, process. When all are there and agree, rank 0 tells each where the others
// are, together with a fresh nonce, and the run begins. Otherwise every rank that came is told the
// same one message, which names the culprits, and all fail: a run never starts with fewer ranks or
// with ranks that would compute something else, and nobody waits beyond the time-out.
//
// The port is open to whoever reaches it. A connection that says something else, says nothing, or
// belongs to another job (a rank left over from an earlier start) is refused, reported, and changes
// nothing for the others. The nonce keeps such ranks out of what the ranks open afterwards. None of
// this is a protection against somebody who means harm and can read the traffic: a cluster's
// network must not be open to such people.
//
// What stays is a star: a connection of each rank with rank 0, for small things to agree on (NCCL's
// unique id, the fingerprint of the data), and on request a mesh of all with all, for the CPU's
// communicator.
#ifndef TRAIN_RENDEZVOUS_H
#define TRAIN_RENDEZVOUS_H

#include <stdbool.h>
#include <stddef.h>
#include "base/status.h"

enum { RENDEZVOUS_ID_MAX = 128 };

typedef struct RendezvousOptions {
    int rank, world;
    const char *master_host;
    int master_port;
    // Compared with rank 0's. A rank of another job is refused; another recipe or build ends the
    // run. Texts of less than RENDEZVOUS_ID_MAX bytes.
    const char *job, *recipe, *build;
    const char *recipe_text; // to say what differs: "[section]" and "key = value" lines; or NULL
    double timeout_seconds;  // for joining, and for each call afterwards
    bool mesh;
    int listener; // of rank 0: a socket that listens there already, taken over; <= 0: none
} RendezvousOptions;

typedef struct Rendezvous Rendezvous;

// STATUS_USAGE: port taken, host unknown, or ranks that do not agree. STATUS_COMMUNICATION: ranks
// are missing, or the master cannot be reached.
Status rendezvous_join(const RendezvousOptions *options, Rendezvous **out) NODISCARD;
void rendezvous_close(Rendezvous *rendezvous); // NULL is nothing

// "node3, pid 77"
const char *rendezvous_name(const Rendezvous *rendezvous, int rank);

// The mesh: (world) sockets, [rank] = -1. The caller owns them from here on; asked once.
Status rendezvous_take_mesh(Rendezvous *rendezvous, int *sockets) NODISCARD;

// All ranks must make these calls in the same order with the same sizes. When one of them fails on
// any rank it fails on all, naming who did not take part.
// all (world, bytes) receives every rank's `own` (bytes).
Status rendezvous_all_gather(Rendezvous *rendezvous, const char *what, const void *own,
                             size_t bytes, void *all) NODISCARD;
Status rendezvous_broadcast(Rendezvous *rendezvous, const char *what, void *data,
                            size_t bytes) NODISCARD; // rank 0's
// `own` is the same on all ranks, or STATUS_USAGE on all of them, naming those that differ from
// rank 0, what they have and `hint`.
Status rendezvous_agree(Rendezvous *rendezvous, const char *what, const char *own,
                        const char *hint) NODISCARD;

#endif
