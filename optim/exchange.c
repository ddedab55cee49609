// Collectives of buckets, started and waited for by the model's progress (exchange.h).
//
// Tickets grow with each collective and a wait covers all that were started before, so the order of
// starting is the order of waiting: gradients leave in the order of the backward pass, weights come
// in the order of the forward pass.
#include "optim/exchange.h"

#include <stdlib.h>

// What a bucket's elements are: gradients and working copy have a body of one dtype each and an
// fp32 tail.
static CommType type_of(const Exchange *exchange, int bucket, DType body) {
    const Bucket *b = &exchange->partition.buckets[bucket];
    bool tail = b->begin >= exchange->model->table.router_begin;
    return tail || body == DTYPE_F32 ? COMM_F32 : COMM_BF16;
}

static void *element(const Exchange *exchange, void *arena, int bucket, DType body) {
    int64_t begin = exchange->partition.buckets[bucket].begin;
    return (char *)arena + tensor_table_copy_bytes(&exchange->model->table, body, begin);
}

static Status start_reduce(Exchange *exchange, int bucket) {
    Communicator *comm = exchange->communicator;
    DType dtype = exchange->model->backend->grad_dtype;
    TRY(comm->ops->reduce_scatter(comm, element(exchange, exchange->model->grads, bucket, dtype),
                                  exchange->partition.buckets[bucket].part,
                                  type_of(exchange, bucket, dtype), &exchange->last));
    return STATUS_OK;
}

// Starts every bucket that is complete once the matrices are from element `from` on.
static Status reduce_from(Exchange *exchange, int64_t from) {
    const Partition *partition = &exchange->partition;
    while (exchange->reduced < partition->count) {
        int bucket = partition_order(partition, exchange->reduced);
        if (!partition_is_final(partition, bucket, from)) break;
        TRY(start_reduce(exchange, bucket));
        exchange->reduced++;
    }
    return STATUS_OK;
}

static Status on_gradients(void *context, int64_t from) {
    return reduce_from(context, from);
}

static Status wait_bucket(Exchange *exchange, int bucket) {
    Communicator *comm = exchange->communicator;
    if (exchange->gathered[bucket] < 0) return STATUS_OK;
    TRY(comm->ops->wait(comm, exchange->gathered[bucket]));
    exchange->gathered[bucket] = -1;
    return STATUS_OK;
}

// The buckets of vectors and routers, and those of matrices that begin before `end`.
static Status on_weights(void *context, int64_t end) {
    Exchange *exchange = context;
    const Partition *partition = &exchange->partition;
    for (int n = partition->count - 1; n >= 0; n--) {
        int bucket = partition_order(partition, n);
        if (bucket < partition->vectors && partition->buckets[bucket].begin >= end) break;
        TRY(wait_bucket(exchange, bucket));
    }
    return STATUS_OK;
}

const ModelHooks *exchange_hooks(Exchange *exchange, bool first, bool last) {
    exchange->hooks = (ModelHooks){.context = exchange,
                                   .weights_needed = first ? on_weights : NULL,
                                   .gradients_final = last ? on_gradients : NULL};
    return first || last ? &exchange->hooks : NULL;
}

Status exchange_reduce(Exchange *exchange) {
    Communicator *comm = exchange->communicator;
    TRY(reduce_from(exchange, 0));
    exchange->reduced = 0;
    TRY(comm->ops->wait(comm, exchange->last));
    return STATUS_OK;
}

Status exchange_gather(Exchange *exchange, int bucket) {
    Communicator *comm = exchange->communicator;
    DType dtype = exchange->model->backend->compute_dtype;
    TRY(comm->ops->all_gather(comm, element(exchange, exchange->model->params, bucket, dtype),
                              exchange->partition.buckets[bucket].part,
                              type_of(exchange, bucket, dtype), &exchange->gathered[bucket]));
    exchange->last = exchange->gathered[bucket];
    return STATUS_OK;
}

Status exchange_settle(Exchange *exchange) {
    for (int bucket = 0; bucket < exchange->partition.count; bucket++)
        TRY(wait_bucket(exchange, bucket));
    return STATUS_OK;
}

Status exchange_create(Communicator *communicator, Model *model, int64_t bucket_bytes,
                       Exchange **out) {
    Status status = STATUS_OK;
    int64_t elements = bucket_bytes / (int64_t)dtype_bytes(model->backend->grad_dtype);
    Exchange *exchange = calloc(1, sizeof *exchange);
    if (!exchange) FAIL(STATUS_INTERNAL, "out of memory for the exchange of buckets");
    exchange->communicator = communicator;
    exchange->model = model;
    TRY_GOTO(partition_create(&model->table, communicator->rank, communicator->world,
                              elements > 0 ? elements : 1, &exchange->partition),
             fail);
    exchange->gathered = malloc((size_t)exchange->partition.count * sizeof *exchange->gathered);
    if (!exchange->gathered)
        FAIL_GOTO(fail, STATUS_INTERNAL, "out of memory for %d buckets", exchange->partition.count);
    for (int i = 0; i < exchange->partition.count; i++) exchange->gathered[i] = -1;
    *out = exchange;
    return STATUS_OK;
fail:
    exchange_destroy(exchange);
    return status;
}

void exchange_destroy(Exchange *exchange) {
    if (!exchange) return;
    if (exchange->model->hooks == &exchange->hooks) exchange->model->hooks = NULL;
    partition_free(&exchange->partition);
    free(exchange->gathered);
    free(exchange);
}
