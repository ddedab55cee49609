// From a recipe to model and data: what is refused before anything is created, how a plan is made,
// kept, and made again, and what --surgery-only writes.
#include <stdarg.h>
#include "model/fusion.h"
#include "model/hf.h"
#include "tests/random_source.h"
#include "tests/shard_fixture.h"
#include "train/device.h"
#include "train/memory.h"
#include "train/run.h"

enum { LAYERS = 6, VOCAB = 80, SEQUENCE = 16 };

static Recipe recipe;
static char model_path[256], runs_path[256];

static void set(const char *format, ...) {
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    ck_assert_ok(recipe_set(&recipe, text));
}

static void write_text(const char *directory, const char *name, const char *text) {
    char path[IO_PATH_MAX];
    ck_assert_ok(io_path(path, "%s/%s", directory, name));
    ck_assert_ok(io_write_file_atomic(path, text, strlen(text)));
}

static const char *make_shards(const char *name, int vocab_size, const char *tokenizer_id) {
    DatasetSpec spec = {.num_tokens = 2000,
                        .num_shards = 1,
                        .vocab_size = vocab_size,
                        .token_bytes = 2,
                        .tokenizer_id = tokenizer_id};
    return fixture_dataset(name, &spec);
}

// A dense model of 6 layers, shards for it, and a recipe that fuses one pair of its layers.
static void set_up(void) {
    snprintf(model_path, sizeof model_path, "%s/model", test_directory());
    snprintf(runs_path, sizeof runs_path, "%s/runs", test_directory());
    ModelConfig config = small_config(LAYERS);
    TensorSource *source = random_source(&config, 3);
    ck_assert_ok(io_remove_tree(model_path));
    ck_assert_ok(hf_write(model_path, source, &(HfWriteOptions){.dtype = DTYPE_F32}));
    source_close(source);

    recipe_defaults(&recipe);
    set("run.name=test");
    set("run.directory=%s", runs_path);
    set("run.threads=1");
    set("run.device=cpu");
    set("model.source=%s", model_path);
    set("data.train=%s", make_shards("shards", VOCAB, NULL));
    set("data.sequence_length=%d", SEQUENCE);
    set("train.micro_batch=2");
    set("train.global_batch=2");
    set("train.steps=1");
    set("lfuc.enabled=true");
    set("lfuc.prune_layers=1");
    set("lfuc.num_experts=4");
    set("lfuc.calibration_sequences=4");
    ck_assert_ok(recipe_check(&recipe));
}

// Number of layers of the model that the recipe leads to, or the failure.
static Status prepared_layers(int *layers) {
    RunDir dir = {.lock_fd = -1};
    Backend *backend;
    static ModelConfig config;
    TensorSource *source;
    snprintf(dir.path, sizeof dir.path, "%s/test", runs_path);
    ck_assert_ok(prepare_backend(&recipe, 0, &backend));
    Status status = prepare_model(&recipe, backend, &dir, &config, &source);
    if (status == STATUS_OK) {
        *layers = config.num_layers;
        if (source) ck_assert_int_eq(source->config->num_layers, config.num_layers);
        source_close(source);
    }
    backend_destroy(backend);
    return status;
}

static const char *in_run(const char *name) {
    static char path[512];
    snprintf(path, sizeof path, "%s/test/%s", runs_path, name);
    return path;
}

// --- Inputs ---------------------------------------------------------------------------------

