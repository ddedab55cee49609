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

static Status check_gpu(int choice) {
    return with_choice(backend_cuda_check(GPU), choice);
}

static Status open_gpu(const DeviceOptions *options, Backend **out) {
    CudaOptions cuda = {.device = GPU,
                        .fp32 = options->fp32,
                        .graphs = options->graphs,
                        .any_order = options->any_order,
                        .grad_dtype = options->grad_dtype};
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

static Status check_gpu(int choice) {
    (void)choice;
    FAIL(STATUS_USAGE, "run.device = cuda: this build has no CUDA backend; use --device cpu, or "
                       "build where CMake finds nvcc");
}

static Status open_gpu(const DeviceOptions *options, Backend **out) {
    *out = NULL;
    return check_gpu(options->choice);
}

#endif

// Sums in bf16 are for what a GPU computes in bf16; they would only make fp32 arithmetic worse.
static Status check_gradients(const DeviceOptions *options) {
    if (options->grad_dtype == DTYPE_F32) return STATUS_OK;
    if (!takes_gpu(options->choice))
        FAIL(STATUS_USAGE, "train.grad_dtype = bf16 needs a GPU, and this run computes on the CPU; "
                           "set train.grad_dtype = f32");
    if (options->fp32)
        FAIL(STATUS_USAGE,
             "train.grad_dtype = bf16 needs run.gpu_precision = bf16, found fp32; set "
             "train.grad_dtype = f32");
    return STATUS_OK;
}

Status device_check(const DeviceOptions *options) {
    TRY(check_gradients(options));
    return takes_gpu(options->choice) ? check_gpu(options->choice) : STATUS_OK;
}

Status device_open(const DeviceOptions *options, Backend **out) {
    *out = NULL;
    TRY(check_gradients(options));
    if (takes_gpu(options->choice)) return open_gpu(options, out);
    return backend_cpu(options->threads, out);
}
