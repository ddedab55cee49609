// The collectives over TCP: their results against sums made here, and what ranks are told when one
// of them differs, dies, stops or is aborted.
#include "tests/collectives.h"

#include "base/dtype.h"

enum { WORLDS = 5 };

static const CommunicatorOptions quick = {.timeout_seconds = 20};
static const CommunicatorOptions quick_tree = {.timeout_seconds = 20, .tree = true};
static const CommunicatorOptions impatient = {.timeout_seconds = 1};

// --- Sums ----------------------------------------------------------------------------------------

static Status sums_body(Communicator *c, void *context) {
    (void)context;
    for (int i = 0; i < NUM_SIZES; i++) {
        TRY(check_all_reduce(c, sizes[i]));
        TRY(check_reduce_scatter(c, sizes[i]));
    }
    return c->ops->check(c);
}

START_TEST(sums_are_in_rank_order) {
    for (int world = 1; world <= WORLDS; world++) ranks_expect_ok(world, &quick, sums_body, NULL);
}
END_TEST

START_TEST(sums_are_a_tree_on_request) {
    for (int world = 1; world <= WORLDS; world++)
        ranks_expect_ok(world, &quick_tree, sums_body, NULL);
}
END_TEST

START_TEST(both_orders_differ_here) { // else the two tests above would say nothing about order
    int64_t differ = 0;
    for (int64_t i = 0; i < 1000; i++) differ += sum_of(5, i, false) != sum_of(5, i, true);
    ck_assert_int_gt(differ, 100);
}
END_TEST

// --- Other types ---------------------------------------------------------------------------------

static Status check_bf16(Communicator *c, int64_t count) {
    uint16_t *values = allocate(count * 2), expected;
    CommTicket ticket;
    for (int64_t i = 0; i < count; i++) {
        float value = value_of(c->rank, i);
        dtype_from_f32(DTYPE_BF16, &value, &values[i], 1);
    }
    TRY(c->ops->all_reduce(c, values, count, COMM_BF16, COMM_SUM, &ticket));
    for (int64_t i = 0; i < count; i++) {
        float sum = 0;
        for (int r = 0; r < c->world; r++) {
            float value = value_of(r, i), rounded;
            dtype_from_f32(DTYPE_BF16, &value, &expected, 1);
            dtype_to_f32(DTYPE_BF16, &expected, &rounded, 1);
            sum = r == 0 ? rounded : sum + rounded;
        }
        dtype_from_f32(DTYPE_BF16, &sum, &expected, 1);
        EXPECT(values[i] == expected, "element %d of %d", (int)i, (int)count);
    }
    free(values);
    return STATUS_OK;
}

static Status check_extremes(Communicator *c) {
    CommTicket ticket;
    int64_t low[] = {c->rank, -c->rank, INT64_MAX}, high[] = {c->rank, -c->rank, INT64_MIN};
    TRY(c->ops->all_reduce(c, low, 3, COMM_I64, COMM_MIN, &ticket));
    TRY(c->ops->all_reduce(c, high, 3, COMM_I64, COMM_MAX, &ticket));
    EXPECT(low[0] == 0 && low[1] == -(c->world - 1) && low[2] == INT64_MAX, "minimum");
    EXPECT(high[0] == c->world - 1 && high[1] == 0 && high[2] == INT64_MIN, "maximum");
    for (int bad = 0; bad < c->world; bad++) { // a NaN wins wherever it comes from
        double values[] = {c->rank == bad ? NAN : 1, c->rank};
        TRY(c->ops->all_reduce(c, values, 2, COMM_F64, COMM_MAX, &ticket));
        EXPECT(isnan(values[0]) && values[1] == c->world - 1, "maximum with NaN");
        values[0] = c->rank == bad ? NAN : -1;
        TRY(c->ops->all_reduce(c, values, 2, COMM_F64, COMM_MIN, &ticket));
        EXPECT(isnan(values[0]) && values[1] == c->world - 1, "minimum with NaN");
    }
    double sums[] = {0.5, c->rank};
    TRY(c->ops->all_reduce(c, sums, 2, COMM_F64, COMM_SUM, &ticket));
    EXPECT(sums[0] == 0.5 * c->world && sums[1] == c->world * (c->world - 1) / 2, "F64 sums");
    uint8_t flags[] = {1, (uint8_t)c->rank};
    TRY(c->ops->all_reduce(c, flags, 2, COMM_BYTE, COMM_MAX, &ticket));
    EXPECT(flags[0] == 1 && flags[1] == c->world - 1, "bytes");
    return STATUS_OK;
}

static Status types_body(Communicator *c, void *context) {
    (void)context;
    for (int i = 0; i < NUM_SIZES; i++) TRY(check_bf16(c, sizes[i]));
    return check_extremes(c);
}

START_TEST(other_types_and_extremes) {
    for (int world = 1; world <= WORLDS; world++) ranks_expect_ok(world, &quick, types_body, NULL);
}
END_TEST

// --- Copies --------------------------------------------------------------------------------------

