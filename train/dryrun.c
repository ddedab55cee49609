// train --dry-run: what the recipe means, before anything is allocated or written.
//
// Prints the resolved recipe, the plan, parameters, memory per item against what the machine has,
// and tokens and steps. Works without data and without weights: config.json is enough. Where the
// plan is still to be measured, a stand-in with the same shape is used (a budget fixes how many
// layers go, whichever they are).
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/file.h"
#include "train/memory.h"
#include "train/prepare.h"

// --- Figures as text -------------------------------------------------------------------------

enum { COUNT_TEXT_SIZE = 32 };

// "1,234,567"
static const char *grouped_text(int64_t value, char text[COUNT_TEXT_SIZE]) {
    char digits[COUNT_TEXT_SIZE];
    int length = snprintf(digits, sizeof digits, "%" PRId64, value), out = 0;
    for (int i = 0; i < length; i++) {
        if (i > 0 && (length - i) % 3 == 0) text[out++] = ',';
        text[out++] = digits[i];
    }
    text[out] = '\0';
    return text;
}

// "1.66 B", "19.7 M": parameters and tokens.
static const char *count_text(int64_t value, char text[COUNT_TEXT_SIZE]) {
    static const char *const units[] = {"", " K", " M", " B", " T"};
    double scaled = (double)value;
    int unit = 0;
    while (scaled >= 999.5 && unit < 4) scaled /= 1000, unit++;
    int decimals = unit == 0 || scaled >= 99.95 ? 0 : scaled >= 9.995 ? 1 : 2;
    snprintf(text, COUNT_TEXT_SIZE, "%.*f%s", decimals, scaled, units[unit]);
    return text;
}

// --- The plan and the shape it leads to --------------------------------------------------------

typedef enum PlanOrigin { PLAN_GIVEN, PLAN_OF_RUN, PLAN_TO_MEASURE } PlanOrigin;

// What a dry run works on. Large, so it lives on the heap.
typedef struct DryRun {
    const Recipe *recipe;
    int ranks;
    Backend *backend;
    ModelConfig seed, config; // before and after surgery
    FusionPlan plan;
    PlanOrigin origin;
} DryRun;

// A plan of the shape that the measurement will lead to: all layers look equally alike. The
// threshold rule may find anything from no block on; none is the largest model.
static Status stand_in_plan(DryRun *dry) {
    const Recipe *recipe = dry->recipe;
    plan_settings(recipe, &dry->seed, &dry->plan);
    if (recipe->lfuc_select == LFUC_THRESHOLD) return STATUS_OK;
    TRY(plan_check_budget(recipe, &dry->seed));
    int left = (int)recipe->lfuc_prune_layers, most = (int)recipe->lfuc_max_block;
    int layer = (int)recipe->lfuc_protect_first;
    int free_layers = dry->seed.num_layers - layer - (int)recipe->lfuc_protect_last;
    while (left > 0) {
        // Small blocks while the layers suffice, since those are the more likely outcome.
        int followers = 1;
        while (followers < most && followers < left &&
               fusion_most_prunable(free_layers - followers - 1, most) < left - followers)
            followers++;
        FusionBlock *block = &dry->plan.blocks[dry->plan.num_blocks++];
        *block = (FusionBlock){.base = layer, .followers = followers};
        layer += followers + 1;
        free_layers -= followers + 1;
        left -= followers;
    }
    return STATUS_OK;
}

static Status find_shape(DryRun *dry) {
    const Recipe *recipe = dry->recipe;
    char name[IO_PATH_MAX], run_path[IO_PATH_MAX];
    bool found = false;
    TRY(prepare_seed_config(recipe, &dry->seed));
    dry->config = dry->seed;
    if (!recipe->lfuc_enabled) return STATUS_OK;
    TRY(recipe_run_name(recipe, name, sizeof name));
    TRY(io_path(run_path, "%s/%s", recipe->run_directory, name));
    TRY(plan_of_run(recipe, run_path, &dry->seed, &dry->plan, &found));
    if (found) {
        dry->origin = PLAN_OF_RUN;
    } else if (plan_is_given(recipe)) {
        dry->origin = PLAN_GIVEN;
        TRY(plan_from_recipe(recipe, &dry->seed, &dry->plan));
    } else {
        dry->origin = PLAN_TO_MEASURE;
        TRY(stand_in_plan(dry));
    }
    return fusion_target_config(&dry->plan, &dry->seed, &dry->config);
}

