// A model on the CPU backend with random weights and a random batch, for tests of model/.
#ifndef TESTS_MODEL_FIXTURE_H
#define TESTS_MODEL_FIXTURE_H

#include <math.h>
#include "base/random.h"
#ifdef TEST_ON_GPU
#include "cuda/backend.h"
#endif
#include "model/model.h"
#include "tests/random_source.h"
#include "tests/test.h"

// Not every test uses all of it.
#define FIXTURE __attribute__((unused)) static

enum { FIXTURE_BATCH = 2, FIXTURE_LENGTH = 11, FIXTURE_TOKENS = FIXTURE_BATCH * FIXTURE_LENGTH };

// One backend per test process; `check` runs every test in its own. It lives until the process
// ends.
static Backend *backend;

// With TEST_ON_GPU (cmake/cuda.cmake) the same tests check the GPU backend in its fp32 mode.
FIXTURE void use_backend(void) {
    if (backend) return;
#ifdef TEST_ON_GPU
    const CudaOptions options = {.device = 0, .fp32 = true, .graphs = true};
    Status status = backend_cuda(&options, &backend);
    if (status == STATUS_USAGE) { // no device: CTest's SKIP_RETURN_CODE
        printf("skipped: %s\n", status_message());
        exit(77);
    }
    ck_assert_ok(status);
#else
    ck_assert_ok(backend_cpu(2, &backend));
#endif
}

// Dense and MoE layers mixed, two expert counts, top-2 and top-1.
FIXTURE ModelConfig fixture_config(void) {
    ModelConfig c = small_config(4);
    c.hidden_size = 20;
    c.head_dim = 6;
    c.vocab_size = 37;
    c.intermediate_size = 28;
    c.moe_intermediate_size = 12;
    c.bos_token_id = c.eos_token_id = -1;
    c.router = (RouterConfig){GATE_SOFTMAX, 1.5f, false};
    c.layers[1] = (LayerConfig){4, 2};
    c.layers[3] = (LayerConfig){3, 1};
    return c;
}

// As above with QK-norm instead of QKV bias, and untied.
FIXTURE ModelConfig fixture_config_qwen3(void) {
    ModelConfig c = fixture_config();
    c.family = FAMILY_QWEN3;
    c.qk_norm = true;
    c.qkv_bias = false;
    c.tie_word_embeddings = false;
    return c;
}

FIXTURE ModelOptions fixture_options(bool training) {
    return (ModelOptions){
        .micro_batch = FIXTURE_BATCH, .sequence_length = FIXTURE_LENGTH, .training = training};
}

FIXTURE Model *fixture_model_of_seed(const ModelConfig *config, const ModelOptions *options,
                                     uint64_t seed) {
    Model *model;
    use_backend();
    TensorSource *source = random_source(config, seed);
    ck_assert_ok(model_create(backend, config, options, &model));
    ck_assert_ok(model_load(model, source));
    source_close(source);
    return model;
}

FIXTURE Model *fixture_model(const ModelConfig *config, const ModelOptions *options) {
    return fixture_model_of_seed(config, options, 5);
}

FIXTURE const Recompute recompute_modes[] = {
    {.swiglu = true},
    {.norms = true},
    {.swiglu = true, .norms = true},
    {.layer = true},
};
enum { NUM_RECOMPUTE_MODES = sizeof recompute_modes / sizeof recompute_modes[0] };

typedef struct FixtureBatch {
    int32_t tokens[4 * FIXTURE_TOKENS], targets[4 * FIXTURE_TOKENS], starts[4 * FIXTURE_TOKENS];
    MicroBatch micro;
} FixtureBatch;

// Random tokens and targets; every seventh target is left out.
FIXTURE void fixture_batch(FixtureBatch *out, int batch, int length, int vocab_size) {
    ck_assert_int_le(batch * length, 4 * FIXTURE_TOKENS);
    for (int i = 0; i < batch * length; i++) {
        out->tokens[i] = (int32_t)(random_u64(3, 1, (uint64_t)i) % (uint64_t)vocab_size);
        out->targets[i] = (int32_t)(random_u64(3, 2, (uint64_t)i) % (uint64_t)vocab_size);
        if (i % 7 == 6) out->targets[i] = -1;
    }
    out->micro = (MicroBatch){batch, length, out->tokens, out->targets, NULL};
}

