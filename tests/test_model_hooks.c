// What a pass tells while it runs is true: weights are not read before they are asked for, and
// gradients that are called final do not move any more.
#include "tests/model_fixture.h"

// Weights arrive when they are asked for, from a copy; until then they are NaN.
typedef struct Arrival {
    Model *model;
    float *weights; // (total) on the host
    int64_t here;   // matrices up to this element have arrived; 0 = nothing
    int calls;
} Arrival;

static void put(Model *model, const float *from, int64_t begin, int64_t end) {
    ck_assert_ok(backend->ops->upload(backend, (float *)model->params + begin, from + begin,
                                      (size_t)(end - begin) * sizeof(float)));
}

static Status arrive(void *context, int64_t end) {
    Arrival *a = context;
    const TensorTable *table = &a->model->table;
    if (a->here == 0) put(a->model, a->weights, table->vectors_begin, table->total);
    if (end > a->here) put(a->model, a->weights, a->here, end);
    ck_assert_int_ge(end, a->here); // never backwards
    a->here = end;
    a->calls++;
    return STATUS_OK;
}

// Copies of what was called final, to compare with the end.
typedef struct Finals {
    Model *model;
    int64_t from[64];
    float *copies[64];
    int calls;
} Finals;

static Status note(void *context, int64_t from) {
    Finals *f = context;
    ck_assert_int_lt(f->calls, 64);
    if (f->calls > 0) ck_assert_int_lt(from, f->from[f->calls - 1]);
    f->copies[f->calls] = fixture_gradients(f->model);
    f->from[f->calls++] = from;
    return STATUS_OK;
}

static float *run(Model *model, const ModelHooks *hooks) {
    FixtureBatch batch;
    fixture_batch(&batch, FIXTURE_BATCH, FIXTURE_LENGTH, model->config.vocab_size);
    LossWeights weights = fixture_weights(&batch.micro);
    ck_assert_ok(model_zero_gradients(model));
    ck_assert_ok(model_forward_backward(model, &batch.micro, &weights));
    model->hooks = hooks;
    ck_assert_ok(model_forward_backward(model, &batch.micro, &weights));
    model->hooks = NULL;
    return fixture_gradients(model);
}

static void check_hooks(const ModelConfig *config, const ModelOptions *options) {
    Model *model = fixture_model(config, options);
    const TensorTable *table = &model->table;
    const size_t bytes = (size_t)table->total * sizeof(float);
    float *plain = run(model, NULL), *nan = malloc(bytes);
    Arrival arrival = {.model = model, .weights = malloc(bytes)};
    Finals finals = {.model = model};
    ck_assert_ok(backend->ops->download(backend, arrival.weights, model->params, bytes));
    ck_assert_ok(backend->ops->synchronize(backend));
    for (int64_t i = 0; i < table->total; i++) nan[i] = NAN;

    const ModelHooks gradients = {.context = &finals, .gradients_final = note};
    float *hooked = run(model, &gradients);
    ck_assert_mem_eq(hooked, plain, bytes);
    ck_assert_int_eq(finals.from[finals.calls - 1], 0);
    ck_assert_int_ge(finals.calls, 2 * config->num_layers);
    for (int i = 0; i < finals.calls; i++) {
        int64_t from = finals.from[i], end = from == 0 ? table->total : table->vectors_begin;
        ck_assert_mem_eq(finals.copies[i] + from, plain + from, (size_t)(end - from) * 4);
        free(finals.copies[i]);
    }
    free(hooked);

    FixtureBatch batch;
    fixture_batch(&batch, FIXTURE_BATCH, FIXTURE_LENGTH, config->vocab_size);
    LossWeights weights = fixture_weights(&batch.micro);
    const ModelHooks needed = {.context = &arrival, .weights_needed = arrive};
    ck_assert_ok(model_zero_gradients(model));
    ck_assert_ok(model_forward_backward(model, &batch.micro, &weights));
    put(model, nan, 0, table->total);
    model->hooks = &needed;
    ck_assert_ok(model_forward_backward(model, &batch.micro, &weights));
    model->hooks = NULL;
    hooked = fixture_gradients(model);
    ck_assert_mem_eq(hooked, plain, bytes);
    ck_assert_int_gt(arrival.calls, config->num_layers);
    free(hooked);
    free(plain);
    free(nan);
    free(arrival.weights);
    model_destroy(model);
}

START_TEST(hooks_tell_the_truth) {
    ModelConfig tied = fixture_config(), untied = fixture_config_qwen3();
    ModelOptions options = fixture_options(true);
    check_hooks(&tied, &options);
    check_hooks(&untied, &options);
    options.ranks = 3;
    check_hooks(&untied, &options);
    options.recompute = (Recompute){.layer = true};
    check_hooks(&tied, &options);
}
END_TEST

TEST_MAIN("model hooks", TEST(hooks_tell_the_truth))
