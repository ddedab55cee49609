// Perplexity and router statistics of a model on held-out text: the program `evaluate`.
#ifndef TRAIN_EVALUATE_H
#define TRAIN_EVALUATE_H

#include "base/file.h"
#include "base/json.h"
#include "model/hf.h"
#include "model/model.h"

// A model found on disk, before its weights are read.
typedef struct EvalModel {
    char path[IO_PATH_MAX]; // Hugging Face directory or checkpoint
    ModelConfig config;
    TensorSource *source; // Hugging Face directory; NULL for a checkpoint
    json_t *state;        // state.json of a checkpoint; NULL otherwise
    char tokenizer_id[TOKENIZER_ID_SIZE];
} EvalModel;

// `directory` may be a Hugging Face directory, a checkpoint, or a run directory (its newest
// checkpoint that verifies). eval_model_close is safe on a zeroed struct.
Status eval_model_open(const char *directory, EvalModel *out) NODISCARD;
void eval_model_close(EvalModel *model);
// Creates the model on a backend for forward passes only and reads its weights.
Status eval_model_load(const EvalModel *model, Backend *backend, const ModelOptions *options,
                       Model **out) NODISCARD;

// Makes shards of a text file in a new temporary directory by running scripts/prepare_data.py.
// `tokenizer` is a directory, a tokenizer.json, or "bytes". The caller removes `directory`.
Status eval_shards_of_text(const char *text_file, const char *tokenizer,
                           char directory[IO_PATH_MAX]) NODISCARD;

#endif
