// Collectives of buckets, started and waited for by the model's progress (traffic.h).
//
// Tickets grow with each collective and a wait covers all that were started before, so the order of
// starting is the order of waiting: gradients leave in the order of the backward pass, weights come
// in the order of the forward pass.
#include "optim/traffic.h"

#include <stdlib.h>

// What a bucket's elements are: gradients and working copy have a body of one dtype each and an
// fp32 tail.
static CommType type_of(const Traffic *traffic, int bucket, DType body) {
    const Bucket *b = &traffic->partition.buckets[bucket];
    bool tail = b->begin >= traffic->model->table.router_begin;
    return tail || body == DTYPE_F32 ? COMM_F32 : COMM_BF16;
}

static Communicator *communicator_of(const Traffic *traffic, int bucket) {
    return traffic->partition.buckets[bucket].experts ? traffic->replicas : traffic->communicator;
}

static void remember(Traffic *traffic, int bucket, CommTicket ticket) {
    if (traffic->partition.buckets[bucket].experts)
        traffic->last_replicas = ticket;
    else
        traffic->last = ticket;
}

static char *gradients(const Traffic *traffic, int bucket) {
    const Model *model = traffic->model;
    return (char *)model->grads +
           model_gradient_bytes(model, traffic->partition.buckets[bucket].begin);
}

static Status start_reduce(Traffic *traffic, int bucket) {
    Communicator *comm = communicator_of(traffic, bucket);
    TRY(comm->ops->reduce_scatter(
        comm, gradients(traffic, bucket), traffic->partition.buckets[bucket].part,
        type_of(traffic, bucket, traffic->model->backend->grad_dtype), &traffic->sent[bucket]));
    remember(traffic, bucket, traffic->sent[bucket]);
    return STATUS_OK;
}

// Starts every bucket that is complete once the matrices are from element `from` on.
static Status reduce_from(Traffic *traffic, int64_t from) {
    const Partition *partition = &traffic->partition;
    while (traffic->reduced < partition->count) {
        int bucket = partition_order(partition, traffic->reduced);
        if (!partition_is_final(partition, bucket, from)) break;
        TRY(start_reduce(traffic, bucket));
        traffic->reduced++;
    }
    return STATUS_OK;
}

// What this rank owns of a bucket that has been summed over ranks joins the sums of the step.
static Status collect(Traffic *traffic, int bucket) {
    Communicator *comm = traffic->communicator;
    Backend *backend = traffic->model->backend;
    const Partition *partition = &traffic->partition;
    const Bucket *b = &partition->buckets[bucket];
    const DType dtype =
        type_of(traffic, bucket, backend->grad_dtype) == COMM_F32 ? DTYPE_F32 : backend->grad_dtype;
    const char *own =
        gradients(traffic, bucket) + (size_t)(partition->rank * b->part) * dtype_bytes(dtype);
    TRY(comm->ops->wait(comm, traffic->sent[bucket]));
    if (traffic->first)
        return backend->ops->cast(backend, DTYPE_F32, traffic->sums + b->state, dtype, own,
                                  b->part);
    return backend->ops->accumulate(backend, traffic->sums + b->state, dtype, own, b->part);
}

// Every bucket that has been sent and begins at element `from` or later.
static Status collect_from(Traffic *traffic, int64_t from) {
    const Partition *partition = &traffic->partition;
    while (traffic->collected < traffic->reduced) {
        int bucket = partition_order(partition, traffic->collected);
        if (partition->buckets[bucket].begin < from) break;
        TRY(collect(traffic, bucket));
        traffic->collected++;
    }
    return STATUS_OK;
}

static Status on_reuse(void *context, int64_t from) {
    return collect_from(context, from);
}

static Status on_gradients(void *context, int64_t from) {
    return reduce_from(context, from);
}

static Status wait_bucket(Traffic *traffic, int bucket) {
    Communicator *comm = communicator_of(traffic, bucket);
    if (traffic->gathered[bucket] < 0) return STATUS_OK;
    TRY(comm->ops->wait(comm, traffic->gathered[bucket]));
    traffic->gathered[bucket] = -1;
    return STATUS_OK;
}

// The buckets of vectors and routers, and those of matrices that begin before `end`.
static Status on_weights(void *context, int64_t end) {
    Traffic *traffic = context;
    const Partition *partition = &traffic->partition;
    for (int n = partition->count - 1; n >= 0; n--) {
        int bucket = partition_order(partition, n);
        if (bucket < partition->vectors && partition->buckets[bucket].begin >= end)
            return STATUS_OK;
        TRY(wait_bucket(traffic, bucket));
    }
    return STATUS_OK;
}

