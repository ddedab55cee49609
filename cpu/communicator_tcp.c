// The collectives of model/communicator.h over TCP, for backends whose memory the host can read.
//
// For tests and laptops: every rank has a connection with every other, and sends each what it is
// to have. A reduce-scatter or all-gather moves (W-1)/W of the operand out of and into each rank,
// which is the least possible; a broadcast goes from its root to each directly. A collective runs
// to its end before it returns, so that wait() has nothing to wait for.
//
// Sums must not depend on which part comes first. A rank receives from all peers in windows of
// CHUNK_BYTES, the same of each, and combines a window when all have filled it; the kernel's socket
// buffers hold what faster peers have sent ahead. So memory is one window per rank, however large
// the operand.
//
// A large all-reduce is a reduce-scatter followed by an all-gather. For a small one the second trip
// costs more than it saves: everybody sends everything to everybody and sums for itself. Each
// element is combined in the same order either way, so both give the same bits.
#include <stdlib.h>
#include <string.h>
#include "cpu/combine.h"
#include "cpu/cpu.h"
#include "cpu/exchange.h"

enum {
    CHUNK_BYTES = 256 << 10,
    SMALL_BYTES = 32 << 10, // an all-reduce up to here is one trip; <= CHUNK_BYTES
    SCRATCH_BYTES = CHUNK_BYTES / 2 * COMBINE_SCRATCH_BYTES,
};

typedef struct TcpCommunicator {
    Communicator base; // first, so that a Communicator * is a TcpCommunicator *
    Exchange exchange;
    char *chunks;        // (world, CHUNK_BYTES) what came of a window
    char *scratch;       // (world, SCRATCH_BYTES)
    char *small;         // (SMALL_BYTES) what is sent of a small all-reduce
    void **parts;        // (world)
    int64_t *part_bytes; // (world + 1) where the parts of an all-reduce begin
    // The reduction now running, over own[0, bytes).
    char *own;
    size_t bytes, begin, end; // the window is [begin, end)
    CommType type;
    CommReduce reduce;
} TcpCommunicator;

static TcpCommunicator *tcp_of(Communicator *communicator) {
    return (TcpCommunicator *)communicator;
}

static Channel *channel_of(TcpCommunicator *c, int rank) {
    return &c->exchange.channels[rank];
}

static Status begin(TcpCommunicator *c, ExchangeKind kind, CommType type, CommReduce reduce,
                    int root, int64_t bytes, CommTicket *ticket) {
    ExchangeHeader head = {.kind = (uint16_t)kind,
                           .type = (uint8_t)type,
                           .reduce = (uint8_t)reduce,
                           .root = root,
                           .bytes = bytes};
    INVARIANT(bytes >= 0 && root >= 0 && root < c->base.world);
    c->exchange.timeout_seconds = c->base.timeout_seconds;
    TRY(exchange_begin(&c->exchange, &head));
    if (ticket) *ticket = c->exchange.head.sequence;
    exchange_prepare(&c->exchange, 0);
    return STATUS_OK;
}

static Status run(TcpCommunicator *c) {
    Status status = exchange_run(&c->exchange);
    c->base.waited_seconds = c->exchange.waited_seconds;
    return status;
}

// --- Reductions ----------------------------------------------------------------------------------

static bool window_is_full(TcpCommunicator *c) {
    for (int r = 0; r < c->base.world; r++)
        if (r != c->base.rank && channel_of(c, r)->received < c->end) return false;
    return true;
}

static void open_window(TcpCommunicator *c, size_t from) {
    c->begin = from;
    c->end = c->bytes - from < CHUNK_BYTES ? c->bytes : from + CHUNK_BYTES;
    for (int r = 0; r < c->base.world; r++)
        if (r != c->base.rank)
            channel_open_window(channel_of(c, r), c->chunks + (size_t)r * CHUNK_BYTES, c->begin,
                                c->end);
}

// The exchange's taker: combines full windows.
static void take_window(void *context) {
    TcpCommunicator *c = context;
    while (c->begin < c->bytes && window_is_full(c)) {
        for (int r = 0; r < c->base.world; r++) c->parts[r] = c->chunks + (size_t)r * CHUNK_BYTES;
        c->parts[c->base.rank] = c->own + c->begin;
        combine(c->parts, c->base.world, (int64_t)((c->end - c->begin) / comm_type_bytes(c->type)),
                c->type, c->reduce, c->base.tree, c->scratch, c->own + c->begin);
        open_window(c, c->end);
    }
}

