// Checkpoints of every format version so far can be read and continued, and those of a version to
// come are refused. tests/fixtures/checkpoint-1 holds what version 1 of the formats wrote, with the
// shards that it was trained on; what must come out of it is written down here.
//
// A change of the formats that raises a version needs a new fixture beside the old ones:
// tests/fixtures/README.md says how one is made.
#include "tests/parallel_job.h"
#include "tests/tiny_trainer.h"
#include "train/run_state.h"

enum { SAVED_STEP = 8, LAST_STEP = 12 };

static const char fixture_directory[] = TEST_SOURCE_DIR "/tests/fixtures/checkpoint-1";
static const char fixture_checkpoint[] =
    TEST_SOURCE_DIR "/tests/fixtures/checkpoint-1/step_00000008";

// --- How a fixture is made -----------------------------------------------------------------------

// The run that saves it, and that continues it: few weights, and log lines that fall between saves.
static Recipe versions_recipe(const char *name, const char *data, const char *source) {
    Recipe r = tiny_recipe_(name);
    tiny_set(&r, "data.train=%s/train", data);
    tiny_set(&r, "data.valid=%s/valid", data);
    tiny_set(&r, "model.source=%s", source);
    tiny_set(&r, "train.steps=%d", LAST_STEP);
    tiny_set(&r, "train.eval_every=5");
    tiny_set(&r, "optim.lr=0.03"); // so that another course shows in the losses
    tiny_set(&r, "router.balance_weight=0.01");
    tiny_set(&r, "optim.spike_sigma=8");
    tiny_set(&r, "optim.spike_window=16");
    tiny_set(&r, "checkpoint.keep_last=5");
    tiny_set(&r, "parallel.bucket_bytes=4096");
    return r;
}

// A model of one dense layer and one with experts: a dense one of three layers, fused.
static void make_source(const char *data) {
    Recipe dense = versions_recipe("dense", data, "");
    tiny_set(&dense, "model.hidden_size=8");
    tiny_set(&dense, "model.num_layers=3");
    tiny_set(&dense, "model.num_heads=2");
    tiny_set(&dense, "model.num_kv_heads=1");
    tiny_set(&dense, "model.intermediate_size=8");
    expect_exit(&dense, NULL, STATUS_OK);
    char source[IO_PATH_MAX];
    snprintf(source, sizeof source, "%s", tiny_run_path("dense", "export"));
    Recipe fused = versions_recipe("fused", data, source);
    tiny_set(&fused, "lfuc.enabled=true");
    tiny_set(&fused, "lfuc.prune_layers=1");
    tiny_set(&fused, "lfuc.protect_first=0");
    tiny_set(&fused, "lfuc.num_experts=3");
    tiny_set(&fused, "lfuc.follower_copies=1");
    tiny_set(&fused, "lfuc.elsewhere=dense");
    tiny_set(&fused, "lfuc.calibration_sequences=4");
    expect_exit(&fused, NULL, STATUS_OK);
}

static void use_runs(void) {
    setenv("DENSE2MOE_LOG", "error", 1);
    snprintf(tiny_runs_, sizeof tiny_runs_, "%s/runs", test_directory());
    ck_assert_ok(io_make_directories(tiny_runs_));
}

// The fixture of this version of the program, in a directory of the test: its path.
static const char *make_fixture(void) {
    static char made[128];
    const DatasetSpec train = {
        .num_tokens = 800, .num_shards = 2, .vocab_size = TINY_VOCAB, .token_bytes = 2};
    const DatasetSpec valid = {
        .num_tokens = 100, .num_shards = 1, .vocab_size = TINY_VOCAB, .token_bytes = 2};
    char source[IO_PATH_MAX], to[IO_PATH_MAX];
    snprintf(made, sizeof made, "%s/made", test_directory());
    fixture_dataset("made/train", &train);
    fixture_dataset("made/valid", &valid);
    use_runs();
    make_source(made);
    // Two ranks, so that it has the parts of several.
    snprintf(source, sizeof source, "%s", tiny_run_path("fused", "export"));
    Job job = {.recipe = versions_recipe("saved", made, source), .victim = ALL_RANKS};
    run_ok(2, &job);
    ck_assert_ok(checkpoint_path(tiny_run_path("saved", "checkpoints"), SAVED_STEP, source));
    ck_assert_ok(io_path(to, "%s/step_%08d", made, SAVED_STEP));
    tiny_copy_directory(source, to);
    return made;
}

// --- What is in one ------------------------------------------------------------------------------

typedef enum ArenaKind { ARENA_MASTER, ARENA_M, ARENA_V } ArenaKind;

