// Training on several GPUs, one process each: the same model as on one, the same bits every time,
// and what may happen to a rank. The faults are those of tests/test_parallel_faults.c, here with
// NCCL's kernels waiting on the device for a rank that does not come.
//
// The test's process touches no device, because CUDA does not survive a fork. GPU_TEST_RANKS=4
// leaves out the tests' turns with two ranks.
#include "cuda/backend.h"
#include "tests/gpu/gpu_count.h"
#include "tests/parallel_job.h"
#include "train/device.h"

enum { SKIPPED = 77, HANG_SECONDS = 10 };

static int gpus_, fewest_ = 2;

typedef struct GpuJob {
    Job job;
    LossOp *loss;                   // in place of the victim's, or NULL
    int mesh[RANKS_MAX][RANKS_MAX]; // connections over which ranks notice that one has died
} GpuJob;

// --- A run ---------------------------------------------------------------------------------------

static Status connect_gpu(Backend *backend, Communicator *tcp, GpuJob *gpu, Communicator **out) {
    unsigned char id[DEVICE_ID_BYTES] = {0};
    const CommunicatorOptions options = {.timeout_seconds = HANG_SECONDS};
    const CommunicatorLinks links = {
        .rank = tcp->rank, .world = tcp->world, .sockets = gpu->mesh[tcp->rank]};
    CommTicket ticket;
    for (int i = 0; i < tcp->world; i++)
        for (int j = 0; j < tcp->world && i != tcp->rank; j++) net_close(gpu->mesh[i][j]);
    if (tcp->rank == 0) TRY(device_communicator_id(backend, id));
    TRY(tcp->ops->broadcast(tcp, id, sizeof id, COMM_BYTE, 0, &ticket));
    TRY(tcp->ops->wait(tcp, ticket));
    return communicator_nccl(backend, id, &links, &options, out);
}

// The communicator over TCP is there to find each other by; the run has its own.
static Status run_on_gpu(Communicator *tcp, void *context) {
    GpuJob *gpu = context;
    const Job *job = &gpu->job;
    const bool victim = tcp->rank == job->victim;
    RunOptions options = job->options;
    Communicator *nccl = NULL;
    Backend *backend;
    TRY(prepare_backend(&job->recipe, tcp->rank, &backend));
    Status status = connect_gpu(backend, tcp, gpu, &nccl);
    options.communicator = nccl;
    options.local_rank = tcp->rank;
    if (victim && job->hook) io_set_hook(job->hook, job->context);
    if (victim && gpu->loss) replace_loss(backend, gpu->loss);
    if (status == STATUS_OK) status = run_training_on(backend, &job->recipe, &options);
    io_set_hook(NULL, NULL);
    communicator_destroy(nccl);
    backend_destroy(backend);
    return status;
}

// One micro-batch a step on each of `world` ranks; a model this small on a GPU.
static GpuJob gpu_job(const char *name, int world) {
    GpuJob gpu = {.job = job_of(tiny_moe_recipe(name))};
    tiny_set(&gpu.job.recipe, "run.device=cuda");
    tiny_set(&gpu.job.recipe, "train.global_batch=%d", 2 * world);
    tiny_set(&gpu.job.recipe, "parallel.hang_seconds=%d", HANG_SECONDS);
    return gpu;
}

static void start(int world, GpuJob *gpu) {
    ranks_connect_(world, gpu->mesh);
    ranks_start(world, &comm_options, run_on_gpu, gpu);
    for (int i = 0; i < world; i++)
        for (int j = 0; j < world; j++) net_close(gpu->mesh[i][j]);
}

static void expect_ok(int world, GpuJob *gpu) {
    start(world, gpu);
    ranks_join(world);
    for (int r = 0; r < world; r++) ranks_expect(r, STATUS_OK, "");
}

static void finish(int world, GpuJob *gpu) {
    gpu->job.victim = ALL_RANKS;
    expect_ok(world, gpu);
}

