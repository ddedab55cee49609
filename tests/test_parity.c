// Parity with PyTorch and Hugging Face transformers: loss, logits, the gradient of every parameter
// and one AdamW step, on the models that scripts/make_goldens.py wrote to tests/goldens/.
//
// "Within 1e-4" is max |ours - theirs| <= 1e-4 * max |theirs| over a tensor. Both sides compute in
// fp32 and round in another order; what is found is around 1e-6. Built a second time as
// test_gpu_parity, the same holds for the GPU backend in fp32 mode (no TF32).
#include "model/hf.h"
#include "model/safetensors.h"
#include "optim/optimizer.h"
#include "tests/model_fixture.h"

enum { BATCH = 2, LENGTH = 21, TOKENS = BATCH * LENGTH };
static const double TOLERANCE = 1e-4;

typedef struct Golden {
    SafetensorsFile file;
    Model *model;
    FixtureBatch batch;
    LossWeights weights;
} Golden;

static float *golden_tensor(const Golden *golden, const char *prefix, const char *name,
                            int64_t count) {
    char full[TENSOR_NAME_MAX + 16];
    snprintf(full, sizeof full, "%s%s", prefix, name);
    const SafetensorsEntry *entry = safetensors_find(&golden->file, full);
    ck_assert_msg(entry != NULL, "%s has no %s", golden->file.path, full);
    ck_assert_uint_eq(entry->count, (uint64_t)count);
    float *values = malloc((size_t)count * sizeof *values);
    ck_assert_ok(safetensors_read(&golden->file, entry, 0, entry->count, values));
    return values;
}

static double golden_scalar(const Golden *golden, const char *name) {
    float *value = golden_tensor(golden, name, "", 1);
    double out = *value;
    free(value);
    return out;
}

// The golden's tokens; targets are the next tokens of each row.
static void golden_batch(Golden *golden) {
    FixtureBatch *b = &golden->batch;
    float *tokens = golden_tensor(golden, "tokens", "", TOKENS);
    for (int i = 0; i < TOKENS; i++) b->tokens[i] = (int32_t)tokens[i];
    for (int i = 0; i < TOKENS; i++)
        b->targets[i] = i % LENGTH == LENGTH - 1 ? -1 : b->tokens[i + 1];
    b->micro = (MicroBatch){BATCH, LENGTH, b->tokens, b->targets, NULL};
    free(tokens);
}

static void golden_open(Golden *golden, const char *name) {
    char directory[IO_PATH_MAX], path[IO_PATH_MAX];
    TensorSource *source;
    use_backend();
    ck_assert_ok(io_path(directory, "%s/tests/goldens/%s", TEST_SOURCE_DIR, name));
    ck_assert_ok(io_path(path, "%s/golden.safetensors", directory));
    ck_assert_ok(safetensors_open(path, &golden->file));
    ck_assert_ok(hf_open(directory, &source));
    ModelOptions options = {.micro_batch = BATCH, .sequence_length = LENGTH, .training = true};
    ck_assert_ok(model_create(backend, source->config, &options, &golden->model));
    ck_assert_ok(model_load(golden->model, source));
    source_close(source);
    golden_batch(golden);
    golden->weights = fixture_weights(&golden->batch.micro);
}

static void golden_close(Golden *golden) {
    model_destroy(golden->model);
    safetensors_close(&golden->file);
}

static void check_tensor(const char *what, const char *name, const float *found,
                         const float *expected, int64_t count) {
    double difference = relative_difference(found, expected, count);
    ck_assert_msg(difference <= TOLERANCE, "%s %s: relative difference %.3g", what, name,
                  difference);
}

static void check_logits(Golden *golden) {
    int64_t vocab = golden->model->config.vocab_size;
    float *found = malloc((size_t)(TOKENS * vocab) * sizeof *found);
    float *expected = golden_tensor(golden, "logits", "", TOKENS * vocab);
    for (int row = 0; row < BATCH; row++)
        ck_assert_ok(model_logits(golden->model, golden->batch.tokens + row * LENGTH, LENGTH,
                                  found + row * LENGTH * vocab));
    check_tensor("logits", "", found, expected, TOKENS * vocab);
    free(found);
    free(expected);
}

static void check_loss(Golden *golden) {
    ModelSums sums;
    ck_assert_ok(model_sums_create(golden->model, &sums));
    ck_assert_ok(model_read_sums(golden->model, &sums));
    double entropy = sums.loss_sum / sums.loss_count;
    double loss = fixture_loss(golden->model, &sums, &golden->weights);
    double expected = golden_scalar(golden, "loss");
    ck_assert_double_eq_tol(entropy, golden_scalar(golden, "cross_entropy"), TOLERANCE * entropy);
    ck_assert_double_eq_tol(loss, expected, TOLERANCE * expected);
    model_sums_free(&sums);
}

