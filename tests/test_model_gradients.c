// Gradients of whole models on the CPU backend: against finite differences, and the equalities that
// hold whatever the weights are.
#include "model/activations.h"
#include "tests/model_fixture.h"

// --- Finite differences --------------------------------------------------------------------------

typedef struct Probe {
    Model *model;
    const MicroBatch *batch;
    LossWeights weights;
    ModelSums sums, before;
} Probe;

static double probe_loss(Probe *probe) {
    ck_assert_ok(model_reset_sums(probe->model));
    ck_assert_ok(model_forward(probe->model, probe->batch));
    ck_assert_ok(model_read_sums(probe->model, &probe->sums));
    return fixture_loss(probe->model, &probe->sums, &probe->weights);
}

// The loss with the tensor moved by step * direction. A choice of experts that changes makes the
// loss jump, so the test insists that none does.
static double moved_loss(Probe *probe, const Tensor *tensor, const float *values,
                         const float *direction, double step) {
    Model *model = probe->model;
    float *moved = malloc((size_t)tensor->count * sizeof *moved);
    for (int64_t i = 0; i < tensor->count; i++) moved[i] = (float)(values[i] + step * direction[i]);
    size_t bytes = (size_t)tensor->count * sizeof *moved;
    ck_assert_ok(backend->ops->upload(backend, model->master + tensor->offset, moved, bytes));
    double loss = probe_loss(probe);
    size_t entries = (size_t)(model->config.num_layers * probe->sums.stride);
    ck_assert_msg(
        memcmp(probe->sums.assignments, probe->before.assignments, entries * sizeof(double)) == 0,
        "%s: the step changed a choice of experts", tensor->name);
    ck_assert_ok(backend->ops->upload(backend, model->master + tensor->offset, values, bytes));
    free(moved);
    return loss;
}

// Derivative along `direction` against the gradient's product with it.
static void check_direction(Probe *probe, const Tensor *tensor, const float *values,
                            const float *direction, const float *gradient) {
    double length = 0, expected = 0;
    for (int64_t i = 0; i < tensor->count; i++) {
        length += (double)direction[i] * direction[i];
        expected += (double)gradient[i] * direction[i];
    }
    if (length == 0) return; // the gradient of an expert that no token chose
    // A fourth-order difference has next to no error of its own at this step; the fp32 forward pass
    // makes the loss uncertain by about 1e-7, which dividing by the step turns into 5e-5 per unit
    // of length (measured).
    double step = 0.004 / sqrt(length);
    double near = moved_loss(probe, tensor, values, direction, step) -
                  moved_loss(probe, tensor, values, direction, -step);
    double far = moved_loss(probe, tensor, values, direction, 2 * step) -
                 moved_loss(probe, tensor, values, direction, -2 * step);
    double found = (8 * near - far) / (12 * step);
    double tolerance = 2e-3 * fabs(expected) + 1e-4 * sqrt(length);
    ck_assert_msg(fabs(found - expected) <= tolerance,
                  "%s: finite difference %.8g, gradient %.8g (off by %.2g of the tolerance)",
                  tensor->name, found, expected, fabs(found - expected) / tolerance);
}

// Every tensor along its own gradient (the direction in which an error of scale shows best) and
// along random signs (in which an error of any single element shows).
static void check_gradients(Probe *probe) {
    Model *model = probe->model;
    ck_assert_ok(model_sums_create(model, &probe->sums));
    ck_assert_ok(model_sums_create(model, &probe->before));
    run_step(model, probe->batch, &probe->weights);
    ck_assert_ok(model_read_sums(model, &probe->before));
    for (int i = 0; i < model->table.count; i++) {
        const Tensor *tensor = &model->table.tensors[i];
        size_t bytes = (size_t)tensor->count * sizeof(float);
        float *gradient = fixture_gradient(model, tensor);
        float *values = malloc(bytes), *signs = malloc(bytes);
        ck_assert_ok(
            backend->ops->download(backend, values, model->master + tensor->offset, bytes));
        for (int64_t j = 0; j < tensor->count; j++)
            signs[j] = random_u64(8, random_stream(tensor->name), (uint64_t)j) & 1 ? 1.0f : -1.0f;
        check_direction(probe, tensor, values, gradient, gradient);
        check_direction(probe, tensor, values, signs, gradient);
        free(gradient);
        free(values);
        free(signs);
    }
    model_sums_free(&probe->sums);
    model_sums_free(&probe->before);
}

// Few tokens, and a seed whose choices of experts are so clear that no step changes one.
static void check_config_gradients(const ModelConfig *config, uint64_t seed) {
    FixtureBatch batch;
    fixture_batch(&batch, 2, 6, config->vocab_size);
    ModelOptions options = fixture_options(true);
    Probe probe = {.model = fixture_model_of_seed(config, &options, seed), .batch = &batch.micro};
    probe.weights = fixture_weights(probe.batch);
    probe.weights.balance = 0.3;
    probe.weights.z = 0.05;
    check_gradients(&probe);
    model_destroy(probe.model);
}

