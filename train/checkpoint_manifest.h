// manifest.json: what a checkpoint consists of. Its presence makes a directory a checkpoint.
//   {"format": "dense2moe-checkpoint", "version": 1, "step": 1000,
//    "files": [{"name": "model.safetensors", "bytes": 123, "xxh3_128": "<32 hex digits>",
//               "block_bytes": 4096, "xxh3_64": "<16 hex digits of each block>"}, ...]}
// The last two are not there in manifests of earlier programs.
#ifndef TRAIN_CHECKPOINT_MANIFEST_H
#define TRAIN_CHECKPOINT_MANIFEST_H

#include <stdbool.h>
#include <stdint.h>
#include "base/hash.h"
#include "base/json.h"
#include "base/status.h"

#define MANIFEST_NAME "manifest.json"
enum { MANIFEST_FILE_NAME_MAX = 64 };

typedef struct ManifestFile {
    char name[MANIFEST_FILE_NAME_MAX];
    FileHash hash;
} ManifestFile;

typedef struct Manifest {
    int64_t step;
    ManifestFile *files;
    int count;
} Manifest;

Status manifest_add(Manifest *manifest, const char *name, const FileHash *hash) NODISCARD;
Status manifest_write(const Manifest *manifest, const char *directory) NODISCARD;
// Names are plain file names, given once, and cover model, state and all optimizer files of one
// number of ranks. `name` is for messages. The fuzz target's entry.
Status manifest_from_json(const json_t *root, const char *name, Manifest *out) NODISCARD;
Status manifest_read(const char *directory, Manifest *out) NODISCARD;
// Whether there is one of a later version of the format than this program knows. Leaves this
// thread's record of a failure alone.
bool manifest_is_newer(const char *directory);
void manifest_free(Manifest *manifest);

#endif