// Starts ranks of which one gets a signal at an operation on files, which are its clock.
static void start_with_signal(int world, GpuJob *gpu, int victim, int number, int signal) {
    Trigger trigger = {.number = number, .signal = signal};
    gpu->job.victim = victim;
    gpu->job.hook = on_operation;
    gpu->job.context = &trigger;
    start(world, gpu);
}
enum { IN_THE_MIDDLE_0 = 300, IN_THE_MIDDLE = 150 }; // of rank 0, of the others

// The last rank is killed; the others notice and end, and long before they would call it a hang.
// (The start before it takes 2 s with 2 GPUs and 15 s with 4.)
static void lose_last(int world, GpuJob *gpu, int number) {
    start_with_signal(world, gpu, world - 1, number, SIGKILL);
    rank_join(world - 1);
    const double begin = clock_seconds();
    ck_assert_int_eq(rank_results_[world - 1].status, RANK_KILLED + SIGKILL);
    for (int r = 0; r < world - 1; r++) {
        rank_join(r);
        printf("rank %d of %d, %.1f s later: %s\n", r, world, clock_seconds() - begin,
               rank_results_[r].message);
        ranks_expect(r, STATUS_COMMUNICATION, "is lost");
    }
    ck_assert_double_lt(clock_seconds() - begin, HANG_SECONDS);
}

// The name of a run of this many ranks.
static const char *name_of(const char *what, int world) {
    static char name[2][48];
    static int next;
    next = 1 - next;
    snprintf(name[next], sizeof name[next], "%s%d", what, world);
    return name[next];
}

// 2, 4, 8, ... as far as there are GPUs.
#define for_each_world(world)                                                                      \
    for (int world = fewest_; world <= gpus_ && world <= RANKS_MAX; world *= 2)

// The uninterrupted run that the others are compared with.
static void prepare(void) {
    tiny_prepare();
    for_each_world(world) {
        GpuJob whole = gpu_job(name_of("whole", world), world);
        finish(world, &whole);
    }
}

// --- The same as on one --------------------------------------------------------------------------

// Logged losses of two runs, whose sums differ in their order only. Weights and activations are in
// bf16: one that is rounded the other way differs by 1/128, and a step's loss is the mean over 64
// tokens. Runs of one rank in bf16 and in fp32 differ by 0.5 % in the mean and by 2.8 % at most in
// any step (docs/performance.md).
static void expect_close_losses(const char *a, const char *b) {
    json_t *x = tiny_log(a, "step"), *y = tiny_log(b, "step"), *record;
    double sum = 0, most = 0;
    size_t i;
    ck_assert_uint_gt(json_array_size(x), 0);
    ck_assert_uint_eq(json_array_size(x), json_array_size(y));
    json_array_foreach(x, i, record) {
        const json_t *other = json_array_get(y, i);
        double loss = json_number_value(json_object_get(other, "loss"));
        double difference = json_number_value(json_object_get(record, "loss")) - loss;
        ck_assert(loss > 0);
        sum += fabs(difference) / loss;
        most = fmax(most, fabs(difference) / loss);
    }
    sum /= (double)json_array_size(x);
    printf("%s and %s: losses differ by %.2g %% in the mean, %.2g %% at most\n", a, b, 100 * sum,
           100 * most);
    ck_assert_double_lt(sum, 0.005);
    ck_assert_double_lt(most, 0.028);
    json_decref(x);
    json_decref(y);
}

START_TEST(several_gpus_train_as_one_does) {
    prepare();
    for_each_world(world) {
        GpuJob one = gpu_job(name_of("one", world), world), two = gpu_job("two", world);
        finish(1, &one);
        expect_close_losses(name_of("one", world), name_of("whole", world));
        two.job.recipe.parallel_zero = ZERO_2;
        snprintf(two.job.recipe.run_name, sizeof two.job.recipe.run_name, "%s",
                 name_of("sharded", world));
        finish(world, &two);
        expect_close_losses(name_of("one", world), name_of("sharded", world));
    }
}
END_TEST

// Four experts, with `group` ranks sharing them out.
static GpuJob expert_job(const char *name, int world, int group) {
    GpuJob gpu = gpu_job(name, world);
    tiny_set(&gpu.job.recipe, "lfuc.num_experts=4");
    tiny_set(&gpu.job.recipe, "lfuc.follower_copies=2");
    tiny_set(&gpu.job.recipe, "lfuc.top_k=2");
    tiny_set(&gpu.job.recipe, "parallel.expert=%d", group);
    return gpu;
}

