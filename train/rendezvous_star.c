// Small collectives over the star: everyone says something to rank 0, which tells everyone what
// came of it. So each call ends on all ranks with the same verdict.
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/clock.h"
#include "base/log.h"
#include "train/rendezvous_wire.h"

enum { CALL_MAGIC = 0x64326D73, AGREE_TEXT = 256, LISTED_MAX = 8 };

typedef struct CallHeader {
    uint32_t magic, padding;
    int64_t number, bytes;
} CallHeader;

// --- Rank 0 --------------------------------------------------------------------------------------

static Status hear(Rendezvous *r, int rank, const char *what, void *out, size_t bytes,
                   double deadline) {
    CallHeader header;
    char name[NET_NAME_MAX + 32];
    snprintf(name, sizeof name, "rank %d (%s)", rank, r->places[rank].name);
    TRY(net_recv(r->star[rank], name, &header, sizeof header, deadline));
    if (header.magic != CALL_MAGIC || header.number != r->calls || header.bytes != (int64_t)bytes)
        FAIL(STATUS_COMMUNICATION,
             "%s is at call %" PRId64 " with %" PRId64 " bytes, rank 0 at call %" PRId64
             " (%s) with %zu: a bug",
             name, header.number, header.bytes, r->calls, what, bytes);
    return net_recv(r->star[rank], name, out, bytes, deadline);
}

// What every rank says, own included. All that failed are in the message.
static Status collect(Rendezvous *r, const char *what, const void *own, size_t bytes, char *all) {
    double deadline = clock_seconds() + r->timeout_seconds;
    char problems[VERDICT_TEXT / 2] = "";
    size_t used = 0;
    if (bytes > 0) memcpy(all, own, bytes);
    for (int rank = 1; rank < r->world; rank++) {
        char *place = bytes > 0 ? all + (size_t)rank * bytes : NULL;
        Status status = hear(r, rank, what, place, bytes, deadline);
        if (status == STATUS_OK) continue;
        if (used < sizeof problems) {
            int more = snprintf(problems + used, sizeof problems - used, "%s%s", used ? "; " : "",
                                status_message());
            used += more > 0 ? (size_t)more : 0;
        }
        status_clear();
    }
    if (used)
        FAIL(STATUS_COMMUNICATION, "%s: not all ranks took part within %.0f s: %s", what,
             r->timeout_seconds, problems);
    return STATUS_OK;
}

// Tells all `status` (this thread's failure, or STATUS_OK and then `data`) and returns it.
static Status tell_all(Rendezvous *r, Status status, const void *data, size_t bytes) {
    double deadline = clock_seconds() + r->timeout_seconds;
    Verdict verdict;
    StatusRecord record;
    rendezvous_make_verdict(&verdict, status, status == STATUS_OK ? "" : status_message());
    verdict.shared = status != STATUS_OK;
    status_take(&record);
    for (int rank = 1; rank < r->world; rank++) {
        char name[NET_NAME_MAX + 32];
        snprintf(name, sizeof name, "rank %d (%s)", rank, r->places[rank].name);
        Status sent = net_send(r->star[rank], name, &verdict, sizeof verdict, deadline);
        if (sent == STATUS_OK && status == STATUS_OK)
            sent = net_send(r->star[rank], name, data, bytes, deadline);
        if (sent == STATUS_OK) continue;
        if (status == STATUS_OK) {
            status = sent;
            status_take(&record);
        }
        status_clear();
    }
    if (status != STATUS_OK) status_put(&record);
    return status;
}

// --- The other ranks -----------------------------------------------------------------------------

static Status ask(Rendezvous *r, const char *what, const void *own, size_t bytes, void *reply,
                  size_t reply_bytes) {
    double deadline = clock_seconds() + r->timeout_seconds;
    CallHeader header = {.magic = CALL_MAGIC, .number = r->calls, .bytes = (int64_t)bytes};
    char name[NET_NAME_MAX + 96];
    Verdict verdict;
    snprintf(name, sizeof name, "rank 0 (%s), asked for %.60s", r->places[0].name, what);
    TRY(net_send(r->star[0], name, &header, sizeof header, deadline));
    TRY(net_send(r->star[0], name, own, bytes, deadline));
    deadline += ANSWER_EXTRA_SECONDS;
    TRY(rendezvous_recv_verdict(r->star[0], name, &verdict, deadline));
    return net_recv(r->star[0], name, reply, reply_bytes, deadline);
}

// --- The calls -----------------------------------------------------------------------------------

Status rendezvous_all_gather(Rendezvous *r, const char *what, const void *own, size_t bytes,
                             void *all) {
    r->calls++;
    if (r->rank > 0) return ask(r, what, own, bytes, all, (size_t)r->world * bytes);
    return tell_all(r, collect(r, what, own, bytes, all), all, (size_t)r->world * bytes);
}

Status rendezvous_broadcast(Rendezvous *r, const char *what, void *data, size_t bytes) {
    r->calls++;
    if (r->rank > 0) return ask(r, what, NULL, 0, data, bytes);
    return tell_all(r, collect(r, what, NULL, 0, NULL), data, bytes);
}

static Status compare(const Rendezvous *r, const char *what, char *all, const char *hint) {
    char problems[VERDICT_TEXT / 2] = "";
    size_t used = 0;
    int differ = 0;
    for (int rank = 1; rank < r->world; rank++) {
        char *other = all + (size_t)rank * AGREE_TEXT;
        rendezvous_clean_text(other, AGREE_TEXT);
        if (strcmp(other, all) == 0 || ++differ > LISTED_MAX || used >= sizeof problems) continue;
        int more = snprintf(problems + used, sizeof problems - used, "%srank %d (%s) has %s",
                            used ? ", " : "", rank, r->places[rank].name, other);
        used += more > 0 ? (size_t)more : 0;
    }
    if (differ > 0)
        FAIL(STATUS_USAGE, "%s: rank 0 (%s) has %s, but %d of %d ranks differ: %s; %s", what,
             r->places[0].name, all, differ, r->world, problems, hint);
    return STATUS_OK;
}

Status rendezvous_agree(Rendezvous *r, const char *what, const char *own, const char *hint) {
    char text[AGREE_TEXT] = "";
    r->calls++;
    snprintf(text, sizeof text, "%s", own);
    rendezvous_clean_text(text, sizeof text);
    if (r->rank > 0) return ask(r, what, text, sizeof text, NULL, 0);
    char *all = malloc((size_t)r->world * AGREE_TEXT);
    if (!all) FAIL(STATUS_INTERNAL, "out of memory: texts of %d ranks", r->world);
    Status status = collect(r, what, text, sizeof text, all);
    if (status == STATUS_OK) status = compare(r, what, all, hint);
    status = tell_all(r, status, NULL, 0);
    free(all);
    return status;
}
