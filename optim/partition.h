// Who owns which elements of the arenas when several ranks train one model (ZeRO-1, Rajbhandari et
// al. 2020).
//
// The arena is cut into buckets, and each bucket into as many equal parts as there are ranks: rank
// r owns part r of every bucket. It alone keeps AdamW's moments of those elements (and their fp32
// weights where the working copy is bf16), so the state of a rank is 1/W of the whole, to the
// element. Cuts fall wherever the arithmetic puts them, also inside a tensor: a vocabulary of
// 151,936 rows is no easier to share between 7 ranks than between 8.
//
// A bucket is what travels in one collective. Buckets are long enough to be worth one and short
// enough that the first can leave while the backward pass is still busy with earlier layers:
//
//     |0 embedding | layer 0 ... layer L-1 | LM head | vectors | routers |
//     | bucket 0 | bucket 1 | ...                | n-2       | n-1     |
//
// The backward pass finishes the matrices from the end to the beginning, and the vectors and
// routers, which are short, last of all. The forward pass needs those first, and the matrices from
// the beginning to the end. partition_order() is the order of backward; read backwards it is that
// of forward.
//
// Where ranks share gradients, too, no bucket reaches from one section into the next, because their
// gradients do not lie side by side (model/gradient_window.h): each section is cut by itself, its
// table is padded for it (TableLayout.section).
//
// Where groups of E ranks share the experts of each layer (TableLayout.expert_ranks), what a rank
// has of them is shared only with those W/E that have the same: those with the same rank modulo E.
// The experts of a layer are a section, and its buckets have W/E parts.
//
// With one rank there are two buckets, the body and the routers, and it owns both.
#ifndef OPTIM_PARTITION_H
#define OPTIM_PARTITION_H

#include <stdbool.h>
#include <stdint.h>
#include "base/status.h"
#include "model/tensor_table.h"

// Elements [begin, partition_end) of the arenas.
typedef struct Bucket {
    int64_t begin, part;
    int64_t state; // where this rank's part lies among all that it owns
    bool experts;  // shared with the ranks that have the same experts only
} Bucket;

typedef struct Partition {
    int rank, world;
    int expert_ranks; // of a group that shares experts; 1: all ranks have all
    Bucket *buckets;  // by rising begin; they tile the arena
    int count;
    int vectors;   // the bucket that holds the vectors, maybe with the end of the matrices; it is
                   // the last one in the body
    int64_t owned; // elements of this rank: the same on every rank
} Partition;

// `table` has been padded for `world` ranks (tensor_table_pad), and each section of it when they
// are to be cut `by_section`, as they must be where experts are shared out. A bucket has at most
// `bucket_elements` elements, or as few as divide where that is less than one part's alignment.
Status partition_create(const TensorTable *table, int rank, int world, int64_t bucket_elements,
                        bool by_section, Partition *out) NODISCARD;
void partition_free(Partition *partition);

// How many elements a rank owns of such a table.
int64_t partition_owned(const TensorTable *table, int world);
int64_t partition_end(const Partition *partition, int bucket);
// First element that this rank owns of a bucket; it owns bucket->part of them.
int64_t partition_begin(const Partition *partition, int bucket);
// The nth bucket that the backward pass finishes, n = 0 .. count-1.
int partition_order(const Partition *partition, int n);
// Whether the bucket's gradients are complete when the backward pass has finished the matrices from
// element `from` on (ModelHooks.gradients_final).
bool partition_is_final(const Partition *partition, int bucket, int64_t from);

#endif
