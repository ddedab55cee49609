// A stand-in for the driver's NVML library, with two GPUs. FAKE_NVML is what they report:
// "INDEX:TYPE:DATA ..." one event after the other, then nothing more. "none" is a machine without
// GPUs, "broken" a driver that does not answer.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, UNKNOWN = 999, TIMEOUT = 10, NOT_SUPPORTED = 3 };

typedef struct Data {
    void *device;
    unsigned long long type, data;
    unsigned int gpu_instance, compute_instance;
} Data;

static char gpus[2], set;
static int given;

static int is(const char *what) {
    const char *script = getenv("FAKE_NVML");
    return script && strcmp(script, what) == 0;
}

int nvmlInit_v2(void);
int nvmlInit_v2(void) {
    return is("broken") ? UNKNOWN : SUCCESS;
}

int nvmlShutdown(void);
int nvmlShutdown(void) {
    given = 0;
    return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned int *count);
int nvmlDeviceGetCount_v2(unsigned int *count) {
    *count = is("none") ? 0 : 2;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device);
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device) {
    *device = &gpus[index];
    return SUCCESS;
}

int nvmlDeviceGetUUID(void *device, char *text, unsigned int room);
int nvmlDeviceGetUUID(void *device, char *text, unsigned int room) {
    snprintf(text, room, "GPU-fake-%d", device == &gpus[1]);
    return SUCCESS;
}

int nvmlEventSetCreate(void **out);
int nvmlEventSetCreate(void **out) {
    *out = &set;
    return SUCCESS;
}

int nvmlEventSetFree(void *old);
int nvmlEventSetFree(void *old) {
    return old == &set ? SUCCESS : UNKNOWN;
}

// GPU 0 has no ECC memory.
int nvmlDeviceRegisterEvents(void *device, unsigned long long types, void *to);
int nvmlDeviceRegisterEvents(void *device, unsigned long long types, void *to) {
    if (to != &set) return UNKNOWN;
    return device == &gpus[0] && (types & 2) ? NOT_SUPPORTED : SUCCESS;
}

int nvmlEventSetWait_v2(void *from, Data *out, unsigned int ms);
int nvmlEventSetWait_v2(void *from, Data *out, unsigned int ms) {
    const char *script = getenv("FAKE_NVML");
    unsigned int index;
    if (from != &set) return UNKNOWN;
    usleep(100000); // a report takes its time
    for (int i = 0; script && i < given; i++) script = strchr(script + 1, ' ');
    if (!script || sscanf(script, " %u:%llu:%llu", &index, &out->type, &out->data) != 3) {
        usleep(ms * 1000);
        return TIMEOUT;
    }
    out->device = &gpus[index];
    given++;
    return SUCCESS;
}