// `own` becomes the reduction of all ranks' values for it. Sends must be set by the caller.
static void set_reduction(TcpCommunicator *c, void *own, size_t bytes, CommType type,
                          CommReduce reduce) {
    c->own = own;
    c->bytes = bytes;
    c->type = type;
    c->reduce = reduce;
    for (int r = 0; r < c->base.world; r++)
        if (r != c->base.rank) channel_recv(channel_of(c, r), NULL, bytes);
    open_window(c, 0);
    c->exchange.take = take_window;
    c->exchange.take_context = c;
}

// Part r of `values` lies in [at[r], at[r + 1]); part `rank` becomes the reduction of it.
static Status scatter_parts(TcpCommunicator *c, char *values, const int64_t *at, CommType type,
                            CommReduce reduce) {
    int rank = c->base.rank;
    for (int r = 0; r < c->base.world; r++)
        if (r != rank) channel_send(channel_of(c, r), values + at[r], (size_t)(at[r + 1] - at[r]));
    set_reduction(c, values + at[rank], (size_t)(at[rank + 1] - at[rank]), type, reduce);
    return run(c);
}

// Part `rank` is sent to all, the others' come to their places.
static Status gather_parts(TcpCommunicator *c, char *values, const int64_t *at, int phase) {
    int rank = c->base.rank;
    exchange_prepare(&c->exchange, phase);
    for (int r = 0; r < c->base.world; r++) {
        if (r == rank) continue;
        channel_send(channel_of(c, r), values + at[rank], (size_t)(at[rank + 1] - at[rank]));
        channel_recv(channel_of(c, r), values + at[r], (size_t)(at[r + 1] - at[r]));
    }
    return run(c);
}

// Nearly equal parts of `count` elements.
static const int64_t *cut(TcpCommunicator *c, int64_t count, CommType type) {
    for (int r = 0; r <= c->base.world; r++)
        c->part_bytes[r] = part_begin(count, c->base.world, r) * (int64_t)comm_type_bytes(type);
    return c->part_bytes;
}

static Status all_reduce(Communicator *communicator, void *values, int64_t count, CommType type,
                         CommReduce reduce, CommTicket *ticket) {
    TcpCommunicator *c = tcp_of(communicator);
    size_t bytes = (size_t)count * comm_type_bytes(type);
    TRY(begin(c, EXCHANGE_ALL_REDUCE, type, reduce, 0, (int64_t)bytes, ticket));
    if (c->base.world == 1) return STATUS_OK;
    if (bytes > SMALL_BYTES) {
        const int64_t *at = cut(c, count, type);
        TRY(scatter_parts(c, values, at, type, reduce));
        return gather_parts(c, values, at, 1);
    }
    if (bytes > 0) memcpy(c->small, values, bytes); // the values change while they are sent
    for (int r = 0; r < c->base.world; r++)
        if (r != c->base.rank) channel_send(channel_of(c, r), c->small, bytes);
    set_reduction(c, values, bytes, type, reduce);
    return run(c);
}

static Status reduce_scatter(Communicator *communicator, void *values, int64_t part, CommType type,
                             CommTicket *ticket) {
    TcpCommunicator *c = tcp_of(communicator);
    int64_t count = part * c->base.world;
    TRY(begin(c, EXCHANGE_REDUCE_SCATTER, type, COMM_SUM, 0, count * (int64_t)comm_type_bytes(type),
              ticket));
    return scatter_parts(c, values, cut(c, count, type), type, COMM_SUM);
}

// --- Copies --------------------------------------------------------------------------------------

static Status all_gather(Communicator *communicator, void *values, int64_t part, CommType type,
                         CommTicket *ticket) {
    TcpCommunicator *c = tcp_of(communicator);
    int64_t count = part * c->base.world;
    TRY(begin(c, EXCHANGE_ALL_GATHER, type, COMM_SUM, 0, count * (int64_t)comm_type_bytes(type),
              ticket));
    return gather_parts(c, values, cut(c, count, type), 0);
}

