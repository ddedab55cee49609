// The collectives of model/communicator.h over NCCL.
//
// The communicator has a stream of its own. A collective waits there for what the compute stream
// had queued when it was called, and leaves an event behind; waiting for a ticket makes the compute
// stream wait for that event, and the host for nothing. Collectives run in order, so the event of a
// later one stands for an earlier one whose own has been used again.
//
// NCCL's calls do not block (Config.blocking = 0): whether one has been queued, or a peer is gone,
// is asked for until it is answered or the time is up. NCCL sums in an order of its own, which is
// the same in every run with the same ranks on the same machines, and rounds bf16 at each addition.
// A kernel that waits for a peer that died is ended by abort(), which the watchdog calls as soon as
// the connection with that peer closes (NCCL itself notices nothing over NVLink); the host, which
// waits for the stream, then goes on and learns of it from check() or the next collective.
// Aborting frees NCCL's communicator, so a mutex is held around each of NCCL's calls, all short.
//
// Communicators split from one another share that mutex, their peers, and their end: the one that
// was split from no other, the root, has a list of all, and abort ends all together, since freeing
// one waits for the device, which waits for the others' kernels. Their streams are independent. A
// GPU has room for the few blocks of each one's kernels, and the ranks that two communicators have
// in common start theirs in the same order, so that none keeps another out for ever.
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "cuda/cuda.h"

extern "C" {
#include "base/net_peers.h"
#include "cuda/backend.h"
}

#ifdef D2M_HAVE_NCCL
#include <nccl.h>

static_assert(NCCL_UNIQUE_ID_BYTES == CUDA_COMMUNICATOR_ID_BYTES, "the id's size in backend.h");

enum { WAITS = 512, EVENTS = 64, WHERE_MAX = 160 };
// A collective is queued in some microseconds, and the shortest sleep takes 70: while a step waits
// for the host, between the parts of the optimizer, that is time lost.
static const double SPIN_SECONDS = 1e-3, POLL_SECONDS = 20e-6;

// How long the compute stream stood still in its waits: pairs of events around each, read when the
// device has passed them.
typedef struct WaitTimes {
    cudaEvent_t begin[WAITS], end[WAITS];
    int64_t noted, read; // waits; number n is at n % WAITS
} WaitTimes;

typedef struct NcclCommunicator {
    Communicator base;
    CudaBackend *backend;
    ncclComm_t comm; // under the root's mutex; NULL before it is made and after it is gone
    cudaStream_t stream;
    cudaEvent_t before, done[EVENTS]; // done: of ticket t at t % EVENTS
    WaitTimes waits;
    CommTicket ticket;             // of the last collective
    const char *name;              // likewise
    struct NcclCommunicator *root; // itself, or what this came of by splits
    struct NcclCommunicator *next; // of the family, the oldest first; under the root's mutex
    // For the whole family, in the root only:
    pthread_mutex_t mutex;
    CommTicket newest; // the last collective's ticket and name; also read by the watchdog's thread
    const char *newest_name;
    NetPeers *peers; // NULL: nobody tells of a lost one
    bool aborted;    // under the mutex
    bool failed;
} NcclCommunicator;

static NcclCommunicator *nccl_of(Communicator *communicator) {
    return (NcclCommunicator *)communicator;
}

static double now_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// --- Errors --------------------------------------------------------------------------------------

// "rank 3 of 8, collective 12 (all_to_all) in a group of 4", by the root's ranks.
static const char *where(const NcclCommunicator *c, char text[WHERE_MAX]) {
    char group[48] = "";
    if (c != c->root) snprintf(group, sizeof group, " in a group of %d", c->base.world);
    snprintf(text, WHERE_MAX, "rank %d of %d, collective %lld (%s)%s", c->root->base.rank,
             c->root->base.world, (long long)c->ticket, c->name, group);
    return text;
}

// STATUS_COMMUNICATION naming rank, collective and what NCCL says.
static Status fail(NcclCommunicator *c, ncclResult_t error) {
    char here[WHERE_MAX];
    c->root->failed = true;
    FAIL(STATUS_COMMUNICATION, "%s: NCCL: %s; %s", where(c, here), ncclGetErrorString(error),
         ncclGetLastError(NULL));
}

static Status check_peers(NcclCommunicator *c) {
    char here[WHERE_MAX];
    const char *lost = net_peers_lost(c->root->peers);
    if (!lost) return STATUS_OK;
    c->root->failed = true;
    FAIL(STATUS_COMMUNICATION, "%s: %s is lost: its connection is closed", where(c, here), lost);
}

