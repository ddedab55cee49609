// The deficit rule, with deadlines.
//
// Source i with share p = weight/total should have given n·p samples after n samples. For its k-th
// sample (k = 0, 1, ...) this sets a time window: not before it would put the source a whole sample
// ahead, so after n > k/p - 1, and not later than when the source would fall a whole sample behind,
// (k+1)/p. Taking, of the sources whose window has opened, the one whose deadline is nearest meets
// every deadline (it is earliest-deadline-first scheduling of unit jobs with total load 1), which
// bounds the error of every source by one sample at every point, for any number of sources. Taking
// the largest deficit instead, as is common, lets sources with small shares drift further.
//
// Everything is integer arithmetic on the counts alone, so the state of the mixture is the counts.
#include "data/mixture.h"

#include <math.h>

static const double weight_units = 4294967296.0; // shares are resolved to 2^-32

Status mixture_init(Mixture *mixture, const double *weights, int num_sources) {
    INVARIANT(num_sources >= 1 && num_sources <= LOADER_MAX_SOURCES);
    double sum = 0;
    for (int i = 0; i < num_sources; i++) {
        if (!isfinite(weights[i]) || !(weights[i] > 0)) {
            FAIL(STATUS_USAGE, "weight of data source %d is %g, expected a number above 0", i + 1,
                 weights[i]);
        }
        sum += weights[i];
    }
    if (!isfinite(sum)) FAIL(STATUS_USAGE, "the weights of the data sources add up to infinity");
    mixture->num_sources = num_sources;
    mixture->total = 0;
    for (int i = 0; i < num_sources; i++) {
        uint64_t units = (uint64_t)(weights[i] / sum * weight_units + 0.5);
        mixture->weight[i] = units > 0 ? units : 1;
        mixture->total += mixture->weight[i];
    }
    return STATUS_OK;
}

int mixture_next(const Mixture *mixture, const uint64_t *consumed) {
    typedef unsigned __int128 Wide; // counts reach 2^63, weights 2^32
    Wide taken = 0, nearest = 0;
    for (int i = 0; i < mixture->num_sources; i++) taken += consumed[i];
    int best = -1;
    for (int i = 0; i < mixture->num_sources; i++) {
        Wide weight = mixture->weight[i];
        if ((Wide)consumed[i] * mixture->total >= (taken + 1) * weight) continue; // ahead
        Wide deadline = (((Wide)consumed[i] + 1) * mixture->total + weight - 1) / weight;
        if (best < 0 || deadline < nearest) {
            best = i;
            nearest = deadline;
        }
    }
    // The shares add up to one sample more than was taken, so somebody is not ahead; with counts
    // that this rule did not make (a state with edited numbers), the same holds.
    return best;
}
