// Several ranks on this machine for tests: one process each, connected over loopback.
//
// A process's body returns a Status; what it and its message were lands in memory that the test
// shares. Bodies check with EXPECT, since an assertion of `check` belongs to the test's process.
#ifndef TESTS_RANKS_H
#define TESTS_RANKS_H

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include "base/clock.h"
#include "base/net.h"
#include "model/communicator.h"
#include "tests/test.h"

enum { RANKS_MAX = 8, RANK_KILLED = 1000 };

typedef struct RankResult {
    int status; // the body's Status, RANK_KILLED + signal, or another exit code of the process
    char message[1024];
    double seconds;        // the body's
    atomic_int checkpoint; // free for bodies
} RankResult;

static RankResult *rank_results_; // (RANKS_MAX), shared by all processes
static pid_t rank_pids_[RANKS_MAX];

#define EXPECT(condition, ...)                                                                     \
    do {                                                                                           \
        if (!(condition)) FAIL(STATUS_INTERNAL, "expected " #condition ": " __VA_ARGS__);          \
    } while (0)

typedef Status (*RankBody)(Communicator *communicator, void *context);

int __lsan_do_recoverable_leak_check(void) __attribute__((weak)); // there in an ASan build

// All pairs of connected sockets: mesh[i][j] is rank i's end to rank j.
static void ranks_connect_(int world, int mesh[RANKS_MAX][RANKS_MAX]) {
    int listener, port;
    char peer[NET_NAME_MAX];
    double deadline = clock_seconds() + 10;
    ck_assert_ok(net_listen("127.0.0.1", 0, &listener, &port));
    for (int i = 0; i < world; i++) {
        mesh[i][i] = -1;
        for (int j = i + 1; j < world; j++) {
            ck_assert_ok(net_connect("the test", "127.0.0.1", port, deadline, &mesh[i][j]));
            ck_assert_ok(net_accept(listener, deadline, &mesh[j][i], peer));
            ck_assert_int_ge(mesh[j][i], 0);
        }
    }
    net_close(listener);
}

static Status rank_run_(int rank, int world, int mesh[RANKS_MAX][RANKS_MAX],
                        const CommunicatorOptions *options, RankBody body, void *context) {
    Communicator *communicator;
    // A descriptor that stays open elsewhere would keep a dead rank's connection alive.
    for (int i = 0; i < world; i++)
        for (int j = 0; j < world && i != rank; j++) net_close(mesh[i][j]);
    const CommunicatorLinks links = {.rank = rank, .world = world, .sockets = mesh[rank]};
    TRY(communicator_tcp(&links, options, &communicator));
    Status status = body(communicator, context);
    communicator_destroy(communicator);
    return status;
}

// Starts `count` processes; ranks_join waits for them.
typedef Status (*ProcessBody)(int index, void *context);
static void processes_start(int count, ProcessBody body, void *context) {
    rank_results_ = mmap(NULL, RANKS_MAX * sizeof *rank_results_, PROT_READ | PROT_WRITE,
                         MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ck_assert(rank_results_ != MAP_FAILED);
    for (int i = 0; i < count; i++) {
        rank_pids_[i] = fork();
        ck_assert_int_ge(rank_pids_[i], 0);
        if (rank_pids_[i] > 0) continue;
        double start = clock_seconds();
        Status status = body(i, context);
        RankResult *result = &rank_results_[i];
        result->seconds = clock_seconds() - start;
        if (status != STATUS_OK)
            snprintf(result->message, sizeof result->message, "%s", status_message());
        if (__lsan_do_recoverable_leak_check && __lsan_do_recoverable_leak_check()) _exit(98);
        _exit(status);
    }
}

typedef struct RankJob_ {
    int world;
    int mesh[RANKS_MAX][RANKS_MAX];
    const CommunicatorOptions *options;
    RankBody body;
    void *context;
} RankJob_;

static Status rank_body_(int rank, void *context) {
    RankJob_ *job = context;
    return rank_run_(rank, job->world, job->mesh, job->options, job->body, job->context);
}

// The same with a communicator between them.
__attribute__((unused)) static void ranks_start(int world, const CommunicatorOptions *options,
                                                RankBody body, void *context) {
    RankJob_ job = {.world = world, .options = options, .body = body, .context = context};
    ranks_connect_(world, job.mesh);
    processes_start(world, rank_body_, &job);
    for (int i = 0; i < world; i++)
        for (int j = 0; j < world; j++) net_close(job.mesh[i][j]);
}

static void rank_join(int rank) {
    int how;
    while (waitpid(rank_pids_[rank], &how, 0) < 0) ck_assert_int_eq(errno, EINTR);
    rank_results_[rank].status = WIFSIGNALED(how) ? RANK_KILLED + WTERMSIG(how) : WEXITSTATUS(how);
}

__attribute__((unused)) static void ranks_join(int world) {
    for (int rank = 0; rank < world; rank++) rank_join(rank);
}

__attribute__((unused)) static void ranks_expect_ok(int world, const CommunicatorOptions *options,
                                                    RankBody body, void *context) {
    ranks_start(world, options, body, context);
    ranks_join(world);
    for (int rank = 0; rank < world; rank++)
        ck_assert_msg(rank_results_[rank].status == STATUS_OK, "world %d, rank %d -> %d: %s", world,
                      rank, rank_results_[rank].status, rank_results_[rank].message);
}

// The rank failed with `status` and a message that contains `text`.
#define ranks_expect(rank, code, text)                                                             \
    do {                                                                                           \
        const RankResult *result_ = &rank_results_[rank];                                          \
        ck_assert_msg(result_->status == (int)(code), "rank %d -> %d, expected %d: %s", rank,      \
                      result_->status, (int)(code), result_->message);                             \
        ck_assert_msg(strstr(result_->message, (text)), "rank %d: message '%s' lacks '%s'", rank,  \
                      result_->message, (text));                                                   \
    } while (0)

#endif
