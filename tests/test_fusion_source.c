// Surgery as a view: which source tensor each fused tensor is, what is drawn anew, and that a value
// does not depend on how it is read.
#include <math.h>
#include "model/fusion.h"
#include "tests/random_source.h"
#include "tests/test.h"

enum { NAME_MAX_BYTES = 2 * TENSOR_NAME_MAX };

// Blocks 1+1 and 4+2 of 8 layers: 5 layers of 7 experts are left.
static FusionPlan example(void) {
    return (FusionPlan){.num_source_layers = 8,
                        .num_blocks = 2,
                        .blocks = {{1, 1, 0.9}, {4, 2, 0.8}},
                        .num_experts = 7,
                        .top_k = 1,
                        .follower_copies = 2,
                        .elsewhere_copies = true,
                        .router_std = 0.02,
                        .seed = 11,
                        .router = {.gate = GATE_STRAIGHT_THROUGH, .gate_scale = 1}};
}
// What the fused layers are made of, by hand: base layer, and the MLP's layer of each expert.
enum { TARGET_LAYERS = 5 };
static const int BASE[TARGET_LAYERS] = {0, 1, 3, 4, 7};
static const int MLP[TARGET_LAYERS][7] = {{0, 0, 0, 0, 0, 0, 0},
                                          {1, 1, 1, 1, 1, 2, 2},
                                          {3, 3, 3, 3, 3, 3, 3},
                                          {4, 4, 4, 5, 5, 6, 6},
                                          {7, 7, 7, 7, 7, 7, 7}};

typedef struct Fixture {
    TensorSource *dense, *fused;
} Fixture;

static Fixture open_fixture(const FusionPlan *plan, const ModelConfig *config) {
    Fixture f = {.dense = random_source(config, 3)};
    ck_assert_ok(fusion_source(plan, f.dense, &f.fused));
    return f;
}

static void close_fixture(Fixture *f) {
    source_close(f->fused);
    source_close(f->dense);
}

// The tensor `fused_name` of the fused model is exactly `dense_name` of the dense one.
static void assert_comes_from(Fixture *f, const char *fused_name, const char *dense_name) {
    int64_t fused_count, dense_count;
    float *fused = read_tensor(f->fused, fused_name, &fused_count);
    float *dense = read_tensor(f->dense, dense_name, &dense_count);
    ck_assert_int_eq(fused_count, dense_count);
    ck_assert_msg(memcmp(fused, dense, (size_t)fused_count * sizeof *fused) == 0, "%s is not %s",
                  fused_name, dense_name);
    free(fused);
    free(dense);
}

static const char *const ATTENTION[] = {
    "input_layernorm.weight",  "self_attn.q_proj.weight",         "self_attn.k_proj.weight",
    "self_attn.v_proj.weight", "self_attn.q_proj.bias",           "self_attn.k_proj.bias",
    "self_attn.v_proj.bias",   "self_attn.q_norm.weight",         "self_attn.k_norm.weight",
    "self_attn.o_proj.weight", "post_attention_layernorm.weight",
};
static const char *const MATRICES[] = {"gate_proj", "up_proj", "down_proj"};

static void assert_attention(Fixture *f, int layer) {
    for (size_t i = 0; i < sizeof ATTENTION / sizeof ATTENTION[0]; i++) {
        char fused[NAME_MAX_BYTES], dense[NAME_MAX_BYTES];
        snprintf(fused, sizeof fused, "model.layers.%d.%s", layer, ATTENTION[i]);
        snprintf(dense, sizeof dense, "model.layers.%d.%s", BASE[layer], ATTENTION[i]);
        if (!tensor_table_find(f->dense->table, dense)) { // of another family
            ck_assert_ptr_null(tensor_table_find(f->fused->table, fused));
            continue;
        }
        assert_comes_from(f, fused, dense);
    }
}

static void assert_expert(Fixture *f, int layer, int expert) {
    for (int i = 0; i < 3; i++) {
        char fused[NAME_MAX_BYTES], dense[NAME_MAX_BYTES];
        snprintf(fused, sizeof fused, "model.layers.%d.mlp.experts.%d.%s.weight", layer, expert,
                 MATRICES[i]);
        snprintf(dense, sizeof dense, "model.layers.%d.mlp.%s.weight", MLP[layer][expert],
                 MATRICES[i]);
        assert_comes_from(f, fused, dense);
    }
}