START_TEST(refuses_bad_inputs) {
    Backend *backend;
    set_up();
    ck_assert_ok(prepare_check_inputs(&recipe));

    set("run.device=cuda");
    const DeviceOptions cuda = {.choice = DEVICE_CUDA};
    if (device_check(&cuda) != STATUS_OK) // what is missing depends on build and machine
        ck_assert_fails(prepare_check_inputs(&recipe), STATUS_USAGE, "run.device = cuda: ");
    set("run.device=cpu");
    set("train.grad_dtype=bf16");
    ck_assert_fails(prepare_check_inputs(&recipe), STATUS_USAGE, "train.grad_dtype = bf16 needs a");
    ck_assert_fails(prepare_backend(&recipe, 0, &backend), STATUS_USAGE, "train.grad_dtype = f32");
    set("run.device=cuda");
    set("run.gpu_precision=fp32");
    ck_assert_fails(prepare_check_inputs(&recipe), STATUS_USAGE, "needs run.gpu_precision = bf16");
    set("run.device=cpu");
    set("run.gpu_precision=bf16");
    set("train.grad_dtype=f32");
    set("lfuc.prune_layers=3"); // layers 1 to 4 hold two pairs
    ck_assert_fails(prepare_check_inputs(&recipe), STATUS_USAGE, "can prune at most 2");
    set("lfuc.prune_layers=1");
    set("lfuc.select=manual");
    set("lfuc.blocks=3+1, 4+1");
    ck_assert_fails(prepare_check_inputs(&recipe), STATUS_USAGE, "4+1");
    set("lfuc.blocks=");
    set("lfuc.select=budget");
    set("lfuc.plan=%s/no-plan.json", test_directory());
    ck_assert_fails(prepare_check_inputs(&recipe), STATUS_MISSING_INPUT, "no-plan.json");
    set("lfuc.plan=");

    set("data.train=%s/nowhere", test_directory());
    ck_assert_fails(prepare_check_inputs(&recipe), STATUS_MISSING_INPUT, "nowhere");
    set("data.train=%s", make_shards("wide", VOCAB + 1, NULL));
    ck_assert_fails(prepare_check_inputs(&recipe), STATUS_BAD_DATA, "a vocabulary of 81");

    set("model.source=%s/nomodel", test_directory());
    ck_assert_fails(prepare_check_inputs(&recipe), STATUS_MISSING_INPUT, "nomodel");
    ck_assert(!io_exists(runs_path)); // nothing was created
}
END_TEST

START_TEST(refuses_another_tokenizer) {
    set_up();
    set("data.valid=%s", make_shards("other", VOCAB,
                                     "1111111111111111111111111111111111111111"
                                     "111111111111111111111111"));
    ck_assert_ok(prepare_check_inputs(&recipe)); // the model has no tokenizer files
    write_text(model_path, "dense2moe_tokenizer.json", "{\"type\": \"bytes\"}");
    ck_assert_fails(prepare_check_inputs(&recipe), STATUS_BAD_DATA, "other: the shards were made");
    set("data.valid=");
    ck_assert_ok(prepare_check_inputs(&recipe));
}
END_TEST

START_TEST(refuses_incomplete_models) {
    set_up();
    char path[IO_PATH_MAX];
    write_text(model_path, "config.json", "{\"model_type\": \"mamba\"}");
    ck_assert_fails(prepare_check_inputs(&recipe), STATUS_BAD_DATA, "mamba");
    ck_assert_ok(io_path(path, "%s/config.json", model_path));
    ck_assert_ok(io_unlink(path));
    ck_assert_fails(prepare_check_inputs(&recipe), STATUS_MISSING_INPUT, "config.json");
    set_up();
    ck_assert_ok(io_path(path, "%s/model.safetensors", model_path));
    ck_assert_ok(io_unlink(path));
    ck_assert_fails(prepare_check_inputs(&recipe), STATUS_MISSING_INPUT, "model.safetensors");
}
END_TEST

START_TEST(random_models_take_the_shards_vocabulary) {
    static ModelConfig config;
    Backend *backend;
    TensorSource *source;
    RunDir dir = {.lock_fd = -1};
    set_up();
    set("model.source=");
    set("lfuc.enabled=false");
    set("model.family=qwen3");
    ck_assert_ok(prepare_backend(&recipe, 0, &backend));
    ck_assert_ok(prepare_model(&recipe, backend, &dir, &config, &source));
    backend_destroy(backend);
    ck_assert_ptr_null(source);
    ck_assert_int_eq(config.vocab_size, VOCAB);
    ck_assert_int_eq(config.eos_token_id, VOCAB - 1);
    ck_assert_int_eq(config.head_dim, 64);
    ck_assert(config.qk_norm && !config.qkv_bias);
    set("model.num_heads=3");
    ck_assert_fails(prepare_check_inputs(&recipe), STATUS_USAGE, "not a multiple of");
    set("model.num_heads=4");
    set("model.num_kv_heads=3");
    ck_assert_fails(prepare_check_inputs(&recipe), STATUS_USAGE, "recipe: [model]");
}
END_TEST

