// plan.json: written for people to read and edit, read with every member checked.
//
// An unknown key is refused, since it is most likely a misspelt one that would otherwise be
// silently without effect. The members that follow from the others (target_layers, parameters) are
// there for the reader and need not be kept in step by an editor: their values are not looked at.
#include "model/fusion.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "base/json.h"

enum { MAX_BYTES = 1 << 20, FORMAT_VERSION = 1, WORD_MAX = 32 };
static const char FORMAT[] = "dense2moe-plan";
static const char *const INPUTS[] = {"normed", "raw", NULL};
static const char *const ELSEWHERE[] = {"copies", "dense", NULL};

static const char *const ROOT_KEYS[] = {
    "format",     "version",    "source_layers",   "blocks",        "num_experts",
    "top_k",      "seed",       "elsewhere",       "router",        "reinit_ratio",
    "copy_noise", "parameters", "follower_copies", "target_layers", NULL};
static const char *const ROUTER_KEYS[] = {"gate", "gate_scale", "input", "init_std", NULL};
static const char *const BLOCK_KEYS[] = {"base", "followers", "score", NULL};

// --- Reading -------------------------------------------------------------------------------------

static int find_word(const char *const *words, const char *word) {
    for (int i = 0; words[i]; i++)
        if (strcmp(words[i], word) == 0) return i;
    return -1;
}

static void join_words(const char *const *words, char *out, size_t size) {
    size_t used = 0;
    for (int i = 0; words[i] && used < size; i++)
        used += (size_t)snprintf(out + used, size - used, "%s%s", i ? ", " : "", words[i]);
}

static Status check_keys(const json_t *object, const char *name, const char *const *known) {
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)object, key, value) {
        char list[256];
        if (find_word(known, key) >= 0) continue;
        join_words(known, list, sizeof list);
        FAIL(STATUS_BAD_DATA, "%s: unknown key \"%.64s\"; known are %s", name, key, list);
    }
    return STATUS_OK;
}

static Status get_word(const json_t *object, const char *name, const char *key,
                       const char *const *words, int *out) {
    char word[WORD_MAX], list[128];
    TRY(json_get_text(object, name, key, word, sizeof word));
    *out = find_word(words, word);
    if (*out >= 0) return STATUS_OK;
    join_words(words, list, sizeof list);
    FAIL(STATUS_BAD_DATA, "%s: key \"%s\" is \"%s\", expected one of %s", name, key, word, list);
}

static Status get_int(const json_t *object, const char *name, const char *key, int max, int *out) {
    int64_t value;
    TRY(json_get_int(object, name, key, 0, max, &value));
    *out = (int)value;
    return STATUS_OK;
}

static Status read_block(const json_t *object, const char *name, FusionBlock *out) {
    if (!json_is_object(object))
        FAIL(STATUS_BAD_DATA, "%s: expected an object { \"base\": ..., \"followers\": ... }", name);
    TRY(check_keys(object, name, BLOCK_KEYS));
    TRY(get_int(object, name, "base", MODEL_MAX_LAYERS, &out->base));
    TRY(get_int(object, name, "followers", MODEL_MAX_LAYERS, &out->followers));
    out->score = NAN;
    if (json_has(object, "score")) TRY(json_get_real(object, name, "score", &out->score));
    return STATUS_OK;
}

static Status read_blocks(const json_t *root, const char *name, FusionPlan *out) {
    json_t *array;
    TRY(json_get_array(root, name, "blocks", &array));
    size_t count = json_array_size(array);
    if (count > MODEL_MAX_LAYERS)
        FAIL(STATUS_BAD_DATA, "%s: %zu blocks, expected at most %d", name, count, MODEL_MAX_LAYERS);
    for (size_t i = 0; i < count; i++) {
        char where[512];
        snprintf(where, sizeof where, "%.400s: blocks[%zu]", name, i);
        TRY(read_block(json_array_get(array, i), where, &out->blocks[i]));
    }
    out->num_blocks = (int)count;
    fusion_plan_sort(out);
    return STATUS_OK;
}

static Status read_router(const json_t *root, const char *name, FusionPlan *out) {
    json_t *object;
    char gate[WORD_MAX];
    int input;
    double scale;
    TRY(json_get_object(root, name, "router", &object));
    TRY(check_keys(object, name, ROUTER_KEYS));
    TRY(json_get_text(object, name, "gate", gate, sizeof gate));
    if (!config_gate_parse(gate, &out->router.gate))
        FAIL(STATUS_BAD_DATA,
             "%s: key \"gate\" is \"%s\", expected softmax, renorm or straight_through", name,
             gate);
    TRY(get_word(object, name, "input", INPUTS, &input));
    TRY(json_get_real(object, name, "gate_scale", &scale));
    TRY(json_get_real(object, name, "init_std", &out->router_std));
    if (!(scale > 0 && scale <= 1e6)) // before the cast: it must fit a float
        FAIL(STATUS_BAD_DATA, "%s: key \"gate_scale\" is %g, expected a positive number", name,
             scale);
    out->router.gate_scale = (float)scale;
    out->router.input_is_raw = input == 1;
    return STATUS_OK;
}

