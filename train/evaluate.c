// Opens whatever holds a model: a Hugging Face directory, a checkpoint, a run.
//
// A checkpoint has a config.json beside its weights, but its state.json says more: the exact gate,
// a router on the raw stream, selection biases. Its fp32 weights are read, so that the figure is
// the one that training reported.
#include "train/evaluate.h"

#include <stdlib.h>
#include <string.h>
#include "train/checkpoint.h"
#include "train/run_state.h"

static Status open_checkpoint(EvalModel *model) {
    json_t *config, *data;
    char name[IO_PATH_MAX];
    TRY(io_path(name, "%s/state.json", model->path));
    TRY(checkpoint_read_state(model->path, &model->state));
    TRY(json_get_object(model->state, name, "config", &config));
    TRY(config_from_canonical(config, name, &model->config));
    TRY(json_get_object(model->state, name, "data", &data));
    return json_get_text(data, name, "tokenizer_id", model->tokenizer_id,
                         sizeof model->tokenizer_id);
}

static Status open_hf(EvalModel *model) {
    TRY(hf_open(model->path, &model->source));
    model->config = *model->source->config;
    return hf_tokenizer_id(model->path, model->tokenizer_id);
}

// True when directory/name exists.
static bool holds(const char *directory, const char *name) {
    char path[IO_PATH_MAX];
    if (io_path(path, "%s/%s", directory, name) == STATUS_OK) return io_exists(path);
    status_clear();
    return false;
}

Status eval_model_open(const char *directory, EvalModel *out) {
    memset(out, 0, sizeof *out);
    TRY(io_path(out->path, "%s", directory));
    if (!io_is_directory(directory))
        FAIL(STATUS_MISSING_INPUT, "%s: there is no such directory", directory);
    Status status = STATUS_OK;
    if (holds(directory, "checkpoints")) {
        char checkpoints[IO_PATH_MAX];
        int64_t step = -1;
        TRY(io_path(checkpoints, "%s/checkpoints", directory));
        TRY(checkpoint_find(checkpoints, &step, out->path));
        if (step < 0) FAIL(STATUS_MISSING_INPUT, "%s: the run has no checkpoint yet", directory);
        status = open_checkpoint(out);
    } else if (holds(directory, "state.json")) {
        TRY(checkpoint_verify(directory));
        status = open_checkpoint(out);
    } else if (holds(directory, "config.json")) {
        status = open_hf(out);
    } else {
        FAIL(STATUS_MISSING_INPUT,
             "%s: holds no model: expected a Hugging Face directory (config.json), a run directory "
             "(checkpoints/) or a checkpoint (state.json)",
             directory);
    }
    if (status != STATUS_OK) eval_model_close(out);
    return status;
}

void eval_model_close(EvalModel *model) {
    source_close(model->source);
    json_decref(model->state);
    model->source = NULL;
    model->state = NULL;
}

// Aux-loss-free balancing changes which experts are chosen, so it belongs to the model.
static Status load_selection_bias(const EvalModel *from, Model *model) {
    RunState state;
    Status status = STATUS_OK;
    bool used = false;
    TRY(run_state_create(&from->config, &state));
    TRY_GOTO(run_state_from_json(from->state, from->path, &state), done);
    for (int i = 0; i < state.num_layers * state.stride; i++) used |= state.bias[i] != 0;
    if (used) TRY_GOTO(model_set_selection_bias(model, state.bias), done);
done:
    run_state_free(&state);
    return status;
}

Status eval_model_load(const EvalModel *from, Backend *backend, const ModelOptions *options,
                       Model **out) {
    Model *model = NULL;
    Status status = STATUS_OK;
    TRY(model_create(backend, &from->config, options, &model));
    if (from->source) {
        TRY_GOTO(model_load(model, from->source), fail);
    } else {
        TRY_GOTO(checkpoint_load(from->path, model, NULL), fail);
        TRY_GOTO(load_selection_bias(from, model), fail);
    }
    *out = model;
    return STATUS_OK;
fail:
    model_destroy(model);
    return status;
}
