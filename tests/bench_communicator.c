// How fast the collectives over TCP are on this machine's loopback: GB of operand per second.
//   bench_communicator [ranks] [MB]
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include "base/clock.h"
#include "base/net.h"
#include "model/communicator.h"

enum { RANKS_MAX = 16, REPEATS = 10 };

static int mesh[RANKS_MAX][RANKS_MAX]; // mesh[i][j]: rank i's end to rank j

static Status connect_ranks(int world) {
    int listener, port;
    char peer[NET_NAME_MAX];
    double deadline = clock_seconds() + 10;
    TRY(net_listen("127.0.0.1", 0, &listener, &port));
    for (int i = 0; i < world; i++) {
        mesh[i][i] = -1;
        for (int j = i + 1; j < world; j++) {
            TRY(net_connect("bench", "127.0.0.1", port, deadline, &mesh[i][j]));
            TRY(net_accept(listener, deadline, &mesh[j][i], peer));
        }
    }
    net_close(listener);
    return STATUS_OK;
}

static Status one(Communicator *c, int kind, float *values, int64_t part) {
    CommTicket ticket;
    int64_t count = part * c->world;
    switch (kind) {
    case 0:
        return c->ops->reduce_scatter(c, values, part, COMM_F32, &ticket);
    case 1:
        return c->ops->all_gather(c, values, part, COMM_F32, &ticket);
    case 2:
        return c->ops->all_reduce(c, values, count, COMM_F32, COMM_SUM, &ticket);
    case 3:
        return c->ops->broadcast(c, values, count, COMM_F32, 0, &ticket);
    default:
        return c->ops->all_reduce(c, values, 2, COMM_F32, COMM_SUM, &ticket);
    }
}

static Status measure(Communicator *c, int64_t bytes) {
    static const char *const names[] = {"reduce_scatter", "all_gather", "all_reduce", "broadcast"};
    int64_t part = bytes / 4 / c->world;
    float *values = malloc((size_t)(part * c->world) * 4);
    if (!values) FAIL(STATUS_INTERNAL, "out of memory");
    memset(values, 0, (size_t)(part * c->world) * 4);
    for (int kind = 0; kind <= 4; kind++) {
        TRY(one(c, kind, values, part));
        double start = clock_seconds();
        for (int i = 0; i < REPEATS; i++) TRY(one(c, kind, values, part));
        double seconds = (clock_seconds() - start) / REPEATS;
        if (c->rank == 0 && kind < 4)
            printf("%-14s %6.2f GB/s\n", names[kind], (double)bytes / seconds * 1e-9);
        else if (c->rank == 0)
            printf("all_reduce of 8 bytes: %.0f us\n", seconds * 1e6);
    }
    free(values);
    return STATUS_OK;
}

static Status run_rank(int rank, int world, int64_t bytes) {
    Communicator *c;
    for (int i = 0; i < world; i++)
        for (int j = 0; j < world && i != rank; j++) net_close(mesh[i][j]);
    const CommunicatorLinks links = {.rank = rank, .world = world, .sockets = mesh[rank]};
    const CommunicatorOptions options = {.timeout_seconds = 60};
    TRY(communicator_tcp(&links, &options, &c));
    Status status = measure(c, bytes);
    communicator_destroy(c);
    return status;
}

int main(int argc, char **argv) {
    int world = argc > 1 ? atoi(argv[1]) : 2, megabytes = argc > 2 ? atoi(argv[2]) : 64, worst = 0;
    if (world < 1 || world > RANKS_MAX || megabytes < 1) {
        fprintf(stderr, "usage: bench_communicator [ranks, 1 to %d] [MB]\n", RANKS_MAX);
        return STATUS_USAGE;
    }
    Status status = connect_ranks(world);
    if (status != STATUS_OK) return status_report(status, "bench_communicator");
    printf("%d ranks, %d MB:\n", world, megabytes);
    fflush(stdout);
    for (int rank = 0; rank < world; rank++) {
        if (fork() > 0) continue;
        status = run_rank(rank, world, (int64_t)megabytes << 20);
        return status_report(status, "bench_communicator");
    }
    for (int i = 0; i < world; i++)
        for (int j = 0; j < world; j++) net_close(mesh[i][j]);
    for (int how; wait(&how) > 0;)
        if (how != 0) worst = STATUS_COMMUNICATION;
    return worst;
}