static void assert_surgery(const ModelConfig *config) {
    FusionPlan plan = example();
    Fixture f = open_fixture(&plan, config);
    ck_assert_int_eq(f.fused->config->num_layers, TARGET_LAYERS);
    for (int layer = 0; layer < TARGET_LAYERS; layer++) {
        assert_attention(&f, layer);
        for (int expert = 0; expert < 7; expert++) assert_expert(&f, layer, expert);
    }
    assert_comes_from(&f, "model.embed_tokens.weight", "model.embed_tokens.weight");
    assert_comes_from(&f, "model.norm.weight", "model.norm.weight");
    if (!config->tie_word_embeddings) assert_comes_from(&f, "lm_head.weight", "lm_head.weight");
    close_fixture(&f);
}

START_TEST(every_tensor_comes_from_the_right_layer) {
    ModelConfig config = small_config(8);
    assert_surgery(&config);
    config.family = FAMILY_LLAMA;
    config.qkv_bias = false;
    config.tie_word_embeddings = false;
    assert_surgery(&config);
    config.family = FAMILY_QWEN3;
    config.qk_norm = true;
    assert_surgery(&config);
}
END_TEST

START_TEST(layers_elsewhere_stay_dense) {
    FusionPlan plan = example();
    plan.elsewhere_copies = false;
    ModelConfig config = small_config(8);
    Fixture f = open_fixture(&plan, &config);
    for (int layer = 0; layer < TARGET_LAYERS; layer++) {
        assert_attention(&f, layer);
        if (BASE[layer] == 1 || BASE[layer] == 4) {
            assert_expert(&f, layer, 6);
            continue;
        }
        char fused[NAME_MAX_BYTES], dense[NAME_MAX_BYTES];
        snprintf(fused, sizeof fused, "model.layers.%d.mlp.up_proj.weight", layer);
        snprintf(dense, sizeof dense, "model.layers.%d.mlp.up_proj.weight", BASE[layer]);
        assert_comes_from(&f, fused, dense);
    }
    close_fixture(&f);
}
END_TEST

START_TEST(routers_are_drawn_by_name_and_seed) {
    FusionPlan plan = example();
    ModelConfig config = small_config(8);
    config.hidden_size = 1024; // enough values for their deviation
    config.num_heads = 128;
    Fixture f = open_fixture(&plan, &config);
    ck_assert_int_eq(f.fused->dtype, DTYPE_F32);
    int64_t count;
    float *one = read_tensor(f.fused, "model.layers.1.mlp.gate.weight", &count);
    float *other = read_tensor(f.fused, "model.layers.2.mlp.gate.weight", NULL);
    ck_assert_int_eq(count, 7 * 1024);
    double sum = 0, squares = 0;
    int equal = 0;
    for (int64_t i = 0; i < count; i++) {
        sum += one[i];
        squares += (double)one[i] * one[i];
        equal += one[i] == other[i];
    }
    // Standard errors over n = 7168 draws: 0.02/sqrt(n) = 2.4e-4 and 0.02/sqrt(2n) = 1.7e-4; five
    // of each.
    ck_assert_double_eq_tol(sum / (double)count, 0, 1.2e-3);
    ck_assert_double_eq_tol(sqrt(squares / (double)count), 0.02, 8.5e-4);
    ck_assert_int_lt(equal, 10);
    close_fixture(&f);

    plan.seed++;
    f = open_fixture(&plan, &config);
    float *reseeded = read_tensor(f.fused, "model.layers.1.mlp.gate.weight", NULL);
    ck_assert(memcmp(one, reseeded, (size_t)count * sizeof *one) != 0);
    close_fixture(&f);
    free(one);
    free(other);
    free(reseeded);
}
END_TEST

// --- Drop-Upcycling and noise --------------------------------------------------------------------

enum { WIDTH = 48, HIDDEN = 32 }; // of small_config

// Marks the channels of one expert matrix that differ from the dense one, each as a whole.
static int changed_channels(Fixture *f, int layer, int expert, int matrix, bool changed[WIDTH]) {
    char fused_name[NAME_MAX_BYTES], dense_name[NAME_MAX_BYTES];
    snprintf(fused_name, sizeof fused_name, "model.layers.%d.mlp.experts.%d.%s.weight", layer,
             expert, MATRICES[matrix]);
    snprintf(dense_name, sizeof dense_name, "model.layers.%d.mlp.%s.weight", MLP[layer][expert],
             MATRICES[matrix]);
    float *fused = read_tensor(f->fused, fused_name, NULL);
    float *dense = read_tensor(f->dense, dense_name, NULL);
    int count = 0;
    for (int c = 0; c < WIDTH; c++) {
        int differing = 0;
        for (int h = 0; h < HIDDEN; h++) {
            int i = matrix == 2 ? h * WIDTH + c : c * HIDDEN + h; // down is (H, I)
            differing += memcmp(&fused[i], &dense[i], sizeof fused[i]) != 0;
        }
        ck_assert_msg(differing == 0 || differing == HIDDEN, "%s: channel %d: %d of %d changed",
                      fused_name, c, differing, HIDDEN);
        changed[c] = differing > 0;
        count += changed[c];
    }
    free(fused);
    free(dense);
    return count;
}

