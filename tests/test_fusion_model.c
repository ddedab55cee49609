// Function preservation: what a fused model computes, against the dense model it came from.
//
// A layer of copies does the dense layer's arithmetic, but BLAS may round an element of a product
// differently when the product has another number of rows, and a router decides how many rows an
// expert gets. So equality to the bit is asked where the products have the same rows on both sides:
// for single tokens with any router, and for a sequence whose tokens all go to one expert. (One
// thread: with more, dense and expert products are also cut differently.) A sequence that is
// spread over experts is compared within that rounding, TOLERANCE: products of 32 and 48 terms of
// order 10 at most, 2^-24 relative per rounding, give about 1e-6 per layer; 1e-4 leaves room for
// five layers and for other BLAS kernels.
#include <math.h>
#include "model/fusion.h"
#include "model/model.h"
#include "tests/random_source.h"
#include "tests/test.h"

enum { LAYERS = 5, TOKENS = 24, VOCAB = 80 };
static const double TOLERANCE = 1e-4;

typedef struct Runner {
    Backend *backend;
    Model *model;
} Runner;

// Sends all tokens of each layer to one expert. A probability is at most 1, so a bias of 2 decides.
static void force(Model *model, const int *experts) {
    int stride = model_sums_stride(model);
    float *bias = calloc((size_t)(model->config.num_layers * stride), sizeof *bias);
    for (int l = 0; l < model->config.num_layers; l++) bias[l * stride + experts[l]] = 2;
    ck_assert_ok(model_set_selection_bias(model, bias));
    free(bias);
}

static Runner open_runner(TensorSource *source, const int *experts) {
    const ModelOptions options = {.micro_batch = 1, .sequence_length = TOKENS};
    Runner r;
    ck_assert_ok(backend_cpu(1, &r.backend));
    ck_assert_ok(model_create(r.backend, source->config, &options, &r.model));
    ck_assert_ok(model_load(r.model, source));
    if (experts) force(r.model, experts);
    return r;
}

static void close_runner(Runner *r) {
    model_destroy(r->model);
    backend_destroy(r->backend);
}

// Logits (TOKENS, VOCAB) of one sequence, every layer's tokens going to experts[layer] unless that
// is NULL. malloc'ed.
static float *sequence_logits(TensorSource *source, const int *experts) {
    float *logits = malloc(TOKENS * VOCAB * sizeof *logits);
    int32_t ids[TOKENS];
    for (int i = 0; i < TOKENS; i++) ids[i] = (int32_t)(random_u64(5, 0, (uint64_t)i) % VOCAB);
    Runner r = open_runner(source, experts);
    ck_assert_ok(model_logits(r.model, ids, TOKENS, logits));
    close_runner(&r);
    return logits;
}

// Logits (VOCAB, VOCAB) of every token by itself. malloc'ed.
static float *token_logits(TensorSource *source) {
    float *logits = malloc(VOCAB * VOCAB * sizeof *logits);
    Runner r = open_runner(source, NULL);
    for (int32_t id = 0; id < VOCAB; id++)
        ck_assert_ok(model_logits(r.model, &id, 1, logits + id * VOCAB));
    close_runner(&r);
    return logits;
}

static double largest(const float *values, int count) {
    double most = 0;
    for (int i = 0; i < count; i++) most = fmax(most, fabs(values[i]));
    return most;
}

// Frees both.
static void assert_close(float *values, float *expected, int count, double tolerance) {
    for (int i = 0; i < count; i++) {
        double difference = fabs((double)values[i] - expected[i]);
        ck_assert_msg(difference <= tolerance, "logit %d: %.9g, expected %.9g within %g", i,
                      values[i], expected[i], tolerance);
    }
    ck_assert_double_gt(largest(expected, count), 0.5); // the comparison is about something
    free(values);
    free(expected);
}

static bool logits_differ(TensorSource *a, TensorSource *b) {
    float *one = sequence_logits(a, NULL), *other = sequence_logits(b, NULL);
    for (int i = 0; i < TOKENS * VOCAB; i++) one[i] -= other[i];
    double difference = largest(one, TOKENS * VOCAB);
    free(one);
    free(other);
    return difference > 100 * TOLERANCE;
}

