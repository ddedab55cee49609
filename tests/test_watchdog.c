// A rank that makes no progress is ended in time, says where it was, and lets the others go.
#include "tests/ranks.h"

#include <fcntl.h>
#include "base/log.h"
#include "train/watchdog.h"

static char log_path[128];

static void catch_log(void) {
    int fd = open(log_path, O_WRONLY | O_CREAT | O_APPEND, 0666);
    if (fd < 0 || dup2(fd, 2) != 2) _exit(99);
}

static void expect_log(const char *text, bool there) {
    char *log;
    size_t bytes;
    ck_assert_ok(io_read_file(log_path, 1 << 20, &log, &bytes));
    ck_assert_msg((strstr(log, text) != NULL) == there, "log '%s': '%s'", log, text);
    free(log);
}

static void new_log(void) {
    snprintf(log_path, sizeof log_path, "%s/log", test_directory());
    ck_assert_ok(io_unlink(log_path));
}

static Status start(Communicator *c, double seconds, Watchdog **w) {
    catch_log();
    return watchdog_start(c ? c->rank : 0, seconds, c, w);
}

static Status hang(int index, void *context) {
    Watchdog *w;
    (void)index;
    (void)context;
    TRY(start(NULL, 0.5, &w));
    watchdog_beat(w, 17, "waiting for data");
    sleep(60);
    return STATUS_OK;
}

START_TEST(a_rank_that_hangs_is_ended) {
    new_log();
    processes_start(1, hang, NULL);
    ranks_join(1);
    ck_assert_int_eq(rank_results_[0].status, STATUS_COMMUNICATION);
    expect_log("rank 0 has made no progress for", true);
    expect_log("step 17, waiting for data, last collective none number 0", true);
}
END_TEST

// What is said before the end, and words that never come to an end.
static void say(void *context, const char *why) {
    log_error("%s: %s", (const char *)context, why);
}
static void say_for_ever(void *context, const char *why) {
    say(context, why);
    sleep(60);
}

static Status hang_with_words(int index, void *context) {
    Watchdog *w;
    (void)index;
    TRY(start(NULL, 0.5, &w));
    watchdog_last_words(w, context, (char *)"last words");
    sleep(60);
    return STATUS_OK;
}

START_TEST(last_words_are_said_but_not_waited_for) {
    const WatchdogWords words[] = {say, say_for_ever};
    for (int i = 0; i < 2; i++) {
        new_log();
        processes_start(1, hang_with_words, words[i]);
        ranks_join(1);
        ck_assert_int_eq(rank_results_[0].status, STATUS_COMMUNICATION);
        ck_assert_double_lt(rank_results_[0].seconds, 8); // 0.5, as long for the rank, 3
        expect_log("last words: rank 0 has made no progress for", true);
    }
}
END_TEST

static Status work(int index, void *context) {
    Watchdog *w;
    (void)index;
    (void)context;
    TRY(start(NULL, 0.4, &w));
    for (int step = 0; step < 20; step++) {
        usleep(50000);
        watchdog_beat(w, step, "step");
    }
    watchdog_allow(w, 5); // a long phase, announced
    usleep(900000);
    watchdog_stop(w);
    usleep(600000);
    return STATUS_OK;
}

START_TEST(a_rank_that_works_is_left_alone) {
    new_log();
    processes_start(1, work, NULL);
    ranks_join(1);
    ranks_expect(0, STATUS_OK, "");
    expect_log("progress", false);
}
END_TEST

// Rank 1 hangs outside of any collective, rank 0 waits for it in one.
static Status hang_beside(Communicator *c, void *context) {
    (void)context;
    double value = 1;
    Watchdog *w;
    CommTicket ticket;
    TRY(start(c, c->rank == 1 ? 0.6 : 20, &w));
    watchdog_beat(w, 5, "step");
    TRY(c->ops->all_reduce(c, &value, 1, COMM_F64, COMM_SUM, &ticket));
    watchdog_beat(w, 6, "reading a file");
    if (c->rank == 1) sleep(60);
    Status status = c->ops->all_reduce(c, &value, 1, COMM_F64, COMM_SUM, &ticket);
    watchdog_stop(w);
    return status;
}

