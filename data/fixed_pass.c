// A pass over the windows in file order, for evaluation and calibration. Read when asked for: what
// follows takes a forward pass, against which a read from the page cache is nothing.
//
// Rank r of W takes the selected windows r, r+W, ...; every rank makes the same number of
// micro-batches, so that collectives inside them match.
#include <inttypes.h>
#include <stdlib.h>
#include "data/loader.h"
#include "data/sources.h"

struct FixedPass {
    Sources sources;
    uint64_t all_windows; // of all sources
    uint64_t selected;    // of these, spread evenly
    uint64_t rank, world;
    int64_t micro_batch;       // rows of a micro-batch
    uint64_t batches, next;    // micro-batches of a pass, and the next one
    int32_t *tokens, *targets; // (micro_batch, S)
    int32_t *document_start;   // (micro_batch, S) or NULL
};

static Status allocate(const LoaderConfig *config, FixedPass *pass) {
    size_t rows = (size_t)config->micro_batch, length = (size_t)config->sequence_length;
    if (length > SIZE_MAX / sizeof(int32_t) / rows)
        FAIL(STATUS_USAGE, "a micro-batch of %zu x %zu tokens is too large", rows, length);
    pass->tokens = calloc(rows * length, sizeof *pass->tokens);
    pass->targets = calloc(rows * length, sizeof *pass->targets);
    if (config->mask_documents)
        pass->document_start = calloc(rows * length, sizeof *pass->document_start);
    if (!pass->tokens || !pass->targets || (config->mask_documents && !pass->document_start))
        FAIL(STATUS_INTERNAL, "out of memory for a micro-batch of %zu x %zu tokens", rows, length);
    return STATUS_OK;
}

Status fixed_pass_open(const LoaderConfig *config, int64_t sequences, FixedPass **out) {
    Status status = STATUS_OK;
    FixedPass *pass = NULL;
    if (config->micro_batch < 1 || config->world < 1 || config->rank < 0 ||
        config->rank >= config->world) {
        FAIL(STATUS_USAGE, "micro-batch %" PRId64 ", rank %d of %d: out of range",
             config->micro_batch, config->rank, config->world);
    }
    pass = calloc(1, sizeof *pass);
    if (!pass) FAIL(STATUS_INTERNAL, "out of memory opening data");
    TRY_GOTO(sources_open(config, &pass->sources), failed);
    TRY_GOTO(allocate(config, pass), failed);
    for (int i = 0; i < pass->sources.count; i++) pass->all_windows += pass->sources.windows[i];
    bool some = sequences > 0 && (uint64_t)sequences < pass->all_windows;
    pass->selected = some ? (uint64_t)sequences : pass->all_windows;
    pass->rank = (uint64_t)config->rank;
    pass->world = (uint64_t)config->world;
    pass->micro_batch = config->micro_batch;
    uint64_t rows = (pass->selected + pass->world - 1) / pass->world;
    pass->batches = (rows + (uint64_t)pass->micro_batch - 1) / (uint64_t)pass->micro_batch;
    *out = pass;
    return STATUS_OK;
failed:
    fixed_pass_close(pass);
    return status;
}

// Fills a row with selected window `index`, or with nothing beyond the last.
static Status fill_row(FixedPass *pass, uint64_t index, const Row *row) {
    Sources *sources = &pass->sources;
    int64_t valid;
    if (index >= pass->selected) {
        sources_fill_empty(sources, row);
        return STATUS_OK;
    }
    typedef unsigned __int128 Wide;
    uint64_t window = (uint64_t)((Wide)index * pass->all_windows / pass->selected);
    int source = 0;
    while (window >= sources->windows[source]) window -= sources->windows[source++];
    return sources_fill(sources, source, window, row, &valid);
}

Status fixed_pass_next(FixedPass *pass, MicroBatch *batch, bool *more) {
    *more = pass->next < pass->batches;
    if (!*more) return STATUS_OK;
    for (int64_t i = 0; i < pass->micro_batch; i++) {
        Row row = row_at(&pass->sources, pass->tokens, pass->targets, pass->document_start, i);
        uint64_t nth = pass->next * (uint64_t)pass->micro_batch + (uint64_t)i; // of this rank
        TRY(fill_row(pass, nth * pass->world + pass->rank, &row));
    }
    pass->next++;
    *batch = (MicroBatch){.batch = pass->micro_batch,
                          .sequence_length = pass->sources.sequence_length,
                          .tokens = pass->tokens,
                          .targets = pass->targets,
                          .document_start = pass->document_start};
    return STATUS_OK;
}

void fixed_pass_rewind(FixedPass *pass) {
    pass->next = 0;
}

void fixed_pass_close(FixedPass *pass) {
    if (!pass) return;
    sources_close(&pass->sources);
    free(pass->tokens);
    free(pass->targets);
    free(pass->document_start);
    free(pass);
}
