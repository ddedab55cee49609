// Plan files: what is written reads back, every way of editing one wrongly is named, and the model
// a plan leads to has the layers and the parameter counts it should.
#include <math.h>
#include "base/json.h"
#include "model/fusion.h"
#include "tests/random_source.h"
#include "tests/test.h"

// Blocks 3+1 and 6+2 of 12 layers.
static FusionPlan example(void) {
    return (FusionPlan){.num_source_layers = 12,
                        .num_blocks = 2,
                        .blocks = {{3, 1, 0.1 + 0.2}, {6, 2, NAN}},
                        .num_experts = 6,
                        .top_k = 2,
                        .follower_copies = 2,
                        .elsewhere_copies = true,
                        .router_std = 0.02,
                        .reinit_ratio = 0.5,
                        .copy_noise = 0.01,
                        .seed = INT64_MAX,
                        .router = {.gate = GATE_RENORM, .gate_scale = 1.0f / 3}};
}

// Qwen2.5-0.5B: 24 layers, hidden 896, 14 query and 2 key/value heads of 64, MLP 4864.
static ModelConfig qwen_half_billion(void) {
    ModelConfig c = small_config(24);
    c.hidden_size = 896;
    c.num_heads = 14;
    c.num_kv_heads = 2;
    c.head_dim = 64;
    c.intermediate_size = 4864;
    c.vocab_size = 151936;
    return c;
}

static const char *plan_path(void) {
    static char path[IO_PATH_MAX];
    ck_assert_ok(io_path(path, "%s/plan.json", test_directory()));
    return path;
}

static void assert_same(const FusionPlan *a, const FusionPlan *b) {
    ck_assert_int_eq(a->num_source_layers, b->num_source_layers);
    ck_assert_int_eq(a->num_blocks, b->num_blocks);
    for (int i = 0; i < a->num_blocks; i++) {
        ck_assert_int_eq(a->blocks[i].base, b->blocks[i].base);
        ck_assert_int_eq(a->blocks[i].followers, b->blocks[i].followers);
        if (isnan(a->blocks[i].score))
            ck_assert(isnan(b->blocks[i].score));
        else
            ck_assert(a->blocks[i].score == b->blocks[i].score);
    }
    ck_assert_int_eq(a->num_experts, b->num_experts);
    ck_assert_int_eq(a->top_k, b->top_k);
    ck_assert_int_eq(a->follower_copies, b->follower_copies);
    ck_assert_int_eq(a->elsewhere_copies, b->elsewhere_copies);
    ck_assert(a->router_std == b->router_std);
    ck_assert(a->reinit_ratio == b->reinit_ratio);
    ck_assert(a->copy_noise == b->copy_noise);
    ck_assert_uint_eq(a->seed, b->seed);
    ck_assert_int_eq(a->router.gate, b->router.gate);
    ck_assert(a->router.gate_scale == b->router.gate_scale);
    ck_assert_int_eq(a->router.input_is_raw, b->router.input_is_raw);
}

START_TEST(a_written_plan_reads_back) {
    ModelConfig source = small_config(12);
    FusionPlan plan = example(), read;
    ck_assert_ok(fusion_plan_write(&plan, &source, plan_path()));
    ck_assert_ok(fusion_plan_read(plan_path(), &read));
    assert_same(&plan, &read);

    plan.num_blocks = 0;
    plan.elsewhere_copies = false;
    plan.router = (RouterConfig){.gate = GATE_SOFTMAX, .gate_scale = 6, .input_is_raw = true};
    ck_assert_ok(fusion_plan_write(&plan, &source, plan_path()));
    ck_assert_ok(fusion_plan_read(plan_path(), &read));
    assert_same(&plan, &read);
    ck_assert_fails(fusion_plan_read("/nonexistent/plan.json", &read), STATUS_MISSING_INPUT,
                    "/nonexistent/plan.json");
}
END_TEST

