// The collectives of model/communicator.h over TCP, for backends whose memory the host can read.
//
// For tests and laptops: every rank has a connection with every other, and sends each what it is
// to have. A reduce-scatter or all-gather moves (W-1)/W of the operand out of and into each rank,
// which is the least possible; a broadcast goes from its root to each directly. A collective runs
// to its end before it returns, so that wait() has nothing to wait for; and so that communicators
// split from one another can share the connections.
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
    Communicator base;              // first, so that a Communicator * is a TcpCommunicator *
    struct TcpCommunicator *parent; // that this one was split from, or NULL
    Exchange *exchange;             // the parent's, if there is one
    ExchangeGroup group;            // whose ranks are those of the exchange
    char *chunks;                   // (world, CHUNK_BYTES) what came of a window
    char *scratch;                  // (world, SCRATCH_BYTES)
    char *small;                    // (SMALL_BYTES) what is sent of a small all-reduce
    void **parts;                   // (world)
    int64_t *part_bytes;            // (world + 1) where the parts of an all-reduce begin
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
    return &c->exchange->channels[c->group.ranks[rank]];
}

static Status begin(TcpCommunicator *c, ExchangeKind kind, CommType type, CommReduce reduce,
                    int root, int64_t bytes, CommTicket *ticket) {
    ExchangeHeader head = {
        .kind = (uint16_t)kind, .type = (uint8_t)type, .reduce = (uint8_t)reduce, .bytes = bytes};
    INVARIANT(bytes >= 0 && root >= 0 && root < c->base.world);
    head.root = c->group.ranks[root];
    c->exchange->timeout_seconds = c->base.timeout_seconds;
    TRY(exchange_begin(c->exchange, &c->group, &head));
    if (ticket) *ticket = c->group.sequence;
    exchange_prepare(c->exchange, 0);
    return STATUS_OK;
}

static Status run(TcpCommunicator *c) {
    double before = c->exchange->waited_seconds;
    Status status = exchange_run(c->exchange);
    for (TcpCommunicator *up = c; up; up = up->parent)
        up->base.waited_seconds += c->exchange->waited_seconds - before;
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
    c->exchange->take = take_window;
    c->exchange->take_context = c;
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
    exchange_prepare(c->exchange, phase);
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
    INVARIANT(ticket <= c->group.sequence);
    return exchange_check(c->exchange);
}

static Status check(Communicator *communicator) {
    return exchange_check(tcp_of(communicator)->exchange);
}

static void abort_all(Communicator *communicator) {
    exchange_abort(tcp_of(communicator)->exchange);
}

static const char *last(Communicator *communicator, CommTicket *ticket) {
    Exchange *exchange = tcp_of(communicator)->exchange;
    if (ticket) *ticket = (CommTicket)atomic_load(&exchange->sequence);
    return exchange_kind_name(atomic_load(&exchange->kind));
}

static void destroy(Communicator *communicator) {
    TcpCommunicator *c = tcp_of(communicator);
    if (!c->parent && c->exchange) {
        exchange_close(c->exchange);
        free(c->exchange);
    }
    free(c->group.ranks);
    free(c->chunks);
    free(c->scratch);
    free(c->small);
    free(c->parts);
    free(c->part_bytes);
    free(c);
}

static Status split(Communicator *communicator, int color, Communicator **out);

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
    .split = split,
    .destroy = destroy,
};

// --- Making one ----------------------------------------------------------------------------------

// Without an exchange, of `world` ranks that the caller fills in.
static Status make(const Communicator *base, TcpCommunicator **out) {
    TcpCommunicator *c = *out = calloc(1, sizeof *c);
    size_t world = (size_t)base->world;
    if (!c) FAIL(STATUS_INTERNAL, "out of memory for the communicator");
    c->base = *base;
    c->group.count = base->world;
    c->group.ranks = calloc(world, sizeof *c->group.ranks);
    c->chunks = malloc(world * CHUNK_BYTES);
    c->scratch = malloc(world * SCRATCH_BYTES);
    c->small = malloc(SMALL_BYTES);
    c->parts = calloc(world, sizeof *c->parts);
    c->part_bytes = calloc(world + 1, sizeof *c->part_bytes);
    if (c->group.ranks && c->chunks && c->scratch && c->small && c->parts && c->part_bytes)
        return STATUS_OK;
    destroy(&c->base);
    *out = NULL;
    FAIL(STATUS_INTERNAL, "out of memory: buffers of %d ranks", base->world);
}

Status communicator_tcp(const CommunicatorLinks *links, const CommunicatorOptions *options,
                        Communicator **out) {
    const Communicator base = {.ops = &tcp_ops,
                               .rank = links->rank,
                               .world = links->world,
                               .timeout_seconds = options->timeout_seconds,
                               .tree = options->tree};
    TcpCommunicator *c;
    Status status = STATUS_OK;
    *out = NULL;
    TRY(make(&base, &c));
    for (int r = 0; r < links->world; r++) c->group.ranks[r] = r;
    c->exchange = calloc(1, sizeof *c->exchange);
    if (!c->exchange) FAIL_GOTO(failed, STATUS_INTERNAL, "out of memory for the exchange");
    TRY_GOTO(exchange_open(c->exchange, links->rank, links->world, links->sockets, links->names,
                           options->timeout_seconds),
             failed);
    *out = &c->base;
    return STATUS_OK;
failed:
    destroy(&c->base);
    return status;
}

// What ranks tell each other in a split.
typedef struct SplitPart {
    int64_t color, newest_group;
} SplitPart;

// All ranks' parts. The number of the new groups, the same for all colors, is beyond that of any
// group that one of the ranks is in.
static Status agree_on_split(TcpCommunicator *c, int color, SplitPart *parts) {
    int world = c->base.world, newest = 0;
    parts[c->base.rank] = (SplitPart){color, c->exchange->newest_group};
    TRY(begin(c, EXCHANGE_SPLIT, COMM_I64, COMM_SUM, 0, world * (int64_t)sizeof *parts, NULL));
    TRY(gather_parts(c, (char *)parts, cut(c, 2 * (int64_t)world, COMM_I64), 0));
    for (int r = 0; r < world; r++)
        if (parts[r].newest_group > newest) newest = (int)parts[r].newest_group;
    c->exchange->newest_group = newest + 1;
    return STATUS_OK;
}

static Status make_child(TcpCommunicator *parent, int color, const SplitPart *parts,
                         Communicator **out) {
    Communicator base = parent->base;
    TcpCommunicator *c;
    base.waited_seconds = 0;
    base.world = 0;
    for (int r = 0; r < parent->base.world; r++) {
        if (r == parent->base.rank) base.rank = base.world;
        base.world += parts[r].color == color;
    }
    TRY(make(&base, &c));
    c->parent = parent;
    c->exchange = parent->exchange;
    c->group.number = parent->exchange->newest_group;
    for (int r = 0, at = 0; r < parent->base.world; r++)
        if (parts[r].color == color) c->group.ranks[at++] = parent->group.ranks[r];
    *out = &c->base;
    return STATUS_OK;
}

static Status split(Communicator *communicator, int color, Communicator **out) {
    TcpCommunicator *c = tcp_of(communicator);
    *out = NULL;
    INVARIANT(color >= 0);
    SplitPart *parts = calloc((size_t)c->base.world, sizeof *parts);
    if (!parts) FAIL(STATUS_INTERNAL, "out of memory: a split of %d ranks", c->base.world);
    Status status = agree_on_split(c, color, parts);
    if (status == STATUS_OK) status = make_child(c, color, parts, out);
    free(parts);
    return status;
}
