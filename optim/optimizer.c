// AdamW as a walk over the tensor table.
//
// The arenas are flat, so the fewest calls are made by merging neighbours: a run ends where the
// weight decay changes or where the fp32 router tail begins. master is fp32, m and v have one dtype
// from end to end; all three have the table's element offsets. Gradients and the working copy have
// byte offsets that depend on the backend's dtypes (tensor_table_copy_bytes knows both, the fp32
// tail included).
#include "optim/optimizer.h"

#include <math.h>
#include <stdlib.h>

static size_t state_bytes(const TensorTable *table, const OptimizerOptions *options) {
    return (size_t)table->total * dtype_bytes(options->state_dtype);
}

Status optimizer_plan(const TensorTable *table, const OptimizerOptions *options, MemoryPlan *plan) {
    return memory_plan_add(plan, "optimizer state", 2 * (uint64_t)state_bytes(table, options));
}

static int by_offset(const void *a, const void *b) {
    const Tensor *const *x = a, *const *y = b;
    return ((*x)->offset > (*y)->offset) - ((*x)->offset < (*y)->offset);
}

static Status build_runs(Optimizer *optimizer) {
    const TensorTable *table = &optimizer->model->table;
    const Tensor **sorted = malloc((size_t)table->count * sizeof *sorted);
    optimizer->runs = malloc((size_t)table->count * sizeof *optimizer->runs);
    if (!sorted || !optimizer->runs) {
        free(sorted);
        FAIL(STATUS_INTERNAL, "out of memory for %d optimizer runs", table->count);
    }
    for (int i = 0; i < table->count; i++) sorted[i] = &table->tensors[i];
    qsort(sorted, (size_t)table->count, sizeof *sorted, by_offset);
    for (int i = 0; i < table->count; i++) {
        const Tensor *tensor = sorted[i];
        bool decays = tensor_decays(tensor, optimizer->options.decay_embeddings);
        bool router = tensor->offset >= table->router_begin;
        OptimizerRun *last = optimizer->num_runs ? &optimizer->runs[optimizer->num_runs - 1] : NULL;
        if (last && last->decays == decays && last->router == router)
            last->count = tensor->offset + tensor->count - last->begin;
        else
            optimizer->runs[optimizer->num_runs++] =
                (OptimizerRun){tensor->offset, tensor->count, decays, router};
    }
    free(sorted);
    return STATUS_OK;
}

Status optimizer_create(Model *model, const OptimizerOptions *options, Optimizer **out) {
    Status status = STATUS_OK;
    Optimizer *optimizer = calloc(1, sizeof *optimizer);
    if (!optimizer) FAIL(STATUS_INTERNAL, "out of memory for the optimizer");
    optimizer->model = model;
    optimizer->options = *options;
    Backend *backend = model->backend;
    size_t bytes = state_bytes(&model->table, options);
    TRY_GOTO(build_runs(optimizer), fail);
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
    Backend *backend = optimizer->model->backend;
    if (optimizer->sums) backend->ops->release(backend, optimizer->sums);
    if (optimizer->v) backend->ops->release(backend, optimizer->v);
    if (optimizer->m) backend->ops->release(backend, optimizer->m);
    free(optimizer->runs);
    free(optimizer);
}

static const void *gradient_at(const Optimizer *optimizer, int64_t element) {
    const Model *model = optimizer->model;
    return (const char *)model->grads +
           tensor_table_copy_bytes(&model->table, model->backend->grad_dtype, element);
}

Status optimizer_gradient_norm(Optimizer *optimizer, double *norm) {
    Backend *backend = optimizer->model->backend;
    const TensorTable *table = &optimizer->model->table;
    int64_t tail = table->total - table->router_begin;
    double sums[2];
    TRY(backend->ops->zero(backend, optimizer->sums, sizeof sums));
    TRY(backend->ops->norm2(backend, backend->grad_dtype, gradient_at(optimizer, 0),
                            table->router_begin, optimizer->sums));
    if (tail > 0)
        TRY(backend->ops->norm2(backend, DTYPE_F32, gradient_at(optimizer, table->router_begin),
                                tail, optimizer->sums));
    TRY(backend->ops->download(backend, sums, optimizer->sums, sizeof sums));
    *norm = sums[1] > 0 || !isfinite(sums[0]) ? INFINITY : sqrt(sums[0]);
    return STATUS_OK;
}

static Status update_run(Optimizer *optimizer, const OptimizerRun *run, AdamwArgs args) {
    Model *model = optimizer->model;
    DType compute = model->backend->compute_dtype;
    size_t state_at = (size_t)run->begin * dtype_bytes(optimizer->options.state_dtype);
    args.count = run->count;
    args.master = model->master + run->begin;
    args.m = (char *)optimizer->m + state_at;
    args.v = (char *)optimizer->v + state_at;
    args.state_dtype = optimizer->options.state_dtype;
    args.grad = gradient_at(optimizer, run->begin);
    args.grad_dtype = run->router ? DTYPE_F32 : model->backend->grad_dtype;
    args.weight_decay = run->decays ? optimizer->options.weight_decay : 0.0;
    // On an fp32 backend the master is the working copy.
    if (model->params != (void *)model->master) {
        args.copy =
            (char *)model->params + tensor_table_copy_bytes(&model->table, compute, run->begin);
        args.copy_dtype = run->router ? DTYPE_F32 : compute;
    }
    return model->backend->ops->adamw(model->backend, &args);
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
    for (int i = 0; i < optimizer->num_runs; i++)
        TRY(update_run(optimizer, &optimizer->runs[i], args));
    return STATUS_OK;
}
