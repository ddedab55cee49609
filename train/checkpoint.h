// Checkpoints: complete or invisible, verified on load, written while training goes on
// (METHOD.md §8). Layout of checkpoints/step_00001000/:
//   model.safetensors                  weights under HF names, bf16 or fp32
//   config.json                        beside them, so that the directory loads as a HF model; left
//                                      out when config.json cannot express the router
//   optimizer-RRRRR-of-WWWWW.safetensors   master, m, v of rank R of W, fp32 (checkpoint_slices.h)
//   state.json                         everything else that decides the next step
//   manifest.json                      written last: bytes and XXH3-128 of every file
//
// A checkpoint is written as step_00001000.tmp-PID, every file and the directory synced, then
// renamed and the parent synced. Deleting removes the manifest first. So at each instant every
// step_* directory with a manifest is complete, and only damage to the disk makes one fail
// verification.
//
// Several ranks write into one directory of a file system that they share: each its optimizer file,
// rank 0 also the rest. When all have said that their files are synced, and with which hashes, rank
// 0 writes the manifest and renames (checkpoint_publish); when one has failed, it removes what
// there is (checkpoint_discard). What they tell each other is the caller's business
// (train/run_save.c).
#ifndef TRAIN_CHECKPOINT_H
#define TRAIN_CHECKPOINT_H

#include <stdbool.h>
#include <stdint.h>
#include "base/file.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/memory_plan.h"
#include "base/status.h"
#include "model/model.h"
#include "optim/optimizer.h"

typedef struct CheckpointOptions {
    const char *directory; // <run>/checkpoints; must outlive the writer
    int64_t keep_last;     // newest checkpoints kept, >= 1
    int64_t keep_every;    // also kept: steps that are multiples of this; 0 = none
    DType dtype;           // of model.safetensors
    int rank, world;       // that write together; world 0 counts as 1
    long tag;              // in the names of unfinished saves, the same on all ranks: rank 0's pid
} CheckpointOptions;

// --- checkpoint_writer.c -------------------------------------------------------------------------

// The background writer: takes a snapshot into host memory reserved once, then writes on a thread.
typedef struct CheckpointWriter CheckpointWriter;

// The snapshot of one rank. state_dtype is the optimizer's, compute_dtype the backend's; of the
// options rank and world count, and the table is padded for as many. `whole` is the same table, or
// that of the whole model where a rank has only some of the experts.
Status checkpoint_plan(const TensorTable *table, const TensorTable *whole, DType state_dtype,
                       DType compute_dtype, const CheckpointOptions *options,
                       MemoryPlan *plan) NODISCARD;
Status checkpoint_writer_create(Model *model, Optimizer *optimizer,
                                const CheckpointOptions *options, CheckpointWriter **out) NODISCARD;
// Copies weights, m, v and `state` (borrowed, copied) of this rank. An earlier save must have been
// collected with checkpoint_wait.
Status checkpoint_begin(CheckpointWriter *writer, int64_t step, const json_t *state) NODISCARD;
// When every rank has begun: starts the thread and returns. Where ranks share out experts they send
// the first what it has not got, so that all start or none. With one rank the thread goes on to
// publish.
Status checkpoint_start(CheckpointWriter *writer) NODISCARD;
// True while a save is being written: checkpoint_wait would block.
bool checkpoint_busy(CheckpointWriter *writer);
// Waits for the save in flight and returns how it ended; STATUS_OK when there is none.
Status checkpoint_wait(CheckpointWriter *writer) NODISCARD;
// What a rank's optimizer file turned out to be, once checkpoint_wait has returned STATUS_OK.
FileHash checkpoint_part(const CheckpointWriter *writer);
// Rank 0, when every rank has written: starts the thread that makes the checkpoint visible and
// deletes old ones; checkpoint_wait says how it went. `parts` is (world), copied.
Status checkpoint_publish(CheckpointWriter *writer, const FileHash *parts) NODISCARD;
// Rank 0, when some rank has not: removes what all ranks have written. Only while none writes.
void checkpoint_discard(CheckpointWriter *writer);
void checkpoint_writer_destroy(CheckpointWriter *writer); // waits; NULL is fine

// --- checkpoint_directory.c ----------------------------------------------------------------------

// Finds the newest checkpoint that verifies; broken ones are named in a warning and skipped.
// *step = -1 when there is none at all. When there are some and all are broken this fails: starting
// again from nothing must be somebody's decision.
Status checkpoint_find(const char *directory, int64_t *step, char path[IO_PATH_MAX]) NODISCARD;
// Removes what killed saves left behind (step_*.tmp-*). Only under the run directory's lock.
Status checkpoint_clean(const char *directory) NODISCARD;
// Moves checkpoints of steps above `step` into the directory `to` (made when needed), so that a run
// that starts from an earlier point neither resumes from nor counts the abandoned ones.
// *moved = how many.
Status checkpoint_set_aside(const char *directory, int64_t step, const char *to,
                            int *moved) NODISCARD;
// Refuses (STATUS_CANNOT_WRITE) when the file system cannot take what a run of at most `saves` more
// checkpoints will hold at once: keep_last + 1 of them, less those that are there already.
Status checkpoint_check_space(const CheckpointOptions *options, const TensorTable *table,
                              int64_t saves) NODISCARD;
// Deletes what keep_last and keep_every do not cover, after `step` was saved. Checkpoints above
// `step` are neither counted nor touched.
Status checkpoint_retain(const CheckpointOptions *options, int64_t step) NODISCARD;
Status checkpoint_remove(const char *path) NODISCARD; // the manifest first
Status checkpoint_path(const char *directory, int64_t step, char out[IO_PATH_MAX]) NODISCARD;
// The step in a checkpoint's directory name; -1 when the name is none.
int64_t checkpoint_step_of(const char *path);

// --- checkpoint.c --------------------------------------------------------------------------------

// Every file of the manifest is there with its size and hash; nothing that is needed is missing.
Status checkpoint_verify(const char *path) NODISCARD;
Status checkpoint_read_state(const char *path, json_t **state) NODISCARD;
// Loads weights, m and v by tensor name, from the files of any number of ranks; weights only when
// `optimizer` is NULL. Does not hash again: call checkpoint_find or checkpoint_verify before.
Status checkpoint_load(const char *path, Model *model, Optimizer *optimizer) NODISCARD;

#endif