START_TEST(reads_several_sources) {
    DataConfig data;
    ModelConfig config = small_config(1);
    set_up();
    set("data.train= /a:b:2.5, c/d ,e:1");
    set("model.source=");
    ck_assert_ok(prepare_train_data(&recipe, &config, &data));
    ck_assert_int_eq(data.loader.num_sources, 3);
    ck_assert_str_eq(data.loader.sources[0].directory, "/a:b");
    ck_assert(data.loader.sources[0].weight == 2.5);
    ck_assert_str_eq(data.loader.sources[1].directory, "c/d");
    ck_assert(data.loader.sources[1].weight == 1);
    ck_assert_str_eq(data.loader.sources[2].directory, "e");
    ck_assert_int_eq(data.loader.vocab_size, config.vocab_size);
}
END_TEST

// --- Plans ----------------------------------------------------------------------------------

START_TEST(keeps_its_plan) {
    int layers = 0;
    char *before, *after;
    size_t bytes, bytes_after;
    set_up();
    ck_assert_ok(prepared_layers(&layers));
    ck_assert_int_eq(layers, LAYERS - 1);
    ck_assert(io_exists(in_run("plan/similarity.h5")));
    ck_assert_ok(io_read_file(in_run("plan/plan.json"), 1 << 20, &before, &bytes));

    // Without the text that it was measured on the plan can only come from the file.
    char shards[IO_PATH_MAX];
    ck_assert_ok(io_path(shards, "%s", recipe.data_train));
    ck_assert_ok(io_remove_tree(shards));
    ck_assert_ok(prepared_layers(&layers));
    ck_assert_int_eq(layers, LAYERS - 1);
    ck_assert_ok(io_read_file(in_run("plan/plan.json"), 1 << 20, &after, &bytes_after));
    ck_assert_str_eq(before, after);
    free(before);
    free(after);
}
END_TEST

START_TEST(changed_recipes_make_a_new_plan_until_trained) {
    int layers = 0;
    set_up();
    ck_assert_ok(prepared_layers(&layers));
    set("optim.lr=1e-3"); // decides nothing about the plan
    set("lfuc.prune_layers=2");
    ck_assert_ok(prepared_layers(&layers));
    ck_assert_int_eq(layers, LAYERS - 2);

    ck_assert_ok(io_make_directories(in_run("checkpoints/step_00000001")));
    set("lfuc.prune_layers=1");
    ck_assert_fails(prepared_layers(&layers), STATUS_RECIPE_MISMATCH, "lfuc.prune_layers: 2 -> 1");
    set("lfuc.prune_layers=2");
    set("data.train=%s", make_shards("moved", VOCAB, NULL)); // the text may have moved
    ck_assert_ok(prepared_layers(&layers));
    ck_assert_int_eq(layers, LAYERS - 2);
}
END_TEST

START_TEST(edited_and_given_plans_count) {
    int layers = 0;
    static FusionPlan plan;
    ModelConfig config = small_config(LAYERS);
    set_up();
    ck_assert_ok(prepared_layers(&layers));
    ck_assert_ok(fusion_plan_read(in_run("plan/plan.json"), &plan));
    plan.num_blocks = 2;
    plan.blocks[0] = (FusionBlock){.base = 1, .followers = 1, .score = 0.5};
    plan.blocks[1] = (FusionBlock){.base = 3, .followers = 1, .score = 0.5};
    ck_assert_ok(fusion_plan_write(&plan, &config, in_run("plan/plan.json")));
    ck_assert_ok(prepared_layers(&layers));
    ck_assert_int_eq(layers, LAYERS - 2);

    // The same file as another run's plan; there, no text is needed.
    char path[IO_PATH_MAX];
    ck_assert_ok(io_path(path, "%s/edited.json", test_directory()));
    ck_assert_ok(fusion_plan_write(&plan, &config, path));
    set("lfuc.plan=%s", path);
    set("data.train=%s/nowhere", test_directory());
    set("run.seed=9");
    ck_assert_ok(prepared_layers(&layers));
    ck_assert_int_eq(layers, LAYERS - 2);

    plan.num_experts = 5;
    ck_assert_ok(fusion_plan_write(&plan, &config, path));
    set("run.seed=10"); // makes the run look for its plan again
    ck_assert_fails(prepared_layers(&layers), STATUS_RECIPE_MISMATCH,
                    "differ in lfuc.num_experts (5 in the plan, 4 in the recipe)");
}
END_TEST