// Takes the mutex; gives it back where it fails, since nothing can be asked of NCCL any more.
static Status lock(NcclCommunicator *c) {
    NcclCommunicator *root = c->root;
    char here[WHERE_MAX];
    pthread_mutex_lock(&root->mutex);
    if (!root->aborted && !root->failed) return STATUS_OK;
    const bool aborted = root->aborted;
    pthread_mutex_unlock(&root->mutex);
    root->failed = true;
    TRY(check_peers(c));
    FAIL(STATUS_COMMUNICATION, "%s: communication %s in it or before it", where(c, here),
         aborted ? "was aborted" : "has failed");
}
static void unlock(NcclCommunicator *c) {
    pthread_mutex_unlock(&c->root->mutex);
}

// What NCCL is at: ncclSuccess, ncclInProgress or what went wrong.
static Status ask_state(NcclCommunicator *c, ncclResult_t *state) {
    TRY(lock(c));
    const ncclResult_t asked = ncclCommGetAsyncError(c->comm, state);
    unlock(c);
    if (asked != ncclSuccess) *state = asked;
    return STATUS_OK;
}

// Until what was asked of NCCL is queued: `result` is what the call returned.
static Status finish(NcclCommunicator *c, ncclResult_t result) {
    char here[WHERE_MAX];
    const double start = now_seconds(), deadline = start + c->base.timeout_seconds;
    const struct timespec pause = {0, (long)(POLL_SECONDS * 1e9)};
    while (result == ncclInProgress || result == ncclSuccess) {
        TRY(ask_state(c, &result));
        if (result == ncclSuccess) return STATUS_OK;
        if (result == ncclInProgress && now_seconds() < start + SPIN_SECONDS) continue;
        TRY(check_peers(c));
        if (result == ncclInProgress && now_seconds() > deadline) {
            c->root->failed = true;
            FAIL(STATUS_COMMUNICATION,
                 "%s: NCCL is not ready after %.0f s; a rank is missing or cannot be reached "
                 "(docs/cluster.md has what to look at)",
                 where(c, here), c->base.timeout_seconds);
        }
        if (result == ncclInProgress) nanosleep(&pause, NULL);
    }
    return fail(c, result);
}

// --- One collective ------------------------------------------------------------------------------

// Between begin and end is one call of NCCL, under the mutex.
static Status begin(NcclCommunicator *c, const char *name) {
    c->name = name;
    c->ticket++;
    __atomic_store_n(&c->root->newest_name, name, __ATOMIC_RELAXED);
    __atomic_store_n(&c->root->newest, c->ticket, __ATOMIC_RELEASE);
    c->backend->current_op = name;
    CUDA_TRY(c->backend, cudaEventRecord(c->before, c->backend->stream));
    CUDA_TRY(c->backend, cudaStreamWaitEvent(c->stream, c->before, 0));
    return lock(c);
}

static Status end(NcclCommunicator *c, ncclResult_t result, CommTicket *ticket) {
    unlock(c);
    TRY(finish(c, result));
    CUDA_TRY(c->backend, cudaEventRecord(c->done[c->ticket % EVENTS], c->stream));
    *ticket = c->ticket;
    return STATUS_OK;
}

static ncclDataType_t nccl_type(CommType type) {
    switch (type) {
    case COMM_F32:
        return ncclFloat32;
    case COMM_BF16:
        return ncclBfloat16;
    case COMM_F64:
        return ncclFloat64;
    case COMM_I64:
        return ncclInt64;
    case COMM_BYTE:
        break;
    }
    return ncclUint8;
}
static size_t type_bytes(CommType type) {
    return type == COMM_F32 ? 4 : type == COMM_BF16 ? 2 : type == COMM_BYTE ? 1 : 8;
}
static ncclRedOp_t nccl_op(CommReduce op) {
    return op == COMM_SUM ? ncclSum : op == COMM_MIN ? ncclMin : ncclMax;
}

static Status all_reduce(Communicator *base, void *values, int64_t count, CommType type,
                         CommReduce op, CommTicket *ticket) {
    NcclCommunicator *c = nccl_of(base);
    TRY(begin(c, "all_reduce"));
    return end(c,
               ncclAllReduce(values, values, (size_t)count, nccl_type(type), nccl_op(op), c->comm,
                             c->stream),
               ticket);
}

static Status reduce_scatter(Communicator *base, void *values, int64_t part, CommType type,
                             CommTicket *ticket) {
    NcclCommunicator *c = nccl_of(base);
    char *own = (char *)values + (size_t)(base->rank * part) * type_bytes(type);
    TRY(begin(c, "reduce_scatter"));
    return end(
        c,
        ncclReduceScatter(values, own, (size_t)part, nccl_type(type), ncclSum, c->comm, c->stream),
        ticket);
}

