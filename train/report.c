// The three places a run reports to: console, log.jsonl and TensorBoard.
//
// log.jsonl is made to be read by programs while it grows and after any end: a record is one write
// of one whole line at the file's known end, and a failed write is taken back. What a killed
// attempt logged beyond the checkpoint it resumes from is dropped by an atomic rewrite, so that
// an interrupted run's log reads like an uninterrupted one's.
//
// Reporting never stops a run: a full disk is warned about once, and records are written again when
// there is room.
#include "train/report.h"

#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "base/clock.h"
#include "base/file.h"
#include "base/json.h"
#include "base/log.h"
#include "train/console.h"
#include "train/router_stats.h"
#include "train/tensorboard.h"

enum {
    LOG_MAX_BYTES = INT32_MAX, // what a resume reads back
    EVAL_NAMES_MAX = 8,
    EVAL_NAME_SIZE = 32,
    LOAD_DIGITS = 4, // of an expert's share: enough to plot, and lines stay short
};
static const double PROGRESS_SECONDS = 0.2; // between two states of the progress bar

struct Report {
    ModelConfig config;
    int moe_layers;
    char path[IO_PATH_MAX]; // log.jsonl
    int fd;
    uint64_t bytes; // of whole records in the file
    TensorBoard *board;
    TensorBoardScalar *scalars; // room for one event
    bool log_failing, board_failing;
    double progress_time;
    // The latest evaluation of each name that the log holds.
    struct {
        char name[EVAL_NAME_SIZE];
        int64_t step;
    } evals[EVAL_NAMES_MAX];
    int eval_names;
};

// --- log.jsonl: resuming -------------------------------------------------------------------------

// Notes an evaluation; false when it is in the log already.
static bool note_eval(Report *report, const char *name, int64_t step) {
    for (int i = 0; i < report->eval_names; i++) {
        if (strcmp(report->evals[i].name, name) != 0) continue;
        if (step <= report->evals[i].step) return false;
        report->evals[i].step = step;
        return true;
    }
    if (report->eval_names < EVAL_NAMES_MAX && strlen(name) < EVAL_NAME_SIZE) {
        strcpy(report->evals[report->eval_names].name, name);
        report->evals[report->eval_names++].step = step;
    }
    return true;
}

// Whether a line of the old log stays: a whole record of a step up to resume_step.
static bool keep_line(Report *report, const char *line, size_t bytes, int64_t resume_step) {
    json_t *record;
    int64_t step;
    if (json_parse(line, bytes, report->path, &record) != STATUS_OK) {
        status_clear(); // the torn last line of a killed attempt
        return false;
    }
    bool keep = json_get_int(record, report->path, "step", 0, INT64_MAX, &step) == STATUS_OK &&
                step <= resume_step;
    const char *kind = json_string_value(json_object_get(record, "kind"));
    const char *name = json_string_value(json_object_get(record, "name"));
    if (keep && kind && name && strcmp(kind, "eval") == 0) note_eval(report, name, step);
    json_decref(record);
    status_clear();
    return keep;
}

// Moves the lines that stay to the front of `text`; returns their bytes.
static size_t keep_lines(Report *report, char *text, size_t bytes, int64_t resume_step) {
    size_t kept = 0;
    for (size_t begin = 0, end; begin < bytes; begin = end) {
        const char *newline = memchr(text + begin, '\n', bytes - begin);
        if (!newline) break; // torn
        end = (size_t)(newline - text) + 1;
        if (!keep_line(report, text + begin, end - begin, resume_step)) continue;
        memmove(text + kept, text + begin, end - begin);
        kept += end - begin;
    }
    return kept;
}

static Status resume_log(Report *report, int64_t resume_step) {
    if (!io_exists(report->path)) return STATUS_OK;
    char *text;
    size_t bytes;
    TRY(io_read_file(report->path, LOG_MAX_BYTES, &text, &bytes));
    size_t kept = keep_lines(report, text, bytes, resume_step);
    Status status = kept == bytes ? STATUS_OK : io_write_file_atomic(report->path, text, kept);
    free(text);
    report->bytes = kept;
    return status;
}

// --- log.jsonl: writing --------------------------------------------------------------------------

static void warn_once(bool *failing, const char *what) {
    if (!*failing) log_warn("%s; training goes on without %s", status_message(), what);
    *failing = true;
    status_clear();
}

static void write_line(Report *report, const char *line, size_t bytes) {
    if (io_pwrite(report->fd, report->path, line, bytes, report->bytes) == STATUS_OK) {
        report->bytes += bytes;
        if (report->log_failing) log_info("%s: writing works again", report->path);
        report->log_failing = false;
        return;
    }
    warn_once(&report->log_failing, "these records");
    // Take back the part of a line. Should even that fail, the next record overwrites it.
    (void)!ftruncate(report->fd, (off_t)report->bytes);
}