START_TEST(damaged_plans_are_refused) {
    int layers = 0;
    set_up();
    ck_assert_ok(prepared_layers(&layers));
    char directory[IO_PATH_MAX];
    ck_assert_ok(io_path(directory, "%s", in_run("plan")));
    write_text(directory, "plan.json", "{\"blocks\": [");
    ck_assert_fails(prepared_layers(&layers), STATUS_BAD_DATA, "plan.json");
}
END_TEST

// --- Stopping early -------------------------------------------------------------------------

START_TEST(surgery_only_writes_the_fused_model) {
    set_up();
    set("lfuc.select=manual");
    set("lfuc.blocks=2+1");
    set("export.dtype=f32");
    set("data.train=%s/nowhere", test_directory()); // a given plan needs no text
    ck_assert_ok(prepare_only(&recipe, STOP_AFTER_PLAN));
    ck_assert(!io_exists(in_run("surgery")));
    ck_assert_ok(prepare_only(&recipe, STOP_AFTER_SURGERY));

    TensorSource *fused, *seed;
    ck_assert_ok(hf_open(in_run("surgery"), &fused));
    ck_assert_ok(hf_open(model_path, &seed));
    ck_assert_int_eq(fused->config->num_layers, LAYERS - 1);
    ck_assert_int_eq(fused->config->layers[0].num_experts, 4);
    // Layer 2 fused with layer 3: experts 2 and 3 are copies of the follower's MLP.
    float *expert = read_tensor(fused, "model.layers.2.mlp.experts.3.down_proj.weight", NULL);
    int64_t count;
    float *follower = read_tensor(seed, "model.layers.3.mlp.down_proj.weight", &count);
    ck_assert(memcmp(expert, follower, (size_t)count * sizeof *expert) == 0);
    free(expert);
    free(follower);
    source_close(seed);
    source_close(fused);
}
END_TEST

START_TEST(stopping_early_fails_cleanly) {
    set_up();
    char file[IO_PATH_MAX];
    write_text(test_directory(), "a_file", "x");
    ck_assert_ok(io_path(file, "%s/a_file", test_directory()));
    set("run.directory=%s", file);
    ck_assert_fails(prepare_only(&recipe, STOP_AFTER_PLAN), STATUS_CANNOT_WRITE, "a_file");
    set("run.directory=%s", runs_path);
    set("lfuc.enabled=false");
    ck_assert_fails(prepare_only(&recipe, STOP_AFTER_PLAN), STATUS_USAGE, "--plan-only needs");
}
END_TEST

// --- Memory ---------------------------------------------------------------------------------

START_TEST(memory_plan_counts_the_training_state) {
    ModelConfig config = small_config(LAYERS);
    TensorTable table;
    Backend *backend;
    RunMemory memory;
    set_up();
    ck_assert_ok(prepare_backend(&recipe, 0, &backend));
    ck_assert_ok(tensor_table_build(&config, &table));
    ck_assert_ok(run_memory_plan(&recipe, backend, &config, 1, &memory));
    // fp32 weights, gradients and two moments of every element of the arenas.
    ck_assert_uint_eq(memory_training_state(&memory), 16 * (uint64_t)table.total);
    ck_assert_uint_gt(memory_plan_total(&memory.machine),
                      memory_training_state(&memory) + memory_resident());
    ck_assert_uint_gt(memory.machine_bytes, memory_resident());
    ck_assert(!memory.on_gpu && memory_fits(&memory));
    tensor_table_free(&table);
    backend_destroy(backend);
}
END_TEST

