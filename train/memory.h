// What a run will take from the machine and from its GPU, and what they have.
#ifndef TRAIN_MEMORY_H
#define TRAIN_MEMORY_H

#include <stdbool.h>
#include <stdint.h>
#include "train/recipe.h"
#include "train/run.h"

// Two plans, for two memories. Without a GPU everything is in `machine`.
typedef struct RunMemory {
    MemoryPlan machine, gpu;
    uint64_t machine_bytes; // this process may use
    uint64_t gpu_bytes;     // are free
    bool on_gpu;
    int processes; // that share the machine: all ranks, where they are all there
    const char *device_name;
} RunMemory;

// Memory that this process may use: the machine's, or its control group's limit when that is lower.
uint64_t memory_of_machine(void);
// Resident memory of this process now.
uint64_t memory_resident(void);

// The whole of a training run, for rank 0 of `ranks`; the others need no more.
Status run_memory_plan(const Recipe *recipe, Backend *backend, const ModelConfig *config, int ranks,
                       RunMemory *out) NODISCARD;
// The calibration that comes before training when the plan has to be measured; its memory is given
// back before training takes its own.
Status calibration_memory_plan(const Recipe *recipe, Backend *backend, const ModelConfig *seed,
                               RunMemory *out) NODISCARD;
// The export after the last step where ranks have shared out experts: rank 0 takes the whole model,
// when training has given back its memory.
Status export_memory_plan(const Recipe *recipe, Backend *backend, const ModelConfig *config,
                          RunMemory *out) NODISCARD;
static inline bool export_takes_whole_model(const Recipe *recipe) {
    return recipe->export_hf && recipe->parallel_expert > 1;
}
// What to do where that does not fit.
#define EXPORT_ELSEWHERE                                                                           \
    "run the same command once more with --device cpu --processes 1 --set parallel.expert=1 "      \
    "--set train.grad_dtype=f32 when training is done, or set export.hf = false"
// Of the machine's memory, by all its processes together.
uint64_t memory_on_machine(const RunMemory *memory);
bool memory_fits(const RunMemory *memory);
// Bytes of the items that make up the training state: weights, gradients, AdamW's moments.
uint64_t memory_training_state(const RunMemory *memory);

// Tries what costs least first: a smaller micro-batch, recomputing activations, bf16 for AdamW's
// moments and for gradients, each with what came before. True when one fits:
// `variant` (in: the recipe), `change` and `memory` say which. The model stays as it is.
enum { MEMORY_CHANGE_MAX = 160 };
bool memory_variant(Recipe *variant, Backend *backend, const ModelConfig *config, int ranks,
                    char change[MEMORY_CHANGE_MAX], RunMemory *memory);

// Before training takes its memory. Refuses what the GPU has no room for, with the table and what
// to change; warns where the machine has too little, since the system would kill the run later,
// without a word.
Status memory_check(const Recipe *recipe, Backend *backend, const ModelConfig *config,
                    int ranks) NODISCARD;
Status memory_check_calibration(const Recipe *recipe, Backend *backend,
                                const ModelConfig *seed) NODISCARD;

#endif
