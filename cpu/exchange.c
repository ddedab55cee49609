// The loop that moves a collective's bytes (cpu/exchange.h says what an exchange is).
#include "cpu/exchange.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include "base/clock.h"

enum { MAGIC = 0x64326D43, DESCRIPTION_MAX = 160, WAIT_MAX_SECONDS = 1, GONE_PAUSE_MS = 50 };

static const char *const kind_names[] = {
    [EXCHANGE_NONE] = "none",
    [EXCHANGE_ALL_REDUCE] = "all_reduce",
    [EXCHANGE_REDUCE_SCATTER] = "reduce_scatter",
    [EXCHANGE_ALL_GATHER] = "all_gather",
    [EXCHANGE_BROADCAST] = "broadcast",
    [EXCHANGE_ALL_TO_ALL] = "all_to_all",
    [EXCHANGE_SPLIT] = "split",
    [EXCHANGE_GAVE_UP] = "gave up",
};
enum { NUM_KINDS = sizeof kind_names / sizeof kind_names[0] };

const char *exchange_kind_name(int kind) {
    return kind >= 0 && kind < NUM_KINDS ? kind_names[kind] : "unknown";
}

// "reduce_scatter number 12 (4096 bytes of F32)", "all_to_all number 3 of group 1"
static void describe(const ExchangeHeader *head, char text[DESCRIPTION_MAX]) {
    static const char *const types[] = {"F32", "BF16", "F64", "I64", "BYTE"};
    static const char *const reduces[] = {"", ", minimum", ", maximum"};
    enum { NUM_TYPES = sizeof types / sizeof types[0], NUM_REDUCES = 3 };
    int used = snprintf(text, DESCRIPTION_MAX, "%s number %" PRId64, exchange_kind_name(head->kind),
                        head->sequence);
    if (used < 0 || used >= DESCRIPTION_MAX) return;
    if (head->group != 0)
        used += snprintf(text + used, (size_t)(DESCRIPTION_MAX - used), " of group %d",
                         (int)head->group);
    if (head->kind == EXCHANGE_ALL_TO_ALL || used >= DESCRIPTION_MAX) return;
    int more =
        snprintf(text + used, (size_t)(DESCRIPTION_MAX - used), " (%" PRId64 " bytes of %s%s",
                 head->bytes, head->type < NUM_TYPES ? types[head->type] : "?",
                 head->reduce < NUM_REDUCES ? reduces[head->reduce] : ", ?");
    if (more < 0 || used + more >= DESCRIPTION_MAX) return;
    used += more;
    if (head->kind == EXCHANGE_BROADCAST)
        snprintf(text + used, (size_t)(DESCRIPTION_MAX - used), " from rank %d)", head->root);
    else
        snprintf(text + used, (size_t)(DESCRIPTION_MAX - used), ")");
}

// --- Opening and closing -------------------------------------------------------------------------

Status exchange_open(Exchange *exchange, int rank, int world, const int *sockets,
                     const char *const *names, double timeout_seconds) {
    *exchange = (Exchange){.rank = rank, .world = world, .timeout_seconds = timeout_seconds};
    INVARIANT(world >= 1 && rank >= 0 && rank < world && timeout_seconds > 0);
    exchange->channels = calloc((size_t)world, sizeof *exchange->channels);
    exchange->polls = calloc((size_t)world, sizeof *exchange->polls);
    exchange->poll_ranks = calloc((size_t)world, sizeof *exchange->poll_ranks);
    if (!exchange->channels || !exchange->polls || !exchange->poll_ranks) {
        free(exchange->channels);
        free(exchange->polls);
        free(exchange->poll_ranks);
        *exchange = (Exchange){0};
        FAIL(STATUS_INTERNAL, "out of memory for the connections of %d ranks", world);
    }
    for (int r = 0; r < world; r++) {
        Channel *channel = &exchange->channels[r];
        channel->fd = r == rank ? -1 : sockets[r];
        net_rank_name(r, names ? names[r] : NULL, channel->name);
    }
    return STATUS_OK;
}

void exchange_close(Exchange *exchange) {
    for (int r = 0; exchange->channels && r < exchange->world; r++)
        net_close(exchange->channels[r].fd);
    free(exchange->channels);
    free(exchange->polls);
    free(exchange->poll_ranks);
    exchange->channels = NULL;
    exchange->polls = NULL;
    exchange->poll_ranks = NULL;
}

