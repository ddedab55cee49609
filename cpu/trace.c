// Time on the CPU backend. An op has ended when it returns, so a stamp is the clock as it stands;
// there is no tool to name ranges for.
#include <stdlib.h>
#include "base/clock.h"
#include "cpu/cpu.h"

static Status grow_stamps(CpuBackend *cpu, int64_t slot) {
    int64_t count = max_i64(slot + 1, 2 * cpu->num_stamps);
    int64_t *stamps = realloc(cpu->stamps_ns, (size_t)count * sizeof *stamps);
    if (!stamps) FAIL(STATUS_INTERNAL, "out of memory for %lld time stamps", (long long)count);
    cpu->stamps_ns = stamps;
    cpu->num_stamps = count;
    return STATUS_OK;
}

Status cpu_timestamp(Backend *backend, int64_t slot) {
    CpuBackend *cpu = (CpuBackend *)backend;
    INVARIANT(slot >= 0);
    if (slot >= cpu->num_stamps) TRY(grow_stamps(cpu, slot));
    cpu->stamps_ns[slot] = clock_monotonic_ns();
    return STATUS_OK;
}

Status cpu_elapsed_ms(Backend *backend, int64_t from, int64_t to, double *ms) {
    const CpuBackend *cpu = (const CpuBackend *)backend;
    INVARIANT(from >= 0 && from < cpu->num_stamps && to >= 0 && to < cpu->num_stamps);
    *ms = (double)(cpu->stamps_ns[to] - cpu->stamps_ns[from]) * 1e-6;
    return STATUS_OK;
}

void cpu_range(Backend *backend, const char *name) {
    (void)backend;
    (void)name;
}
