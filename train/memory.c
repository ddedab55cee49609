// The memory plan of a run: each room says what it will allocate; this file adds what no room
// allocates itself (program, libraries, BLAS buffers) and knows the machine.
#include "train/memory.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include "base/log.h"
#include "model/similarity.h"
#include "train/checkpoint.h"

// The number in a one-number file like memory.max; UINT64_MAX when there is none ("max").
static uint64_t read_limit(const char *path) {
    uint64_t value = UINT64_MAX;
    FILE *file = fopen(path, "r");
    if (!file) return UINT64_MAX;
    if (fscanf(file, "%" SCNu64, &value) != 1) value = UINT64_MAX;
    fclose(file);
    return value;
}

uint64_t memory_of_machine(void) {
    static const char *const limits[] = {"/sys/fs/cgroup/memory.max",
                                         "/sys/fs/cgroup/memory/memory.limit_in_bytes"};
    uint64_t bytes = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    for (size_t i = 0; i < sizeof limits / sizeof limits[0]; i++) {
        uint64_t limit = read_limit(limits[i]);
        if (limit < bytes) bytes = limit;
    }
    return bytes;
}

uint64_t memory_resident(void) {
    uint64_t total = 0, resident = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    if (!file) return 0;
    if (fscanf(file, "%" SCNu64 " %" SCNu64, &total, &resident) != 2) resident = 0;
    fclose(file);
    return resident * (uint64_t)sysconf(_SC_PAGESIZE);
}

uint64_t memory_training_state(const MemoryPlan *plan) {
    static const char *const state[] = {"parameters", "gradients", "optimizer state"};
    uint64_t bytes = 0;
    for (int i = 0; i < plan->count; i++)
        for (size_t j = 0; j < sizeof state / sizeof state[0]; j++)
            if (strcmp(plan->items[i].name, state[j]) == 0) bytes += plan->items[i].bytes;
    return bytes;
}

Status run_memory_plan(const Recipe *recipe, Backend *backend, const ModelConfig *config,
                       MemoryPlan *out) {
    ModelOptions options;
    DataConfig data;
    TensorTable table;
    Status status = STATUS_OK;
    *out = (MemoryPlan){0};
    TRY(prepare_model_options(recipe, true, &options));
    TRY(prepare_train_data(recipe, config, &data));
    TRY(model_plan(backend, config, &options, out));
    TRY(tensor_table_build(config, &table));
    TRY_GOTO(optimizer_plan(&table, out), done);
    TRY_GOTO(checkpoint_plan(&table, out), done);
    TRY_GOTO(loader_plan(&data.loader, out), done);
    TRY_GOTO(memory_plan_add(out, "program and libraries", memory_resident()), done);
done:
    tensor_table_free(&table);
    return status;
}

Status calibration_memory_plan(const Recipe *recipe, Backend *backend, const ModelConfig *seed,
                               MemoryPlan *out) {
    ModelOptions options;
    *out = (MemoryPlan){0};
    TRY(prepare_model_options(recipe, false, &options));
    TRY(model_plan(backend, seed, &options, out));
    TRY(memory_plan_add(
        out, "similarity",
        similarity_bytes(seed, &options, backend->compute_dtype, (int)recipe->lfuc_max_block)));
    return memory_plan_add(out, "program and libraries", memory_resident());
}

Status memory_warn(const Recipe *recipe, Backend *backend, const ModelConfig *config) {
    MemoryPlan plan;
    char need[BYTES_TEXT_SIZE], have[BYTES_TEXT_SIZE];
    TRY(run_memory_plan(recipe, backend, config, &plan));
    uint64_t machine = memory_of_machine();
    if (memory_plan_total(&plan) > machine)
        log_warn("training needs about %s, this machine has %s; the system may kill it (train "
                 "--dry-run says what to change)",
                 bytes_text(memory_plan_total(&plan), need), bytes_text(machine, have));
    return STATUS_OK;
}
