// A profile's communicator: passes every call on and records those that a step makes.
//
// What is recorded is time of the compute stream. A communicator with a stream of its own starts a
// collective in no time, and the compute stream stands still only in a wait; one that works at once
// takes its time in the call. Either way the sum of these rows is the communication that no
// computation hides.
#include <stdlib.h>
#include "train/profile_record.h"

typedef struct ProfileCommunicator {
    Communicator base; // first, so that the Communicator * is a ProfileCommunicator *
    Communicator *inner;
    bool owns_inner; // it came of a split
    Profile *profile;
} ProfileCommunicator;

static ProfileCommunicator *of(Communicator *communicator) {
    return (ProfileCommunicator *)communicator;
}

// What callers set here is meant for the communicator behind; what that one counts, for them.
static Communicator *forward(ProfileCommunicator *c) {
    c->inner->timeout_seconds = c->base.timeout_seconds;
    c->inner->tree = c->base.tree;
    return c->inner;
}

static Status ended(ProfileCommunicator *c, int row, Status status, double bytes) {
    c->base.waited_seconds = c->inner->waited_seconds;
    return profile_end(c->profile, row, status, (OpWork){0, bytes});
}

// Bytes that a rank sends of an operand, at least: each part but its own.
static double sent(const Communicator *c, int64_t count, CommType type) {
    static const double widths[] = {4, 2, 8, 8, 1}; // in the order of CommType
    return (double)count * widths[type] * (c->world - 1) / c->world;
}

static Status all_reduce(Communicator *base, void *values, int64_t count, CommType type,
                         CommReduce reduce, CommTicket *ticket) {
    ProfileCommunicator *c = of(base);
    Communicator *inner = forward(c);
    TRY(profile_begin(c->profile, ROW_ALL_REDUCE));
    Status status = inner->ops->all_reduce(inner, values, count, type, reduce, ticket);
    return ended(c, ROW_ALL_REDUCE, status, 2 * sent(base, count, type));
}

static Status reduce_scatter(Communicator *base, void *values, int64_t part, CommType type,
                             CommTicket *ticket) {
    ProfileCommunicator *c = of(base);
    Communicator *inner = forward(c);
    TRY(profile_begin(c->profile, ROW_REDUCE_SCATTER));
    Status status = inner->ops->reduce_scatter(inner, values, part, type, ticket);
    return ended(c, ROW_REDUCE_SCATTER, status, sent(base, part * base->world, type));
}

static Status all_gather(Communicator *base, void *values, int64_t part, CommType type,
                         CommTicket *ticket) {
    ProfileCommunicator *c = of(base);
    Communicator *inner = forward(c);
    TRY(profile_begin(c->profile, ROW_ALL_GATHER));
    Status status = inner->ops->all_gather(inner, values, part, type, ticket);
    return ended(c, ROW_ALL_GATHER, status, sent(base, part * base->world, type));
}

static Status all_to_all(Communicator *base, const void *send, const int64_t *send_at,
                         const int64_t *send_bytes, void *recv, const int64_t *recv_at,
                         const int64_t *recv_bytes, CommTicket *ticket) {
    ProfileCommunicator *c = of(base);
    Communicator *inner = forward(c);
    double bytes = 0;
    for (int r = 0; r < base->world; r++) bytes += r == base->rank ? 0 : (double)send_bytes[r];
    TRY(profile_begin(c->profile, ROW_ALL_TO_ALL));
    Status status =
        inner->ops->all_to_all(inner, send, send_at, send_bytes, recv, recv_at, recv_bytes, ticket);
    return ended(c, ROW_ALL_TO_ALL, status, bytes);
}

static Status wait_for(Communicator *base, CommTicket ticket) {
    ProfileCommunicator *c = of(base);
    Communicator *inner = forward(c);
    TRY(profile_begin(c->profile, ROW_WAIT));
    return ended(c, ROW_WAIT, inner->ops->wait(inner, ticket), 0);
}

// --- What is no part of a step -------------------------------------------------------------------

static Status broadcast(Communicator *base, void *values, int64_t count, CommType type, int root,
                        CommTicket *ticket) {
    Communicator *inner = forward(of(base));
    return inner->ops->broadcast(inner, values, count, type, root, ticket);
}

static Status check(Communicator *base) {
    return of(base)->inner->ops->check(of(base)->inner);
}

static void abort_all(Communicator *base) {
    of(base)->inner->ops->abort(of(base)->inner);
}

static const char *last(Communicator *base, CommTicket *ticket) {
    return of(base)->inner->ops->last(of(base)->inner, ticket);
}

static const char *lost(Communicator *base) {
    Communicator *inner = of(base)->inner;
    return inner->ops->lost ? inner->ops->lost(inner) : NULL;
}

static void destroy(Communicator *base) {
    if (of(base)->owns_inner) communicator_destroy(of(base)->inner);
    free(base);
}

// What the communicator behind makes, in a profile's communicator.
static Status split(Communicator *base, int color, Communicator **out) {
    ProfileCommunicator *c = of(base);
    Communicator *inner = forward(c), *child;
    *out = NULL;
    TRY(inner->ops->split(inner, color, &child));
    Status status = profile_communicator(c->profile, child, out);
    if (status == STATUS_OK)
        of(*out)->owns_inner = true;
    else
        communicator_destroy(child);
    return status;
}

Status profile_communicator(Profile *profile, Communicator *inner, Communicator **out) {
    static const CommunicatorOps ops = {.all_reduce = all_reduce,
                                        .reduce_scatter = reduce_scatter,
                                        .all_gather = all_gather,
                                        .broadcast = broadcast,
                                        .all_to_all = all_to_all,
                                        .wait = wait_for,
                                        .check = check,
                                        .split = split,
                                        .abort = abort_all,
                                        .lost = lost,
                                        .last = last,
                                        .destroy = destroy};
    ProfileCommunicator *c = calloc(1, sizeof *c);
    if (!c) FAIL(STATUS_INTERNAL, "out of memory for the profile of a communicator");
    c->base = *inner; // rank, world and settings
    c->base.ops = &ops;
    c->inner = inner;
    c->profile = profile;
    *out = &c->base;
    return STATUS_OK;
}