static Status copies_body(Communicator *c, void *context) {
    (void)context;
    for (int i = 0; i < NUM_SIZES; i++) {
        TRY(check_gather(c, sizes[i]));
        TRY(check_broadcast(c, sizes[i]));
        TRY(check_all_to_all(c, sizes[i]));
    }
    return STATUS_OK;
}

START_TEST(copies_reach_their_places) {
    for (int world = 1; world <= WORLDS; world++) ranks_expect_ok(world, &quick, copies_body, NULL);
}
END_TEST

static Status tickets_body(Communicator *c, void *context) {
    (void)context;
    CommTicket first, second, newest;
    float value = 1;
    EXPECT(strcmp(c->ops->last(c, &newest), "none") == 0 && newest == 0, "before the first");
    TRY(c->ops->all_reduce(c, &value, 1, COMM_F32, COMM_SUM, &first));
    TRY(c->ops->broadcast(c, &value, 1, COMM_F32, 0, &second));
    EXPECT(second == first + 1, "%d, %d", (int)first, (int)second);
    EXPECT(strcmp(c->ops->last(c, &newest), "broadcast") == 0 && newest == second, "the last");
    return c->ops->wait(c, second);
}

START_TEST(tickets_count_and_last_names) {
    ranks_expect_ok(1, &quick, tickets_body, NULL);
    ranks_expect_ok(3, &quick, tickets_body, NULL);
}
END_TEST

// --- Ranks that differ ---------------------------------------------------------------------------

// Rank 1 of three makes another call than the others.
static Status differ_body(Communicator *c, void *context) {
    float values[12] = {0};
    CommTicket ticket;
    bool odd = c->rank == 1;
    TRY(c->ops->all_gather(c, values, 4, COMM_F32, &ticket));
    switch (*(const int *)context) {
    case 0: // kind
        if (odd) return c->ops->all_gather(c, values, 2, COMM_F32, &ticket);
        return c->ops->all_reduce(c, values, 6, COMM_F32, COMM_SUM, &ticket);
    case 1: // size
        return c->ops->all_reduce(c, values, odd ? 5 : 6, COMM_F32, COMM_SUM, &ticket);
    case 2: // type
        return c->ops->all_reduce(c, values, odd ? 3 : 6, odd ? COMM_F64 : COMM_F32, COMM_SUM,
                                  &ticket);
    case 3: // operation
        return c->ops->all_reduce(c, values, 6, COMM_F32, odd ? COMM_MIN : COMM_SUM, &ticket);
    case 4: // root
        return c->ops->broadcast(c, values, 6, COMM_F32, odd ? 2 : 0, &ticket);
    default: { // bytes of a pair
        int64_t at[] = {0, 4, 8}, bytes[] = {4, 4, 4}, fewer[] = {4, 4, 2};
        return c->ops->all_to_all(c, values, at, odd ? fewer : bytes, values + 6, at, bytes,
                                  &ticket);
    }
    }
}

START_TEST(different_calls_are_named) {
    static const char *const texts[] = {
        "all_gather number 2 (24 bytes of F32)",
        "(20 bytes of F32)",
        "(24 bytes of F64)",
        "(24 bytes of F32, minimum)",
        "broadcast number 2 (24 bytes of F32 from rank 2)",
        "rank 1 sends 2 bytes in all_to_all number 2, rank 2 expects 4 from it",
    };
    for (int way = 0; way < (int)(sizeof texts / sizeof texts[0]); way++) {
        ranks_start(3, &quick, differ_body, &way);
        ranks_join(3);
        // Somebody sees the difference itself; the others see it or hear of it. Nobody hangs.
        bool named = false;
        for (int rank = 0; rank < 3; rank++) {
            ck_assert_double_lt(rank_results_[rank].seconds, 10);
            named |= strstr(rank_results_[rank].message, texts[way]) != NULL;
            if (way < 5 || rank == 2) ranks_expect(rank, STATUS_COMMUNICATION, "rank");
        }
        ck_assert_msg(named, "way %d: '%s' / '%s' / '%s'", way, rank_results_[0].message,
                      rank_results_[1].message, rank_results_[2].message);
    }
}
END_TEST

static Status skip_body(Communicator *c, void *context) {
    (void)context;
    float value = 0;
    CommTicket ticket;
    if (c->rank != 1) TRY(c->ops->all_reduce(c, &value, 1, COMM_F32, COMM_SUM, &ticket));
    return c->ops->broadcast(c, &value, 1, COMM_F32, 0, &ticket);
}

START_TEST(a_skipped_collective_is_named) {
    ranks_start(2, &quick, skip_body, NULL);
    ranks_join(2);
    for (int rank = 0; rank < 2; rank++) {
        ranks_expect(rank, STATUS_COMMUNICATION, "all_reduce number 1");
        ranks_expect(rank, STATUS_COMMUNICATION, "broadcast number 1");
    }
}
END_TEST

// --- Ranks that are lost -------------------------------------------------------------------------