static Status print_plan(const DryRun *dry) {
    const Recipe *recipe = dry->recipe;
    if (!recipe->lfuc_enabled) return STATUS_OK;
    char *text = NULL;
    if (dry->origin == PLAN_TO_MEASURE) {
        printf("\nplan: to be measured on %" PRId64 " sequences",
               recipe->lfuc_calibration_sequences);
        if (recipe->lfuc_select == LFUC_THRESHOLD)
            printf("; figures below are for no block, every block found makes the model smaller\n");
        else
            printf("; it will prune %" PRId64 " of %d layers\n", recipe->lfuc_prune_layers,
                   dry->seed.num_layers);
        return STATUS_OK;
    }
    printf("\nplan (%s)\n", dry->origin == PLAN_GIVEN ? "given by the recipe" : "of this run");
    TRY(fusion_plan_text(&dry->plan, &dry->seed, &text));
    printf("%s", text);
    free(text);
    return STATUS_OK;
}

// --- Parameters --------------------------------------------------------------------------------

static Status print_parameter_line(const char *what, const ModelConfig *config) {
    TensorTable table;
    char total[COUNT_TEXT_SIZE], active[COUNT_TEXT_SIZE];
    TRY(tensor_table_build(config, &table));
    printf("  %-22s %8s total, %8s active per token, %d layers\n", what,
           count_text(table.parameters, total), count_text(table.active_parameters, active),
           config->num_layers);
    tensor_table_free(&table);
    return STATUS_OK;
}

static Status print_parameters(const DryRun *dry) {
    printf("\nparameters\n");
    if (!dry->recipe->lfuc_enabled) return print_parameter_line("model", &dry->config);
    TRY(print_parameter_line("dense model", &dry->seed));
    return print_parameter_line("fused model", &dry->config);
}

// --- Memory ------------------------------------------------------------------------------------

static void print_plan_items(const MemoryPlan *plan, uint64_t bytes, const char *of) {
    char text[BYTES_TEXT_SIZE];
    for (int i = 0; i < plan->count; i++)
        printf("  %-22s %9s\n", plan->items[i].name, bytes_text(plan->items[i].bytes, text));
    printf("  %-22s %9s", "total", bytes_text(memory_plan_total(plan), text));
    printf(" of %s %s\n", bytes_text(bytes, text), of);
}

static void print_memory_plan(const RunMemory *memory, const char *of_what) {
    char of[300];
    printf("\nmemory of %s\n", of_what);
    if (memory->on_gpu) {
        snprintf(of, sizeof of, "free on the GPU (%s)", memory->device_name);
        print_plan_items(&memory->gpu, memory->gpu_bytes, of);
    }
    print_plan_items(&memory->machine, memory->machine_bytes, "of this machine");
}

// Fewer experts change the model: the last resort. The blocks stay as they are.
static bool variant_with_experts(const DryRun *dry, Recipe *variant, char change[MEMORY_CHANGE_MAX],
                                 RunMemory *memory) {
    if (!dry->recipe->lfuc_enabled || dry->recipe->lfuc_plan[0]) return false;
    DryRun *other = malloc(sizeof *other);
    bool found = false;
    if (!other) return false;
    *other = *dry;
    variant->lfuc_follower_copies = other->plan.follower_copies = 1;
    for (int experts = other->plan.num_experts - 1; experts >= 2 && !found; experts--) {
        variant->lfuc_num_experts = other->plan.num_experts = experts;
        snprintf(change, MEMORY_CHANGE_MAX,
                 "train.micro_batch = 1, train.recompute = layer, lfuc.num_experts = %d, "
                 "lfuc.follower_copies = 1",
                 experts);
        Status status = recipe_check(variant);
        if (status == STATUS_OK)
            status = fusion_target_config(&other->plan, &other->seed, &other->config);
        if (status == STATUS_OK)
            status = run_memory_plan(variant, dry->backend, &other->config, dry->ranks, memory);
        if (status != STATUS_OK) status_clear();
        found = status == STATUS_OK && memory_fits(memory);
    }
    free(other);
    return found;
}

static void print_what_fits(const DryRun *dry) {
    Recipe variant = *dry->recipe;
    RunMemory memory;
    char change[MEMORY_CHANGE_MAX], text[BYTES_TEXT_SIZE];
    if (!memory_variant(&variant, dry->backend, &dry->config, dry->ranks, change, &memory) &&
        !variant_with_experts(dry, &variant, change, &memory)) {
        printf("  no micro_batch, recompute, narrower state or num_experts makes it fit\n");
        return;
    }
    const MemoryPlan *plan = memory.on_gpu ? &memory.gpu : &memory.machine;
    printf("  with %s: %s\n", change, bytes_text(memory_plan_total(plan), text));
}

