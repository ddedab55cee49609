// Each collective against values made here, for tests of communicators over several ranks.
#ifndef TESTS_COLLECTIVES_H
#define TESTS_COLLECTIVES_H

#include <math.h>
#include <pthread.h>
#include "base/random.h"
#include "tests/ranks.h"

enum { BIG = 300001 }; // elements: beyond a window, and odd
static const int64_t sizes[] = {0, 1, 7, 8192, 8193, 65536, BIG};
enum { NUM_SIZES = sizeof sizes / sizeof sizes[0] };

// Values whose sum depends on the order of addition.
static float value_of(int rank, int64_t i) {
    double magnitude = exp2(random_uniform(1, (uint64_t)rank, (uint64_t)i) * 20);
    return (float)(magnitude * (random_uniform(2, (uint64_t)rank, (uint64_t)i) - 0.5));
}

static float sum_of(int world, int64_t i, bool tree) {
    float part[RANKS_MAX] = {0};
    for (int r = 0; r < world; r++) part[r] = value_of(r, i);
    if (!tree) {
        for (int r = 1; r < world; r++) part[0] += part[r];
        return part[0];
    }
    for (int step = 1; step < world; step *= 2)
        for (int r = 0; r + step < world; r += 2 * step) part[r] += part[r + step];
    return part[0];
}

static void *allocate(int64_t bytes) {
    return malloc((size_t)(bytes > 0 ? bytes : 1));
}

// --- Sums ----------------------------------------------------------------------------------------

static Status check_all_reduce(Communicator *c, int64_t count) {
    float *values = allocate(count * 4);
    CommTicket ticket;
    for (int64_t i = 0; i < count; i++) values[i] = value_of(c->rank, i);
    TRY(c->ops->all_reduce(c, values, count, COMM_F32, COMM_SUM, &ticket));
    TRY(c->ops->wait(c, ticket));
    for (int64_t i = 0; i < count; i++) {
        float sum = sum_of(c->world, i, c->tree);
        EXPECT(memcmp(&values[i], &sum, 4) == 0, "element %d of %d", (int)i, (int)count);
    }
    free(values);
    return STATUS_OK;
}

static Status check_reduce_scatter(Communicator *c, int64_t part) {
    int64_t count = part * c->world;
    float *values = allocate(count * 4);
    CommTicket ticket;
    for (int64_t i = 0; i < count; i++) values[i] = value_of(c->rank, i);
    TRY(c->ops->reduce_scatter(c, values, part, COMM_F32, &ticket));
    TRY(c->ops->wait(c, ticket));
    for (int64_t i = c->rank * part; i < (c->rank + 1) * part; i++) {
        float sum = sum_of(c->world, i, c->tree);
        EXPECT(memcmp(&values[i], &sum, 4) == 0, "element %d of %d", (int)i, (int)count);
    }
    free(values);
    return STATUS_OK;
}

// --- Copies --------------------------------------------------------------------------------------

static uint8_t byte_of(int rank, int64_t i) {
    return (uint8_t)(rank * 37 + i * 11 + i / 251);
}

static Status check_gather(Communicator *c, int64_t part) {
    uint8_t *values = allocate(part * c->world);
    CommTicket ticket;
    memset(values, 0xEE, (size_t)(part * c->world));
    for (int64_t i = 0; i < part; i++) values[c->rank * part + i] = byte_of(c->rank, i);
    TRY(c->ops->all_gather(c, values, part, COMM_BYTE, &ticket));
    for (int r = 0; r < c->world; r++)
        for (int64_t i = 0; i < part; i++)
            EXPECT(values[r * part + i] == byte_of(r, i), "rank %d's byte %d", r, (int)i);
    free(values);
    return STATUS_OK;
}

static Status check_broadcast(Communicator *c, int64_t count) {
    uint8_t *values = allocate(count);
    CommTicket ticket;
    for (int root = 0; root < c->world; root++) {
        for (int64_t i = 0; i < count; i++) values[i] = byte_of(c->rank, i);
        TRY(c->ops->broadcast(c, values, count, COMM_BYTE, root, &ticket));
        for (int64_t i = 0; i < count; i++)
            EXPECT(values[i] == byte_of(root, i), "byte %d from %d", (int)i, root);
    }
    free(values);
    return STATUS_OK;
}

// Rank a sends (a * 5 + b * 3) % 7 * unit bytes to b: some pairs none, all different.
static int64_t pair_bytes(int from, int to, int64_t unit) {
    return (from * 5 + to * 3) % 7 * unit;
}

static Status check_all_to_all(Communicator *c, int64_t unit) {
    int64_t send_at[RANKS_MAX], send_bytes[RANKS_MAX], recv_at[RANKS_MAX], recv_bytes[RANKS_MAX];
    int64_t out = 0, in = 0;
    CommTicket ticket;
    for (int r = 0; r < c->world; r++) {
        send_at[r] = out;
        recv_at[r] = in;
        out += send_bytes[r] = pair_bytes(c->rank, r, unit);
        in += recv_bytes[r] = pair_bytes(r, c->rank, unit);
    }
    uint8_t *send = allocate(out), *recv = allocate(in);
    for (int r = 0; r < c->world; r++)
        for (int64_t i = 0; i < send_bytes[r]; i++)
            send[send_at[r] + i] = byte_of(c->rank * RANKS_MAX + r, i);
    TRY(c->ops->all_to_all(c, send, send_at, send_bytes, recv, recv_at, recv_bytes, &ticket));
    for (int r = 0; r < c->world; r++)
        for (int64_t i = 0; i < recv_bytes[r]; i++)
            EXPECT(recv[recv_at[r] + i] == byte_of(r * RANKS_MAX + c->rank, i), "from %d: %d", r,
                   (int)i);
    free(send);
    free(recv);
    return STATUS_OK;
}

// --- Ranks that fail -----------------------------------------------------------------------------

// For bodies that count their collectives in `checkpoint`.
static void wait_for_progress(int rank) {
    while (atomic_load(&rank_results_[rank].checkpoint) < 5) usleep(1000);
}

static void *abort_soon(void *context) {
    Communicator *c = context;
    usleep(300000);
    c->ops->abort(c);
    return NULL;
}

#endif
