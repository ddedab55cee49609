// What a model does besides gradients: statistics, router state, logits, observer, memory, weights.
#include "model/activations.h"
#include "tests/model_fixture.h"

// --- Router state --------------------------------------------------------------------------------

// Global balance with the micro-batch's own shares is micro balance.
START_TEST(global_load_replaces_micro_load) {
    ModelConfig config = fixture_config();
    FixtureBatch batch;
    fixture_batch(&batch, FIXTURE_BATCH, FIXTURE_LENGTH, config.vocab_size);
    LossWeights weights = fixture_weights(&batch.micro);
    weights.balance = 0.5;
    ModelOptions options = fixture_options(true);
    Model *model = fixture_model(&config, &options);
    run_step(model, &batch.micro, &weights);
    float *micro = fixture_gradients(model);

    ModelSums sums;
    float load[4 * 4] = {0};
    ck_assert_ok(model_sums_create(model, &sums));
    ck_assert_ok(model_read_sums(model, &sums));
    for (int i = 0; i < 16; i++) {
        int top_k = config.layers[i / 4].top_k;
        if (top_k) load[i] = (float)(sums.assignments[i] / (sums.tokens * top_k));
    }
    weights.balance_micro = false;
    run_step(model, &batch.micro, &weights);
    float *unset = fixture_gradients(model); // no load yet: no balance gradient
    ck_assert_ok(model_set_load(model, load));
    run_step(model, &batch.micro, &weights);
    float *global = fixture_gradients(model);
    const Tensor *router = tensor_table_find(&model->table, "model.layers.1.mlp.gate.weight");
    ck_assert_ptr_nonnull(router);
    double same =
        relative_difference(global + router->offset, micro + router->offset, router->count);
    double other =
        relative_difference(unset + router->offset, micro + router->offset, router->count);
    ck_assert_double_lt(same, 1e-6); // the share is rounded to fp32 once more
    ck_assert_double_gt(other, 1e-2);
    model_sums_free(&sums);
    free(micro);
    free(unset);
    free(global);
    model_destroy(model);
}
END_TEST

START_TEST(selection_bias_moves_the_choice_only) {
    ModelConfig config = fixture_config();
    FixtureBatch batch;
    fixture_batch(&batch, FIXTURE_BATCH, FIXTURE_LENGTH, config.vocab_size);
    ModelOptions options = fixture_options(false);
    Model *model = fixture_model(&config, &options);
    ModelSums sums, biased;
    ck_assert_ok(model_sums_create(model, &sums));
    ck_assert_ok(model_sums_create(model, &biased));
    ck_assert_ok(model_forward(model, &batch.micro));
    ck_assert_ok(model_read_sums(model, &sums));

    float bias[4 * 4] = {[3 * 4 + 2] = 2.0f}; // layer 3: expert 2 wins whatever p is
    ck_assert_ok(model_set_selection_bias(model, bias));
    ck_assert_ok(model_reset_sums(model));
    ck_assert_ok(model_forward(model, &batch.micro));
    ck_assert_ok(model_read_sums(model, &biased));
    ck_assert_double_lt(sums.assignments[3 * 4 + 2], FIXTURE_TOKENS);
    ck_assert(biased.assignments[3 * 4 + 2] == FIXTURE_TOKENS);
    ck_assert_mem_eq(biased.probability, sums.probability, 16 * sizeof(double));

    ck_assert_ok(model_set_selection_bias(model, NULL));
    ck_assert_ok(model_reset_sums(model));
    ck_assert_ok(model_forward(model, &batch.micro));
    ck_assert_ok(model_read_sums(model, &biased));
    ck_assert_mem_eq(biased.assignments, sums.assignments, 16 * sizeof(double));
    model_sums_free(&sums);
    model_sums_free(&biased);
    model_destroy(model);
}
END_TEST

