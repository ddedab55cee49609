// data.train, train.recompute, optim.skip_steps: comma-separated lists inside one value.
#include "train/recipe_lists.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { LIST_ITEM_MAX = RECIPE_TEXT_MAX };

// Copies the next item of a comma-separated list, trimmed, and moves *list behind it. False at the
// end. An empty item ("a,,b" or a trailing comma) is an item, so that callers can refuse it.
static bool next_item(const char **list, char item[LIST_ITEM_MAX]) {
    if (!*list) return false;
    size_t length = strcspn(*list, ",");
    const char *start = *list, *end = start + length;
    *list = *end ? end + 1 : NULL;
    while (start < end && *start == ' ') start++;
    while (end > start && end[-1] == ' ') end--;
    memcpy(item, start, (size_t)(end - start));
    item[end - start] = '\0';
    return true;
}

// Splits "DIR:WEIGHT" at the last colon when a number follows it; a directory may hold colons.
static Status split_weight(const char *key, char *item, double *weight) {
    *weight = 1;
    char *colon = strrchr(item, ':');
    if (!colon || !colon[1]) return STATUS_OK;
    if (colon[1 + strspn(colon + 1, "+-.0123456789eE")]) return STATUS_OK;
    char *end;
    *weight = strtod(colon + 1, &end);
    if (*end || !isfinite(*weight) || *weight <= 0)
        FAIL(STATUS_USAGE, "%s: weight '%s' of %.*s must be a number above 0", key, colon + 1,
             (int)(colon - item), item);
    *colon = '\0';
    return STATUS_OK;
}

Status parse_sources(const char *key, const char *text, DataConfig *out) {
    char item[LIST_ITEM_MAX];
    size_t used = 0;
    out->loader.num_sources = 0;
    for (const char *list = text; next_item(&list, item);) {
        if (out->loader.num_sources == LOADER_MAX_SOURCES)
            FAIL(STATUS_USAGE, "%s: more than %d sources", key, LOADER_MAX_SOURCES);
        LoaderSource *source = &out->loader.sources[out->loader.num_sources++];
        TRY(split_weight(key, item, &source->weight));
        if (!item[0])
            FAIL(STATUS_USAGE,
                 "%s = %s: source %d has no directory; expected DIR:WEIGHT or DIR, "
                 "separated by commas",
                 key, text, out->loader.num_sources);
        // Items are parts of `text`, which fits, so their sum with a NUL for each comma fits.
        size_t size = strlen(item) + 1;
        INVARIANT(used + size <= sizeof out->directories);
        source->directory = memcpy(out->directories + used, item, size);
        used += size;
    }
    return STATUS_OK;
}

Status parse_recompute(const char *text, Recompute *out) {
    char item[LIST_ITEM_MAX];
    int items = 0;
    bool none = false;
    *out = (Recompute){0};
    for (const char *list = text; next_item(&list, item); items++) {
        if (strcmp(item, "none") == 0)
            none = true;
        else if (strcmp(item, "layer") == 0)
            *out = (Recompute){.swiglu = true, .norms = true, .layer = true};
        else if (strcmp(item, "swiglu") == 0)
            out->swiglu = true;
        else if (strcmp(item, "norms") == 0)
            out->norms = true;
        else
            FAIL(STATUS_USAGE,
                 "train.recompute = %s: '%s' is unknown; expected none, layer, or a list of "
                 "swiglu, norms",
                 text, item);
    }
    if ((none || out->layer) && items > 1)
        FAIL(STATUS_USAGE, "train.recompute = %s: none and layer stand alone", text);
    return STATUS_OK;
}

// A step number; moves *text behind it.
static bool read_step(const char **text, int64_t *out) {
    char *end;
    errno = 0;
    if (**text < '0' || **text > '9') return false; // strtoll takes spaces and signs
    *out = strtoll(*text, &end, 10);
    *text = end;
    return errno == 0 && *out > 0;
}

Status parse_step_ranges(const char *key, const char *text, StepRanges *out) {
    char item[LIST_ITEM_MAX];
    out->count = 0;
    if (!text[0]) return STATUS_OK;
    for (const char *list = text; next_item(&list, item);) {
        if (out->count == STEP_RANGES_MAX)
            FAIL(STATUS_USAGE, "%s: more than %d ranges of steps", key, STEP_RANGES_MAX);
        StepRange *range = &out->range[out->count++];
        const char *at = item;
        bool good = read_step(&at, &range->first);
        range->last = range->first;
        if (good && *at == '-') {
            at++;
            good = read_step(&at, &range->last);
        }
        if (!good || *at || range->last < range->first)
            FAIL(STATUS_USAGE, "%s = %s: '%s' is no step (from 1 on) and no range like 300-320",
                 key, text, item);
    }
    return STATUS_OK;
}

bool step_ranges_have(const StepRanges *ranges, int64_t step) {
    for (int i = 0; i < ranges->count; i++)
        if (step >= ranges->range[i].first && step <= ranges->range[i].last) return true;
    return false;
}
