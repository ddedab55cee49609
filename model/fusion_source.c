// Surgery (METHOD.md §4) as a stage of the weight pipe: nothing is built, every read is answered
// from the dense source on the spot.
//
//   fused tensor                              comes from
//   embedding, final norm, LM head            the same tensor
//   attention, norms, dense MLP of layer t    layer base(t)
//   expert e of layer t                       the MLP of layer base(t) for e < K = N - n*·M, then
//                                             M experts for each follower in turn
//   router of layer t                         N(0, router_std)
//
// Drop-Upcycling (reinit_ratio) and copy_noise then change expert weights. Both are drawn by
// tensor name and element index, so a value never depends on how it is read:
//   - z(i) is a standard normal number of stream `tensor name` at element i;
//   - an expert's redrawn channels are the first reinit_ratio·I of a random permutation of its I
//     channels, the same for gate and up (rows) and down (columns): there w(i) = mean + std·z(i);
//   - elsewhere w(i) += copy_noise·std·z(i). One z serves both, as no element has both.
// mean and std are those of the whole source matrix, from one pass over it on first use.
#include "model/fusion.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/random.h"

enum {
    PIECE = 4096, // elements drawn or summed at once
    ORIGIN_NAME_MAX = TENSOR_NAME_MAX + 16,
};
#define LAYER_PREFIX "model.layers."

typedef struct MatrixStats {
    bool known;
    double mean, std;
} MatrixStats;

// Where a fused tensor comes from: a tensor of the source, or nothing (routers).
typedef struct Origin {
    const Tensor *tensor;
    int stats; // index into `stats`: that of the source tensor
} Origin;

typedef struct FusedSource {
    TensorSource base; // first member: a TensorSource is a FusedSource
    TensorSource *source;
    FusionPlan plan;
    ModelConfig config;
    TensorTable table;
    Origin *origins;    // (table.count)
    MatrixStats *stats; // (source table's count)
    // The redrawn channels of the expert read last; gate, up and down of one share them.
    int channels_layer, channels_expert;
    bool *redrawn;     // (moe_intermediate_size)
    int32_t *shuffled; // (moe_intermediate_size) scratch
} FusedSource;

// --- Which source tensor a fused tensor comes from -----------------------------------------------

// The source layer that becomes layer `layer` of the fused model, and its block or NULL.
static int base_of_layer(const FusionPlan *plan, int layer, const FusionBlock **block) {
    *block = NULL;
    for (int i = 0; i < plan->num_blocks; i++) {
        const FusionBlock *candidate = &plan->blocks[i];
        if (candidate->base > layer) break;
        if (candidate->base == layer)
            *block = candidate;
        else
            layer += candidate->followers;
    }
    return layer;
}

static int mlp_layer_of_expert(const FusionPlan *plan, int base, const FusionBlock *block,
                               int expert) {
    if (!block) return base;
    int base_copies = plan->num_experts - block->followers * plan->follower_copies;
    return expert < base_copies ? base : base + 1 + (expert - base_copies) / plan->follower_copies;
}

static const char *mlp_matrix_name(TensorRole role) {
    return role == ROLE_GATE ? "gate_proj" : role == ROLE_UP ? "up_proj" : "down_proj";
}

// The Hugging Face name, in the source, of what `tensor` comes from.
static void origin_name(const FusionPlan *plan, const Tensor *tensor, char name[ORIGIN_NAME_MAX]) {
    if (tensor->layer < 0) {
        snprintf(name, ORIGIN_NAME_MAX, "%s", tensor->name);
        return;
    }
    const FusionBlock *block;
    int base = base_of_layer(plan, tensor->layer, &block);
    if (tensor->expert >= 0) {
        snprintf(name, ORIGIN_NAME_MAX, LAYER_PREFIX "%d.mlp.%s.weight",
                 mlp_layer_of_expert(plan, base, block, tensor->expert),
                 mlp_matrix_name(tensor->role));
        return;
    }
    // The same name with another number after "model.layers."
    const char *rest = strchr(tensor->name + strlen(LAYER_PREFIX), '.');
    snprintf(name, ORIGIN_NAME_MAX, LAYER_PREFIX "%d%s", base, rest ? rest : "");
}