static FusionPlan plan_of(int top_k, RouterGate gate) {
    return (FusionPlan){.num_source_layers = LAYERS,
                        .num_experts = 4,
                        .top_k = top_k,
                        .follower_copies = 2,
                        .elsewhere_copies = true,
                        .router_std = 0.5, // far from uniform: the claim is for any router
                        .seed = 2,
                        .router = {.gate = gate, .gate_scale = 1}};
}

// --- No block: the seed model --------------------------------------------------------------------

typedef struct Pair {
    TensorSource *dense, *fused;
} Pair;

static Pair open_pair(const FusionPlan *plan) {
    ModelConfig config = small_config(LAYERS);
    Pair pair = {.dense = random_source(&config, 9)};
    ck_assert_ok(fusion_source(plan, pair.dense, &pair.fused));
    return pair;
}

static void close_pair(Pair *pair) {
    source_close(pair->fused);
    source_close(pair->dense);
}

// With k = 1 the straight-through gate is exactly 1.
START_TEST(one_copy_per_token_is_the_dense_model_to_the_bit) {
    for (int raw = 0; raw <= 1; raw++) {
        FusionPlan plan = plan_of(1, GATE_STRAIGHT_THROUGH);
        plan.router.input_is_raw = raw;
        Pair pair = open_pair(&plan);
        assert_close(token_logits(pair.fused), token_logits(pair.dense), VOCAB * VOCAB, 0);
        const int experts[LAYERS] = {3, 0, 2, 1, 3};
        assert_close(sequence_logits(pair.fused, experts), sequence_logits(pair.dense, NULL),
                     TOKENS * VOCAB, 0);
        assert_close(sequence_logits(pair.fused, NULL), sequence_logits(pair.dense, NULL),
                     TOKENS * VOCAB, TOLERANCE);
        close_pair(&pair);
    }
}
END_TEST

static void assert_no_block_keeps_the_seed(int top_k, RouterGate gate, bool raw) {
    FusionPlan plan = plan_of(top_k, gate);
    plan.router.input_is_raw = raw;
    Pair pair = open_pair(&plan);
    assert_close(sequence_logits(pair.fused, NULL), sequence_logits(pair.dense, NULL),
                 TOKENS * VOCAB, TOLERANCE);
    close_pair(&pair);
}

// The k gates p_j / Σp sum to 1 only up to rounding, and the k outputs are rounded before they are
// added: of the same order as what TOLERANCE is for.
START_TEST(several_copies_per_token_are_the_dense_model) {
    assert_no_block_keeps_the_seed(2, GATE_RENORM, false);
    assert_no_block_keeps_the_seed(4, GATE_RENORM, false);
    assert_no_block_keeps_the_seed(3, GATE_STRAIGHT_THROUGH, true);
}
END_TEST

// The paper's gate scales every MLP by p ~ 1/N; with all N experts on, the p sum to 1 again.
START_TEST(the_softmax_gate_keeps_the_seed_only_with_all_experts) {
    FusionPlan plan = plan_of(1, GATE_SOFTMAX);
    Pair pair = open_pair(&plan);
    ck_assert(logits_differ(pair.fused, pair.dense));
    close_pair(&pair);
    assert_no_block_keeps_the_seed(4, GATE_SOFTMAX, false);
}
END_TEST

// gate_scale = N/k makes up for p ~ 1/N, exactly when the router is indifferent.
START_TEST(gate_scale_restores_the_size_of_the_output) {
    FusionPlan plan = plan_of(1, GATE_SOFTMAX);
    plan.router_std = 0;
    plan.router.gate_scale = 4;
    Pair pair = open_pair(&plan);
    assert_close(sequence_logits(pair.fused, NULL), sequence_logits(pair.dense, NULL),
                 TOKENS * VOCAB, TOLERANCE);
    close_pair(&pair);
}
END_TEST

