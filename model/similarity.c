// The similarity of all pairs of layers, as values and as a table in the log.
#include "model/similarity.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/log.h"

Status similarity_create(int num_layers, int max_block, Similarity *out) {
    *out = (Similarity){0};
    if (num_layers < 1 || num_layers > MODEL_MAX_LAYERS || max_block < 1 ||
        max_block > SIMILARITY_MAX_BLOCK)
        FAIL(STATUS_USAGE, "similarity of %d layers in blocks of %d: expected 1 to %d and 1 to %d",
             num_layers, max_block, MODEL_MAX_LAYERS, SIMILARITY_MAX_BLOCK);
    size_t count = (size_t)num_layers * (size_t)max_block;
    double *values = malloc(3 * count * sizeof *values); // one block, owned through s_out
    if (!values) FAIL(STATUS_INTERNAL, "out of memory: similarity of %d layers", num_layers);
    for (size_t i = 0; i < 3 * count; i++) values[i] = NAN;
    *out = (Similarity){.num_layers = num_layers,
                        .max_block = max_block,
                        .s_out = values,
                        .s_mlp = values + count,
                        .d_norm = values + 2 * count};
    return STATUS_OK;
}

void similarity_free(Similarity *similarity) {
    free(similarity->s_out);
    *similarity = (Similarity){0};
}

// --- The table in the log ------------------------------------------------------------------------

enum { LOG_COLUMNS = 6, LOG_LINE_MAX = 256 }; // wider blocks: the rest is in the file

static void append_values(char *line, const Similarity *s, const double *values, int layer,
                          int columns) {
    size_t used = strlen(line);
    for (int n = 1; n <= columns; n++) {
        double value = values[similarity_index(s, layer, n)];
        if (isnan(value))
            used += (size_t)snprintf(line + used, LOG_LINE_MAX - used, " %8s", "");
        else
            used += (size_t)snprintf(line + used, LOG_LINE_MAX - used, " %8.5f", value);
    }
    snprintf(line + used, LOG_LINE_MAX - used, " |");
}

static void append_heading(char *line, const char *name, int columns) {
    size_t used = strlen(line);
    for (int n = 1; n <= columns; n++)
        used += (size_t)snprintf(line + used, LOG_LINE_MAX - used, " %6s+%d", name, n);
    snprintf(line + used, LOG_LINE_MAX - used, " |");
}

void similarity_log(const Similarity *s) {
    int columns = s->max_block < LOG_COLUMNS ? s->max_block : LOG_COLUMNS;
    log_info("similarity of layers l and l+n over %" PRId64 " tokens:", s->tokens);
    char line[LOG_LINE_MAX] = "   l |";
    append_heading(line, "s_out", columns);
    append_heading(line, "s_mlp", columns);
    append_heading(line, "d_norm", columns);
    log_info("%s", line);
    for (int l = 0; l + 1 < s->num_layers; l++) {
        snprintf(line, sizeof line, "%4d |", l);
        append_values(line, s, s->s_out, l, columns);
        append_values(line, s, s->s_mlp, l, columns);
        append_values(line, s, s->d_norm, l, columns);
        log_info("%s", line);
    }
}
