// What --dry-run says a run will take is what it takes.
#include <sys/resource.h>
#include <sys/wait.h>
#include "tests/shard_fixture.h"
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

TEST_MAIN("memory", TEST(training_takes_what_was_planned))