FIXTURE double fixture_targets(const MicroBatch *batch) {
    double count = 0;
    for (int64_t i = 0; i < batch->batch * batch->sequence_length; i++)
        count += batch->targets[i] >= 0;
    return count;
}

// Cross-entropy alone, over this batch.
FIXTURE LossWeights fixture_weights(const MicroBatch *batch) {
    return (LossWeights){.target_count = fixture_targets(batch),
                         .token_count = (double)(batch->batch * batch->sequence_length),
                         .balance_micro = true};
}

FIXTURE float *fixture_gradient(Model *model, const Tensor *tensor) {
    ck_assert_int_eq(backend->grad_dtype, DTYPE_F32);
    size_t bytes = (size_t)tensor->count * sizeof(float);
    float *out = malloc(bytes);
    const char *from = (const char *)model->grads +
                       tensor_table_copy_bytes(&model->table, DTYPE_F32, tensor->offset);
    ck_assert_ok(backend->ops->download(backend, out, from, bytes));
    return out;
}

// Zeroes gradients and sums, then one forward and backward.
FIXTURE void run_step(Model *model, const MicroBatch *batch, const LossWeights *weights) {
    ck_assert_ok(model_zero_gradients(model));
    ck_assert_ok(model_reset_sums(model));
    ck_assert_ok(model_forward_backward(model, batch, weights));
}

// The sums since they were reset, as read. model_sums_free() them.
FIXTURE ModelSums fixture_sums(Model *model) {
    ModelSums sums;
    ck_assert_ok(model_sums_create(model, &sums));
    ck_assert_ok(model_read_sums(model, &sums));
    return sums;
}

FIXTURE void check_equal_sums(const ModelConfig *config, const ModelSums *a, const ModelSums *b) {
    size_t layers = (size_t)config->num_layers * sizeof(double);
    size_t experts = layers * (size_t)a->stride;
    ck_assert(a->loss_sum == b->loss_sum && a->loss_count == b->loss_count);
    ck_assert(a->tokens == b->tokens);
    ck_assert_mem_eq(a->assignments, b->assignments, experts);
    ck_assert_mem_eq(a->probability, b->probability, experts);
    ck_assert_mem_eq(a->entropy, b->entropy, layers);
    ck_assert_mem_eq(a->z, b->z, layers);
}

// Sum of the losses of all targets since the sums were reset.
FIXTURE double loss_sum(Model *model) {
    ModelSums sums = fixture_sums(model);
    double loss = sums.loss_sum;
    model_sums_free(&sums);
    return loss;
}

// All gradients, gaps included. free() it.
FIXTURE float *fixture_gradients(Model *model) {
    Tensor all = {.count = model->table.total, .offset = 0};
    return fixture_gradient(model, &all);
}

// max |a - b| / max |b|: how far a tensor is off, relative to its largest element.
FIXTURE double relative_difference(const float *a, const float *b, int64_t count) {
    double worst = 0, largest = 0;
    for (int64_t i = 0; i < count; i++) {
        double difference = fabs((double)a[i] - b[i]);
        if (!(difference <= worst)) worst = difference; // NaN sticks
        if (fabs((double)b[i]) > largest) largest = fabs((double)b[i]);
    }
    return largest > 0 ? worst / largest : worst;
}

// loss = CE + α·LB + ζ·Z as METHOD defines them, with f_i of the batch the sums were taken over.
FIXTURE double fixture_loss(Model *model, const ModelSums *sums, const LossWeights *weights) {
    double loss = sums->loss_sum / weights->target_count;
    for (int l = 0; l < model->config.num_layers; l++) {
        const LayerConfig *layer = &model->config.layers[l];
        double balance = 0;
        for (int e = 0; e < layer->num_experts; e++) {
            size_t at = (size_t)l * (size_t)sums->stride + (size_t)e;
            balance += layer->num_experts * (sums->assignments[at] / layer->top_k / sums->tokens) *
                       (sums->probability[at] / sums->tokens);
        }
        loss += weights->balance * balance + weights->z * sums->z[l] / sums->tokens;
    }
    return loss;
}

#endif