START_TEST(sums_count_what_was_seen) {
    ModelConfig config = fixture_config();
    FixtureBatch batch;
    fixture_batch(&batch, FIXTURE_BATCH, FIXTURE_LENGTH, config.vocab_size);
    ModelOptions options = fixture_options(false);
    Model *model = fixture_model(&config, &options);
    ModelSums sums;
    ck_assert_ok(model_sums_create(model, &sums));
    ck_assert_ok(model_forward(model, &batch.micro));
    ck_assert_ok(model_forward(model, &batch.micro));
    ck_assert_ok(model_read_sums(model, &sums));
    ck_assert(sums.loss_count == 2 * fixture_targets(&batch.micro));
    ck_assert(sums.tokens == 2 * FIXTURE_TOKENS);
    for (int l = 0; l < config.num_layers; l++) {
        double assignments = 0, probability = 0;
        for (int e = 0; e < sums.stride; e++) {
            assignments += sums.assignments[l * sums.stride + e];
            probability += sums.probability[l * sums.stride + e];
        }
        ck_assert(assignments == 2.0 * FIXTURE_TOKENS * config.layers[l].top_k);
        bool moe = config_layer_is_moe(&config, l);
        // Each token's probabilities add up to 1 within fp32 rounding.
        ck_assert_double_eq_tol(probability, moe ? sums.tokens : 0, 1e-4);
        double most = sums.tokens * log(moe ? config.layers[l].num_experts : 1);
        ck_assert_double_le(sums.entropy[l], most + 1e-6);
        ck_assert(moe == (sums.entropy[l] > 0) && moe == (sums.z[l] > 0));
    }
    MicroBatch no_targets = batch.micro;
    no_targets.targets = NULL;
    double loss_count = sums.loss_count;
    ck_assert_ok(model_forward(model, &no_targets));
    ck_assert_ok(model_read_sums(model, &sums));
    ck_assert(sums.loss_count == loss_count && sums.tokens == 3 * FIXTURE_TOKENS);
    ck_assert_ok(model_reset_sums(model));
    ck_assert_ok(model_read_sums(model, &sums));
    ck_assert(sums.loss_sum == 0 && sums.tokens == 0 && sums.assignments[4] == 0);
    model_sums_free(&sums);
    model_destroy(model);
}
END_TEST

// --- Logits and observer -------------------------------------------------------------------------

// The loss from model_logits is that of the fused loss, and asking for logits leaves no trace.
START_TEST(logits_give_the_loss) {
    ModelConfig config = fixture_config();
    FixtureBatch batch;
    fixture_batch(&batch, 1, FIXTURE_TOKENS, config.vocab_size);
    ModelOptions options = fixture_options(false);
    Model *model = fixture_model(&config, &options);
    float *logits = malloc(FIXTURE_TOKENS * (size_t)config.vocab_size * sizeof *logits);
    model->activations->logits_rows = 5; // several pieces and a rest
    ck_assert_ok(model_forward(model, &batch.micro));
    ModelSums before = fixture_sums(model);
    ck_assert_ok(model_logits(model, batch.tokens, FIXTURE_TOKENS, logits));
    ModelSums after = fixture_sums(model);
    check_equal_sums(&config, &after, &before);
    double found = 0;
    for (int t = 0; t < FIXTURE_TOKENS; t++) {
        const float *row = logits + t * config.vocab_size;
        double sum = 0;
        for (int v = 0; v < config.vocab_size; v++) sum += exp(row[v]);
        if (batch.targets[t] >= 0) found += log(sum) - row[batch.targets[t]];
    }
    // fp32 logits and exponentials
    ck_assert_double_eq_tol(found, before.loss_sum, 1e-5 * before.loss_sum);
    model_sums_free(&after);
    model_sums_free(&before);
    free(logits);
    model_destroy(model);
}
END_TEST

typedef struct Seen {
    int calls;
    float rows[2 * 4][FIXTURE_TOKENS * 20];
} Seen;

static Status see(void *context, int layer, ObservePoint point, const void *x, int64_t tokens) {
    Seen *seen = context;
    // The order is h_0, y_0, h_1, ...
    INVARIANT(seen->calls == 2 * layer + (point == OBSERVE_LAYER_OUTPUT));
    INVARIANT(tokens == FIXTURE_TOKENS);
    TRY(backend->ops->download(backend, seen->rows[seen->calls++], x, sizeof seen->rows[0]));
    return STATUS_OK;
}

static Status refuse(void *context, int layer, ObservePoint point, const void *x, int64_t tokens) {
    (void)context, (void)x, (void)tokens;
    FAIL(STATUS_IO, "observer at layer %d point %d", layer, (int)point);
}

// In evaluation all points are one buffer, in training each has its own: same values.
START_TEST(observer_sees_the_residual_stream) {
    ModelConfig config = fixture_config();
    FixtureBatch batch;
    fixture_batch(&batch, FIXTURE_BATCH, FIXTURE_LENGTH, config.vocab_size);
    Seen *seen[2];
    for (int training = 0; training < 2; training++) {
        ModelOptions options = fixture_options(training);
        Model *model = fixture_model(&config, &options);
        seen[training] = calloc(1, sizeof **seen);
        model_set_observer(model, see, seen[training]);
        ck_assert_ok(model_forward(model, &batch.micro));
        ck_assert_int_eq(seen[training]->calls, 2 * config.num_layers);
        model_set_observer(model, refuse, NULL);
        ck_assert_fails(model_forward(model, &batch.micro), STATUS_IO, "observer at layer 0");
        model_destroy(model);
    }
    ck_assert_mem_eq(seen[0]->rows, seen[1]->rows, sizeof seen[0]->rows);
    ck_assert_mem_ne(seen[0]->rows[6], seen[0]->rows[7], sizeof seen[0]->rows[0]);
    free(seen[0]);
    free(seen[1]);
}
END_TEST

