// Cutting the arena (partition.h says into what).
//
// Every cut is a multiple of the unit, world * TENSOR_ALIGN elements, counted from the beginning of
// the body or of the routers, so that every bucket divides and every part begins where the vector
// units and NCCL like it. The vectors' bucket begins at the last such multiple before them.
#include "optim/partition.h"

#include <stdlib.h>
#include <string.h>

static int64_t at_most(int64_t a, int64_t b) {
    return a < b ? a : b;
}

// Ranks that share a bucket, and this one's place among them.
static int parts_of(const Partition *partition, bool experts) {
    return experts ? partition->world / partition->expert_ranks : partition->world;
}
static int place_of(const Partition *partition, bool experts) {
    return experts ? partition->rank / partition->expert_ranks : partition->rank;
}

static void add_bucket(Partition *partition, int64_t begin, int64_t end, bool experts) {
    Bucket *bucket = &partition->buckets[partition->count++];
    *bucket = (Bucket){.begin = begin,
                       .part = (end - begin) / parts_of(partition, experts),
                       .state = partition->owned,
                       .experts = experts};
    partition->owned += bucket->part;
}

static void add(Partition *partition, int64_t begin, int64_t end) {
    add_bucket(partition, begin, end, false);
}

// Everything in two buckets, in any length.
static void own_all(const TensorTable *table, Partition *out) {
    add(out, 0, table->router_begin);
    out->vectors = 0;
    if (table->total > table->router_begin) add(out, table->router_begin, table->total);
}

// [from, to) of the body. Whole buckets are counted from its end, where the backward pass begins;
// what is left over is the bucket at the beginning.
static void cut_range(int64_t from, int64_t to, int64_t length, bool experts, Partition *out) {
    int64_t left = (to - from) % length;
    if (left > 0) add_bucket(out, from, from + left, experts);
    for (int64_t begin = from + left; begin < to; begin += length)
        add_bucket(out, begin, begin + length, experts);
}

// The matrices up to the LM head's, each section by itself. Returns where they end.
static int64_t cut_layers(const TensorTable *table, int64_t length, Partition *out) {
    int64_t begin = 0;
    for (int layer = 0; layer < table->num_layers; layer++) {
        const LayerOffsets *at = &table->layers[layer];
        const int64_t end = tensor_table_layer_end(table, layer);
        cut_range(begin, at->qkv_weight, length, false, out);
        begin = at->qkv_weight;
        if (!tensor_table_shares_experts(table, layer)) continue;
        cut_range(begin, at->gate_up, length, false, out);
        cut_range(at->gate_up, end, length, true, out);
        begin = end;
    }
    return begin;
}

static void cut(const TensorTable *table, int64_t unit, int64_t length, bool by_section,
                Partition *out) {
    const int64_t vectors = table->vectors_begin / unit * unit;
    int64_t begin = by_section ? cut_layers(table, length, out) : 0;
    if (by_section && table->lm_head != table->embed) {
        cut_range(begin, table->lm_head, length, false, out);
        begin = table->lm_head;
    }
    cut_range(begin, vectors, length, false, out);
    out->vectors = out->count;
    add(out, vectors, table->router_begin);
    for (begin = table->router_begin; begin < table->total;) {
        int64_t end = begin + at_most(length, table->total - begin);
        add(out, begin, end);
        begin = end;
    }
}

Status partition_create(const TensorTable *table, int rank, int world, int64_t bucket_elements,
                        bool by_section, Partition *out) {
    const int64_t unit = (int64_t)world * TENSOR_ALIGN, tail = table->total - table->router_begin;
    const int expert_ranks = table->layout.expert_ranks;
    INVARIANT(world >= 1 && rank >= 0 && rank < world && bucket_elements >= 1);
    INVARIANT(world % expert_ranks == 0 && (expert_ranks == 1 || by_section));
    *out = (Partition){.rank = rank, .world = world, .expert_ranks = expert_ranks};
    const int64_t length = bucket_elements < unit ? unit : bucket_elements / unit * unit;
    size_t most = 6 + 3 * (size_t)table->num_layers + (size_t)(table->router_begin / length) +
                  (size_t)(tail / length);
    out->buckets = malloc(most * sizeof *out->buckets);
    if (!out->buckets) FAIL(STATUS_INTERNAL, "out of memory for %zu buckets", most);
    if (world == 1) {
        own_all(table, out);
        return STATUS_OK;
    }
    INVARIANT(table->router_begin % unit == 0 && tail % unit == 0);
    for (int layer = 0; layer < table->num_layers && by_section; layer++)
        INVARIANT(table->layers[layer].qkv_weight % unit == 0);
    cut(table, unit, length, by_section, out);
    INVARIANT((size_t)out->count <= most && out->owned == partition_owned(table, world));
    return STATUS_OK;
}

int64_t partition_owned(const TensorTable *table, int world) {
    const int64_t experts = table->expert_elements;
    return (table->total - experts) / world + experts / (world / table->layout.expert_ranks);
}

void partition_free(Partition *partition) {
    free(partition->buckets);
    memset(partition, 0, sizeof *partition);
}

int64_t partition_begin(const Partition *partition, int bucket) {
    const Bucket *b = &partition->buckets[bucket];
    return b->begin + place_of(partition, b->experts) * b->part;
}

int64_t partition_end(const Partition *partition, int bucket) {
    const Bucket *b = &partition->buckets[bucket];
    return b->begin + parts_of(partition, b->experts) * b->part;
}

int partition_order(const Partition *partition, int n) {
    return n < partition->vectors ? partition->vectors - 1 - n : n;
}

bool partition_is_final(const Partition *partition, int bucket, int64_t from) {
    if (from == 0) return true;
    return bucket < partition->vectors && partition->buckets[bucket].begin >= from;
}
