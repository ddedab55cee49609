// The recording Backend. Record i has the stamps 2i (before) and 2i + 1 (after); record 0 is the
// whole recording.
#include "train/profile_record.h"

#include <stdlib.h>
#include <string.h>

enum { ROW_NAME_MAX = 48 };

struct Profile {
    Backend base; // first, so that the Backend * is the Profile *
    Backend *inner;
    BackendOps ops; // the table below, less what the inner one has not got
    bool recording;
    uint8_t *records; // (capacity) the row of each call
    int64_t num_records, capacity;
    double total_ms;
    ProfileRow rows[ROW_COUNT];
    char names[ROW_COUNT][ROW_NAME_MAX];
    const ProfileRow *sorted[ROW_COUNT]; // those that were called, the longest first
    int num_sorted;
};

static Profile *profile_of(Backend *backend) {
    return (Profile *)backend;
}

// --- Recording -----------------------------------------------------------------------------------

static Status reserve(Profile *p, int64_t capacity) {
    if (capacity <= p->capacity) return STATUS_OK;
    uint8_t *records = realloc(p->records, (size_t)capacity * sizeof *records);
    if (!records)
        FAIL(STATUS_INTERNAL, "out of memory for %lld records of calls", (long long)capacity);
    p->records = records;
    p->capacity = capacity;
    return p->inner->ops->timestamp(p->inner, 2 * capacity - 1); // grows the backend's slots, too
}

Status profile_begin(Profile *p, int row) {
    p->inner->ops->range(p->inner, p->names[row]);
    if (!p->recording) return STATUS_OK;
    if (p->num_records == p->capacity) TRY(reserve(p, 2 * p->capacity));
    p->records[p->num_records] = (uint8_t)row;
    return p->inner->ops->timestamp(p->inner, 2 * p->num_records);
}

Status profile_end(Profile *p, int row, Status status, OpWork work) {
    p->inner->ops->range(p->inner, NULL);
    if (!p->recording || status != STATUS_OK) return status;
    p->rows[row].calls++;
    p->rows[row].work.flops += work.flops;
    p->rows[row].work.bytes += work.bytes;
    return p->inner->ops->timestamp(p->inner, 2 * p->num_records++ + 1);
}

Status profile_start(Profile *p, int64_t times) {
    int64_t first = 64; // enough for a first look
    TRY(reserve(p, 1 + (p->num_records > 0 ? p->num_records * times : first)));
    for (int i = 0; i < ROW_COUNT; i++) {
        p->rows[i].calls = 0;
        p->rows[i].work = (OpWork){0, 0};
        p->rows[i].ms = 0;
    }
    p->recording = true;
    p->num_records = 1;
    return p->inner->ops->timestamp(p->inner, 0);
}

static int by_falling_time(const void *a, const void *b) {
    const ProfileRow *x = *(const ProfileRow *const *)a, *y = *(const ProfileRow *const *)b;
    return (x->ms < y->ms) - (x->ms > y->ms);
}

Status profile_stop(Profile *p) {
    const BackendOps *ops = p->inner->ops;
    double ms;
    p->recording = false;
    TRY(ops->timestamp(p->inner, 1));
    TRY(ops->synchronize(p->inner));
    TRY(ops->elapsed_ms(p->inner, 0, 1, &p->total_ms));
    for (int64_t i = 1; i < p->num_records; i++) {
        TRY(ops->elapsed_ms(p->inner, 2 * i, 2 * i + 1, &ms));
        p->rows[p->records[i]].ms += ms;
    }
    p->num_sorted = 0;
    for (int i = 0; i < ROW_COUNT; i++)
        if (p->rows[i].calls > 0) p->sorted[p->num_sorted++] = &p->rows[i];
    qsort(p->sorted, (size_t)p->num_sorted, sizeof p->sorted[0], by_falling_time);
    return STATUS_OK;
}

int profile_rows(const Profile *p, const ProfileRow *const **rows) {
    *rows = p->sorted;
    return p->num_sorted;
}

double profile_total_ms(const Profile *p) {
    return p->total_ms;
}

// --- Ops -----------------------------------------------------------------------------------------

#define PROFILED(name, Args, op, pass)                                                             \
    static Status name(Backend *backend, const Args *args) {                                       \
        Profile *p = profile_of(backend);                                                          \
        int row = 2 * (op) + (pass);                                                               \
        TRY(profile_begin(p, row));                                                                \
        Status status = p->inner->ops->name(p->inner, args);                                       \
        return profile_end(p, row, status, op_work(p->inner, op, pass, args));                     \
    }
