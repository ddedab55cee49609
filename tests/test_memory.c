// What --dry-run says a run will take is what it takes.
#include <sys/resource.h>
#include <sys/wait.h>
#include "tests/shard_fixture.h"
#include "tests/synthetic.h"
#include "train/memory.h"
#include "train/run.h"

#ifdef __SANITIZE_ADDRESS__
enum { SANITIZED = 1 };
#else
enum { SANITIZED = 0 };
#endif

static Recipe recipe;

static void set(const char *key, const char *value) {
    char text[2 * IO_PATH_MAX];
    snprintf(text, sizeof text, "%s=%s", key, value);
    ck_assert_ok(recipe_set(&recipe, text));
}

// The linker puts this in place of tensor_table_build (CMakeLists.txt).
static int tables_built;
Status __real_tensor_table_build(const ModelConfig *config, TensorTable *out);
Status __wrap_tensor_table_build(const ModelConfig *config, TensorTable *out);
Status __wrap_tensor_table_build(const ModelConfig *config, TensorTable *out) {
    tables_built++;
    return __real_tensor_table_build(config, out);
}

// Peak resident memory of a process that trains the recipe and ends.
static uint64_t peak_of_training(void) {
    pid_t pid = fork();
    ck_assert_int_ge(pid, 0);
    if (pid == 0) {
        RunOptions options = {.resume = RESUME_NEVER};
        _exit(run_training(&recipe, &options));
    }
    int status;
    struct rusage usage;
    ck_assert_int_eq(wait4(pid, &status, 0, &usage), pid);
    ck_assert_msg(WIFEXITED(status) && WEXITSTATUS(status) == 0, "training failed: %d", status);
    return (uint64_t)usage.ru_maxrss * 1024;
}

START_TEST(training_takes_what_was_planned) {
    if (SANITIZED) {
        printf("test_memory: skipped: AddressSanitizer's own memory would count as well\n");
        return;
    }
    static ModelConfig config;
    Backend *backend;
    TensorSource *source;
    RunMemory memory;
    RunDir dir = {.lock_fd = -1};
    DatasetSpec spec = {.num_tokens = 20000, .num_shards = 1, .vocab_size = 257, .token_bytes = 2};
    ck_assert_ok(recipe_load(TEST_SOURCE_DIR "/recipes/quickstart_dense.ini", NULL, 0, &recipe));
    set("run.directory", test_directory());
    set("run.device", "cpu");
    set("data.train", fixture_dataset("shards", &spec));
    set("data.valid", recipe.data_train);
    set("train.eval_sequences", "8");
    set("train.steps", "2");
    set("optim.warmup_steps", "1");

    ck_assert_ok(prepare_backend(&recipe, 0, &backend));
    ck_assert_ok(prepare_model(&recipe, backend, &dir, &config, &source));
    ck_assert_ok(run_memory_plan(&recipe, backend, &config, 1, &memory));
    backend_destroy(backend);
    double planned = (double)memory_plan_total(&memory.machine), peak = (double)peak_of_training();
    printf("test_memory: planned %.1f MB, peak %.1f MB\n", planned / 1e6, peak / 1e6);
    // 10 %: what the documentation promises of --dry-run.
    ck_assert_double_le(peak, 1.1 * planned);
    ck_assert_double_ge(peak, 0.9 * planned);
}
END_TEST

static uint64_t planned_bytes(const RunMemory *memory, const char *name) {
    for (int i = 0; i < memory->machine.count; i++)
        if (strcmp(memory->machine.items[i].name, name) == 0) return memory->machine.items[i].bytes;
    ck_abort_msg("no item %s", name);
}

// Plans are made by the dozen where one is looked for that fits, and large models have tens of
// thousands of tensors.
START_TEST(the_whole_models_table_is_built_where_it_is_another_one) {
    static ModelConfig config;
    Backend *backend;
    RunMemory whole, shared;
    DatasetSpec spec = {.num_tokens = 20000, .num_shards = 1, .vocab_size = 50, .token_bytes = 2};
    config = synthetic_moe(synthetic_qwen2(), 8, 1, GATE_SOFTMAX);
    ck_assert_ok(recipe_load(TEST_SOURCE_DIR "/recipes/quickstart_dense.ini", NULL, 0, &recipe));
    set("run.device", "cpu");
    set("data.train", fixture_dataset("shards", &spec));
    ck_assert_ok(prepare_backend(&recipe, 0, &backend));
    tables_built = 0;
    ck_assert_ok(run_memory_plan(&recipe, backend, &config, 2, &whole));
    ck_assert_int_eq(tables_built, 0);
    set("parallel.expert", "2");
    ck_assert_ok(run_memory_plan(&recipe, backend, &config, 2, &shared));
    ck_assert_int_eq(tables_built, 1);
    backend_destroy(backend);
    // Rank 0 saves all experts, also those that it has not got.
    ck_assert_uint_lt(planned_bytes(&shared, "parameters"), planned_bytes(&whole, "parameters"));
    ck_assert_uint_ge(planned_bytes(&shared, "checkpoint snapshot"),
                      planned_bytes(&whole, "checkpoint snapshot"));
}
END_TEST

TEST_MAIN("memory", TEST(training_takes_what_was_planned),
          TEST(the_whole_models_table_is_built_where_it_is_another_one))