// JSON knows no infinities.
static json_t *real_or_null(double value) {
    return isfinite(value) ? json_real(value) : json_null();
}

// Writes `record` and, inside the same object, "experts" with fewer digits. Takes both references.
static void write_record(Report *report, json_t *record, json_t *experts) {
    char *text = json_dumps(record, JSON_COMPACT | JSON_REAL_PRECISION(17)), *line = NULL;
    char *tail =
        experts ? json_dumps(experts, JSON_COMPACT | JSON_REAL_PRECISION(LOAD_DIGITS)) : NULL;
    int bytes = -1;
    if (text && experts && tail)
        bytes = asprintf(&line, "%.*s,\"experts\":%s}\n", (int)strlen(text) - 1, text, tail);
    else if (text && !experts)
        bytes = asprintf(&line, "%s\n", text);
    if (bytes >= 0) {
        write_line(report, line, (size_t)bytes);
        free(line);
    } else {
        log_warn("%s: out of memory, a record is lost", report->path);
    }
    free(text);
    free(tail);
    json_decref(record);
    json_decref(experts);
}

static json_t *new_record(const char *kind, int64_t step) {
    return json_pack("{s:s, s:I, s:f}", "kind", kind, "step", (json_int_t)step, "time",
                     clock_wall());
}

static json_t *experts_of_layers(const Report *report, const ModelSums *sums) {
    json_t *layers = json_array();
    LayerStats stats;
    for (int layer = 0; layer < report->config.num_layers; layer++) {
        router_layer_stats(&report->config, sums, layer, &stats);
        if (stats.num_experts == 0) continue;
        json_t *load = json_array();
        for (int i = 0; i < stats.num_experts; i++)
            json_array_append_new(load, real_or_null(stats.load[i]));
        json_array_append_new(layers, json_pack("{s:i, s:o, s:o, s:o, s:o, s:i}", "layer", layer,
                                                "load", load, "max_load",
                                                real_or_null(stats.max_load), "max_over_mean",
                                                real_or_null(stats.max_over_mean), "entropy",
                                                real_or_null(stats.entropy), "dead", stats.dead));
    }
    return layers;
}

static void log_step(Report *report, const StepReport *step) {
    json_t *record = new_record("step", step->step);
    const struct {
        const char *key;
        double value;
    } reals[] = {
        {"loss", step->loss},
        {"cross_entropy", step->cross_entropy},
        {"balance", step->balance},
        {"z", step->z},
        {"perplexity", exp(step->cross_entropy)},
        {"learning_rate", step->learning_rate},
        {"gradient_norm", step->gradient_norm},
        {"tokens_per_second", step->tokens_per_second},
        {"data_wait", step->data_wait},
        {"eta_seconds", step->eta_seconds},
    };
    json_object_set_new(record, "tokens", json_integer(step->tokens));
    for (size_t i = 0; i < sizeof reals / sizeof reals[0]; i++)
        json_object_set_new(record, reals[i].key, real_or_null(reals[i].value));
    json_object_set_new(record, "skipped", json_integer(step->skipped));
    bool with_experts = step->sums && report->moe_layers > 0;
    write_record(report, record, with_experts ? experts_of_layers(report, step->sums) : NULL);
}

// --- TensorBoard ---------------------------------------------------------------------------------

enum { STEP_SCALARS = 9, LAYER_SCALARS = 3 };

__attribute__((format(printf, 3, 4))) static void set_scalar(TensorBoardScalar *scalar,
                                                             double value, const char *tag, ...) {
    va_list arguments;
    va_start(arguments, tag);
    vsnprintf(scalar->tag, sizeof scalar->tag, tag, arguments);
    va_end(arguments);
    scalar->value = (float)value;
}

static void write_scalars(Report *report, int64_t step, size_t count) {
    if (tensorboard_write(report->board, step, report->scalars, count) != STATUS_OK)
        warn_once(&report->board_failing, "these events");
    else
        report->board_failing = false;
}

static void board_step(Report *report, const StepReport *step) {
    if (!report->board) return;
    TensorBoardScalar *next = report->scalars;
    set_scalar(next++, step->loss, "train/loss");
    set_scalar(next++, step->cross_entropy, "train/cross_entropy");
    set_scalar(next++, exp(step->cross_entropy), "train/perplexity");
    set_scalar(next++, step->learning_rate, "train/learning_rate");
    set_scalar(next++, step->gradient_norm, "train/gradient_norm");
    set_scalar(next++, (double)step->skipped, "train/skipped");
    set_scalar(next++, step->tokens_per_second, "speed/tokens_per_second");
    set_scalar(next++, step->data_wait, "speed/data_wait");
    if (report->moe_layers > 0) set_scalar(next++, step->balance, "router/balance");
    LayerStats stats;
    for (int layer = 0; step->sums && layer < report->config.num_layers; layer++) {
        router_layer_stats(&report->config, step->sums, layer, &stats);
        if (stats.num_experts == 0) continue;
        set_scalar(next++, stats.max_load, "router/layer_%02d/max_load", layer);
        set_scalar(next++, stats.entropy, "router/layer_%02d/entropy", layer);
        set_scalar(next++, stats.dead, "router/layer_%02d/dead_experts", layer);
    }
    write_scalars(report, step->step, (size_t)(next - report->scalars));
}

