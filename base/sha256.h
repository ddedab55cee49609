// SHA-256 (FIPS 180-4), for identities that other tools can check with sha256sum. State files use
// the much faster XXH3 (base/hash.h).
#ifndef BASE_SHA256_H
#define BASE_SHA256_H

#include <stddef.h>
#include <stdint.h>
#include "base/status.h"

enum { SHA256_HEX_SIZE = 65 }; // 64 digits and NUL

typedef struct Sha256 {
    uint32_t state[8];
    uint64_t bytes;    // so far
    uint8_t block[64]; // the last bytes % 64 of them, not yet mixed in
} Sha256;

void sha256_begin(Sha256 *sha);
void sha256_update(Sha256 *sha, const void *data, size_t bytes);
// Finishes; `sha` must begin again before its next use.
void sha256_hex(Sha256 *sha, char hex[SHA256_HEX_SIZE]);

// Adds the bytes of a whole file.
Status sha256_update_file(Sha256 *sha, const char *path) NODISCARD;

#endif