// A backend whose memory is not the machine's: the CPU's, as far as plans can tell.
static uint64_t gpu_free;
static Status gpu_memory(Backend *backend, uint64_t *free_bytes, uint64_t *total_bytes) {
    (void)backend;
    *free_bytes = gpu_free;
    *total_bytes = UINT64_MAX;
    return STATUS_OK;
}

START_TEST(a_gpu_must_have_room) {
    ModelConfig config = small_config(LAYERS);
    Backend *backend;
    RunMemory memory;
    set_up();
    set("train.micro_batch=64");
    set("train.global_batch=64");
    ck_assert_ok(prepare_backend(&recipe, 0, &backend));
    BackendOps ops = *backend->ops;
    ops.memory = gpu_memory;
    backend->ops = &ops;
    ck_assert_ok(run_memory_plan(&recipe, backend, &config, 1, &memory));
    ck_assert(memory.on_gpu && !memory_fits(&memory)); // nothing is free yet
    // Snapshot, data and program stay with the machine, and each item is in one place only.
    for (int i = 0; i < memory.gpu.count; i++)
        for (int j = 0; j < memory.machine.count; j++)
            ck_assert_str_ne(memory.gpu.items[i].name, memory.machine.items[j].name);
    ck_assert_uint_gt(memory_training_state(&memory), 0);
    uint64_t all = memory_plan_total(&memory.gpu);
    gpu_free = all;
    ck_assert_ok(memory_check(&recipe, backend, &config, 1));
    gpu_free = all - 1;
    ck_assert_fails(memory_check(&recipe, backend, &config, 1), STATUS_USAGE, "activations");
    ck_assert_msg(strstr(status_message(), "with train.micro_batch = 32: "), "%s",
                  status_message());
    gpu_free = 1000;
    ck_assert_fails(memory_check(&recipe, backend, &config, 1), STATUS_USAGE, "smaller model");
    ck_assert_fails(memory_check_calibration(&recipe, backend, &config), STATUS_USAGE,
                    "similarity measurement");
    backend_destroy(backend);
}
END_TEST

// One byte less than each of these needs asks for the next.
START_TEST(what_saves_memory_is_tried_by_what_it_costs) {
    static const char *const changes[] = {"train.recompute=swiglu", "train.recompute=layer",
                                          "optim.state_dtype=bf16"};
    static const char *const hints[] = {
        "with train.micro_batch = 1, train.recompute = swiglu: ",
        "with train.micro_batch = 1, train.recompute = layer: ",
        "with train.micro_batch = 1, train.recompute = layer, optim.state_dtype = bf16: "};
    ModelConfig config = small_config(LAYERS);
    Backend *backend;
    RunMemory memory;
    set_up();
    set("train.micro_batch=1");
    set("train.global_batch=1");
    set("train.recompute=none");
    ck_assert_ok(prepare_backend(&recipe, 0, &backend));
    BackendOps ops = *backend->ops;
    ops.memory = gpu_memory;
    backend->ops = &ops;
    const Recipe asked = recipe;
    for (int i = 0; i < 3; i++) {
        ck_assert_ok(run_memory_plan(&recipe, backend, &config, 1, &memory));
        gpu_free = memory_plan_total(&memory.gpu) - 1;
        ck_assert_fails(memory_check(&asked, backend, &config, 1), STATUS_USAGE, "activations");
        ck_assert_msg(strstr(status_message(), hints[i]), "%s", status_message());
        set("%s", changes[i]);
    }
    backend_destroy(backend);
}
END_TEST

TEST_MAIN("prepare", TEST(refuses_bad_inputs), TEST(refuses_another_tokenizer),
          TEST(refuses_incomplete_models), TEST(random_models_take_the_shards_vocabulary),
          TEST(reads_several_sources), TEST(keeps_its_plan),
          TEST(changed_recipes_make_a_new_plan_until_trained), TEST(edited_and_given_plans_count),
          TEST(damaged_plans_are_refused), TEST(surgery_only_writes_the_fused_model),
          TEST(stopping_early_fails_cleanly), TEST(memory_plan_counts_the_training_state),
          TEST(a_gpu_must_have_room), TEST(what_saves_memory_is_tried_by_what_it_costs))
