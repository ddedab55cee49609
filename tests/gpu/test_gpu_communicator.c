// The collectives over NCCL, one process per GPU: their results, and a rank that is lost.
//
// CUDA does not survive a fork, so this process touches no device: children count them and are the
// ranks. With one GPU there is one rank, whose collectives change nothing.
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "tests/gpu/gpu_count.h"
#include "tests/gpu/gpu_test.h"

enum { RANKS_MAX = 8, COUNT = 1 << 20, TIMEOUT_SECONDS = 60 };

// What the ranks of one world share.
typedef struct Meeting {
    unsigned char id[CUDA_COMMUNICATOR_ID_BYTES];
    int has_id; // atomic
} Meeting;

typedef struct Rank {
    Backend *backend;
    Communicator *comm;
} Rank;

static void rest(double seconds) {
    struct timespec t = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
    nanosleep(&t, NULL);
}

static Rank join(Meeting *meeting, int rank, int world) {
    const CudaOptions device = {.device = rank};
    const CommunicatorOptions options = {.timeout_seconds = TIMEOUT_SECONDS};
    Rank r = {.backend = gpu_open(&device)};
    if (rank == 0) {
        GPU_OK(communicator_nccl_id(meeting->id));
        __atomic_store_n(&meeting->has_id, 1, __ATOMIC_RELEASE);
    }
    while (!__atomic_load_n(&meeting->has_id, __ATOMIC_ACQUIRE)) rest(0.01);
    const CommunicatorLinks links = {.rank = rank, .world = world};
    GPU_OK(communicator_nccl(r.backend, meeting->id, &links, &options, &r.comm));
    return r;
}

static void leave(Rank *r) {
    communicator_destroy(r->comm);
    backend_destroy(r->backend);
}

// --- Values --------------------------------------------------------------------------------------

// Small whole numbers: every sum of them is exact in any order and in bf16's 8 bits.
static float value_of(int rank, int64_t i) {
    return (float)((i * 7 + rank * 3) % 16);
}
static float sum_of(int world, int64_t i) {
    float sum = 0;
    for (int r = 0; r < world; r++) sum += value_of(r, i);
    return sum;
}

static size_t bytes_of(CommType type) {
    return type == COMM_F64 ? 8 : type == COMM_F32 ? 4 : 2;
}

// `count` values of this rank on the device, as the type.
static void *make_values(const Rank *r, CommType type, int64_t count) {
    void *host = malloc((size_t)count * bytes_of(type)), *device = NULL;
    float *values = malloc((size_t)count * sizeof *values);
    for (int64_t i = 0; i < count; i++) values[i] = value_of(r->comm->rank, i);
    if (type == COMM_F64)
        for (int64_t i = 0; i < count; i++) ((double *)host)[i] = values[i];
    else
        dtype_from_f32(type == COMM_F32 ? DTYPE_F32 : DTYPE_BF16, values, host, (size_t)count);
    GPU_OK(r->backend->ops->alloc(r->backend, (size_t)count * bytes_of(type), &device));
    GPU_OK(r->backend->ops->upload(r->backend, device, host, (size_t)count * bytes_of(type)));
    free(values);
    free(host);
    return device;
}

// Elements [from, to) are expected(world, i). Releases the memory.
static void expect_values(const Rank *r, const char *what, CommType type, void *device,
                          int64_t from, int64_t to, float (*expected)(int, int64_t)) {
    void *host = malloc((size_t)to * bytes_of(type));
    float *found = malloc((size_t)to * sizeof *found);
    int64_t wrong = 0;
    GPU_OK(r->backend->ops->download(r->backend, host, device, (size_t)to * bytes_of(type)));
    if (type == COMM_F64)
        for (int64_t i = 0; i < to; i++) found[i] = (float)((double *)host)[i];
    else
        dtype_to_f32(type == COMM_F32 ? DTYPE_F32 : DTYPE_BF16, host, found, (size_t)to);
    for (int64_t i = from; i < to; i++) wrong += found[i] != expected(r->comm->world, i);
    gpu_checks_++;
    if (wrong > 0) {
        gpu_failures_++;
        printf("FAIL rank %d of %d, %s: %lld wrong values\n", r->comm->rank, r->comm->world, what,
               (long long)wrong);
    }
    r->backend->ops->release(r->backend, device);
    free(found);
    free(host);
}

// --- Collectives -------------------------------------------------------------------------------

