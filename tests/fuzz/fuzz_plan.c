// Plan files: any bytes either fail with BAD_DATA and a message that names the file, or give a plan
// that keeps its own rules and leads to a model, if the source has the right number of layers.
#include "tests/fuzz/fuzz.h"

#include <stdlib.h>
#include <string.h>
#include "model/fusion.h"

static const char name[] = "plan.json";

static ModelConfig source_of(int num_layers) {
    return (ModelConfig){.family = FAMILY_QWEN2,
                         .hidden_size = 8,
                         .num_layers = num_layers,
                         .num_heads = 2,
                         .num_kv_heads = 1,
                         .head_dim = 4,
                         .intermediate_size = 8,
                         .moe_intermediate_size = 8,
                         .vocab_size = 16,
                         .max_position_embeddings = 64,
                         .rope_theta = 10000,
                         .rms_norm_eps = 1e-6,
                         .bos_token_id = -1,
                         .eos_token_id = -1,
                         .router = {.gate_scale = 1}};
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static FusionPlan plan;
    Status status = fusion_plan_parse((const char *)data, size, name, &plan);
    if (status != STATUS_OK) {
        FUZZ_CHECK(status == STATUS_BAD_DATA);
        FUZZ_CHECK(strncmp(status_message(), name, strlen(name)) == 0);
        return 0;
    }
    FUZZ_CHECK(fusion_plan_check(&plan, name, STATUS_BAD_DATA) == STATUS_OK);
    ModelConfig source = source_of(plan.num_source_layers), target;
    FUZZ_CHECK(fusion_target_config(&plan, &source, &target) == STATUS_OK);
    FUZZ_CHECK(target.num_layers == fusion_target_layers(&plan) && target.num_layers >= 1);
    if (plan.num_source_layers * plan.num_experts > 1024) return 0; // slow, and nothing new
    char *text;
    FUZZ_CHECK(fusion_plan_text(&plan, &source, &text) == STATUS_OK);
    FUZZ_CHECK(strstr(text, " layers, ") != NULL);
    free(text);
    return 0;
}
