// Creating the GPU backend: the only header of cuda/ that other rooms include.
#ifndef CUDA_BACKEND_H
#define CUDA_BACKEND_H

#include <stdbool.h>
#include "base/status.h"
#include "model/backend.h"
#include "model/communicator.h"

typedef struct CudaOptions {
    int device;
    bool fp32;        // every op in fp32 (no TF32), for tests
    bool graphs;      // can_capture
    bool any_order;   // attention's backward may add in any order: faster, but new bits each run
    DType grad_dtype; // of weight gradients: F32, or BF16 without fp32; the routers' are always F32
} CudaOptions;

// A GPU is in this machine, whether it can be used or not.
bool backend_cuda_present(void);
// Those that this process sees (CUDA_VISIBLE_DEVICES); 0 where none can be used.
int backend_cuda_count(void);
// STATUS_USAGE with what to do when there is no device, the driver is too old, or this build has
// no code for the device.
Status backend_cuda_check(int device) NODISCARD;
// Checks the device, too.
Status backend_cuda(const CudaOptions *options, Backend **out) NODISCARD;

// --- communicator.cu: model/communicator.h over NCCL ---------------------------------------------

enum { CUDA_COMMUNICATOR_ID_BYTES = 128 };
// What one rank makes and all ranks need to find each other.
Status communicator_nccl_id(unsigned char id[CUDA_COMMUNICATOR_ID_BYTES]) NODISCARD;
// All ranks call this with the same id. Waits for them, at most options->timeout_seconds.
// options->tree is refused (STATUS_USAGE). links->sockets, over which ranks notice that one has
// died, are taken over on success; they may be NULL.
Status communicator_nccl(Backend *backend, const unsigned char id[CUDA_COMMUNICATOR_ID_BYTES],
                         const CommunicatorLinks *links, const CommunicatorOptions *options,
                         Communicator **out) NODISCARD;
// Without it the functions above fail and say so.
bool communicator_nccl_built(void);

#endif
