// SHA-256 as FIPS 180-4 describes it (section numbers in the comments are that document's). Small
// rather than fast: it only sees tokenizer files, a few megabytes once per run.
#include "base/sha256.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/file.h"

enum { BLOCK_BYTES = 64, LENGTH_BYTES = 8, CHUNK_BYTES = 1 << 16 };

// §4.2.2: the first 32 bits of the fractional parts of the cube roots of the first 64 primes.
static const uint32_t round_constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static inline uint32_t rotate(uint32_t x, int right) {
    return x >> right | x << (32 - right);
}

static inline uint32_t load_big_endian(const uint8_t *bytes) {
    return (uint32_t)bytes[0] << 24 | (uint32_t)bytes[1] << 16 | (uint32_t)bytes[2] << 8 | bytes[3];
}

// §6.2.2: one block of 64 bytes into the state.
static void mix(uint32_t state[8], const uint8_t *block) {
    uint32_t w[64]; // the message schedule
    for (int t = 0; t < 16; t++) w[t] = load_big_endian(block + 4 * t);
    for (int t = 16; t < 64; t++) {
        uint32_t x = w[t - 15], y = w[t - 2];
        uint32_t s0 = rotate(x, 7) ^ rotate(x, 18) ^ x >> 3;
        uint32_t s1 = rotate(y, 17) ^ rotate(y, 19) ^ y >> 10;
        w[t] = s1 + w[t - 7] + s0 + w[t - 16];
    }

    uint32_t v[8]; // a..h of the standard
    memcpy(v, state, sizeof v);
    for (int t = 0; t < 64; t++) {
        uint32_t a = v[0], e = v[4];
        uint32_t sum1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
        uint32_t choice = (e & v[5]) ^ (~e & v[6]);
        uint32_t t1 = v[7] + sum1 + choice + round_constants[t] + w[t];
        uint32_t sum0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22);
        uint32_t majority = (a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]);
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += t1;
        v[0] = t1 + sum0 + majority;
    }
    for (int i = 0; i < 8; i++) state[i] += v[i];
}

void sha256_begin(Sha256 *sha) {
    // §5.3.3: square roots of the first 8 primes.
    static const uint32_t initial[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                        0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memcpy(sha->state, initial, sizeof initial);
    sha->bytes = 0;
}

void sha256_update(Sha256 *sha, const void *data, size_t bytes) {
    const uint8_t *in = data;
    while (bytes > 0) {
        size_t used = sha->bytes % BLOCK_BYTES;
        size_t count = bytes < BLOCK_BYTES - used ? bytes : BLOCK_BYTES - used;
        memcpy(sha->block + used, in, count);
        sha->bytes += count;
        if (used + count == BLOCK_BYTES) mix(sha->state, sha->block);
        in += count;
        bytes -= count;
    }
}

void sha256_hex(Sha256 *sha, char hex[SHA256_HEX_SIZE]) {
    // §5.1.1: a one bit, zeros up to the last 8 bytes of a block, the length in bits.
    static const uint8_t padding[BLOCK_BYTES] = {0x80};
    uint64_t bits = sha->bytes * 8;
    size_t used = sha->bytes % BLOCK_BYTES, room = BLOCK_BYTES - LENGTH_BYTES;
    sha256_update(sha, padding, used < room ? room - used : room + BLOCK_BYTES - used);
    uint8_t length[LENGTH_BYTES];
    for (int i = 0; i < LENGTH_BYTES; i++) length[i] = (uint8_t)(bits >> (56 - 8 * i));
    sha256_update(sha, length, sizeof length);
    for (int i = 0; i < 8; i++) snprintf(hex + 8 * i, 9, "%08x", (unsigned)sha->state[i]);
}

static Status update_descriptor(Sha256 *sha, int fd, const char *path, uint64_t bytes) {
    uint8_t chunk[CHUNK_BYTES];
    for (uint64_t done = 0; done < bytes;) {
        size_t count = bytes - done < sizeof chunk ? (size_t)(bytes - done) : sizeof chunk;
        TRY(io_pread(fd, path, chunk, count, done));
        sha256_update(sha, chunk, count);
        done += count;
    }
    return STATUS_OK;
}

Status sha256_update_file(Sha256 *sha, const char *path) {
    uint64_t bytes;
    int fd;
    TRY(io_file_size(path, &bytes));
    TRY(io_open(path, O_RDONLY, &fd));
    Status status = update_descriptor(sha, fd, path, bytes);
    Status closed = io_close(fd, path);
    TRY(status != STATUS_OK ? status : closed);
    return STATUS_OK;
}