// --- Failing -------------------------------------------------------------------------------------

// Tells the peer, if the stream to it stands between two messages; then it sees the end of it.
static void say_gave_up(Exchange *exchange, Channel *channel, int culprit) {
    bool begun = channel->head_sent > 0;
    bool complete =
        channel->head_sent == sizeof channel->head_out && channel->sent == channel->send_bytes;
    if (channel->fd < 0) return;
    if (!channel->send_gone && (!begun || complete)) {
        ExchangeHeader head = {.magic = MAGIC,
                               .kind = EXCHANGE_GAVE_UP,
                               .sequence = exchange->head.sequence,
                               .root = culprit,
                               .group = exchange->head.group};
        bool gone = false;
        const char *why;
        (void)net_send_some(channel->fd, &head, sizeof head, &gone, &why);
    }
    (void)shutdown(channel->fd, SHUT_WR);
}

// Keeps this thread's failure as the communicator's.
static Status keep_failure(Exchange *exchange, Status status, int culprit) {
    for (int r = 0; r < exchange->world; r++)
        say_gave_up(exchange, &exchange->channels[r], culprit);
    exchange->failed = true;
    status_take(&exchange->failure);
    status_put(&exchange->failure);
    return status;
}

Status exchange_check(Exchange *exchange) {
    if (exchange->failed) return status_put(&exchange->failure);
    if (atomic_load(&exchange->aborted))
        FAIL(STATUS_COMMUNICATION, "rank %d: communication was aborted after %s number %lld",
             exchange->rank, exchange_kind_name(atomic_load(&exchange->kind)),
             (long long)atomic_load(&exchange->sequence));
    return STATUS_OK;
}

void exchange_abort(Exchange *exchange) {
    atomic_store(&exchange->aborted, true);
    for (int r = 0; r < exchange->world; r++)
        if (exchange->channels[r].fd >= 0) (void)shutdown(exchange->channels[r].fd, SHUT_RDWR);
}

// Other peers whose end is closed: ", and so is rank 2 (...)" for each, or "". When one rank dies,
// those that notice first leave soon after it. The pause before the look lets what has happened
// come in, and keeps our own leaving from being taken for the cause by those who notice last.
static void name_others_gone(const Exchange *exchange, const Channel *channel, char *text,
                             size_t room) {
    struct timespec pause = {.tv_nsec = GONE_PAUSE_MS * 1000000L};
    size_t used = 0;
    text[0] = '\0';
    nanosleep(&pause, NULL);
    for (int r = 0; r < exchange->world && used < room; r++) {
        const Channel *other = &exchange->channels[r];
        struct pollfd entry = {.fd = other->fd, .events = POLLRDHUP};
        if (other == channel || other->fd < 0 || poll(&entry, 1, 0) <= 0) continue;
        int more = snprintf(text + used, room - used, ", and so is %s", other->name);
        used += more > 0 ? (size_t)more : 0;
    }
}

static Status fail_gone(const Exchange *exchange, const Channel *channel, const char *why) {
    char here[DESCRIPTION_MAX], others[STATUS_TEXT_MAX / 4];
    describe(&exchange->head, here);
    name_others_gone(exchange, channel, others, sizeof others);
    FAIL(STATUS_COMMUNICATION,
         "%s is lost: %s%s (rank %d was in %s and had %zu of %zu bytes from it); its own log says "
         "what happened there",
         channel->name, why, others, exchange->rank, here, channel->received, channel->recv_bytes);
}

static Status fail_silent(const Exchange *exchange, const Channel *channel, double now) {
    char here[DESCRIPTION_MAX];
    describe(&exchange->head, here);
    FAIL(STATUS_COMMUNICATION,
         "%s has not moved a byte for %.1f s (rank %d is in %s: %zu of %zu bytes came, %zu of %zu "
         "went); it hangs, is stopped, or its machine is gone",
         channel->name, now - channel->moved_at, exchange->rank, here, channel->received,
         channel->recv_bytes, channel->sent, channel->send_bytes);
}