START_TEST(reinit_changes_exactly_its_share_of_channels) {
    const struct {
        double ratio;
        int channels; // of 48
    } cases[] = {{0.5, 24}, {0.25, 12}, {1.0, 48}, {0.01, 0}, {0.02, 1}};
    ModelConfig config = small_config(8);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        FusionPlan plan = example();
        plan.reinit_ratio = cases[i].ratio;
        Fixture f = open_fixture(&plan, &config);
        bool first[WIDTH], sets[7][WIDTH];
        for (int expert = 0; expert < 7; expert++) {
            for (int matrix = 0; matrix < 3; matrix++) {
                bool *set = matrix == 0 ? sets[expert] : first;
                ck_assert_int_eq(changed_channels(&f, 3, expert, matrix, set), cases[i].channels);
                // The same channels of gate, up and down: a channel is redrawn as a whole.
                ck_assert(memcmp(set, sets[expert], sizeof sets[expert]) == 0);
            }
        }
        // Experts choose their channels independently.
        if (cases[i].ratio == 0.5) ck_assert(memcmp(sets[0], sets[1], sizeof sets[0]) != 0);
        close_fixture(&f);
    }
}
END_TEST

static void mean_and_deviation(const float *values, int64_t count, double *mean, double *std) {
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < count; i++) sum += values[i];
    *mean = sum / (double)count;
    for (int64_t i = 0; i < count; i++) squares += (values[i] - *mean) * (values[i] - *mean);
    *std = sqrt(squares / (double)count);
}

START_TEST(redrawn_values_have_the_matrix_s_moments) {
    FusionPlan plan = example();
    plan.reinit_ratio = 1;
    ModelConfig config = small_config(8);
    config.hidden_size = 256;
    config.num_heads = 32;
    Fixture f = open_fixture(&plan, &config);
    int64_t count;
    float *fused = read_tensor(f.fused, "model.layers.3.mlp.experts.3.up_proj.weight", &count);
    float *dense = read_tensor(f.dense, "model.layers.5.mlp.up_proj.weight", NULL);
    double mean, std, dense_mean, dense_std;
    mean_and_deviation(fused, count, &mean, &std);
    mean_and_deviation(dense, count, &dense_mean, &dense_std);
    // n = 12288 draws with deviation 0.15: five standard errors, 0.15/sqrt(n) and 0.15/sqrt(2n).
    ck_assert_double_eq_tol(mean, dense_mean, 6.8e-3);
    ck_assert_double_eq_tol(std, dense_std, 4.8e-3);
    free(fused);
    free(dense);
    close_fixture(&f);
}
END_TEST

START_TEST(noise_is_relative_to_the_matrix) {
    FusionPlan plan = example();
    plan.copy_noise = 0.1;
    ModelConfig config = small_config(8);
    config.hidden_size = 256;
    config.num_heads = 32;
    Fixture f = open_fixture(&plan, &config);
    int64_t count;
    float *a = read_tensor(f.fused, "model.layers.0.mlp.experts.0.down_proj.weight", &count);
    float *b = read_tensor(f.fused, "model.layers.0.mlp.experts.1.down_proj.weight", NULL);
    float *dense = read_tensor(f.dense, "model.layers.0.mlp.down_proj.weight", NULL);
    double mean, std, dense_mean, dense_std;
    mean_and_deviation(dense, count, &dense_mean, &dense_std);
    ck_assert(memcmp(a, b, (size_t)count * sizeof *a) != 0);
    for (int64_t i = 0; i < count; i++) a[i] -= dense[i];
    mean_and_deviation(a, count, &mean, &std);
    // Five standard errors of n = 12288 draws with deviation 0.1 * 0.15.
    ck_assert_double_eq_tol(mean, 0, 6.8e-4);
    ck_assert_double_eq_tol(std, 0.1 * dense_std, 4.8e-4);
    free(a);
    free(b);
    free(dense);
    // What does not belong to an expert is left alone.
    assert_attention(&f, 3);
    close_fixture(&f);
}
END_TEST

// --- Reading in pieces ---------------------------------------------------------------------------