// --- Memory and weights --------------------------------------------------------------------------

static uint64_t allocated_bytes;
static const BackendOps *real_ops;

static Status counting_alloc(Backend *b, size_t bytes, void **out) {
    allocated_bytes += bytes;
    return real_ops->alloc(b, bytes, out);
}

START_TEST(plan_is_what_gets_allocated) {
    use_backend();
    ModelConfig configs[] = {fixture_config(), fixture_config_qwen3()};
    ModelOptions options = fixture_options(true);
    BackendOps ops = *backend->ops;
    real_ops = backend->ops;
    ops.alloc = counting_alloc;
    backend->ops = &ops;
    for (int i = 0; i < 2 * (NUM_RECOMPUTE_MODES + 2); i++) {
        int mode = i / 2;
        options.training = mode <= NUM_RECOMPUTE_MODES;
        if (mode < NUM_RECOMPUTE_MODES)
            options.recompute = recompute_modes[mode];
        else
            options.recompute = (Recompute){0};
        MemoryPlan plan = {0};
        Model *model;
        allocated_bytes = 0;
        ck_assert_ok(model_plan(backend, &configs[i % 2], &options, &plan));
        ck_assert_uint_eq(allocated_bytes, 0);
        ck_assert_ok(model_create(backend, &configs[i % 2], &options, &model));
        ck_assert_uint_eq(allocated_bytes, memory_plan_total(&plan));
        FixtureBatch batch;
        fixture_batch(&batch, FIXTURE_BATCH, FIXTURE_LENGTH, configs[0].vocab_size);
        ck_assert_ok(model_forward(model, &batch.micro));
        ck_assert_uint_eq(allocated_bytes, memory_plan_total(&plan)); // nothing later
        model_destroy(model);
    }
    backend->ops = real_ops;
}
END_TEST

START_TEST(refuses_impossible_options) {
    use_backend();
    ModelConfig config = fixture_config();
    ModelOptions options = fixture_options(true);
    MemoryPlan plan = {0};
    options.micro_batch = 0;
    ck_assert_fails(model_plan(backend, &config, &options, &plan), STATUS_USAGE, "micro_batch 0");
    options.micro_batch = 1 << 20;
    options.sequence_length = 1 << 11;
    ck_assert_fails(model_plan(backend, &config, &options, &plan), STATUS_USAGE,
                    "smaller micro_batch");
    config.hidden_size = 0;
    ck_assert_fails(model_plan(backend, &config, &options, &plan), STATUS_BAD_DATA, "hidden_size");
}
END_TEST

START_TEST(refuses_a_batch_beyond_the_plan) {
    ModelConfig config = fixture_config();
    ModelOptions options = fixture_options(false);
    Model *model = fixture_model(&config, &options);
    FixtureBatch batch;
    fixture_batch(&batch, 3, FIXTURE_LENGTH, config.vocab_size);
    ck_assert_fails(model_forward(model, &batch.micro), STATUS_INTERNAL, "3 x 11 tokens");
    fixture_batch(&batch, 1, FIXTURE_TOKENS, config.vocab_size);
    batch.tokens[7] = config.vocab_size;
    ck_assert_fails(model_forward(model, &batch.micro), STATUS_BAD_DATA, "37");
    model_destroy(model);
}
END_TEST

static void *download_weights(Model *model) {
    size_t bytes = tensor_table_copy_bytes(&model->table, DTYPE_F32, model->table.total);
    void *out = malloc(bytes);
    ck_assert_ok(backend->ops->download(backend, out, model->params, bytes));
    return out;
}

START_TEST(weights_travel_through_sources) {
    ModelConfig config = fixture_config();
    ModelOptions options = fixture_options(false);
    Model *from = fixture_model(&config, &options), *to;
    TensorSource *source;
    ck_assert_ok(model_create(backend, &config, &options, &to));
    ck_assert_ok(model_source(from, &source));
    ck_assert_ok(model_load(to, source));
    void *a = download_weights(from), *b = download_weights(to);
    ck_assert_mem_eq(a, b, (size_t)from->table.total * sizeof(float));
    free(a);
    free(b);
    model_destroy(to);

    ModelConfig wider = config;
    wider.intermediate_size += 4;
    ck_assert_ok(model_create(backend, &wider, &options, &to));
    ck_assert_fails(model_load(to, source), STATUS_BAD_DATA, "mlp.gate_proj.weight has shape");
    model_destroy(to);
    ModelConfig untied = config;
    untied.tie_word_embeddings = false;
    ck_assert_ok(model_create(backend, &untied, &options, &to));
    ck_assert_fails(model_load(to, source), STATUS_BAD_DATA, "tensors");
    model_destroy(to);
    source_close(source);
    model_destroy(from);
}
END_TEST

