// What `evaluate` opens: a run, one of its checkpoints and its export are the same model.
#include <stdarg.h>
#include "model/hf.h"
#include "tests/random_source.h"
#include "tests/shard_fixture.h"
#include "train/evaluate.h"
#include "train/run.h"

enum { VOCAB = 80, SEQUENCE = 16, BATCH = 2, SEQUENCES = 6 };

static Recipe recipe;
static EvalModel model; // large
static char shards_path[IO_PATH_MAX], run_path[IO_PATH_MAX];

static void set(const char *format, ...) {
    char text[2 * IO_PATH_MAX];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    ck_assert_ok(recipe_set(&recipe, text));
}

static const char *path_in_run(const char *name) {
    static char path[IO_PATH_MAX];
    ck_assert_ok(io_path(path, "%s/%s", run_path, name));
    return path;
}

// Fuses a random model and trains it for two steps, with biases on the choice of experts.
static void train_a_model(void) {
    char model_path[IO_PATH_MAX];
    ModelConfig config = small_config(4);
    TensorSource *source = random_source(&config, 3);
    ck_assert_ok(io_path(model_path, "%s/model", test_directory()));
    ck_assert_ok(io_path(run_path, "%s/run", test_directory()));
    ck_assert_ok(hf_write(model_path, source, &(HfWriteOptions){.dtype = DTYPE_F32}));
    source_close(source);
    DatasetSpec spec = {.num_tokens = 2000, .num_shards = 1, .vocab_size = VOCAB, .token_bytes = 2};
    ck_assert_ok(io_path(shards_path, "%s", fixture_dataset("shards", &spec)));

    recipe_defaults(&recipe);
    set("run.name=run");
    set("run.directory=%s", test_directory());
    set("run.threads=1");
    set("model.source=%s", model_path);
    set("data.train=%s", shards_path);
    set("data.sequence_length=%d", SEQUENCE);
    set("train.micro_batch=%d", BATCH);
    set("train.global_batch=%d", BATCH);
    set("train.steps=2");
    set("lfuc.enabled=true");
    set("lfuc.select=manual");
    set("lfuc.blocks=1+1");
    set("lfuc.num_experts=4");
    set("optim.lr=0.01");
    set("export.dtype=f32");
    ck_assert_ok(recipe_check(&recipe));
}

static void run(void) {
    RunOptions options = {.resume = RESUME_NEVER};
    ck_assert_ok(run_training(&recipe, &options));
}

static double loss_of(const char *path) {
    Backend *backend;
    Model *loaded;
    FixedPass *pass;
    ModelSums sums;
    MicroBatch batch;
    bool more;
    ModelOptions options = {.micro_batch = BATCH, .sequence_length = SEQUENCE};
    LoaderConfig data = {.sources = {{shards_path, 1}},
                         .num_sources = 1,
                         .sequence_length = SEQUENCE,
                         .micro_batch = BATCH,
                         .global_batch = BATCH,
                         .world = 1,
                         .prefetch_steps = 1,
                         .vocab_size = VOCAB,
                         .tokenizer_id = ""};
    ck_assert_ok(eval_model_open(path, &model));
    ck_assert_ok(backend_cpu(1, &backend));
    ck_assert_ok(eval_model_load(&model, backend, &options, &loaded));
    ck_assert_ok(fixed_pass_open(&data, SEQUENCES, &pass));
    ck_assert_ok(model_sums_create(loaded, &sums));
    ck_assert_ok(model_reset_sums(loaded));
    for (;;) {
        ck_assert_ok(fixed_pass_next(pass, &batch, &more));
        if (!more) break;
        ck_assert_ok(model_forward(loaded, &batch));
    }
    ck_assert_ok(model_read_sums(loaded, &sums));
    ck_assert_double_eq(sums.loss_count, SEQUENCES * SEQUENCE);
    double loss = sums.loss_sum / sums.loss_count;
    model_sums_free(&sums);
    fixed_pass_close(pass);
    model_destroy(loaded);
    backend_destroy(backend);
    eval_model_close(&model);
    return loss;
}