// The header that came against the one that was sent.
static Status check_header(const Exchange *exchange, const Channel *channel, int *culprit) {
    const ExchangeHeader *own = &channel->head_out, *other = &channel->head_in;
    char here[DESCRIPTION_MAX], there[DESCRIPTION_MAX];
    describe(own, here);
    describe(other, there);
    if (other->magic != MAGIC)
        FAIL(STATUS_COMMUNICATION,
             "%s sent bytes that are no header (%08x, expected %08x) while rank %d was in %s",
             channel->name, other->magic, MAGIC, exchange->rank, here);
    if (other->kind == EXCHANGE_GAVE_UP) {
        char blame[64] = "an error of its own", group[32] = "";
        *culprit = other->root;
        if (other->root >= 0) snprintf(blame, sizeof blame, "rank %d", other->root);
        if (other->group != 0) snprintf(group, sizeof group, " of group %d", (int)other->group);
        FAIL(STATUS_COMMUNICATION,
             "%s gave up in its collective number %" PRId64 "%s because of %s; rank %d was in %s",
             channel->name, other->sequence, group, blame, exchange->rank, here);
    }
    if (own->kind != other->kind || own->type != other->type || own->reduce != other->reduce ||
        own->group != other->group || own->sequence != other->sequence ||
        own->bytes != other->bytes || own->root != other->root || own->phase != other->phase)
        FAIL(STATUS_COMMUNICATION,
             "ranks are in different collectives: rank %d in %s, %s in %s; all must make the same "
             "calls in the same order",
             exchange->rank, here, channel->name, there);
    if (other->payload != (int64_t)channel->recv_bytes)
        FAIL(STATUS_COMMUNICATION, "%s sends %" PRId64 " bytes in %s, rank %d expects %zu from it",
             channel->name, other->payload, there, exchange->rank, channel->recv_bytes);
    return STATUS_OK;
}

// --- Moving --------------------------------------------------------------------------------------

static bool wants_send(const Channel *channel) {
    return !channel->send_gone &&
           (channel->head_sent < sizeof channel->head_out || channel->sent < channel->send_bytes);
}

static bool wants_recv(const Channel *channel) {
    return channel->head_received < sizeof channel->head_in ||
           channel->received < channel->window_end;
}

static bool is_done(const Channel *channel) {
    if (!channel->is_in) return true;
    return channel->head_sent == sizeof channel->head_out && channel->sent == channel->send_bytes &&
           channel->head_received == sizeof channel->head_in &&
           channel->received == channel->recv_bytes;
}

// A peer that can no longer be sent to may have said why: what it sent is read to the end first.
static void push(Channel *channel, bool *moved) {
    while (wants_send(channel)) {
        size_t left = sizeof channel->head_out - channel->head_sent;
        const char *from = left ? (const char *)&channel->head_out + channel->head_sent
                                : channel->send + channel->sent;
        if (!left) left = channel->send_bytes - channel->sent;
        size_t done =
            net_send_some(channel->fd, from, left, &channel->send_gone, &channel->gone_why);
        if (channel->head_sent < sizeof channel->head_out)
            channel->head_sent += done;
        else
            channel->sent += done;
        if (done > 0) *moved = true;
        if (done < left) return;
    }
}

static Status pull(Exchange *exchange, Channel *channel, bool *moved, int *culprit) {
    while (wants_recv(channel)) {
        size_t left = sizeof channel->head_in - channel->head_received;
        char *to = left ? (char *)&channel->head_in + channel->head_received
                        : channel->window + (channel->received - channel->window_begin);
        if (!left) left = channel->window_end - channel->received;
        bool gone = false, in_header = channel->head_received < sizeof channel->head_in;
        const char *why = "";
        size_t done = net_recv_some(channel->fd, to, left, &gone, &why);
        if (gone) return fail_gone(exchange, channel, channel->send_gone ? channel->gone_why : why);
        if (done > 0) *moved = true;
        if (in_header) {
            channel->head_received += done;
            if (channel->head_received == sizeof channel->head_in)
                TRY(check_header(exchange, channel, culprit));
        } else {
            channel->received += done;
        }
        if (done < left) return STATUS_OK;
    }
    return STATUS_OK;
}

// Moves what can be moved. Receiving comes second, so that a peer that differs has our header
// before we fail over its own.
static Status serve(Exchange *exchange, bool *moved, int *culprit) {
    for (int r = 0; r < exchange->world; r++) {
        Channel *channel = &exchange->channels[r];
        bool here = false;
        if (channel->fd < 0 || is_done(channel)) continue;
        *culprit = r;
        push(channel, &here);
        TRY(pull(exchange, channel, &here, culprit));
        if (channel->send_gone && !wants_recv(channel))
            return fail_gone(exchange, channel, channel->gone_why);
        if (!here) continue;
        channel->moved_at = clock_seconds();
        *moved = true;
    }
    return STATUS_OK;
}

