// Shards in a row. Where a token of the stream lies is found by bisection over the shards' first
// tokens; a read that crosses a border is made of parts. What the bytes mean is data/shard.c's
// business, whether they can be trusted is data/verify.c's.
#include "data/dataset.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "base/file.h"
#include "base/log.h"
#include "data/verify.h"

// Files stay open in slots, a shard always in the same one: reads in random order over thousands of
// shards neither open a file each time nor exhaust the descriptors of the process.
enum { OPEN_SLOTS = 128, OFFSETS_BLOCK = 512 };

typedef struct Shard {
    char *path;
    ShardLayout layout;
    uint64_t first; // its first token's place in the stream
    char hash[HASH_HEX_SIZE];
} Shard;

struct Dataset {
    DatasetSummary summary;
    Shard *shards;
    int num_shards; // in use
    int num_skipped;
    uint64_t num_tokens;
    struct {
        int fd, shard; // fd -1: empty
    } slots[OPEN_SLOTS];
};

// --- Opening -------------------------------------------------------------------------------------

static Status check_fit(const char *directory, const DatasetSummary *summary,
                        const DatasetOptions *options) {
    if (options->vocab_size && summary->vocab_size > options->vocab_size) {
        FAIL(
            STATUS_BAD_DATA,
            "%s: shards have a vocabulary of %d ids, the model's has %d: prepare the data with the "
            "model's tokenizer",
            directory, summary->vocab_size, options->vocab_size);
    }
    const char *expected = options->tokenizer_id;
    if (tokenizer_ids_agree(summary->tokenizer_id, expected)) return STATUS_OK;
    FAIL(STATUS_BAD_DATA,
         "%s: shards were made with tokenizer %.16s..., the model has %.16s... (tokenizer_sha256): "
         "prepare the data with the model's tokenizer",
         directory, summary->tokenizer_id, expected);
}

// Reasons that lie in the file; anything else (memory, processes) is never skipped.
static bool may_skip(Status code) {
    return code == STATUS_BAD_DATA || code == STATUS_MISSING_INPUT || code == STATUS_IO;
}

static Status add_shard(Dataset *dataset, const char *directory, const ManifestShard *entry,
                        const ShardLayout *layout) {
    Shard *shard = &dataset->shards[dataset->num_shards];
    char path[IO_PATH_MAX];
    TRY(io_path(path, "%s/%s", directory, entry->name));
    shard->path = strdup(path);
    if (!shard->path) FAIL(STATUS_INTERNAL, "out of memory opening %s", path);
    shard->layout = *layout;
    shard->first = dataset->num_tokens;
    memcpy(shard->hash, entry->hash, sizeof shard->hash);
    dataset->num_tokens += layout->num_tokens;
    dataset->num_shards++;
    return STATUS_OK;
}

static Status add_shards(Dataset *dataset, const char *directory, const DataManifest *manifest,
                         const ShardFinding *findings, bool skip_bad_shards) {
    int count = manifest->summary.num_shards;
    for (int i = 0; i < count; i++) {
        const ShardFinding *finding = &findings[i];
        if (finding->code == STATUS_OK) {
            TRY(add_shard(dataset, directory, &manifest->shards[i], &finding->layout));
        } else if (skip_bad_shards && may_skip(finding->code)) {
            log_warn("shard left out: %s", finding->message);
            dataset->num_skipped++;
        } else {
            FAIL(finding->code, "%s", finding->message);
        }
    }
    if (dataset->num_shards == 0)
        FAIL(STATUS_BAD_DATA, "%s: all %d shards are bad, none is left", directory, count);
    if (dataset->num_skipped)
        log_warn("%s: %d of %d shards left out", directory, dataset->num_skipped, count);
    return STATUS_OK;
}

Status dataset_open(const char *directory, const DatasetOptions *options, Dataset **out) {
    Status status = STATUS_OK;
    DataManifest manifest;
    ShardFinding *findings = NULL;
    Dataset *dataset = NULL;
    TRY(data_manifest_read(directory, &manifest));
    TRY_GOTO(check_fit(directory, &manifest.summary, options), done);

    size_t count = (size_t)manifest.summary.num_shards;
    findings = calloc(count, sizeof *findings);
    dataset = calloc(1, sizeof *dataset);
    if (dataset) dataset->shards = calloc(count, sizeof *dataset->shards);
    if (!findings || !dataset || !dataset->shards)
        FAIL_GOTO(done, STATUS_INTERNAL, "out of memory opening %s", directory);
    dataset->summary = manifest.summary;
    for (int i = 0; i < OPEN_SLOTS; i++) dataset->slots[i].fd = -1;

    const VerifyOptions verify = {.stop_at_first = !options->skip_bad_shards};
    TRY_GOTO(verify_shards(directory, &manifest, &verify, findings), done);
    TRY_GOTO(add_shards(dataset, directory, &manifest, findings, options->skip_bad_shards), done);
    *out = dataset;
done:
    if (status != STATUS_OK) dataset_close(dataset);
    free(findings);
    data_manifest_free(&manifest);
    return status;
}

