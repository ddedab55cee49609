// Evaluation on the held-out shards, and what is left to do after the last step.
#include "train/trainer.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>
#include "base/log.h"
#include "model/export_check.h"
#include "model/hf.h"
#include "train/memory.h"

enum { RESULT_MAX_BYTES = 1 << 20 };

// --- Evaluation ----------------------------------------------------------------------------------

static const char *due_evaluation(const Trainer *t) {
    int64_t step = t->state.step, every = t->recipe->train_eval_every;
    if (!t->valid || t->state.eval_step >= step) return NULL;
    if (step == 0) return "start";
    if (step == t->total_steps) return "end";
    return every > 0 && step % every == 0 ? "valid" : NULL;
}

// The same windows in the same order each time, shared out between the ranks, all of which make the
// same number of micro-batches. *done = false when a request to stop came between.
static Status run_pass(Trainer *t, bool *done) {
    MicroBatch batch;
    StepNews none = {.stop = 0};
    bool more;
    *done = false;
    if (t->traffic) TRY(traffic_settle(t->traffic));
    TRY(model_reset_sums(t->model));
    fixed_pass_rewind(t->valid);
    for (;;) {
        TRY(ranks_agree_on_stop(t));
        if (t->stop) return STATUS_OK;
        TRY(fixed_pass_next(t->valid, &batch, &more));
        if (!more) break;
        TRY(model_forward(t->model, &batch));
        watchdog_beat(t->watchdog, t->state.step, "in the evaluation");
    }
    *done = true;
    TRY(model_read_sums(t->model, &t->sums));
    return sum_over_ranks(t, &none);
}

Status evaluate_if_due(Trainer *t) {
    const char *name = due_evaluation(t);
    bool done;
    if (!name) return STATUS_OK;
    TRY(run_pass(t, &done));
    if (!done) return STATUS_OK;
    if (t->sums.loss_count == 0)
        FAIL(STATUS_BAD_DATA, "data.valid = %s: the evaluation has no targets",
             t->recipe->data_valid);
    double loss = t->sums.loss_sum / t->sums.loss_count;
    report_eval(t->report, t->state.step, name, loss, t->sums.loss_count);
    t->state.eval_step = t->state.step;
    t->state.last_loss = isfinite(loss) ? loss : NAN;
    if (t->state.step == 0) t->state.start_loss = t->state.last_loss;
    t->unsaved |= t->state.step > 0;
    return STATUS_OK;
}

// --- Export --------------------------------------------------------------------------------------

static void show_export(void *context, uint64_t done, uint64_t total) {
    (void)context;
    log_transient("export %3.0f %%", total ? 100.0 * (double)done / (double)total : 100.0);
}

// Proves that the directory is the trained model (model/export_check.h). The optimizer and the
// writer's snapshot have done their work and make room for the second model that this takes.
static Status verify_export(Trainer *t, const char *path, DType written, ExportCheck *check) {
    checkpoint_writer_destroy(t->writer);
    t->writer = NULL;
    optimizer_destroy(t->optimizer);
    t->optimizer = NULL;
    if (t->recipe->router_balance_bias) {
        log_warn("export: Hugging Face models know no selection bias; the exported model chooses "
                 "experts without it");
        TRY(model_set_selection_bias(t->model, NULL));
    }
    TRY(export_verify(t->model, path, written, check));
    log_info("export: read back and compared on %" PRId64 " tokens: logits differ from the trained "
             "model's by at most %.2g (%s weights), same most likely token for %.0f %%",
             check->tokens, check->max_diff, dtype_name(written), 100 * check->top1_agreement);
    return STATUS_OK;
}

// Where this rank has only some of the experts, the newest checkpoint has them all. Training is
// over: what it took makes room for the whole model.
static Status gather_model(Trainer *t) {
    ModelOptions options;
    char path[IO_PATH_MAX];
    if (!t->experts) return STATUS_OK;
    checkpoint_writer_destroy(t->writer);
    optimizer_destroy(t->optimizer);
    traffic_destroy(t->traffic);
    model_sums_free(&t->sums);
    model_destroy(t->model);
    t->writer = NULL;
    t->optimizer = NULL;
    t->traffic = NULL;
    t->model = NULL;
    TRY(checkpoint_path(t->checkpoints, t->state.step, path));
    // A run that began at its last step has nothing to save.
    if (!io_is_directory(path)) TRY(io_path(path, "%s", t->resume_path));
    TRY(prepare_model_options(t->recipe, false, &options));
    Status status = model_create(t->backend, &t->config, &options, &t->model);
    if (status != STATUS_OK)
        return status_prefix(status, "the whole model for the export (" EXPORT_ELSEWHERE "): ");
    TRY(model_sums_create(t->model, &t->sums));
    if (t->recipe->router_balance_bias) TRY(model_set_selection_bias(t->model, t->state.bias));
    return checkpoint_load(path, t->model, NULL);
}

