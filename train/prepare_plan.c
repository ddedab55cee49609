// The plan of a run: which layers fuse into which, kept in <run>/plan/.
//
//   similarity.h5   what was measured
//   recipe.ini      the recipe the plan was made from
//   plan.json       the plan; written last, so that its presence means that all is there
//
// A run keeps its plan: starting it again must give the same model. Three things can stand against
// that, and each has its answer. The recipe was changed before training began: the plan is made
// again. It was changed after checkpoints exist: refused, naming the keys. plan.json was edited by
// hand: it counts, as long as it agrees with the recipe in what both say.
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include "base/file.h"
#include "base/log.h"
#include "train/memory.h"
#include "train/prepare.h"
#include "train/recipe_parse.h"

// --- What the recipe says of a plan ----------------------------------------------------------

void plan_settings(const Recipe *recipe, const ModelConfig *seed, FusionPlan *out) {
    float compensation = (float)recipe->lfuc_num_experts / (float)recipe->lfuc_top_k;
    *out = (FusionPlan){
        .num_source_layers = seed->num_layers,
        .num_experts = (int)recipe->lfuc_num_experts,
        .top_k = (int)recipe->lfuc_top_k,
        .follower_copies = (int)recipe->lfuc_follower_copies,
        .elsewhere_copies = recipe->lfuc_elsewhere == ELSEWHERE_COPIES,
        .router_std = recipe->router_init_std,
        .reinit_ratio = recipe->lfuc_reinit_ratio,
        .copy_noise = recipe->lfuc_copy_noise,
        .seed = (uint64_t)recipe->run_seed,
        .router = {.gate = (RouterGate)recipe->router_gate,
                   .gate_scale = recipe->router_gate_scale == GATE_SCALE_ONE ? 1 : compensation,
                   .input_is_raw = recipe->router_input == ROUTER_INPUT_RAW},
    };
}

static FusionOptions selection_options(const Recipe *recipe) {
    static const FusionSelect selects[] = {[LFUC_THRESHOLD] = SELECT_THRESHOLD,
                                           [LFUC_BUDGET] = SELECT_BUDGET,
                                           [LFUC_MANUAL] = SELECT_MANUAL};
    return (FusionOptions){.select = selects[recipe->lfuc_select],
                           .prune_layers = (int)recipe->lfuc_prune_layers,
                           .delta = recipe->lfuc_delta,
                           .epsilon = recipe->lfuc_epsilon,
                           .lambda = recipe->lfuc_lambda,
                           .max_block = (int)recipe->lfuc_max_block,
                           .protect_first = (int)recipe->lfuc_protect_first,
                           .protect_last = (int)recipe->lfuc_protect_last,
                           .blocks = recipe->lfuc_blocks};
}

// A plan and a recipe both say how many experts there are, and so on. Where they differ, nobody
// can know which one is meant.
static Status check_agreement(const char *path, const FusionPlan *plan, const FusionPlan *recipe) {
    const struct {
        const char *key;
        double in_plan, in_recipe;
    } values[] = {
        {"lfuc.num_experts", plan->num_experts, recipe->num_experts},
        {"lfuc.top_k", plan->top_k, recipe->top_k},
        {"lfuc.follower_copies", plan->follower_copies, recipe->follower_copies},
        {"lfuc.elsewhere", plan->elsewhere_copies, recipe->elsewhere_copies},
        {"lfuc.reinit_ratio", plan->reinit_ratio, recipe->reinit_ratio},
        {"lfuc.copy_noise", plan->copy_noise, recipe->copy_noise},
        {"router.init_std", plan->router_std, recipe->router_std},
        {"router.gate", plan->router.gate, recipe->router.gate},
        {"router.gate_scale", plan->router.gate_scale, recipe->router.gate_scale},
        {"router.input", plan->router.input_is_raw, recipe->router.input_is_raw},
    };
    for (size_t i = 0; i < sizeof values / sizeof values[0]; i++)
        if (values[i].in_plan != values[i].in_recipe)
            FAIL(STATUS_RECIPE_MISMATCH,
                 "%s and the recipe differ in %s (%g in the plan, %g in the recipe); change one of "
                 "them",
                 path, values[i].key, values[i].in_plan, values[i].in_recipe);
    return STATUS_OK;
}

static Status read_plan(const Recipe *recipe, const char *path, const ModelConfig *seed,
                        FusionPlan *out) {
    FusionPlan *settings = malloc(sizeof *settings);
    ModelConfig *target = malloc(sizeof *target);
    Status status = STATUS_OK;
    if (!settings || !target) FAIL_GOTO(done, STATUS_INTERNAL, "no memory for a plan");
    TRY_GOTO(fusion_plan_read(path, out), done);
    plan_settings(recipe, seed, settings);
    TRY_GOTO(check_agreement(path, out, settings), done);
    TRY_GOTO(fusion_target_config(out, seed, target), done);
done:
    free(target);
    free(settings);
    return status;
}