START_TEST(run_checkpoint_and_export_agree) {
    train_a_model();
    run();
    double loss = loss_of(run_path);
    // The same fp32 weights through the same operations.
    ck_assert(loss == loss_of(path_in_run("checkpoints/step_00000002")));
    ck_assert(loss == loss_of(path_in_run("export")));
}
END_TEST

START_TEST(knows_the_tokenizer_and_the_gate) {
    train_a_model();
    set("router.gate=straight_through");
    set("router.gate_scale=experts_over_k");
    run();
    ck_assert_ok(eval_model_open(run_path, &model));
    ck_assert_str_eq(model.tokenizer_id, FIXTURE_TOKENIZER);
    ck_assert_int_eq(model.config.router.gate, GATE_STRAIGHT_THROUGH);
    ck_assert(model.config.router.gate_scale == 4);
    ck_assert_int_eq(model.config.num_layers, 3);
    eval_model_close(&model);
    // gate_scale has no place in config.json: the export has it in the weights. Rounding of the
    // products differs, hence not equal to the bit.
    ck_assert_double_eq_tol(loss_of(run_path), loss_of(path_in_run("export")), 1e-5);
}
END_TEST

START_TEST(selection_biases_are_part_of_the_model) {
    train_a_model();
    set("router.balance_bias=true");
    set("router.bias_rate=1"); // a bias of 1 overrules every probability
    run();
    // The export cannot hold biases, so here the two must differ.
    ck_assert(loss_of(run_path) != loss_of(path_in_run("export")));
}
END_TEST

START_TEST(says_what_is_missing) {
    char path[IO_PATH_MAX];
    ck_assert_fails(eval_model_open("/nowhere", &model), STATUS_MISSING_INPUT, "/nowhere");
    ck_assert_fails(eval_model_open(test_directory(), &model), STATUS_MISSING_INPUT,
                    "holds no model");
    ck_assert_ok(io_path(path, "%s/young/checkpoints", test_directory()));
    ck_assert_ok(io_make_directories(path));
    ck_assert_ok(io_path(path, "%s/young", test_directory()));
    ck_assert_fails(eval_model_open(path, &model), STATUS_MISSING_INPUT, "no checkpoint yet");
    ck_assert_fails(eval_shards_of_text("/nowhere.txt", "bytes", path), STATUS_MISSING_INPUT,
                    "/nowhere.txt");
    char text[IO_PATH_MAX];
    ck_assert_ok(io_path(text, "%s/text.txt", test_directory()));
    ck_assert_ok(io_write_file_atomic(text, "text\n", 5));
    setenv("D2M_PYTHON", "/nowhere/python", 1);
    ck_assert_fails(eval_shards_of_text(text, "bytes", path), STATUS_MISSING_INPUT,
                    "scripts/setup.sh");
}
END_TEST

START_TEST(refuses_damaged_checkpoints) {
    train_a_model();
    run();
    FILE *file = fopen(path_in_run("checkpoints/step_00000002/model.safetensors"), "r+");
    ck_assert_ptr_nonnull(file);
    ck_assert_int_eq(fseek(file, -1, SEEK_END), 0);
    int last = fgetc(file);
    ck_assert_int_eq(fseek(file, -1, SEEK_END), 0);
    fputc(last ^ 1, file);
    fclose(file);
    ck_assert_fails(eval_model_open(path_in_run("checkpoints/step_00000002"), &model),
                    STATUS_BAD_DATA, "model.safetensors");
}
END_TEST

TEST_MAIN("evaluate", TEST(run_checkpoint_and_export_agree), TEST(knows_the_tokenizer_and_the_gate),
          TEST(selection_biases_are_part_of_the_model), TEST(says_what_is_missing),
          TEST(refuses_damaged_checkpoints))
