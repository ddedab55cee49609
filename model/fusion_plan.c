// What a plan must keep, and the model it leads to.
#include "model/fusion.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static int by_base(const void *a, const void *b) {
    const FusionBlock *x = a, *y = b;
    return (x->base > y->base) - (x->base < y->base);
}

void fusion_plan_sort(FusionPlan *plan) {
    qsort(plan->blocks, (size_t)plan->num_blocks, sizeof plan->blocks[0], by_base);
}

static Status check_block(const FusionPlan *plan, int index, const char *name, Status code) {
    const FusionBlock *block = &plan->blocks[index];
    int64_t base = block->base, n = block->followers;
    if (base < 0 || n < 1 || base + n >= plan->num_source_layers)
        FAIL(code,
             "%s: block %d+%d: expected a base and at least one follower among layers 0 to %d",
             name, block->base, block->followers, plan->num_source_layers - 1);
    if (plan->num_experts < n * plan->follower_copies + 1)
        FAIL(code,
             "%s: block %d+%d with follower_copies = %d needs num_experts of at least %" PRId64
             " (one for the base), found %d",
             name, block->base, block->followers, plan->follower_copies,
             n * plan->follower_copies + 1, plan->num_experts);
    if (index == 0) return STATUS_OK;
    const FusionBlock *before = &plan->blocks[index - 1];
    if (block->base <= before->base + before->followers)
        FAIL(code, "%s: blocks %d+%d and %d+%d overlap: a layer can be in one block only", name,
             before->base, before->followers, block->base, block->followers);
    return STATUS_OK;
}

static Status check_int(int64_t value, int64_t min, int64_t max, const char *key, const char *name,
                        Status code) {
    if (value < min || value > max)
        FAIL(code, "%s: %s is %" PRId64 ", expected %" PRId64 " to %" PRId64, name, key, value, min,
             max);
    return STATUS_OK;
}

static Status check_real(double value, double min, double max, const char *key, const char *name,
                         Status code) {
    if (!(value >= min && value <= max))
        FAIL(code, "%s: %s is %g, expected %g to %g", name, key, value, min, max);
    return STATUS_OK;
}

static Status check_router(const FusionPlan *plan, const char *name, Status code) {
    TRY(check_real(plan->router_std, 0, 10, "the routers' init_std", name, code));
    TRY(check_real(plan->router.gate_scale, 1e-6, 1e6, "gate_scale", name, code));
    if (plan->router.gate == GATE_RENORM && plan->top_k == 1)
        FAIL(code,
             "%s: gate renorm with top_k = 1 makes every gate 1, so the routers learn nothing from "
             "the text; use straight_through, which has the same values and a gradient",
             name);
    return STATUS_OK;
}

Status fusion_plan_check(const FusionPlan *plan, const char *name, Status code) {
    TRY(check_int(plan->num_source_layers, 1, MODEL_MAX_LAYERS, "source_layers", name, code));
    TRY(check_int(plan->num_experts, 1, MODEL_MAX_EXPERTS, "num_experts", name, code));
    TRY(check_int(plan->top_k, 1, plan->num_experts, "top_k", name, code));
    TRY(check_int(plan->follower_copies, 1, MODEL_MAX_EXPERTS, "follower_copies", name, code));
    TRY(check_real(plan->reinit_ratio, 0, 1, "reinit_ratio", name, code));
    TRY(check_real(plan->copy_noise, 0, 10, "copy_noise", name, code));
    if (plan->seed > INT64_MAX)
        FAIL(code, "%s: seed is %" PRIu64 ", expected at most %" PRId64, name, plan->seed,
             INT64_MAX);
    TRY(check_router(plan, name, code));
    TRY(check_int(plan->num_blocks, 0, plan->num_source_layers / 2, "the number of blocks", name,
                  code));
    for (int i = 0; i < plan->num_blocks; i++) TRY(check_block(plan, i, name, code));
    return STATUS_OK;
}

int fusion_target_layers(const FusionPlan *plan) {
    int layers = plan->num_source_layers;
    for (int i = 0; i < plan->num_blocks; i++) layers -= plan->blocks[i].followers;
    return layers;
}

