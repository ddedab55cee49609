// XXH3-128 in the byte order of xxhsum -H2: the high half first, so that users can check our
// manifests with the tool they have.
#include "base/hash.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>
#include "base/file.h"

enum { CHUNK_BYTES = 1 << 20 };

struct HashStream {
    XXH3_state_t *state, *block; // of everything, of the block at hand
    uint64_t in_block;           // bytes of it
    FileHash file;               // of the bytes so far: blocks that are complete
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
    if (stream) stream->block = XXH3_createState();
    if (!stream || !stream->state || !stream->block ||
        XXH3_128bits_reset(stream->state) == XXH_ERROR ||
        XXH3_64bits_reset(stream->block) == XXH_ERROR) {
        hash_stream_free(stream);
        FAIL(STATUS_INTERNAL, "out of memory for a hash state");
    }
    *out = stream;
    return STATUS_OK;
}

static void end_block(HashStream *stream) {
    FileHash *file = &stream->file;
    if (file->num_blocks < HASH_BLOCKS_MAX) // else more has come than was announced
        file->blocks[file->num_blocks++] = XXH3_64bits_digest(stream->block);
    (void)XXH3_64bits_reset(stream->block);
    stream->in_block = 0;
}

void hash_stream_update(HashStream *stream, const void *data, size_t bytes) {
    // Its only failure is a null pointer with a length, which no caller has.
    (void)XXH3_128bits_update(stream->state, data, bytes);
    stream->file.bytes += bytes;
    const uint64_t block_bytes = stream->file.block_bytes;
    for (const char *next = data; block_bytes > 0 && bytes > 0;) {
        const uint64_t room = block_bytes - stream->in_block;
        const size_t some = bytes < room ? bytes : (size_t)room;
        (void)XXH3_64bits_update(stream->block, next, some);
        stream->in_block += some;
        next += some;
        bytes -= some;
        if (stream->in_block == block_bytes) end_block(stream);
    }
}

Hash128 hash_stream_digest(const HashStream *stream) {
    return from_library(XXH3_128bits_digest(stream->state));
}

void hash_stream_free(HashStream *stream) {
    if (!stream) return;
    XXH3_freeState(stream->state);
    XXH3_freeState(stream->block);
    free(stream);
}

uint64_t hash_block_bytes(uint64_t bytes) {
    const uint64_t pieces = (uint64_t)HASH_BLOCKS_MAX * HASH_BLOCK_LEAST;
    const uint64_t multiple = bytes / pieces + (bytes % pieces > 0);
    return multiple > 0 ? multiple * HASH_BLOCK_LEAST : HASH_BLOCK_LEAST;
}

void hash_stream_blocks(HashStream *stream, uint64_t bytes) {
    stream->file.block_bytes = hash_block_bytes(bytes);
}

void hash_stream_finish(HashStream *stream, FileHash *out) {
    if (stream->in_block > 0) end_block(stream);
    FileHash *file = &stream->file;
    const bool covered = file->bytes <= file->block_bytes * (uint64_t)file->num_blocks;
    if (!covered) { // more has come than was announced
        file->num_blocks = 0;
        file->block_bytes = 0;
    }
    hash_to_hex(hash_stream_digest(stream), stream->file.hex);
    *out = stream->file;
}

Status hash_content(const void *data, size_t bytes, FileHash *out) {
    HashStream *stream;
    TRY(hash_stream_create(&stream));
    hash_stream_blocks(stream, bytes);
    hash_stream_update(stream, data, bytes);
    hash_stream_finish(stream, out);
    hash_stream_free(stream);
    return STATUS_OK;
}

bool hash_first_difference(const FileHash *a, const FileHash *b, uint64_t *begin, uint64_t *end) {
    if (a->block_bytes != b->block_bytes || a->num_blocks != b->num_blocks) return false;
    for (int i = 0; i < a->num_blocks; i++) {
        if (a->blocks[i] == b->blocks[i]) continue;
        const uint64_t last = a->bytes < b->bytes ? a->bytes : b->bytes;
        *begin = (uint64_t)i * a->block_bytes;
        *end = last - *begin < a->block_bytes ? last : *begin + a->block_bytes;
        return true;
    }
    return false;
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

static Status hash_path(const char *path, uint64_t block_bytes, FileHash *out,
                        void (*progress)(void *, uint64_t), void *context) {
    Status status = STATUS_OK;
    uint64_t bytes;
    HashStream *stream = NULL;
    void *chunk = NULL;
    int fd = -1;
    TRY_GOTO(io_file_size(path, &bytes), done);
    TRY_GOTO(io_open(path, O_RDONLY, &fd), done);
    TRY_GOTO(hash_stream_create(&stream), done);
    chunk = malloc(CHUNK_BYTES);
    if (!chunk) FAIL_GOTO(done, STATUS_INTERNAL, "out of memory hashing %s", path);
    stream->file.block_bytes = block_bytes;
    TRY_GOTO(hash_descriptor(fd, path, stream, chunk, bytes, progress, context), done);
    hash_stream_finish(stream, out);
done:
    free(chunk);
    hash_stream_free(stream);
    if (fd >= 0) {
        Status closed = io_close(fd, path); // a failed close after reading loses nothing
        if (status == STATUS_OK) status = closed;
    }
    return status;
}

Status hash_file(const char *path, char hex[HASH_HEX_SIZE], uint64_t *bytes,
                 void (*progress)(void *context, uint64_t done), void *context) {
    FileHash hash;
    TRY(hash_path(path, 0, &hash, progress, context));
    memcpy(hex, hash.hex, sizeof hash.hex);
    *bytes = hash.bytes;
    return STATUS_OK;
}

Status hash_file_like(const char *path, const FileHash *like, FileHash *out) {
    return hash_path(path, like->block_bytes, out, NULL, NULL);
}
