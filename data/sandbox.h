// Runs untrusted parsing in a child process: a crash, a hang or a memory blow-up of a library on a
// hostile file becomes an error message in the parent.
#ifndef DATA_SANDBOX_H
#define DATA_SANDBOX_H

#include <stdbool.h>
#include <stddef.h>
#include "base/status.h"

enum { SANDBOX_TEXT_MAX = 1024 };

// How one item ended: what the task returned, or STATUS_BAD_DATA with what killed the child, or
// STATUS_INTERNAL when somebody else did.
typedef struct SandboxVerdict {
    Status code;
    bool died; // the message says how, not over what
    char message[SANDBOX_TEXT_MAX];
} SandboxVerdict;

// Examines item `index` and fills `result` (plain data without pointers). Runs in the child.
typedef Status (*SandboxTask)(const void *context, int index, void *result);

typedef struct SandboxLimits {
    unsigned seconds;    // wall-clock time per item
    size_t memory_bytes; // address space beyond what the process already has
} SandboxLimits;

// Runs the task for items 0..count-1, in one child as long as it survives and a new one after an
// item killed it. results holds count items of result_bytes; those whose verdict is not STATUS_OK
// are zeroed. Fails only when no child can be started.
//
// The child is a fork and calls nothing but the task, pipe writes and _exit. Other threads of the
// parent do not exist in it, so a lock that one of them held at the fork stays held for ever; the
// C library makes malloc safe, and the time limit ends whatever else may happen. Call it early:
// forking copies page tables, which takes long once gigabytes are allocated.
Status sandbox_run(SandboxTask task, const void *context, int count, const SandboxLimits *limits,
                   size_t result_bytes, void *results, SandboxVerdict *verdicts) NODISCARD;

#endif