static Status broadcast(Communicator *communicator, void *values, int64_t count, CommType type,
                        int root, CommTicket *ticket) {
    TcpCommunicator *c = tcp_of(communicator);
    size_t bytes = (size_t)count * comm_type_bytes(type);
    TRY(begin(c, EXCHANGE_BROADCAST, type, COMM_SUM, root, (int64_t)bytes, ticket));
    if (c->base.rank != root) channel_recv(channel_of(c, root), values, bytes);
    for (int r = 0; r < c->base.world && c->base.rank == root; r++)
        if (r != root) channel_send(channel_of(c, r), values, bytes);
    return run(c);
}

static Status all_to_all(Communicator *communicator, const void *send, const int64_t *send_at,
                         const int64_t *send_bytes, void *recv, const int64_t *recv_at,
                         const int64_t *recv_bytes, CommTicket *ticket) {
    TcpCommunicator *c = tcp_of(communicator);
    int rank = c->base.rank;
    TRY(begin(c, EXCHANGE_ALL_TO_ALL, COMM_BYTE, COMM_SUM, 0, 0, ticket));
    for (int r = 0; r < c->base.world; r++) {
        INVARIANT(send_bytes[r] >= 0 && recv_bytes[r] >= 0);
        if (r == rank) continue;
        channel_send(channel_of(c, r), (const char *)send + send_at[r], (size_t)send_bytes[r]);
        channel_recv(channel_of(c, r), (char *)recv + recv_at[r], (size_t)recv_bytes[r]);
    }
    INVARIANT(send_bytes[rank] == recv_bytes[rank]);
    if (send_bytes[rank] > 0)
        memcpy((char *)recv + recv_at[rank], (const char *)send + send_at[rank],
               (size_t)send_bytes[rank]);
    return run(c);
}

// --- The rest of the table -----------------------------------------------------------------------

static Status wait_for(Communicator *communicator, CommTicket ticket) {
    TcpCommunicator *c = tcp_of(communicator);
    INVARIANT(ticket <= (CommTicket)atomic_load(&c->exchange.sequence));
    return exchange_check(&c->exchange);
}

static Status check(Communicator *communicator) {
    return exchange_check(&tcp_of(communicator)->exchange);
}

static void abort_all(Communicator *communicator) {
    exchange_abort(&tcp_of(communicator)->exchange);
}

static const char *last(Communicator *communicator, CommTicket *ticket) {
    Exchange *exchange = &tcp_of(communicator)->exchange;
    if (ticket) *ticket = (CommTicket)atomic_load(&exchange->sequence);
    return exchange_kind_name(atomic_load(&exchange->kind));
}

static void destroy(Communicator *communicator) {
    TcpCommunicator *c = tcp_of(communicator);
    exchange_close(&c->exchange);
    free(c->chunks);
    free(c->scratch);
    free(c->small);
    free(c->parts);
    free(c->part_bytes);
    free(c);
}

static const CommunicatorOps tcp_ops = {
    .all_reduce = all_reduce,
    .reduce_scatter = reduce_scatter,
    .all_gather = all_gather,
    .broadcast = broadcast,
    .all_to_all = all_to_all,
    .wait = wait_for,
    .check = check,
    .abort = abort_all,
    .last = last,
    .destroy = destroy,
};

Status communicator_tcp(const CommunicatorLinks *links, const CommunicatorOptions *options,
                        Communicator **out) {
    *out = NULL;
    TcpCommunicator *c = calloc(1, sizeof *c);
    if (!c) FAIL(STATUS_INTERNAL, "out of memory for the communicator");
    Status status = STATUS_OK;
    size_t world = (size_t)links->world;
    c->base = (Communicator){.ops = &tcp_ops,
                             .rank = links->rank,
                             .world = links->world,
                             .timeout_seconds = options->timeout_seconds,
                             .tree = options->tree};
    c->chunks = malloc(world * CHUNK_BYTES);
    c->scratch = malloc(world * SCRATCH_BYTES);
    c->small = malloc(SMALL_BYTES);
    c->parts = calloc(world, sizeof *c->parts);
    c->part_bytes = calloc(world + 1, sizeof *c->part_bytes);
    if (!c->chunks || !c->scratch || !c->small || !c->parts || !c->part_bytes)
        FAIL_GOTO(failed, STATUS_INTERNAL, "out of memory: buffers of %d ranks", links->world);
    TRY_GOTO(exchange_open(&c->exchange, links->rank, links->world, links->sockets, links->names,
                           options->timeout_seconds),
             failed);
    *out = &c->base;
    return STATUS_OK;
failed:
    destroy(&c->base);
    return status;
}
