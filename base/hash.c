// XXH3-128 in the byte order of xxhsum -H2: the high half first, so that users can check our
// manifests with the tool they have.
#include "base/hash.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <xxhash.h>
#include "base/file.h"

enum { CHUNK_BYTES = 1 << 20 };

struct HashStream {
    XXH3_state_t *state;
};

static Hash128 from_library(XXH128_hash_t hash) {
    return (Hash128){.high = hash.high64, .low = hash.low64};
}

Hash128 hash_bytes(const void *data, size_t bytes) {
    return from_library(XXH3_128bits(data, bytes));
}

void hash_to_hex(Hash128 hash, char hex[HASH_HEX_SIZE]) {
    snprintf(hex, HASH_HEX_SIZE, "%016" PRIx64 "%016" PRIx64, hash.high, hash.low);
}

Status hash_stream_create(HashStream **out) {
    HashStream *stream = calloc(1, sizeof *stream);
    if (stream) stream->state = XXH3_createState();
    if (!stream || !stream->state || XXH3_128bits_reset(stream->state) == XXH_ERROR) {
        hash_stream_free(stream);
        FAIL(STATUS_INTERNAL, "out of memory for a hash state");
    }
    *out = stream;
    return STATUS_OK;
}

void hash_stream_update(HashStream *stream, const void *data, size_t bytes) {
    // Its only failure is a null pointer with a length, which no caller has.
    (void)XXH3_128bits_update(stream->state, data, bytes);
}

Hash128 hash_stream_digest(const HashStream *stream) {
    return from_library(XXH3_128bits_digest(stream->state));
}

void hash_stream_free(HashStream *stream) {
    if (!stream) return;
    XXH3_freeState(stream->state);
    free(stream);
}

static Status hash_descriptor(int fd, const char *path, HashStream *stream, void *chunk,
                              uint64_t bytes, void (*progress)(void *, uint64_t), void *context) {
    for (uint64_t done = 0; done < bytes;) {
        size_t count = bytes - done < CHUNK_BYTES ? (size_t)(bytes - done) : CHUNK_BYTES;
        TRY(io_pread(fd, path, chunk, count, done));
        hash_stream_update(stream, chunk, count);
        done += count;
        if (progress) progress(context, done);
    }
    return STATUS_OK;
}

Status hash_file(const char *path, char hex[HASH_HEX_SIZE], uint64_t *bytes,
                 void (*progress)(void *context, uint64_t done), void *context) {
    Status status = STATUS_OK;
    HashStream *stream = NULL;
    void *chunk = NULL;
    int fd = -1;
    TRY_GOTO(io_file_size(path, bytes), done);
    TRY_GOTO(io_open(path, O_RDONLY, &fd), done);
    TRY_GOTO(hash_stream_create(&stream), done);
    chunk = malloc(CHUNK_BYTES);
    if (!chunk) FAIL_GOTO(done, STATUS_INTERNAL, "out of memory hashing %s", path);
    TRY_GOTO(hash_descriptor(fd, path, stream, chunk, *bytes, progress, context), done);
    hash_to_hex(hash_stream_digest(stream), hex);
done:
    free(chunk);
    hash_stream_free(stream);
    if (fd >= 0) {
        Status closed = io_close(fd, path); // a failed close after reading loses nothing
        if (status == STATUS_OK) status = closed;
    }
    return status;
}