void dataset_close(Dataset *dataset) {
    if (!dataset) return;
    for (int i = 0; i < OPEN_SLOTS; i++)
        if (dataset->slots[i].fd >= 0) close(dataset->slots[i].fd); // read only: nothing to lose
    for (int i = 0; i < dataset->num_shards; i++) free(dataset->shards[i].path);
    free(dataset->shards);
    free(dataset);
}

// --- What it is ----------------------------------------------------------------------------------

uint64_t dataset_tokens(const Dataset *dataset) {
    return dataset->num_tokens;
}

int dataset_skipped_shards(const Dataset *dataset) {
    return dataset->num_skipped;
}

const DatasetSummary *dataset_info(const Dataset *dataset) {
    return &dataset->summary;
}

void dataset_hash(const Dataset *dataset, HashStream *stream) {
    char line[256];
    const DatasetSummary *summary = &dataset->summary;
    int bytes = snprintf(line, sizeof line, "tokenizer %s vocab %d eos %" PRId64 "\n",
                         summary->tokenizer_id, summary->vocab_size, summary->eos_id);
    hash_stream_update(stream, line, (size_t)bytes);
    for (int i = 0; i < dataset->num_shards; i++) {
        const Shard *shard = &dataset->shards[i];
        bytes = snprintf(line, sizeof line, "shard %s tokens %" PRIu64 " documents %" PRIu64 "\n",
                         shard->hash, shard->layout.num_tokens, shard->layout.num_documents);
        hash_stream_update(stream, line, (size_t)bytes);
    }
}

// --- Reading -------------------------------------------------------------------------------------

static int find_shard(const Dataset *dataset, uint64_t token) {
    int low = 0, high = dataset->num_shards;
    while (high - low > 1) {
        int middle = low + (high - low) / 2;
        if (dataset->shards[middle].first <= token) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

static Status open_shard(Dataset *dataset, int index, int *fd) {
    int slot = index % OPEN_SLOTS;
    if (dataset->slots[slot].fd >= 0 && dataset->slots[slot].shard != index) {
        close(dataset->slots[slot].fd);
        dataset->slots[slot].fd = -1;
    }
    if (dataset->slots[slot].fd < 0) {
        TRY(io_open(dataset->shards[index].path, O_RDONLY, &dataset->slots[slot].fd));
        dataset->slots[slot].shard = index;
    }
    *fd = dataset->slots[slot].fd;
    return STATUS_OK;
}

// The part of stream tokens [first, first + count) that lies in one shard.
typedef struct Part {
    const Shard *shard;
    int fd;
    uint64_t first, count; // in the shard
} Part;

static Status find_part(Dataset *dataset, uint64_t first, uint64_t count, Part *part) {
    INVARIANT(first < dataset->num_tokens && count <= dataset->num_tokens - first);
    int index = find_shard(dataset, first);
    part->shard = &dataset->shards[index];
    part->first = first - part->shard->first;
    uint64_t left = part->shard->layout.num_tokens - part->first;
    part->count = count < left ? count : left;
    return open_shard(dataset, index, &part->fd);
}

Status dataset_read(Dataset *dataset, uint64_t first, uint64_t count, int32_t *ids) {
    while (count > 0) {
        Part part;
        TRY(find_part(dataset, first, count, &part));
        TRY(shard_read_tokens(part.fd, part.shard->path, &part.shard->layout, part.first,
                              part.count, ids));
        first += part.count;
        count -= part.count;
        ids += part.count;
    }
    return STATUS_OK;
}

static Status mark_starts(const Part *part, bool *is_start) {
    const ShardLayout *layout = &part->shard->layout;
    const char *path = part->shard->path;
    uint64_t document, offsets[OFFSETS_BLOCK];
    TRY(shard_find_document(part->fd, path, layout, part->first, &document));
    memset(is_start, 0, part->count * sizeof *is_start);
    for (uint64_t at = document; at < layout->num_documents; at += OFFSETS_BLOCK) {
        uint64_t left = layout->num_documents - at;
        uint64_t count = left < OFFSETS_BLOCK ? left : OFFSETS_BLOCK;
        TRY(shard_read_documents(part->fd, path, layout, at, count, offsets));
        for (uint64_t i = 0; i < count; i++) {
            if (offsets[i] < part->first) continue; // the document that the part begins in
            if (offsets[i] - part->first >= part->count) return STATUS_OK;
            is_start[offsets[i] - part->first] = true;
        }
    }
    return STATUS_OK;
}

Status dataset_document_starts(Dataset *dataset, uint64_t first, uint64_t count, bool *is_start) {
    while (count > 0) {
        Part part;
        TRY(find_part(dataset, first, count, &part));
        TRY(mark_starts(&part, is_start));
        first += part.count;
        count -= part.count;
        is_start += part.count;
    }
    return STATUS_OK;
}
