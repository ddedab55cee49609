// Recipes: the strict INI reader, includes, --set, rules between keys, and the printed forms.
#include <sys/stat.h>
#include "tests/test.h"
#include "train/recipe.h"

static Recipe recipe, other;

static Status parse(const char *text) {
    recipe_defaults(&recipe);
    return recipe_parse(text, strlen(text), "r.ini", &recipe);
}

// Writes a file into the test directory and gives its path (valid until the fourth next call).
static const char *put(const char *name, const char *text) {
    static char paths[4][256];
    static int next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", test_directory(), name);
    ck_assert_ok(io_write_file_atomic(path, text, strlen(text)));
    return path;
}

// --- Reading --------------------------------------------------------------------------------

START_TEST(reads_every_kind) {
    ck_assert_ok(parse("# a comment\n"
                       "\n"
                       "[run]\r\n"
                       "name = first try   ; and why\r\n"
                       "  seed=7\n"
                       "device = cpu # not auto\n"
                       "[train]\n"
                       "tokens = 225e9\n"
                       "recompute = swiglu, norms\n"
                       "[optim]\n"
                       "lr = 2.5e-4\n"
                       "decay_embeddings = yes\n"
                       "[data]\n"
                       "train = a#b;c\n"
                       "valid = # nothing\n"
                       "[model]\n"
                       "source = \"/models/a #2 \\\"x\\\"\"  # quoted"));
    ck_assert_str_eq(recipe.run_name, "first try");
    ck_assert_int_eq(recipe.run_seed, 7);
    ck_assert_int_eq(recipe.run_device, DEVICE_CPU);
    ck_assert_int_eq(recipe.train_tokens, 225000000000);
    ck_assert_str_eq(recipe.train_recompute, "swiglu, norms");
    ck_assert(recipe.optim_lr == 2.5e-4);
    ck_assert(recipe.optim_decay_embeddings);
    ck_assert_str_eq(recipe.data_train, "a#b;c");
    ck_assert_str_eq(recipe.data_valid, "");
    ck_assert_str_eq(recipe.model_source, "/models/a #2 \"x\"");
    ck_assert_int_eq(recipe.lfuc_num_experts, 6); // untouched: its default
}
END_TEST

START_TEST(reads_long_lines_and_byte_order_mark) {
    enum { LONG = 100000 };
    char *text = malloc(LONG + 100);
    int used = sprintf(text, "\xef\xbb\xbf[run]\nseed = 3 # ");
    memset(text + used, 'x', LONG);
    strcpy(text + used + LONG, "\nname = behind\n");
    ck_assert_ok(parse(text));
    ck_assert_int_eq(recipe.run_seed, 3);
    ck_assert_str_eq(recipe.run_name, "behind");
    free(text);
}
END_TEST

START_TEST(reads_numbers_exactly) {
    static const struct {
        const char *text;
        int64_t value;
    } good[] = {{"0", 0},
                {"-0", 0},
                {"007", 7},
                {"9007199254740993", 9007199254740993}, // 2^53 + 1: a double would round
                {"9223372036854775807", INT64_MAX},
                {"225e9", 225000000000},
                {"2.25E+11", 225000000000},
                {"1200e-2", 12},
                {"3.", 3},
                {"0e999", 0}};
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        char line[64];
        snprintf(line, sizeof line, "[train]\ntokens = %s\n", good[i].text);
        ck_assert_ok(parse(line));
        ck_assert_msg(recipe.train_tokens == good[i].value, "%s read as %lld", good[i].text,
                      (long long)recipe.train_tokens);
    }
    static const char *const bad[] = {"",
                                      "x",
                                      "1_000",
                                      "1k",
                                      "1.5",
                                      "1e-1",
                                      "0x10",
                                      "1e",
                                      "1e+",
                                      "--1",
                                      "1 000",
                                      "1e19",
                                      "1.2.3",
                                      ".",
                                      "e5",
                                      "9223372036854775808",
                                      "1e99999999999999999999"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        char line[64];
        snprintf(line, sizeof line, "[train]\ntokens = %s\n", bad[i]);
        ck_assert_fails(parse(line), STATUS_USAGE, "r.ini:2: train.tokens");
    }
    static const char *const bad_reals[] = {"",      "nan",    "inf", "0x1p3",
                                            "1e400", "1e-400", "1,5", "1d"};
    for (size_t i = 0; i < sizeof bad_reals / sizeof bad_reals[0]; i++) {
        char line[64];
        snprintf(line, sizeof line, "[optim]\n\nlr = %s\n", bad_reals[i]);
        ck_assert_fails(parse(line), STATUS_USAGE, "r.ini:3: optim.lr");
    }
}
END_TEST

