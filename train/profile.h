// Where the time of a training step goes: `train --profile N`.
//
// A profile is a Backend that stands before another one. It passes every call on, and while it
// records it notes a time stamp before and after each op that runs on the compute stream, and adds
// up the op's work (model/op_work.h). Nothing waits for the device between the steps, so they take
// the time that they take without it, plus the stamps. A run that is not profiled has no profile
// and pays nothing.
#ifndef TRAIN_PROFILE_H
#define TRAIN_PROFILE_H

#include <stdint.h>
#include <stdio.h>
#include "base/json.h"
#include "base/status.h"
#include "model/backend.h"
#include "model/communicator.h"
#include "model/op_work.h"

typedef struct Profile Profile;

// One line of the table: an op and a pass, or a memory function.
typedef struct ProfileRow {
    const char *name; // "ffn backward"
    bool product;     // bound by FLOPs where the device's rates are not known
    bool host;        // crosses to the host: the device's rates say nothing about it
    bool ranks;       // waits for, or moves data to, other ranks: nor here
    int64_t calls;
    OpWork work; // of all calls
    double ms;   // of all calls
} ProfileRow;

// `inner` stays the caller's and must live longer.
Status profile_create(Backend *inner, Profile **out) NODISCARD;
void profile_destroy(Profile *profile); // accepts NULL
Backend *profile_backend(Profile *profile);

// Stands before `inner` in the same way; belongs to the caller, who destroys it before the profile.
Status profile_communicator(Profile *profile, Communicator *inner, Communicator **out) NODISCARD;

// Forgets what was recorded and records from here on. Makes room for `times` as many calls as the
// recording before had, so that none grows in the middle of a measurement.
Status profile_start(Profile *profile, int64_t times) NODISCARD;
// Waits for the device and adds up.
Status profile_stop(Profile *profile) NODISCARD;

// The rows that were called, the longest first; their number.
int profile_rows(const Profile *profile, const ProfileRow *const **rows);
double profile_total_ms(const Profile *profile); // from start to stop

// --- profile_report.c ----------------------------------------------------------------------------

// A device's highest rates; 0 = not known.
typedef struct DevicePeak {
    double flops;            // a second, dense bf16 products
    double bytes_per_second; // of its memory
} DevicePeak;
// By the device's name. The FLOPs hold for bf16 only.
DevicePeak device_peak(const char *device_name, DType compute_dtype);

// What was recorded.
typedef struct ProfileRun {
    int64_t steps, warmup_steps;
    double tokens_per_step, flops_per_token;
    DevicePeak peak;
} ProfileRun;

// How fast a row or the whole was.
typedef struct ProfileRate {
    double value; // FLOP/s or byte/s
    bool flops;
    double share; // of the limit; NaN = not known
} ProfileRate;
// Against the nearer of the two limits: the one that makes the shortest possible time longer.
ProfileRate profile_rate(const ProfileRow *row, const DevicePeak *peak);

void profile_print(const Profile *profile, const ProfileRun *run, FILE *out);
// A new object; what is not known is null. NULL when memory ran out.
json_t *profile_to_json(const Profile *profile, const ProfileRun *run);

#endif
