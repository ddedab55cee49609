// Opening everything that a run works with, cheapest and most often wrong first: recipe against
// checkpoint, then the data, then the model, and what takes gigabytes last.
#include "train/trainer.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "base/log.h"
#include "model/hf.h"
#include "train/memory.h"
#include "train/step_sums.h"

static Status open_data(Trainer *t) {
    const Recipe *r = t->recipe;
    DatasetSummary summary;
    TRY(prepare_train_data(r, &t->config, &t->data));
    t->data.loader.rank = t->team.rank;
    t->data.loader.world = t->team.world;
    TRY(loader_open(&t->data.loader, t->resume_state ? &t->state.data : NULL, &t->loader));
    TRY(dataset_summary(t->data.loader.sources[0].directory, &summary));
    t->identity = (RunIdentity){.config = &t->config, .recipe_text = t->recipe_text};
    loader_fingerprint(t->loader, t->identity.data_fingerprint);
    memcpy(t->identity.tokenizer_id, summary.tokenizer_id, sizeof t->identity.tokenizer_id);
    TRY(resume_check_data(t));
    if (!r->data_valid[0]) return STATUS_OK;
    TRY(prepare_valid_data(r, &t->config, &t->valid_data));
    t->valid_data.loader.rank = t->team.rank;
    t->valid_data.loader.world = t->team.world;
    return fixed_pass_open(&t->valid_data.loader, r->train_eval_sequences, &t->valid);
}

