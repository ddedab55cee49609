// A keyed permutation of 0..count-1 in O(1) memory: the order of a source's windows in one epoch.
#ifndef DATA_ORDER_H
#define DATA_ORDER_H

#include <stdint.h>

typedef struct Order {
    uint64_t count;
    uint64_t key;
    int half_bits; // the network permutes numbers of 2 * half_bits bits
} Order;

// count >= 1 and below 2^62.
void order_init(Order *order, uint64_t count, uint64_t seed, uint64_t source, uint64_t epoch);
// The element at `index` (< count). A bijection for every key.
uint64_t order_at(const Order *order, uint64_t index);

#endif
