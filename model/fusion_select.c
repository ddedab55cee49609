// Choosing blocks (METHOD.md §3): by threshold and score, by budget, or by hand.
//
// Messages name recipe keys, since that is where an impossible demand comes from.
#include "model/fusion.h"

#include <ctype.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "base/log.h"

// Layers [begin, end) may take part.
typedef struct Range {
    int begin, end;
} Range;

static Range eligible(const FusionOptions *options, int num_layers) {
    int begin = options->protect_first, end = num_layers - options->protect_last;
    return (Range){begin, end > begin ? end : begin};
}

double fusion_block_score(const Similarity *s, double lambda, int base, int followers) {
    if (followers < 1 || followers > s->max_block || base < 0 || base + followers >= s->num_layers)
        return NAN;
    double sum = 0;
    for (int j = 1; j <= followers; j++) {
        size_t i = similarity_index(s, base, j);
        sum += (s->s_out[i] + s->s_mlp[i]) / 2 - lambda * s->d_norm[i];
    }
    return sum / followers;
}

static bool block_is_valid(const FusionOptions *options, const Similarity *s, int base,
                           int followers) {
    for (int j = 1; j <= followers; j++) {
        size_t i = similarity_index(s, base, j);
        if (!(s->s_out[i] > 1 - options->delta && s->s_mlp[i] > 1 - options->delta &&
              s->d_norm[i] < options->epsilon))
            return false;
    }
    return true;
}

// What both measured selections need before they can start.
static Status check_demand(const FusionOptions *options, const Similarity *s,
                           const FusionPlan *plan) {
    if (!s) FAIL(STATUS_USAGE, "lfuc.select: only manual works without a similarity measurement");
    if (s->num_layers != plan->num_source_layers)
        FAIL(STATUS_USAGE, "the similarity is of %d layers, but the model has %d", s->num_layers,
             plan->num_source_layers);
    if (options->max_block < 1 || options->max_block > s->max_block)
        FAIL(STATUS_USAGE, "lfuc.max_block = %d: the similarity holds blocks of 1 to %d followers",
             options->max_block, s->max_block);
    int64_t needed = (int64_t)options->max_block * plan->follower_copies + 1;
    if (plan->num_experts < needed)
        FAIL(STATUS_USAGE,
             "lfuc.max_block = %d with follower_copies = %d needs num_experts of at least %lld "
             "(one for the base), found %d",
             options->max_block, plan->follower_copies, (long long)needed, plan->num_experts);
    return STATUS_OK;
}

// --- threshold -----------------------------------------------------------------------------------

// Falling score; equal scores by place and size, so that the choice never depends on qsort.
static int by_score(const void *a, const void *b) {
    const FusionBlock *x = a, *y = b;
    if (x->score != y->score) return x->score < y->score ? 1 : -1;
    if (x->base != y->base) return x->base > y->base ? 1 : -1;
    return (x->followers > y->followers) - (x->followers < y->followers);
}

static size_t list_valid(const FusionOptions *options, const Similarity *s, Range range,
                         FusionBlock *out) {
    size_t count = 0;
    for (int base = range.begin; base < range.end; base++) {
        for (int n = 1; n <= options->max_block && base + n < range.end; n++) {
            if (!block_is_valid(options, s, base, n)) continue;
            double score = fusion_block_score(s, options->lambda, base, n);
            out[count++] = (FusionBlock){.base = base, .followers = n, .score = score};
        }
    }
    return count;
}

static bool take_if_free(bool *occupied, const FusionBlock *block) {
    for (int l = block->base; l <= block->base + block->followers; l++)
        if (occupied[l]) return false;
    for (int l = block->base; l <= block->base + block->followers; l++) occupied[l] = true;
    return true;
}

