// NVML's events (train/gpu_events.h).
//
// The prototypes are our own, because the header is not there where a program is built without
// CUDA, and the library not where it runs without a GPU. The event structure is that of
// nvmlEventSetWait_v2.
//
// An Xid is the driver's number for what went wrong (NVIDIA's "Xid Errors"). Some tell of a program
// that did something wrong; others, of a GPU or a link that has to be looked after, and then the
// run is better continued on another node.
#include "train/gpu_events.h"

#include <dlfcn.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "base/clock.h"
#include "base/log.h"

typedef void *NvmlDevice;
typedef void *NvmlEventSet;
typedef struct NvmlEventData {
    NvmlDevice device;
    unsigned long long type, data;
    unsigned int gpu_instance, compute_instance;
} NvmlEventData;

enum {
    NVML_SUCCESS = 0,
    NVML_TIMEOUT = 10,
    DOUBLE_BIT_ECC = 0x2,
    XID_CRITICAL = 0x8,
    WAIT_MS = 500,
    LATE_SECONDS = 2, // a report may come after the call that failed of it
    UUID_TEXT = 96,
    HARDWARE_TEXT = 256,
};

typedef struct Nvml {
    int (*init)(void);
    int (*shutdown)(void);
    int (*count)(unsigned int *);
    int (*handle)(unsigned int, NvmlDevice *);
    int (*uuid)(NvmlDevice, char *, unsigned int);
    int (*set_create)(NvmlEventSet *);
    int (*set_free)(NvmlEventSet);
    int (*register_events)(NvmlDevice, unsigned long long, NvmlEventSet);
    int (*wait)(NvmlEventSet, NvmlEventData *, unsigned int);
} Nvml;

struct GpuEvents {
    void *library;
    Nvml nvml;
    NvmlEventSet set;
    unsigned int num_devices, watched;
    bool say;
    pthread_t thread;
    bool running;
    atomic_bool stop;
    pthread_mutex_t mutex;
    char hardware[HARDWARE_TEXT]; // the first hardware error, "" for none; guarded by mutex
};

// --- What an event means -------------------------------------------------------------------------

typedef struct Xid {
    unsigned int number;
    const char *text;
    bool hardware;
} Xid;

static const Xid xids[] = {
    {13, "graphics engine exception", false},
    {31, "illegal memory access by the program", false},
    {43, "the program's channel was reset", false},
    {45, "the program's channel was cleaned up", false},
    {48, "uncorrectable memory error", true},
    {61, "internal micro-controller halt", true},
    {62, "internal micro-controller halt", true},
    {63, "a memory row was remapped", false},
    {64, "a memory row could not be remapped", true},
    {74, "NVLink error", true},
    {79, "the GPU has fallen off the bus", true},
    {92, "many correctable memory errors", false},
    {94, "contained memory error", true},
    {95, "uncontained memory error", true},
    {119, "the GPU system processor does not answer", true},
    {120, "the GPU system processor failed", true},
};

static const Xid *find_xid(unsigned long long number) {
    for (size_t i = 0; i < sizeof xids / sizeof xids[0]; i++)
        if (xids[i].number == number) return &xids[i];
    return NULL;
}

static void name_gpu(const GpuEvents *events, NvmlDevice device, char *text, size_t room) {
    char host[64] = "", uuid[UUID_TEXT] = "?";
    unsigned int index = 0;
    NvmlDevice other;
    if (gethostname(host, sizeof host - 1) != 0) strcpy(host, "unknown");
    while (index < events->num_devices &&
           (events->nvml.handle(index, &other) != NVML_SUCCESS || other != device))
        index++;
    if (events->nvml.uuid(device, uuid, sizeof uuid) != NVML_SUCCESS) strcpy(uuid, "?");
    snprintf(text, room, "%s, GPU %u (%.95s)", host, index, uuid);
}

static void handle_event(GpuEvents *events, const NvmlEventData *event) {
    char gpu[192], what[HARDWARE_TEXT];
    bool hardware = true;
    name_gpu(events, event->device, gpu, sizeof gpu);
    if (event->type == XID_CRITICAL) {
        const Xid *xid = find_xid(event->data);
        hardware = xid && xid->hardware;
        snprintf(what, sizeof what, "%.191s: Xid %llu%s%s", gpu, event->data, xid ? ", " : "",
                 xid ? xid->text : "");
    } else {
        snprintf(what, sizeof what, "%.191s: uncorrectable (double-bit) memory error", gpu);
    }
    if (events->say)
        log_line(hardware ? LOG_ERROR : LOG_WARN, "%s%s", what,
                 hardware ? "; this GPU needs to be looked after" : "");
    pthread_mutex_lock(&events->mutex);
    if (hardware && !events->hardware[0]) memcpy(events->hardware, what, sizeof events->hardware);
    pthread_mutex_unlock(&events->mutex);
}

