// Similarity as the program measures it, against the definition computed from captured streams.
#include <math.h>
#include "model/similarity.h"
#include "tests/random_source.h"
#include "tests/test.h"

enum { LAYERS = 6, BATCH = 2, LENGTH = 16, BATCHES = 3, HIDDEN = 32 };

typedef struct Fixture {
    Backend *backend;
    TensorSource *source;
    Model *model;
} Fixture;

static const ModelOptions OPTIONS = {.micro_batch = BATCH, .sequence_length = LENGTH};

static Fixture open_fixture(TensorSource *source) {
    Fixture f = {.source = source};
    ck_assert_ok(backend_cpu(1, &f.backend));
    ck_assert_ok(model_create(f.backend, source->config, &OPTIONS, &f.model));
    ck_assert_ok(model_load(f.model, source));
    return f;
}

static void close_fixture(Fixture *f) {
    model_destroy(f->model);
    backend_destroy(f->backend);
    source_close(f->source);
}

// Calibration text: `batches` micro-batches of random ids, the last one of half the size.
typedef struct Text {
    int batches, given;
    int32_t tokens[BATCH * LENGTH];
} Text;

static Status next_batch(void *context, MicroBatch *batch, bool *more) {
    Text *text = context;
    *more = text->given < text->batches;
    if (!*more) return STATUS_OK;
    text->given++;
    for (int i = 0; i < BATCH * LENGTH; i++)
        text->tokens[i] = (int32_t)(random_u64(17, (uint64_t)text->given, (uint64_t)i) % 80);
    int rows = text->given == text->batches ? 1 : BATCH;
    *batch = (MicroBatch){.batch = rows, .sequence_length = LENGTH, .tokens = text->tokens};
    return STATUS_OK;
}

// --- The definition ------------------------------------------------------------------------------

// All streams of all layers of the whole text: what the program must not need to keep.
typedef struct Streams {
    Backend *backend;
    float values[2][LAYERS][BATCHES * BATCH * LENGTH * HIDDEN];
    int64_t tokens; // before this micro-batch
} Streams;

static Status capture(void *context, int layer, ObservePoint point, const void *x, int64_t tokens) {
    Streams *streams = context;
    float *to = streams->values[point][layer] + streams->tokens * HIDDEN;
    return streams->backend->ops->download(streams->backend, to, x,
                                           (size_t)tokens * HIDDEN * sizeof(float));
}

static void capture_all(Model *model, Streams *streams) {
    Text text = {.batches = BATCHES};
    model_set_observer(model, capture, streams);
    for (;;) {
        MicroBatch batch;
        bool more;
        ck_assert_ok(next_batch(&text, &batch, &more));
        if (!more) break;
        ck_assert_ok(model_forward(model, &batch));
        streams->tokens += batch.batch * batch.sequence_length;
    }
    model_set_observer(model, NULL, NULL);
}

static double dot(const float *a, const float *b) {
    double sum = 0;
    for (int i = 0; i < HIDDEN; i++) sum += (double)a[i] * b[i];
    return sum;
}

static double mean_cosine(const Streams *streams, ObservePoint point, int l, int n) {
    const float *a = streams->values[point][l], *b = streams->values[point][l + n];
    double sum = 0;
    for (int64_t t = 0; t < streams->tokens; t++, a += HIDDEN, b += HIDDEN)
        sum += dot(a, b) / sqrt(dot(a, a) * dot(b, b));
    return sum / (double)streams->tokens;
}

static double mean_norm_difference(const Streams *streams, int l, int n) {
    const float *a = streams->values[OBSERVE_MLP_INPUT][l];
    const float *b = streams->values[OBSERVE_MLP_INPUT][l + n];
    double sum = 0;
    for (int64_t t = 0; t < streams->tokens; t++, a += HIDDEN, b += HIDDEN)
        sum += fabs(sqrt(dot(a, a)) - sqrt(dot(b, b))) / sqrt(dot(b, b));
    return sum / (double)streams->tokens;
}

static void assert_definition(const Similarity *s, const Streams *streams) {
    for (int l = 0; l < LAYERS; l++) {
        for (int n = 1; n <= s->max_block; n++) {
            size_t i = similarity_index(s, l, n);
            if (l + n >= LAYERS) {
                ck_assert(isnan(s->s_out[i]) && isnan(s->s_mlp[i]) && isnan(s->d_norm[i]));
                continue;
            }
            // The same fp32 streams, summed in double in another order: rounding of doubles.
            ck_assert_double_eq_tol(s->s_out[i], mean_cosine(streams, OBSERVE_LAYER_OUTPUT, l, n),
                                    1e-12);
            ck_assert_double_eq_tol(s->s_mlp[i], mean_cosine(streams, OBSERVE_MLP_INPUT, l, n),
                                    1e-12);
            ck_assert_double_eq_tol(s->d_norm[i], mean_norm_difference(streams, l, n), 1e-12);
        }
    }
}