static Status select_threshold(const FusionOptions *options, const Similarity *s,
                               FusionPlan *plan) {
    TRY(check_demand(options, s, plan));
    Range range = eligible(options, plan->num_source_layers);
    size_t capacity = (size_t)(range.end - range.begin) * (size_t)options->max_block + 1;
    FusionBlock *candidates = malloc(capacity * sizeof *candidates);
    if (!candidates) FAIL(STATUS_INTERNAL, "out of memory: %zu candidate blocks", capacity);
    size_t count = list_valid(options, s, range, candidates);
    qsort(candidates, count, sizeof *candidates, by_score);
    bool occupied[MODEL_MAX_LAYERS] = {false};
    for (size_t i = 0; i < count; i++)
        if (take_if_free(occupied, &candidates[i]))
            plan->blocks[plan->num_blocks++] = candidates[i];
    free(candidates);
    if (plan->num_blocks == 0)
        log_warn("lfuc: no block passes delta = %g and epsilon = %g: no layer will be pruned",
                 options->delta, options->epsilon);
    return STATUS_OK;
}

// --- budget --------------------------------------------------------------------------------------

// Exact dynamic programming over depth. best(l, p) is the greatest Σ n·Score of blocks in layers
// l..end-1 that prune exactly p layers: either layer l is in no block, or it is the base of a
// block of n followers, after which the rest starts at l + n + 1.
typedef struct Depth {
    Range range;
    int prune;
    double *best;    // (range.end - range.begin + 1, prune + 1); -inf where impossible
    uint8_t *choice; // followers of the block at l, 0 = none
} Depth;

static size_t depth_index(const Depth *d, int layer, int prune) {
    return (size_t)(layer - d->range.begin) * (size_t)(d->prune + 1) + (size_t)prune;
}

static void solve_layer(Depth *d, const FusionOptions *options, const Similarity *s, int layer) {
    for (int p = 0; p <= d->prune; p++) {
        size_t here = depth_index(d, layer, p);
        d->best[here] = d->best[depth_index(d, layer + 1, p)];
        d->choice[here] = 0;
    }
    for (int n = 1; n <= options->max_block && n <= d->prune && layer + n < d->range.end; n++) {
        double gain = n * fusion_block_score(s, options->lambda, layer, n);
        for (int p = n; p <= d->prune; p++) {
            size_t here = depth_index(d, layer, p);
            double total = gain + d->best[depth_index(d, layer + n + 1, p - n)];
            if (total > d->best[here]) {
                d->best[here] = total;
                d->choice[here] = (uint8_t)n;
            }
        }
    }
}

static void solve(Depth *d, const FusionOptions *options, const Similarity *s) {
    for (int p = 0; p <= d->prune; p++)
        d->best[depth_index(d, d->range.end, p)] = p == 0 ? 0.0 : -INFINITY;
    for (int layer = d->range.end - 1; layer >= d->range.begin; layer--)
        solve_layer(d, options, s, layer);
}

static void read_choice(const Depth *d, const FusionOptions *options, const Similarity *s,
                        FusionPlan *plan) {
    int prune = d->prune;
    for (int layer = d->range.begin; layer < d->range.end;) {
        int n = d->choice[depth_index(d, layer, prune)];
        if (n > 0) {
            double score = fusion_block_score(s, options->lambda, layer, n);
            plan->blocks[plan->num_blocks++] =
                (FusionBlock){.base = layer, .followers = n, .score = score};
        }
        prune -= n;
        layer += n + 1;
    }
}

int fusion_most_prunable(int layers, int max_block) {
    int longest = max_block + 1; // layers of the longest block; it prunes all but one
    return layers < 1 ? 0 : layers - (layers + longest - 1) / longest;
}

static Status select_budget(const FusionOptions *options, const Similarity *s, FusionPlan *plan) {
    if (options->prune_layers == 0) return STATUS_OK;
    TRY(check_demand(options, s, plan));
    Range range = eligible(options, plan->num_source_layers);
    int layers = range.end - range.begin, most = fusion_most_prunable(layers, options->max_block);
    if (options->prune_layers < 0 || options->prune_layers > most)
        FAIL(STATUS_USAGE,
             "lfuc.prune_layers = %d: at most %d of %d layers can be pruned with max_block = %d, "
             "protect_first = %d and protect_last = %d",
             options->prune_layers, most, plan->num_source_layers, options->max_block,
             options->protect_first, options->protect_last);
    Depth d = {.range = range, .prune = options->prune_layers};
    size_t cells = (size_t)(layers + 1) * (size_t)(d.prune + 1);
    Status status = STATUS_OK;
    d.best = malloc(cells * sizeof *d.best);
    d.choice = calloc(cells, sizeof *d.choice);
    if (!d.best || !d.choice)
        FAIL_GOTO(done, STATUS_INTERNAL, "out of memory: %zu cells of the block search", cells);
    solve(&d, options, s);
    read_choice(&d, options, s, plan);
done:
    free(d.best);
    free(d.choice);
    return status;
}

