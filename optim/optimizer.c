// AdamW as a walk over the tensor table.
//
// The arenas are flat, so the fewest calls are made by merging neighbours: a run ends where the
// weight decay changes, where the fp32 router tail begins, and where what this rank owns ends. m
// and v have one dtype from end to end and hold what is owned, one part after the other; with one
// rank that is everything, at the table's element offsets. Gradients and the working copy have byte
// offsets that depend on the backend's dtypes (tensor_table_copy_bytes knows both, the fp32 tail
// included).
#include "optim/optimizer.h"

#include <math.h>
#include <stdlib.h>

Status optimizer_plan(const TensorTable *table, const OptimizerOptions *options, DType compute,
                      int ranks, MemoryPlan *plan) {
    const uint64_t owned = (uint64_t)partition_owned(table, ranks);
    if (ranks > 1 && compute != DTYPE_F32)
        TRY(memory_plan_add(plan, "master weights", owned * sizeof(float)));
    return memory_plan_add(plan, "optimizer state", 2 * owned * dtype_bytes(options->state_dtype));
}

// --- Runs ----------------------------------------------------------------------------------------

static int by_offset(const void *a, const void *b) {
    const Tensor *const *x = a, *const *y = b;
    return ((*x)->offset > (*y)->offset) - ((*x)->offset < (*y)->offset);
}

// Adds what this rank owns of a tensor in a bucket to the last run, or as a new one.
static void add_to_runs(Optimizer *optimizer, const Tensor *tensor, int bucket) {
    const Bucket *b = &optimizer->partition->buckets[bucket];
    const int64_t own = partition_begin(optimizer->partition, bucket);
    int64_t first;
    const int64_t count = tensor_part(tensor, own, own + b->part, &first);
    const int64_t begin = tensor->offset + first;
    if (count == 0) return;
    bool decays = tensor_decays(tensor, optimizer->options.decay_embeddings);
    bool router = tensor->offset >= optimizer->model->table.router_begin;
    OptimizerRun *last = optimizer->num_runs ? &optimizer->runs[optimizer->num_runs - 1] : NULL;
    if (last && last->bucket == bucket && last->decays == decays)
        last->count = begin + count - last->begin;
    else
        optimizer->runs[optimizer->num_runs++] =
            (OptimizerRun){begin, count, b->state + (begin - own), decays, router, bucket};
}

static Status build_runs(Optimizer *optimizer) {
    const TensorTable *table = &optimizer->model->table;
    const Partition *partition = optimizer->partition;
    const Tensor **sorted = malloc((size_t)table->count * sizeof *sorted);
    size_t most = (size_t)table->count + (size_t)partition->count;
    optimizer->runs = malloc(most * sizeof *optimizer->runs);
    if (!sorted || !optimizer->runs) {
        free(sorted);
        FAIL(STATUS_INTERNAL, "out of memory for %zu optimizer runs", most);
    }
    for (int i = 0; i < table->count; i++) sorted[i] = &table->tensors[i];
    qsort(sorted, (size_t)table->count, sizeof *sorted, by_offset);
    for (int bucket = 0, i = 0; bucket < partition->count; bucket++) {
        const int64_t end = partition_end(partition, bucket);
        while (i < table->count && sorted[i]->offset < end)
            add_to_runs(optimizer, sorted[i++], bucket);
        // A tensor may go on in the next bucket.
        if (i > 0 && sorted[i - 1]->offset + sorted[i - 1]->count > end) i--;
    }
    free(sorted);
    return STATUS_OK;
}

// --- Life ----------------------------------------------------------------------------------------

// The fp32 weights that this rank owns, where the model has no master of its own.
static Status create_master(Optimizer *optimizer) {
    Model *model = optimizer->model;
    const Partition *partition = optimizer->partition;
    if (model->master) return STATUS_OK;
    TRY(model->backend->ops->alloc(model->backend, (size_t)partition->owned * sizeof(float),
                                   (void **)&optimizer->master));
    optimizer->master_parts = malloc((size_t)partition->count * sizeof *optimizer->master_parts);
    if (!optimizer->master_parts)
        FAIL(STATUS_INTERNAL, "out of memory for %d parts of the weights", partition->count);
    for (int i = 0; i < partition->count; i++)
        optimizer->master_parts[i] =
            (MasterPart){partition_begin(partition, i), partition->buckets[i].part,
                         optimizer->master + partition->buckets[i].state};
    model->master_parts = optimizer->master_parts;
    model->num_master_parts = partition->count;
    return STATUS_OK;
}

Status optimizer_create(Model *model, const OptimizerOptions *options, Traffic *traffic,
                        Optimizer **out) {
    Status status = STATUS_OK;
    Optimizer *optimizer = calloc(1, sizeof *optimizer);
    if (!optimizer) FAIL(STATUS_INTERNAL, "out of memory for the optimizer");
    optimizer->model = model;
    optimizer->options = *options;
    optimizer->traffic = traffic;
    optimizer->partition = traffic ? &traffic->partition : &optimizer->alone;
    Backend *backend = model->backend;
    if (!traffic)
        TRY_GOTO(partition_create(&model->table, 0, 1, INT64_MAX, false, &optimizer->alone), fail);
    size_t bytes = (size_t)optimizer->partition->owned * dtype_bytes(options->state_dtype);
    TRY_GOTO(build_runs(optimizer), fail);
    TRY_GOTO(create_master(optimizer), fail);
    TRY_GOTO(backend->ops->alloc(backend, bytes, &optimizer->m), fail);
    TRY_GOTO(backend->ops->alloc(backend, bytes, &optimizer->v), fail);
    TRY_GOTO(backend->ops->alloc(backend, 2 * sizeof(double), (void **)&optimizer->sums), fail);
    *out = optimizer;
    return STATUS_OK;
fail:
    optimizer_destroy(optimizer);
    return status;
}

