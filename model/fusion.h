// Layer-Fusion UpCycling: choosing blocks (METHOD.md §3) and surgery (§4).
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
    double score;  // NaN for manual blocks
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
    uint64_t seed;
    RouterConfig router;
} FusionPlan;

typedef struct FusionOptions {
    FusionSelect select;
    int prune_layers;              // budget
    double delta, epsilon, lambda; // threshold and score
    int max_block;
    int protect_first, protect_last; // layers at either end that take no part
    const char *blocks;              // manual: "3+1, 9+2" = base+followers
} FusionOptions;

// Fills blocks and num_blocks of `plan` (whose other members the caller has set). An impossible
// demand (more than fits, overlap, unknown layer, N < M·n + 1) is STATUS_USAGE and says how many
// layers could be pruned. `similarity` may be NULL for manual.
Status fusion_select(const FusionOptions *options, const Similarity *similarity,
                     FusionPlan *plan) NODISCARD;

// Plan files (plan/plan.json): read, check against the source, write. The file also lists
// parameter counts total and active.
Status fusion_plan_read(const char *path, FusionPlan *out) NODISCARD;
Status fusion_plan_write(const FusionPlan *plan, const ModelConfig *source,
                         const char *path) NODISCARD;
// The fused model's config; fails when plan and source do not fit together.
Status fusion_target_config(const FusionPlan *plan, const ModelConfig *source,
                            ModelConfig *out) NODISCARD;

// Surgery as a view: answers for every tensor of the fused model from `source` (kept, not owned).
// Values are a pure function of source, plan and tensor name, so reading in pieces or twice is
// the same as reading once.
Status fusion_source(const FusionPlan *plan, TensorSource *source, TensorSource **out) NODISCARD;

#endif
