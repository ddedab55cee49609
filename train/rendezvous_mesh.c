// A connection of each rank with each: to the lower ones it goes, the higher ones come to it. The
// nonce of this rendezvous keeps out whoever was not at it.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/clock.h"
#include "base/log.h"
#include "train/rendezvous_wire.h"

Status rendezvous_mesh_listen(Rendezvous *r, int *port) {
    r->mesh = malloc((size_t)r->world * sizeof *r->mesh);
    if (!r->mesh) FAIL(STATUS_INTERNAL, "out of memory for the mesh of %d ranks", r->world);
    for (int rank = 0; rank < r->world; rank++) r->mesh[rank] = -1;
    return net_listen(rendezvous_listen_host(r), 0, &r->mesh_listener, port);
}

static void arrived(void *context, Guest *guest) {
    Rendezvous *r = context;
    MeshHello hello;
    memcpy(&hello, guest->message, sizeof hello);
    if (memcmp(hello.nonce, r->nonce, sizeof hello.nonce) != 0 || hello.to != r->rank ||
        hello.from <= r->rank || hello.from >= r->world || r->mesh[hello.from] >= 0) {
        log_line(reception_report_level(&r->mesh_refused),
                 "mesh: a connection from %s was refused: it does not belong to this run",
                 guest->peer);
        return;
    }
    r->mesh[hello.from] = guest->fd;
    guest->fd = -1;
}

static Status go_to(Rendezvous *r, int rank, double deadline) {
    const Place *place = &r->places[rank];
    char name[NET_NAME_MAX + 32];
    MeshHello hello = {.magic = MESH_MAGIC, .from = r->rank, .to = rank};
    memcpy(hello.nonce, r->nonce, sizeof hello.nonce);
    snprintf(name, sizeof name, "rank %d (%s)", rank, place->name);
    TRY(net_connect(name, place->host, place->port, deadline, &r->mesh[rank]));
    return net_send(r->mesh[rank], name, &hello, sizeof hello, deadline);
}

static bool all_higher_came(const Rendezvous *r, bool *missing) {
    bool all = true;
    for (int rank = 0; rank < r->world; rank++) {
        missing[rank] = rank > r->rank && r->mesh[rank] < 0;
        all &= !missing[rank];
    }
    return all;
}

static Status receive_higher(Rendezvous *r, Reception *reception, bool *missing, double deadline) {
    char list[160];
    while (!all_higher_came(r, missing)) {
        if (clock_seconds() >= deadline) {
            rendezvous_list(missing, r->world, list, sizeof list);
            FAIL(
                STATUS_COMMUNICATION,
                "rank %d (%s): ranks %s did not connect to it within %.0f s; does a firewall stand "
                "between the nodes?",
                r->rank, r->places[r->rank].name, list, r->timeout_seconds);
        }
        TRY(reception_serve(reception, NULL, 0, deadline));
    }
    return STATUS_OK;
}

static Status connect_all(Rendezvous *r, double deadline) {
    Status status = STATUS_OK;
    Reception *reception = calloc(1, sizeof *reception);
    bool *missing = calloc((size_t)r->world, sizeof *missing);
    if (!reception || !missing) FAIL_GOTO(done, STATUS_INTERNAL, "out of memory for the mesh");
    *reception = (Reception){.listener = r->mesh_listener,
                             .name = "mesh",
                             .magic = MESH_MAGIC,
                             .message_bytes = sizeof(MeshHello),
                             .patience_seconds = PATIENCE_SECONDS,
                             .arrived = arrived,
                             .context = r};
    reception_open(reception);
    for (int rank = 0; rank < r->rank; rank++) TRY_GOTO(go_to(r, rank, deadline), close);
    TRY_GOTO(receive_higher(r, reception, missing, deadline), close);
close:
    reception_close(reception);
done:
    free(reception);
    free(missing);
    return status;
}

Status rendezvous_mesh_connect(Rendezvous *r, double deadline) {
    if (r->world > 1) TRY(connect_all(r, deadline));
    net_close(r->mesh_listener);
    r->mesh_listener = -1;
    // A rank for which it did not work has left the star: nobody begins without it.
    return rendezvous_all_gather(r, "the mesh", NULL, 0, NULL);
}

Status rendezvous_take_mesh(Rendezvous *r, int *sockets) {
    INVARIANT(r->mesh);
    memcpy(sockets, r->mesh, (size_t)r->world * sizeof *sockets);
    free(r->mesh);
    r->mesh = NULL;
    return STATUS_OK;
}
