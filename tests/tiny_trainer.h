// A model of a few thousand weights on the CPU with its optimizer, for the tests of what surrounds
// them: layer 0 dense, layer 1 with experts, so that every kind of tensor is there.
#ifndef TESTS_TINY_TRAINER_H
#define TESTS_TINY_TRAINER_H

#include "optim/optimizer.h"
#include "tests/random_source.h"
#include "tests/test.h"

typedef struct TinyTrainer {
    Backend *backend;
    Model *model;
    Optimizer *optimizer;
} TinyTrainer;

__attribute__((unused)) static ModelConfig tiny_config(void) {
    ModelConfig config = small_config(2);
    config.layers[1] = (LayerConfig){.num_experts = 3, .top_k = 1};
    return config;
}

__attribute__((unused)) static OptimizerOptions tiny_options(void) {
    return (OptimizerOptions){
        .beta1 = 0.9, .beta2 = 0.95, .epsilon = 1e-8, .weight_decay = 0.1, .clip_norm = 1.0};
}

// Weights are those of random_source(config, seed).
__attribute__((unused)) static TinyTrainer
tiny_trainer(const ModelConfig *config, const OptimizerOptions *options, uint64_t seed) {
    TinyTrainer t;
    ModelOptions model_options = {.micro_batch = 1, .sequence_length = 4, .training = true};
    TensorSource *source = random_source(config, seed);
    ck_assert_ok(backend_cpu(1, &t.backend));
    ck_assert_ok(model_create(t.backend, config, &model_options, &t.model));
    ck_assert_ok(model_load(t.model, source));
    ck_assert_ok(optimizer_create(t.model, options, NULL, &t.optimizer));
    source_close(source);
    return t;
}

__attribute__((unused)) static void tiny_trainer_free(TinyTrainer *t) {
    optimizer_destroy(t->optimizer);
    model_destroy(t->model);
    backend_destroy(t->backend);
}

// A whole fp32 arena on the host. malloc'ed.
__attribute__((unused)) static float *download_arena(const TinyTrainer *t, const float *arena) {
    size_t bytes = (size_t)t->model->table.total * sizeof(float);
    float *host = malloc(bytes);
    ck_assert_ptr_nonnull(host);
    ck_assert_ok(t->backend->ops->download(t->backend, host, arena, bytes));
    return host;
}

// m or v on the host, in fp32. malloc'ed.
__attribute__((unused)) static float *download_moments(const TinyTrainer *t, const void *arena) {
    const DType dtype = t->optimizer->options.state_dtype;
    size_t count = (size_t)t->model->table.total;
    float *wide = malloc(count * sizeof *wide);
    void *host = malloc(count * dtype_bytes(dtype));
    ck_assert(wide && host);
    ck_assert_ok(t->backend->ops->download(t->backend, host, arena, count * dtype_bytes(dtype)));
    dtype_to_f32(dtype, host, wide, count);
    free(host);
    return wide;
}

// Gives every tensor of an fp32 arena its own random numbers; gaps stay as they are (zero).
__attribute__((unused)) static void fill_arena(const TinyTrainer *t, float *arena, uint64_t seed,
                                               float mean, float stddev) {
    const TensorTable *table = &t->model->table;
    for (int i = 0; i < table->count; i++) {
        const Tensor *tensor = &table->tensors[i];
        size_t count = (size_t)tensor->count;
        float *values = malloc(count * sizeof *values);
        ck_assert_ptr_nonnull(values);
        random_normal_fill(values, count, seed, random_stream(tensor->name), 0, mean, stddev);
        ck_assert_ok(t->backend->ops->upload(t->backend, arena + tensor->offset, values,
                                             count * sizeof *values));
        free(values);
    }
}

#endif
