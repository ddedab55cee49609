// One collective's bytes between this rank and all others, over one TCP connection per pair.
//
// A collective is one or two exchanges. In an exchange every rank sends every other rank a header
// and then its payload, perhaps of no bytes, and receives the same. The header says what the sender
// believes to be doing, so that two ranks in different collectives find out at once, whatever the
// collective; it also makes every exchange a point that all ranks pass together.
//
// One loop serves all peers: it moves what can be moved, lets a reduction take what has come, and
// sleeps in poll(2) when nothing can. It ends with an error as soon as a peer has gone, says
// something else, or has not moved a byte for the timeout.
//
// A rank that fails tells the others why, where the stream to them stands between two messages:
// they then name the true culprit, not the one that gave up on it.
//
// A collective may be among some of the ranks, a group. All groups use the same connections, one
// collective at a time, and share their end: what fails or is aborted in one is over in all, and
// those outside the group are told, too. Ranks in messages and headers are never those in a group.
#ifndef CPU_EXCHANGE_H
#define CPU_EXCHANGE_H

#include <poll.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "base/net.h"
#include "base/status.h"

typedef enum ExchangeKind {
    EXCHANGE_NONE,
    EXCHANGE_ALL_REDUCE,
    EXCHANGE_REDUCE_SCATTER,
    EXCHANGE_ALL_GATHER,
    EXCHANGE_BROADCAST,
    EXCHANGE_ALL_TO_ALL,
    EXCHANGE_SPLIT,
    EXCHANGE_GAVE_UP, // the sender has failed; `root` is the rank it blames, or -1
} ExchangeKind;

// In the byte order of the machine: `magic` tells when the other has another one.
typedef struct ExchangeHeader {
    uint32_t magic;
    uint16_t kind;
    uint8_t type, reduce; // CommType, CommReduce
    int64_t sequence;     // of the collective, from 1
    int64_t bytes;        // the operand of one rank; the same on all; 0 in an all-to-all
    int64_t payload;      // bytes that follow
    int32_t root, group;
    int64_t phase;
} ExchangeHeader;

// The ranks that a collective is among, and what they count.
typedef struct ExchangeGroup {
    int number;       // 0: of all ranks. Any two ranks have no two groups of the same number
    int count;        // of ranks
    int *ranks;       // (count), rising
    int64_t sequence; // of its newest collective
} ExchangeGroup;

// With one peer.
typedef struct Channel {
    int fd;     // -1: this rank itself
    bool is_in; // takes part in the exchange now running
    char name[NET_NAME_MAX];
    ExchangeHeader head_out, head_in;
    size_t head_sent, head_received;
    const char *send;
    size_t send_bytes, sent;
    // Bytes [window_begin, window_end) of the payload may be received now, the first to `window`.
    char *window;
    size_t recv_bytes, received, window_begin, window_end;
    double moved_at;      // when a byte went either way, or was first asked for
    bool send_gone;       // nothing more can be sent, though something may still come
    const char *gone_why; // with send_gone
} Channel;

// Called after bytes have come: takes them, and opens the next window.
typedef void (*ExchangeTaker)(void *context);

typedef struct Exchange {
    int rank, world;
    double timeout_seconds;
    double waited_seconds;      // asleep in poll, so far
    Channel *channels;          // (world)
    struct pollfd *polls;       // (world)
    int *poll_ranks;            // (world) whose entry of `polls` it is
    int newest_group;           // the highest number so far
    const ExchangeGroup *group; // of the collective now running
    ExchangeHeader head;        // likewise
    ExchangeTaker take;         // or NULL
    void *take_context;
    atomic_bool aborted;
    atomic_int kind; // ExchangeKind and sequence of the newest collective, for other threads
    atomic_llong sequence;
    bool failed;
    StatusRecord failure;
} Exchange;

// Takes the sockets over (sockets[rank] is -1); on failure they remain the caller's. A name may be
// NULL.
Status exchange_open(Exchange *exchange, int rank, int world, const int *sockets,
                     const char *const *names, double timeout_seconds) NODISCARD;
void exchange_close(Exchange *exchange); // safe on zeroed memory

// Starts a collective of the group, which must outlive it: its next sequence number. Fails with the
// failure before, if there was one.
Status exchange_begin(Exchange *exchange, ExchangeGroup *group,
                      const ExchangeHeader *head) NODISCARD;
// The next exchange of the collective: empty payloads for all, phase `phase`.
void exchange_prepare(Exchange *exchange, int phase);
static inline void channel_send(Channel *channel, const void *data, size_t bytes) {
    channel->send = data;
    channel->send_bytes = bytes;
}
// All of it to one place ...
static inline void channel_recv(Channel *channel, void *out, size_t bytes) {
    channel->window = out;
    channel->recv_bytes = channel->window_end = bytes;
}
// ... or in windows that the taker opens.
static inline void channel_open_window(Channel *channel, void *out, size_t begin, size_t end) {
    channel->window = out;
    channel->window_begin = begin;
    channel->window_end = end;
}
Status exchange_run(Exchange *exchange) NODISCARD;

// The failure of anything so far, or an abort; STATUS_OK otherwise.
Status exchange_check(Exchange *exchange) NODISCARD;
void exchange_abort(Exchange *exchange); // from any thread
const char *exchange_kind_name(int kind);

#endif