static void assert_pieces(TensorSource *source, const Tensor *tensor, uint64_t seed) {
    size_t bytes = (size_t)tensor->count * sizeof(float);
    float *whole = malloc(bytes), *pieces = malloc(bytes);
    ck_assert(whole && pieces);
    ck_assert_ok(source->read(source, tensor, 0, tensor->count, whole));
    // From the back, so that no piece finds a state that the one before it left.
    for (int64_t end = tensor->count, i = 0; end > 0; i++) {
        int64_t length = 1 + (int64_t)(random_u64(seed, 0, (uint64_t)i) % 5000);
        int64_t first = end > length ? end - length : 0;
        ck_assert_ok(source->read(source, tensor, first, end - first, pieces + first));
        end = first;
    }
    ck_assert_msg(memcmp(whole, pieces, bytes) == 0, "%s differs when read in pieces",
                  tensor->name);
    free(whole);
    free(pieces);
}

START_TEST(pieces_equal_the_whole) {
    FusionPlan plan = example();
    plan.reinit_ratio = 0.3;
    plan.copy_noise = 0.05;
    ModelConfig config = small_config(8);
    config.intermediate_size = 353; // matrices larger than a piece, of no round size
    Fixture f = open_fixture(&plan, &config);
    ck_assert_int_eq(f.fused->dtype, DTYPE_F32);
    for (int i = 0; i < f.fused->table->count; i++)
        assert_pieces(f.fused, &f.fused->table->tensors[i], (uint64_t)i);
    close_fixture(&f);
}
END_TEST

// A second view, read in another order, gives the same values: nothing depends on history.
START_TEST(order_of_reading_does_not_matter) {
    FusionPlan plan = example();
    plan.reinit_ratio = 0.5;
    plan.copy_noise = 0.1;
    ModelConfig config = small_config(8);
    Fixture f = open_fixture(&plan, &config);
    TensorSource *again;
    ck_assert_ok(fusion_source(&plan, f.dense, &again));
    int count = f.fused->table->count;
    float **forwards = calloc((size_t)count, sizeof *forwards);
    for (int i = 0; i < count; i++)
        forwards[i] = read_tensor(f.fused, f.fused->table->tensors[i].name, NULL);
    for (int i = count - 1; i >= 0; i--) {
        const Tensor *tensor = &again->table->tensors[i];
        float *backwards = read_tensor(again, tensor->name, NULL);
        ck_assert_msg(memcmp(forwards[i], backwards, (size_t)tensor->count * sizeof *backwards) ==
                          0,
                      "%s depends on what was read before", tensor->name);
        free(backwards);
        free(forwards[i]);
    }
    free(forwards);
    source_close(again);
    close_fixture(&f);
}
END_TEST

// --- Failures ------------------------------------------------------------------------------------

static Status broken_read(TensorSource *source, const Tensor *tensor, int64_t first, int64_t count,
                          float *out) {
    (void)source, (void)first, (void)count, (void)out;
    FAIL(STATUS_IO, "%s: disk on fire", tensor->name);
}

START_TEST(failures_of_the_source_pass_through) {
    FusionPlan plan = example();
    plan.reinit_ratio = 0.5;
    ModelConfig config = small_config(8);
    Fixture f = open_fixture(&plan, &config);
    f.dense->read = broken_read;
    const Tensor *tensor =
        tensor_table_find(f.fused->table, "model.layers.3.mlp.experts.3.up_proj.weight");
    float value;
    ck_assert_fails(f.fused->read(f.fused, tensor, 0, 1, &value), STATUS_IO,
                    "model.layers.5.mlp.up_proj.weight: disk on fire");
    close_fixture(&f);
}
END_TEST

START_TEST(plans_that_do_not_fit_are_refused) {
    FusionPlan plan = example();
    ModelConfig config = small_config(9);
    TensorSource *dense = random_source(&config, 3), *fused;
    ck_assert_fails(fusion_source(&plan, dense, &fused), STATUS_USAGE, "of 8 layers");
    source_close(dense);
}
END_TEST

TEST_MAIN("fusion_source", TEST(every_tensor_comes_from_the_right_layer),
          TEST(layers_elsewhere_stay_dense), TEST(routers_are_drawn_by_name_and_seed),
          TEST(reinit_changes_exactly_its_share_of_channels),
          TEST(redrawn_values_have_the_matrix_s_moments), TEST(noise_is_relative_to_the_matrix),
          TEST(pieces_equal_the_whole), TEST(order_of_reading_does_not_matter),
          TEST(failures_of_the_source_pass_through), TEST(plans_that_do_not_fit_are_refused))