static Status all_gather(Communicator *base, void *values, int64_t part, CommType type,
                         CommTicket *ticket) {
    NcclCommunicator *c = nccl_of(base);
    const char *own = (const char *)values + (size_t)(base->rank * part) * type_bytes(type);
    TRY(begin(c, "all_gather"));
    return end(c, ncclAllGather(own, values, (size_t)part, nccl_type(type), c->comm, c->stream),
               ticket);
}

static Status broadcast(Communicator *base, void *values, int64_t count, CommType type, int root,
                        CommTicket *ticket) {
    NcclCommunicator *c = nccl_of(base);
    TRY(begin(c, "broadcast"));
    return end(
        c, ncclBroadcast(values, values, (size_t)count, nccl_type(type), root, c->comm, c->stream),
        ticket);
}

static ncclResult_t queue_pairs(NcclCommunicator *c, const void *send, const int64_t *send_at,
                                const int64_t *send_bytes, void *recv, const int64_t *recv_at,
                                const int64_t *recv_bytes) {
    ncclResult_t first = ncclGroupStart();
    for (int r = 0; r < c->base.world && (first == ncclSuccess || first == ncclInProgress); r++) {
        if (send_bytes[r] > 0)
            first = ncclSend((const char *)send + send_at[r], (size_t)send_bytes[r], ncclUint8, r,
                             c->comm, c->stream);
        if (recv_bytes[r] > 0 && (first == ncclSuccess || first == ncclInProgress))
            first = ncclRecv((char *)recv + recv_at[r], (size_t)recv_bytes[r], ncclUint8, r,
                             c->comm, c->stream);
    }
    const ncclResult_t last = ncclGroupEnd(); // also where a call has failed
    return first == ncclSuccess || first == ncclInProgress ? last : first;
}

static Status all_to_all(Communicator *base, const void *send, const int64_t *send_at,
                         const int64_t *send_bytes, void *recv, const int64_t *recv_at,
                         const int64_t *recv_bytes, CommTicket *ticket) {
    NcclCommunicator *c = nccl_of(base);
    TRY(begin(c, "all_to_all"));
    return end(c, queue_pairs(c, send, send_at, send_bytes, recv, recv_at, recv_bytes), ticket);
}

// --- Waiting, failing, ending --------------------------------------------------------------------

static Status check(Communicator *base) {
    NcclCommunicator *c = nccl_of(base);
    ncclResult_t state = ncclSuccess;
    TRY(ask_state(c, &state));
    return state == ncclSuccess || state == ncclInProgress ? STATUS_OK : fail(c, state);
}

// Adds up the waits that the device is through with.
static Status read_waits(NcclCommunicator *c) {
    WaitTimes *w = &c->waits;
    for (; w->read < w->noted; w->read++) {
        const int i = (int)(w->read % WAITS);
        const cudaError_t state = cudaEventQuery(w->end[i]);
        float ms = 0;
        if (state == cudaErrorNotReady) {
            (void)cudaGetLastError(); // no failure
            return STATUS_OK;
        }
        CUDA_TRY(c->backend, state);
        CUDA_TRY(c->backend, cudaEventElapsedTime(&ms, w->begin[i], w->end[i]));
        c->base.waited_seconds += 1e-3 * ms;
        if (c != c->root) c->root->base.waited_seconds += 1e-3 * ms;
    }
    return STATUS_OK;
}

// A wait is not timed when the device is WAITS of them behind.
static Status timed_wait(NcclCommunicator *c, cudaEvent_t event) {
    WaitTimes *w = &c->waits;
    TRY(read_waits(c));
    const bool timed = w->noted - w->read < WAITS;
    const int i = (int)(w->noted % WAITS);
    if (timed) CUDA_TRY(c->backend, cudaEventRecord(w->begin[i], c->backend->stream));
    CUDA_TRY(c->backend, cudaStreamWaitEvent(c->backend->stream, event, 0));
    if (!timed) return STATUS_OK;
    CUDA_TRY(c->backend, cudaEventRecord(w->end[i], c->backend->stream));
    w->noted++;
    return STATUS_OK;
}

static Status wait(Communicator *base, CommTicket ticket) {
    NcclCommunicator *c = nccl_of(base);
    TRY(check(base));
    INVARIANT(ticket <= c->ticket);
    if (ticket <= 0) return STATUS_OK;
    if (c->ticket - ticket >= EVENTS) ticket = c->ticket - EVENTS + 1;
    return timed_wait(c, c->done[ticket % EVENTS]);
}

