// state.json <-> RunState. Flat arrays are written row by row as plain JSON arrays; floats are
// widened to doubles, which brings the same bits back.
#include "train/run_state.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { STATE_VERSION = 1 };
static const char format_name[] = "dense2moe-state";

// --- Memory --------------------------------------------------------------------------------------

static int largest_stride(const ModelConfig *config) {
    int stride = 1;
    for (int l = 0; l < config->num_layers; l++)
        if (config->layers[l].num_experts > stride) stride = config->layers[l].num_experts;
    return stride;
}

Status run_state_create(const ModelConfig *config, RunState *out) {
    *out = (RunState){.num_layers = config->num_layers,
                      .stride = largest_stride(config),
                      .eval_step = -1,
                      .start_loss = NAN,
                      .last_loss = NAN};
    size_t layers = (size_t)config->num_layers, all = layers * (size_t)out->stride;
    RunInterval *interval = &out->interval;
    out->load = calloc(all, sizeof *out->load);
    out->bias = calloc(all, sizeof *out->bias);
    interval->assignments = calloc(all, sizeof *interval->assignments);
    interval->probability = calloc(all, sizeof *interval->probability);
    interval->entropy = calloc(layers, sizeof *interval->entropy);
    interval->router_z = calloc(layers, sizeof *interval->router_z);
    if (!out->load || !out->bias || !interval->assignments || !interval->probability ||
        !interval->entropy || !interval->router_z) {
        run_state_free(out);
        FAIL(STATUS_INTERNAL, "out of memory for the run's state");
    }
    for (int l = 0; l < config->num_layers; l++)
        for (int e = 0; e < config->layers[l].num_experts; e++)
            out->load[l * out->stride + e] = 1.0f / (float)config->layers[l].num_experts;
    return STATUS_OK;
}

void run_state_free(RunState *state) {
    free(state->load);
    free(state->bias);
    free(state->interval.assignments);
    free(state->interval.probability);
    free(state->interval.entropy);
    free(state->interval.router_z);
    *state = (RunState){0};
}

void run_interval_reset(RunState *state) {
    RunInterval *interval = &state->interval;
    size_t layers = (size_t)state->num_layers, all = layers * (size_t)state->stride;
    interval->steps = 0;
    interval->loss_sum = interval->loss_count = interval->tokens = 0;
    interval->balance = interval->z = interval->norm = 0;
    memset(interval->assignments, 0, all * sizeof *interval->assignments);
    memset(interval->probability, 0, all * sizeof *interval->probability);
    memset(interval->entropy, 0, layers * sizeof *interval->entropy);
    memset(interval->router_z, 0, layers * sizeof *interval->router_z);
}

void run_interval_add(RunState *state, const ModelSums *sums, double balance, double z,
                      double norm) {
    RunInterval *interval = &state->interval;
    interval->steps++;
    interval->loss_sum += sums->loss_sum;
    interval->loss_count += sums->loss_count;
    interval->tokens += sums->tokens;
    interval->balance += balance;
    interval->z += z;
    interval->norm += norm;
    for (int l = 0; l < state->num_layers; l++) {
        interval->entropy[l] += sums->entropy[l];
        interval->router_z[l] += sums->z[l];
        for (int e = 0; e < state->stride; e++) {
            int at = l * state->stride + e;
            interval->assignments[at] += sums->assignments[at];
            interval->probability[at] += sums->probability[at];
        }
    }
}

// --- Arrays --------------------------------------------------------------------------------------

static json_t *from_doubles(const double *values, size_t count) {
    json_t *array = json_array();
    for (size_t i = 0; i < count; i++)
        if (json_array_append_new(array, json_real(values[i])) != 0) {
            json_decref(array);
            return NULL;
        }
    return array;
}

static json_t *from_floats(const float *values, size_t count) {
    json_t *array = json_array();
    for (size_t i = 0; i < count; i++)
        if (json_array_append_new(array, json_real((double)values[i])) != 0) {
            json_decref(array);
            return NULL;
        }
    return array;
}

// Exactly `count` numbers (jansson holds no other than finite ones).
static Status to_doubles(const json_t *object, const char *name, const char *key, double *out,
                         size_t count) {
    json_t *array;
    TRY(json_get_array(object, name, key, &array));
    if (json_array_size(array) != count)
        FAIL(STATUS_BAD_DATA, "%s: \"%s\" has %zu values, expected %zu", name, key,
             json_array_size(array), count);
    for (size_t i = 0; i < count; i++) {
        const json_t *value = json_array_get(array, i);
        if (!json_is_number(value))
            FAIL(STATUS_BAD_DATA, "%s: \"%s\"[%zu] is not a number", name, key, i);
        out[i] = json_number_value(value);
    }
    return STATUS_OK;
}

