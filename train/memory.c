// The memory plan of a run: each room says what it will allocate; this file adds what no room
// allocates itself (program, libraries, BLAS buffers) and knows the machine.
//
// A GPU has memory of its own, and a run that asks for more of it than there is fails at once and
// for sure, so it is refused before it starts. The machine's memory can be overcommitted, shared
// and swapped; there a run is only warned.
#include "train/memory.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include "base/log.h"
#include "model/similarity.h"
#include "optim/pairwise.h"
#include "train/checkpoint.h"
#include "train/launch.h"

// What the GPU libraries load when an op first runs: code, tables, plans of attention.
enum { GPU_LIBRARIES_BYTES = 256 << 20 };

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

uint64_t memory_training_state(const RunMemory *memory) {
    static const char *const state[] = {"parameters", "master weights", "gradients",
                                        "gradient sums", "optimizer state"};
    const MemoryPlan *plan = memory->on_gpu ? &memory->gpu : &memory->machine;
    uint64_t bytes = 0;
    for (int i = 0; i < plan->count; i++)
        for (size_t j = 0; j < sizeof state / sizeof state[0]; j++)
            if (strcmp(plan->items[i].name, state[j]) == 0) bytes += plan->items[i].bytes;
    return bytes;
}

// --- Plans ---------------------------------------------------------------------------------------

// Where the backend's allocations go; limits, and what is there already.
static Status begin_plan(Backend *backend, RunMemory *out, MemoryPlan **device) {
    uint64_t total;
    *out = (RunMemory){
        .machine_bytes = memory_of_machine(), .processes = 1, .device_name = backend->device_name};
    TRY(backend->ops->memory(backend, &out->gpu_bytes, &total));
    out->on_gpu = total > 0;
    *device = out->on_gpu ? &out->gpu : &out->machine;
    if (out->on_gpu) TRY(memory_plan_add(&out->gpu, "GPU libraries", GPU_LIBRARIES_BYTES));
    return memory_plan_add(&out->machine, "program and libraries", memory_resident());
}

Status run_memory_plan(const Recipe *recipe, Backend *backend, const ModelConfig *config, int ranks,
                       RunMemory *out) {
    ModelOptions options;
    OptimizerOptions optimizer = prepare_optimizer_options(recipe);
    DataConfig data;
    TensorTable table, whole = {0};
    const TensorTable *saved = &table;
    MemoryPlan *device;
    Status status = STATUS_OK;
    TRY(begin_plan(backend, out, &device));
    TRY(prepare_model_options(recipe, true, &options));
    TRY(prepare_train_data(recipe, config, &data));
    options.ranks = data.loader.world = ranks;
    options.share_gradients = ranks > 1 && recipe->parallel_zero == ZERO_2;
    options.expert_ranks = (int)recipe->parallel_expert;
    if (launch_all_here()) out->processes = ranks;
    TRY(model_plan(backend, config, &options, device));
    TRY(model_table(config, &options, &table));
    TRY_GOTO(traffic_plan(&table, &options, device), done);
    TRY_GOTO(optimizer_plan(&table, &optimizer, backend->compute_dtype, ranks, device), done);
    if (recipe->parallel_pairwise)
        TRY_GOTO(pairwise_plan(&table, loader_micro_batches(&data.loader), device), done);
    if (options.expert_ranks > 1) { // rank 0 has only some experts, and saves all
        TRY_GOTO(tensor_table_build(config, &whole), done);
        saved = &whole;
    }
    CheckpointOptions checkpoint = {.rank = 0, .world = ranks};
    TRY_GOTO(checkpoint_plan(&table, saved, optimizer.state_dtype, backend->compute_dtype,
                             &checkpoint, &out->machine),
             done);
    TRY_GOTO(loader_plan(&data.loader, &out->machine), done);
done:
    tensor_table_free(&whole);
    tensor_table_free(&table);
    return status;
}

// A model that is not trained.
static Status plan_forward_only(const Recipe *recipe, Backend *backend, const ModelConfig *config,
                                RunMemory *out, ModelOptions *options, MemoryPlan **device) {
    TRY(begin_plan(backend, out, device));
    TRY(prepare_model_options(recipe, false, options));
    return model_plan(backend, config, options, *device);
}

