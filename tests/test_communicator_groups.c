// Communicators split into groups of their ranks: what a group's collectives do, beside those of
// all ranks and of other groups, and that a failure in one is the failure of all.
#include "tests/collectives.h"

static const CommunicatorOptions quick = {.timeout_seconds = 20};
static const CommunicatorOptions quick_tree = {.timeout_seconds = 20, .tree = true};

// Four ranks: neighbors, every other one, and all but rank 2, which is alone.
enum { WAYS = 3 };
static int color_of(int way, int rank) {
    return way == 0 ? rank / 2 : way == 1 ? rank % 2 : rank == 2;
}

// What ranks of other groups must not get into: their numbers in `all` are the values.
static Status check_members(const Communicator *all, Communicator *c, int way) {
    int members[RANKS_MAX], n = 0, sum = 0, own = all->rank;
    int64_t at[RANKS_MAX], bytes[RANKS_MAX];
    uint8_t gathered[RANKS_MAX] = {0}, sent[RANKS_MAX], received[RANKS_MAX];
    CommTicket ticket;
    for (int r = 0; r < all->world; r++) {
        if (color_of(way, r) != color_of(way, own)) continue;
        members[n++] = r;
        sum += 1 << r;
    }
    EXPECT(c->world == n && members[c->rank] == own, "rank %d of %d", c->rank, c->world);
    double bit = 1 << own;
    TRY(c->ops->all_reduce(c, &bit, 1, COMM_F64, COMM_SUM, &ticket));
    EXPECT(bit == sum, "way %d, rank %d: %g, not %d", way, own, bit, sum);
    gathered[c->rank] = (uint8_t)own;
    for (int r = 0; r < n; r++) {
        at[r] = r;
        bytes[r] = 1;
        sent[r] = (uint8_t)(own * 16 + members[r]);
    }
    TRY(c->ops->all_gather(c, gathered, 1, COMM_BYTE, &ticket));
    TRY(c->ops->all_to_all(c, sent, at, bytes, received, at, bytes, &ticket));
    for (int r = 0; r < n; r++) {
        uint8_t value = (uint8_t)own;
        TRY(c->ops->broadcast(c, &value, 1, COMM_BYTE, r, &ticket));
        EXPECT(value == members[r] && gathered[r] == members[r], "from %d", members[r]);
        EXPECT(received[r] == members[r] * 16 + own, "%d from %d", received[r], members[r]);
    }
    return c->ops->wait(c, ticket);
}

static Status check_all_kinds(Communicator *c, int64_t count) {
    TRY(check_all_reduce(c, count));
    TRY(check_reduce_scatter(c, count));
    TRY(check_gather(c, count));
    TRY(check_broadcast(c, count));
    return check_all_to_all(c, count);
}

static Status groups_body(Communicator *all, void *context) {
    Communicator *groups[WAYS], *again;
    (void)context;
    for (int way = 0; way < WAYS; way++) {
        TRY(all->ops->split(all, color_of(way, all->rank), &groups[way]));
        EXPECT(groups[way]->tree == all->tree, "settings");
        for (int i = 0; i < NUM_SIZES; i++) {
            TRY(check_all_kinds(groups[way], sizes[i]));
            TRY(check_gather(all, sizes[i]));
        }
    }
    for (int round = 0; round < 3; round++) {
        for (int way = 0; way < WAYS; way++) TRY(check_members(all, groups[way], way));
        TRY(check_all_reduce(all, 8193));
    }
    // A group of a group, whose ranks count fewer splits than others.
    if (all->rank != 2) TRY(groups[2]->ops->split(groups[2], 7, &again));
    if (all->rank != 2) TRY(check_members(all, again, 2));
    if (all->rank != 2) communicator_destroy(again);
    communicator_destroy(groups[1]);
    TRY(all->ops->split(all, color_of(1, all->rank), &groups[1]));
    for (int way = 0; way < WAYS; way++) TRY(check_members(all, groups[way], way));
    for (int way = 0; way < WAYS; way++) communicator_destroy(groups[way]);
    return check_all_to_all(all, 1000);
}

START_TEST(groups_have_all_collectives) {
    ranks_expect_ok(4, &quick, groups_body, NULL);
    ranks_expect_ok(4, &quick_tree, groups_body, NULL);
}
END_TEST

