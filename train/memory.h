// What a run will take from the machine, and what the machine has.
#ifndef TRAIN_MEMORY_H
#define TRAIN_MEMORY_H

#include <stdint.h>
#include "train/run.h"

// Memory that this process may use: the machine's, or its control group's limit when that is lower.
uint64_t memory_of_machine(void);
// Resident memory of this process now.
uint64_t memory_resident(void);

// The calibration that comes before training when the plan has to be measured; its memory is given
// back before training takes its own.
Status calibration_memory_plan(const Recipe *recipe, Backend *backend, const ModelConfig *seed,
                               MemoryPlan *out) NODISCARD;

// Bytes of the plan's items that make up the training state: weights, gradients, AdamW's moments.
uint64_t memory_training_state(const MemoryPlan *plan);

// Warns when the run will take more than there is; the system would kill it later, without a word.
Status memory_warn(const Recipe *recipe, Backend *backend, const ModelConfig *config) NODISCARD;

#endif
