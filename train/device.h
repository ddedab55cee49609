// What a program computes on: `auto`, `cpu` or `cuda` (DEVICE_* of train/recipe.h) to a backend.
#ifndef TRAIN_DEVICE_H
#define TRAIN_DEVICE_H

#include <stdbool.h>
#include "model/backend.h"
#include "model/communicator.h"

typedef struct DeviceOptions {
    int choice;       // DEVICE_*
    int local_rank;   // among the ranks of this machine: takes the visible GPU of that number
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
// How many ranks could each have a device of their own here: the visible GPUs where the choice
// takes GPUs and the build has what connects them, else 1. The machine's memory is one device.
int device_count(const DeviceOptions *options);
// The communicator between the ranks' backends (all of one kind), which find each other over the
// links; a GPU's over `id`, which one rank makes with device_communicator_id. Owns the links'
// sockets when it succeeds.
enum { DEVICE_ID_BYTES = 128 };
Status device_communicator_id(const Backend *backend, unsigned char id[DEVICE_ID_BYTES]) NODISCARD;
Status device_communicator(Backend *backend, const unsigned char id[DEVICE_ID_BYTES],
                           const CommunicatorLinks *links, const CommunicatorOptions *options,
                           Communicator **out) NODISCARD;

#endif
