// A communicator that takes its time, as one with a stream of its own may: reduce-scatters and
// all-gathers do nothing until they are waited for, and until then their operands are NaN. Whoever
// touches them too early, or starts them before the values are complete, gets other results than
// with a communicator that works at once.
#ifndef TESTS_LAZY_COMMUNICATOR_H
#define TESTS_LAZY_COMMUNICATOR_H

#include <stdlib.h>
#include <string.h>
#include "model/communicator.h"

enum { LAZY_MAX = 256 };

typedef struct LazyCall {
    bool gathers; // else it reduces
    float *values, *kept;
    int64_t part;
} LazyCall;

typedef struct LazyCommunicator {
    Communicator base;
    Communicator *inner;
    LazyCall pending[LAZY_MAX]; // the oldest has ticket `done`
    int count, most;            // most = the largest count ever
    CommTicket done;
} LazyCommunicator;

static LazyCommunicator *lazy_of_(Communicator *c) {
    return (LazyCommunicator *)c;
}

static size_t lazy_bytes_(const LazyCommunicator *c, const LazyCall *call) {
    return (size_t)(call->part * c->base.world) * sizeof(float);
}

// Does the oldest call.
static Status lazy_do_one_(LazyCommunicator *c) {
    LazyCall call = c->pending[0];
    CommTicket ticket;
    c->inner->timeout_seconds = c->base.timeout_seconds;
    c->inner->tree = c->base.tree;
    memcpy(call.values, call.kept, lazy_bytes_(c, &call));
    free(call.kept);
    c->count--;
    c->done++;
    memmove(c->pending, c->pending + 1, (size_t)c->count * sizeof call);
    if (call.gathers)
        TRY(c->inner->ops->all_gather(c->inner, call.values, call.part, COMM_F32, &ticket));
    else
        TRY(c->inner->ops->reduce_scatter(c->inner, call.values, call.part, COMM_F32, &ticket));
    return c->inner->ops->wait(c->inner, ticket);
}

static Status lazy_put_off_(Communicator *base, bool gathers, float *values, int64_t part,
                            CommType type, CommTicket *ticket) {
    LazyCommunicator *c = lazy_of_(base);
    LazyCall call = {gathers, values, NULL, part};
    INVARIANT(type == COMM_F32 && c->count < LAZY_MAX);
    call.kept = malloc(lazy_bytes_(c, &call) + 1);
    INVARIANT(call.kept != NULL);
    memcpy(call.kept, values, lazy_bytes_(c, &call));
    memset(values, 0xff, lazy_bytes_(c, &call)); // NaN
    *ticket = c->done + c->count;
    c->pending[c->count++] = call;
    if (c->count > c->most) c->most = c->count;
    return STATUS_OK;
}

static Status lazy_reduce_scatter_(Communicator *c, void *values, int64_t part, CommType type,
                                   CommTicket *ticket) {
    return lazy_put_off_(c, false, values, part, type, ticket);
}

static Status lazy_wait_(Communicator *base, CommTicket ticket) {
    LazyCommunicator *c = lazy_of_(base);
    while (c->count > 0 && c->done <= ticket) TRY(lazy_do_one_(c));
    return STATUS_OK;
}

// What has been put off comes first, and this at once.
static Status lazy_flush_(LazyCommunicator *c, CommTicket *ticket) {
    while (c->count > 0) TRY(lazy_do_one_(c));
    *ticket = c->done++;
    c->inner->timeout_seconds = c->base.timeout_seconds;
    return STATUS_OK;
}

// Small agreements gather bytes, which are waited for at once.
static Status lazy_all_gather_(Communicator *base, void *values, int64_t part, CommType type,
                               CommTicket *ticket) {
    LazyCommunicator *c = lazy_of_(base);
    CommTicket inner;
    if (type == COMM_F32) return lazy_put_off_(base, true, values, part, type, ticket);
    TRY(lazy_flush_(c, ticket));
    return c->inner->ops->all_gather(c->inner, values, part, type, &inner);
}

static Status lazy_all_reduce_(Communicator *base, void *values, int64_t count, CommType type,
                               CommReduce how, CommTicket *ticket) {
    LazyCommunicator *c = lazy_of_(base);
    CommTicket inner;
    TRY(lazy_flush_(c, ticket));
    return c->inner->ops->all_reduce(c->inner, values, count, type, how, &inner);
}

static Status lazy_broadcast_(Communicator *base, void *values, int64_t count, CommType type,
                              int root, CommTicket *ticket) {
    LazyCommunicator *c = lazy_of_(base);
    CommTicket inner;
    TRY(lazy_flush_(c, ticket));
    return c->inner->ops->broadcast(c->inner, values, count, type, root, &inner);
}

// The groups are not lazy.
static Status lazy_split_(Communicator *base, int color, Communicator **out) {
    LazyCommunicator *c = lazy_of_(base);
    CommTicket ticket;
    TRY(lazy_flush_(c, &ticket));
    return c->inner->ops->split(c->inner, color, out);
}

static Status lazy_check_(Communicator *c) {
    return lazy_of_(c)->inner->ops->check(lazy_of_(c)->inner);
}

static void lazy_abort_(Communicator *c) {
    lazy_of_(c)->inner->ops->abort(lazy_of_(c)->inner);
}

static const char *lazy_last_(Communicator *c, CommTicket *ticket) {
    return lazy_of_(c)->inner->ops->last(lazy_of_(c)->inner, ticket);
}

static void lazy_destroy_(Communicator *base) {
    LazyCommunicator *c = lazy_of_(base);
    for (int i = 0; i < c->count; i++) free(c->pending[i].kept);
    free(c);
}

// Around another communicator, which stays the caller's.
__attribute__((unused)) static LazyCommunicator *lazy_communicator(Communicator *inner) {
    static const CommunicatorOps ops = {.all_reduce = lazy_all_reduce_,
                                        .reduce_scatter = lazy_reduce_scatter_,
                                        .all_gather = lazy_all_gather_,
                                        .broadcast = lazy_broadcast_,
                                        .wait = lazy_wait_,
                                        .check = lazy_check_,
                                        .split = lazy_split_,
                                        .abort = lazy_abort_,
                                        .last = lazy_last_,
                                        .destroy = lazy_destroy_};
    LazyCommunicator *c = calloc(1, sizeof *c);
    if (!c) abort();
    c->base = *inner;
    c->base.ops = &ops;
    c->inner = inner;
    return c;
}

#endif
