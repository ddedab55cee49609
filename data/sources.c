// Opens the directories of a run, checks that they were made for each other and for the model, and
// turns windows of their streams into rows of tokens, targets and document starts.
#include "data/sources.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

// --- Opening -------------------------------------------------------------------------------------

static Status check_agreement(const LoaderConfig *config, const Sources *sources, int i) {
    const DatasetSummary *first = dataset_info(sources->datasets[0]);
    const DatasetSummary *other = dataset_info(sources->datasets[i]);
    const char *a = config->sources[0].directory, *b = config->sources[i].directory;
    if (first->vocab_size != other->vocab_size) {
        FAIL(STATUS_BAD_DATA, "shards disagree on vocab_size: %s has %d, %s has %d", a,
             first->vocab_size, b, other->vocab_size);
    }
    if (first->eos_id != other->eos_id) {
        FAIL(STATUS_BAD_DATA, "shards disagree on eos_id: %s has %" PRId64 ", %s has %" PRId64, a,
             first->eos_id, b, other->eos_id);
    }
    if (strcmp(first->tokenizer_id, other->tokenizer_id) != 0) {
        FAIL(STATUS_BAD_DATA,
             "shards disagree on tokenizer_sha256: %s has %.16s..., %s has %.16s...", a,
             first->tokenizer_id, b, other->tokenizer_id);
    }
    return STATUS_OK;
}

static Status open_source(const LoaderConfig *config, Sources *sources, int i) {
    const char *directory = config->sources[i].directory;
    const DatasetOptions options = {
        .vocab_size = config->vocab_size,
        .tokenizer_id = config->tokenizer_id ? config->tokenizer_id : "",
        .skip_bad_shards = config->skip_bad_shards,
    };
    TRY(dataset_open(directory, &options, &sources->datasets[i]));
    sources->count = i + 1;
    TRY(check_agreement(config, sources, i));
    uint64_t tokens = dataset_tokens(sources->datasets[i]);
    sources->windows[i] = (tokens - 1) / (uint64_t)sources->sequence_length;
    if (sources->windows[i] == 0) {
        FAIL(STATUS_BAD_DATA,
             "%s: has %" PRIu64 " tokens, one sequence needs %" PRId64
             " (sequence_length + 1): prepare more text or lower data.sequence_length",
             directory, tokens, sources->sequence_length + 1);
    }
    return STATUS_OK;
}

static Status make_fingerprint(Sources *sources) {
    HashStream *stream;
    TRY(hash_stream_create(&stream));
    for (int i = 0; i < sources->count; i++) dataset_hash(sources->datasets[i], stream);
    hash_to_hex(hash_stream_digest(stream), sources->fingerprint);
    hash_stream_free(stream);
    return STATUS_OK;
}

Status sources_open(const LoaderConfig *config, Sources *sources) {
    Status status = STATUS_OK;
    memset(sources, 0, sizeof *sources);
    if (config->num_sources < 1 || config->num_sources > LOADER_MAX_SOURCES) {
        FAIL(STATUS_USAGE, "%d data sources, expected 1 to %d", config->num_sources,
             LOADER_MAX_SOURCES);
    }
    if (config->sequence_length < 1 || config->sequence_length > INT32_MAX - 1)
        FAIL(STATUS_USAGE, "sequence length %" PRId64 " out of range", config->sequence_length);
    sources->sequence_length = config->sequence_length;
    sources->mask_documents = config->mask_documents;
    size_t length = (size_t)config->sequence_length + 1;
    sources->ids = calloc(length, sizeof *sources->ids);
    if (config->mask_documents) sources->is_start = calloc(length, sizeof *sources->is_start);
    if (!sources->ids || (config->mask_documents && !sources->is_start))
        FAIL_GOTO(failed, STATUS_INTERNAL, "out of memory for a window of %zu tokens", length);
    for (int i = 0; i < config->num_sources; i++) TRY_GOTO(open_source(config, sources, i), failed);
    TRY_GOTO(make_fingerprint(sources), failed);
    return STATUS_OK;
failed:
    sources_close(sources);
    return status;
}

void sources_close(Sources *sources) {
    for (int i = 0; i < sources->count; i++) dataset_close(sources->datasets[i]);
    free(sources->ids);
    free(sources->is_start);
    memset(sources, 0, sizeof *sources);
}

// --- Rows ----------------------------------------------------------------------------------------

Row row_at(const Sources *sources, int32_t *tokens, int32_t *targets, int32_t *document_start,
           int64_t index) {
    int64_t offset = index * sources->sequence_length;
    return (Row){.tokens = tokens + offset,
                 .targets = targets + offset,
                 .document_start = document_start ? document_start + offset : NULL};
}

Status sources_fill(Sources *sources, int source, uint64_t window, const Row *row, int64_t *valid) {
    int64_t length = sources->sequence_length;
    Dataset *dataset = sources->datasets[source];
    uint64_t first = window * (uint64_t)length;
    TRY(dataset_read(dataset, first, (uint64_t)length + 1, sources->ids));
    memcpy(row->tokens, sources->ids, (size_t)length * sizeof *row->tokens);
    memcpy(row->targets, sources->ids + 1, (size_t)length * sizeof *row->targets);
    *valid = length;
    if (!sources->mask_documents) return STATUS_OK;

    TRY(dataset_document_starts(dataset, first, (uint64_t)length + 1, sources->is_start));
    int32_t start = 0; // a document that began earlier is seen from the row's beginning
    for (int64_t t = 0; t < length; t++) {
        if (sources->is_start[t]) start = (int32_t)t;
        row->document_start[t] = start;
        if (sources->is_start[t + 1]) {
            row->targets[t] = -1;
            --*valid;
        }
    }
    return STATUS_OK;
}

Status sources_count_targets(Sources *sources, int source, uint64_t window, int64_t *valid) {
    const int64_t length = sources->sequence_length;
    *valid = length;
    if (!sources->mask_documents) return STATUS_OK;
    TRY(dataset_document_starts(sources->datasets[source], window * (uint64_t)length,
                                (uint64_t)length + 1, sources->is_start));
    for (int64_t t = 1; t <= length; t++) *valid -= sources->is_start[t];
    return STATUS_OK;
}

void sources_fill_empty(const Sources *sources, const Row *row) {
    for (int64_t t = 0; t < sources->sequence_length; t++) {
        row->tokens[t] = 0;
        row->targets[t] = -1;
        if (row->document_start) row->document_start[t] = 0;
    }
}