// What a fixture gives back, to the bit. Hashes are over fp32 values in the order of tensor names,
// so that where a later version keeps a tensor does not matter.
typedef struct Content {
    char hex[3][HASH_HEX_SIZE];  // of each ArenaKind
    char weights[HASH_HEX_SIZE]; // of model.safetensors, read as a Hugging Face directory
    char router_load[HASH_HEX_SIZE];
    int64_t step, tokens, updates;
    uint64_t seed, consumed;
    int64_t losses_seen, interval_steps, eval_step;
    double first_loss, interval_loss, start_loss, last_loss;
} Content;

static const float *tensor_values(const TinyTrainer *t, ArenaKind kind, const Tensor *tensor) {
    static float values[1 << 12];
    const Optimizer *o = t->optimizer;
    const float *arenas[] = {t->model->master, o->m, o->v};
    ck_assert_int_le(tensor->count, 1 << 12);
    ck_assert_ok(t->backend->ops->download(t->backend, values, arenas[kind] + tensor->offset,
                                           (size_t)tensor->count * sizeof *values));
    return values;
}

static void hash_arena(const TinyTrainer *t, ArenaKind kind, char hex[HASH_HEX_SIZE]) {
    const TensorTable *table = &t->model->table;
    HashStream *stream;
    ck_assert_ok(hash_stream_create(&stream));
    for (int i = 0; i < table->count; i++) {
        const Tensor *tensor = table->by_name[i];
        hash_stream_update(stream, tensor->name, strlen(tensor->name));
        hash_stream_update(stream, tensor_values(t, kind, tensor),
                           (size_t)tensor->count * sizeof(float));
    }
    hash_to_hex(hash_stream_digest(stream), hex);
    hash_stream_free(stream);
}

static void read_arenas(const char *path, const ModelConfig *config, Content *content) {
    const OptimizerOptions options = tiny_options();
    TinyTrainer t = tiny_trainer(config, &options, 1);
    ck_assert_ok(checkpoint_load(path, t.model, t.optimizer));
    for (ArenaKind kind = ARENA_MASTER; kind <= ARENA_V; kind++)
        hash_arena(&t, kind, content->hex[kind]);
    // What other programs read is loaded over it.
    TensorSource *source;
    ck_assert_ok(hf_open(path, &source));
    ck_assert_ok(model_load(t.model, source));
    hash_arena(&t, ARENA_MASTER, content->weights);
    source_close(source);
    tiny_trainer_free(&t);
}

static void read_state(const json_t *root, const ModelConfig *config, Content *content) {
    RunState state;
    ck_assert_ok(run_state_create(config, &state));
    skip_rule_init(&state.skip, 8, 16, 100);
    ck_assert_ok(run_state_from_json(root, "state.json", &state));
    content->step = state.step;
    content->tokens = state.tokens;
    content->updates = state.updates;
    content->seed = state.data.seed;
    ck_assert_int_eq(state.data.num_sources, 1);
    content->consumed = state.data.consumed[0];
    content->losses_seen = state.skip.seen;
    content->first_loss = state.skip.losses[0];
    content->interval_steps = state.interval.steps;
    content->interval_loss = state.interval.loss_sum;
    content->eval_step = state.eval_step;
    content->start_loss = state.start_loss;
    content->last_loss = state.last_loss;
    hash_to_hex(hash_bytes(state.load, (size_t)(state.num_layers * state.stride) * sizeof(float)),
                content->router_load);
    run_state_free(&state);
}

static Content read_checkpoint(const char *path) {
    Content content = {.step = -1};
    ModelConfig config;
    json_t *root, *object;
    ck_assert_ok(checkpoint_verify(path));
    ck_assert_ok(checkpoint_read_state(path, &root));
    ck_assert_ok(json_get_object(root, path, "config", &object));
    ck_assert_ok(config_from_canonical(object, path, &config));
    read_state(root, &config, &content);
    read_arenas(path, &config, &content);
    json_decref(root);
    return content;
}

static void print_content(const Content *c) {
    printf("hex: {\"%s\", \"%s\", \"%s\"}\nweights: \"%s\"\nrouter_load: \"%s\"\n", c->hex[0],
           c->hex[1], c->hex[2], c->weights, c->router_load);
    printf("step %" PRId64 ", tokens %" PRId64 ", updates %" PRId64 ", seed %" PRIu64
           ", consumed %" PRIu64 ", losses_seen %" PRId64 ", interval_steps %" PRId64
           ", eval_step %" PRId64 "\n",
           c->step, c->tokens, c->updates, c->seed, c->consumed, c->losses_seen, c->interval_steps,
           c->eval_step);
    printf("first_loss %a, interval_loss %a, start_loss %a, last_loss %a\n", c->first_loss,
           c->interval_loss, c->start_loss, c->last_loss);
}