static void check_gradients(Golden *golden) {
    const TensorTable *table = &golden->model->table;
    for (int i = 0; i < table->count; i++) {
        const Tensor *tensor = &table->tensors[i];
        float *found = fixture_gradient(golden->model, tensor);
        float *expected = golden_tensor(golden, "grad.", tensor->name, tensor->count);
        check_tensor("gradient of", tensor->name, found, expected, tensor->count);
        free(found);
        free(expected);
    }
}

// The first AdamW step moves an element by lr * g / (|g| + ε'), ε' = ε times the clipping factor's
// inverse: where |g| is far above ε the step is lr times the sign of g on both sides. Comparing the
// step itself (in units of lr) sees an error that a comparison of the parameters would hide, since
// they are a thousand times larger than lr.
static void check_adamw(Golden *golden) {
    const double lr = 1e-4;
    const OptimizerOptions options = {0.9, 0.95, 1e-8, 0.1, 1.0, false, DTYPE_F32};
    const TensorTable *table = &golden->model->table;
    Optimizer *optimizer;
    TensorSource *source;
    double norm, expected_norm = golden_scalar(golden, "grad_norm");
    ck_assert_ok(model_source(golden->model, &source));
    ck_assert_ok(optimizer_create(golden->model, &options, NULL, &optimizer));
    ck_assert_ok(optimizer_gradient_norm(optimizer, &norm));
    ck_assert_double_eq_tol(norm, expected_norm, TOLERANCE * expected_norm);
    ck_assert_double_gt(norm, 1.0); // clipping takes part
    ck_assert_ok(optimizer_step(optimizer, lr, norm));
    for (int i = 0; i < table->count; i++) {
        const Tensor *tensor = &table->tensors[i];
        float *gradient = golden_tensor(golden, "grad.", tensor->name, tensor->count);
        float *expected = golden_tensor(golden, "adamw.", tensor->name, tensor->count);
        float *found = read_tensor(source, tensor->name, NULL);
        check_tensor("AdamW step of", tensor->name, found, expected, tensor->count);
        for (int64_t j = 0; j < tensor->count; j++) {
            // 1e-6 after clipping is 100 ε; the parameters' own rounding (values up to 2) is
            // 1.2e-7, which is 1.2e-3 lr.
            if (fabs(gradient[j] / norm) < 1e-6) continue;
            double difference = fabs((double)found[j] - expected[j]) / lr;
            ck_assert_msg(difference <= 1e-2, "%s[%lld]: the step differs by %.3g lr (gradient %g)",
                          tensor->name, (long long)j, difference, (double)gradient[j]);
        }
        free(gradient);
        free(expected);
        free(found);
    }
    source_close(source);
    optimizer_destroy(optimizer);
}

// Every tensor in the golden belongs to a tensor of the model: nothing is compared by half.
static void check_coverage(const Golden *golden) {
    size_t per_tensor = 0;
    for (size_t i = 0; i < golden->file.header.count; i++)
        per_tensor += strncmp(golden->file.header.entries[i].name, "grad.", 5) == 0;
    ck_assert_uint_eq(per_tensor, (size_t)golden->model->table.count);
}

static void check_case(const char *name, double balance, double z) {
    Golden golden;
    golden_open(&golden, name);
    golden.weights.balance = balance; // CASES of scripts/make_goldens.py
    golden.weights.z = z;
    check_coverage(&golden);
    check_logits(&golden);
    run_step(golden.model, &golden.batch.micro, &golden.weights);
    check_loss(&golden);
    check_gradients(&golden);
    check_adamw(&golden);
    golden_close(&golden);
}

START_TEST(qwen2) {
    check_case("qwen2", 0, 0);
}
END_TEST

START_TEST(llama) {
    check_case("llama", 0, 0);
}
END_TEST

START_TEST(qwen3) {
    check_case("qwen3", 0, 0);
}
END_TEST

START_TEST(qwen2_moe_softmax) {
    check_case("qwen2_moe_softmax", 0, 0);
}
END_TEST

START_TEST(qwen2_moe_renorm) {
    check_case("qwen2_moe_renorm", 0.05, 0.01);
}
END_TEST

// Straight-through gates have the values of renormalised ones; only the routers' gradients differ.
START_TEST(straight_through_has_the_values_of_renorm) {
    Golden golden;
    golden_open(&golden, "qwen2_moe_renorm");
    golden.model->config.router.gate = GATE_STRAIGHT_THROUGH;
    check_logits(&golden);
    golden_close(&golden);
}
END_TEST

TEST_MAIN("parity", TEST(qwen2), TEST(llama), TEST(qwen3), TEST(qwen2_moe_softmax),
          TEST(qwen2_moe_renorm), TEST(straight_through_has_the_values_of_renorm))
