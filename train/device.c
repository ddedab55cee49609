// Choosing the backend.
//
// `auto` takes the GPU where there is one. A GPU that is there but cannot be used (old driver,
// unknown architecture) is an error in `auto`, too: a run that quietly took the CPU would be found
// out days later. Only a machine without any GPU, or a build without CUDA, computes on the CPU
// without being told to.
#include "train/device.h"

#include "train/recipe.h"
#ifdef D2M_HAVE_CUDA
#include "cuda/backend.h"
#endif

enum { GPU = 0 }; // CUDA_VISIBLE_DEVICES says which one that is

#ifdef D2M_HAVE_CUDA

const char *device_backends(void) {
    return "cpu, cuda";
}

static bool takes_gpu(int choice) {
    return choice == DEVICE_CUDA || (choice == DEVICE_AUTO && backend_cuda_present());
}

static Status with_choice(Status status, int choice) {
    if (status == STATUS_OK) return status;
    return status_prefix(status, "run.device = %s: ", choice == DEVICE_AUTO ? "auto" : "cuda");
}

Status device_check(int choice) {
    return takes_gpu(choice) ? with_choice(backend_cuda_check(GPU), choice) : STATUS_OK;
}

static Status open_gpu(const DeviceOptions *options, Backend **out) {
    CudaOptions cuda = {.device = GPU,
                        .fp32 = options->fp32,
                        .graphs = options->graphs,
                        .any_order = options->any_order};
    TRY(with_choice(backend_cuda(&cuda, out), options->choice));
    return STATUS_OK;
}

#else

const char *device_backends(void) {
    return "cpu";
}

static bool takes_gpu(int choice) {
    return choice == DEVICE_CUDA;
}

Status device_check(int choice) {
    if (!takes_gpu(choice)) return STATUS_OK;
    FAIL(STATUS_USAGE, "run.device = cuda: this build has no CUDA backend; use --device cpu, or "
                       "build where CMake finds nvcc");
}

static Status open_gpu(const DeviceOptions *options, Backend **out) {
    *out = NULL;
    return device_check(options->choice);
}

#endif

Status device_open(const DeviceOptions *options, Backend **out) {
    *out = NULL;
    if (takes_gpu(options->choice)) return open_gpu(options, out);
    return backend_cpu(options->threads, out);
}
