// What a run says: one console line per interval, log.jsonl, TensorBoard events.
//
// log.jsonl has one JSON object a line, in the order of steps:
//   {"kind": "step", "step", "time", "tokens", "loss", "cross_entropy", "balance", "z",
//    "perplexity", "learning_rate", "gradient_norm", "tokens_per_second", "data_wait",
//    "eta_seconds", "skipped",
//    "experts": [{"layer", "load": [share of each expert], "max_load", "max_over_mean", "entropy",
//                 "dead"}, ...]}         "experts" only where StepReport.sums was given
//   {"kind": "eval", "step", "time", "name", "loss", "perplexity", "targets"}
//   {"kind": "ranks", "step", "time", "seconds": [median step of each rank, without waiting for
//    others], "max_seconds": [...]}         with several ranks
//   {"kind": "event", "step", "time", "event", "text"}
// Numbers that are not finite are null. Losses have 17 digits: equal lines are equal runs.
#ifndef TRAIN_REPORT_H
#define TRAIN_REPORT_H

#include <stdbool.h>
#include <stdint.h>
#include "base/status.h"
#include "model/config.h"
#include "model/model.h"

typedef struct Report Report;

typedef struct StepReport {
    int64_t step, total_steps;
    int64_t tokens;                         // since the start of the run
    double loss, cross_entropy, balance, z; // means over the interval; balance is Σ layers, 1 each
                                            // (router_balance in train/router_stats.h)
    double learning_rate, gradient_norm;
    double tokens_per_second;
    double data_wait; // share of the interval spent waiting for data
    double eta_seconds;
    int64_t skipped;       // in the whole run
    const ModelSums *sums; // of the interval, for expert load; NULL to leave out
} StepReport;

// Appends to <run>/log.jsonl (records after `resume_step` of an earlier attempt are dropped first,
// so that no step stands there twice; -1 drops all) and opens a new TensorBoard file. `config`
// (copied) says which layers have experts.
Status report_open(const char *run_path, const ModelConfig *config, int64_t resume_step,
                   bool tensorboard, Report **out) NODISCARD;
// A failing log disk is warned about once; training goes on. A NULL report, that of a rank which
// does not report, takes everything and says nothing.
void report_step(Report *report, const StepReport *step);
// `name` says which evaluation it is ("start", "valid", "end"). A step and name that an earlier
// attempt has recorded already are not recorded again.
void report_eval(Report *report, int64_t step, const char *name, double loss, double targets);
// How long the ranks worked on the interval's steps, each (world).
void report_ranks(Report *report, int64_t step, const double *medians, const double *maxima,
                  int world);
// A record of something that happened; what the console should say of it is the caller's.
void report_event(Report *report, int64_t step, const char *kind, const char *text);
// The transient progress bar between lines (terminals only).
void report_progress(Report *report, int64_t step, int64_t total_steps, double loss,
                     double tokens_per_second, double eta_seconds);
void report_close(Report *report); // accepts NULL

#endif
