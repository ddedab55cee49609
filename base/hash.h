// XXH3-128, the hash of every state file (METHOD.md §7, §8), printed as 32 lower-case hex digits.
#ifndef BASE_HASH_H
#define BASE_HASH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "base/status.h"

enum { HASH_HEX_SIZE = 33 }; // 32 digits and NUL

typedef struct Hash128 {
    uint64_t high, low;
} Hash128;

Hash128 hash_bytes(const void *data, size_t bytes);
void hash_to_hex(Hash128 hash, char hex[HASH_HEX_SIZE]);

// Streaming form; hash_stream_free accepts NULL.
typedef struct HashStream HashStream;
Status hash_stream_create(HashStream **out) NODISCARD;
void hash_stream_update(HashStream *stream, const void *data, size_t bytes);
Hash128 hash_stream_digest(const HashStream *stream);
void hash_stream_free(HashStream *stream);

// What a file holds: the hash of all of it, and XXH3-64 of each of its blocks, which say where it
// has changed. Blocks are of the same size but the last.
enum { HASH_BLOCKS_MAX = 256, HASH_BLOCK_LEAST = 4096 };
typedef struct FileHash {
    uint64_t bytes;
    char hex[HASH_HEX_SIZE];
    uint64_t block_bytes; // 0: blocks are not known
    int num_blocks;
    uint64_t blocks[HASH_BLOCKS_MAX];
} FileHash;

// The size of a block of so many bytes: a multiple of HASH_BLOCK_LEAST.
uint64_t hash_block_bytes(uint64_t bytes);
// Before the first update: hashes blocks, too, of the `bytes` bytes that will come.
void hash_stream_blocks(HashStream *stream, uint64_t bytes);
// After the last one.
void hash_stream_finish(HashStream *stream, FileHash *out);
Status hash_content(const void *data, size_t bytes, FileHash *out) NODISCARD;
// Whether both know blocks of the same size and differ in one: the first is bytes [begin, end).
bool hash_first_difference(const FileHash *a, const FileHash *b, uint64_t *begin, uint64_t *end);

// Hashes a whole file. `progress` (may be NULL) is called with the bytes done so far.
Status hash_file(const char *path, char hex[HASH_HEX_SIZE], uint64_t *bytes,
                 void (*progress)(void *context, uint64_t done), void *context) NODISCARD;
// The same with blocks of the size that `like` has.
Status hash_file_like(const char *path, const FileHash *like, FileHash *out) NODISCARD;

#endif