Status fusion_check_dense(const ModelConfig *source) {
    for (int l = 0; l < source->num_layers; l++) {
        if (config_layer_is_moe(source, l))
            FAIL(STATUS_USAGE,
                 "layer %d of the source has %d experts already; fusion starts from a dense model "
                 "(train this one with lfuc.enabled = false)",
                 l, source->layers[l].num_experts);
    }
    return STATUS_OK;
}

Status fusion_target_config(const FusionPlan *plan, const ModelConfig *source, ModelConfig *out) {
    TRY(fusion_plan_check(plan, "plan", STATUS_USAGE));
    TRY(fusion_check_dense(source));
    if (plan->num_source_layers != source->num_layers)
        FAIL(STATUS_USAGE, "the plan is for a model of %d layers, but the source has %d",
             plan->num_source_layers, source->num_layers);
    *out = *source;
    out->moe_intermediate_size = source->intermediate_size;
    out->router = plan->router;
    out->num_layers = 0;
    const LayerConfig dense = {0};
    const LayerConfig experts = {.num_experts = plan->num_experts, .top_k = plan->top_k};
    int block = 0;
    for (int l = 0; l < source->num_layers; l++) {
        bool is_base = block < plan->num_blocks && plan->blocks[block].base == l;
        if (is_base) l += plan->blocks[block++].followers;
        out->layers[out->num_layers++] = is_base || plan->elsewhere_copies ? experts : dense;
    }
    return config_validate(out, "the fused model");
}

// --- As text -------------------------------------------------------------------------------------

// "494.0 M", "1.66 B".
static void print_count(FILE *out, int64_t parameters) {
    if (parameters >= 1000000000)
        fprintf(out, "%.2f B", (double)parameters / 1e9);
    else
        fprintf(out, "%.2f M", (double)parameters / 1e6);
}

static void print_block(FILE *out, const FusionPlan *plan, const FusionBlock *block) {
    int followers = block->followers, copies = plan->follower_copies;
    fprintf(out, "  block %d+%d: layer %d keeps its attention; %d experts from its MLP",
            block->base, followers, block->base, plan->num_experts - followers * copies);
    for (int j = 1; j <= followers; j++)
        fprintf(out, ", %d from layer %d", copies, block->base + j);
    if (!isnan(block->score)) fprintf(out, "; score %.5f", block->score);
    fputc('\n', out);
}

static void print_plan(FILE *out, const FusionPlan *plan, const TensorTable *before,
                       const TensorTable *after) {
    fprintf(out, "%d -> %d layers, %d experts, top-%d, gate %s x %g\n", plan->num_source_layers,
            fusion_target_layers(plan), plan->num_experts, plan->top_k,
            config_gate_name(plan->router.gate), (double)plan->router.gate_scale);
    for (int i = 0; i < plan->num_blocks; i++) print_block(out, plan, &plan->blocks[i]);
    if (plan->elsewhere_copies)
        fprintf(out, "  other layers: %d copies of their own MLP\n", plan->num_experts);
    else
        fprintf(out, "  other layers: dense, as they are\n");
    if (plan->reinit_ratio > 0 || plan->copy_noise > 0)
        fprintf(out, "  experts: %g of the channels redrawn, noise of %g deviations on the rest\n",
                plan->reinit_ratio, plan->copy_noise);
    fprintf(out, "  parameters: ");
    print_count(out, before->parameters);
    fprintf(out, " -> ");
    print_count(out, after->parameters);
    fprintf(out, " in all, ");
    print_count(out, after->active_parameters);
    fprintf(out, " active per token\n");
}

Status fusion_plan_text(const FusionPlan *plan, const ModelConfig *source, char **text) {
    ModelConfig target;
    TRY(fusion_target_config(plan, source, &target));
    TensorTable before = {0}, after = {0};
    Status status;
    size_t bytes;
    *text = NULL;
    TRY_GOTO(tensor_table_build(source, &before), done);
    TRY_GOTO(tensor_table_build(&target, &after), done);
    FILE *out = open_memstream(text, &bytes);
    if (!out) FAIL_GOTO(done, STATUS_INTERNAL, "out of memory: the plan as text");
    print_plan(out, plan, &before, &after);
    if (fclose(out) != 0) {
        free(*text);
        *text = NULL;
        FAIL_GOTO(done, STATUS_INTERNAL, "out of memory: the plan as text");
    }
done:
    tensor_table_free(&after);
    tensor_table_free(&before);
    return status;
}
