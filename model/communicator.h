// What the ranks of a run say to each other: collectives over device memory.
//
// A Communicator belongs to one backend and one world. The CPU's speaks TCP (cpu/communicator*.c),
// the GPU's NCCL (cuda/communicator.cu). optim/, model/ and train/ call only this header.
//
// Rules, valid for every collective:
//  - All ranks make the same calls in the same order with the same sizes. A difference that the
//    communicator can see (sequence number, kind, bytes) is STATUS_COMMUNICATION naming both.
//  - A call starts once everything that was queued on the backend's compute stream before it is
//    done, and returns without waiting for the other ranks where the backend can; collectives run
//    in order on a stream of their own. Nothing on the compute stream may touch the operands until
//    communicator_wait(), which makes the compute stream (on the CPU: the caller) wait for
//    everything started up to and including that ticket.
//  - Sums are deterministic: ((rank 0 + rank 1) + rank 2) + ..., or the pairwise tree by rank that
//    `tree` asks for, in the type of the operands (BF16 is summed in fp32 and rounded once). All
//    ranks get the same bits. In a minimum or maximum of the CPU's communicator a NaN wins.
//  - A peer that closed, reset, or has not moved a byte for timeout_seconds is
//    STATUS_COMMUNICATION, naming the rank and the collective. After an error only abort and
//    destroy may be called.
//
// A communicator can be split into groups of its ranks. It, its children, theirs and so on are a
// family, for which the rules hold as if it were one communicator: a rank makes all its calls from
// one thread, any two ranks make the calls that concern both in the same order, and a failure or an
// abort in one ends all. Each has tickets of its own and, on a device, a stream of its own.
#ifndef MODEL_COMMUNICATOR_H
#define MODEL_COMMUNICATOR_H

#include <stdbool.h>
#include <stdint.h>
#include "base/status.h"
#include "model/backend.h"

typedef struct Communicator Communicator;
typedef int64_t CommTicket; // grows by one with each collective

typedef enum CommType { COMM_F32, COMM_BF16, COMM_F64, COMM_I64, COMM_BYTE } CommType;
typedef enum CommReduce { COMM_SUM, COMM_MIN, COMM_MAX } CommReduce;

typedef struct CommunicatorOps {
    // In place over `count` elements.
    Status (*all_reduce)(Communicator *, void *values, int64_t count, CommType, CommReduce,
                         CommTicket *) NODISCARD;
    // `values` holds world parts of `part` elements; part `rank` of it becomes the sum over ranks
    // of that part. Afterwards every other element is what it was or the sum of some ranks' values
    // of it, so that where all ranks have zeros, zeros stay.
    Status (*reduce_scatter)(Communicator *, void *values, int64_t part, CommType,
                             CommTicket *) NODISCARD;
    // `values` holds world parts of `part` elements; part `rank` is sent, the others received.
    Status (*all_gather)(Communicator *, void *values, int64_t part, CommType,
                         CommTicket *) NODISCARD;
    Status (*broadcast)(Communicator *, void *values, int64_t count, CommType, int root,
                        CommTicket *) NODISCARD;
    // Rank r gets send_bytes[r] bytes from send + send_at[r]; recv likewise. Host arrays (world).
    Status (*all_to_all)(Communicator *, const void *send, const int64_t *send_at,
                         const int64_t *send_bytes, void *recv, const int64_t *recv_at,
                         const int64_t *recv_bytes, CommTicket *) NODISCARD;
    Status (*wait)(Communicator *, CommTicket) NODISCARD;
    // Whether anything started so far has failed, or was aborted, without waiting. Like all calls
    // but abort and last, for the one thread that makes the collectives.
    Status (*check)(Communicator *) NODISCARD;
    // A communicator of those ranks of this one that give the same color (>= 0), in the order of
    // their ranks here; a collective of all ranks here, which takes a ticket. timeout_seconds and
    // tree are this one's at that time; either may be changed later in one without the other.
    // Messages name ranks by their numbers in the communicator that was not split from another. To
    // be destroyed before this one.
    Status (*split)(Communicator *, int color, Communicator **out) NODISCARD;
    // Ends everything in flight on this rank, in the whole family, from any thread: the watchdog's
    // way out of a collective that will never finish. Calls that wait return STATUS_COMMUNICATION.
    void (*abort)(Communicator *);
    // A peer that is known to be gone, by name, or NULL; from any thread, for the watchdog. The
    // function is NULL where collectives find that out by themselves.
    const char *(*lost)(Communicator *);
    // Name and ticket of the collective that is running or ran last in the family ("none", 0 before
    // the first), from any thread, for the watchdog.
    const char *(*last)(Communicator *, CommTicket *);
    void (*destroy)(Communicator *);
} CommunicatorOps;

struct Communicator {
    const CommunicatorOps *ops;
    int rank, world;
    double timeout_seconds; // may be changed between collectives; counts from the next one on
    bool tree;              // sums pairwise by rank: the same bits on 1, 2 and 4 ranks (tests)
    // How long this rank has waited for others so far, here and in what was split from this, for
    // finding the one that the others wait for. On a GPU it is the compute stream that waits, and
    // this lags behind by what is queued there.
    double waited_seconds;
    // followed by the communicator's own state
};

static inline void communicator_destroy(Communicator *communicator) {
    if (communicator) communicator->ops->destroy(communicator);
}

typedef struct CommunicatorOptions {
    double timeout_seconds; // > 0
    bool tree;
} CommunicatorOptions;

// A connected TCP socket to every other rank: a full mesh, as train/rendezvous.h makes it.
typedef struct CommunicatorLinks {
    int rank, world;
    const int *sockets;       // (world), non-blocking; [rank] is -1
    const char *const *names; // (world) what messages say of a rank ("node3, pid 77"), or NULL
} CommunicatorLinks;

// For backends whose device memory the host can read (cpu/communicator_tcp.c). Collectives run to
// their end before they return, in the caller's thread. Takes the sockets over when it succeeds.
Status communicator_tcp(const CommunicatorLinks *links, const CommunicatorOptions *options,
                        Communicator **out) NODISCARD;

#endif
