// Choosing the backend.
//
// `auto` takes the GPU where there is one. A GPU that is there but cannot be used (old driver,
// unknown architecture) is an error in `auto`, too: a run that quietly took the CPU would be found
// out days later. Only a machine without any GPU, or a build without CUDA, computes on the CPU
// without being told to.
#include "train/device.h"

#include <string.h>
#include "train/recipe.h"
#ifdef D2M_HAVE_CUDA
#include "cuda/backend.h"
#endif

#ifdef D2M_HAVE_CUDA

_Static_assert((int)DEVICE_ID_BYTES == (int)CUDA_COMMUNICATOR_ID_BYTES, "one id, two headers");

const char *device_backends(void) {
    return "cpu, cuda";
}

static bool takes_gpu(int choice) {
    return choice == DEVICE_CUDA || (choice == DEVICE_AUTO && backend_cuda_present());
}

static int count_gpus(void) {
    return communicator_nccl_built() ? backend_cuda_count() : 1;
}

static Status connect_gpus(Backend *backend, const unsigned char *id,
                           const CommunicatorLinks *links, const CommunicatorOptions *options,
                           Communicator **out) {
    return communicator_nccl(backend, id, links, options, out);
}

static Status make_gpu_id(unsigned char *id) {
    return communicator_nccl_id(id);
}

static Status with_choice(Status status, int choice) {
    if (status == STATUS_OK) return status;
    return status_prefix(status, "run.device = %s: ", choice == DEVICE_AUTO ? "auto" : "cuda");
}

// A scheduler may show each rank all GPUs of the machine, or one of its own.
static Status find_gpu(const DeviceOptions *options, int *gpu) {
    const int count = backend_cuda_count();
    *gpu = count == 1 ? 0 : options->local_rank;
    if (*gpu < count || *gpu == 0) return STATUS_OK; // with none at all others know what to say
    FAIL(STATUS_USAGE,
         "local rank %d, but only %d GPUs are visible; start at most that many ranks "
         "on a machine",
         options->local_rank, count);
}

static Status check_gpu(const DeviceOptions *options) {
    int gpu;
    TRY(find_gpu(options, &gpu));
    return with_choice(backend_cuda_check(gpu), options->choice);
}

static Status open_gpu(const DeviceOptions *options, Backend **out) {
    int gpu;
    TRY(find_gpu(options, &gpu));
    CudaOptions cuda = {.device = gpu,
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

static Status check_gpu(const DeviceOptions *options) {
    (void)options;
    FAIL(STATUS_USAGE, "run.device = cuda: this build has no CUDA backend; use --device cpu, or "
                       "build where CMake finds nvcc");
}

static int count_gpus(void) {
    return 1;
}

// There is no such backend to connect.
static Status connect_gpus(Backend *backend, const unsigned char *id,
                           const CommunicatorLinks *links, const CommunicatorOptions *options,
                           Communicator **out) {
    (void)backend, (void)id, (void)links, (void)options, (void)out;
    INVARIANT(false);
}

static Status make_gpu_id(unsigned char *id) {
    (void)id;
    INVARIANT(false);
}

static Status open_gpu(const DeviceOptions *options, Backend **out) {
    *out = NULL;
    return check_gpu(options);
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
    return takes_gpu(options->choice) ? check_gpu(options) : STATUS_OK;
}

Status device_open(const DeviceOptions *options, Backend **out) {
    *out = NULL;
    TRY(check_gradients(options));
    if (takes_gpu(options->choice)) return open_gpu(options, out);
    return backend_cpu(options->threads, out);
}

int device_count(const DeviceOptions *options) {
    const int count = takes_gpu(options->choice) ? count_gpus() : 1;
    return count > 0 ? count : 1; // with none, that one cannot be opened says why
}

static bool is_gpu(const Backend *backend) {
    return strcmp(backend->name, "cuda") == 0;
}

Status device_communicator_id(const Backend *backend, unsigned char id[DEVICE_ID_BYTES]) {
    memset(id, 0, DEVICE_ID_BYTES);
    return is_gpu(backend) ? make_gpu_id(id) : STATUS_OK;
}

Status device_communicator(Backend *backend, const unsigned char id[DEVICE_ID_BYTES],
                           const CommunicatorLinks *links, const CommunicatorOptions *options,
                           Communicator **out) {
    *out = NULL;
    if (is_gpu(backend)) return connect_gpus(backend, id, links, options, out);
    return communicator_tcp(links, options, out);
}
