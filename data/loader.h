// From shards to batches: a deterministic, O(1)-resumable order read ahead by a thread.
//
// Sample g (0, 1, 2, ...) of the run is a source, chosen by the deficit rule from the weights
// (data/mixture.h), and the next window of that source's permutation for its epoch (data/order.h).
// Step s takes the next global_batch samples and cuts them into micro-batches one after the other;
// rank r of W takes micro-batches [r*n, (r+1)*n), n the same on every rank. So a micro-batch holds
// the same samples on every world size, and what the ranks sum is what one rank would sum. The
// state is (seed, samples consumed per source), the same on every world size.
//
// A window is sequence_length + 1 consecutive tokens of the source's stream, windows follow each
// other at a distance of sequence_length. Where rank and micro-batch sizes do not divide the global
// batch, every rank still makes the same number of micro-batches of the same shape: rows without a
// sample, which are the last ranks', are filled up with rows whose targets are all -1.
#ifndef DATA_LOADER_H
#define DATA_LOADER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "base/batch.h"
#include "base/hash.h"
#include "base/memory_plan.h"
#include "base/status.h"

enum { LOADER_MAX_SOURCES = 32 };

typedef struct LoaderSource {
    const char *directory; // holds shards.json
    double weight;         // relative; > 0
} LoaderSource;

typedef struct LoaderConfig {
    LoaderSource sources[LOADER_MAX_SOURCES];
    int num_sources;
    int64_t sequence_length;
    int64_t micro_batch;  // sequences per micro-batch on this rank
    int64_t global_batch; // sequences per step over all ranks
    int rank, world;
    uint64_t seed;
    bool mask_documents;
    bool skip_bad_shards; // a shard that fails verification at open is left out (counted, warned
                          // about), else an error. One that fails later always ends the run
    int prefetch_steps;   // how many steps are read ahead (>= 1)
    int vocab_size;       // shards with a larger vocabulary are refused; 0 accepts any
    const char *tokenizer_id; // expected tokenizer_sha256, or "" to accept any
} LoaderConfig;

typedef struct LoaderState {
    uint64_t seed;
    int num_sources;
    uint64_t consumed[LOADER_MAX_SOURCES]; // samples taken from each source so far
} LoaderState;

typedef struct StepBatch {
    int num_micro;
    const MicroBatch *micro;
    int64_t valid_targets; // over the micro-batches of all ranks
    double wait_seconds;   // how long loader_next waited for the thread
    LoaderState after;     // the state once this step is done: what a checkpoint stores
    uint64_t first_sample; // global index of the step's first sample, for messages
} StepBatch;

typedef struct Loader Loader;

// Micro-batches of a step on each rank; 0 where the configuration is no legal one.
int loader_micro_batches(const LoaderConfig *config);
Status loader_plan(const LoaderConfig *config, MemoryPlan *plan) NODISCARD;
// resume NULL = from the beginning. Verifies shards (cached) and reads their structure; the thread
// starts with the first loader_next(). Call it before large allocations: verification forks
// (data/sandbox.h). Texts that the configuration points to are not used after the call.
Status loader_open(const LoaderConfig *config, const LoaderState *resume, Loader **out) NODISCARD;
// The next step; valid until the next call. Epochs follow one another for ever.
Status loader_next(Loader *loader, const StepBatch **out) NODISCARD;
void loader_close(Loader *loader);

uint64_t loader_tokens(const Loader *loader, int source);  // tokens of a source
uint64_t loader_samples(const Loader *loader, int source); // windows per epoch
int loader_skipped_shards(const Loader *loader);           // left out at open, see skip_bad_shards
// Hash over the tokenizer's identity and the hashes and counts of the shards in use: a checkpoint
// stores it. Names and places of files are not part of it.
void loader_fingerprint(const Loader *loader, char hex[HASH_HEX_SIZE]);
// What the shards say about themselves; all sources must agree.
int loader_vocab_size(const Loader *loader);

// A fixed pass for evaluation and calibration: windows in file order (non-overlapping,
// sequence_length targets each), or `sequences` of them spread evenly over the data when > 0.
typedef struct FixedPass FixedPass;
Status fixed_pass_open(const LoaderConfig *config, int64_t sequences, FixedPass **out) NODISCARD;
// *more = false: the pass is over and *batch untouched. The last micro-batch is filled up with
// rows whose targets are all -1. Valid until the next call.
Status fixed_pass_next(FixedPass *pass, MicroBatch *batch, bool *more) NODISCARD;
void fixed_pass_rewind(FixedPass *pass);
void fixed_pass_close(FixedPass *pass);

// What a directory of shards says about itself, without reading tokens.
typedef struct DatasetSummary {
    uint64_t tokens, documents;
    int vocab_size, num_shards;
    int64_t eos_id;
    char tokenizer_id[65];
} DatasetSummary;
Status dataset_summary(const char *directory, DatasetSummary *out) NODISCARD;
// Whether shards of this identity go with a model of the other: equal, or one is unknown ("" or,
// in shards that were imported without a tokenizer, all zeros).
bool tokenizer_ids_agree(const char *shards_id, const char *model_id);

#endif
