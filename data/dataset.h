// A directory of shards as one stream of tokens: the shards one after another in the order of
// shards.json, their documents joined by what ends them.
//
// A dataset is used by one thread at a time.
#ifndef DATA_DATASET_H
#define DATA_DATASET_H

#include <stdbool.h>
#include <stdint.h>
#include "base/status.h"
#include "data/loader.h"
#include "data/shard.h"

typedef struct Dataset Dataset;

typedef struct DatasetOptions {
    int vocab_size;           // of the model; shards with a larger vocabulary are refused. 0: any
    const char *tokenizer_id; // expected, "" for any
    bool skip_bad_shards;     // leave out shards that fail verification, with a warning
} DatasetOptions;

// Reads shards.json, verifies the shards (data/verify.h) and lays them out as a stream.
Status dataset_open(const char *directory, const DatasetOptions *options, Dataset **out) NODISCARD;
void dataset_close(Dataset *dataset);

uint64_t dataset_tokens(const Dataset *dataset);
int dataset_skipped_shards(const Dataset *dataset);
// Of shards.json; counts include skipped shards.
const DatasetSummary *dataset_info(const Dataset *dataset);
// Text that names the content: identity of the tokenizer and the hash, tokens and documents of each
// shard in use. Appends it to a hash.
void dataset_hash(const Dataset *dataset, HashStream *stream);

// ids[0..count) = tokens first.. of the stream, all below the vocabulary size.
Status dataset_read(Dataset *dataset, uint64_t first, uint64_t count, int32_t *ids) NODISCARD;
// is_start[i] = token first + i is the first of a document.
Status dataset_document_starts(Dataset *dataset, uint64_t first, uint64_t count,
                               bool *is_start) NODISCARD;

#endif
