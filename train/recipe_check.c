// Rules between the settings of a recipe. What one value may be by itself stands in settings.def;
// what depends on the inputs (shapes, layers, shards) is found by prepare.c.
//
// Each message names the keys, says what they are, and what to write instead.
#include <inttypes.h>
#include <string.h>
#include "base/file.h"
#include "optim/schedule.h"
#include "train/recipe.h"
#include "train/recipe_lists.h"

static Status check_data(const Recipe *r) {
    DataConfig config;
    if (!r->data_train[0])
        FAIL(STATUS_USAGE, "data.train is empty; name a directory of token shards "
                           "(scripts/prepare_data.py makes them)");
    TRY(parse_sources("data.train", r->data_train, &config));
    if (r->train_eval_every > 0 && !r->data_valid[0])
        FAIL(STATUS_USAGE,
             "train.eval_every = %" PRId64 " needs held-out shards: set data.valid, or eval_every "
             "= 0",
             r->train_eval_every);
    return STATUS_OK;
}

static Status check_run(const Recipe *r) {
    if (!r->run_directory[0])
        FAIL(STATUS_USAGE, "run.directory is empty; name a directory, such as runs");
    return STATUS_OK;
}

static Status check_training(const Recipe *r) {
    if (r->train_steps == 0 && r->train_tokens == 0)
        FAIL(STATUS_USAGE, "train.steps and train.tokens are both 0; one must say how long to "
                           "train");
    if (r->train_steps > 0 && r->train_tokens > 0)
        FAIL(STATUS_USAGE,
             "train.steps = %" PRId64 " and train.tokens = %" PRId64 " are both given; set one of "
             "them to 0",
             r->train_steps, r->train_tokens);
    if (r->train_global_batch % r->train_micro_batch != 0)
        FAIL(STATUS_USAGE,
             "train.global_batch = %" PRId64 " is not a multiple of train.micro_batch = %" PRId64,
             r->train_global_batch, r->train_micro_batch);
    Recompute recompute;
    return parse_recompute(r->train_recompute, &recompute);
}

static Status check_optimizer(const Recipe *r) {
    StepRanges skipped;
    bool decays = r->optim_schedule != SCHEDULE_CONSTANT;
    TRY(parse_step_ranges("optim.skip_steps", r->optim_skip_steps, &skipped));
    if (decays && r->optim_min_lr > r->optim_lr)
        FAIL(STATUS_USAGE,
             "optim.min_lr = %g is above optim.lr = %g; the rate falls from lr to "
             "min_lr",
             r->optim_min_lr, r->optim_lr);
    if (r->optim_schedule == SCHEDULE_WSD && r->optim_decay_steps == 0)
        FAIL(STATUS_USAGE, "optim.schedule = wsd needs optim.decay_steps, the length of the final "
                           "decay");
    if (r->optim_schedule == SCHEDULE_WSD && r->optim_decay_steps > recipe_steps(r))
        FAIL(STATUS_USAGE,
             "optim.decay_steps = %" PRId64 " is more than the %" PRId64 " steps of the run",
             r->optim_decay_steps, recipe_steps(r));
    if (r->optim_beta1 >= 1 || r->optim_beta2 >= 1)
        FAIL(STATUS_USAGE, "optim.beta1 = %g and optim.beta2 = %g must both be below 1",
             r->optim_beta1, r->optim_beta2);
    if (r->optim_epsilon <= 0)
        FAIL(STATUS_USAGE, "optim.epsilon = 0 divides by zero where a gradient is zero; use 1e-8");
    return STATUS_OK;
}

// Half of the largest relative step between bf16 numbers (8 significant bits): what shrinks by less
// than this in an update is rounded back to where it was, for ever.
static const double BF16_STICKS = 1.0 / 256;

static Status check_state_dtype(const Recipe *r) {
    const double largest = r->optim_beta1 > r->optim_beta2 ? r->optim_beta1 : r->optim_beta2;
    if (r->optim_state_dtype == STATE_F32 || 1 - largest > BF16_STICKS) return STATUS_OK;
    FAIL(
        STATUS_USAGE,
        "optim.state_dtype = bf16 with optim.beta1 = %g and optim.beta2 = %g: above 0.996 a moment "
        "in bf16 does not decay any more; lower the beta or use state_dtype = f32",
        r->optim_beta1, r->optim_beta2);
}

static Status check_selection(const Recipe *r) {
    if (r->lfuc_plan[0]) return STATUS_OK; // the plan has the blocks
    if (r->lfuc_select == LFUC_LATENCY || r->lfuc_select == LFUC_LOSS)
        FAIL(STATUS_USAGE,
             "lfuc.select = %s is not available in this version; use budget (with prune_layers), "
             "threshold or manual",
             r->lfuc_select == LFUC_LATENCY ? "latency" : "loss");
    if (r->lfuc_select == LFUC_MANUAL && !r->lfuc_blocks[0])
        FAIL(STATUS_USAGE, "lfuc.select = manual needs lfuc.blocks, e.g. blocks = 3+1, 9+2");
    if (r->lfuc_select != LFUC_MANUAL && r->lfuc_blocks[0])
        FAIL(STATUS_USAGE, "lfuc.blocks = %s is only read with lfuc.select = manual",
             r->lfuc_blocks);
    if (r->lfuc_select != LFUC_MANUAL &&
        r->lfuc_follower_copies * r->lfuc_max_block >= r->lfuc_num_experts)
        FAIL(STATUS_USAGE,
             "lfuc.follower_copies = %" PRId64 " times lfuc.max_block = %" PRId64 " followers "
             "leaves no expert for the base of a block with lfuc.num_experts = %" PRId64
             "; lower follower_copies or max_block",
             r->lfuc_follower_copies, r->lfuc_max_block, r->lfuc_num_experts);
    return STATUS_OK;
}

static Status check_fusion(const Recipe *r) {
    if (!r->lfuc_enabled) return STATUS_OK;
    if (!r->model_source[0])
        FAIL(STATUS_USAGE, "lfuc.enabled needs model.source, the trained dense model to fuse "
                           "(random weights have no layers that resemble each other)");
    if (r->lfuc_top_k > r->lfuc_num_experts)
        FAIL(STATUS_USAGE, "lfuc.top_k = %" PRId64 " is more than lfuc.num_experts = %" PRId64,
             r->lfuc_top_k, r->lfuc_num_experts);
    if (r->router_gate == GATE_RENORM && r->lfuc_top_k == 1)
        FAIL(STATUS_USAGE, "router.gate = renorm with lfuc.top_k = 1 makes every gate 1, so the "
                           "router would get no gradient from the language model; use "
                           "straight_through (same values, with a gradient) or softmax");
    return check_selection(r);
}

Status recipe_check(const Recipe *recipe) {
    char name[IO_PATH_MAX];
    TRY(recipe_run_name(recipe, name, sizeof name));
    TRY(check_run(recipe));
    TRY(check_data(recipe));
    TRY(check_training(recipe));
    TRY(check_optimizer(recipe));
    TRY(check_state_dtype(recipe));
    return check_fusion(recipe);
}