Status export_memory_plan(const Recipe *recipe, Backend *backend, const ModelConfig *config,
                          RunMemory *out) {
    ModelOptions options;
    MemoryPlan *device;
    return plan_forward_only(recipe, backend, config, out, &options, &device);
}

Status calibration_memory_plan(const Recipe *recipe, Backend *backend, const ModelConfig *seed,
                               RunMemory *out) {
    ModelOptions options;
    MemoryPlan *device;
    TRY(plan_forward_only(recipe, backend, seed, out, &options, &device));
    return memory_plan_add(
        device, "similarity",
        similarity_bytes(seed, &options, backend->compute_dtype, (int)recipe->lfuc_max_block));
}

static bool gpu_suffices(const RunMemory *memory) {
    return !memory->on_gpu || memory_plan_total(&memory->gpu) <= memory->gpu_bytes;
}

uint64_t memory_on_machine(const RunMemory *memory) {
    return memory_plan_total(&memory->machine) * (uint64_t)memory->processes;
}

bool memory_fits(const RunMemory *memory) {
    return memory_on_machine(memory) <= memory->machine_bytes && gpu_suffices(memory);
}

// --- What to change ------------------------------------------------------------------------------

// True when the variant fits; false when it does not or is no valid recipe.
static bool variant_fits(const Recipe *variant, Backend *backend, const ModelConfig *config,
                         int ranks, RunMemory *memory) {
    Status status = recipe_check(variant);
    if (status == STATUS_OK) status = prepare_check_world(variant, backend, ranks);
    if (status == STATUS_OK) status = run_memory_plan(variant, backend, config, ranks, memory);
    if (status == STATUS_OK) return memory_fits(memory);
    status_clear();
    return false;
}

// What takes less memory beside a smaller micro-batch, by what it costs: time, then precision. Each
// changes the recipe and says whether that was a change.
static bool recompute_swiglu(Recipe *r, const Backend *backend) {
    (void)backend;
    if (strcmp(r->train_recompute, "none") != 0) return false;
    snprintf(r->train_recompute, sizeof r->train_recompute, "swiglu");
    return true;
}
static bool recompute_layer(Recipe *r, const Backend *backend) {
    (void)backend;
    if (strcmp(r->train_recompute, "layer") == 0) return false;
    snprintf(r->train_recompute, sizeof r->train_recompute, "layer");
    return true;
}
static bool narrow_state(Recipe *r, const Backend *backend) {
    (void)backend;
    if (r->optim_state_dtype == STATE_BF16) return false;
    r->optim_state_dtype = STATE_BF16;
    return true;
}
static bool narrow_gradients(Recipe *r, const Backend *backend) {
    if (r->train_grad_dtype == GRADIENTS_BF16 || backend->compute_dtype != DTYPE_BF16) return false;
    r->train_grad_dtype = GRADIENTS_BF16;
    return true;
}

typedef struct Saving {
    bool (*apply)(Recipe *, const Backend *);
    const char *replaces, *text; // the text of an earlier one that it makes pointless, and its own
} Saving;
static const Saving savings[] = {
    {recompute_swiglu, NULL, ", train.recompute = swiglu"},
    {recompute_layer, ", train.recompute = swiglu", ", train.recompute = layer"},
    {narrow_state, NULL, ", optim.state_dtype = bf16"},
    {narrow_gradients, NULL, ", train.grad_dtype = bf16"},
};
enum { NUM_SAVINGS = sizeof savings / sizeof savings[0] };

static void add_saving(const Saving *saving, char text[MEMORY_CHANGE_MAX]) {
    char *earlier = saving->replaces ? strstr(text, saving->replaces) : NULL;
    size_t used = earlier ? (size_t)(earlier - text) : strlen(text);
    snprintf(text + used, MEMORY_CHANGE_MAX - used, "%s", saving->text);
}

