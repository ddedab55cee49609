// The stack of a binary counter: level l holds a sum of 2^l micro-batches or nothing. A new
// micro-batch is carried up while levels are full, which adds equals to equals.
#include "optim/pairwise.h"

#include <stdlib.h>
#include <string.h>

enum { LEVELS_MAX = 31 };

struct Pairwise {
    Model *model;
    int levels;
    int64_t num_sums, added;
    float *gradients[LEVELS_MAX]; // (table.total) device memory
    double *sums[LEVELS_MAX];     // (num_sums)
    double *carry;                // (num_sums)
    double *blocks;               // (pairwise_blocks, 2) device memory
};

static int levels_of(int micro_batches) {
    int levels = 1;
    while (micro_batches >> levels) levels++;
    return levels;
}

static size_t arena_bytes(const TensorTable *table) {
    return (size_t)table->total * sizeof(float);
}

static size_t block_bytes(const TensorTable *table) {
    return (size_t)(table->total / TENSOR_ALIGN) * 2 * sizeof(double);
}

Status pairwise_plan(const TensorTable *table, int micro_batches, MemoryPlan *plan) {
    uint64_t bytes = (uint64_t)levels_of(micro_batches) * arena_bytes(table) + block_bytes(table);
    return memory_plan_add(plan, "gradients of pairs", bytes);
}

static Status allocate(Pairwise *pairwise) {
    Backend *backend = pairwise->model->backend;
    const TensorTable *table = &pairwise->model->table;
    const size_t sums = (size_t)pairwise->num_sums;
    pairwise->carry = calloc(sums + 1, sizeof *pairwise->carry);
    for (int i = 0; i < pairwise->levels; i++) {
        TRY(backend->ops->alloc(backend, arena_bytes(table), (void **)&pairwise->gradients[i]));
        pairwise->sums[i] = calloc(sums + 1, sizeof *pairwise->sums[i]);
        if (!pairwise->sums[i] || !pairwise->carry)
            FAIL(STATUS_INTERNAL, "out of memory for %zu sums of pairs", sums);
    }
    return backend->ops->alloc(backend, block_bytes(table), (void **)&pairwise->blocks);
}

Status pairwise_create(Model *model, int micro_batches, int64_t num_sums, Pairwise **out) {
    Backend *backend = model->backend;
    INVARIANT(micro_batches >= 1 && model->grads != NULL);
    if (backend->compute_dtype != DTYPE_F32 || backend->grad_dtype != DTYPE_F32)
        FAIL(STATUS_USAGE,
             "parallel.pairwise = true needs weights and gradients in fp32; %s has %s and %s: set "
             "run.gpu_precision = fp32, or pairwise = false",
             backend->device_name, dtype_name(backend->compute_dtype),
             dtype_name(backend->grad_dtype));
    Pairwise *pairwise = calloc(1, sizeof *pairwise);
    if (!pairwise) FAIL(STATUS_INTERNAL, "out of memory for sums of pairs");
    pairwise->model = model;
    pairwise->levels = levels_of(micro_batches);
    pairwise->num_sums = num_sums;
    Status status = allocate(pairwise);
    if (status != STATUS_OK) {
        pairwise_destroy(pairwise);
        return status;
    }
    *out = pairwise;
    return STATUS_OK;
}

void pairwise_destroy(Pairwise *pairwise) {
    if (!pairwise) return;
    Backend *backend = pairwise->model->backend;
    for (int i = 0; i < pairwise->levels; i++) {
        if (pairwise->gradients[i]) backend->ops->release(backend, pairwise->gradients[i]);
        free(pairwise->sums[i]);
    }
    if (pairwise->blocks) backend->ops->release(backend, pairwise->blocks);
    free(pairwise->carry);
    free(pairwise);
}

// --- The tree ------------------------------------------------------------------------------------

// Adds level `level` to the model's gradients and to the carried sums.
static Status take_level(Pairwise *pairwise, int level) {
    Model *model = pairwise->model;
    for (int64_t i = 0; i < pairwise->num_sums; i++) pairwise->carry[i] += pairwise->sums[level][i];
    return model->backend->ops->add(model->backend, model->grads, pairwise->gradients[level],
                                    model->table.total);
}

Status pairwise_add(Pairwise *pairwise, const double *sums) {
    Model *model = pairwise->model;
    const size_t sums_bytes = (size_t)pairwise->num_sums * sizeof *sums;
    int level = 0;
    memcpy(pairwise->carry, sums, sums_bytes);
    for (; pairwise->added >> level & 1; level++) TRY(take_level(pairwise, level));
    INVARIANT(level < pairwise->levels);
    pairwise->added++;
    memcpy(pairwise->sums[level], pairwise->carry, sums_bytes);
    return model->backend->ops->copy(model->backend, pairwise->gradients[level], model->grads,
                                     arena_bytes(&model->table));
}

Status pairwise_finish(Pairwise *pairwise, double *sums) {
    Model *model = pairwise->model;
    bool some = false;
    INVARIANT(pairwise->added > 0);
    for (int level = 0; level < pairwise->levels; level++) {
        if (!(pairwise->added >> level & 1)) continue;
        if (some) {
            TRY(take_level(pairwise, level));
            continue;
        }
        some = true;
        memcpy(pairwise->carry, pairwise->sums[level], (size_t)pairwise->num_sums * sizeof *sums);
        TRY(model->backend->ops->copy(model->backend, model->grads, pairwise->gradients[level],
                                      arena_bytes(&model->table)));
    }
    memcpy(sums, pairwise->carry, (size_t)pairwise->num_sums * sizeof *sums);
    pairwise->added = 0;
    return STATUS_OK;
}

// --- The norm ------------------------------------------------------------------------------------

int64_t pairwise_blocks(const Pairwise *pairwise) {
    return pairwise->model->table.total / TENSOR_ALIGN;
}

Status pairwise_block_sums(Pairwise *pairwise, const Optimizer *optimizer, double (*blocks)[2]) {
    const Model *model = pairwise->model;
    Backend *backend = model->backend;
    const Partition *partition = optimizer->partition;
    const size_t bytes = block_bytes(&model->table);
    TRY(backend->ops->zero(backend, pairwise->blocks, bytes));
    for (int i = 0; i < partition->count; i++) {
        const int64_t begin = partition_begin(partition, i);
        for (int64_t at = begin; at < begin + partition->buckets[i].part; at += TENSOR_ALIGN)
            TRY(backend->ops->norm2(backend, DTYPE_F32, (float *)model->grads + at, TENSOR_ALIGN,
                                    pairwise->blocks + 2 * (at / TENSOR_ALIGN)));
    }
    return backend->ops->download(backend, blocks, pairwise->blocks, bytes);
}