START_TEST(measured_values_are_the_definition) {
    ModelConfig config = small_config(LAYERS);
    Fixture f = open_fixture(random_source(&config, 1));
    Streams *streams = calloc(1, sizeof *streams);
    streams->backend = f.backend;
    capture_all(f.model, streams);
    ck_assert_int_eq(streams->tokens, 5 * LENGTH);
    const int blocks[] = {1, 2, LAYERS - 1, LAYERS + 3}; // also more than there are layers
    for (size_t i = 0; i < sizeof blocks / sizeof blocks[0]; i++) {
        Text text = {.batches = BATCHES};
        Similarity s;
        ck_assert_ok(similarity_measure(f.model, blocks[i], next_batch, &text, &s));
        ck_assert_int_eq(s.num_layers, LAYERS);
        ck_assert_int_eq(s.max_block, blocks[i]);
        ck_assert_int_eq(s.tokens, streams->tokens);
        assert_definition(&s, streams);
        similarity_free(&s);
    }
    free(streams);
    close_fixture(&f);
}
END_TEST

// --- Values known beforehand ---------------------------------------------------------------------

// Layers 2 and 3 add nothing to the stream: their output projections are zero.
static Status read_idle_layers(TensorSource *base, const Tensor *tensor, int64_t first,
                               int64_t count, float *out) {
    bool idle = tensor->layer == 2 || tensor->layer == 3;
    if (idle && (tensor->role == ROLE_O_WEIGHT || tensor->role == ROLE_DOWN)) {
        memset(out, 0, (size_t)count * sizeof *out);
        return STATUS_OK;
    }
    return random_source_read_(base, tensor, first, count, out);
}

START_TEST(layers_that_add_nothing_are_the_same) {
    ModelConfig config = small_config(LAYERS);
    TensorSource *source = random_source(&config, 1);
    source->read = read_idle_layers;
    Fixture f = open_fixture(source);
    Text text = {.batches = 1};
    Similarity s;
    ck_assert_ok(similarity_measure(f.model, 2, next_batch, &text, &s));
    size_t same = similarity_index(&s, 1, 2), next = similarity_index(&s, 2, 1);
    // y_1 = y_2 = y_3 and h_2 = h_3 to the bit; cos is 1 up to rounding of a double.
    ck_assert_double_eq_tol(s.s_out[same], 1, 1e-12);
    ck_assert_double_eq_tol(s.s_mlp[next], 1, 1e-12);
    ck_assert_double_eq(s.d_norm[next], 0);
    ck_assert_double_lt(s.s_out[similarity_index(&s, 3, 1)], 0.999);
    similarity_free(&s);
    close_fixture(&f);
}
END_TEST

// --- Failures ------------------------------------------------------------------------------------

static Status read_with_nan(TensorSource *base, const Tensor *tensor, int64_t first, int64_t count,
                            float *out) {
    TRY(random_source_read_(base, tensor, first, count, out));
    if (tensor->layer == 3 && tensor->role == ROLE_O_WEIGHT) out[0] = NAN;
    return STATUS_OK;
}

START_TEST(broken_weights_are_named) {
    ModelConfig config = small_config(LAYERS);
    TensorSource *source = random_source(&config, 1);
    source->read = read_with_nan;
    Fixture f = open_fixture(source);
    Text text = {.batches = 1};
    Similarity s;
    ck_assert_fails(similarity_measure(f.model, 1, next_batch, &text, &s), STATUS_BAD_DATA,
                    "layer 2 or 3 are not finite");
    ck_assert_ptr_null(s.s_out);
    close_fixture(&f);
}
END_TEST

static Status no_batch(void *context, MicroBatch *batch, bool *more) {
    (void)context, (void)batch;
    *more = false;
    return STATUS_OK;
}

static Status broken_batch(void *context, MicroBatch *batch, bool *more) {
    (void)context, (void)batch, (void)more;
    FAIL(STATUS_IO, "the shard is gone");
}

START_TEST(calibration_without_text_is_refused) {
    ModelConfig config = small_config(LAYERS);
    Fixture f = open_fixture(random_source(&config, 1));
    Similarity s;
    ck_assert_fails(similarity_measure(f.model, 1, no_batch, NULL, &s), STATUS_USAGE,
                    "calibration_sequences");
    ck_assert_fails(similarity_measure(f.model, 1, broken_batch, NULL, &s), STATUS_IO,
                    "the shard is gone");
    ck_assert_fails(similarity_measure(f.model, 0, no_batch, NULL, &s), STATUS_USAGE,
                    "blocks of 0");
    close_fixture(&f);
}
END_TEST

START_TEST(memory_is_the_ring_and_the_sums) {
    ModelConfig config = small_config(24);
    ModelOptions options = {.micro_batch = 4, .sequence_length = 128};
    // Two streams of 3 layers, and 24 x 3 pairs of 2 x 2 sums.
    ck_assert_uint_eq(similarity_bytes(&config, &options, DTYPE_BF16, 3),
                      2 * 3 * 4 * 128 * 32 * 2 + 24 * 3 * 4 * 8);
}
END_TEST

TEST_MAIN("similarity", TEST(measured_values_are_the_definition),
          TEST(layers_that_add_nothing_are_the_same), TEST(broken_weights_are_named),
          TEST(calibration_without_text_is_refused), TEST(memory_is_the_ring_and_the_sums))
