// Memory of the CPU backend: ordinary, zeroed by the kernel when first touched, so that parts of an
// arena that nobody uses cost nothing.
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include "cpu/cpu.h"

// Large blocks start at a multiple of the huge page size and ask for huge pages: a matrix product
// then misses the TLB less, and first touch takes fewer faults.
enum { SMALL_ALIGN = 256, HUGE_PAGE = 2 << 20, LARGE_BYTES = 8 << 20 };

Status cpu_alloc(Backend *backend, size_t bytes, void **out) {
    (void)backend;
    size_t align = bytes >= LARGE_BYTES ? HUGE_PAGE : SMALL_ALIGN;
    // calloc, not aligned_alloc: it knows which pages are zero already. The address to free stands
    // just below the block.
    size_t total;
    char *raw = NULL;
    if (!__builtin_add_overflow(bytes, align + sizeof(void *), &total)) raw = calloc(1, total);
    if (!raw) FAIL(STATUS_INTERNAL, "out of memory: %zu bytes", bytes);
    uintptr_t start = ((uintptr_t)raw + sizeof(void *) + align - 1) / align * align;
    void *block = (void *)start;
    memcpy((char *)block - sizeof raw, &raw, sizeof raw);
    if (align == HUGE_PAGE) // advice: a kernel without huge pages may refuse it
        (void)madvise(block, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
    *out = block;
    return STATUS_OK;
}

void cpu_release(Backend *backend, void *pointer) {
    (void)backend;
    if (!pointer) return;
    void *raw;
    memcpy(&raw, (char *)pointer - sizeof raw, sizeof raw);
    free(raw);
}

enum { COPY_PART = 1 << 20 };

Status cpu_copy(Backend *backend, void *to, const void *from, size_t bytes) {
    int64_t parts = divide_up((int64_t)bytes, COPY_PART);
#pragma omp parallel for num_threads(backend->num_threads) schedule(static) if (parts > 1)
    for (int64_t i = 0; i < parts; i++) {
        size_t begin = (size_t)i * COPY_PART;
        size_t length = bytes - begin < COPY_PART ? bytes - begin : COPY_PART;
        memcpy((char *)to + begin, (const char *)from + begin, length);
    }
    return STATUS_OK;
}

Status cpu_zero(Backend *backend, void *memory, size_t bytes) {
    int64_t parts = divide_up((int64_t)bytes, COPY_PART);
#pragma omp parallel for num_threads(backend->num_threads) schedule(static) if (parts > 1)
    for (int64_t i = 0; i < parts; i++) {
        size_t begin = (size_t)i * COPY_PART;
        memset((char *)memory + begin, 0, bytes - begin < COPY_PART ? bytes - begin : COPY_PART);
    }
    return STATUS_OK;
}
