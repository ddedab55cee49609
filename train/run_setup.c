// Opening everything that a run works with, cheapest and most often wrong first: recipe against
// checkpoint, then the data, then the model, and what takes gigabytes last.
#include "train/trainer.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include "base/log.h"
#include "model/hf.h"
#include "train/memory.h"

static Status open_data(Trainer *t) {
    const Recipe *r = t->recipe;
    DatasetSummary summary;
    TRY(prepare_train_data(r, &t->config, &t->data));
    TRY(loader_open(&t->data.loader, t->resume_state ? &t->state.data : NULL, &t->loader));
    TRY(dataset_summary(t->data.loader.sources[0].directory, &summary));
    t->identity = (RunIdentity){.config = &t->config, .recipe_text = t->recipe_text};
    loader_fingerprint(t->loader, t->identity.data_fingerprint);
    memcpy(t->identity.tokenizer_id, summary.tokenizer_id, sizeof t->identity.tokenizer_id);
    if (!r->data_valid[0]) return STATUS_OK;
    TRY(prepare_valid_data(r, &t->config, &t->valid_data));
    return fixed_pass_open(&t->valid_data.loader, r->train_eval_sequences, &t->valid);
}

static Status open_state(Trainer *t) {
    const Recipe *r = t->recipe;
    TRY(run_state_create(&t->config, &t->state));
    skip_rule_init(&t->state.skip, r->optim_spike_sigma, (int)r->optim_spike_window,
                   (int)r->optim_max_skipped);
    if (t->resume_state) TRY(run_state_from_json(t->resume_state, t->resume_path, &t->state));
    strcpy(t->state.origin, t->origin);
    t->schedule = (Schedule){.kind = (ScheduleKind)r->optim_schedule,
                             .peak = r->optim_lr,
                             .final = r->optim_min_lr,
                             .warmup_steps = recipe_warmup_steps(r),
                             .decay_steps = r->optim_decay_steps,
                             .total_steps = t->total_steps};
    return STATUS_OK;
}

// Weights from the checkpoint, else from the source, else random.
static Status fill_model(Trainer *t, TensorSource *source) {
    if (t->resume_state) {
        TRY(checkpoint_load(t->resume_path, t->model, t->optimizer));
        t->optimizer->updates = t->state.updates;
        return STATUS_OK;
    }
    if (source) return model_load(t->model, source);
    return model_init_random(t->model, (uint64_t)t->recipe->run_seed,
                             (float)t->recipe->model_init_std);
}

static Status open_model(Trainer *t, TensorSource *source) {
    const Recipe *r = t->recipe;
    ModelOptions model_options;
    OptimizerOptions options = prepare_optimizer_options(r);
    TRY(prepare_model_options(r, true, &model_options));
    TRY(model_create(t->backend, &t->config, &model_options, &t->model));
    INVARIANT(model_sums_stride(t->model) == t->state.stride);
    TRY(model_sums_create(t->model, &t->sums));
    TRY(optimizer_create(t->model, &options, NULL, &t->optimizer));
    return fill_model(t, source);
}

// Every interval and the end.
static int64_t saves_to_come(const Trainer *t) {
    int64_t left = t->total_steps - t->state.step, every = t->recipe->checkpoint_every;
    return 1 + (every > 0 ? left / every : 0);
}

static Status open_checkpoints(Trainer *t) {
    const Recipe *r = t->recipe;
    CheckpointOptions options = {.directory = t->checkpoints,
                                 .keep_last = r->checkpoint_keep_last,
                                 .keep_every = r->checkpoint_keep_every,
                                 .dtype =
                                     r->checkpoint_dtype == WEIGHTS_F32 ? DTYPE_F32 : DTYPE_BF16};
    TRY(checkpoint_check_space(&options, &t->model->table, saves_to_come(t)));
    return checkpoint_writer_create(t->model, t->optimizer, &options, &t->writer);
}

static Status write_resolved_recipe(const Trainer *t) {
    char path[IO_PATH_MAX];
    TRY(io_path(path, "%s/recipe.resolved.ini", t->dir.path));
    return io_write_file_atomic(path, t->recipe_text, strlen(t->recipe_text));
}

static void say_what_starts(const Trainer *t) {
    const TensorTable *table = &t->model->table;
    log_info("device: %s, %s", t->backend->device_name, dtype_name(t->backend->compute_dtype));
    log_info("model: %d layers, %.4g M parameters, %.4g M active per token", t->config.num_layers,
             (double)table->parameters / 1e6, (double)table->active_parameters / 1e6);
    if (t->resume_state)
        log_info("continuing %s at step %" PRId64 " of %" PRId64, t->resume_path, t->state.step,
                 t->total_steps);
    else if (!t->profile)
        log_info("training %" PRId64 " steps of %" PRId64 " tokens", t->total_steps,
                 recipe_tokens_per_step(t->recipe));
}

Status trainer_open(Trainer *t) {
    Status status = STATUS_OK;
    const Recipe *r = t->recipe;
    TensorSource *source = NULL;
    TRY(resume_check_recipe(t));
    TRY(resume_start_anew(t));
    TRY(prepare_model(r, t->backend, &t->dir, &t->config, &source));
    if (r->export_hf) TRY_GOTO(hf_check_writable(&t->config), done);
    TRY_GOTO(resume_check_config(t), done);
    TRY_GOTO(open_state(t), done);
    TRY_GOTO(open_data(t), done);
    TRY_GOTO(resume_check_data(t), done);
    TRY_GOTO(memory_check(r, t->backend, &t->config), done);
    TRY_GOTO(open_model(t, source), done);
    TRY_GOTO(resume_set_aside(t), done);
    if (!t->profile) TRY_GOTO(open_checkpoints(t), done);
    TRY_GOTO(write_resolved_recipe(t), done);
    TRY_GOTO(
        report_open(t->dir.path, &t->config, t->resume_step, r->report_tensorboard, &t->report),
        done);
    say_what_starts(t);
done:
    source_close(source);
    return status;
}

void trainer_close(Trainer *t) {
    checkpoint_writer_destroy(t->writer);
    optimizer_destroy(t->optimizer);
    if (t->model) model_sums_free(&t->sums);
    model_destroy(t->model);
    if (t->valid) fixed_pass_close(t->valid);
    if (t->loader) loader_close(t->loader);
    if (t->report) report_close(t->report);
    run_state_free(&t->state);
    json_decref(t->resume_state);
    free(t->recipe_text);
}