static Status read_header(const json_t *root, const char *name) {
    char format[WORD_MAX];
    int64_t version;
    TRY(json_get_text(root, name, "format", format, sizeof format));
    if (strcmp(format, FORMAT) != 0)
        FAIL(STATUS_BAD_DATA, "%s: format is \"%s\", expected \"%s\"", name, format, FORMAT);
    TRY(json_get_int(root, name, "version", 1, INT64_MAX, &version));
    if (version != FORMAT_VERSION)
        FAIL(STATUS_BAD_DATA, "%s: version %" PRId64 ", this program reads %d", name, version,
             FORMAT_VERSION);
    return STATUS_OK;
}

static Status read_root(const json_t *root, const char *name, FusionPlan *out) {
    int elsewhere;
    int64_t seed;
    memset(out, 0, sizeof *out);
    TRY(read_header(root, name));
    TRY(check_keys(root, name, ROOT_KEYS));
    TRY(get_int(root, name, "source_layers", MODEL_MAX_LAYERS, &out->num_source_layers));
    TRY(get_int(root, name, "num_experts", MODEL_MAX_EXPERTS, &out->num_experts));
    TRY(get_int(root, name, "top_k", MODEL_MAX_EXPERTS, &out->top_k));
    TRY(get_int(root, name, "follower_copies", MODEL_MAX_EXPERTS, &out->follower_copies));
    TRY(get_word(root, name, "elsewhere", ELSEWHERE, &elsewhere));
    out->elsewhere_copies = elsewhere == 0;
    TRY(json_get_real(root, name, "reinit_ratio", &out->reinit_ratio));
    TRY(json_get_real(root, name, "copy_noise", &out->copy_noise));
    TRY(json_get_int(root, name, "seed", 0, INT64_MAX, &seed));
    out->seed = (uint64_t)seed;
    TRY(read_router(root, name, out));
    TRY(read_blocks(root, name, out));
    return fusion_plan_check(out, name, STATUS_BAD_DATA);
}

Status fusion_plan_parse(const char *text, size_t bytes, const char *name, FusionPlan *out) {
    json_t *root;
    TRY(json_parse(text, bytes, name, &root));
    Status status = read_root(root, name, out);
    json_decref(root);
    return status;
}

Status fusion_plan_read(const char *path, FusionPlan *out) {
    json_t *root;
    TRY(json_read_file(path, MAX_BYTES, &root));
    Status status = read_root(root, path, out);
    json_decref(root);
    return status;
}

// --- Writing -------------------------------------------------------------------------------------

static json_t *blocks_json(const FusionPlan *plan) {
    json_t *array = json_array();
    for (int i = 0; i < plan->num_blocks; i++) {
        const FusionBlock *block = &plan->blocks[i];
        json_t *score = isnan(block->score) ? json_null() : json_real(block->score);
        json_array_append_new(array, json_pack("{s:i, s:i, s:o}", "base", block->base, "followers",
                                               block->followers, "score", score));
    }
    return array;
}

static json_t *router_json(const FusionPlan *plan) {
    return json_pack("{s:s, s:s, s:f, s:f}", "gate", config_gate_name(plan->router.gate), "input",
                     INPUTS[plan->router.input_is_raw], "gate_scale",
                     (double)plan->router.gate_scale, "init_std", plan->router_std);
}

static json_t *parameters_json(const TensorTable *before, const TensorTable *after) {
    return json_pack("{s:I, s:I, s:I}", "source", (json_int_t)before->parameters, "total",
                     (json_int_t)after->parameters, "active", (json_int_t)after->active_parameters);
}

static json_t *plan_json(const FusionPlan *plan, const TensorTable *before,
                         const TensorTable *after) {
    return json_pack("{s:s, s:i, s:i, s:i, s:o, s:i, s:i, s:i, s:s, s:f, s:f, s:I, s:o, s:o}",
                     "format", FORMAT, "version", FORMAT_VERSION, "source_layers",
                     plan->num_source_layers, "target_layers", fusion_target_layers(plan), "blocks",
                     blocks_json(plan), "num_experts", plan->num_experts, "top_k", plan->top_k,
                     "follower_copies", plan->follower_copies, "elsewhere",
                     ELSEWHERE[!plan->elsewhere_copies], "reinit_ratio", plan->reinit_ratio,
                     "copy_noise", plan->copy_noise, "seed", (json_int_t)plan->seed, "router",
                     router_json(plan), "parameters", parameters_json(before, after));
}

Status fusion_plan_write(const FusionPlan *plan, const ModelConfig *source, const char *path) {
    ModelConfig target;
    TRY(fusion_target_config(plan, source, &target));
    TensorTable before = {0}, after = {0};
    json_t *root = NULL;
    Status status;
    TRY_GOTO(tensor_table_build(source, &before), done);
    TRY_GOTO(tensor_table_build(&target, &after), done);
    root = plan_json(plan, &before, &after);
    if (!root) FAIL_GOTO(done, STATUS_INTERNAL, "%s: out of memory", path);
    TRY_GOTO(json_write_file(path, root), done);
done:
    json_decref(root);
    tensor_table_free(&after);
    tensor_table_free(&before);
    return status;
}