// --- The public functions ------------------------------------------------------------------------

Status report_open(const char *run_path, const ModelConfig *config, int64_t resume_step,
                   bool tensorboard, Report **out) {
    Status status = STATUS_OK;
    char board_path[IO_PATH_MAX];
    Report *report = calloc(1, sizeof *report);
    if (!report) FAIL(STATUS_INTERNAL, "out of memory for the report");
    report->fd = -1;
    report->config = *config;
    report->moe_layers = router_moe_layers(config);
    size_t scalars = STEP_SCALARS + LAYER_SCALARS * (size_t)report->moe_layers;
    report->scalars = calloc(scalars, sizeof *report->scalars);
    if (!report->scalars) FAIL_GOTO(fail, STATUS_INTERNAL, "out of memory for the report");

    TRY_GOTO(io_path(report->path, "%s/log.jsonl", run_path), fail);
    TRY_GOTO(resume_log(report, resume_step), fail);
    TRY_GOTO(io_open(report->path, O_WRONLY | O_CREAT, &report->fd), fail);
    TRY_GOTO(io_path(board_path, "%s/tensorboard", run_path), fail);
    if (tensorboard) TRY_GOTO(tensorboard_open(board_path, resume_step, &report->board), fail);
    *out = report;
    return STATUS_OK;
fail:
    report_close(report);
    return status;
}

void report_step(Report *report, const StepReport *step) {
    if (!report) return;
    char line[CONSOLE_LINE_MAX];
    console_step_line(line, step, report->moe_layers);
    log_info("%s", line);
    log_step(report, step);
    board_step(report, step);
}

void report_eval(Report *report, int64_t step, const char *name, double loss, double targets) {
    if (!report) return;
    log_info("step %" PRId64 " | evaluation (%s): loss %.4f | ppl %.4g | %.0f targets", step, name,
             loss, exp(loss), targets);
    if (!note_eval(report, name, step)) return;
    json_t *record = new_record("eval", step);
    json_object_set_new(record, "name", json_string(name));
    json_object_set_new(record, "loss", real_or_null(loss));
    json_object_set_new(record, "perplexity", real_or_null(exp(loss)));
    json_object_set_new(record, "targets", real_or_null(targets));
    write_record(report, record, NULL);
    if (!report->board) return;
    set_scalar(&report->scalars[0], loss, "eval/loss");
    set_scalar(&report->scalars[1], exp(loss), "eval/perplexity");
    write_scalars(report, step, 2);
}

void report_ranks(Report *report, int64_t step, const double *medians, const double *maxima,
                  int world) {
    if (!report) return;
    json_t *record = new_record("ranks", step), *middle = json_array(), *most = json_array();
    for (int r = 0; r < world; r++) {
        json_array_append_new(middle, json_real(medians[r]));
        json_array_append_new(most, json_real(maxima[r]));
    }
    json_object_set_new(record, "seconds", middle);
    json_object_set_new(record, "max_seconds", most);
    write_record(report, record, NULL);
}

void report_event(Report *report, int64_t step, const char *kind, const char *text) {
    if (!report) return;
    json_t *record = new_record("event", step);
    json_object_set_new(record, "event", json_string(kind));
    // A text may quote bytes of a file that are no UTF-8.
    json_t *said = json_string(text);
    json_object_set_new(record, "text", said ? said : json_null());
    write_record(report, record, NULL);
}

void report_progress(Report *report, int64_t step, int64_t total_steps, double loss,
                     double tokens_per_second, double eta_seconds) {
    if (!report) return;
    double now = clock_seconds();
    if (now - report->progress_time < PROGRESS_SECONDS) return;
    report->progress_time = now;
    char line[CONSOLE_LINE_MAX];
    console_progress_line(line, step, total_steps, loss, tokens_per_second, eta_seconds);
    log_transient("%s", line);
}

void report_close(Report *report) {
    if (!report) return;
    log_transient("%s", "");
    if (tensorboard_close(report->board) != STATUS_OK)
        warn_once(&report->board_failing, "these events");
    if (report->fd >= 0 && (io_fsync(report->fd, report->path) != STATUS_OK ||
                            io_close(report->fd, report->path) != STATUS_OK))
        warn_once(&report->log_failing, "these records");
    free(report->scalars);
    free(report);
}
