// XXH3-128, the hash of every state file (METHOD.md §7, §8), printed as 32 lower-case hex digits.
#ifndef BASE_HASH_H
#define BASE_HASH_H

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

// Hashes a whole file. `progress` (may be NULL) is called with the bytes done so far.
Status hash_file(const char *path, char hex[HASH_HEX_SIZE], uint64_t *bytes,
                 void (*progress)(void *context, uint64_t done), void *context) NODISCARD;

#endif
