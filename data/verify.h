// Is every shard of a directory what shards.json says? Answered once per file, then remembered.
#ifndef DATA_VERIFY_H
#define DATA_VERIFY_H

#include <stdbool.h>
#include "base/status.h"
#include "data/manifest.h"
#include "data/shard.h"

typedef struct VerifyOptions {
    bool ignore_cache;  // read everything again (what was found is remembered all the same)
    bool stop_at_first; // leave the shards behind the first bad one unchecked
} VerifyOptions;

// What was found about one shard.
typedef struct ShardFinding {
    Status code; // STATUS_OK, or why the shard is refused, with `message`
    bool from_cache;
    ShardLayout layout; // valid when code is STATUS_OK
    char message[SANDBOX_TEXT_MAX];
} ShardFinding;

// Size, XXH3-128, structure, agreement with the manifest, ids below the vocabulary and document
// offsets of every shard. findings has summary.num_shards elements. Fails only for reasons that are
// not a shard's; a refused shard is a finding. Starts child processes (data/sandbox.h).
Status verify_shards(const char *directory, const DataManifest *manifest,
                     const VerifyOptions *options, ShardFinding *findings) NODISCARD;

#endif