START_TEST(the_file_lists_parameter_counts) {
    ModelConfig source = small_config(12);
    FusionPlan plan = example();
    ck_assert_ok(fusion_plan_write(&plan, &source, plan_path()));
    json_t *root, *parameters;
    int64_t before, total, active, layers;
    ck_assert_ok(json_read_file(plan_path(), 1 << 20, &root));
    ck_assert_ok(json_get_object(root, "plan", "parameters", &parameters));
    ck_assert_ok(json_get_int(parameters, "plan", "source", 0, INT64_MAX, &before));
    ck_assert_ok(json_get_int(parameters, "plan", "total", 0, INT64_MAX, &total));
    ck_assert_ok(json_get_int(parameters, "plan", "active", 0, INT64_MAX, &active));
    ck_assert_ok(json_get_int(root, "plan", "target_layers", 0, INT64_MAX, &layers));
    json_decref(root);
    const int64_t mlp = 3 * 32 * 48, router = 6 * 32;
    const int64_t attention = 32 * 32 + 32 + 2 * (16 * 32 + 16) + 32 * 32, norms = 2 * 32;
    const int64_t ends = 80 * 32 + 32;
    ck_assert_int_eq(layers, 9);
    ck_assert_int_eq(before, ends + 12 * (attention + norms + mlp));
    ck_assert_int_eq(total, ends + 9 * (attention + norms + router + 6 * mlp));
    ck_assert_int_eq(active, ends + 9 * (attention + norms + router + 2 * mlp));
}
END_TEST

// The example in docs/formats.md is a plan, and its derived figures are right.
START_TEST(the_documented_example_is_right) {
    char *text;
    size_t bytes;
    ck_assert_ok(io_read_file(TEST_SOURCE_DIR "/docs/formats.md", 1 << 20, &text, &bytes));
    char *section = strstr(text, "## Plan files");
    ck_assert_ptr_nonnull(section);
    char *example = strstr(section, "```json\n") + strlen("```json\n");
    char *end = strstr(example, "```");
    ck_assert_ptr_nonnull(end);
    FusionPlan plan;
    ModelConfig source = qwen_half_billion(), target;
    TensorTable table;
    char active[64], total[64];
    ck_assert_ok(fusion_plan_parse(example, (size_t)(end - example), "docs/formats.md", &plan));
    ck_assert_ok(fusion_target_config(&plan, &source, &target));
    ck_assert_ok(tensor_table_build(&target, &table));
    snprintf(total, sizeof total, "\"total\": %lld,", (long long)table.parameters);
    snprintf(active, sizeof active, "\"active\": %lld}", (long long)table.active_parameters);
    *end = '\0';
    ck_assert_ptr_nonnull(strstr(example, total));
    ck_assert_ptr_nonnull(strstr(example, active));
    tensor_table_free(&table);
    free(text);
}
END_TEST

// --- Editing by hand -----------------------------------------------------------------------------

#define ROUTER                                                                                     \
    "{\"gate\": \"softmax\", \"gate_scale\": 1, \"input\": \"normed\", \"init_std\": 0.02}"
#define BLOCKS "[{\"base\": 3, \"followers\": 1, \"score\": 0.9}, {\"base\": 6, \"followers\": 2}]"

// One member a line, so that a case can say which one it replaces (NULL: takes away).
static const struct {
    const char *key, *value;
} MEMBERS[] = {
    {"format", "\"dense2moe-plan\""},
    {"version", "1"},
    {"source_layers", "12"},
    {"blocks", BLOCKS},
    {"num_experts", "6"},
    {"top_k", "1"},
    {"follower_copies", "2"},
    {"elsewhere", "\"copies\""},
    {"reinit_ratio", "0"},
    {"copy_noise", "0"},
    {"seed", "1"},
    {"router", ROUTER},
};