bool memory_variant(Recipe *variant, Backend *backend, const ModelConfig *config, int ranks,
                    char change[MEMORY_CHANGE_MAX], RunMemory *memory) {
    const int64_t micro_batch = variant->train_micro_batch;
    char extra[MEMORY_CHANGE_MAX] = "";
    for (int n = 0; n <= NUM_SAVINGS; n++) {
        if (n > 0 && !savings[n - 1].apply(variant, backend)) continue;
        if (n > 0) add_saving(&savings[n - 1], extra);
        for (int64_t b = n > 0 ? micro_batch : micro_batch / 2; b >= 1; b /= 2) {
            variant->train_micro_batch = b;
            snprintf(change, MEMORY_CHANGE_MAX, "train.micro_batch = %" PRId64 "%.120s", b, extra);
            if (variant_fits(variant, backend, config, ranks, memory)) return true;
        }
    }
    return false;
}

// --- Before a run --------------------------------------------------------------------------------

typedef struct Text {
    char text[STATUS_TEXT_MAX];
    size_t used;
} Text;

__attribute__((format(printf, 2, 3))) static void add_text(Text *t, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    size_t room = sizeof t->text - t->used;
    int length = vsnprintf(t->text + t->used, room, format, arguments);
    va_end(arguments);
    if (length > 0) t->used += (size_t)length < room ? (size_t)length : room - 1;
}

// The GPU's table, and how much `what` lacks.
static void add_table(Text *t, const RunMemory *memory, const char *what) {
    const MemoryPlan *plan = &memory->gpu;
    char need[BYTES_TEXT_SIZE], have[BYTES_TEXT_SIZE];
    add_text(t, "%s needs %s of GPU memory, of %s there are %s free:", what,
             bytes_text(memory_plan_total(plan), need), memory->device_name,
             bytes_text(memory->gpu_bytes, have));
    for (int i = 0; i < plan->count; i++)
        add_text(t, "\n    %-20s %9s", plan->items[i].name, bytes_text(plan->items[i].bytes, need));
}

static void warn_machine(const RunMemory *memory) {
    char need[BYTES_TEXT_SIZE], have[BYTES_TEXT_SIZE];
    if (memory_on_machine(memory) <= memory->machine_bytes) return;
    log_warn("training needs about %s, this machine has %s; the system may kill it (train "
             "--dry-run says what to change)",
             bytes_text(memory_on_machine(memory), need), bytes_text(memory->machine_bytes, have));
}

static Status warn_export(const Recipe *recipe, Backend *backend, const ModelConfig *config) {
    RunMemory memory;
    if (!export_takes_whole_model(recipe)) return STATUS_OK;
    TRY(export_memory_plan(recipe, backend, config, &memory));
    if (!memory_fits(&memory))
        log_warn("the export after the last step takes the whole model on rank 0 and does not fit "
                 "there: " EXPORT_ELSEWHERE);
    return STATUS_OK;
}

Status memory_check(const Recipe *recipe, Backend *backend, const ModelConfig *config, int ranks) {
    RunMemory memory, smaller;
    char change[MEMORY_CHANGE_MAX], need[BYTES_TEXT_SIZE];
    Recipe variant = *recipe;
    Text t = {.used = 0};
    TRY(run_memory_plan(recipe, backend, config, ranks, &memory));
    warn_machine(&memory);
    TRY(warn_export(recipe, backend, config));
    if (gpu_suffices(&memory)) return STATUS_OK;
    add_table(&t, &memory, "training");
    if (memory_variant(&variant, backend, config, ranks, change, &smaller))
        add_text(&t, "\nwith %s: %s", change, bytes_text(memory_plan_total(&smaller.gpu), need));
    else
        add_text(
            &t,
            "\nno micro_batch, recompute or narrower state makes it fit; train a smaller model, or "
            "share out its experts among more GPUs (parallel.expert)");
    FAIL(STATUS_USAGE, "%s", t.text);
}

Status memory_check_calibration(const Recipe *recipe, Backend *backend, const ModelConfig *seed) {
    RunMemory memory;
    Text t = {.used = 0};
    TRY(calibration_memory_plan(recipe, backend, seed, &memory));
    if (gpu_suffices(&memory)) return STATUS_OK;
    add_table(&t, &memory, "the similarity measurement");
    FAIL(STATUS_USAGE, "%s\nlower train.micro_batch or data.sequence_length", t.text);
}
