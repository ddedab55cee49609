// How a profile records a call: for the files that make it up (train/profile.h).
#ifndef TRAIN_PROFILE_RECORD_H
#define TRAIN_PROFILE_RECORD_H

#include "train/profile.h"

// Rows: two for each op, then the memory functions, then what goes between ranks.
enum {
    ROW_ZERO = 2 * OP_KIND_COUNT,
    ROW_COPY,
    ROW_UPLOAD,
    ROW_DOWNLOAD,
    ROW_ADD,
    ROW_CAST,
    ROW_REDUCE_SCATTER,
    ROW_ALL_GATHER,
    ROW_ALL_REDUCE,
    ROW_ALL_TO_ALL,
    ROW_WAIT,
    ROW_COUNT
};

// Opens the next record.
Status profile_begin(Profile *profile, int row) NODISCARD;
// Closes it; `status` is how the call ended, and is returned when it failed.
Status profile_end(Profile *profile, int row, Status status, OpWork work) NODISCARD;

#endif
