// Layer-Fusion UpCycling: choosing blocks (METHOD.md §3) and surgery (§4; Dense2MoE, Alg. 1).
//
// A block is a base layer l and n followers l+1..l+n that do nearly the same. Surgery turns it into
// one layer: the base's attention and norms, and experts that are copies of the MLPs of all of
// them. The other layers get N copies of their own MLP as experts, or stay dense.
#ifndef MODEL_FUSION_H
#define MODEL_FUSION_H

#include <stdbool.h>
#include <stdint.h>
#include "base/status.h"
#include "model/config.h"
#include "model/similarity.h"
#include "model/source.h"

typedef enum FusionSelect { SELECT_THRESHOLD, SELECT_BUDGET, SELECT_MANUAL } FusionSelect;

typedef struct FusionBlock {
    int base;      // layer kept (its attention and norms)
    int followers; // n*: layers base+1 .. base+n* lose attention and norms, their MLPs join
    double score;  // NaN where nothing was measured (manual blocks without a similarity)
} FusionBlock;

// The plan: everything surgery needs, and nothing it can derive from the source's config.
typedef struct FusionPlan {
    int num_source_layers;
    int num_blocks;
    FusionBlock blocks[MODEL_MAX_LAYERS]; // by rising base; never overlapping
    int num_experts;                      // N of every MoE layer
    int top_k;                            // k
    int follower_copies;   // M; a block's base MLP is copied N - n*·M times (K, at least 1)
    bool elsewhere_copies; // other layers: N copies of their MLP (else they stay dense)
    double router_std;
    double reinit_ratio; // Drop-Upcycling: share of intermediate channels redrawn per expert
    double copy_noise;   // stddev of noise on copies, relative to the matrix's own stddev
    uint64_t seed;       // at most INT64_MAX, so that JSON holds it
    RouterConfig router;
} FusionPlan;

typedef struct FusionOptions {
    FusionSelect select;
    int prune_layers;                // budget
    double delta, epsilon, lambda;   // threshold: all three; budget: lambda
    int max_block;                   // threshold and budget: most followers of a block
    int protect_first, protect_last; // layers at either end that take no part
    const char *blocks;              // manual: "3+1, 9+2" = base+followers
} FusionOptions;

// Score of the block (base, n followers), the mean of one term per follower:
//   (1/n) Σ_{j=1..n} [ (s_out[base,j] + s_mlp[base,j]) / 2 - lambda·d_norm[base,j] ]
// NaN for a block that the similarity does not hold.
double fusion_block_score(const Similarity *similarity, double lambda, int base, int followers);

// Fills blocks and num_blocks of `plan` (whose other members the caller has set). An impossible
// demand (more than fits, overlap, unknown or protected layer, N < M·n + 1) is STATUS_USAGE; one
// for too many layers says how many could be pruned. `similarity` may be NULL for manual.
//
// threshold: every block whose followers all pass s_out > 1 - delta, s_mlp > 1 - delta and
//   d_norm < epsilon, by falling score, taken while its layers are free.
// budget: of all sets of blocks that prune exactly prune_layers, the one with the greatest
//   Σ n·Score, found exactly. Weighting a block by its n followers makes every pruned layer count
//   once with its own term, so the sum compares sets by the mean similarity per pruned layer.
//   Σ Score would count blocks instead of layers: as scores are near 1, the set with the most
//   blocks would win whatever they hold. delta and epsilon are not asked: the demand is the count.
// manual: the blocks as written.
Status fusion_select(const FusionOptions *options, const Similarity *similarity,
                     FusionPlan *plan) NODISCARD;
// The most layers that blocks of up to max_block followers can prune from `layers` in a row.
int fusion_most_prunable(int layers, int max_block);

// Every rule a plan must keep by itself. `name` opens the message, `code` is what a broken rule
// returns (STATUS_BAD_DATA for a file, STATUS_USAGE for settings).
Status fusion_plan_check(const FusionPlan *plan, const char *name, Status code) NODISCARD;
void fusion_plan_sort(FusionPlan *plan); // blocks by rising base
// STATUS_USAGE when the source has experts already: to be asked before anything is measured.
Status fusion_check_dense(const ModelConfig *source) NODISCARD;
// The fused model's config; STATUS_USAGE when plan and source do not fit together, or the source
// has experts already.
Status fusion_target_config(const FusionPlan *plan, const ModelConfig *source,
                            ModelConfig *out) NODISCARD;
int fusion_target_layers(const FusionPlan *plan);
// The plan as lines of text: layers, blocks, parameter counts total and active. malloc'ed.
Status fusion_plan_text(const FusionPlan *plan, const ModelConfig *source, char **text) NODISCARD;

// Plan files (plan/plan.json, docs/formats.md). What is read has passed fusion_plan_check; blocks
// may be in any order in the file. The file also lists parameter counts total and active, which
// reading ignores: they follow from the rest.
Status fusion_plan_read(const char *path, FusionPlan *out) NODISCARD;
Status fusion_plan_parse(const char *text, size_t bytes, const char *name,
                         FusionPlan *out) NODISCARD; // the fuzz target's entry
Status fusion_plan_write(const FusionPlan *plan, const ModelConfig *source,
                         const char *path) NODISCARD;

// Surgery as a view: answers for every tensor of the fused model from `source` (kept, not owned).
// Values are a pure function of source, plan and tensor name, so reading in pieces or twice is
// the same as reading once. Not for several threads at once.
Status fusion_source(const FusionPlan *plan, TensorSource *source, TensorSource **out) NODISCARD;

#endif