// --- manual --------------------------------------------------------------------------------------

static const char *skip_space(const char *text) {
    while (isspace((unsigned char)*text)) text++;
    return text;
}

// A number of up to four digits (layers are at most MODEL_MAX_LAYERS), or -1.
static int parse_number(const char **text) {
    int value = 0, digits = 0;
    for (*text = skip_space(*text); isdigit((unsigned char)**text); (*text)++)
        if (++digits <= 4) value = value * 10 + (**text - '0');
    return digits >= 1 && digits <= 4 ? value : -1;
}

// One "base+followers"; *text moves to what follows it.
static bool parse_block(const char **text, FusionBlock *out) {
    *out = (FusionBlock){.score = NAN};
    out->base = parse_number(text);
    *text = skip_space(*text);
    if (**text != '+') return false;
    (*text)++;
    out->followers = parse_number(text);
    *text = skip_space(*text);
    return out->base >= 0 && out->followers >= 1 && (**text == ',' || **text == '\0');
}

static Status check_protected(const FusionOptions *options, const FusionPlan *plan,
                              const FusionBlock *block) {
    Range range = eligible(options, plan->num_source_layers);
    int last = block->base + block->followers;
    if (last >= plan->num_source_layers)
        FAIL(STATUS_USAGE, "lfuc.blocks: %d+%d ends at layer %d, but the last one is %d",
             block->base, block->followers, last, plan->num_source_layers - 1);
    if (block->base < range.begin || last >= range.end)
        FAIL(STATUS_USAGE,
             "lfuc.blocks: %d+%d touches a layer that protect_first = %d and protect_last = %d "
             "protect; lower them to allow it",
             block->base, block->followers, options->protect_first, options->protect_last);
    return STATUS_OK;
}

static Status select_manual(const FusionOptions *options, const Similarity *s, FusionPlan *plan) {
    const char *text = options->blocks ? skip_space(options->blocks) : "";
    if (!*text)
        FAIL(STATUS_USAGE, "lfuc.blocks is empty: list the blocks as base+followers, e.g. 3+1, "
                           "9+2");
    for (;;) {
        const char *start = skip_space(text);
        FusionBlock block;
        text = start;
        if (!parse_block(&text, &block))
            FAIL(STATUS_USAGE, "lfuc.blocks = \"%s\": expected base+followers, e.g. 3+1, at \"%s\"",
                 options->blocks, start);
        TRY(check_protected(options, plan, &block));
        if (plan->num_blocks == MODEL_MAX_LAYERS)
            FAIL(STATUS_USAGE, "lfuc.blocks lists more than %d blocks", MODEL_MAX_LAYERS);
        if (s) block.score = fusion_block_score(s, options->lambda, block.base, block.followers);
        plan->blocks[plan->num_blocks++] = block;
        if (*text == '\0') break;
        text++;
    }
    return STATUS_OK;
}

Status fusion_select(const FusionOptions *options, const Similarity *similarity, FusionPlan *plan) {
    plan->num_blocks = 0;
    TRY(fusion_plan_check(plan, "lfuc", STATUS_USAGE)); // what the caller has set
    switch (options->select) {
    case SELECT_THRESHOLD:
        TRY(select_threshold(options, similarity, plan));
        break;
    case SELECT_BUDGET:
        TRY(select_budget(options, similarity, plan));
        break;
    case SELECT_MANUAL:
        TRY(select_manual(options, similarity, plan));
        break;
    }
    fusion_plan_sort(plan);
    return fusion_plan_check(plan, "lfuc", STATUS_USAGE);
}