// As one group of NCCL's calls: all kernels are told to end before anything is freed. A split that
// is under way ends with its parent, which comes before it in the list, and has its `comm` then.
static void abort_all(Communicator *base) {
    NcclCommunicator *root = nccl_of(base)->root;
    pthread_mutex_lock(&root->mutex);
    if (!root->aborted) {
        root->aborted = true;
        ncclGroupStart();
        for (NcclCommunicator *c = root; c; c = c->next)
            if (c->comm) ncclCommAbort(c->comm);
        ncclGroupEnd();
        for (NcclCommunicator *c = root; c; c = c->next) c->comm = NULL;
    }
    pthread_mutex_unlock(&root->mutex);
}

static const char *lost(Communicator *base) {
    return net_peers_lost(nccl_of(base)->root->peers);
}

static const char *last(Communicator *base, CommTicket *ticket) {
    NcclCommunicator *root = nccl_of(base)->root;
    *ticket = __atomic_load_n(&root->newest, __ATOMIC_ACQUIRE);
    return __atomic_load_n(&root->newest_name, __ATOMIC_RELAXED);
}

static bool is_well(NcclCommunicator *c) {
    pthread_mutex_lock(&c->root->mutex);
    const bool well = c->comm && !c->root->aborted && !c->root->failed;
    pthread_mutex_unlock(&c->root->mutex);
    return well;
}

static Status finalize(NcclCommunicator *c) {
    TRY(lock(c));
    const ncclResult_t result = ncclCommFinalize(c->comm);
    unlock(c);
    TRY(finish(c, result));
    TRY(lock(c));
    ncclCommDestroy(c->comm);
    c->comm = NULL;
    unlock(c);
    return STATUS_OK;
}

// In good order only where nothing has failed: peers may be gone. Then it leaves the family's list.
static void disconnect(NcclCommunicator *c) {
    if (!is_well(c) || finalize(c) != STATUS_OK) abort_all(&c->base);
    pthread_mutex_lock(&c->root->mutex);
    for (NcclCommunicator *at = c->root; at; at = at->next)
        if (at->next == c) at->next = c->next;
    pthread_mutex_unlock(&c->root->mutex);
}

static void destroy(Communicator *base) {
    NcclCommunicator *c = nccl_of(base);
    disconnect(c);
    for (cudaEvent_t event : c->done)
        if (event) cudaEventDestroy(event);
    for (int i = 0; i < WAITS; i++) {
        if (c->waits.begin[i]) cudaEventDestroy(c->waits.begin[i]);
        if (c->waits.end[i]) cudaEventDestroy(c->waits.end[i]);
    }
    if (c->before) cudaEventDestroy(c->before);
    if (c->stream) cudaStreamDestroy(c->stream);
    if (c == c->root) {
        net_peers_close(c->peers, !c->failed && !c->aborted);
        pthread_mutex_destroy(&c->mutex);
    }
    free(c);
}

static Status split(Communicator *base, int color, Communicator **out);

static const CommunicatorOps ops = {
    .all_reduce = all_reduce,
    .reduce_scatter = reduce_scatter,
    .all_gather = all_gather,
    .broadcast = broadcast,
    .all_to_all = all_to_all,
    .wait = wait,
    .check = check,
    .split = split,
    .abort = abort_all,
    .lost = lost,
    .last = last,
    .destroy = destroy,
};

// --- Making one ----------------------------------------------------------------------------------

Status communicator_nccl_id(unsigned char id[CUDA_COMMUNICATOR_ID_BYTES]) {
    ncclUniqueId made;
    const ncclResult_t error = ncclGetUniqueId(&made);
    if (error != ncclSuccess)
        FAIL(STATUS_COMMUNICATION, "NCCL cannot make an id: %s; %s", ncclGetErrorString(error),
             ncclGetLastError(NULL));
    memcpy(id, made.internal, CUDA_COMMUNICATOR_ID_BYTES);
    return STATUS_OK;
}

