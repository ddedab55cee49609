// The data sources of a run, opened and agreeing with each other, and windows read from them.
//
// A window of a source is sequence_length + 1 consecutive tokens of its stream; windows follow each
// other at a distance of sequence_length, so that every token is a target once. What is left at the
// end of the stream is in no window.
#ifndef DATA_SOURCES_H
#define DATA_SOURCES_H

#include <stdbool.h>
#include <stdint.h>
#include "base/status.h"
#include "data/dataset.h"
#include "data/loader.h"

typedef struct Sources {
    int count;
    Dataset *datasets[LOADER_MAX_SOURCES];
    uint64_t windows[LOADER_MAX_SOURCES]; // per epoch, at least 1 each
    char fingerprint[HASH_HEX_SIZE];
    int64_t sequence_length; // S
    bool mask_documents;
    int32_t *ids;   // (S + 1): scratch of sources_fill
    bool *is_start; // (S + 1): the same; NULL without mask_documents
} Sources;

// One row of a micro-batch.
typedef struct Row {
    int32_t *tokens, *targets; // (S) each
    int32_t *document_start;   // (S), NULL without mask_documents
} Row;

Status sources_open(const LoaderConfig *config, Sources *sources) NODISCARD;
void sources_close(Sources *sources);

// Fills a row with window `window` of a source; *valid = its targets that are not -1. With
// mask_documents the first token of a document is no target: nothing before it tells about it.
Status sources_fill(Sources *sources, int source, uint64_t window, const Row *row,
                    int64_t *valid) NODISCARD;
// The same *valid without the row: no token is read.
Status sources_count_targets(Sources *sources, int source, uint64_t window,
                             int64_t *valid) NODISCARD;
// Fills a row that counts for nothing: every target is -1.
void sources_fill_empty(const Sources *sources, const Row *row);
// Row `index` of arrays (rows, S); document_start may be NULL.
Row row_at(const Sources *sources, int32_t *tokens, int32_t *targets, int32_t *document_start,
           int64_t index);

#endif
