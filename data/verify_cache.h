// Remembers which shard files were verified, so that a terabyte is not hashed at every start.
//
// An entry holds the file's hash, size, inode, modification time and change time. Copying, moving
// or touching a file, or restoring its modification time after an edit, changes one of them, and
// the file is verified again. A file changed within the last two seconds is not remembered, since
// it could change again within the resolution of the clock that stamps files.
//
// The cache is DIRECTORY/.verified.json or, where that cannot be written, a file in
// $XDG_CACHE_HOME/dense2moe (or ~/.cache/dense2moe). Losing it costs time, nothing else; a cache
// that cannot be read or written is no error.
#ifndef DATA_VERIFY_CACHE_H
#define DATA_VERIFY_CACHE_H

#include <stdbool.h>
#include <sys/stat.h>
#include "data/manifest.h"

typedef struct VerifyCache VerifyCache;

// NULL when memory is short: a cache that holds nothing.
VerifyCache *verify_cache_load(const char *directory);
bool verify_cache_holds(const VerifyCache *cache, const ManifestShard *shard,
                        const struct stat *file);
void verify_cache_add(VerifyCache *cache, const ManifestShard *shard, const struct stat *file);
// Writes it if anything was added.
void verify_cache_save(VerifyCache *cache);
void verify_cache_free(VerifyCache *cache);

#endif