static Status open_state(Trainer *t) {
    const Recipe *r = t->recipe;
    TRY(run_state_create(&t->config, &t->state));
    skip_rule_init(&t->state.skip, r->optim_spike_sigma, (int)r->optim_spike_window,
                   (int)r->optim_max_skipped);
    TRY(parse_step_ranges("optim.skip_steps", r->optim_skip_steps, &t->skip_steps));
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
static Status fill_model(Trainer *t) {
    if (t->resume_state) {
        TRY(checkpoint_load(t->resume_path, t->model, t->optimizer));
        t->optimizer->updates = t->state.updates;
        return STATUS_OK;
    }
    if (t->source) return model_load(t->model, t->source);
    return model_init_random(t->model, (uint64_t)t->recipe->run_seed,
                             (float)t->recipe->model_init_std);
}

static Status open_sums(Trainer *t) {
    TRY(model_sums_create(t->model, &t->sums));
    const int64_t count = step_sums_count(&t->sums, t->config.num_layers);
    t->row = calloc((size_t)count, sizeof *t->row);
    if (!t->row) FAIL(STATUS_INTERNAL, "out of memory for the sums of a step");
    if (!t->recipe->parallel_pairwise) return STATUS_OK;
    return pairwise_create(t->model, loader_micro_batches(&t->data.loader), count, &t->pairwise);
}

// Neighbours share out experts, since they are likely on one machine.
static Status open_expert_groups(Trainer *t) {
    const int group = (int)t->recipe->parallel_expert;
    Communicator *all = t->team.communicator;
    if (group == 1) return STATUS_OK;
    TRY(all->ops->split(all, t->team.rank / group, &t->experts));
    return all->ops->split(all, t->team.rank % group, &t->replicas);
}

static Status open_model(Trainer *t) {
    const Recipe *r = t->recipe;
    ModelOptions model_options;
    OptimizerOptions options = prepare_optimizer_options(r);
    TRY(memory_check(r, t->backend, &t->config, t->team.world));
    TRY(prepare_model_options(r, true, &model_options));
    model_options.ranks = t->team.world;
    model_options.share_gradients = t->team.world > 1 && r->parallel_zero == ZERO_2;
    model_options.expert_ranks = (int)r->parallel_expert;
    model_options.expert_rank = t->team.rank % (int)r->parallel_expert;
    TRY(model_create(t->backend, &t->config, &model_options, &t->model));
    t->model->experts = t->experts;
    INVARIANT(model_sums_stride(t->model) == t->state.stride);
    TRY(open_sums(t));
    if (t->team.world > 1)
        TRY(traffic_create(t->team.communicator, t->replicas, t->model, r->parallel_bucket_bytes,
                           &t->traffic));
    TRY(optimizer_create(t->model, &options, t->traffic, &t->optimizer));
    return fill_model(t);
}

// Every interval and the end.
static int64_t saves_to_come(const Trainer *t) {
    int64_t left = t->total_steps - t->state.step, every = t->recipe->checkpoint_every;
    return 1 + (every > 0 ? left / every : 0);
}

static CheckpointOptions checkpoint_options(const Trainer *t) {
    const Recipe *r = t->recipe;
    return (CheckpointOptions){.directory = t->checkpoints,
                               .keep_last = r->checkpoint_keep_last,
                               .keep_every = r->checkpoint_keep_every,
                               .dtype = r->checkpoint_dtype == WEIGHTS_F32 ? DTYPE_F32 : DTYPE_BF16,
                               .rank = t->team.rank,
                               .world = t->team.world,
                               .tag = t->save_tag};
}

static Status open_checkpoints(Trainer *t) {
    CheckpointOptions options = checkpoint_options(t);
    return checkpoint_writer_create(t->model, t->optimizer, &options, &t->writer);
}

static Status write_resolved_recipe(const Trainer *t) {
    char path[IO_PATH_MAX];
    TRY(io_path(path, "%s/recipe.resolved.ini", t->dir.path));
    return io_write_file_atomic(path, t->recipe_text, strlen(t->recipe_text));
}

// What rank 0 alone does before the first step.
static Status open_outputs(Trainer *t) {
    CheckpointOptions options = checkpoint_options(t);
    TRY(resume_set_aside(t));
    if (!t->profile) TRY(checkpoint_check_space(&options, &t->model->table, saves_to_come(t)));
    TRY(write_resolved_recipe(t));
    TRY(report_open(t->dir.path, &t->config, t->resume_step, t->recipe->report_tensorboard,
                    &t->report));
    const int skipped = loader_skipped_shards(t->loader);
    char text[64];
    snprintf(text, sizeof text, "%d left out, because of data.on_bad_shard", skipped);
    if (skipped > 0) report_event(t->report, t->state.step, "skipped_shards", text);
    return STATUS_OK;
}

static void say_what_starts(const Trainer *t) {
    const TensorTable *table = &t->model->table;
    log_info("device: %s, %s", t->backend->device_name, dtype_name(t->backend->compute_dtype));
    if (t->team.world > 1)
        log_info("ranks: %d, each with 1/%d of AdamW's state%s in %d buckets", t->team.world,
                 t->team.world, t->traffic->sums ? " and of the gradients" : "",
                 t->optimizer->partition->count);
    if (t->experts)
        log_info("experts: shared out among groups of %d ranks, each expert on %d of all",
                 t->experts->world, t->replicas->world);
    log_info("model: %d layers, %.4g M parameters, %.4g M active per token", t->config.num_layers,
             (double)table->parameters / 1e6, (double)table->active_parameters / 1e6);
    if (t->resume_state)
        log_info("continuing %s at step %" PRId64 " of %" PRId64, t->resume_path, t->state.step,
                 t->total_steps);
    else if (!t->profile)
        log_info("training %" PRId64 " steps of %" PRId64 " tokens", t->total_steps,
                 recipe_tokens_per_step(t->recipe));
}

// The plan is measured by rank 0; the others find it in the run directory.
static Status open_config(Trainer *t) {
    TRY(prepare_model(t->recipe, t->backend, &t->dir, &t->config, &t->source));
    if (t->recipe->export_hf) TRY(hf_check_writable(&t->config));
    TRY(resume_check_config(t));
    return open_state(t);
}

static Status open_all(Trainer *t) {
    TRY(ranks_first_only(t, resume_start_anew));
    TRY(ranks_in_turn(t, open_config));
    TRY(ranks_in_turn(t, open_data)); // rank 0 verifies shards, the others find that done
    TRY(ranks_compare_data(t));
    TRY(ranks_together(t, open_expert_groups));
    TRY(ranks_together(t, open_model));
    TRY(ranks_first_only(t, open_outputs));
    t->save_tag = (long)getpid();
    TRY(team_broadcast(&t->team, &t->save_tag, sizeof t->save_tag));
    if (!t->profile) TRY(ranks_together(t, open_checkpoints));
    return STATUS_OK;
}

Status trainer_open(Trainer *t) {
    Status status = open_all(t);
    source_close(t->source);
    t->source = NULL;
    TRY(status);
    TRY(stragglers_open(t->team.world, t->recipe->parallel_straggler_ratio,
                        t->recipe->parallel_straggler_steps, &t->stragglers));
    say_what_starts(t);
    return STATUS_OK;
}

void trainer_close(Trainer *t) {
    checkpoint_writer_destroy(t->writer);
    optimizer_destroy(t->optimizer);
    traffic_destroy(t->traffic);
    pairwise_destroy(t->pairwise);
    free(t->row);
    stragglers_close(&t->stragglers);
    if (t->model) model_sums_free(&t->sums);
    model_destroy(t->model);
    communicator_destroy(t->experts);
    communicator_destroy(t->replicas);
    if (t->valid) fixed_pass_close(t->valid);
    if (t->loader) loader_close(t->loader);
    if (t->report) report_close(t->report);
    run_state_free(&t->state);
    json_decref(t->resume_state);
    free(t->recipe_text);
}