static Status to_floats(const json_t *object, const char *name, const char *key, float *out,
                        size_t count) {
    double *wide = malloc((count + 1) * sizeof *wide);
    if (!wide) FAIL(STATUS_INTERNAL, "%s: out of memory", name);
    Status status = to_doubles(object, name, key, wide, count);
    for (size_t i = 0; status == STATUS_OK && i < count; i++) {
        out[i] = (float)wide[i];
        // A double beyond float's range would come back as infinity.
        if (!isfinite(out[i]))
            status = status_fail(__FILE__, __LINE__, STATUS_BAD_DATA,
                                 "%s: \"%s\"[%zu] is out of range", name, key, i);
    }
    free(wide);
    return status;
}

// NaN ("not measured") <-> null.
static json_t *from_measure(double value) {
    return isfinite(value) ? json_real(value) : json_null();
}

static Status to_measure(const json_t *object, const char *name, const char *key, double *out) {
    *out = NAN;
    return json_has(object, key) ? json_get_real(object, name, key, out) : STATUS_OK;
}

// --- Writing -------------------------------------------------------------------------------------

static json_t *data_to_json(const LoaderState *data, const RunIdentity *identity) {
    // The seed uses all 64 bits, JSON integers hold 63.
    char seed[24];
    snprintf(seed, sizeof seed, "%" PRIu64, data->seed);
    json_t *consumed = json_array();
    for (int i = 0; i < data->num_sources; i++)
        json_array_append_new(consumed, json_integer((json_int_t)data->consumed[i]));
    return json_pack("{s:s, s:o, s:s, s:s}", "seed", seed, "consumed", consumed, "fingerprint",
                     identity->data_fingerprint, "tokenizer_id", identity->tokenizer_id);
}

static json_t *skip_to_json(const SkipRule *skip) {
    return json_pack("{s:o, s:i, s:I, s:i, s:I}", "losses",
                     from_doubles(skip->losses, (size_t)skip->window), "window", skip->window,
                     "seen", (json_int_t)skip->seen, "in_a_row", skip->in_a_row, "skipped",
                     (json_int_t)skip->skipped);
}

static json_t *interval_to_json(const RunState *state) {
    const RunInterval *interval = &state->interval;
    size_t layers = (size_t)state->num_layers, all = layers * (size_t)state->stride;
    return json_pack("{s:I, s:f, s:f, s:f, s:f, s:f, s:f, s:o, s:o, s:o, s:o}", "steps",
                     (json_int_t)interval->steps, "loss_sum", interval->loss_sum, "loss_count",
                     interval->loss_count, "balance", interval->balance, "z", interval->z, "norm",
                     interval->norm, "tokens", interval->tokens, "assignments",
                     from_doubles(interval->assignments, all), "probability",
                     from_doubles(interval->probability, all), "entropy",
                     from_doubles(interval->entropy, layers), "router_z",
                     from_doubles(interval->router_z, layers));
}

static json_t *router_to_json(const RunState *state) {
    size_t all = (size_t)state->num_layers * (size_t)state->stride;
    return json_pack("{s:i, s:i, s:o, s:o}", "num_layers", state->num_layers, "stride",
                     state->stride, "load", from_floats(state->load, all), "bias",
                     from_floats(state->bias, all));
}

Status run_state_to_json(const RunState *state, const RunIdentity *identity, json_t **out) {
    json_t *config;
    TRY(config_to_canonical(identity->config, &config));
    json_t *eval =
        json_pack("{s:I, s:o, s:o}", "step", (json_int_t)state->eval_step, "start_loss",
                  from_measure(state->start_loss), "last_loss", from_measure(state->last_loss));
    // The o format takes the reference, and fails as a whole when one of them is NULL.
    *out =
        json_pack("{s:s, s:i, s:s, s:I, s:I, s:I, s:o, s:o, s:o, s:o, s:o, s:s, s:o, s:s}",
                  "format", format_name, "version", STATE_VERSION, "code_version", D2M_VERSION,
                  "step", (json_int_t)state->step, "tokens", (json_int_t)state->tokens, "updates",
                  (json_int_t)state->updates, "data", data_to_json(&state->data, identity), "skip",
                  skip_to_json(&state->skip), "interval", interval_to_json(state), "router",
                  router_to_json(state), "eval", eval, "origin", state->origin, "config", config,
                  "recipe", identity->recipe_text);
    if (!*out) FAIL(STATUS_INTERNAL, "the run's state does not fit into JSON");
    return STATUS_OK;
}

// --- Reading -------------------------------------------------------------------------------------