static Status parse_with(const char *key, const char *value, FusionPlan *out) {
    char text[2048] = "{";
    bool found = false;
    for (size_t i = 0; i < sizeof MEMBERS / sizeof MEMBERS[0]; i++) {
        bool replaced = key && strcmp(MEMBERS[i].key, key) == 0;
        found |= replaced;
        const char *v = replaced ? value : MEMBERS[i].value;
        if (!v) continue;
        size_t used = strlen(text);
        snprintf(text + used, sizeof text - used, "%s\"%s\": %s", used > 1 ? "," : "",
                 MEMBERS[i].key, v);
    }
    size_t used = strlen(text);
    if (key && !found) snprintf(text + used, sizeof text - used, ", \"%s\": %s", key, value);
    strcat(text, "}");
    return fusion_plan_parse(text, strlen(text), "plan.json", out);
}

START_TEST(hand_written_plans_are_read) {
    FusionPlan plan;
    ck_assert_ok(parse_with(NULL, NULL, &plan));
    ck_assert_int_eq(plan.num_blocks, 2);
    ck_assert(plan.blocks[0].score == 0.9 && isnan(plan.blocks[1].score));
    // Any order; a score of null; members that follow from the others are not looked at.
    ck_assert_ok(parse_with("blocks",
                            "[{\"base\": 6, \"followers\": 2, \"score\": null},"
                            " {\"base\": 3, \"followers\": 1}]",
                            &plan));
    ck_assert_int_eq(plan.blocks[0].base, 3);
    ck_assert_int_eq(plan.blocks[1].base, 6);
    ck_assert_ok(parse_with("target_layers", "77", &plan));
    ck_assert_ok(parse_with("parameters", "\"stale\"", &plan));
    ck_assert_int_eq(fusion_target_layers(&plan), 9);
}
END_TEST

START_TEST(every_wrong_edit_is_named) {
    const struct {
        const char *key, *value, *message;
    } cases[] = {
        {"format", "\"other\"", "format is \"other\""},
        {"format", NULL, "\"format\" is missing"},
        {"version", "2", "version 2"},
        {"source_layers", "0", "source_layers is 0"},
        {"source_layers", "1025", "source_layers"},
        {"source_layers", "8", "block 6+2"},
        {"source_layers", "\"12\"", "a string"},
        {"num_experts", "0", "num_experts is 0"},
        {"num_experts", "4", "num_experts of at least 5"},
        {"num_experts", "257", "num_experts"},
        {"num_experts", "6.0", "a real number"},
        {"num_experts", NULL, "\"num_experts\" is missing"},
        {"top_k", "0", "top_k is 0, expected 1 to 6"},
        {"top_k", "7", "top_k is 7, expected 1 to 6"},
        {"follower_copies", "0", "follower_copies is 0"},
        {"follower_copies", "3", "num_experts of at least 7"},
        {"elsewhere", "\"moe\"", "expected one of copies, dense"},
        {"elsewhere", "true", "true, expected a string"},
        {"reinit_ratio", "1.5", "reinit_ratio is 1.5, expected 0 to 1"},
        {"reinit_ratio", "-0.1", "reinit_ratio"},
        {"reinit_ratio", "1e999", "plan.json:1"},
        {"copy_noise", "-1", "copy_noise"},
        {"seed", "-1", "\"seed\" is -1"},
        {"seed", "9223372036854775808", "plan.json:1"},
        {"router", "{}", "\"gate\" is missing"},
        {"router", "[]", "an array"},
        {"router", "{\"gate\": \"top\", \"gate_scale\": 1, \"input\": \"normed\", \"init_std\": 0}",
         "expected softmax, renorm or straight_through"},
        {"router",
         "{\"gate\": \"renorm\", \"gate_scale\": 1, \"input\": \"normed\", \"init_std\": 0}",
         "use straight_through"},
        {"router",
         "{\"gate\": \"softmax\", \"gate_scale\": 0, \"input\": \"normed\", \"init_std\": 0}",
         "gate_scale"},
        {"router",
         "{\"gate\": \"softmax\", \"gate_scale\": 1e300, \"input\": \"normed\", \"init_std\": 0}",
         "gate_scale"},
        {"router", "{\"gate\": \"softmax\", \"gate_scale\": 1, \"input\": \"h\", \"init_std\": 0}",
         "expected one of normed, raw"},
        {"router",
         "{\"gate\": \"softmax\", \"gate_scale\": 1, \"input\": \"raw\", \"init_std\": -1}",
         "init_std"},
        {"router",
         "{\"gate\": \"softmax\", \"gate_scale\": 1, \"input\": \"raw\", \"init_std\": 0, "
         "\"bias\": 1}",
         "unknown key \"bias\""},
        {"blocks", "{}", "an object"},
        {"blocks", "[3]", "blocks[0]: expected an object"},
        {"blocks", "[{\"base\": 3}]", "blocks[0]: key \"followers\" is missing"},
        {"blocks", "[{\"base\": 3, \"followers\": 1, \"layer\": 2}]", "unknown key \"layer\""},
        {"blocks", "[{\"base\": 3, \"followers\": 1, \"score\": \"high\"}]", "a string"},
        {"blocks", "[{\"base\": -3, \"followers\": 1}]", "\"base\" is -3"},
        {"blocks", "[{\"base\": 3, \"followers\": 0}]", "block 3+0"},
        {"blocks", "[{\"base\": 11, \"followers\": 1}]", "block 11+1"},
        {"blocks", "[{\"base\": 1024, \"followers\": 1024}]", "block 1024+1024"},
        {"blocks", "[{\"base\": 4, \"followers\": 1}, {\"base\": 3, \"followers\": 1}]",
         "blocks 3+1 and 4+1 overlap"},
        {"blokcs", "[]", "unknown key \"blokcs\""},
        {"seed", "1, \"seed\": 2", "plan.json:1"}, // given twice
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        FusionPlan plan;
        ck_assert_fails(parse_with(cases[i].key, cases[i].value, &plan), STATUS_BAD_DATA,
                        cases[i].message);
        ck_assert_msg(strncmp(status_message(), "plan.json", 9) == 0, "message '%s' names no file",
                      status_message());
    }
}
END_TEST

