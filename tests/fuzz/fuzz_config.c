// config.json: any bytes either fail with BAD_DATA and a message that names the file, or give a
// model whose tensor table can be built or is refused cleanly, and that, written again, is the same
// model.
#include "tests/fuzz/fuzz.h"

#include <string.h>
#include "model/config.h"
#include "model/tensor_table.h"

static const char name[] = "config.json";

static void check_refusal(Status status) {
    FUZZ_CHECK(status == STATUS_BAD_DATA);
    FUZZ_CHECK(strncmp(status_message(), name, strlen(name)) == 0);
}

static void check_table(const ModelConfig *config) {
    TensorTable table;
    if (config->num_layers > 16) return; // the same code, only slower
    Status status = tensor_table_build(config, &table);
    if (status != STATUS_OK) {
        FUZZ_CHECK(status == STATUS_BAD_DATA);
        return;
    }
    FUZZ_CHECK(table.parameters > 0 && table.parameters <= table.total);
    tensor_table_free(&table);
}

static void check_round_trip(const ModelConfig *config) {
    json_t *root, *before, *after;
    ModelConfig again;
    if (config_to_json(config, DTYPE_F32, &root) != STATUS_OK) return; // e.g. mixed expert counts
    FUZZ_CHECK(config_from_json(root, name, &again) == STATUS_OK);
    again.family = config->family; // qwen2_moe without experts and biases is written as llama
    again.moe_intermediate_size = config->moe_intermediate_size; // not written without experts
    again.router = config->router;                               // neither
    FUZZ_CHECK(config_to_canonical(config, &before) == STATUS_OK);
    FUZZ_CHECK(config_to_canonical(&again, &after) == STATUS_OK);
    FUZZ_CHECK(json_equal(before, after));
    json_decref(root);
    json_decref(before);
    json_decref(after);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static ModelConfig config;
    json_t *root;
    Status status = json_parse((const char *)data, size, name, &root);
    if (status != STATUS_OK) {
        check_refusal(status);
        return 0;
    }
    status = config_from_json(root, name, &config);
    json_decref(root);
    if (status != STATUS_OK) {
        check_refusal(status);
        return 0;
    }
    check_table(&config);
    check_round_trip(&config);
    return 0;
}