bool plan_is_given(const Recipe *recipe) {
    return recipe->lfuc_plan[0] || recipe->lfuc_select == LFUC_MANUAL;
}

Status plan_from_recipe(const Recipe *recipe, const ModelConfig *seed, FusionPlan *out) {
    if (recipe->lfuc_plan[0]) {
        TRY(read_plan(recipe, recipe->lfuc_plan, seed, out));
        out->seed = (uint64_t)recipe->run_seed; // a plan may come from a run of another seed
        return STATUS_OK;
    }
    plan_settings(recipe, seed, out);
    FusionOptions options = selection_options(recipe);
    return fusion_select(&options, NULL, out);
}

Status plan_check_budget(const Recipe *recipe, const ModelConfig *seed) {
    if (recipe->lfuc_select != LFUC_BUDGET) return STATUS_OK;
    int64_t eligible = seed->num_layers - recipe->lfuc_protect_first - recipe->lfuc_protect_last;
    int most = eligible > 0 ? fusion_most_prunable((int)eligible, (int)recipe->lfuc_max_block) : 0;
    if (recipe->lfuc_prune_layers > most)
        FAIL(STATUS_USAGE,
             "lfuc.prune_layers = %" PRId64 " is more than fits: blocks of up to %" PRId64
             " followers can prune at most %d of the model's %d layers (protect_first = %" PRId64
             ", protect_last = %" PRId64 ")",
             recipe->lfuc_prune_layers, recipe->lfuc_max_block, most, seed->num_layers,
             recipe->lfuc_protect_first, recipe->lfuc_protect_last);
    return STATUS_OK;
}

// --- The plan of an earlier start ------------------------------------------------------------

typedef struct Changes {
    bool trained;    // checkpoints exist
    char text[1024]; // "lfuc.prune_layers: 5 -> 4, ..."
} Changes;

static bool is_any(const char *key, const char *const *keys, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (strcmp(key, keys[i]) == 0) return true;
    return false;
}

// Notes the keys that a plan follows from. Once weights are in checkpoints, where the seed and the
// text lie no longer decides anything: they may have moved.
static void note_change(void *context, const char *key, const char *before, const char *now) {
    static const char *const deciding[] = {"run.seed", "router.gate", "router.gate_scale",
                                           "router.input", "router.init_std"};
    static const char *const places[] = {"model.source", "data.train", "data.sequence_length",
                                         "data.mask_documents"};
    Changes *changes = context;
    bool decides = strncmp(key, "lfuc.", 5) == 0 ||
                   is_any(key, deciding, sizeof deciding / sizeof deciding[0]) ||
                   (!changes->trained && is_any(key, places, sizeof places / sizeof places[0]));
    if (!decides) return;
    size_t used = strlen(changes->text);
    snprintf(changes->text + used, sizeof changes->text - used, "%s%s: %s -> %s", used ? ", " : "",
             key, before[0] ? before : "(empty)", now[0] ? now : "(empty)");
}

// What was changed in the recipe since the plan was made, of the keys that decide about it.
static Status changes_since(const Recipe *recipe, const char *run_path, Changes *out) {
    char path[IO_PATH_MAX];
    TRY(io_path(path, "%s/plan/recipe.ini", run_path));
    Recipe *before = malloc(sizeof *before);
    if (!before) FAIL(STATUS_INTERNAL, "no memory for a recipe");
    recipe_defaults(before);
    Status status = recipe_read_file(path, before);
    if (status == STATUS_OK) recipe_compare(before, recipe, note_change, out);
    free(before);
    return status;
}

static Status has_checkpoints(const char *run_path, bool *out) {
    char path[IO_PATH_MAX], **names;
    size_t count;
    *out = false;
    TRY(io_path(path, "%s/checkpoints", run_path));
    if (!io_is_directory(path)) return STATUS_OK;
    TRY(io_list_directory(path, &names, &count));
    for (size_t i = 0; i < count; i++) *out |= strncmp(names[i], "step_", 5) == 0;
    io_free_names(names, count);
    return STATUS_OK;
}

Status plan_of_run(const Recipe *recipe, const char *run_path, const ModelConfig *seed,
                   FusionPlan *out, bool *found) {
    char path[IO_PATH_MAX];
    Changes changes = {0};
    *found = false;
    TRY(io_path(path, "%s/plan/plan.json", run_path));
    if (!io_exists(path)) return STATUS_OK;
    TRY(has_checkpoints(run_path, &changes.trained));
    TRY(changes_since(recipe, run_path, &changes));
    if (changes.text[0] && changes.trained)
        FAIL(STATUS_RECIPE_MISMATCH,
             "%s: the run was trained with this plan, but the recipe has changed (%s); undo that, "
             "or give the run another name with --set run.name=NAME",
             path, changes.text);
    if (changes.text[0]) {
        log_info("plan: the recipe has changed (%s); %s no longer holds", changes.text, path);
        return STATUS_OK;
    }
    TRY(read_plan(recipe, path, seed, out));
    *found = true;
    return STATUS_OK;
}