START_TEST(reinit_breaks_the_copies) {
    FusionPlan plan = plan_of(1, GATE_STRAIGHT_THROUGH);
    plan.reinit_ratio = 0.5;
    Pair pair = open_pair(&plan);
    ck_assert(logits_differ(pair.fused, pair.dense));
    close_pair(&pair);
}
END_TEST

// --- A block -------------------------------------------------------------------------------------

// A dense model of LAYERS - 1 layers whose layer t has attention and norms of source layer
// `attention[t]` and the MLP of `mlp[t]`: the reference for a fused block, without fusion code.
typedef struct Spliced {
    TensorSource base;
    ModelConfig config;
    TensorTable table;
    TensorSource *source;
    const int *attention, *mlp;
} Spliced;

static Status spliced_read(TensorSource *base, const Tensor *tensor, int64_t first, int64_t count,
                           float *out) {
    Spliced *spliced = (Spliced *)base;
    char name[2 * TENSOR_NAME_MAX];
    bool mlp = strstr(tensor->name, ".mlp.") != NULL;
    if (tensor->layer < 0)
        snprintf(name, sizeof name, "%s", tensor->name);
    else
        snprintf(name, sizeof name, "model.layers.%d%s",
                 (mlp ? spliced->mlp : spliced->attention)[tensor->layer],
                 strchr(tensor->name + strlen("model.layers."), '.'));
    const Tensor *from = tensor_table_find(spliced->source->table, name);
    return spliced->source->read(spliced->source, from, first, count, out);
}

static void spliced_close(TensorSource *base) {
    tensor_table_free(&((Spliced *)base)->table);
    free(base);
}

static TensorSource *splice(TensorSource *source, const int *attention, const int *mlp) {
    Spliced *spliced = calloc(1, sizeof *spliced);
    spliced->config = *source->config;
    spliced->config.num_layers = LAYERS - 1;
    spliced->source = source;
    spliced->attention = attention;
    spliced->mlp = mlp;
    ck_assert_ok(tensor_table_build(&spliced->config, &spliced->table));
    spliced->base = (TensorSource){.config = &spliced->config,
                                   .table = &spliced->table,
                                   .read = spliced_read,
                                   .close = spliced_close};
    return &spliced->base;
}

// Block 1+1 of five layers: with the router forced to expert e, the fused layer is layer 1's
// attention and the MLP of layer 1 (e < K = 2) or of layer 2. To the bit, as all tokens of a layer
// go to one expert.
static void assert_block(int expert, int mlp_layer) {
    const int attention[LAYERS - 1] = {0, 1, 3, 4};
    const int mlp[LAYERS - 1] = {0, mlp_layer, 3, 4};
    for (int copies = 0; copies <= 1; copies++) {
        FusionPlan plan = plan_of(1, GATE_STRAIGHT_THROUGH);
        plan.num_blocks = 1;
        plan.blocks[0] = (FusionBlock){.base = 1, .followers = 1, .score = NAN};
        plan.elsewhere_copies = copies;
        Pair pair = open_pair(&plan);
        TensorSource *expected = splice(pair.dense, attention, mlp);
        const int experts[LAYERS - 1] = {0, expert, 0, 0};
        assert_close(sequence_logits(pair.fused, experts), sequence_logits(expected, NULL),
                     TOKENS * VOCAB, 0);
        source_close(expected);
        close_pair(&pair);
    }
}

START_TEST(a_block_forced_to_a_base_expert_is_the_base_layer) {
    assert_block(0, 1);
    assert_block(1, 1);
}
END_TEST

START_TEST(a_block_forced_to_a_follower_has_the_follower_s_mlp) {
    assert_block(2, 2);
    assert_block(3, 2);
}
END_TEST

TEST_MAIN("fusion_model", TEST(one_copy_per_token_is_the_dense_model_to_the_bit),
          TEST(several_copies_per_token_are_the_dense_model),
          TEST(the_softmax_gate_keeps_the_seed_only_with_all_experts),
          TEST(gate_scale_restores_the_size_of_the_output), TEST(reinit_breaks_the_copies),
          TEST(a_block_forced_to_a_base_expert_is_the_base_layer),
          TEST(a_block_forced_to_a_follower_has_the_follower_s_mlp))
