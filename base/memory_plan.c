// The allocation list and its human-readable sizes.
#include "base/memory_plan.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include "base/checked.h"

static Status find_or_add(MemoryPlan *plan, const char *name, MemoryItem **out) {
    for (int i = 0; i < plan->count; i++) {
        if (strcmp(plan->items[i].name, name) == 0) {
            *out = &plan->items[i];
            return STATUS_OK;
        }
    }
    INVARIANT(plan->count < MEMORY_PLAN_MAX);
    INVARIANT(strlen(name) < MEMORY_NAME_MAX);
    *out = &plan->items[plan->count++];
    snprintf((*out)->name, sizeof(*out)->name, "%s", name);
    (*out)->bytes = 0;
    return STATUS_OK;
}

Status memory_plan_add(MemoryPlan *plan, const char *name, uint64_t bytes) {
    uint64_t total;
    if (!checked_add(memory_plan_total(plan), bytes, &total)) {
        FAIL(STATUS_USAGE, "memory plan: adding %" PRIu64 " bytes for %s exceeds 2^64", bytes,
             name);
    }
    MemoryItem *item;
    TRY(find_or_add(plan, name, &item));
    item->bytes += bytes; // cannot overflow: the total does not
    return STATUS_OK;
}

uint64_t memory_plan_total(const MemoryPlan *plan) {
    uint64_t total = 0;
    for (int i = 0; i < plan->count; i++) total += plan->items[i].bytes;
    return total;
}

const char *bytes_text(uint64_t bytes, char text[BYTES_TEXT_SIZE]) {
    static const char *const units[] = {"B", "kB", "MB", "GB", "TB", "PB", "EB"};
    double value = (double)bytes;
    size_t unit = 0;
    // 999.5 would print as 1000: it belongs to the next unit.
    while (value >= 999.5) value /= 1000, unit++;
    int decimals = unit == 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
    snprintf(text, BYTES_TEXT_SIZE, "%.*f %s", decimals, value, units[unit]);
    return text;
}