// Losses of the log lines after the fixture's step.
enum { LINES = 2 };
static void read_losses(const char *name, double losses[LINES]) {
    static const int64_t steps[LINES] = {9, 12};
    json_t *lines = tiny_log(name, "step"), *line;
    size_t index, count = json_array_size(lines);
    ck_assert_uint_ge(count, LINES);
    for (int i = 0; i < LINES; i++) {
        index = count - LINES + (size_t)i;
        line = json_array_get(lines, index);
        ck_assert_int_eq(json_integer_value(json_object_get(line, "step")), steps[i]);
        losses[i] = json_number_value(json_object_get(line, "loss"));
    }
    json_decref(lines);
}

// What the present version would write as a fixture, so that how one is made does not rot. With
// D2M_FIXTURE it is kept in that directory, and what must come out of it is printed.
START_TEST(a_fixture_of_this_version_is_made) {
    const char *keep = getenv("D2M_FIXTURE");
    const char *made = make_fixture();
    char path[IO_PATH_MAX], from[IO_PATH_MAX], to[IO_PATH_MAX];
    static const char *const parts[] = {"train", "valid", "step_00000008"};
    double losses[LINES];
    ck_assert_ok(io_path(path, "%s/step_%08d", made, SAVED_STEP));
    Content content = read_checkpoint(path);
    ck_assert_int_eq(content.step, SAVED_STEP);
    read_losses("saved", losses);
    if (!keep) return;
    for (int i = 0; i < 3; i++) {
        ck_assert_ok(io_path(from, "%s/%s", made, parts[i]));
        ck_assert_ok(io_path(to, "%s/%s", keep, parts[i]));
        tiny_copy_directory(from, to);
    }
    print_content(&content);
    printf("losses: %.9g, %.9g\n", losses[0], losses[1]);
}
END_TEST

// --- Version 1 -----------------------------------------------------------------------------------

static const Content version_1 = {
    .hex = {"641b23796ccdde15eaf256f5f79513fc", "f004ea21800cd38b8a2196218de24495",
            "3e8e272562289951f877754fc318f3af"},
    .weights = "0a97ab044cddfd6be6f1cfeb58320acf",
    .router_load = "84515d667f1522838b3e677439969b3e",
    .step = 8,
    .tokens = 512,
    .updates = 8,
    .seed = 1,
    .consumed = 32,
    .losses_seen = 8,
    .interval_steps = 2,
    .eval_step = 5,
    .first_loss = 0x1.266a6a1914p+1,
    .interval_loss = 0x1.e9778ce4p+7,
    .start_loss = 0x1.288819e8p+1,
    .last_loss = 0x1.fe6972eaaaaabp+0,
};
static const double version_1_losses[LINES] = {1.89247664, 2.04267733};

START_TEST(a_checkpoint_of_version_1_is_read) {
    const Content *expected = &version_1;
    const Content found = read_checkpoint(fixture_checkpoint);
    for (ArenaKind kind = ARENA_MASTER; kind <= ARENA_V; kind++)
        ck_assert_str_eq(found.hex[kind], expected->hex[kind]);
    ck_assert_str_eq(found.weights, expected->weights);
    ck_assert_str_eq(found.router_load, expected->router_load);
    ck_assert_int_eq(found.step, expected->step);
    ck_assert_int_eq(found.tokens, expected->tokens);
    ck_assert_int_eq(found.updates, expected->updates);
    ck_assert_uint_eq(found.seed, expected->seed);
    ck_assert_uint_eq(found.consumed, expected->consumed);
    ck_assert_int_eq(found.losses_seen, expected->losses_seen);
    ck_assert_int_eq(found.interval_steps, expected->interval_steps);
    ck_assert_int_eq(found.eval_step, expected->eval_step);
    ck_assert_double_eq(found.first_loss, expected->first_loss);
    ck_assert_double_eq(found.interval_loss, expected->interval_loss);
    ck_assert_double_eq(found.start_loss, expected->start_loss);
    ck_assert_double_eq(found.last_loss, expected->last_loss);
}
END_TEST