// Both make the same two calls, the second of their communicators, in another order.
static Status crossed_body(Communicator *all, void *context) {
    Communicator *group;
    CommTicket ticket;
    double value = 1;
    (void)context;
    TRY(all->ops->split(all, 0, &group));
    TRY(group->ops->all_reduce(group, &value, 1, COMM_F64, COMM_SUM, &ticket));
    Communicator *first = all->rank == 0 ? all : group, *second = all->rank == 0 ? group : all;
    Status status = first->ops->all_reduce(first, &value, 1, COMM_F64, COMM_SUM, &ticket);
    if (status == STATUS_OK)
        status = second->ops->all_reduce(second, &value, 1, COMM_F64, COMM_SUM, &ticket);
    EXPECT(second->ops->check(second) == status, "what fails in one fails in all");
    communicator_destroy(group);
    return status;
}

START_TEST(another_order_among_groups_is_named) {
    ranks_start(2, &quick, crossed_body, NULL);
    ranks_join(2);
    for (int rank = 0; rank < 2; rank++) {
        ck_assert_double_lt(rank_results_[rank].seconds, 10);
        ranks_expect(rank, STATUS_COMMUNICATION, "different collectives");
        ranks_expect(rank, STATUS_COMMUNICATION, "all_reduce number 2 (");
        ranks_expect(rank, STATUS_COMMUNICATION, "all_reduce number 2 of group 1 (");
    }
}
END_TEST

// Ranks 1 and 3 are busy in their group; the others wait for them in a collective of all.
static Status killed_body(Communicator *all, void *context) {
    Communicator *group;
    CommTicket ticket;
    double value = 1;
    (void)context;
    TRY(all->ops->split(all, all->rank % 2, &group));
    Status status = STATUS_OK;
    if (all->rank % 2 == 0) status = all->ops->broadcast(all, &value, 1, COMM_F64, 0, &ticket);
    while (status == STATUS_OK) {
        status = group->ops->all_reduce(group, &value, 1, COMM_F64, COMM_MAX, &ticket);
        atomic_fetch_add(&rank_results_[all->rank].checkpoint, 1);
    }
    EXPECT(all->ops->check(all) == status && group->ops->check(group) == status, "check");
    communicator_destroy(group);
    return status;
}

START_TEST(a_rank_killed_in_a_group_is_named) {
    ranks_start(4, &quick, killed_body, NULL);
    wait_for_progress(3);
    double start = clock_seconds();
    kill(rank_pids_[3], SIGKILL);
    ranks_join(4);
    ck_assert_double_lt(clock_seconds() - start, 5);
    for (int rank = 0; rank < 3; rank++) ranks_expect(rank, STATUS_COMMUNICATION, "rank 3");
    ranks_expect(1, STATUS_COMMUNICATION, "of group 1");
}
END_TEST

// Rank 0 waits for rank 1 in their group, until another thread ends the communicator of all.
static Status abort_group_body(Communicator *all, void *context) {
    Communicator *group;
    double value = 0;
    CommTicket ticket;
    pthread_t thread;
    (void)context;
    TRY(all->ops->split(all, all->rank / 2, &group));
    if (all->rank == 1) usleep(1000000);
    if (all->rank == 0) EXPECT(pthread_create(&thread, NULL, abort_soon, all) == 0, "thread");
    Status status = group->ops->all_reduce(group, &value, 1, COMM_F64, COMM_SUM, &ticket);
    communicator_destroy(group); // perhaps while the thread is still at it
    if (all->rank == 0) pthread_join(thread, NULL);
    EXPECT(all->ops->check(all) == status, "check");
    return status;
}

START_TEST(abort_ends_a_wait_in_a_group) {
    ranks_start(4, &quick, abort_group_body, NULL);
    ranks_join(4);
    ranks_expect(0, STATUS_COMMUNICATION, "aborted in all_reduce number 1 of group 1");
    ck_assert_double_lt(rank_results_[0].seconds, 0.9);
    ranks_expect(1, STATUS_COMMUNICATION, "rank 0 is lost");
    ck_assert_int_eq(rank_results_[2].status, STATUS_OK); // another group, which needs nobody
    ck_assert_int_eq(rank_results_[3].status, STATUS_OK);
}
END_TEST

TEST_MAIN("communicator_groups", TEST(groups_have_all_collectives),
          TEST(another_order_among_groups_is_named), TEST(a_rank_killed_in_a_group_is_named),
          TEST(abort_ends_a_wait_in_a_group))