static float of_rank_0(int world, int64_t i) {
    (void)world;
    return value_of(0, i);
}
// After a gather part p holds what rank p had there.
static float gathered(int world, int64_t i) {
    return value_of((int)(i / (COUNT / RANKS_MAX)) % world, i);
}
static float highest(int world, int64_t i) {
    float most = 0;
    for (int r = 0; r < world; r++) most = value_of(r, i) > most ? value_of(r, i) : most;
    return most;
}

static void check_sums(const Rank *r, CommType type, const char *name) {
    Communicator *c = r->comm;
    const int64_t part = COUNT / RANKS_MAX, count = part * c->world;
    CommTicket ticket;
    void *values = make_values(r, type, count);
    GPU_OK(c->ops->all_reduce(c, values, count, type, COMM_SUM, &ticket));
    GPU_OK(c->ops->wait(c, ticket));
    expect_values(r, name, type, values, 0, count, sum_of);
    values = make_values(r, type, count);
    GPU_OK(c->ops->reduce_scatter(c, values, part, type, &ticket));
    GPU_OK(c->ops->wait(c, ticket));
    expect_values(r, name, type, values, c->rank * part, (c->rank + 1) * part, sum_of);
}

static void check_copies(const Rank *r) {
    Communicator *c = r->comm;
    const int64_t part = COUNT / RANKS_MAX, count = part * c->world;
    CommTicket ticket;
    void *values = make_values(r, COMM_F32, count);
    GPU_OK(c->ops->all_gather(c, values, part, COMM_F32, &ticket));
    GPU_OK(c->ops->wait(c, ticket));
    expect_values(r, "all_gather", COMM_F32, values, 0, count, gathered);
    values = make_values(r, COMM_F32, count);
    GPU_OK(c->ops->broadcast(c, values, count, COMM_F32, 0, &ticket));
    GPU_OK(c->ops->wait(c, ticket));
    expect_values(r, "broadcast", COMM_F32, values, 0, count, of_rank_0);
    values = make_values(r, COMM_F64, count);
    GPU_OK(c->ops->all_reduce(c, values, count, COMM_F64, COMM_MAX, &ticket));
    GPU_OK(c->ops->wait(c, ticket));
    expect_values(r, "maximum", COMM_F64, values, 0, count, highest);
}

// Rank r sends its part p to rank p, uneven: the last rank gets and sends one element less.
static void check_all_to_all(const Rank *r) {
    Communicator *c = r->comm;
    const int64_t part = COUNT / RANKS_MAX;
    int64_t at[RANKS_MAX], bytes[RANKS_MAX];
    CommTicket ticket;
    void *from = make_values(r, COMM_F32, part * c->world);
    void *to = make_values(r, COMM_F32, part * c->world);
    for (int p = 0; p < c->world; p++) {
        at[p] = p * part * 4;
        bytes[p] = 4 * (p == c->world - 1 || c->rank == c->world - 1 ? part - 1 : part);
    }
    GPU_OK(c->ops->all_to_all(c, from, at, bytes, to, at, bytes, &ticket));
    GPU_OK(c->ops->wait(c, ticket));
    float *host = malloc((size_t)(part * c->world) * 4);
    GPU_OK(r->backend->ops->download(r->backend, host, to, (size_t)(part * c->world) * 4));
    int64_t wrong = 0;
    for (int p = 0; p < c->world; p++)
        for (int64_t i = 0; i < bytes[p] / 4; i++)
            wrong += host[p * part + i] != value_of(p, c->rank * part + i);
    gpu_checks_++;
    if (wrong > 0) {
        gpu_failures_++;
        printf("FAIL rank %d of %d, all_to_all: %lld wrong values\n", c->rank, c->world,
               (long long)wrong);
    }
    free(host);
    r->backend->ops->release(r->backend, from);
    r->backend->ops->release(r->backend, to);
}

static void check_all(const Rank *r) {
    check_sums(r, COMM_F32, "sums in fp32");
    check_sums(r, COMM_BF16, "sums in bf16");
    check_sums(r, COMM_F64, "sums in fp64");
    check_copies(r);
    check_all_to_all(r);
    GPU_OK(r->comm->ops->check(r->comm));
}