// --- Making a plan ---------------------------------------------------------------------------

typedef struct Calibration {
    FixedPass *pass;
    int64_t sequences, done;
} Calibration;

static Status next_batch(void *context, MicroBatch *batch, bool *more) {
    Calibration *calibration = context;
    TRY(fixed_pass_next(calibration->pass, batch, more));
    if (!*more) {
        log_transient("%s", "");
        return STATUS_OK;
    }
    log_transient("similarity: sequence %" PRId64 " of %" PRId64, calibration->done + 1,
                  calibration->sequences);
    calibration->done += batch->batch;
    return STATUS_OK;
}

// Runs the seed over calibration text. The seed's memory is taken and given back here.
static Status measure(const Recipe *recipe, Backend *backend, TensorSource *seed,
                      Similarity *similarity) {
    DataConfig data;
    ModelOptions options;
    Model *model = NULL;
    Calibration calibration = {.sequences = recipe->lfuc_calibration_sequences};
    Status status = STATUS_OK;
    TRY(prepare_train_data(recipe, seed->config, &data));
    TRY(prepare_model_options(recipe, false, &options));
    TRY(memory_check_calibration(recipe, backend, seed->config));
    TRY_GOTO(fixed_pass_open(&data.loader, calibration.sequences, &calibration.pass), done);
    log_info("similarity: %" PRId64 " sequences of %" PRId64 " tokens through the dense model",
             calibration.sequences, options.sequence_length);
    TRY_GOTO(model_create(backend, seed->config, &options, &model), done);
    TRY_GOTO(model_load(model, seed), done);
    TRY_GOTO(similarity_measure(model, (int)recipe->lfuc_max_block, next_batch, &calibration,
                                similarity),
             done);
done:
    model_destroy(model);
    fixed_pass_close(calibration.pass);
    return status;
}

static Status measure_and_select(const Recipe *recipe, Backend *backend, const char *run_path,
                                 TensorSource *seed, FusionPlan *out) {
    char path[IO_PATH_MAX];
    Similarity similarity = {0};
    FusionOptions options = selection_options(recipe);
    Status status = STATUS_OK;
    TRY(fusion_check_dense(seed->config));
    TRY(plan_check_budget(recipe, seed->config));
    TRY(io_path(path, "%s/plan/similarity.h5", run_path));
    plan_settings(recipe, seed->config, out);
    TRY(measure(recipe, backend, seed, &similarity));
    similarity_log(&similarity);
    TRY_GOTO(similarity_save(&similarity, path), done);
    TRY_GOTO(fusion_select(&options, &similarity, out), done);
done:
    similarity_free(&similarity);
    return status;
}

static Status store_plan(const Recipe *recipe, const char *run_path, const FusionPlan *plan,
                         const ModelConfig *seed) {
    char path[IO_PATH_MAX], *text = NULL;
    TRY(io_path(path, "%s/plan/recipe.ini", run_path));
    TRY(recipe_print(recipe, &text));
    Status status = io_write_file_atomic(path, text, strlen(text));
    free(text);
    if (status != STATUS_OK) return status;
    TRY(io_path(path, "%s/plan/plan.json", run_path));
    return fusion_plan_write(plan, seed, path);
}

static Status log_plan(const FusionPlan *plan, const ModelConfig *seed) {
    char *text = NULL;
    TRY(fusion_plan_text(plan, seed, &text));
    for (char *line = text, *end; *line; line = end) {
        end = line + strcspn(line, "\n");
        log_info("%.*s", (int)(end - line), line);
        if (*end) end++;
    }
    free(text);
    return STATUS_OK;
}

Status plan_make(const Recipe *recipe, Backend *backend, const char *run_path, TensorSource *seed,
                 FusionPlan *out) {
    char path[IO_PATH_MAX];
    bool found;
    TRY(plan_of_run(recipe, run_path, seed->config, out, &found));
    if (found) {
        log_info("plan: %s/plan/plan.json of an earlier start", run_path);
        return log_plan(out, seed->config);
    }
    // Take the old plan away before anything beside it changes.
    TRY(io_path(path, "%s/plan", run_path));
    TRY(io_make_directories(path));
    TRY(io_path(path, "%s/plan/plan.json", run_path));
    TRY(io_unlink(path));
    if (plan_is_given(recipe))
        TRY(plan_from_recipe(recipe, seed->config, out));
    else
        TRY(measure_and_select(recipe, backend, run_path, seed, out));
    TRY(store_plan(recipe, run_path, out, seed->config));
    return log_plan(out, seed->config);
}
