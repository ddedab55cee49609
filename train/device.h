// What a program computes on: `auto`, `cpu` or `cuda` (DEVICE_* of train/recipe.h) to a backend.
#ifndef TRAIN_DEVICE_H
#define TRAIN_DEVICE_H

#include <stdbool.h>
#include "model/backend.h"

typedef struct DeviceOptions {
    int choice;       // DEVICE_*
    int threads;      // of the CPU backend, as for backend_cpu
    bool fp32;        // on a GPU: fp32 instead of bf16
    bool graphs;      // on a GPU: dense passes are recorded and replayed
    bool any_order;   // on a GPU: not the same bits in every run
    DType grad_dtype; // of weight gradients: F32, or BF16 on a GPU in bf16
} DeviceOptions;

// "cpu", or "cpu, cuda": what this build has.
const char *device_backends(void);
// Fails when the options are not possible. Opens nothing, so it can be asked before all else.
Status device_check(const DeviceOptions *options) NODISCARD;
Status device_open(const DeviceOptions *options, Backend **out) NODISCARD;

#endif