// --- Errors, each with its line -------------------------------------------------------------

START_TEST(names_line_and_nearest) {
    static const struct {
        const char *text, *message;
    } cases[] = {
        {"[run]\nsed = 1\n", "r.ini:2: unknown key 'sed' in [run]; did you mean 'seed'?"},
        {"[run]\n\n\nlr = 1\n", "r.ini:4: [run] has no key 'lr'; did you mean [optim] lr?"},
        {"[run]\nwhatever_that_is = 1\n", "valid are name, directory, seed, device, gpu_precision"},
        {"[trian]\n", "r.ini:1: unknown section [trian]; did you mean [train]?"},
        {"[completely_else]\n", "valid are [run], [model], [data]"},
        {"\n[run]\nseed = 1\nname = a\nseed = 2\n",
         "r.ini:5: key 'seed' of [run] was already given in line 3"},
        {"[run]\nseed = 1\n[train]\n[run]\nseed = 1\n", "already given in line 2"},
        {"[run]\nthreads = 2000\n",
         "r.ini:2: run.threads = 2000 is out of range (expected 0 to 1024)"},
        {"[run]\nseed = -1\n", "out of range (expected 0 or more)"},
        {"[optim]\nlr = 101\n", "r.ini:2: optim.lr = 101 is out of range (expected 0 to 100)"},
        {"[run]\nseed = one\n", "r.ini:2: run.seed = 'one' is not a whole number"},
        {"[optim]\nlr = fast\n", "r.ini:2: optim.lr = 'fast' is not a number"},
        {"[lfuc]\nenabled = maybe\n", "r.ini:2: lfuc.enabled = 'maybe' is not true or false"},
        {"[lfuc]\nselect = bugdet\n", "did you mean 'budget'?"},
        {"[lfuc]\nselect = best\n",
         "'best' is not one of threshold, budget, manual, latency, loss"},
        {"seed = 1\n", "r.ini:1: key 'seed' stands before the first [section]"},
        {"[run\n", "r.ini:1: '[run' is not a section"},
        {"[run] name = x\n", "r.ini:1: '[run] name = x' is not a section"},
        {"[run]\nseed 1\n", "r.ini:2: 'seed 1' is neither key = value nor [section]"},
        {"[run]\nname = \"a\n", "r.ini:2: the closing quote"},
        {"[run]\nname = \"a\" b\n", "after the closing quote"},
        {"[run]\nname = a\tb\n", "r.ini:2: run.name holds the control character 0x09"},
        {"[run]\n# \x01\n", "r.ini:2: control character 0x01"},
        {"[run]\rname = a\n", "r.ini:1: control character 0x0d"},
        {"[run]\nname = \xc3\n", "r.ini:2: byte 0xc3 is not valid UTF-8"},
        {"[run]\nname = \xc0\xaf\n", "byte 0xc0 is not valid UTF-8"},     // overlong
        {"[run]\nname = \xed\xa0\x80\n", "byte 0xed is not valid UTF-8"}, // surrogate
        {"[run]\nname = \xf4\x90\x80\x80\n", "byte 0xf4 is not valid"},   // above U+10FFFF
        {"include = x.ini\n", "r.ini:1: include is only possible in a file"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        ck_assert_fails(parse(cases[i].text), STATUS_USAGE, cases[i].message);
}
END_TEST

START_TEST(refuses_nul_and_size) {
    recipe_defaults(&recipe);
    ck_assert_fails(recipe_parse("[run]\nname = a\0b\n", 16, "r.ini", &recipe), STATUS_USAGE,
                    "r.ini:2: control character 0x00");
    size_t bytes = (1 << 20) + 1;
    char *text = malloc(bytes);
    memset(text, '\n', bytes);
    ck_assert_fails(recipe_parse(text, bytes, "r.ini", &recipe), STATUS_USAGE, "at most 1048576");
    ck_assert_ok(recipe_parse(text, bytes - 1, "r.ini", &recipe));
    free(text);
    char line[RECIPE_TEXT_MAX + 32];
    int used = sprintf(line, "[run]\nname = ");
    memset(line + used, 'n', RECIPE_TEXT_MAX);
    line[used + RECIPE_TEXT_MAX] = '\0';
    ck_assert_fails(parse(line), STATUS_USAGE, "r.ini:2: run.name is 1024 bytes long");
}
END_TEST

// --- Includes -------------------------------------------------------------------------------

START_TEST(file_overrides_what_it_includes) {
    put("deep.ini", "[optim]\nlr = 1e-3\nbeta1 = 0.5\n[run]\nseed = 5\n");
    put("shared.ini", "include = deep.ini\n[optim]\nlr = 2e-3\n");
    const char *path = put("top.ini", "include = shared.ini # beside this file\n[run]\nseed = 6\n");
    const char *const overrides[] = {"optim.beta2=0.9", "run.name=a=b"};
    ck_assert_ok(recipe_load(path, overrides, 2, &recipe));
    ck_assert(recipe.optim_lr == 2e-3);
    ck_assert(recipe.optim_beta1 == 0.5);
    ck_assert(recipe.optim_beta2 == 0.9);
    ck_assert_int_eq(recipe.run_seed, 6);
    ck_assert_str_eq(recipe.run_name, "a=b");
}
END_TEST

START_TEST(includes_fail_with_their_line) {
    put("a.ini", "include = b.ini\n");
    const char *circle = put("b.ini", "\ninclude = a.ini\n");
    ck_assert_fails(recipe_load(circle, NULL, 0, &recipe), STATUS_USAGE, "includes itself");
    const char *lost = put("lost.ini", "\n\ninclude = nowhere.ini\n");
    ck_assert_fails(recipe_load(lost, NULL, 0, &recipe), STATUS_MISSING_INPUT, "lost.ini:3: ");
    put("bad.ini", "[run]\nsede = 1\n");
    const char *inner = put("inner.ini", "include = bad.ini\n");
    ck_assert_fails(recipe_load(inner, NULL, 0, &recipe), STATUS_USAGE, "bad.ini:2: unknown key");
    const char *late = put("late.ini", "[run]\ninclude = bad.ini\n");
    ck_assert_fails(recipe_load(late, NULL, 0, &recipe), STATUS_USAGE,
                    "late.ini:2: include must stand before the first section");
    for (int i = 0; i < 9; i++) {
        char name[32], text[64];
        snprintf(name, sizeof name, "n%d.ini", i);
        snprintf(text, sizeof text, "include = n%d.ini\n", i + 1);
        put(name, text);
    }
    char first[256];
    snprintf(first, sizeof first, "%s/n0.ini", test_directory());
    ck_assert_fails(recipe_load(first, NULL, 0, &recipe), STATUS_USAGE, "nested more than 8 deep");
    char many[100 * 24] = "";
    put("leaf.ini", "[run]\nseed = 2\n");
    for (int i = 0; i < 100; i++) strcat(many, "include = leaf.ini\n");
    ck_assert_fails(recipe_load(put("many.ini", many), NULL, 0, &recipe), STATUS_USAGE,
                    "more than 64 files");
}
END_TEST

START_TEST(finds_recipes_by_name) {
    put("my.recipe.ini", "[run]\nseed = 9\n");
    ck_assert_int_eq(chdir(test_directory()), 0);
    ck_assert_ok(recipe_load("my.recipe", NULL, 0, &recipe));
    ck_assert_int_eq(recipe.run_seed, 9);
    char name[64];
    ck_assert_ok(recipe_run_name(&recipe, name, sizeof name));
    ck_assert_str_eq(name, "my.recipe");
    ck_assert_ok(recipe_load("lfuc_qwen0.5b.ini", NULL, 0, &recipe)); // from the source tree
    ck_assert_ok(recipe_load("lfuc_qwen0.5b", NULL, 0, &recipe));
    ck_assert_ok(recipe_run_name(&recipe, name, sizeof name));
    ck_assert_str_eq(name, "lfuc_qwen0.5b");
    mkdir("folder", 0777);
    ck_assert_fails(recipe_load("folder", NULL, 0, &recipe), STATUS_MISSING_INPUT, "folder");
    ck_assert_fails(recipe_load("./lfuc_qwen0.5b.ini", NULL, 0, &recipe), STATUS_MISSING_INPUT,
                    "./lfuc_qwen0.5b.ini");
    ck_assert_fails(recipe_load("none.ini", NULL, 0, &recipe), STATUS_MISSING_INPUT, "/recipes");
    ck_assert_fails(recipe_load("", NULL, 0, &recipe), STATUS_USAGE, "empty");
}
END_TEST

// --- --set ----------------------------------------------------------------------------------

START_TEST(set_checks_like_the_file) {
    recipe_defaults(&recipe);
    ck_assert_ok(recipe_set(&recipe, "train.steps=12"));
    ck_assert_ok(recipe_set(&recipe, "data.train=/a.b/c:2,/d"));
    ck_assert_int_eq(recipe.train_steps, 12);
    ck_assert_str_eq(recipe.data_train, "/a.b/c:2,/d");
    static const char *const shapeless[] = {"", "train", "train.steps", "train=5", "=", "a=b.c"};
    for (size_t i = 0; i < sizeof shapeless / sizeof shapeless[0]; i++)
        ck_assert_fails(recipe_set(&recipe, shapeless[i]), STATUS_USAGE,
                        "expected section.key=value");
    ck_assert_fails(recipe_set(&recipe, "train.step=5"), STATUS_USAGE,
                    "--set train.step=5: unknown key 'step' in [train]; did you mean 'steps'?");
    ck_assert_fails(recipe_set(&recipe, "trian.steps=5"), STATUS_USAGE, "did you mean [train]?");
    ck_assert_fails(recipe_set(&recipe, "train.steps=-5"), STATUS_USAGE, "out of range");
    ck_assert_fails(recipe_set(&recipe, "run.name=a\nb"), STATUS_USAGE, "control character 0x0a");
    ck_assert_int_eq(recipe.train_steps, 12); // failures changed nothing
}
END_TEST

// --- Rules between keys ---------------------------------------------------------------------

// A recipe that passes, then one or two assignments, then the check.
static Status check_with(const char *first, const char *second) {
    ck_assert_ok(parse("[run]\nname = t\n[model]\nsource = m\n[data]\ntrain = d\n[lfuc]\nenabled = "
                       "on\n[train]\nsteps = 10\n"));
    ck_assert_ok(recipe_check(&recipe));
    ck_assert_ok(recipe_set(&recipe, first));
    if (second) ck_assert_ok(recipe_set(&recipe, second));
    return recipe_check(&recipe);
}

START_TEST(checks_rules_between_keys) {
    static const struct {
        const char *first, *second, *message;
    } cases[] = {
        {"run.name=../x", NULL, "run.name = '../x' cannot name a directory"},
        {"run.name=a/b", NULL, "cannot name a directory"},
        {"data.train=", NULL, "data.train is empty"},
        {"data.train=a:0", NULL, "weight '0' of a must be a number above 0"},
        {"data.train=a:1,,b", NULL, "source 2 has no directory"},
        {"data.train=a:-2", NULL, "weight '-2'"},
        {"train.eval_every=5", NULL, "needs held-out shards"},
        {"train.steps=0", NULL, "train.steps and train.tokens are both 0"},
        {"train.tokens=100", NULL, "are both given"},
        {"train.global_batch=12", "train.micro_batch=8", "is not a multiple of"},
        {"train.recompute=layers", NULL, "'layers' is unknown; expected none, layer"},
        {"train.recompute=none, norms", NULL, "stand alone"},
        {"optim.skip_steps=7, 3-x", NULL, "'3-x' is no step"},
        {"optim.skip_steps=0", NULL, "'0' is no step"},
        {"optim.skip_steps=9-8", NULL, "'9-8' is no step"},
        {"optim.skip_steps=5,", NULL, "'' is no step"},
        {"optim.skip_steps=99999999999999999999", NULL, "is no step"},
        {"optim.skip_steps= -3", NULL, "'-3' is no step"},
        {"train.recompute=", NULL, "'' is unknown"},
        {"optim.min_lr=1", NULL, "optim.min_lr = 1 is above optim.lr = 0.0001"},
        {"optim.schedule=wsd", NULL, "needs optim.decay_steps"},
        {"optim.schedule=wsd", "optim.decay_steps=11", "more than the 10 steps"},
        {"optim.beta2=1", NULL, "must both be below 1"},
        {"optim.epsilon=0", NULL, "divides by zero"},
        {"optim.state_dtype=bf16", "optim.beta2=0.999", "use state_dtype = f32"},
        {"optim.beta1=0.997", "optim.state_dtype=bf16", "does not decay any more"},
        {"model.source=", NULL, "lfuc.enabled needs model.source"},
        {"lfuc.top_k=7", NULL, "lfuc.top_k = 7 is more than lfuc.num_experts = 6"},
        {"router.gate=renorm", NULL, "straight_through"},
        {"lfuc.select=latency", NULL, "lfuc.select = latency is not available in this version"},
        {"lfuc.select=loss", NULL, "use budget"},
        {"lfuc.select=manual", NULL, "needs lfuc.blocks"},
        {"lfuc.blocks=3+1", NULL, "only read with lfuc.select = manual"},
        {"lfuc.max_block=3", NULL, "leaves no expert for the base"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        ck_assert_fails(check_with(cases[i].first, cases[i].second), STATUS_USAGE,
                        cases[i].message);
    ck_assert_ok(check_with("router.gate=renorm", "lfuc.top_k=2"));
    ck_assert_ok(check_with("router.gate=straight_through", NULL));
    ck_assert_ok(check_with("lfuc.select=latency", "lfuc.plan=p.json"));
    ck_assert_ok(check_with("optim.min_lr=1", "optim.schedule=constant"));
    ck_assert_ok(check_with("optim.state_dtype=bf16", "optim.beta2=0.995"));
    ck_assert_ok(check_with("optim.beta2=0.999", NULL));
    ck_assert_ok(check_with("train.recompute=norms, swiglu", NULL));
    ck_assert_ok(check_with("data.train=/a:b, /c:0.5,/d:2e1", NULL));
    ck_assert_ok(check_with("lfuc.enabled=no", "router.gate=renorm"));
}
END_TEST

START_TEST(derives_steps) {
    ck_assert_ok(parse("[data]\nsequence_length = 100\n[train]\nglobal_batch = 10\n"));
    recipe.train_tokens = 1000;
    ck_assert_int_eq(recipe_tokens_per_step(&recipe), 1000);
    ck_assert_int_eq(recipe_steps(&recipe), 1);
    recipe.train_tokens = 1001; // rounded up to whole steps
    ck_assert_int_eq(recipe_steps(&recipe), 2);
    recipe.train_tokens = INT64_MAX;
    ck_assert_int_eq(recipe_steps(&recipe), INT64_MAX / 1000 + 1);
    recipe.train_steps = 7;
    ck_assert_int_eq(recipe_steps(&recipe), 7);
    ck_assert_int_eq(recipe_warmup_steps(&recipe), 0);
    recipe.optim_warmup_tokens = 1; // at least one step
    ck_assert_int_eq(recipe_warmup_steps(&recipe), 1);
    recipe.optim_warmup_tokens = 2499; // to the nearest
    ck_assert_int_eq(recipe_warmup_steps(&recipe), 2);
    recipe.optim_warmup_tokens = 2500;
    ck_assert_int_eq(recipe_warmup_steps(&recipe), 3);
    recipe.optim_warmup_steps = 4; // steps win
    ck_assert_int_eq(recipe_warmup_steps(&recipe), 4);
}
END_TEST

// --- Printed forms --------------------------------------------------------------------------

static void count_difference(void *context, const char *key, const char *a, const char *b) {
    char *seen = context;
    sprintf(seen + strlen(seen), "%s:%s:%s ", key, a, b);
}

START_TEST(printed_recipe_reads_back) {
    ck_assert_ok(parse("[optim]\nlr = 0.1\nmin_lr = 3.3333333333333333e-7\n"
                       "[train]\ntokens = 9223372036854775807\n"
                       "[run]\nname = \" a \\\\ #b\"\ndirectory = \"\\\"quoted\\\"\"\n"
                       "[model]\nsource = c:\\d ;e\n[lfuc]\nselect = threshold\nenabled = true\n"));
    char *text = NULL;
    ck_assert_ok(recipe_print(&recipe, &text));
    recipe_defaults(&other);
    ck_assert_ok(recipe_parse(text, strlen(text), "printed", &other));
    char seen[1024] = "";
    recipe_compare(&recipe, &other, count_difference, seen);
    ck_assert_str_eq(seen, "");
    ck_assert(memcmp(&recipe, &other, sizeof recipe) == 0);
    ck_assert_ptr_nonnull(strstr(text, "[optim]\nlr = 0.1\n")); // shortest form, not 0.1000...
    free(text);
    ck_assert_ok(recipe_set(&other, "optim.lr=0.2"));
    ck_assert_ok(recipe_set(&other, "lfuc.enabled=off"));
    recipe_compare(&recipe, &other, count_difference, seen);
    ck_assert_str_eq(seen, "lfuc.enabled:true:false optim.lr:0.1:0.2 ");
}
END_TEST

START_TEST(defaults_are_in_range) {
    char *text = NULL;
    recipe_defaults(&recipe);
    ck_assert_ok(recipe_print(&recipe, &text));
    ck_assert_ok(recipe_parse(text, strlen(text), "defaults", &recipe));
    free(text);
}
END_TEST

// Every recipe of the tree reads and passes its check.
START_TEST(shipped_recipes_are_sound) {
    static const char *const names[] = {"quickstart_dense", "quickstart_lfuc", "lfuc_qwen0.5b",
                                        "cpt_qwen0.5b"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char path[512];
        snprintf(path, sizeof path, TEST_SOURCE_DIR "/recipes/%s.ini", names[i]);
        ck_assert_ok(recipe_load(path, NULL, 0, &recipe));
        ck_assert_ok(recipe_check(&recipe));
    }
}
END_TEST

TEST_MAIN("recipe", TEST(reads_every_kind), TEST(reads_long_lines_and_byte_order_mark),
          TEST(reads_numbers_exactly), TEST(names_line_and_nearest), TEST(refuses_nul_and_size),
          TEST(file_overrides_what_it_includes), TEST(includes_fail_with_their_line),
          TEST(finds_recipes_by_name), TEST(set_checks_like_the_file),
          TEST(checks_rules_between_keys), TEST(derives_steps), TEST(printed_recipe_reads_back),
          TEST(defaults_are_in_range), TEST(shipped_recipes_are_sound))
