// Philox4x32-10: ten rounds of two 32x32->64 multiplications that turn a 128-bit counter into 128
// random bits (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11).
// The index is the low half of the counter and the stream its high half.
#include "base/random.h"

#include <math.h>

enum { ROUNDS = 10 };
static const uint32_t MULTIPLIER[2] = {0xD2511F53u, 0xCD9E8D57u};
static const uint32_t KEY_STEP[2] = {0x9E3779B9u, 0xBB67AE85u}; // golden ratio, sqrt(3) - 1

void random_block(uint64_t seed, uint64_t stream, uint64_t index, uint32_t out[4]) {
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    uint32_t c0 = (uint32_t)index, c1 = (uint32_t)(index >> 32);
    uint32_t c2 = (uint32_t)stream, c3 = (uint32_t)(stream >> 32);
    for (int round = 0; round < ROUNDS; round++) {
        uint64_t a = (uint64_t)MULTIPLIER[0] * c0, b = (uint64_t)MULTIPLIER[1] * c2;
        uint32_t n0 = (uint32_t)(b >> 32) ^ c1 ^ key[0], n2 = (uint32_t)(a >> 32) ^ c3 ^ key[1];
        c0 = n0, c1 = (uint32_t)b, c2 = n2, c3 = (uint32_t)a;
        key[0] += KEY_STEP[0];
        key[1] += KEY_STEP[1];
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

static uint64_t join(uint32_t low, uint32_t high) {
    return (uint64_t)high << 32 | low;
}

uint64_t random_u64(uint64_t seed, uint64_t stream, uint64_t index) {
    uint32_t words[4];
    random_block(seed, stream, index, words);
    return join(words[0], words[1]);
}

// The top 53 bits, all that a double holds.
static double unit(uint64_t bits) {
    return (double)(bits >> 11) * 0x1p-53;
}

double random_uniform(uint64_t seed, uint64_t stream, uint64_t index) {
    return unit(random_u64(seed, stream, index));
}

// Both values of one block. 1 - u is in (0, 1], so the logarithm is finite.
static void normal_pair(uint64_t seed, uint64_t stream, uint64_t block, double z[2]) {
    uint32_t words[4];
    random_block(seed, stream, block, words);
    double radius = sqrt(-2.0 * log(1.0 - unit(join(words[0], words[1]))));
    double angle = 2.0 * M_PI * unit(join(words[2], words[3]));
    z[0] = radius * cos(angle);
    z[1] = radius * sin(angle);
}

void random_normal_fill(float *out, size_t count, uint64_t seed, uint64_t stream, uint64_t first,
                        float mean, float stddev) {
    double z[2] = {0, 0};
    for (size_t i = 0; i < count; i++) {
        uint64_t position = first + i;
        if (i == 0 || position % 2 == 0) normal_pair(seed, stream, position / 2, z);
        out[i] = (float)(mean + stddev * z[position % 2]);
    }
}

uint64_t random_stream(const char *name) {
    uint64_t hash = 0xcbf29ce484222325u; // FNV-1a's offset basis and prime
    for (; *name; name++) hash = (hash ^ (unsigned char)*name) * 0x100000001b3u;
    return hash;
}