static Status print_memory(const DryRun *dry) {
    const Recipe *recipe = dry->recipe;
    char text[BYTES_TEXT_SIZE], what[64];
    RunMemory training, calibration, whole;
    TRY(run_memory_plan(recipe, dry->backend, &dry->config, dry->ranks, &training));
    snprintf(what, sizeof what, dry->ranks > 1 ? "training, each of %d ranks" : "training",
             dry->ranks);
    print_memory_plan(&training, what);
    printf("  training state (parameters, gradients, AdamW moments): %s\n",
           bytes_text(memory_training_state(&training), text));
    if (training.processes > 1)
        printf("  %d ranks on this machine: %s of its memory\n", training.processes,
               bytes_text(memory_on_machine(&training), text));
    bool fits = memory_fits(&training);
    if (recipe->lfuc_enabled && dry->origin == PLAN_TO_MEASURE) {
        TRY(calibration_memory_plan(recipe, dry->backend, &dry->seed, &calibration));
        print_memory_plan(&calibration, "the calibration, given back before training");
        fits = fits && memory_fits(&calibration);
    }
    if (export_takes_whole_model(recipe)) {
        TRY(export_memory_plan(recipe, dry->backend, &dry->config, &whole));
        print_memory_plan(&whole, "the export on rank 0, once training is done");
        if (!memory_fits(&whole)) printf("  does not fit: " EXPORT_ELSEWHERE "\n");
    }
    printf("\n%s\n", fits ? "fits" : "DOES NOT FIT");
    if (!fits) print_what_fits(dry);
    return STATUS_OK;
}

// --- Tokens and steps ----------------------------------------------------------------------------

static Status print_data(const DryRun *dry, int64_t run_tokens) {
    DataConfig data;
    TRY(prepare_train_data(dry->recipe, &dry->config, &data));
    double weights = 0;
    for (int i = 0; i < data.loader.num_sources; i++) weights += data.loader.sources[i].weight;
    for (int i = 0; i < data.loader.num_sources; i++) {
        const LoaderSource *source = &data.loader.sources[i];
        double share = source->weight / weights;
        DatasetSummary summary;
        char tokens[COUNT_TEXT_SIZE];
        if (dataset_summary(source->directory, &summary) != STATUS_OK) {
            printf("  %s: %.3g %% of the tokens; no shards to read yet\n", source->directory,
                   100 * share);
            status_clear();
            continue;
        }
        printf("  %s: %.3g %% of the tokens; %s tokens there, %.3g epochs\n", source->directory,
               100 * share, count_text((int64_t)summary.tokens, tokens),
               share * (double)run_tokens / (double)summary.tokens);
    }
    return STATUS_OK;
}

static Status print_training(const DryRun *dry) {
    const Recipe *recipe = dry->recipe;
    int64_t steps = recipe_steps(recipe), per_step = recipe_tokens_per_step(recipe);
    char text[COUNT_TEXT_SIZE], total[COUNT_TEXT_SIZE];
    int64_t run_tokens;
    if (__builtin_mul_overflow(steps, per_step, &run_tokens)) run_tokens = INT64_MAX;
    printf("\ntraining\n");
    printf("  tokens per step  %s (%" PRId64 " x %" PRId64 ")\n", grouped_text(per_step, text),
           recipe->train_global_batch, recipe->data_sequence_length);
    printf("  steps            %s, of which %" PRId64 " warm-up\n", grouped_text(steps, text),
           recipe_warmup_steps(recipe));
    printf("  tokens           %s (%s)\n", count_text(run_tokens, total),
           grouped_text(run_tokens, text));
    return print_data(dry, run_tokens);
}

static Status print_all(DryRun *dry) {
    char *text = NULL;
    TRY(prepare_backend(dry->recipe, 0, &dry->backend));
    TRY(prepare_check_world(dry->recipe, dry->backend, dry->ranks));
    TRY(find_shape(dry));
    TRY(recipe_print(dry->recipe, &text));
    printf("# %s\n%s", dry->recipe->path, text);
    free(text);
    TRY(print_plan(dry));
    TRY(print_parameters(dry));
    TRY(print_memory(dry));
    return print_training(dry);
}

Status dry_run(const Recipe *recipe, int ranks) {
    DryRun *dry = calloc(1, sizeof *dry);
    if (!dry) FAIL(STATUS_INTERNAL, "no memory for a dry run");
    dry->recipe = recipe;
    dry->ranks = ranks;
    Status status = print_all(dry);
    backend_destroy(dry->backend);
    free(dry);
    return status;
}
