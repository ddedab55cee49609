// Checkpoints: complete or invisible, verified on load, written while training goes on
// (METHOD.md §8). Layout of checkpoints/step_00001000/:
//   model.safetensors                  weights under HF names, bf16 or fp32
//   optimizer-00000-of-00001.safetensors   master, m, v: "<tensor>.master", ".m", ".v", fp32
//   state.json                         everything else that decides the next step
//   manifest.json                      written last: bytes and XXH3-128 of every file
#ifndef TRAIN_CHECKPOINT_H
#define TRAIN_CHECKPOINT_H

#include <stdbool.h>
#include <stdint.h>
#include "base/json.h"
#include "base/memory_plan.h"
#include "base/status.h"
#include "model/model.h"
#include "optim/optimizer.h"

// The background writer: takes a snapshot into host memory reserved once, then writes on a thread.
typedef struct CheckpointWriter CheckpointWriter;

typedef struct CheckpointOptions {
    const char *directory; // <run>/checkpoints
    int64_t keep_last, keep_every;
    DType dtype; // of model.safetensors
} CheckpointOptions;

Status checkpoint_plan(const TensorTable *table, MemoryPlan *plan) NODISCARD;
Status checkpoint_writer_create(Model *model, Optimizer *optimizer,
                                const CheckpointOptions *options, CheckpointWriter **out) NODISCARD;
// Copies weights, m, v and `state` (borrowed, copied) and returns; waits first for a save that is
// still being written. An earlier save's failure is reported here, once, through *previous.
Status checkpoint_begin(CheckpointWriter *writer, int64_t step, const json_t *state,
                        Status *previous) NODISCARD;
// Waits for the save in flight and returns how it ended.
Status checkpoint_wait(CheckpointWriter *writer) NODISCARD;
void checkpoint_writer_destroy(CheckpointWriter *writer);

// Finds the newest checkpoint that verifies; broken ones are named in a warning and skipped.
// *step = -1 when there is none.
Status checkpoint_find(const char *directory, int64_t *step, char path[IO_PATH_MAX]) NODISCARD;
Status checkpoint_verify(const char *path) NODISCARD;
Status checkpoint_read_state(const char *path, json_t **state) NODISCARD;
// Loads weights, m and v by tensor name.
Status checkpoint_load(const char *path, Model *model, Optimizer *optimizer) NODISCARD;

#endif