// The fixture's shards where a run may leave its notes beside them.
static const char *copied_data(void) {
    static const char *const parts[] = {"train", "valid"};
    static char copy[128];
    char from[IO_PATH_MAX], to[IO_PATH_MAX];
    snprintf(copy, sizeof copy, "%s/data", test_directory());
    for (int i = 0; i < 2; i++) {
        ck_assert_ok(io_path(from, "%s/%s", fixture_directory, parts[i]));
        ck_assert_ok(io_path(to, "%s/%s", copy, parts[i]));
        tiny_copy_directory(from, to);
    }
    return copy;
}

// The checkpoint's weights serve as the model, too: what has its shape will do.
static Job continuation(const char *name, const char *checkpoint) {
    return (Job){.recipe = versions_recipe(name, copied_data(), fixture_checkpoint),
                 .options = {.resume = RESUME_FROM, .resume_path = checkpoint},
                 .victim = ALL_RANKS};
}

START_TEST(runs_continue_a_checkpoint_of_version_1) {
    use_runs();
    for (int world = 1; world <= 2; world++) {
        char name[32], hex[HASH_HEX_SIZE];
        double losses[LINES];
        snprintf(name, sizeof name, "continued%d", world);
        Job job = continuation(name, fixture_checkpoint);
        ranks_start(world, &comm_options, run_rank, &job);
        ranks_join(world);
        for (int r = 0; r < world; r++) ranks_expect(r, STATUS_OK, "");
        ck_assert_int_eq(tiny_newest(name, "state.json", hex), LAST_STEP);
        read_losses(name, losses);
        // The machine that made the fixture may add in another order, which other kernels of the
        // BLAS show in the eighth digit; AdamW without its moments would show in the third.
        for (int i = 0; i < LINES; i++)
            ck_assert_double_eq_tol(losses[i], version_1_losses[i], 2e-5);
    }
}
END_TEST

// --- Versions to come ----------------------------------------------------------------------------

// The fixture, one of its files being of version 2 and the hashes those of what is there.
static void make_newer(const char *directory, const char *file) {
    char path[IO_PATH_MAX];
    Manifest manifest;
    json_t *root;
    tiny_copy_directory(fixture_checkpoint, directory);
    ck_assert_ok(io_path(path, "%s/%s", directory, file));
    ck_assert_ok(json_read_file(path, 1 << 20, &root));
    ck_assert_int_eq(json_object_set_new(root, "version", json_integer(2)), 0);
    ck_assert_ok(json_write_file(path, root));
    json_decref(root);
    if (strcmp(file, MANIFEST_NAME) == 0) return;
    ck_assert_ok(manifest_read(directory, &manifest));
    for (int i = 0; i < manifest.count; i++) {
        if (strcmp(manifest.files[i].name, file) != 0) continue;
        FileHash *hash = &manifest.files[i].hash;
        ck_assert_ok(hash_file_like(path, &(FileHash){0}, hash));
    }
    ck_assert_ok(manifest_write(&manifest, directory));
    manifest_free(&manifest);
}

START_TEST(a_newer_version_is_refused) {
    static const char *const files[] = {MANIFEST_NAME, "state.json"};
    use_runs();
    for (int i = 0; i < 2; i++) {
        char path[IO_PATH_MAX], name[32], text[64];
        snprintf(name, sizeof name, "newer%d", i);
        snprintf(path, sizeof path, "%s", tiny_run_path(name, "checkpoints/step_00000008"));
        make_newer(path, files[i]);
        Job job = continuation(name, path);
        // Named with --resume, and found by the run itself, which does not start again from
        // nothing.
        for (int found = 0; found < 2; found++) {
            TinyRun run = {.options = {.resume = RESUME_AUTO}};
            if (!found) run.options = job.options;
            expect_exit(&job.recipe, &run, STATUS_BAD_DATA);
            snprintf(text, sizeof text, "%s: version 2 is newer than this program's 1",
                     i == 0 ? MANIFEST_NAME : "step_00000008");
            expect_message(&job.recipe, text);
        }
        ck_assert(io_exists(path));
        // Nor does it go on from an older one, which would end in writing over this one.
        char older[IO_PATH_MAX];
        snprintf(older, sizeof older, "%s", tiny_run_path(name, "checkpoints/step_00000004"));
        tiny_copy_directory(fixture_checkpoint, older);
        TinyRun run = {.options = {.resume = RESUME_AUTO}};
        expect_exit(&job.recipe, &run, STATUS_BAD_DATA);
        expect_message(&job.recipe, "is newer than this program's 1");
    }
}
END_TEST

TEST_MAIN_TIMEOUT("checkpoint_versions", 300, TEST(a_fixture_of_this_version_is_made),
                  TEST(a_checkpoint_of_version_1_is_read),
                  TEST(runs_continue_a_checkpoint_of_version_1), TEST(a_newer_version_is_refused))
