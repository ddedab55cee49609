// One token shard: an HDF5 file of exactly one profile (docs/formats.md, "Token shards").
//
// HDF5 is only used to find out where the two arrays lie, in a child process (data/sandbox.h) and
// after the file's hash was found right; everything else is plain reads at those offsets.
#ifndef DATA_SHARD_H
#define DATA_SHARD_H

#include <stdint.h>
#include "base/status.h"
#include "data/sandbox.h"

enum { SHARD_VERSION = 1, SHARD_ID_SIZE = 65, SHARD_SOURCE_SIZE = 256 };

// What the structure of a shard says. Plain data: it crosses a pipe.
typedef struct ShardLayout {
    uint64_t file_bytes;
    uint64_t tokens_offset, num_tokens; // num_tokens >= 1
    int token_bytes;                    // 2 or 4, little endian, unsigned
    uint64_t documents_offset, num_documents;
    int64_t vocab_size;               // ids are below
    int64_t eos_id;                   // -1: documents have no end token
    char tokenizer_id[SHARD_ID_SIZE]; // SHA-256 hex; all zeros: unknown
    char source[SHARD_SOURCE_SIZE];   // free text
} ShardLayout;

// Reads the structure with HDF5, in this process: for data/sandbox.h. Refuses every other profile
// with what was found. The arrays lie inside the file.
Status shard_read_structure(const char *path, ShardLayout *out) NODISCARD;

// The same in a child process, for `count` files. Per file a verdict and a layout.
Status shard_parse(const char *const *paths, int count, ShardLayout *layouts,
                   SandboxVerdict *verdicts) NODISCARD;

// Reads all ids and document offsets once: ids below vocab_size, offsets rising from 0 to
// num_tokens.
Status shard_scan(const char *path, const ShardLayout *layout) NODISCARD;

// ids[0..count) = tokens first.. of the shard. Ids at or above vocab_size are refused, so that no
// caller meets one even if the file changed after it was verified.
Status shard_read_tokens(int fd, const char *path, const ShardLayout *layout, uint64_t first,
                         uint64_t count, int32_t *ids) NODISCARD;
// offsets[0..count) = document offsets first.. ; there are num_documents + 1.
Status shard_read_documents(int fd, const char *path, const ShardLayout *layout, uint64_t first,
                            uint64_t count, uint64_t *offsets) NODISCARD;
// The document that holds `token`: offsets[*document] <= token < offsets[*document + 1].
Status shard_find_document(int fd, const char *path, const ShardLayout *layout, uint64_t token,
                           uint64_t *document) NODISCARD;

#endif
