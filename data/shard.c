// Plain reads of a shard whose structure is known (data/shard_hdf5.c).
//
// Tokens are read with pread, not mapped: a file that is cut off while mapped ends the program with
// SIGBUS, and pread from the page cache is just as fast.
#include "data/shard.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "base/file.h"

enum { SCAN_BLOCK = 1 << 18 /* elements */, SEARCH_BLOCK = 512 /* document offsets, 4 KB */ };
enum { WIDEN_BLOCK = 1024 };

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "shards are little endian and read without conversion"
#endif

// --- Tokens --------------------------------------------------------------------------------------

static Status refuse_id(const char *path, const ShardLayout *layout, uint64_t first, uint64_t count,
                        const int32_t *ids) {
    uint64_t i = 0;
    while (i + 1 < count && (uint32_t)ids[i] < (uint64_t)layout->vocab_size) i++;
    FAIL(STATUS_BAD_DATA,
         "%s: token %" PRIu64 " is id %" PRIu32 ", expected below its vocabulary of %" PRId64, path,
         first + i, (uint32_t)ids[i], layout->vocab_size);
}

static uint32_t largest_id(const int32_t *ids, uint64_t count) {
    uint32_t largest = 0;
    for (uint64_t i = 0; i < count; i++)
        largest = (uint32_t)ids[i] > largest ? (uint32_t)ids[i] : largest;
    return largest;
}

// 16-bit ids at raw to 32 bits at ids, which raw may overlap as below; the largest of them. Goes
// through a block of its own, which overlaps nothing, so that the compiler vectorizes it.
static uint32_t widen_ids(const char *raw, uint64_t count, int32_t *ids) {
    uint16_t block[WIDEN_BLOCK];
    uint16_t largest = 0;
    for (uint64_t first = 0; first < count; first += WIDEN_BLOCK) {
        uint64_t n = count - first < WIDEN_BLOCK ? count - first : WIDEN_BLOCK;
        memcpy(block, raw + first * sizeof *block, n * sizeof *block);
        for (uint64_t i = 0; i < n; i++) {
            ids[first + i] = block[i];
            largest = block[i] > largest ? block[i] : largest;
        }
    }
    return largest;
}

Status shard_read_tokens(int fd, const char *path, const ShardLayout *layout, uint64_t first,
                         uint64_t count, int32_t *ids) {
    INVARIANT(first <= layout->num_tokens && count <= layout->num_tokens - first);
    uint64_t width = (uint64_t)layout->token_bytes;
    // Narrow ids are read into the upper half of the array and widened from its start on: the write
    // position never overtakes the read position.
    char *raw = (char *)ids + count * (sizeof *ids - width);
    TRY(io_pread(fd, path, raw, count * width, layout->tokens_offset + first * width));
    uint32_t largest =
        width == sizeof(uint16_t) ? widen_ids(raw, count, ids) : largest_id(ids, count);
    if (largest >= (uint64_t)layout->vocab_size) return refuse_id(path, layout, first, count, ids);
    return STATUS_OK;
}

// --- Documents -----------------------------------------------------------------------------------

Status shard_read_documents(int fd, const char *path, const ShardLayout *layout, uint64_t first,
                            uint64_t count, uint64_t *offsets) {
    uint64_t total = layout->num_documents + 1;
    INVARIANT(first <= total && count <= total - first);
    return io_pread(fd, path, offsets, count * sizeof *offsets,
                    layout->documents_offset + first * sizeof *offsets);
}

Status shard_find_document(int fd, const char *path, const ShardLayout *layout, uint64_t token,
                           uint64_t *document) {
    // Invariant: offsets[low] <= token < offsets[high]. Nothing is kept in memory: the blocks that
    // the upper steps touch are the same for every search, so they stay in the page cache.
    uint64_t low = 0, high = layout->num_documents, block[SEARCH_BLOCK];
    while (high - low > SEARCH_BLOCK) {
        uint64_t middle = low + (high - low) / 2, offset;
        TRY(shard_read_documents(fd, path, layout, middle, 1, &offset));
        if (offset <= token) {
            low = middle;
        } else {
            high = middle;
        }
    }
    TRY(shard_read_documents(fd, path, layout, low, high - low, block));
    uint64_t i = 0;
    while (i + 1 < high - low && block[i + 1] <= token) i++;
    *document = low + i;
    return STATUS_OK;
}

// --- The scan ------------------------------------------------------------------------------------

static Status scan_tokens(int fd, const char *path, const ShardLayout *layout, int32_t *block) {
    for (uint64_t first = 0; first < layout->num_tokens; first += SCAN_BLOCK) {
        uint64_t left = layout->num_tokens - first;
        TRY(shard_read_tokens(fd, path, layout, first, left < SCAN_BLOCK ? left : SCAN_BLOCK,
                              block));
    }
    return STATUS_OK;
}

static Status scan_documents(int fd, const char *path, const ShardLayout *layout, uint64_t *block) {
    uint64_t total = layout->num_documents + 1, previous = 0;
    for (uint64_t first = 0; first < total; first += SCAN_BLOCK) {
        uint64_t count = total - first < SCAN_BLOCK ? total - first : SCAN_BLOCK;
        TRY(shard_read_documents(fd, path, layout, first, count, block));
        for (uint64_t i = 0; i < count; i++) {
            bool is_first = first + i == 0;
            if (is_first ? block[i] != 0 : block[i] <= previous) {
                FAIL(STATUS_BAD_DATA,
                     "%s: doc_offsets[%" PRIu64 "] is %" PRIu64 ", expected %s%" PRIu64, path,
                     first + i, block[i], is_first ? "" : "more than ", previous);
            }
            previous = block[i];
        }
    }
    if (previous != layout->num_tokens) {
        FAIL(STATUS_BAD_DATA,
             "%s: doc_offsets ends with %" PRIu64 ", expected the number of tokens, %" PRIu64, path,
             previous, layout->num_tokens);
    }
    return STATUS_OK;
}

Status shard_scan(const char *path, const ShardLayout *layout) {
    Status status = STATUS_OK;
    void *block = NULL;
    int fd;
    TRY(io_open(path, O_RDONLY, &fd));
    block = malloc(SCAN_BLOCK * sizeof(uint64_t));
    if (!block) FAIL_GOTO(done, STATUS_INTERNAL, "out of memory checking %s", path);
    TRY_GOTO(scan_tokens(fd, path, layout, block), done);
    TRY_GOTO(scan_documents(fd, path, layout, block), done);
done:
    free(block);
    close(fd); // read only: a failing close loses nothing
    return status;
}