void optimizer_destroy(Optimizer *optimizer) {
    if (!optimizer) return;
    Model *model = optimizer->model;
    Backend *backend = model->backend;
    if (optimizer->sums) backend->ops->release(backend, optimizer->sums);
    if (optimizer->v) backend->ops->release(backend, optimizer->v);
    if (optimizer->m) backend->ops->release(backend, optimizer->m);
    if (optimizer->master) backend->ops->release(backend, optimizer->master);
    if (model->master_parts == optimizer->master_parts) {
        model->master_parts = NULL;
        model->num_master_parts = 0;
    }
    free(optimizer->master_parts);
    free(optimizer->runs);
    partition_free(&optimizer->alone);
    free(optimizer);
}

// --- A step --------------------------------------------------------------------------------------

// The gradients of what this rank owns: where the model has them, or in fp32 where ranks share
// them.
static const void *gradient_at(const Optimizer *optimizer, int64_t element, int64_t state) {
    const Model *model = optimizer->model;
    if (optimizer->traffic && optimizer->traffic->sums) return optimizer->traffic->sums + state;
    return (const char *)model->grads + model_gradient_bytes(model, element);
}

static DType gradient_dtype(const Optimizer *optimizer, bool router) {
    bool wide = router || (optimizer->traffic && optimizer->traffic->sums);
    return wide ? DTYPE_F32 : optimizer->model->backend->grad_dtype;
}

Status optimizer_gradient_sums(Optimizer *optimizer, double sums[2]) {
    Backend *backend = optimizer->model->backend;
    const Partition *partition = optimizer->partition;
    TRY(backend->ops->zero(backend, optimizer->sums, 2 * sizeof *sums));
    for (int i = 0; i < partition->count; i++) {
        const int64_t begin = partition_begin(partition, i);
        bool router = begin >= optimizer->model->table.router_begin;
        TRY(backend->ops->norm2(backend, gradient_dtype(optimizer, router),
                                gradient_at(optimizer, begin, partition->buckets[i].state),
                                partition->buckets[i].part, optimizer->sums));
    }
    return backend->ops->download(backend, sums, optimizer->sums, 2 * sizeof *sums);
}

double optimizer_norm(const double sums[2]) {
    return sums[1] > 0 || !isfinite(sums[0]) ? INFINITY : sqrt(sums[0]);
}

Status optimizer_gradient_norm(Optimizer *optimizer, double *norm) {
    double sums[2];
    TRY(optimizer_gradient_sums(optimizer, sums));
    *norm = optimizer_norm(sums);
    return STATUS_OK;
}

static Status update_run(Optimizer *optimizer, const OptimizerRun *run, AdamwArgs args) {
    Model *model = optimizer->model;
    DType compute = model->backend->compute_dtype;
    size_t state_at = (size_t)run->state * dtype_bytes(optimizer->options.state_dtype);
    args.count = run->count;
    args.master = model->master ? model->master + run->begin : optimizer->master + run->state;
    args.m = (char *)optimizer->m + state_at;
    args.v = (char *)optimizer->v + state_at;
    args.state_dtype = optimizer->options.state_dtype;
    args.grad = gradient_at(optimizer, run->begin, run->state);
    args.grad_dtype = gradient_dtype(optimizer, run->router);
    args.weight_decay = run->decays ? optimizer->options.weight_decay : 0.0;
    // On an fp32 backend the master is the working copy.
    if (model->params != (void *)model->master) {
        args.copy =
            (char *)model->params + tensor_table_copy_bytes(&model->table, compute, run->begin);
        args.copy_dtype = run->router ? DTYPE_F32 : compute;
    }
    return model->backend->ops->adamw(model->backend, &args);
}

// In the order of the next forward pass, so that the weights it needs first travel first.
static Status update_buckets(Optimizer *optimizer, AdamwArgs args) {
    const Partition *partition = optimizer->partition;
    for (int n = partition->count - 1; n >= 0; n--) {
        const int bucket = partition_order(partition, n);
        for (int i = 0; i < optimizer->num_runs; i++)
            if (optimizer->runs[i].bucket == bucket)
                TRY(update_run(optimizer, &optimizer->runs[i], args));
        if (optimizer->traffic) TRY(traffic_gather(optimizer->traffic, bucket));
    }
    return STATUS_OK;
}

Status optimizer_step(Optimizer *optimizer, double learning_rate, double norm) {
    INVARIANT(isfinite(norm));
    const OptimizerOptions *o = &optimizer->options;
    bool clip = o->clip_norm > 0 && norm > o->clip_norm;
    AdamwArgs args = {
        .learning_rate = learning_rate,
        .beta1 = o->beta1,
        .beta2 = o->beta2,
        .epsilon = o->epsilon,
        .grad_scale = clip ? o->clip_norm / norm : 1.0,
        .step = ++optimizer->updates,
    };
    return update_buckets(optimizer, args);
}