// Every rank of the group gives its rank of all: their sum says whose group it is.
static void check_members(const Rank *group, double value, double expected) {
    Communicator *c = group->comm;
    CommTicket ticket;
    void *device = NULL;
    GPU_OK(group->backend->ops->alloc(group->backend, sizeof value, &device));
    GPU_OK(group->backend->ops->upload(group->backend, device, &value, sizeof value));
    GPU_OK(c->ops->all_reduce(c, device, 1, COMM_F64, COMM_SUM, &ticket));
    GPU_OK(c->ops->wait(c, ticket));
    GPU_OK(group->backend->ops->download(group->backend, &value, device, sizeof value));
    group->backend->ops->release(group->backend, device);
    gpu_checks_++;
    if (value == expected) return;
    gpu_failures_++;
    printf("FAIL rank %d of a group of %d: sum %g, expected %g\n", c->rank, c->world, value,
           expected);
}

// Into all again (colors = 1) or by rank % 2, with the world's collectives in between.
static void check_split(const Rank *all, int colors) {
    const int rank = all->comm->rank, world = all->comm->world;
    Rank group = {.backend = all->backend};
    double sum = 0;
    GPU_OK(all->comm->ops->split(all->comm, rank % colors, &group.comm));
    for (int r = rank % colors; r < world; r += colors) sum += r;
    check_members(&group, rank, sum);
    check_all(&group);
    check_sums(all, COMM_F32, "sums beside a group");
    check_members(&group, rank, sum);
    communicator_destroy(group.comm);
    check_sums(all, COMM_F32, "sums after a group");
}

static int collectives(Meeting *meeting, int rank, int world) {
    Rank r = join(meeting, rank, world);
    check_all(&r);
    check_split(&r, 1);
    if (world > 1) check_split(&r, 2);
    leave(&r);
    return gpu_failures_ > 0;
}

// --- A lost rank -------------------------------------------------------------------------------

static void *abort_later(void *context) {
    Communicator *c = context;
    rest(2);
    c->ops->abort(c);
    return NULL;
}

// The last rank dies; the others wait for it on the device until they are told to give up.
static int lost_rank(Meeting *meeting, int rank, int world) {
    Rank r = join(meeting, rank, world);
    Communicator *c = r.comm;
    pthread_t thread;
    CommTicket ticket;
    void *values = make_values(&r, COMM_F32, COUNT);
    if (rank == world - 1) kill(getpid(), SIGKILL);
    pthread_create(&thread, NULL, abort_later, c);
    Status status = c->ops->all_reduce(c, values, COUNT, COMM_F32, COMM_SUM, &ticket);
    if (status == STATUS_OK) status = c->ops->wait(c, ticket);
    if (status == STATUS_OK) status = r.backend->ops->synchronize(r.backend);
    pthread_join(thread, NULL);
    if (status == STATUS_OK) status = c->ops->check(c);
    printf("%s rank %d of %d, a lost rank: %s\n", status == STATUS_COMMUNICATION ? "PASS" : "FAIL",
           rank, world, status_message());
    r.backend->ops->release(r.backend, values);
    leave(&r);
    return status != STATUS_COMMUNICATION;
}

// --- Processes ---------------------------------------------------------------------------------

// Runs the ranks; the last may be killed by itself where `loses_one`.
static void run_world(int world, bool loses_one, int (*body)(Meeting *, int, int)) {
    pid_t ranks[RANKS_MAX];
    Meeting *meeting =
        mmap(NULL, sizeof *meeting, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (int rank = 0; rank < world; rank++) {
        fflush(stdout);
        ranks[rank] = fork();
        if (ranks[rank] != 0) continue;
        alarm(3 * TIMEOUT_SECONDS); // a hang is a failure
        const int code = body(meeting, rank, world);
        fflush(stdout);
        _exit(code);
    }
    for (int rank = 0; rank < world; rank++) {
        int status = 0;
        waitpid(ranks[rank], &status, 0);
        const bool died = loses_one && rank == world - 1;
        const bool good = died ? WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL
                               : WIFEXITED(status) && WEXITSTATUS(status) == 0;
        gpu_checks_++;
        if (good) continue;
        gpu_failures_++;
        printf("FAIL rank %d of %d ended with status %#x\n", rank, world, (unsigned)status);
    }
    munmap(meeting, sizeof *meeting);
}

int main(void) {
    const int gpus = gpu_count();
    if (gpus == 0 || !communicator_nccl_built()) {
        printf("skipped: %s\n", gpus == 0 ? "no GPU" : "this build has no NCCL");
        return GPU_SKIP_CODE;
    }
    for (int world = 1; world <= gpus && world <= RANKS_MAX; world++)
        run_world(world, false, collectives);
    if (gpus > 1) run_world(2, true, lost_rank);
    return gpu_test_result("communicator");
}