static Status export_model(Trainer *t, const char *path, ExportCheck *check) {
    const Recipe *r = t->recipe;
    TensorSource *source;
    TRY(gather_model(t));
    HfWriteOptions options = {.dtype = r->export_dtype == WEIGHTS_F32 ? DTYPE_F32 : DTYPE_BF16,
                              .max_shard_bytes = (uint64_t)r->export_max_shard_bytes,
                              .copy_from = r->model_source[0] ? r->model_source : NULL,
                              .tokenizer_id = t->identity.tokenizer_id,
                              .progress = show_export};
    TRY(model_source(t->model, &source));
    Status status = hf_write(path, source, &options);
    log_transient("%s", "");
    source_close(source);
    TRY(status);
    return verify_export(t, path, options.dtype, check);
}

// --- The result ----------------------------------------------------------------------------------

static json_t *perplexity(double loss) {
    return isfinite(loss) ? json_real(exp(loss)) : json_null();
}

// `check` is NULL without an export.
static Status write_result(const Trainer *t, const char *export_path, const ExportCheck *check) {
    char path[IO_PATH_MAX];
    TRY(io_path(path, "%s/" RESULT_NAME, t->dir.path));
    json_t *root = json_pack(
        "{s:I, s:I, s:I, s:o, s:o, s:s, s:s}", "step", (json_int_t)t->state.step, "tokens",
        (json_int_t)t->state.tokens, "skipped", (json_int_t)t->state.skip.skipped,
        "perplexity_start", perplexity(t->state.start_loss), "perplexity_end",
        perplexity(t->state.last_loss), "checkpoint", t->checkpoints, "export", export_path);
    json_t *verified =
        check ? json_pack("{s:f, s:f, s:f, s:f}", "max_file_difference", check->max_file_diff,
                          "max_difference", check->max_diff, "median_error", check->median_error,
                          "top1_agreement", check->top1_agreement)
              : json_null();
    Status status = STATUS_OK;
    if (!root || json_object_set_new(root, "export_check", verified) != 0)
        status = status_fail(__FILE__, __LINE__, STATUS_INTERNAL, "%s: out of memory", path);
    else
        status = json_write_file(path, root);
    json_decref(root);
    return status;
}

bool run_is_finished(const Trainer *t) {
    char path[IO_PATH_MAX], export_path[IO_PATH_MAX];
    json_t *root;
    int64_t step = -1;
    if (t->resume_step < t->total_steps) return false;
    // More steps than this recipe asks for: whatever is there belongs to a longer run.
    if (t->resume_step > t->total_steps) return true;
    Status status = io_path(path, "%s/" RESULT_NAME, t->dir.path);
    if (status == STATUS_OK) status = json_read_file(path, RESULT_MAX_BYTES, &root);
    if (status == STATUS_OK) {
        status = json_get_int(root, path, "step", 0, INT64_MAX, &step);
        if (status == STATUS_OK)
            status = json_get_text(root, path, "export", export_path, sizeof export_path);
        json_decref(root);
    }
    if (status != STATUS_OK) {
        status_clear();
        return false;
    }
    bool export_there = !t->recipe->export_hf || (export_path[0] && io_is_directory(export_path));
    return step == t->resume_step && export_there;
}

static void say_where_everything_is(const Trainer *t, const char *export_path) {
    char quality[96] = "";
    if (isfinite(t->state.start_loss) && isfinite(t->state.last_loss))
        snprintf(quality, sizeof quality, ", held-out perplexity %.4g -> %.4g",
                 exp(t->state.start_loss), exp(t->state.last_loss));
    log_info("done: %" PRId64 " steps, %" PRId64 " tokens%s; model: %s; run: %s (log.jsonl, "
             "checkpoints/, recipe.resolved.ini)",
             t->state.step, t->state.tokens, quality,
             export_path[0] ? export_path : "newest checkpoint", t->dir.path);
}

Status finish_run(Trainer *t) {
    char export_path[IO_PATH_MAX] = "";
    ExportCheck check;
    if (t->recipe->export_hf) {
        TRY(io_path(export_path, "%s/export", t->dir.path));
        TRY(export_model(t, export_path, &check));
    }
    TRY(write_result(t, export_path, t->recipe->export_hf ? &check : NULL));
    say_where_everything_is(t, export_path);
    return STATUS_OK;
}
