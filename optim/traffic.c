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

static void *element(const Traffic *traffic, void *arena, int bucket, DType body) {
    int64_t begin = traffic->partition.buckets[bucket].begin;
    return (char *)arena + tensor_table_copy_bytes(&traffic->model->table, body, begin);
}

static Status start_reduce(Traffic *traffic, int bucket) {
    Communicator *comm = traffic->communicator;
    DType dtype = traffic->model->backend->grad_dtype;
    TRY(comm->ops->reduce_scatter(comm, element(traffic, traffic->model->grads, bucket, dtype),
                                  traffic->partition.buckets[bucket].part,
                                  type_of(traffic, bucket, dtype), &traffic->last));
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

static Status on_gradients(void *context, int64_t from) {
    return reduce_from(context, from);
}

static Status wait_bucket(Traffic *traffic, int bucket) {
    Communicator *comm = traffic->communicator;
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
        if (bucket < partition->vectors && partition->buckets[bucket].begin >= end) break;
        TRY(wait_bucket(traffic, bucket));
    }
    return STATUS_OK;
}

const ModelHooks *traffic_hooks(Traffic *traffic, bool first, bool last) {
    traffic->hooks = (ModelHooks){.context = traffic,
                                  .weights_needed = first ? on_weights : NULL,
                                  .gradients_final = last ? on_gradients : NULL};
    return first || last ? &traffic->hooks : NULL;
}

Status traffic_reduce(Traffic *traffic) {
    Communicator *comm = traffic->communicator;
    TRY(reduce_from(traffic, 0));
    traffic->reduced = 0;
    TRY(comm->ops->wait(comm, traffic->last));
    return STATUS_OK;
}

Status traffic_gather(Traffic *traffic, int bucket) {
    Communicator *comm = traffic->communicator;
    DType dtype = traffic->model->backend->compute_dtype;
    TRY(comm->ops->all_gather(comm, element(traffic, traffic->model->params, bucket, dtype),
                              traffic->partition.buckets[bucket].part,
                              type_of(traffic, bucket, dtype), &traffic->gathered[bucket]));
    traffic->last = traffic->gathered[bucket];
    return STATUS_OK;
}

Status traffic_settle(Traffic *traffic) {
    for (int bucket = 0; bucket < traffic->partition.count; bucket++)
        TRY(wait_bucket(traffic, bucket));
    return STATUS_OK;
}

Status traffic_create(Communicator *communicator, Model *model, int64_t bucket_bytes,
                      Traffic **out) {
    Status status = STATUS_OK;
    int64_t elements = bucket_bytes / (int64_t)dtype_bytes(model->backend->grad_dtype);
    Traffic *traffic = calloc(1, sizeof *traffic);
    if (!traffic) FAIL(STATUS_INTERNAL, "out of memory for the traffic of buckets");
    traffic->communicator = communicator;
    traffic->model = model;
    TRY_GOTO(partition_create(&model->table, communicator->rank, communicator->world,
                              elements > 0 ? elements : 1, &traffic->partition),
             fail);
    traffic->gathered = malloc((size_t)traffic->partition.count * sizeof *traffic->gathered);
    if (!traffic->gathered)
        FAIL_GOTO(fail, STATUS_INTERNAL, "out of memory for %d buckets", traffic->partition.count);
    for (int i = 0; i < traffic->partition.count; i++) traffic->gathered[i] = -1;
    *out = traffic;
    return STATUS_OK;
fail:
    traffic_destroy(traffic);
    return status;
}

void traffic_destroy(Traffic *traffic) {
    if (!traffic) return;
    if (traffic->model->hooks == &traffic->hooks) traffic->model->hooks = NULL;
    partition_free(&traffic->partition);
    free(traffic->gathered);
    free(traffic);
}