START_TEST(shared_out_experts_train_as_whole_ones_do) {
    tiny_prepare();
    for_each_world(world) {
        GpuJob whole = expert_job(name_of("all", world), world, 1);
        finish(world, &whole);
        for (int group = 2; group <= world && group <= 4; group *= 2) {
            char name[3][48]; // the third computes layers again, which must change nothing
            for (int i = 0; i < 3; i++) {
                snprintf(name[i], sizeof name[i], "experts%d_%d_%d", world, group, i);
                GpuJob shared = expert_job(name[i], world, group);
                if (i == 2) tiny_set(&shared.job.recipe, "train.recompute=layer");
                finish(world, &shared);
            }
            expect_close_losses(name_of("all", world), name[0]);
            expect_same_run_of(world, name[0], name[1]);
            expect_same_run_of(world, name[0], name[2]);
        }
    }
}
END_TEST

// A rank that dies leaves the others of its group waiting in the middle of a pass.
START_TEST(a_killed_rank_of_an_expert_group_ends_all) {
    tiny_prepare();
    for_each_world(world) {
        GpuJob job = expert_job(name_of("lost", world), world, 2);
        lose_last(world, &job, IN_THE_MIDDLE);
        finish(world, &job);
    }
}
END_TEST

START_TEST(every_run_has_the_same_bits) {
    prepare();
    for_each_world(world) {
        GpuJob again = gpu_job(name_of("again", world), world);
        finish(world, &again);
        expect_same_run_of(world, name_of("whole", world), name_of("again", world));
    }
}
END_TEST

// On 2, stopped, on 1, stopped, and to the end on 4, or 2 where there are no more.
START_TEST(checkpoints_fit_any_number_of_gpus) {
    const int worlds[] = {2, 1, gpus_ < 4 ? 2 : 4};
    prepare();
    GpuJob job = gpu_job("moves", fewest_);
    for (int i = 0; i < 3; i++) {
        tiny_set(&job.job.recipe, "train.micro_batch=%d", 2 * fewest_ / worlds[i] > 1 ? 2 : 1);
        start_with_signal(worlds[i], &job, i < 2 ? 0 : ALL_RANKS, IN_THE_MIDDLE, SIGUSR1);
        ranks_join(worlds[i]);
        for (int r = 0; r < worlds[i]; r++)
            ranks_expect(r, i < 2 ? STATUS_PREEMPTED : STATUS_OK, "");
    }
    expect_close_losses(name_of("whole", fewest_), "moves");
}
END_TEST

// --- Faults --------------------------------------------------------------------------------------

START_TEST(a_killed_rank_ends_all_and_the_same_command_continues) {
    prepare();
    for_each_world(world) {
        GpuJob job = gpu_job(name_of("killed", world), world);
        lose_last(world, &job, IN_THE_MIDDLE);
        finish(world, &job);
        expect_same_run_of(world, name_of("whole", world), name_of("killed", world));
    }
}
END_TEST

// Before the first step ranks wait for each other much longer than in one.
START_TEST(a_rank_that_dies_early_is_noticed) {
    tiny_prepare();
    for_each_world(world) {
        for (int number = 1; number < 30; number += 9) {
            char name[32];
            snprintf(name, sizeof name, "early%d_%d", world, number);
            GpuJob job = gpu_job(name, world);
            lose_last(world, &job, number);
        }
    }
}
END_TEST