static void *listen_to_driver(void *context) {
    GpuEvents *events = context;
    while (!atomic_load(&events->stop)) {
        NvmlEventData event;
        int error = events->nvml.wait(events->set, &event, WAIT_MS);
        if (error == NVML_SUCCESS) {
            handle_event(events, &event);
        } else if (error != NVML_TIMEOUT) {
            log_debug("NVML: waiting for events failed with %d; GPUs are no longer watched", error);
            return NULL;
        }
    }
    return NULL;
}

// --- The library ---------------------------------------------------------------------------------

static bool find_functions(void *library, Nvml *nvml) {
    const struct {
        const char *name;
        void *place;
    } functions[] = {
        {"nvmlInit_v2", &nvml->init},
        {"nvmlShutdown", &nvml->shutdown},
        {"nvmlDeviceGetCount_v2", &nvml->count},
        {"nvmlDeviceGetHandleByIndex_v2", &nvml->handle},
        {"nvmlDeviceGetUUID", &nvml->uuid},
        {"nvmlEventSetCreate", &nvml->set_create},
        {"nvmlEventSetFree", &nvml->set_free},
        {"nvmlDeviceRegisterEvents", &nvml->register_events},
        {"nvmlEventSetWait_v2", &nvml->wait},
    };
    for (size_t i = 0; i < sizeof functions / sizeof functions[0]; i++) {
        void *function = dlsym(library, functions[i].name);
        if (!function) {
            log_debug("NVML has no %s; GPUs are not watched", functions[i].name);
            return false;
        }
        memcpy(functions[i].place, &function, sizeof function);
    }
    return true;
}

// True when at least one GPU reports something.
static bool open_events(GpuEvents *events) {
    const Nvml *nvml = &events->nvml;
    NvmlDevice device;
    if (nvml->count(&events->num_devices) != NVML_SUCCESS) return false;
    if (nvml->set_create(&events->set) != NVML_SUCCESS) return false;
    for (unsigned int i = 0; i < events->num_devices; i++) {
        if (nvml->handle(i, &device) != NVML_SUCCESS) continue;
        // Not every GPU has ECC memory; all have Xids.
        if (nvml->register_events(device, DOUBLE_BIT_ECC | XID_CRITICAL, events->set) ==
                NVML_SUCCESS ||
            nvml->register_events(device, XID_CRITICAL, events->set) == NVML_SUCCESS)
            events->watched++;
    }
    log_debug("NVML: %u of %u GPUs are watched", events->watched, events->num_devices);
    return events->watched > 0;
}

static Status start_thread(GpuEvents *events) {
    sigset_t all, before;
    sigfillset(&all); // signals are the main thread's
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&events->thread, NULL, listen_to_driver, events);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) FAIL(STATUS_INTERNAL, "cannot start the thread that watches GPUs: error %d", error);
    events->running = true;
    return STATUS_OK;
}

Status gpu_events_start(const char *library, bool say, GpuEvents **out) {
    const char *chosen = getenv("DENSE2MOE_NVML");
    *out = NULL;
    if (!library) library = chosen && chosen[0] ? chosen : "libnvidia-ml.so.1";
    void *handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        log_debug("NVML is not here, GPUs are not watched: %s", dlerror());
        return STATUS_OK;
    }
    GpuEvents *events = calloc(1, sizeof *events);
    if (!events) {
        dlclose(handle);
        FAIL(STATUS_INTERNAL, "out of memory for GPU events");
    }
    events->library = handle;
    events->say = say;
    pthread_mutex_init(&events->mutex, NULL);
    Status status = STATUS_OK;
    bool ready = find_functions(handle, &events->nvml) && events->nvml.init() == NVML_SUCCESS;
    if (ready && open_events(events)) status = start_thread(events);
    if (events->running) {
        *out = events;
        return STATUS_OK;
    }
    if (!ready) events->nvml.shutdown = NULL; // nothing to shut down
    gpu_events_stop(events);
    return status;
}

void gpu_events_stop(GpuEvents *events) {
    if (!events) return;
    atomic_store(&events->stop, true);
    if (events->running) pthread_join(events->thread, NULL);
    if (events->set) events->nvml.set_free(events->set);
    if (events->nvml.shutdown) events->nvml.shutdown();
    dlclose(events->library);
    pthread_mutex_destroy(&events->mutex);
    free(events);
}

// --- Blame ---------------------------------------------------------------------------------------

static bool hardware_error(GpuEvents *events, char text[HARDWARE_TEXT]) {
    pthread_mutex_lock(&events->mutex);
    memcpy(text, events->hardware, HARDWARE_TEXT);
    pthread_mutex_unlock(&events->mutex);
    return text[0] != '\0';
}

Status gpu_events_explain(GpuEvents *events, Status failure) {
    const struct timespec pause = {.tv_nsec = 50 * 1000 * 1000};
    char text[HARDWARE_TEXT];
    if (!events || failure != STATUS_INTERNAL) return failure;
    double end = clock_seconds() + LATE_SECONDS;
    while (!hardware_error(events, text)) {
        if (clock_seconds() >= end) return failure;
        nanosleep(&pause, NULL);
    }
    return status_prefix(STATUS_COMMUNICATION, "%s; keep this node out (sbatch --exclude): ", text);
}
