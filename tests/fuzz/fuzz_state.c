// state.json of a checkpoint: any bytes either fail with BAD_DATA and a message that names the
// file, or give a state that is written and read back as the same one. Its canonical model config
// is read, too.
#include "tests/fuzz/fuzz.h"

#include <string.h>
#include "train/run_state.h"

static const char name[] = "state.json";

static void check_refusal(Status status) {
    FUZZ_CHECK(status == STATUS_BAD_DATA);
    FUZZ_CHECK(strncmp(status_message(), name, strlen(name)) == 0);
}

// Three layers with three experts each, as the seed corpus has them.
static ModelConfig small_config(void) {
    ModelConfig config = {.family = FAMILY_QWEN2,
                          .hidden_size = 32,
                          .num_layers = 3,
                          .num_heads = 4,
                          .num_kv_heads = 2,
                          .head_dim = 8,
                          .intermediate_size = 48,
                          .moe_intermediate_size = 48,
                          .vocab_size = 257,
                          .max_position_embeddings = 64,
                          .rope_theta = 10000,
                          .rms_norm_eps = 1e-6,
                          .bos_token_id = -1,
                          .eos_token_id = -1,
                          .router = {.gate_scale = 1}};
    for (int l = 0; l < 3; l++) config.layers[l] = (LayerConfig){.num_experts = 3, .top_k = 1};
    return config;
}

static void create(const ModelConfig *config, RunState *state) {
    FUZZ_CHECK(run_state_create(config, state) == STATUS_OK);
    skip_rule_init(&state->skip, 6, 8, 3);
}

static json_t *write(const RunState *state, const ModelConfig *config) {
    RunIdentity identity = {.config = config, .recipe_text = ""};
    json_t *root;
    // Text that the parser has taken is valid UTF-8, so it can be written.
    FUZZ_CHECK(run_state_to_json(state, &identity, &root) == STATUS_OK);
    return root;
}

static void check_state(const json_t *root) {
    static RunState state, again;
    ModelConfig config = small_config();
    create(&config, &state);
    Status status = run_state_from_json(root, name, &state);
    if (status != STATUS_OK) {
        check_refusal(status);
    } else {
        json_t *written = write(&state, &config);
        create(&config, &again);
        FUZZ_CHECK(run_state_from_json(written, name, &again) == STATUS_OK);
        json_t *twice = write(&again, &config);
        FUZZ_CHECK(json_equal(written, twice));
        json_decref(written);
        json_decref(twice);
        run_state_free(&again);
    }
    run_state_free(&state);
}

static void check_config(const json_t *root) {
    static ModelConfig config;
    json_t *object = json_object_get(root, "config"), *written;
    if (!json_is_object(object)) return;
    Status status = config_from_canonical(object, name, &config);
    if (status != STATUS_OK) {
        check_refusal(status);
        return;
    }
    FUZZ_CHECK(config_to_canonical(&config, &written) == STATUS_OK);
    json_decref(written);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    json_t *root;
    if (json_parse((const char *)data, size, name, &root) != STATUS_OK) return 0;
    check_state(root);
    check_config(root);
    json_decref(root);
    return 0;
}