START_TEST(no_file_has_too_many_blocks) {
    size_t size = 64 * 1100 + 2048;
    char *blocks = malloc(size), *text = malloc(size);
    ck_assert(blocks && text);
    size_t used = (size_t)sprintf(blocks, "[");
    for (int i = 0; i < 1100; i++)
        used += (size_t)sprintf(blocks + used, "%s{\"base\": 3, \"followers\": 1}", i ? "," : "");
    sprintf(blocks + used, "]");
    snprintf(text, size,
             "{\"format\": \"dense2moe-plan\", \"version\": 1, \"source_layers\": 12, "
             "\"num_experts\": 6, \"top_k\": 1, \"follower_copies\": 2, \"elsewhere\": \"copies\", "
             "\"reinit_ratio\": 0, \"copy_noise\": 0, \"seed\": 1, \"router\": " ROUTER
             ", \"blocks\": %s}",
             blocks);
    FusionPlan plan;
    ck_assert_fails(fusion_plan_parse(text, strlen(text), "plan.json", &plan), STATUS_BAD_DATA,
                    "1100 blocks");
    free(text);
    free(blocks);
}
END_TEST

// --- The model it leads to -----------------------------------------------------------------------

START_TEST(the_target_has_the_planned_layers) {
    ModelConfig source = small_config(12), target;
    source.moe_intermediate_size = 7; // means nothing in a dense model
    FusionPlan plan = example();
    plan.elsewhere_copies = false;
    ck_assert_ok(fusion_target_config(&plan, &source, &target));
    ck_assert_int_eq(target.num_layers, 9);
    ck_assert_int_eq(target.moe_intermediate_size, source.intermediate_size);
    ck_assert_int_eq(target.router.gate, GATE_RENORM);
    for (int l = 0; l < 9; l++) { // layer 3 was 3 and 4; layer 5 was 6, 7 and 8
        bool fused = l == 3 || l == 5;
        ck_assert_int_eq(target.layers[l].num_experts, fused ? 6 : 0);
        ck_assert_int_eq(target.layers[l].top_k, fused ? 2 : 0);
    }
    plan.elsewhere_copies = true;
    ck_assert_ok(fusion_target_config(&plan, &source, &target));
    for (int l = 0; l < 9; l++) ck_assert_int_eq(target.layers[l].num_experts, 6);
}
END_TEST