START_TEST(gradients_qwen2_softmax) {
    ModelConfig config = fixture_config();
    check_config_gradients(&config, 18);
}
END_TEST

START_TEST(gradients_qwen2_raw_router_input) {
    ModelConfig config = fixture_config();
    config.router.input_is_raw = true;
    check_config_gradients(&config, 23);
}
END_TEST

START_TEST(gradients_qwen3_renorm_untied) {
    ModelConfig config = fixture_config_qwen3();
    config.router = (RouterConfig){GATE_RENORM, 1.0f, false};
    config.layers[3] = (LayerConfig){3, 2};
    check_config_gradients(&config, 18);
}
END_TEST

// --- Recompute -----------------------------------------------------------------------------------

static void check_recompute(const ModelConfig *config) {
    FixtureBatch batch;
    fixture_batch(&batch, FIXTURE_BATCH, FIXTURE_LENGTH, config->vocab_size);
    LossWeights weights = fixture_weights(&batch.micro);
    weights.balance = 0.1;
    weights.z = 0.01;
    ModelOptions options = fixture_options(true);
    Model *model = fixture_model(config, &options);
    run_step(model, &batch.micro, &weights);
    float *expected = fixture_gradients(model);
    size_t bytes = (size_t)model->table.total * sizeof(float);
    uint64_t all_kept = model->activations->kept_bytes;
    ModelSums sums = fixture_sums(model);
    model_destroy(model);

    for (int i = 0; i < NUM_RECOMPUTE_MODES; i++) {
        options.recompute = recompute_modes[i];
        model = fixture_model(config, &options);
        run_step(model, &batch.micro, &weights);
        float *found = fixture_gradients(model);
        ck_assert_msg(memcmp(found, expected, bytes) == 0, "mode %d: gradients differ by %g", i,
                      relative_difference(found, expected, model->table.total));
        ModelSums again = fixture_sums(model);
        check_equal_sums(config, &again, &sums); // statistics are taken once
        model_sums_free(&again);
        ck_assert_uint_lt(model->activations->kept_bytes, all_kept);
        free(found);
        model_destroy(model);
    }
    model_sums_free(&sums);
    free(expected);
}

START_TEST(recompute_is_bit_identical) {
    ModelConfig config = fixture_config();
    check_recompute(&config);
    config = fixture_config_qwen3();
    config.router.input_is_raw = true;
    config.layers[0] = (LayerConfig){2, 1}; // the last layer dense, the first not
    config.layers[3] = (LayerConfig){0, 0};
    check_recompute(&config);
}
END_TEST

// --- Equalities ----------------------------------------------------------------------------------

START_TEST(same_call_same_bits) {
    ModelConfig config = fixture_config();
    FixtureBatch batch;
    fixture_batch(&batch, FIXTURE_BATCH, FIXTURE_LENGTH, config.vocab_size);
    LossWeights weights = fixture_weights(&batch.micro);
    ModelOptions options = fixture_options(true);
    Model *model = fixture_model(&config, &options);
    run_step(model, &batch.micro, &weights);
    float *first = fixture_gradients(model);
    ModelSums sums = fixture_sums(model);
    run_step(model, &batch.micro, &weights);
    float *second = fixture_gradients(model);
    ModelSums again = fixture_sums(model);
    ck_assert_mem_eq(first, second, (size_t)model->table.total * sizeof(float));
    check_equal_sums(&config, &again, &sums);
    model_sums_free(&again);
    model_sums_free(&sums);
    free(first);
    free(second);
    model_destroy(model);
}
END_TEST

START_TEST(evaluation_equals_training) {
    ModelConfig config = fixture_config();
    FixtureBatch batch;
    fixture_batch(&batch, FIXTURE_BATCH, FIXTURE_LENGTH, config.vocab_size);
    LossWeights weights = fixture_weights(&batch.micro);
    ModelOptions training = fixture_options(true), evaluation = fixture_options(false);
    Model *trained = fixture_model(&config, &training);
    Model *evaluated = fixture_model(&config, &evaluation);
    run_step(trained, &batch.micro, &weights);
    ck_assert_ok(model_forward(evaluated, &batch.micro));
    ck_assert(loss_sum(trained) == loss_sum(evaluated));
    ck_assert_ptr_null(evaluated->grads);
    // One layer's buffers and no more: twice the layers need no more activation memory.
    ck_assert_uint_eq(evaluated->activations->kept_bytes, 0);
    uint64_t shared_bytes = evaluated->activations->shared_bytes;
    model_destroy(evaluated);
    config.num_layers = 8;
    for (int i = 4; i < 8; i++) config.layers[i] = config.layers[i - 4];
    ck_assert_ok(model_create(backend, &config, &evaluation, &evaluated));
    uint64_t statistics = 4 * (10 * sizeof(double) + 8 * sizeof(float)); // per layer, N = 4
    ck_assert_uint_le(evaluated->activations->shared_bytes, shared_bytes + statistics + 3 * 256);
    model_destroy(evaluated);
    model_destroy(trained);
}
END_TEST