// Sleeps until something can move. A peer with a full window waits for others, not for us.
static Status rest(Exchange *exchange, int *culprit) {
    double now = clock_seconds(), oldest = now;
    int count = 0;
    for (int r = 0; r < exchange->world; r++) {
        Channel *channel = &exchange->channels[r];
        if (channel->fd < 0 || is_done(channel)) continue;
        short events =
            (short)((wants_send(channel) ? POLLOUT : 0) | (wants_recv(channel) ? POLLIN : 0));
        if (!events) {
            channel->moved_at = now;
            continue;
        }
        exchange->poll_ranks[count] = r;
        exchange->polls[count++] = (struct pollfd){.fd = channel->fd, .events = events};
        if (channel->moved_at >= oldest) continue;
        oldest = channel->moved_at;
        *culprit = r;
    }
    INVARIANT(count > 0);
    if (now - oldest >= exchange->timeout_seconds)
        return fail_silent(exchange, &exchange->channels[*culprit], now);
    double until = oldest + exchange->timeout_seconds;
    // An abort shuts the sockets, which ends the sleep; the limit is for a race with its flag.
    if (until > now + WAIT_MAX_SECONDS) until = now + WAIT_MAX_SECONDS;
    (void)poll(exchange->polls, (nfds_t)count, net_poll_ms(until));
    exchange->waited_seconds += clock_seconds() - now;
    return STATUS_OK;
}

static bool all_done(const Exchange *exchange) {
    for (int r = 0; r < exchange->world; r++)
        if (exchange->channels[r].fd >= 0 && !is_done(&exchange->channels[r])) return false;
    return true;
}

static Status fail_aborted(const Exchange *exchange) {
    char here[DESCRIPTION_MAX];
    describe(&exchange->head, here);
    FAIL(STATUS_COMMUNICATION, "rank %d: communication was aborted in %s", exchange->rank, here);
}

Status exchange_run(Exchange *exchange) {
    int culprit = -1;
    Status status = STATUS_OK;
    double start = clock_seconds();
    for (int r = 0; r < exchange->world; r++) {
        Channel *channel = &exchange->channels[r];
        channel->head_out.payload = (int64_t)channel->send_bytes;
        channel->moved_at = start;
    }
    for (;;) {
        bool moved = false;
        TRY_GOTO(serve(exchange, &moved, &culprit), failed);
        if (exchange->take) exchange->take(exchange->take_context);
        if (all_done(exchange)) return STATUS_OK;
        if (!moved) TRY_GOTO(rest(exchange, &culprit), failed);
        if (atomic_load(&exchange->aborted)) TRY_GOTO(fail_aborted(exchange), failed);
    }
failed:
    if (atomic_load(&exchange->aborted)) {
        status = fail_aborted(exchange); // whatever it looked like from here
        culprit = -1;
    }
    return keep_failure(exchange, status, culprit);
}

// --- Starting ------------------------------------------------------------------------------------

Status exchange_begin(Exchange *exchange, ExchangeGroup *group, const ExchangeHeader *head) {
    TRY(exchange_check(exchange));
    exchange->group = group;
    exchange->head = *head;
    exchange->head.magic = MAGIC;
    exchange->head.group = group->number;
    exchange->head.sequence = ++group->sequence;
    atomic_store(&exchange->kind, (int)head->kind);
    atomic_store(&exchange->sequence, exchange->head.sequence);
    return STATUS_OK;
}

// Ranks outside the group have nothing begun, so that they can be told of a failure.
void exchange_prepare(Exchange *exchange, int phase) {
    const ExchangeGroup *group = exchange->group;
    exchange->take = NULL;
    for (int r = 0; r < exchange->world; r++) {
        Channel *channel = &exchange->channels[r];
        channel->is_in = false;
        channel->head_out = exchange->head;
        channel->head_out.phase = phase;
        channel->head_sent = channel->head_received = 0;
        channel->send = NULL;
        channel->window = NULL;
        channel->send_bytes = channel->sent = 0;
        channel->recv_bytes = channel->received = 0;
        channel->window_begin = channel->window_end = 0;
        channel->send_gone = false;
    }
    for (int i = 0; i < group->count; i++) exchange->channels[group->ranks[i]].is_in = true;
}
