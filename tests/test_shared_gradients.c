// Gradients that no rank has whole (ZeRO-2): what their owners end up with is what one model with
// room for all of them computes.
#include "model/gradient_window.h"
#include "optim/traffic.h"
#include "tests/lazy_communicator.h"
#include "tests/model_fixture.h"
#include "tests/ranks.h"

static const CommunicatorOptions comm_options = {.timeout_seconds = 20};

enum { MICRO_BATCHES = 3 };

// Layers of three layouts share two places, and one more in the middle is dense.
static ModelConfig mixed_config(bool tied) {
    ModelConfig c = tied ? fixture_config() : fixture_config_qwen3();
    c.num_layers = 6;
    c.layers[4] = (LayerConfig){2, 1};
    c.layers[5] = (LayerConfig){0};
    return c;
}

static void batch_of(int rank, int number, const ModelConfig *config, FixtureBatch *out) {
    fixture_batch(out, FIXTURE_BATCH, FIXTURE_LENGTH, config->vocab_size);
    for (int i = 0; i < FIXTURE_TOKENS; i++)
        out->tokens[i] = (out->tokens[i] + 5 * rank + 11 * number + i) % config->vocab_size;
}

// The sum over all micro-batches of all ranks, in one model's arena.
static float *whole_gradients(const ModelConfig *config, int world, Model **out) {
    ModelOptions options = fixture_options(true);
    Model *model = fixture_model(config, &options);
    FixtureBatch batch;
    ck_assert_ok(model_zero_gradients(model));
    for (int rank = 0; rank < world; rank++) {
        for (int i = 0; i < MICRO_BATCHES; i++) {
            batch_of(rank, i, config, &batch);
            LossWeights weights = fixture_weights(&batch.micro);
            ck_assert_ok(model_forward_backward(model, &batch.micro, &weights));
        }
    }
    *out = model;
    return fixture_gradients(model);
}

static Status check_owned(const Traffic *traffic, const Model *whole, const float *gradients) {
    const Partition *p = &traffic->partition;
    const TensorTable *table = &traffic->model->table;
    for (int b = 0; b < p->count; b++) {
        for (int64_t i = 0; i < p->buckets[b].part; i++) {
            int64_t element = partition_begin(p, b) + i;
            float got = traffic->sums[p->buckets[b].state + i], expected = 0, scale = 0;
            for (int t = 0; t < table->count; t++) {
                const Tensor *tensor = &table->tensors[t], *theirs = &whole->table.tensors[t];
                int64_t inside = element - tensor->offset;
                if (inside < 0 || inside >= tensor->count) continue;
                expected = gradients[theirs->offset + inside];
                // fp32 sums of the same numbers in another order.
                for (int64_t j = 0; j < theirs->count; j++)
                    scale = fmaxf(scale, fabsf(gradients[theirs->offset + j]));
            }
            // Gaps, where expected and scale are 0, are exactly 0.
            EXPECT(fabsf(got - expected) <= 2e-6f * scale, "element %lld: %g, expected %g",
                   (long long)element, (double)got, (double)expected);
        }
    }
    return STATUS_OK;
}

typedef struct Case {
    bool tied, lazy;
    int64_t bucket_bytes;
} Case;

static Status run_steps(Communicator *c, const Case *what) {
    const ModelConfig config = mixed_config(what->tied);
    ModelOptions options = fixture_options(true);
    Model *model, *whole;
    Traffic *traffic;
    TRY(backend_cpu(1, &backend)); // the fixture's: ranks share the cores
    float *expected = whole_gradients(&config, c->world, &whole);
    options.ranks = c->world;
    options.share_gradients = true;
    options.recompute.layer = what->lazy;
    model = fixture_model(&config, &options);
    EXPECT(model_gradient_bytes(model, model->table.total) <
           tensor_table_copy_bytes(&whole->table, DTYPE_F32, whole->table.total));
    TRY(traffic_create(c, NULL, model, what->bucket_bytes, &traffic));
    for (int step = 0; step < 2; step++) {
        for (int i = 0; i < MICRO_BATCHES; i++) {
            FixtureBatch batch;
            batch_of(c->rank, i, &config, &batch);
            LossWeights weights = fixture_weights(&batch.micro);
            TRY(model_zero_gradients(model));
            model->hooks = traffic_hooks(traffic, i == 0, i == MICRO_BATCHES - 1);
            TRY(model_forward_backward(model, &batch.micro, &weights));
            model->hooks = NULL;
            TRY(traffic_reduce(traffic));
        }
        TRY(check_owned(traffic, whole, expected)); // the second step has forgotten the first
    }
    traffic_destroy(traffic);
    model_destroy(model);
    model_destroy(whole);
    free(expected);
    backend_destroy(backend);
    return STATUS_OK;
}

static Status run_case(Communicator *c, void *context) {
    const Case *what = context;
    if (!what->lazy) return run_steps(c, what);
    LazyCommunicator *lazy = lazy_communicator(c);
    Status status = run_steps(&lazy->base, what);
    communicator_destroy(&lazy->base);
    return status;
}

START_TEST(owners_end_up_with_the_sums) {
    for (int i = 0; i < 8; i++) {
        Case what = {.tied = i & 1, .lazy = i & 2, .bucket_bytes = i & 4 ? 1024 : 1 << 20};
        for (int world = 2; world <= 3; world++)
            ranks_expect_ok(world, &comm_options, run_case, &what);
    }
}
END_TEST

START_TEST(places_of_neighbouring_layers_do_not_overlap) {
    for (int tied = 0; tied < 2; tied++) {
        ModelConfig config = mixed_config(tied);
        const TableLayout layout = {.section = 3 * TENSOR_ALIGN};
        TensorTable table;
        ck_assert_ok(tensor_table_build_layout(&config, &layout, &table));
        ck_assert_ok(tensor_table_pad(&table, 3));
        const GradientWindow window = gradient_window(&table);
        const size_t total = gradient_bytes(&table, &window, DTYPE_BF16, table.total);
        for (int a = 0; a < table.count; a++) {
            const Tensor *x = &table.tensors[a];
            size_t width = x->role == ROLE_ROUTER ? 4 : 2;
            size_t begin = gradient_bytes(&table, &window, DTYPE_BF16, x->offset);
            size_t end = begin + (size_t)x->count * width;
            ck_assert(end <= total);
            for (int b = 0; b < a; b++) {
                const Tensor *y = &table.tensors[b];
                size_t other = gradient_bytes(&table, &window, DTYPE_BF16, y->offset);
                size_t other_end = other + (size_t)y->count * (y->role == ROLE_ROUTER ? 4 : 2);
                bool both = x->offset < table.vectors_begin && y->offset < table.vectors_begin &&
                            x->layer >= 0 && y->layer >= 0;
                bool may_overlap = both && x->layer != y->layer && (x->layer - y->layer) % 2 == 0;
                ck_assert_msg(may_overlap || begin >= other_end || end <= other, "%s and %s",
                              x->name, y->name);
            }
        }
        // Only layers come and go, two at a time.
        int64_t first = table.layers[0].qkv_weight;
        int64_t behind = tied ? table.vectors_begin : table.lm_head;
        ck_assert_uint_eq(total, tensor_table_copy_bytes(&table, DTYPE_BF16, table.total) -
                                     2 * (size_t)(behind - first - 2 * window.layer));
        tensor_table_free(&table);
    }
}
END_TEST

TEST_MAIN("shared gradients", TEST(owners_end_up_with_the_sums),
          TEST(places_of_neighbouring_layers_do_not_overlap))