static Status find_origins(FusedSource *fused) {
    const TensorTable *from = fused->source->table;
    for (int i = 0; i < fused->table.count; i++) {
        const Tensor *tensor = &fused->table.tensors[i];
        if (tensor->role == ROLE_ROUTER) continue;
        char name[ORIGIN_NAME_MAX];
        origin_name(&fused->plan, tensor, name);
        const Tensor *origin = tensor_table_find(from, name);
        if (!origin || origin->count != tensor->count || origin->role != tensor->role)
            FAIL(STATUS_INTERNAL, "fusion: %s should come from %s, which the source %s",
                 tensor->name, name, origin ? "has in another shape" : "lacks");
        fused->origins[i] = (Origin){.tensor = origin, .stats = (int)(origin - from->tensors)};
    }
    return STATUS_OK;
}

// --- Redrawn channels and noise ------------------------------------------------------------------

static Status matrix_stats(FusedSource *fused, const Origin *origin, MatrixStats **out) {
    MatrixStats *stats = &fused->stats[origin->stats];
    *out = stats;
    if (stats->known) return STATUS_OK;
    float piece[PIECE];
    double sum = 0, squares = 0;
    int64_t total = origin->tensor->count;
    for (int64_t first = 0; first < total; first += PIECE) {
        int64_t count = total - first < PIECE ? total - first : PIECE;
        TRY(fused->source->read(fused->source, origin->tensor, first, count, piece));
        for (int64_t i = 0; i < count; i++) {
            sum += piece[i];
            squares += (double)piece[i] * piece[i];
        }
    }
    double mean = sum / (double)total, variance = squares / (double)total - mean * mean;
    *stats = (MatrixStats){true, mean, variance > 0 ? sqrt(variance) : 0};
    return STATUS_OK;
}

// A number in [0, range) from 64 random bits: the high half of a 128-bit product.
static uint64_t below(uint64_t bits, uint64_t range) {
    return (uint64_t)(((unsigned __int128)bits * range) >> 64);
}

// Marks exactly round(reinit_ratio·I) channels: the head of a Fisher-Yates shuffle.
static void choose_channels(FusedSource *fused, int layer, int expert) {
    if (fused->channels_layer == layer && fused->channels_expert == expert) return;
    int channels = fused->config.moe_intermediate_size;
    int chosen = (int)llround(fused->plan.reinit_ratio * channels);
    char name[TENSOR_NAME_MAX];
    snprintf(name, sizeof name, "model.layers.%d.mlp.experts.%d redrawn channels", layer, expert);
    uint64_t stream = random_stream(name);
    for (int i = 0; i < channels; i++) fused->shuffled[i] = i;
    memset(fused->redrawn, 0, (size_t)channels * sizeof *fused->redrawn);
    for (int i = 0; i < chosen; i++) {
        uint64_t bits = random_u64(fused->plan.seed, stream, (uint64_t)i);
        int other = i + (int)below(bits, (uint64_t)(channels - i));
        int32_t channel = fused->shuffled[other];
        fused->shuffled[other] = fused->shuffled[i];
        fused->redrawn[channel] = true;
    }
    fused->channels_layer = layer;
    fused->channels_expert = expert;
}

// Elements [first, first + count) of an expert matrix, count <= PIECE, changed in place.
static void change_piece(const FusedSource *fused, const Tensor *tensor, const MatrixStats *stats,
                         int64_t first, int64_t count, float *values) {
    float z[PIECE];
    bool columns = tensor->role == ROLE_DOWN; // (H, I): a channel is a column, else a row
    int64_t width = tensor->shape[1];
    double noise = fused->plan.copy_noise * stats->std;
    random_normal_fill(z, (size_t)count, fused->plan.seed, random_stream(tensor->name),
                       (uint64_t)first, 0.0f, 1.0f);
    for (int64_t i = 0; i < count; i++) {
        int64_t channel = columns ? (first + i) % width : (first + i) / width;
        if (fused->redrawn[channel])
            values[i] = (float)(stats->mean + stats->std * z[i]);
        else
            values[i] = (float)(values[i] + noise * z[i]);
    }
}

