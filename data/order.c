// Feistel network with cycle walking.
//
// A Feistel network splits a number into two halves and, round after round, adds a keyed function
// of one half to the other. Whatever that function is, the result is a bijection of the numbers of
// 2·half_bits bits, because each round can be undone. It is the smallest such domain that holds
// `count` elements; an image outside 0..count-1 is fed back in until one falls inside ("cycle
// walking"). The walk ends, since it follows a cycle that contains the starting point, and stays a
// bijection; with a domain below 4·count it takes less than four steps on average.
//
// So the sample at any position of any epoch is a pure function of (seed, source, epoch, position):
// nothing is stored, shuffled or replayed when a run resumes.
#include "data/order.h"

#include "base/random.h"

// Four rounds make a strong permutation of large domains (Luby and Rackoff); small domains, where
// halves have few bits, need more. A round costs one Philox block, 30 ns: eight are no burden.
enum { ROUNDS = 8 };

void order_init(Order *order, uint64_t count, uint64_t seed, uint64_t source, uint64_t epoch) {
    uint64_t source_key = random_u64(seed, random_stream("data order"), source);
    order->count = count;
    order->key = random_u64(source_key, random_stream("epoch"), epoch);
    order->half_bits = 1;
    while ((UINT64_C(1) << (2 * order->half_bits)) < count) order->half_bits++;
}

static uint64_t permute(const Order *order, uint64_t value) {
    uint64_t mask = (UINT64_C(1) << order->half_bits) - 1;
    uint64_t left = value >> order->half_bits, right = value & mask;
    for (uint64_t round = 0; round < ROUNDS; round++) {
        uint64_t mixed = left ^ (random_u64(order->key, round, right) & mask);
        left = right;
        right = mixed;
    }
    return left << order->half_bits | right;
}

uint64_t order_at(const Order *order, uint64_t index) {
    uint64_t value = index;
    do {
        value = permute(order, value);
    } while (value >= order->count);
    return value;
}
