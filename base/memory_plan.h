// A list of what will be allocated, item by item, before anything is. `train --dry-run` prints it,
// and the run checks it against the machine.
#ifndef BASE_MEMORY_PLAN_H
#define BASE_MEMORY_PLAN_H

#include <stdint.h>
#include "base/status.h"

enum { MEMORY_PLAN_MAX = 48, MEMORY_NAME_MAX = 64 };

typedef struct MemoryItem {
    char name[MEMORY_NAME_MAX];
    uint64_t bytes;
} MemoryItem;

typedef struct MemoryPlan {
    MemoryItem items[MEMORY_PLAN_MAX];
    int count;
} MemoryPlan;

// Adds to the item of that name, or makes a new one. Fails on overflow or a full plan.
Status memory_plan_add(MemoryPlan *plan, const char *name, uint64_t bytes) NODISCARD;
uint64_t memory_plan_total(const MemoryPlan *plan);
// "1.66 GB", "12.0 MB": decimal units, three digits. Returns `text`.
enum { BYTES_TEXT_SIZE = 24 };
const char *bytes_text(uint64_t bytes, char text[BYTES_TEXT_SIZE]);

#endif