// Above the compute stream, so that what others wait for is not behind this rank's own work.
static Status make_stream(NcclCommunicator *c) {
    int least, greatest;
    CUDA_TRY(c->backend, cudaSetDevice(c->backend->device));
    CUDA_TRY(c->backend, cudaDeviceGetStreamPriorityRange(&least, &greatest));
    CUDA_TRY(c->backend, cudaStreamCreateWithPriority(&c->stream, cudaStreamNonBlocking, greatest));
    CUDA_TRY(c->backend, cudaEventCreateWithFlags(&c->before, cudaEventDisableTiming));
    for (cudaEvent_t &event : c->done)
        CUDA_TRY(c->backend, cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    for (int i = 0; i < WAITS; i++) {
        CUDA_TRY(c->backend, cudaEventCreate(&c->waits.begin[i]));
        CUDA_TRY(c->backend, cudaEventCreate(&c->waits.end[i]));
    }
    return STATUS_OK;
}

static Status connect(NcclCommunicator *c, const unsigned char *id) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    ncclUniqueId unique;
    config.blocking = 0;
    memcpy(unique.internal, id, CUDA_COMMUNICATOR_ID_BYTES);
    const ncclResult_t result =
        ncclCommInitRankConfig(&c->comm, c->base.world, unique, c->base.rank, &config);
    if (!c->comm) return fail(c, result);
    return finish(c, result);
}

// Sockets are the caller's again where this fails.
static Status start(NcclCommunicator *c, const unsigned char *id, const CommunicatorLinks *links) {
    TRY(make_stream(c));
    if (links->sockets) TRY(net_peers_open(links->world, links->sockets, links->names, &c->peers));
    return connect(c, id);
}

Status communicator_nccl(Backend *backend, const unsigned char id[CUDA_COMMUNICATOR_ID_BYTES],
                         const CommunicatorLinks *links, const CommunicatorOptions *options,
                         Communicator **out) {
    *out = NULL;
    if (options->tree)
        FAIL(STATUS_USAGE, "sums in pairs of ranks are the CPU's: NCCL has an order of its own; "
                           "set parallel.pairwise = false");
    NcclCommunicator *c = (NcclCommunicator *)calloc(1, sizeof *c);
    if (!c) FAIL(STATUS_INTERNAL, "out of memory for the communicator");
    c->base.ops = &ops;
    c->base.rank = links->rank;
    c->base.world = links->world;
    c->base.timeout_seconds = options->timeout_seconds;
    c->backend = cuda_of(backend);
    c->name = c->newest_name = "none";
    c->root = c;
    pthread_mutex_init(&c->mutex, NULL);
    const Status status = start(c, id, links);
    if (status != STATUS_OK) {
        c->failed = true;
        net_peers_give_back(c->peers);
        c->peers = NULL;
        destroy(&c->base);
        return status;
    }
    *out = &c->base;
    return STATUS_OK;
}

// NCCL names the child only when the parent is ready again, and then makes it ready.
static Status connect_child(NcclCommunicator *parent, NcclCommunicator *c, int color) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    NcclCommunicator *newest = c->root;
    CommTicket ticket;
    config.blocking = 0;
    TRY(make_stream(c));
    TRY(begin(parent, "split"));
    while (newest->next) newest = newest->next;
    newest->next = c; // an abort ends it, too, from here on
    TRY(end(parent, ncclCommSplit(parent->comm, color, parent->base.rank, &c->comm, &config),
            &ticket));
    if (!c->comm) return fail(parent, ncclInternalError);
    TRY(finish(c, ncclInProgress));
    TRY(lock(c));
    ncclResult_t result = ncclCommCount(c->comm, &c->base.world);
    if (result == ncclSuccess) result = ncclCommUserRank(c->comm, &c->base.rank);
    unlock(c);
    return result == ncclSuccess ? STATUS_OK : fail(c, result);
}

static Status split(Communicator *base, int color, Communicator **out) {
    NcclCommunicator *parent = nccl_of(base);
    *out = NULL;
    INVARIANT(color >= 0);
    NcclCommunicator *c = (NcclCommunicator *)calloc(1, sizeof *c);
    if (!c) FAIL(STATUS_INTERNAL, "out of memory for the communicator");
    c->base = *base; // the settings; rank and world until they are known
    c->base.waited_seconds = 0;
    c->backend = parent->backend;
    c->name = "none";
    c->root = parent->root;
    const Status status = connect_child(parent, c, color);
    if (status != STATUS_OK) {
        c->root->failed = true; // NCCL may still be at it, and is stopped by an abort of all
        destroy(&c->base);
        return status;
    }
    *out = &c->base;
    return STATUS_OK;
}

bool communicator_nccl_built(void) {
    return true;
}

#else // no NCCL where this was built

static Status no_nccl(void) {
    FAIL(STATUS_USAGE, "this build has no NCCL, which several GPUs need: install it (libnccl-dev) "
                       "and build again, or train on one GPU");
}
Status communicator_nccl_id(unsigned char *) {
    return no_nccl();
}
Status communicator_nccl(Backend *, const unsigned char *, const CommunicatorLinks *,
                         const CommunicatorOptions *, Communicator **out) {
    *out = NULL;
    return no_nccl();
}
bool communicator_nccl_built(void) {
    return false;
}

#endif
