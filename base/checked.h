// Checked arithmetic for every size that comes from a file or a recipe (DESIGN.md rule 2).
// Each function returns false on overflow and leaves *out unspecified.
#ifndef BASE_CHECKED_H
#define BASE_CHECKED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

static inline bool checked_add(uint64_t a, uint64_t b, uint64_t *out) {
    return !__builtin_add_overflow(a, b, out);
}

static inline bool checked_mul(uint64_t a, uint64_t b, uint64_t *out) {
    return !__builtin_mul_overflow(a, b, out);
}

// Rounds up to a multiple of `unit` (> 0). Rounding is arithmetic too: it can overflow.
static inline bool checked_round_up(uint64_t a, uint64_t unit, uint64_t *out) {
    uint64_t padded;
    if (!checked_add(a, unit - 1, &padded)) return false;
    *out = padded / unit * unit;
    return true;
}

// For sizes that the program computed itself from validated parts.
static inline uint64_t round_up(uint64_t a, uint64_t unit) {
    return (a + unit - 1) / unit * unit;
}

#endif
