// What a run must remember, beyond weights and optimizer state, so that the next step after a
// resume is bit for bit the step that would have come anyway: state.json of a checkpoint.
#ifndef TRAIN_RUN_STATE_H
#define TRAIN_RUN_STATE_H

#include <stdint.h>
#include "base/hash.h"
#include "base/json.h"
#include "base/status.h"
#include "data/loader.h"
#include "model/config.h"
#include "model/hf.h"
#include "model/model.h"
#include "optim/skip_rule.h"

// Sums since the last log line, so that a line says the same whether or not the run was interrupted
// before it. Only kept steps count. Arrays are (num_layers, stride) like ModelSums.
typedef struct RunInterval {
    int64_t steps;
    double loss_sum, loss_count;       // Σ -log p and its number of targets
    double balance, z, norm;           // sums over steps
    double tokens;                     // seen by the routers
    double *assignments, *probability; // (num_layers, stride)
    double *entropy, *router_z;        // (num_layers)
} RunInterval;

enum { RUN_ORIGIN_MAX = 4096 };

typedef struct RunState {
    int num_layers, stride;
    int64_t step, tokens;
    int64_t updates; // AdamW updates
    LoaderState data;
    SkipRule skip;
    float *load; // (num_layers, stride) f_i of the latest kept global batch; 1/N before the first
    float *bias; // (num_layers, stride) selection bias; zeros unless router.balance_bias
    RunInterval interval;
    int64_t eval_step;           // of the latest finished evaluation; -1 = none
    double start_loss;           // held-out loss before the first step; NaN = not measured
    double last_loss;            // of the latest evaluation; NaN = none
    char origin[RUN_ORIGIN_MAX]; // the path given to --resume that this run continues, or ""
} RunState;

// What must not change under a run; compared key by key on resume (run_resume.c).
typedef struct RunIdentity {
    const ModelConfig *config;
    const char *recipe_text;              // resolved
    char data_fingerprint[HASH_HEX_SIZE]; // of the training shards
    char tokenizer_id[TOKENIZER_ID_SIZE];
} RunIdentity;

// Sized for the config; balance loads of 1/N. Free with run_state_free (safe on zeroed memory).
Status run_state_create(const ModelConfig *config, RunState *out) NODISCARD;
void run_state_free(RunState *state);

// A new object. Doubles come back with the same bits; values that JSON cannot hold (NaN) are null.
Status run_state_to_json(const RunState *state, const RunIdentity *identity,
                         json_t **out) NODISCARD;
// Fills a state made by run_state_create for the same config. Everything is range-checked; the rule
// of `skip` (sigma, window, limits) is kept and only its memory is read. `name` is for messages.
// The fuzz target's entry.
Status run_state_from_json(const json_t *root, const char *name, RunState *state) NODISCARD;

// Forgets the interval after a log line.
void run_interval_reset(RunState *state);
// Adds one kept step.
void run_interval_add(RunState *state, const ModelSums *sums, double balance, double z,
                      double norm);

#endif
