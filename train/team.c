// Small agreements over a communicator (team.h).
#include "train/team.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// What a rank says about a failure: the message, cut to what a start-up of many ranks can hold.
enum { WHY_MAX = 1000 };
typedef struct Outcome {
    int32_t code;
    char why[WHY_MAX];
} Outcome;

Status team_open(Backend *backend, Communicator *communicator, Team *out) {
    *out = (Team){.communicator = communicator, .backend = backend, .rank = 0, .world = 1};
    if (!communicator) return STATUS_OK;
    if (communicator->world > TEAM_RANKS_MAX)
        FAIL(STATUS_USAGE, "%d ranks, expected at most %d", communicator->world, TEAM_RANKS_MAX);
    out->rank = communicator->rank;
    out->world = communicator->world;
    return backend->ops->alloc(backend, TEAM_DEVICE_BYTES, &out->device);
}

void team_close(Team *team) {
    if (team->device) team->backend->ops->release(team->backend, team->device);
    *team = (Team){0};
}

static Status upload(const Team *team, const void *host, size_t bytes) {
    return team->backend->ops->upload(team->backend, team->device, host, bytes);
}

static Status download(const Team *team, void *host, CommTicket ticket, size_t bytes) {
    TRY(team->communicator->ops->wait(team->communicator, ticket));
    return team->backend->ops->download(team->backend, host, team->device, bytes);
}

Status team_sum(const Team *team, double *values, int64_t count) {
    Communicator *c = team->communicator;
    const int64_t room = TEAM_DEVICE_BYTES / (int64_t)sizeof *values;
    CommTicket ticket;
    if (!c) return STATUS_OK;
    for (int64_t done = 0; done < count; done += room) {
        int64_t some = count - done < room ? count - done : room;
        size_t bytes = (size_t)some * sizeof *values;
        TRY(upload(team, values + done, bytes));
        TRY(c->ops->all_reduce(c, team->device, some, COMM_F64, COMM_SUM, &ticket));
        TRY(download(team, values + done, ticket, bytes));
    }
    return STATUS_OK;
}

Status team_broadcast(const Team *team, void *data, size_t bytes) {
    Communicator *c = team->communicator;
    CommTicket ticket;
    if (!c) return STATUS_OK;
    for (size_t done = 0; done < bytes; done += TEAM_DEVICE_BYTES) {
        size_t some = bytes - done < TEAM_DEVICE_BYTES ? bytes - done : TEAM_DEVICE_BYTES;
        TRY(upload(team, (char *)data + done, some));
        TRY(c->ops->broadcast(c, team->device, (int64_t)some, COMM_BYTE, 0, &ticket));
        TRY(download(team, (char *)data + done, ticket, some));
    }
    return STATUS_OK;
}

// In pieces of as many columns as fit for all ranks at once.
Status team_gather(const Team *team, void *all, size_t bytes) {
    Communicator *c = team->communicator;
    const size_t world = (size_t)team->world;
    const size_t most = TEAM_DEVICE_BYTES / world;
    char piece[TEAM_DEVICE_BYTES];
    CommTicket ticket;
    if (!c) return STATUS_OK;
    INVARIANT(most > 0 && bytes <= TEAM_GATHER_MAX);
    for (size_t done = 0; done < bytes; done += most) {
        size_t some = bytes - done < most ? bytes - done : most;
        memcpy(piece + (size_t)team->rank * some, (char *)all + (size_t)team->rank * bytes + done,
               some);
        TRY(upload(team, piece, world * some));
        TRY(c->ops->all_gather(c, team->device, (int64_t)some, COMM_BYTE, &ticket));
        TRY(download(team, piece, ticket, world * some));
        for (size_t r = 0; r < world; r++)
            memcpy((char *)all + r * bytes + done, piece + r * some, some);
    }
    return STATUS_OK;
}

// --- Agreeing on failures ------------------------------------------------------------------------

// "ranks 1, 2 and 5 more" of those that failed.
static void name_ranks(const Outcome *outcomes, int world, char *text, size_t size) {
    enum { NAMED_MAX = 8 };
    int failed = 0, named = 0;
    size_t used = 0;
    for (int r = 0; r < world; r++) failed += outcomes[r].code != STATUS_OK;
    used = (size_t)snprintf(text, size, failed > 1 ? "ranks" : "rank");
    for (int r = 0; r < world && named < NAMED_MAX; r++) {
        if (outcomes[r].code == STATUS_OK) continue;
        used += (size_t)snprintf(text + used, size - used, "%s %d", named ? "," : "", r);
        named++;
    }
    if (failed > named) snprintf(text + used, size - used, " and %d more", failed - named);
}

static Status fail_together(const Team *team, const Outcome *outcomes) {
    char ranks[128];
    bool all_same = true;
    int first = 0;
    while (outcomes[first].code == STATUS_OK) first++;
    for (int r = 0; r < team->world; r++)
        all_same &= outcomes[r].code == outcomes[first].code &&
                    strcmp(outcomes[r].why, outcomes[first].why) == 0;
    // This rank's record has the trace and the whole message.
    if (all_same) return outcomes[first].code;
    name_ranks(outcomes, team->world, ranks, sizeof ranks);
    if (team->rank == first) return status_prefix(outcomes[first].code, "%s: ", ranks);
    status_clear();
    FAIL(outcomes[first].code, "%s: %s", ranks, outcomes[first].why);
}

Status team_agree(const Team *team, Status status) {
    Status agreed = STATUS_OK;
    // Nobody can be asked any more.
    if (!team->communicator || status == STATUS_COMMUNICATION) return status;
    double failed = status != STATUS_OK;
    StatusRecord record;
    status_take(&record);
    Outcome *outcomes = calloc((size_t)team->world, sizeof *outcomes);
    if (!outcomes) FAIL(STATUS_INTERNAL, "out of memory for what %d ranks say", team->world);
    Outcome *mine = &outcomes[team->rank];
    mine->code = (int32_t)status;
    if (status != STATUS_OK) snprintf(mine->why, sizeof mine->why, "%.990s", record.message);
    // One number where all is well, which is nearly always.
    agreed = team_sum(team, &failed, 1);
    if (agreed == STATUS_OK && failed > 0) {
        agreed = team_gather(team, outcomes, sizeof *outcomes);
        if (agreed == STATUS_OK) {
            if (status != STATUS_OK) (void)status_put(&record);
            agreed = fail_together(team, outcomes);
            if (team->rank > 0) status_told(); // by rank 0
        }
    }
    free(outcomes);
    return agreed;
}