// On a backend of bf16 weights: training keeps an fp32 master, evaluation only the rounded copy,
// and routers are fp32 in both. Only memory is looked at, so the CPU backend can stand in for one.
START_TEST(bf16_weights_have_an_fp32_master) {
    use_backend();
    backend->compute_dtype = DTYPE_BF16;
    ModelConfig config = fixture_config();
    TensorSource *expected = random_source(&config, 5);
    for (int training = 0; training < 2; training++) {
        ModelOptions options = fixture_options(training);
        Model *model = fixture_model(&config, &options);
        TensorSource *source;
        ck_assert_ok(model_source(model, &source));
        ck_assert_int_eq(source->dtype, training ? DTYPE_F32 : DTYPE_BF16);
        ck_assert_int_eq(model->master != NULL, training);
        for (int i = 0; i < model->table.count; i++) {
            const Tensor *tensor = &model->table.tensors[i];
            bool router = tensor->role == ROLE_ROUTER;
            size_t count = (size_t)tensor->count, width = router ? 4 : 2;
            float *exact = read_tensor(expected, tensor->name, NULL);
            float *found = read_tensor(source, tensor->name, NULL);
            uint16_t *rounded = malloc(count * sizeof *rounded);
            float *widened = malloc(count * sizeof *widened);
            dtype_from_f32(DTYPE_BF16, exact, rounded, count);
            dtype_to_f32(DTYPE_BF16, rounded, widened, count);
            ck_assert_mem_eq(found, training || router ? exact : widened, 4 * count);
            const char *copy = (const char *)model->params +
                               tensor_table_copy_bytes(&model->table, DTYPE_BF16, tensor->offset);
            ck_assert_ok(backend->ops->download(backend, widened, copy, count * width));
            ck_assert_mem_eq(widened, router ? (void *)exact : (void *)rounded, count * width);
            free(exact);
            free(found);
            free(rounded);
            free(widened);
        }
        source_close(source);
        model_destroy(model);
    }
    source_close(expected);
}
END_TEST

START_TEST(random_weights_depend_on_seed_and_name) {
    use_backend();
    ModelConfig small = fixture_config(), large = fixture_config();
    large.num_layers = 5; // other offsets, same names
    large.layers[4] = (LayerConfig){0, 0};
    ModelOptions options = fixture_options(false);
    Model *a, *b;
    ck_assert_ok(model_create(backend, &small, &options, &a));
    ck_assert_ok(model_create(backend, &large, &options, &b));
    ck_assert_ok(model_init_random(a, 11, 0.02f));
    ck_assert_ok(model_init_random(b, 11, 0.02f));
    float *x = download_weights(a), *y = download_weights(b);
    for (int i = 0; i < a->table.count; i++) {
        const Tensor *tensor = &a->table.tensors[i];
        const Tensor *other = tensor_table_find(&b->table, tensor->name);
        ck_assert_mem_eq(x + tensor->offset, y + other->offset,
                         (size_t)tensor->count * sizeof(float));
        double sum = 0, squares = 0, count = (double)tensor->count;
        for (int64_t j = 0; j < tensor->count; j++) {
            double value = x[tensor->offset + j];
            sum += value;
            squares += value * value;
        }
        if (tensor->role == ROLE_NORM)
            ck_assert(sum == count && squares == count);
        else if (tensor->role == ROLE_QKV_BIAS)
            ck_assert(squares == 0);
        else // five standard errors of the sample deviation
            ck_assert_double_eq_tol(sqrt(squares / count), 0.02, 5 * 0.02 / sqrt(2 * count));
    }
    ck_assert_ok(model_init_random(a, 12, 0.02f));
    float *z = download_weights(a);
    ck_assert_mem_ne(x, z, 64 * sizeof(float));
    free(x);
    free(y);
    free(z);
    model_destroy(a);
    model_destroy(b);
}
END_TEST

TEST_MAIN("model", TEST(global_load_replaces_micro_load),
          TEST(selection_bias_moves_the_choice_only), TEST(sums_count_what_was_seen),
          TEST(logits_give_the_loss), TEST(observer_sees_the_residual_stream),
          TEST(plan_is_what_gets_allocated), TEST(refuses_impossible_options),
          TEST(refuses_a_batch_beyond_the_plan), TEST(weights_travel_through_sources),
          TEST(bf16_weights_have_an_fp32_master), TEST(random_weights_depend_on_seed_and_name))