// Rank 0 is ended while it waits in a collective: it gets out of it by itself.
static Status hang_inside(Communicator *c, void *context) {
    (void)context;
    double value = 1;
    Watchdog *w;
    CommTicket ticket;
    TRY(start(c, 0.5, &w));
    watchdog_beat(w, 5, "step");
    if (c->rank == 1) {
        watchdog_stop(w);
        usleep(2000000);
        w = NULL;
    }
    Status status = c->ops->all_reduce(c, &value, 1, COMM_F64, COMM_SUM, &ticket);
    watchdog_stop(w);
    return status;
}

START_TEST(others_are_let_go) {
    const CommunicatorOptions patient = {.timeout_seconds = 60};
    new_log();
    ranks_start(2, &patient, hang_beside, NULL);
    ranks_join(2);
    ranks_expect(0, STATUS_COMMUNICATION, "rank 1 is lost");
    ck_assert_int_eq(rank_results_[1].status, STATUS_COMMUNICATION);
    ck_assert_double_lt(rank_results_[0].seconds, 5);
    expect_log("rank 1 has made no progress", true);
    expect_log("step 6, reading a file, last collective all_reduce number 1", true);
    new_log();
    ranks_start(2, &patient, hang_inside, NULL);
    ranks_join(2);
    ranks_expect(0, STATUS_COMMUNICATION, "aborted in all_reduce number 1");
    ck_assert_double_lt(rank_results_[0].seconds, 1.9);
    expect_log("rank 0 has made no progress", true);
}
END_TEST

// Collectives are progress, whatever the rank forgets to say.
static Status collective_work(Communicator *c, void *context) {
    (void)context;
    double value = 1;
    Watchdog *w;
    CommTicket ticket;
    TRY(start(c, 0.4, &w));
    for (int i = 0; i < 20; i++) {
        usleep(50000);
        TRY(c->ops->all_reduce(c, &value, 1, COMM_F64, COMM_SUM, &ticket));
    }
    watchdog_stop(w);
    return STATUS_OK;
}

START_TEST(collectives_are_progress) {
    const CommunicatorOptions patient = {.timeout_seconds = 60};
    new_log();
    ranks_expect_ok(2, &patient, collective_work, NULL);
    expect_log("progress", false);
}
END_TEST

// A communicator that waits on a device, where a dead peer moves nothing: NCCL's.
typedef struct Waiting {
    Communicator base;
    CommunicatorOps ops;
    atomic_int aborted;
} Waiting;

static const char *waiting_lost(Communicator *c) {
    (void)c;
    return "rank 1 (node3, pid 77)";
}
static const char *waiting_last(Communicator *c, CommTicket *ticket) {
    (void)c;
    *ticket = 4;
    return "all_reduce";
}
static void waiting_abort(Communicator *c) {
    atomic_store(&((Waiting *)c)->aborted, 1);
}

static Status wait_for_the_dead(int index, void *context) {
    Waiting waiting = {.ops = {.lost = waiting_lost, .last = waiting_last, .abort = waiting_abort}};
    Watchdog *w;
    (void)index;
    (void)context;
    waiting.base.ops = &waiting.ops;
    TRY(start(&waiting.base, 600, &w));
    watchdog_beat(w, 8, "in the step");
    const double deadline = clock_seconds() + 5;
    while (!atomic_load(&waiting.aborted) && clock_seconds() < deadline) usleep(1000);
    watchdog_stop(w);
    EXPECT(atomic_load(&waiting.aborted), "aborted");
    return STATUS_OK;
}

START_TEST(a_lost_peer_is_not_waited_for) {
    new_log();
    processes_start(1, wait_for_the_dead, NULL);
    ranks_join(1);
    ranks_expect(0, STATUS_OK, "");
    expect_log("rank 1 (node3, pid 77) is lost: its connection is closed; this is rank 0, step 8, "
               "in the step",
               true);
}
END_TEST

TEST_MAIN("watchdog", TEST(a_rank_that_hangs_is_ended), TEST(a_rank_that_works_is_left_alone),
          TEST(last_words_are_said_but_not_waited_for), TEST(others_are_let_go),
          TEST(collectives_are_progress), TEST(a_lost_peer_is_not_waited_for))
