// Which source the next sample comes from: exact shares by an integer rule, no random numbers.
#ifndef DATA_MIXTURE_H
#define DATA_MIXTURE_H

#include <stdint.h>
#include "base/status.h"
#include "data/loader.h"

typedef struct Mixture {
    int num_sources;
    uint64_t weight[LOADER_MAX_SOURCES]; // shares of `total`, each at least 1
    uint64_t total;
} Mixture;

// Weights are relative; each must be finite and positive.
Status mixture_init(Mixture *mixture, const double *weights, int num_sources) NODISCARD;
// The source of the next sample, given how many each source has given so far (from the beginning,
// all by this rule). After any number of samples n, each source has given its share n·w/total to
// within less than one sample.
int mixture_next(const Mixture *mixture, const uint64_t *consumed);

#endif