static Status data_from_json(const json_t *root, const char *name, LoaderState *data) {
    json_t *object, *consumed;
    char seed[24];
    TRY(json_get_object(root, name, "data", &object));
    TRY(json_get_text(object, name, "seed", seed, sizeof seed));
    int used = 0;
    if (sscanf(seed, "%" SCNu64 "%n", &data->seed, &used) != 1 || seed[used])
        FAIL(STATUS_BAD_DATA, "%s: data seed \"%s\" is not a number", name, seed);
    TRY(json_get_array(object, name, "consumed", &consumed));
    size_t count = json_array_size(consumed);
    if (count > LOADER_MAX_SOURCES)
        FAIL(STATUS_BAD_DATA, "%s: %zu data sources, expected at most %d", name, count,
             LOADER_MAX_SOURCES);
    data->num_sources = (int)count;
    for (size_t i = 0; i < count; i++) {
        const json_t *value = json_array_get(consumed, i);
        if (!json_is_integer(value) || json_integer_value(value) < 0)
            FAIL(STATUS_BAD_DATA, "%s: consumed[%zu] is not a sample count", name, i);
        data->consumed[i] = (uint64_t)json_integer_value(value);
    }
    return STATUS_OK;
}

static Status skip_from_json(const json_t *root, const char *name, SkipRule *skip) {
    json_t *object;
    int64_t window, seen, in_a_row;
    double losses[SKIP_WINDOW_MAX] = {0};
    TRY(json_get_object(root, name, "skip", &object));
    TRY(json_get_int(object, name, "window", 2, SKIP_WINDOW_MAX, &window));
    TRY(json_get_int(object, name, "seen", 0, INT64_MAX, &seen));
    TRY(json_get_int(object, name, "in_a_row", 0, INT32_MAX, &in_a_row));
    TRY(json_get_int(object, name, "skipped", 0, INT64_MAX, &skip->skipped));
    TRY(to_doubles(object, name, "losses", losses, (size_t)window));
    skip->in_a_row = (int)in_a_row;
    // A recipe that changed the window's size starts with an empty one.
    bool same = window == skip->window;
    skip->seen = same ? seen : 0;
    if (same) memcpy(skip->losses, losses, sizeof skip->losses);
    return STATUS_OK;
}

static Status interval_from_json(const json_t *root, const char *name, RunState *state) {
    RunInterval *interval = &state->interval;
    size_t layers = (size_t)state->num_layers, all = layers * (size_t)state->stride;
    json_t *object;
    TRY(json_get_object(root, name, "interval", &object));
    TRY(json_get_int(object, name, "steps", 0, INT64_MAX, &interval->steps));
    TRY(json_get_real(object, name, "loss_sum", &interval->loss_sum));
    TRY(json_get_real(object, name, "loss_count", &interval->loss_count));
    TRY(json_get_real(object, name, "balance", &interval->balance));
    TRY(json_get_real(object, name, "z", &interval->z));
    TRY(json_get_real(object, name, "norm", &interval->norm));
    TRY(json_get_real(object, name, "tokens", &interval->tokens));
    TRY(to_doubles(object, name, "assignments", interval->assignments, all));
    TRY(to_doubles(object, name, "probability", interval->probability, all));
    TRY(to_doubles(object, name, "entropy", interval->entropy, layers));
    return to_doubles(object, name, "router_z", interval->router_z, layers);
}

static Status router_from_json(const json_t *root, const char *name, RunState *state) {
    json_t *object;
    int64_t layers, stride;
    TRY(json_get_object(root, name, "router", &object));
    TRY(json_get_int(object, name, "num_layers", state->num_layers, state->num_layers, &layers));
    TRY(json_get_int(object, name, "stride", state->stride, state->stride, &stride));
    TRY(to_floats(object, name, "load", state->load, (size_t)(layers * stride)));
    return to_floats(object, name, "bias", state->bias, (size_t)(layers * stride));
}

static Status check_header(const json_t *root, const char *name) {
    char format[64];
    int64_t version;
    TRY(json_get_text(root, name, "format", format, sizeof format));
    if (strcmp(format, format_name) != 0)
        FAIL(STATUS_BAD_DATA, "%s: format is \"%s\", expected \"%s\"", name, format, format_name);
    TRY(json_get_int(root, name, "version", 1, INT64_MAX, &version));
    if (version > STATE_VERSION)
        FAIL(STATUS_BAD_DATA, "%s: version %" PRId64 " is newer than this program's %d", name,
             version, STATE_VERSION);
    return STATUS_OK;
}

Status run_state_from_json(const json_t *root, const char *name, RunState *state) {
    json_t *eval;
    TRY(check_header(root, name));
    TRY(json_get_int(root, name, "step", 0, INT64_MAX, &state->step));
    TRY(json_get_int(root, name, "tokens", 0, INT64_MAX, &state->tokens));
    TRY(json_get_int(root, name, "updates", 0, state->step, &state->updates));
    TRY(json_get_text(root, name, "origin", state->origin, sizeof state->origin));
    TRY(data_from_json(root, name, &state->data));
    TRY(skip_from_json(root, name, &state->skip));
    TRY(router_from_json(root, name, state));
    TRY(interval_from_json(root, name, state));
    TRY(json_get_object(root, name, "eval", &eval));
    TRY(json_get_int(eval, name, "step", -1, state->step, &state->eval_step));
    TRY(to_measure(eval, name, "start_loss", &state->start_loss));
    return to_measure(eval, name, "last_loss", &state->last_loss);
}