const ModelHooks *traffic_hooks(Traffic *traffic, bool first, bool last) {
    bool shared = traffic->sums != NULL, sends = last || shared;
    if (first) traffic->first = true;
    traffic->hooks = (ModelHooks){.context = traffic,
                                  .weights_needed = first ? on_weights : NULL,
                                  .gradients_final = sends ? on_gradients : NULL,
                                  .gradients_reused = shared ? on_reuse : NULL};
    return first || sends ? &traffic->hooks : NULL;
}

Status traffic_reduce(Traffic *traffic) {
    Communicator *comm = traffic->communicator, *replicas = traffic->replicas;
    TRY(reduce_from(traffic, 0));
    if (traffic->sums)
        TRY(collect_from(traffic, 0));
    else
        TRY(comm->ops->wait(comm, traffic->last));
    if (replicas) TRY(replicas->ops->wait(replicas, traffic->last_replicas));
    traffic->reduced = traffic->collected = 0;
    traffic->first = false;
    return STATUS_OK;
}

Status traffic_gather(Traffic *traffic, int bucket) {
    Communicator *comm = communicator_of(traffic, bucket);
    DType dtype = traffic->model->backend->compute_dtype;
    const int64_t begin = traffic->partition.buckets[bucket].begin;
    char *weights = (char *)traffic->model->params +
                    tensor_table_copy_bytes(&traffic->model->table, dtype, begin);
    TRY(comm->ops->all_gather(comm, weights, traffic->partition.buckets[bucket].part,
                              type_of(traffic, bucket, dtype), &traffic->gathered[bucket]));
    remember(traffic, bucket, traffic->gathered[bucket]);
    return STATUS_OK;
}

Status traffic_settle(Traffic *traffic) {
    return on_weights(traffic, INT64_MAX);
}

Status traffic_plan(const TensorTable *table, const ModelOptions *options, MemoryPlan *plan) {
    if (!options->share_gradients) return STATUS_OK;
    return memory_plan_add(plan, "gradient sums",
                           (uint64_t)partition_owned(table, options->ranks) * sizeof(float));
}

static Status allocate(Traffic *traffic) {
    Backend *backend = traffic->model->backend;
    const size_t count = (size_t)traffic->partition.count;
    traffic->gathered = malloc(count * sizeof *traffic->gathered);
    traffic->sent = calloc(count, sizeof *traffic->sent);
    if (!traffic->gathered || !traffic->sent)
        FAIL(STATUS_INTERNAL, "out of memory for %zu buckets", count);
    for (size_t i = 0; i < count; i++) traffic->gathered[i] = -1;
    if (!traffic->model->options.share_gradients) return STATUS_OK;
    if (!backend->ops->accumulate)
        FAIL(STATUS_USAGE,
             "parallel.zero = 2: the %s backend cannot add up shared gradients; set it to 1",
             backend->name);
    return backend->ops->alloc(backend, (size_t)traffic->partition.owned * sizeof(float),
                               (void **)&traffic->sums);
}

Status traffic_create(Communicator *communicator, Communicator *replicas, Model *model,
                      int64_t bucket_bytes, Traffic **out) {
    Status status = STATUS_OK;
    int64_t elements = bucket_bytes / (int64_t)dtype_bytes(model->backend->grad_dtype);
    Traffic *traffic = calloc(1, sizeof *traffic);
    if (!traffic) FAIL(STATUS_INTERNAL, "out of memory for the traffic of buckets");
    traffic->communicator = communicator;
    traffic->replicas = replicas;
    traffic->model = model;
    bool by_section = model->options.share_gradients || model->table.layout.expert_ranks > 1;
    INVARIANT(!model->options.share_gradients || !replicas);
    TRY_GOTO(partition_create(&model->table, communicator->rank, communicator->world,
                              elements > 0 ? elements : 1, by_section, &traffic->partition),
             fail);
    TRY_GOTO(allocate(traffic), fail);
    *out = traffic;
    return STATUS_OK;
fail:
    traffic_destroy(traffic);
    return status;
}

void traffic_destroy(Traffic *traffic) {
    if (!traffic) return;
    if (traffic->model->hooks == &traffic->hooks) traffic->model->hooks = NULL;
    if (traffic->sums)
        traffic->model->backend->ops->release(traffic->model->backend, traffic->sums);
    partition_free(&traffic->partition);
    free(traffic->gathered);
    free(traffic->sent);
    free(traffic);
}
