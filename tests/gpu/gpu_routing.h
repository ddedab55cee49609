// A routing on both sides, for the tests of the router and of the expert MLPs.
#ifndef TESTS_GPU_ROUTING_H
#define TESTS_GPU_ROUTING_H

#include "tests/gpu/gpu_test.h"

typedef struct RoutingPair {
    Backend *backend;
    int64_t tokens;
    int experts, k;
    Routing cpu, gpu;
} RoutingPair;

// The arrays of a routing: where they lie on both sides and how large they are.
typedef struct RoutingArray {
    void **cpu, **gpu;
    size_t bytes;
} RoutingArray;
enum { ROUTING_ARRAYS = 7 };

static inline void routing_arrays(RoutingPair *r, RoutingArray out[ROUTING_ARRAYS]) {
    const size_t tokens = (size_t)r->tokens, slots = tokens * (size_t)r->k;
    const size_t experts = (size_t)r->experts;
    const RoutingArray arrays[ROUTING_ARRAYS] = {
        {(void **)&r->cpu.probabilities, (void **)&r->gpu.probabilities, tokens * experts * 4},
        {(void **)&r->cpu.log_sum_exp, (void **)&r->gpu.log_sum_exp, tokens * 4},
        {(void **)&r->cpu.expert, (void **)&r->gpu.expert, slots * 4},
        {(void **)&r->cpu.gate, (void **)&r->gpu.gate, slots * 4},
        {(void **)&r->cpu.slot_of_row, (void **)&r->gpu.slot_of_row, slots * 4},
        {(void **)&r->cpu.row_of_slot, (void **)&r->gpu.row_of_slot, slots * 4},
        {(void **)&r->cpu.expert_begin, (void **)&r->gpu.expert_begin, (experts + 1) * 4}};
    memcpy(out, arrays, sizeof arrays);
}

// GPU := CPU, or back.
static inline void routing_upload(RoutingPair *r) {
    RoutingArray arrays[ROUTING_ARRAYS];
    routing_arrays(r, arrays);
    for (int i = 0; i < ROUTING_ARRAYS; i++)
        GPU_OK(
            r->backend->ops->upload(r->backend, *arrays[i].gpu, *arrays[i].cpu, arrays[i].bytes));
}
static inline void routing_download(RoutingPair *r) {
    RoutingArray arrays[ROUTING_ARRAYS];
    routing_arrays(r, arrays);
    for (int i = 0; i < ROUTING_ARRAYS; i++)
        GPU_OK(
            r->backend->ops->download(r->backend, *arrays[i].cpu, *arrays[i].gpu, arrays[i].bytes));
}

// Every byte 0xFF on both sides: floats are NaN, indices -1.
static inline RoutingPair routing_poisoned(Backend *backend, int64_t tokens, int experts, int k) {
    RoutingPair r = {.backend = backend, .tokens = tokens, .experts = experts, .k = k};
    RoutingArray arrays[ROUTING_ARRAYS];
    routing_arrays(&r, arrays);
    for (int i = 0; i < ROUTING_ARRAYS; i++) {
        *arrays[i].cpu = malloc(arrays[i].bytes);
        memset(*arrays[i].cpu, 0xFF, arrays[i].bytes);
        GPU_OK(backend->ops->alloc(backend, arrays[i].bytes, arrays[i].gpu));
    }
    routing_upload(&r);
    return r;
}
static inline void routing_free(RoutingPair *r) {
    RoutingArray arrays[ROUTING_ARRAYS];
    routing_arrays(r, arrays);
    for (int i = 0; i < ROUTING_ARRAYS; i++) {
        free(*arrays[i].cpu);
        r->backend->ops->release(r->backend, *arrays[i].gpu);
    }
}

// Fills the grouping from `expert`, which is set, and uploads all: a plain counting sort.
static inline void routing_group(RoutingPair *r) {
    const int64_t slots = r->tokens * r->k;
    int32_t row = 0;
    for (int e = 0; e < r->experts; e++) {
        r->cpu.expert_begin[e] = row;
        for (int64_t slot = 0; slot < slots; slot++) {
            if (r->cpu.expert[slot] != e) continue;
            r->cpu.slot_of_row[row] = (int32_t)slot;
            r->cpu.row_of_slot[slot] = row++;
        }
    }
    r->cpu.expert_begin[r->experts] = row;
    routing_upload(r);
}

// Who gets the tokens.
typedef enum Spread {
    SPREAD_EVEN, // every expert about the same
    SPREAD_ONE,  // all tokens to the last experts
    SPREAD_HALF, // half of all first choices to expert 0
    SPREAD_GAPS, // odd experts get none (with k <= N/2)
} Spread;

// Distinct random experts per token, random gates of size 1, probabilities poisoned.
static inline void routing_random(RoutingPair *r, Spread spread) {
    for (int64_t t = 0; t < r->tokens; t++) {
        const int step = spread == SPREAD_GAPS ? 2 : 1, choices = (r->experts + step - 1) / step;
        int first = gpu_random_int(choices);
        if (spread == SPREAD_ONE) first = r->experts - r->k;
        if (spread == SPREAD_HALF && t % 2 == 0) first = 0;
        for (int j = 0; j < r->k; j++) {
            r->cpu.expert[t * r->k + j] = (first + j) % choices * step;
            r->cpu.gate[t * r->k + j] = 0.5f + (float)gpu_random_int(1000) / 1000.0f;
        }
    }
    routing_group(r);
}

#endif
