// How many GPUs there are, for tests whose process must not touch a device: CUDA does not survive a
// fork, and such a test forks its ranks.
#ifndef TESTS_GPU_COUNT_H
#define TESTS_GPU_COUNT_H

#include <sys/wait.h>
#include <unistd.h>
#include "cuda/backend.h"

static inline int gpu_count(void) {
    const pid_t child = fork();
    int status = 0;
    if (child == 0) _exit(backend_cuda_count());
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 0;
}

#endif