#define PROFILED_PAIR(name, Args, op)                                                              \
    PROFILED(name##_forward, Args, op, PASS_FORWARD)                                               \
    PROFILED(name##_backward, Args, op, PASS_BACKWARD)

PROFILED_PAIR(embed, EmbedArgs, OP_EMBED)
PROFILED_PAIR(rmsnorm, RmsNormArgs, OP_RMSNORM)
PROFILED_PAIR(linear, LinearArgs, OP_LINEAR)
PROFILED_PAIR(rope, RopeArgs, OP_ROPE)
PROFILED_PAIR(attention, AttentionArgs, OP_ATTENTION)
PROFILED_PAIR(ffn, FfnArgs, OP_FFN)
PROFILED_PAIR(route, RouteArgs, OP_ROUTE)
PROFILED_PAIR(moe_ffn, MoeFfnArgs, OP_MOE_FFN)
PROFILED(router_loss, RouterLossArgs, OP_ROUTER_LOSS, PASS_FORWARD)
PROFILED(linear_cross_entropy, LinearCrossEntropyArgs, OP_LINEAR_CROSS_ENTROPY, PASS_FORWARD)
PROFILED(adamw, AdamwArgs, OP_ADAMW, PASS_FORWARD)
PROFILED(row_similarity, RowSimilarityArgs, OP_ROW_SIMILARITY, PASS_FORWARD)
PROFILED(gather_rows, GatherRowsArgs, OP_GATHER_ROWS, PASS_FORWARD)
PROFILED(combine_rows, CombineRowsArgs, OP_COMBINE_ROWS, PASS_FORWARD)

static Status norm2(Backend *backend, DType dtype, const void *grad, int64_t count, double *sums) {
    Profile *p = profile_of(backend);
    int row = 2 * OP_NORM2;
    TRY(profile_begin(p, row));
    Status status = p->inner->ops->norm2(p->inner, dtype, grad, count, sums);
    return profile_end(p, row, status, op_work_norm2(dtype, count));
}

// --- Memory --------------------------------------------------------------------------------------

static Status upload(Backend *backend, void *device, const void *host, size_t bytes) {
    Profile *p = profile_of(backend);
    TRY(profile_begin(p, ROW_UPLOAD));
    Status status = p->inner->ops->upload(p->inner, device, host, bytes);
    return profile_end(p, ROW_UPLOAD, status, (OpWork){0, (double)bytes});
}

static Status download(Backend *backend, void *host, const void *device, size_t bytes) {
    Profile *p = profile_of(backend);
    TRY(profile_begin(p, ROW_DOWNLOAD));
    Status status = p->inner->ops->download(p->inner, host, device, bytes);
    return profile_end(p, ROW_DOWNLOAD, status, (OpWork){0, (double)bytes});
}

static Status copy(Backend *backend, void *to, const void *from, size_t bytes) {
    Profile *p = profile_of(backend);
    TRY(profile_begin(p, ROW_COPY));
    Status status = p->inner->ops->copy(p->inner, to, from, bytes);
    return profile_end(p, ROW_COPY, status, (OpWork){0, 2 * (double)bytes});
}

static Status zero(Backend *backend, void *device, size_t bytes) {
    Profile *p = profile_of(backend);
    TRY(profile_begin(p, ROW_ZERO));
    Status status = p->inner->ops->zero(p->inner, device, bytes);
    return profile_end(p, ROW_ZERO, status, (OpWork){0, (double)bytes});
}

static Status add(Backend *backend, void *a, const void *b, int64_t count) {
    Profile *p = profile_of(backend);
    TRY(profile_begin(p, ROW_ADD));
    Status status = p->inner->ops->add(p->inner, a, b, count);
    return profile_end(p, ROW_ADD, status, op_work_add(p->inner->compute_dtype, count));
}

static Status accumulate(Backend *backend, float *sum, DType dtype, const void *values,
                         int64_t count) {
    Profile *p = profile_of(backend);
    TRY(profile_begin(p, ROW_ADD));
    Status status = p->inner->ops->accumulate(p->inner, sum, dtype, values, count);
    return profile_end(p, ROW_ADD, status, op_work_add(DTYPE_F32, count));
}

static Status cast(Backend *backend, DType to, void *out, DType from, const void *in,
                   int64_t count) {
    Profile *p = profile_of(backend);
    TRY(profile_begin(p, ROW_CAST));
    Status status = p->inner->ops->cast(p->inner, to, out, from, in, count);
    return profile_end(p, ROW_CAST, status, op_work_cast(to, from, count));
}

// --- What takes no time on the stream ------------------------------------------------------------

static Status alloc(Backend *backend, size_t bytes, void **out) {
    Backend *inner = profile_of(backend)->inner;
    return inner->ops->alloc(inner, bytes, out);
}

static void release(Backend *backend, void *pointer) {
    Backend *inner = profile_of(backend)->inner;
    inner->ops->release(inner, pointer);
}

static Status host_alloc(Backend *backend, size_t bytes, void **out) {
    Backend *inner = profile_of(backend)->inner;
    return inner->ops->host_alloc(inner, bytes, out);
}

static void host_release(Backend *backend, void *pointer) {
    Backend *inner = profile_of(backend)->inner;
    inner->ops->host_release(inner, pointer);
}

static Status synchronize(Backend *backend) {
    Backend *inner = profile_of(backend)->inner;
    return inner->ops->synchronize(inner);
}

static Status memory(Backend *backend, uint64_t *free_bytes, uint64_t *total_bytes) {
    Backend *inner = profile_of(backend)->inner;
    return inner->ops->memory(inner, free_bytes, total_bytes);
}

static Status timestamp(Backend *backend, int64_t slot) {
    Backend *inner = profile_of(backend)->inner;
    return inner->ops->timestamp(inner, slot);
}

static Status elapsed_ms(Backend *backend, int64_t from, int64_t to, double *ms) {
    Backend *inner = profile_of(backend)->inner;
    return inner->ops->elapsed_ms(inner, from, to, ms);
}

static void range(Backend *backend, const char *name) {
    Backend *inner = profile_of(backend)->inner;
    inner->ops->range(inner, name);
}

static size_t workspace_bytes(Backend *backend, OpKind op, const void *args) {
    Backend *inner = profile_of(backend)->inner;
    return inner->ops->workspace_bytes(inner, op, args);
}

static void set_workspace(Backend *backend, void *device, size_t bytes) {
    Backend *inner = profile_of(backend)->inner;
    inner->ops->set_workspace(inner, device, bytes);
}

static void destroy(Backend *backend) {
    Profile *p = profile_of(backend);
    free(p->records);
    free(p);
}

static const BackendOps profile_ops = {
    .alloc = alloc,
    .release = release,
    .host_alloc = host_alloc,
    .host_release = host_release,
    .upload = upload,
    .download = download,
    .copy = copy,
    .zero = zero,
    .synchronize = synchronize,
    .memory = memory,
    .timestamp = timestamp,
    .elapsed_ms = elapsed_ms,
    .range = range,
    .workspace_bytes = workspace_bytes,
    .set_workspace = set_workspace,
    .embed_forward = embed_forward,
    .embed_backward = embed_backward,
    .rmsnorm_forward = rmsnorm_forward,
    .rmsnorm_backward = rmsnorm_backward,
    .linear_forward = linear_forward,
    .linear_backward = linear_backward,
    .rope_forward = rope_forward,
    .rope_backward = rope_backward,
    .attention_forward = attention_forward,
    .attention_backward = attention_backward,
    .ffn_forward = ffn_forward,
    .ffn_backward = ffn_backward,
    .route_forward = route_forward,
    .route_backward = route_backward,
    .router_loss = router_loss,
    .moe_ffn_forward = moe_ffn_forward,
    .moe_ffn_backward = moe_ffn_backward,
    .linear_cross_entropy = linear_cross_entropy,
    .adamw = adamw,
    .norm2 = norm2,
    .row_similarity = row_similarity,
    .gather_rows = gather_rows,
    .combine_rows = combine_rows,
    .accumulate = accumulate,
    .add = add,
    .cast = cast,
    .destroy = destroy,
};

// --- Creation ------------------------------------------------------------------------------------

static void name_rows(Profile *p) {
    static const char *const memory_names[] = {
        "zero",           "copy",       "upload",     "download",   "add",           "cast",
        "reduce_scatter", "all_gather", "all_reduce", "all_to_all", "wait for ranks"};
    for (int i = 0; i < ROW_COUNT; i++) {
        OpKind op = (OpKind)(i / 2);
        bool memory_row = i >= ROW_ZERO;
        const char *name = memory_row ? memory_names[i - ROW_ZERO] : op_name(op);
        const char *pass = memory_row || !op_has_backward(op) ? ""
                           : i % 2 == PASS_FORWARD            ? " forward"
                                                              : " backward";
        snprintf(p->names[i], ROW_NAME_MAX, "%s%s", name, pass);
        p->rows[i] = (ProfileRow){.name = p->names[i],
                                  .product = !memory_row && op_is_product(op),
                                  .host = i == ROW_UPLOAD || i == ROW_DOWNLOAD,
                                  .ranks = i >= ROW_REDUCE_SCATTER};
    }
}

Status profile_create(Backend *inner, Profile **out) {
    Profile *p = calloc(1, sizeof *p);
    if (!p) FAIL(STATUS_INTERNAL, "out of memory for the profile");
    p->base = *inner; // what it says of itself
    p->ops = profile_ops;
    if (!inner->ops->accumulate) p->ops.accumulate = NULL;
    p->base.ops = &p->ops;
    p->base.can_capture = false; // ops that are launched as one cannot be timed one by one
    p->inner = inner;
    name_rows(p);
    *out = p;
    return STATUS_OK;
}

void profile_destroy(Profile *profile) {
    if (profile) destroy(&profile->base);
}

Backend *profile_backend(Profile *profile) {
    return &profile->base;
}