// Two micro-batches of the same step add up to the whole batch.
START_TEST(accumulation_equals_one_batch) {
    ModelConfig config = fixture_config();
    FixtureBatch batch;
    fixture_batch(&batch, 4, FIXTURE_LENGTH, config.vocab_size);
    LossWeights weights = fixture_weights(&batch.micro);
    weights.balance = 0.2;
    weights.z = 0.01;
    weights.balance_micro = false; // f_i must not depend on how the batch is cut
    ModelOptions options = fixture_options(true);
    options.micro_batch = 4;
    Model *model = fixture_model(&config, &options);
    float load[4 * 4] = {[4] = 0.4f, 0.3f, 0.2f, 0.1f, [12] = 0.5f, 0.25f, 0.25f};
    ck_assert_int_eq(model_sums_stride(model), 4);
    ck_assert_ok(model_set_load(model, load));
    run_step(model, &batch.micro, &weights);
    float *whole = fixture_gradients(model);
    double loss = loss_sum(model);

    MicroBatch half = batch.micro;
    half.batch = 2;
    run_step(model, &half, &weights);
    half.tokens += 2 * FIXTURE_LENGTH;
    half.targets += 2 * FIXTURE_LENGTH;
    ck_assert_ok(model_forward_backward(model, &half, &weights));
    float *sum = fixture_gradients(model);
    // Only the order of fp32 additions differs.
    ck_assert_double_eq_tol(loss_sum(model), loss, 1e-6 * loss);
    for (int i = 0; i < model->table.count; i++) {
        const Tensor *tensor = &model->table.tensors[i];
        double difference =
            relative_difference(sum + tensor->offset, whole + tensor->offset, tensor->count);
        ck_assert_msg(difference < 1e-5, "%s differs by %g", tensor->name, difference);
    }
    free(whole);
    free(sum);
    model_destroy(model);
}
END_TEST

// Two documents in one row see nothing of each other: they are two rows. Rotary positions differ by
// a constant then, which attention does not see but rounding does.
START_TEST(documents_in_a_row_equal_rows) {
    enum { FIRST = 9, SECOND = 13, ROW = FIRST + SECOND };
    ModelConfig config = fixture_config();
    FixtureBatch batch;
    fixture_batch(&batch, 1, ROW, config.vocab_size);
    for (int i = 0; i < ROW; i++) batch.starts[i] = i < FIRST ? 0 : FIRST;
    batch.targets[FIRST - 1] = -1;
    batch.micro.document_start = batch.starts;
    LossWeights weights = fixture_weights(&batch.micro);
    ModelOptions options = fixture_options(true);
    Model *model = fixture_model(&config, &options);
    run_step(model, &batch.micro, &weights); // one row of B * S tokens
    float *joined = fixture_gradients(model);
    double loss = loss_sum(model);

    MicroBatch row = {1, FIRST, batch.tokens, batch.targets, NULL};
    run_step(model, &row, &weights);
    row = (MicroBatch){1, SECOND, batch.tokens + FIRST, batch.targets + FIRST, NULL};
    ck_assert_ok(model_forward_backward(model, &row, &weights));
    float *apart = fixture_gradients(model);
    ck_assert_double_eq_tol(loss_sum(model), loss, 1e-5 * loss);
    for (int i = 0; i < model->table.count; i++) {
        const Tensor *tensor = &model->table.tensors[i];
        double difference =
            relative_difference(joined + tensor->offset, apart + tensor->offset, tensor->count);
        ck_assert_msg(difference < 1e-4, "%s differs by %g", tensor->name, difference);
    }
    // The mask does something: without it the loss is another.
    batch.micro.document_start = NULL;
    run_step(model, &batch.micro, &weights);
    ck_assert_double_gt(fabs(loss_sum(model) - loss), 1e-3 * loss);
    free(joined);
    free(apart);
    model_destroy(model);
}
END_TEST

TEST_MAIN("model gradients", TEST(gradients_qwen2_softmax), TEST(gradients_qwen2_raw_router_input),
          TEST(gradients_qwen3_renorm_untied), TEST(recompute_is_bit_identical),
          TEST(same_call_same_bits), TEST(evaluation_equals_training),
          TEST(accumulation_equals_one_batch), TEST(documents_in_a_row_equal_rows))
