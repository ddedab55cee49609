// The optimizer files of a checkpoint: which rank wrote which part of which tensor, by name.
//
// Rank R of W writes optimizer-RRRRR-of-WWWWW.safetensors with the parts of master, m and v that it
// owns. The name says what an entry is: "<tensor>.master" is the whole tensor in its shape,
// "<tensor>.master[first:end]" its elements first .. end-1 in row-major order. A reader asks for
// any range of any tensor and gets it from whatever files hold it, so that a checkpoint of W ranks
// loads on any other number of ranks.
#ifndef TRAIN_CHECKPOINT_SLICES_H
#define TRAIN_CHECKPOINT_SLICES_H

#include <stdint.h>
#include "base/file.h"
#include "base/hash.h"
#include "base/status.h"
#include "model/safetensors.h"
#include "model/tensor_table.h"

typedef enum SliceKind { SLICE_MASTER, SLICE_M, SLICE_V, SLICE_KINDS } SliceKind;

enum { SLICE_NAME_MAX = TENSOR_NAME_MAX + 64, CHECKPOINT_MAX_RANKS = 100000 };

// "optimizer-00000-of-00001.safetensors"
Status slices_file_name(int rank, int world, char out[64]) NODISCARD;
// Elements [begin, end) of the arenas.
typedef struct SliceRange {
    int64_t begin, end;
} SliceRange;
// The host copy of one kind: the elements of all ranges that are written, one after the other. The
// file holds fp32.
typedef struct SliceArena {
    const void *values;
    DType dtype;
} SliceArena;
// Writes the ranges, which rise and do not overlap. Gives the file's size and hashes.
Status slices_write(const char *path, const TensorTable *table, const SliceRange *ranges,
                    int num_ranges, const SliceArena arenas[SLICE_KINDS], FileHash *out) NODISCARD;

typedef struct SliceEntry {
    SliceKind kind;
    int tensor; // index into the table
    uint64_t first, count;
    const SafetensorsFile *file;
    const SafetensorsEntry *entry;
} SliceEntry;

typedef struct SliceSet {
    const TensorTable *table; // borrowed
    SafetensorsFile *files;
    int num_files;
    SliceEntry *entries; // sorted by (tensor, kind, first)
    size_t count;
} SliceSet;

// Opens all optimizer files of the checkpoint directory and checks that they hold every element of
// every tensor of `table` exactly once, and nothing else.
Status slices_open(const char *directory, const TensorTable *table, SliceSet *out) NODISCARD;
void slices_close(SliceSet *set);
// Elements [first, first + count) of the tensor of this name.
Status slices_read(const SliceSet *set, SliceKind kind, const Tensor *tensor, int64_t first,
                   int64_t count, float *out) NODISCARD;

#endif