static Status change_expert(FusedSource *fused, const Tensor *tensor, const Origin *origin,
                            int64_t first, int64_t count, float *values) {
    MatrixStats *stats;
    TRY(matrix_stats(fused, origin, &stats));
    choose_channels(fused, tensor->layer, tensor->expert);
    for (int64_t done = 0; done < count; done += PIECE) {
        int64_t piece = count - done < PIECE ? count - done : PIECE;
        change_piece(fused, tensor, stats, first + done, piece, values + done);
    }
    return STATUS_OK;
}

// --- The source ----------------------------------------------------------------------------------

static bool changes_experts(const FusionPlan *plan) {
    return plan->reinit_ratio > 0 || plan->copy_noise > 0;
}

static Status fused_read(TensorSource *base, const Tensor *tensor, int64_t first, int64_t count,
                         float *out) {
    FusedSource *fused = (FusedSource *)base;
    // By name: the caller's tensor may be from its own table of the same config.
    tensor = tensor_table_find(&fused->table, tensor->name);
    INVARIANT(tensor && first >= 0 && count >= 0 && count <= tensor->count - first);
    if (tensor->role == ROLE_ROUTER) {
        random_normal_fill(out, (size_t)count, fused->plan.seed, random_stream(tensor->name),
                           (uint64_t)first, 0.0f, (float)fused->plan.router_std);
        return STATUS_OK;
    }
    const Origin *origin = &fused->origins[tensor - fused->table.tensors];
    TRY(fused->source->read(fused->source, origin->tensor, first, count, out));
    if (tensor->expert < 0 || !changes_experts(&fused->plan)) return STATUS_OK;
    return change_expert(fused, tensor, origin, first, count, out);
}

static void fused_close(TensorSource *base) {
    FusedSource *fused = (FusedSource *)base;
    tensor_table_free(&fused->table);
    free(fused->origins);
    free(fused->stats);
    free(fused->redrawn);
    free(fused->shuffled);
    free(fused);
}

static Status allocate(FusedSource *fused) {
    size_t channels = (size_t)fused->config.moe_intermediate_size;
    fused->origins = calloc((size_t)fused->table.count, sizeof *fused->origins);
    fused->stats = calloc((size_t)fused->source->table->count, sizeof *fused->stats);
    fused->redrawn = calloc(channels, sizeof *fused->redrawn);
    fused->shuffled = calloc(channels, sizeof *fused->shuffled);
    if (!fused->origins || !fused->stats || !fused->redrawn || !fused->shuffled)
        FAIL(STATUS_INTERNAL, "out of memory: fusion of %d tensors", fused->table.count);
    return STATUS_OK;
}

Status fusion_source(const FusionPlan *plan, TensorSource *source, TensorSource **out) {
    FusedSource *fused = calloc(1, sizeof *fused);
    if (!fused) FAIL(STATUS_INTERNAL, "out of memory: fusion");
    fused->source = source;
    fused->plan = *plan;
    fused->channels_layer = -1;
    Status status;
    TRY_GOTO(fusion_target_config(plan, source->config, &fused->config), failed);
    TRY_GOTO(tensor_table_build(&fused->config, &fused->table), failed);
    TRY_GOTO(allocate(fused), failed);
    TRY_GOTO(find_origins(fused), failed);
    // What is drawn anew has all of fp32's bits, whatever the source is stored as. (So have the
    // routers, but they stay fp32 by role.)
    fused->base = (TensorSource){.config = &fused->config,
                                 .table = &fused->table,
                                 .dtype = changes_experts(plan) ? DTYPE_F32 : source->dtype,
                                 .read = fused_read,
                                 .close = fused_close};
    *out = &fused->base;
    return STATUS_OK;
failed:
    fused_close(&fused->base);
    return status;
}
