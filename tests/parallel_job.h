// Tiny runs (tests/tiny_run.h) of several ranks, each a process, for the tests of training
// together.
#ifndef TESTS_PARALLEL_JOB_H
#define TESTS_PARALLEL_JOB_H

#include <math.h>
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

// --- A signal in the middle ----------------------------------------------------------------------

typedef struct Trigger {
    const char *path;   // in it: only such operations count; NULL: all
    long number, calls; // acts at this operation of the process, counted from 1
    int signal;
    pid_t run;
} Trigger;

__attribute__((unused)) static int on_operation(void *context, IoOp op, const char *path,
                                                size_t *bytes) {
    Trigger *trigger = context;
    (void)op, (void)bytes;
    if (trigger->run == 0) trigger->run = getpid();
    if (trigger->run != getpid()) return 0; // a process that checks a shard
    if (trigger->path && !(path && strstr(path, trigger->path))) return 0;
    if (__atomic_add_fetch(&trigger->calls, 1, __ATOMIC_RELAXED) == trigger->number)
        kill(getpid(), trigger->signal);
    return 0;
}

// --- Bad numbers ---------------------------------------------------------------------------------

// Another function in place of a backend's loss, which may call replaced_loss_. One backend of a
// process at a time.
typedef Status LossOp(Backend *, const LinearCrossEntropyArgs *);
static LossOp *replaced_loss_;

__attribute__((unused)) static void replace_loss(Backend *backend, LossOp *loss) {
    static BackendOps ops;
    ops = *backend->ops;
    replaced_loss_ = ops.linear_cross_entropy;
    ops.linear_cross_entropy = loss;
    backend->ops = &ops;
}

// The loss, or a gradient, is NaN in steps 5 to 7 of a run with one micro-batch a step.
enum { SPOIL_LOSS, SPOIL_GRADIENT };
static int spoiled_, spoiled_steps_;

__attribute__((unused)) static Status spoiled_loss(Backend *backend,
                                                   const LinearCrossEntropyArgs *args) {
    const double nan = NAN;
    const float narrow = NAN;
    TRY(replaced_loss_(backend, args));
    if (!args->grad_weight) return STATUS_OK; // an evaluation
    int step = ++spoiled_steps_;
    if (step < 5 || step > 7) return STATUS_OK;
    if (spoiled_ == SPOIL_LOSS)
        return backend->ops->upload(backend, args->loss_sum, &nan, sizeof nan);
    return backend->ops->upload(backend, args->grad_weight, &narrow, sizeof narrow);
}

// Micro-batches that take 30 ms longer.
__attribute__((unused)) static Status slow_loss(Backend *backend,
                                                const LinearCrossEntropyArgs *args) {
    usleep(30000);
    return replaced_loss_(backend, args);
}

// --- What runs have left -------------------------------------------------------------------------

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