START_TEST(a_stopped_rank_is_noticed_in_time) {
    prepare();
    for_each_world(world) {
        GpuJob job = gpu_job(name_of("stopped", world), world);
        int how;
        start_with_signal(world, &job, 0, IN_THE_MIDDLE_0, SIGSTOP);
        ck_assert_int_eq(waitpid(rank_pids_[0], &how, WUNTRACED), rank_pids_[0]);
        ck_assert(WIFSTOPPED(how));
        const double begin = clock_seconds();
        for (int r = 1; r < world; r++) {
            ck_assert_int_eq(waitpid(rank_pids_[r], &how, 0), rank_pids_[r]);
            ck_assert_msg(WIFEXITED(how) && WEXITSTATUS(how) == STATUS_COMMUNICATION,
                          "rank %d ended with %#x", r, (unsigned)how);
        }
        printf("a stopped rank was noticed after %.1f s\n", clock_seconds() - begin);
        ck_assert_double_lt(clock_seconds() - begin, 3 * HANG_SECONDS);
        kill(rank_pids_[0], SIGKILL);
        ck_assert_int_eq(waitpid(rank_pids_[0], &how, 0), rank_pids_[0]);
        finish(world, &job);
        expect_same_run_of(world, name_of("whole", world), name_of("stopped", world));
    }
}
END_TEST

START_TEST(a_signal_to_one_rank_saves_on_all) {
    prepare();
    for_each_world(world) {
        GpuJob job = gpu_job(name_of("preempted", world), world);
        start_with_signal(world, &job, 0, IN_THE_MIDDLE_0, SIGUSR1);
        ranks_join(world);
        for (int r = 0; r < world; r++) ranks_expect(r, STATUS_PREEMPTED, "stopped by SIGUSR1");
        finish(world, &job);
        expect_same_run_of(world, name_of("whole", world), name_of("preempted", world));
    }
}
END_TEST

START_TEST(bad_numbers_on_one_rank_are_skipped_by_all) {
    tiny_prepare();
    for_each_world(world) {
        for (spoiled_ = SPOIL_LOSS; spoiled_ <= SPOIL_GRADIENT; spoiled_++) {
            const char *name = name_of(spoiled_ == SPOIL_LOSS ? "loss" : "gradient", world);
            GpuJob job = gpu_job(name, world);
            tiny_set(&job.job.recipe, "run.gpu_graphs=false"); // what is recorded must not wait
            job.job.victim = world - 1;
            job.loss = spoiled_loss;
            expect_ok(world, &job);
            ck_assert_uint_eq(tiny_count_events(name, "skip"), 3);
        }
        expect_same_run_of(world, name_of("loss", world), name_of("gradient", world));
    }
}
END_TEST

// The others wait for it on the device, and know how long.
START_TEST(a_slow_rank_is_named) {
    tiny_prepare();
    for_each_world(world) {
        for (int slow = 0; slow < 2; slow++) {
            const char *name = name_of(slow ? "slow" : "even", world);
            GpuJob job = gpu_job(name, world);
            tiny_set(&job.job.recipe, "parallel.straggler_steps=9");
            tiny_set(&job.job.recipe, "run.gpu_graphs=false"); // what is recorded must not wait
            job.job.victim = world - 1;
            if (slow) job.loss = slow_loss;
            expect_ok(world, &job);
            ck_assert_uint_eq(tiny_count_events(name, "straggler"), (size_t)slow);
        }
    }
}
END_TEST

int main(int argc, char **argv) {
    const TestEntry entries[] = {TEST(several_gpus_train_as_one_does),
                                 TEST(shared_out_experts_train_as_whole_ones_do),
                                 TEST(a_killed_rank_of_an_expert_group_ends_all),
                                 TEST(every_run_has_the_same_bits),
                                 TEST(checkpoints_fit_any_number_of_gpus),
                                 TEST(a_killed_rank_ends_all_and_the_same_command_continues),
                                 TEST(a_rank_that_dies_early_is_noticed),
                                 TEST(a_stopped_rank_is_noticed_in_time),
                                 TEST(a_signal_to_one_rank_saves_on_all),
                                 TEST(bad_numbers_on_one_rank_are_skipped_by_all),
                                 TEST(a_slow_rank_is_named)};
    gpus_ = gpu_count();
    if (getenv("GPU_TEST_RANKS")) fewest_ = atoi(getenv("GPU_TEST_RANKS"));
    if (fewest_ < 2) fewest_ = 2;
    if (gpus_ < fewest_ || !communicator_nccl_built()) {
        printf("skipped: %s\n", gpus_ < fewest_ ? "too few GPUs" : "this build has no NCCL");
        return SKIPPED;
    }
    return test_run_("GPU ranks", entries, sizeof entries / sizeof entries[0], 600, argc, argv);
}