START_TEST(sources_that_do_not_fit_are_refused) {
    ModelConfig source = small_config(11), target;
    FusionPlan plan = example();
    ck_assert_fails(fusion_target_config(&plan, &source, &target), STATUS_USAGE, "of 12 layers");
    source = small_config(12);
    source.layers[4] = (LayerConfig){.num_experts = 4, .top_k = 1};
    ck_assert_fails(fusion_target_config(&plan, &source, &target), STATUS_USAGE,
                    "layer 4 of the source has 4 experts already");
    source = small_config(12);
    plan.top_k = 1;
    ck_assert_fails(fusion_target_config(&plan, &source, &target), STATUS_USAGE,
                    "straight_through");
    ck_assert_fails(fusion_plan_write(&plan, &source, plan_path()), STATUS_USAGE,
                    "straight_through");
}
END_TEST

START_TEST(the_papers_sizes_come_out) {
    const struct {
        int experts, copies;
        int64_t total, active;
    } cases[] = {
        {6, 2, 1661644032, 419572992}, // the paper's 1.66 B total, 0.42 B active
        {2, 1, 667919104, 419504896},
    };
    ModelConfig source = qwen_half_billion(), target;
    TensorTable table;
    ck_assert_ok(tensor_table_build(&source, &table));
    ck_assert_int_eq(table.parameters, 494032768); // Qwen's own number
    tensor_table_free(&table);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        FusionPlan plan = example();
        plan.num_source_layers = 24;
        plan.num_blocks = 5;
        for (int b = 0; b < 5; b++) plan.blocks[b] = (FusionBlock){3 + 3 * b, 1, NAN};
        plan.num_experts = cases[i].experts;
        plan.follower_copies = cases[i].copies;
        plan.top_k = 1;
        plan.router.gate = GATE_SOFTMAX;
        ck_assert_ok(fusion_target_config(&plan, &source, &target));
        ck_assert_int_eq(target.num_layers, 19);
        ck_assert_ok(tensor_table_build(&target, &table));
        ck_assert_int_eq(table.parameters, cases[i].total);
        ck_assert_int_eq(table.active_parameters, cases[i].active);
        tensor_table_free(&table);
    }
}
END_TEST

START_TEST(the_text_says_what_happens) {
    ModelConfig source = small_config(12);
    FusionPlan plan = example();
    char *text;
    ck_assert_ok(fusion_plan_text(&plan, &source, &text));
    ck_assert_msg(strstr(text, "12 -> 9 layers, 6 experts, top-2, gate renorm"), "%s", text);
    ck_assert_msg(strstr(text, "block 3+1: layer 3 keeps its attention; 4 experts from its MLP, "
                               "2 from layer 4; score 0.30000"),
                  "%s", text);
    ck_assert_msg(strstr(text, "2 experts from its MLP, 2 from layer 7, 2 from layer 8\n"), "%s",
                  text);
    free(text);
}
END_TEST

TEST_MAIN("fusion_plan", TEST(a_written_plan_reads_back), TEST(the_file_lists_parameter_counts),
          TEST(the_documented_example_is_right), TEST(hand_written_plans_are_read),
          TEST(every_wrong_edit_is_named), TEST(no_file_has_too_many_blocks),
          TEST(the_target_has_the_planned_layers), TEST(sources_that_do_not_fit_are_refused),
          TEST(the_papers_sizes_come_out), TEST(the_text_says_what_happens))