// Collectives until something happens; `victim` says when it is in the middle of them.
static Status busy_body(Communicator *c, void *context) {
    int64_t count = *(const int64_t *)context;
    float *values = allocate(count * 4);
    Status status = STATUS_OK;
    CommTicket ticket;
    memset(values, 0, (size_t)count * 4);
    while (status == STATUS_OK) {
        status = c->ops->all_reduce(c, values, count, COMM_F32, COMM_SUM, &ticket);
        atomic_fetch_add(&rank_results_[c->rank].checkpoint, 1);
    }
    free(values);
    // The failure stays, whatever is asked next.
    EXPECT(c->ops->check(c) == status, "check");
    EXPECT(c->ops->wait(c, ticket) == status, "wait");
    EXPECT(c->ops->broadcast(c, NULL, 0, COMM_F32, 0, &ticket) == status, "broadcast");
    return status;
}

static const int64_t busy_sizes[] = {1, 1 << 20};

START_TEST(a_killed_rank_is_named) {
    for (int i = 0; i < 2; i++) {
        int64_t count = busy_sizes[i];
        ranks_start(3, &quick, busy_body, &count);
        wait_for_progress(1);
        double start = clock_seconds();
        kill(rank_pids_[1], SIGKILL);
        ranks_join(3);
        ck_assert_double_lt(clock_seconds() - start, 5);
        ck_assert_int_eq(rank_results_[1].status, RANK_KILLED + SIGKILL);
        for (int rank = 0; rank < 3; rank += 2) {
            ranks_expect(rank, STATUS_COMMUNICATION, "rank 1");
            ranks_expect(rank, STATUS_COMMUNICATION, "all_reduce number");
        }
    }
}
END_TEST

START_TEST(a_stopped_rank_is_named_in_time) {
    for (int i = 0; i < 2; i++) {
        int64_t count = busy_sizes[i];
        ranks_start(3, &impatient, busy_body, &count);
        wait_for_progress(1);
        double start = clock_seconds();
        kill(rank_pids_[1], SIGSTOP);
        for (int rank = 0; rank < 3; rank += 2)
            waitid(P_PID, (id_t)rank_pids_[rank], NULL, WEXITED | WNOWAIT);
        double seconds = clock_seconds() - start;
        kill(rank_pids_[1], SIGKILL);
        ranks_join(3);
        ck_assert_double_ge(seconds, 0.9);
        ck_assert_double_lt(seconds, 6);
        for (int rank = 0; rank < 3; rank += 2) ranks_expect(rank, STATUS_COMMUNICATION, "rank 1");
        // Whoever ran out of patience first says so; the other may hear it from it.
        ck_assert(strstr(rank_results_[0].message, "has not moved a byte") ||
                  strstr(rank_results_[2].message, "has not moved a byte"));
    }
}
END_TEST

// A rank that only stops for a while costs time, nothing else.
static Status slow_body(Communicator *c, void *context) {
    (void)context;
    CommTicket ticket;
    double value;
    for (int i = 0; i < 3; i++) {
        value = c->rank;
        if (c->rank == i) usleep(600000);
        TRY(c->ops->all_reduce(c, &value, 1, COMM_F64, COMM_SUM, &ticket));
        EXPECT(value == 3, "%g", value);
    }
    return STATUS_OK;
}

START_TEST(a_slow_rank_is_waited_for) {
    ranks_expect_ok(3, &impatient, slow_body, NULL);
}
END_TEST

// --- Abort ---------------------------------------------------------------------------------------

// Rank 0 waits for a rank that never comes, until another thread has had enough.
static Status abort_body(Communicator *c, void *context) {
    (void)context;
    double value = 0;
    CommTicket ticket;
    pthread_t thread;
    if (c->rank == 1) usleep(1000000);
    if (c->rank == 0) EXPECT(pthread_create(&thread, NULL, abort_soon, c) == 0, "thread");
    Status status = c->ops->all_reduce(c, &value, 1, COMM_F64, COMM_SUM, &ticket);
    if (c->rank == 0) {
        pthread_join(thread, NULL);
        EXPECT(c->ops->check(c) == status, "check");
    }
    return status;
}

START_TEST(abort_ends_a_wait) {
    ranks_start(2, &quick, abort_body, NULL);
    ranks_join(2);
    ranks_expect(0, STATUS_COMMUNICATION, "aborted in all_reduce number 1");
    ck_assert_double_lt(rank_results_[0].seconds, 0.9);
    ranks_expect(1, STATUS_COMMUNICATION, "rank 0 is lost");
    ranks_start(1, &quick, abort_body, NULL); // alone: nothing to wait for, but it is over
    ranks_join(1);
    ck_assert_int_eq(rank_results_[0].status, STATUS_INTERNAL); // the sum succeeded, check fails
}
END_TEST

TEST_MAIN("communicator", TEST(sums_are_in_rank_order), TEST(sums_are_a_tree_on_request),
          TEST(both_orders_differ_here), TEST(other_types_and_extremes),
          TEST(copies_reach_their_places), TEST(tickets_count_and_last_names),
          TEST(different_calls_are_named), TEST(a_skipped_collective_is_named),
          TEST(a_killed_rank_is_named), TEST(a_stopped_rank_is_named_in_time),
          TEST(a_slow_rank_is_waited_for), TEST(abort_ends_a_wait))
