// Tiny runs (tests/tiny_run.h) of several ranks, each a process, for the tests of training
// together.
#ifndef TESTS_PARALLEL_JOB_H
#define TESTS_PARALLEL_JOB_H

#include "tests/lazy_communicator.h"
#include "tests/ranks.h"
#include "tests/tiny_run.h"
#include "train/checkpoint_slices.h"

enum { ALL_RANKS = -1 };

// What the ranks of a test run, and what one of them has done to it.
typedef struct Job {
    Recipe recipe;
    RunOptions options;
    int victim; // the rank that `hook` and `train` are for; ALL_RANKS for none
    IoHook hook;
    void *context;
    Status (*train)(const Recipe *, const RunOptions *);
    bool lazy; // collectives happen when they are waited for
} Job;

static const CommunicatorOptions comm_options = {.timeout_seconds = 30};

static Status run_rank(Communicator *communicator, void *context);

// Leaves in rank_results_ how many collectives were on their way at once.
__attribute__((unused)) static Status run_lazily(Communicator *communicator, Job *job) {
    Job inner = *job;
    LazyCommunicator *lazy = lazy_communicator(communicator);
    inner.lazy = false;
    Status status = run_rank(&lazy->base, &inner);
    atomic_store(&rank_results_[communicator->rank].checkpoint, lazy->most);
    communicator_destroy(&lazy->base);
    return status;
}

__attribute__((unused)) static Status run_rank(Communicator *communicator, void *context) {
    Job *job = context;
    if (job->lazy) return run_lazily(communicator, job);
    bool victim = communicator->rank == job->victim;
    RunOptions options = job->options;
    options.communicator = communicator;
    if (victim && job->hook) io_set_hook(job->hook, job->context);
    Status status = (victim && job->train ? job->train : run_training)(&job->recipe, &options);
    io_set_hook(NULL, NULL);
    return status;
}

__attribute__((unused)) static Job job_of(Recipe recipe) {
    // Many buckets, also in a model this small.
    tiny_set(&recipe, "parallel.bucket_bytes=4096");
    return (Job){.recipe = recipe, .victim = ALL_RANKS};
}

__attribute__((unused)) static void run_ok(int world, Job *job) {
    if (world == 1)
        expect_exit(&job->recipe, NULL, STATUS_OK);
    else
        ranks_expect_ok(world, &comm_options, run_rank, job);
}

// The same number of ranks: every file.
__attribute__((unused)) static void expect_same_run_of(int world, const char *a, const char *b) {
    char file[64], x[HASH_HEX_SIZE], y[HASH_HEX_SIZE];
    expect_same_log(a, b, "step");
    expect_same_log(a, b, "eval");
    for (int r = 0; r < world; r++) {
        ck_assert_ok(slices_file_name(r, world, file));
        ck_assert_int_eq(tiny_newest(a, file, x), tiny_newest(b, file, y));
        ck_assert_msg(strcmp(x, y) == 0, "%s of %s and %s differ", file, a, b);
    }
}

#endif
