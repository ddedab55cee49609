// Counter-based random numbers (Philox4x32-10, Salmon et al., SC'11): the value at (seed, stream,
// index) is a pure function, so results never depend on thread count, call order or resume.
#ifndef BASE_RANDOM_H
#define BASE_RANDOM_H

#include <stddef.h>
#include <stdint.h>

// Four 32-bit words for counter (stream, index) under key seed.
void random_block(uint64_t seed, uint64_t stream, uint64_t index, uint32_t out[4]);
uint64_t random_u64(uint64_t seed, uint64_t stream, uint64_t index);
double random_uniform(uint64_t seed, uint64_t stream, uint64_t index); // [0, 1)
// out[i] = mean + stddev * z(seed, stream, first + i), z standard normal (Box-Muller on one block
// per two values).
void random_normal_fill(float *out, size_t count, uint64_t seed, uint64_t stream, uint64_t first,
                        float mean, float stddev);
// A stream number from a name (FNV-1a, 64 bit), so that each tensor has its own.
uint64_t random_stream(const char *name);

#endif
