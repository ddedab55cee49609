// A dense pass that a backend records and launches again gives what it gives when run op by op.
// On the CPU, which records nothing, the passes are simply repeated; the GPU suite built from this
// file (TEST_ON_GPU) records.
#include "tests/model_fixture.h"

static ModelConfig dense_config(void) {
    ModelConfig c = fixture_config();
    c.layers[1] = c.layers[3] = (LayerConfig){0};
    return c;
}

enum { STEPS = 4, MICRO_BATCHES = 2 }; // the third step launches what the second has recorded

// Gradients of all steps with two micro-batches each, (STEPS, total), and the sums of all.
static float *run_steps(bool record, double *loss) {
    use_backend();
    const bool before = backend->can_capture;
    backend->can_capture = record && before;
    ModelConfig config = dense_config();
    ModelOptions options = fixture_options(true);
    Model *model = fixture_model(&config, &options);
    const int64_t total = model->table.total;
    float *out = malloc((size_t)(STEPS * total) * sizeof *out);
    ck_assert_ok(model_reset_sums(model));
    for (int step = 0; step < STEPS; step++) {
        FixtureBatch batch;
        fixture_batch(&batch, FIXTURE_BATCH, FIXTURE_LENGTH, config.vocab_size);
        batch.tokens[0] = step; // the ids are new each time
        LossWeights weights = fixture_weights(&batch.micro);
        ck_assert_ok(model_zero_gradients(model));
        for (int i = 0; i < MICRO_BATCHES; i++)
            ck_assert_ok(model_forward_backward(model, &batch.micro, &weights));
        float *gradients = fixture_gradients(model);
        memcpy(out + step * total, gradients, (size_t)total * sizeof *out);
        free(gradients);
    }
    *loss = loss_sum(model);
    model_destroy(model);
    backend->can_capture = before;
    return out;
}

START_TEST(recorded_passes_give_the_same_gradients) {
    double plain_loss, recorded_loss;
    ModelConfig config = dense_config();
    TensorTable table;
    ck_assert_ok(tensor_table_build(&config, &table));
    float *plain = run_steps(false, &plain_loss), *recorded = run_steps(true, &recorded_loss);
    for (int step = 0; step < STEPS; step++)
        ck_assert_msg(memcmp(plain + step * table.total, recorded + step * table.total,
                             (size_t)table.total * sizeof *plain) == 0,
                      "gradients of step %d differ", step);
    ck_assert(plain_loss == recorded_loss);
    // Each step sees other ids.
    ck_assert(memcmp(plain, plain + table.total, (size_t)table.total * sizeof *plain) != 0);
    free(plain);
    free(recorded);
    tensor_table_free(&table);
}
END_TEST

// The second micro-batch of a step adds to the first, whatever the gradients held before.
START_TEST(first_gradients_are_assigned) {
    ModelConfig configs[] = {fixture_config(), fixture_config_qwen3()};
    ModelOptions options = fixture_options(true);
    for (int i = 0; i < 2; i++) {
        Model *model = fixture_model(&configs[i], &options);
        FixtureBatch batch;
        fixture_batch(&batch, FIXTURE_BATCH, FIXTURE_LENGTH, configs[i].vocab_size);
        LossWeights weights = fixture_weights(&batch.micro);
        run_step(model, &batch.micro, &weights);
        float *once = fixture_gradients(model);
        run_step(model, &batch.micro, &weights); // over the gradients of the step before
        float *again = fixture_gradients(model);
        ck_assert_mem_eq(once, again, (size_t)model->table.total * sizeof *once);
        ck_assert_ok(model_forward_backward(model, &batch.micro, &weights));
        float *twice = fixture_gradients(model);
        for (int64_t k = 0; k < model->table.total; k++) once[k] *= 2;
        // Two roundings to fp32 instead of one, of sums in another order.
        ck_assert_double_lt(relative_difference(twice, once, model->table.total), 1e-6);
        free(once);
        free(again);
        free(twice);
        model_destroy(model);
    }
}
END_TEST

TEST_MAIN("replay", TEST(recorded_passes_give_the_same_gradients),
          TEST(first_gradients_are_assigned))
