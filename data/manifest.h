// shards.json: the list of a directory's shards, written last and therefore the sign that they are
// complete (docs/formats.md, "shards.json").
#ifndef DATA_MANIFEST_H
#define DATA_MANIFEST_H

#include <stddef.h>
#include <stdint.h>
#include "base/hash.h"
#include "base/status.h"
#include "data/loader.h"

enum { MANIFEST_NAME_SIZE = 256 };

typedef struct ManifestShard {
    char name[MANIFEST_NAME_SIZE]; // in the directory; no '/'
    char hash[HASH_HEX_SIZE];      // XXH3-128 of the whole file
    uint64_t bytes, tokens, documents;
} ManifestShard;

typedef struct DataManifest {
    DatasetSummary summary;
    ManifestShard *shards; // summary.num_shards of them, in stream order
} DataManifest;

// Reads DIRECTORY/shards.json. A missing directory or file is STATUS_MISSING_INPUT.
Status data_manifest_read(const char *directory, DataManifest *out) NODISCARD;
// The same of text; `name` is used in messages.
Status data_manifest_parse(const char *text, size_t bytes, const char *name,
                           DataManifest *out) NODISCARD;
void data_manifest_free(DataManifest *manifest);

#endif
