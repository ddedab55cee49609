// Who owns what: the arena cut into buckets and equal parts for any number of ranks, also those
// that divide nothing.
#include "optim/partition.h"
#include "tests/random_source.h"
#include "tests/test.h"

// Qwen2.5-0.5B: its vocabulary of 151,936 = 1187 * 2^7 rows is what 3, 5, 6 and 7 do not divide.
static ModelConfig half_billion(int experts) {
    ModelConfig c = small_config(experts ? 19 : 24);
    c.hidden_size = 896;
    c.num_heads = 14;
    c.num_kv_heads = 2;
    c.head_dim = 64;
    c.intermediate_size = c.moe_intermediate_size = 4864;
    c.vocab_size = 151936;
    for (int i = 0; i < c.num_layers && experts; i++) c.layers[i] = (LayerConfig){experts, 1};
    ck_assert_ok(config_validate(&c, "half billion"));
    return c;
}

static ModelConfig untied(void) {
    ModelConfig c = small_config(3);
    c.tie_word_embeddings = false;
    c.layers[2] = (LayerConfig){3, 1};
    return c;
}

START_TEST(padding_moves_routers_only) {
    ModelConfig c = untied();
    TensorTable plain, padded;
    ck_assert_ok(tensor_table_build(&c, &plain));
    for (int ranks = 1; ranks <= 9; ranks++) {
        ck_assert_ok(tensor_table_build(&c, &padded));
        ck_assert_ok(tensor_table_pad(&padded, ranks));
        int64_t unit = (int64_t)ranks * TENSOR_ALIGN;
        int64_t shift = padded.router_begin - plain.router_begin;
        if (ranks == 1) ck_assert_int_eq(padded.total, plain.total);
        ck_assert(ranks > 1 || shift == 0);
        ck_assert(shift >= 0 && shift < unit);
        ck_assert(padded.total >= plain.total && padded.total < plain.total + 2 * unit);
        if (ranks > 1) ck_assert_int_eq(padded.router_begin % unit, 0);
        if (ranks > 1) ck_assert_int_eq(padded.total % unit, 0);
        ck_assert_int_eq(padded.layers[2].router, plain.layers[2].router + shift);
        for (int i = 0; i < plain.count; i++) {
            const Tensor *a = &plain.tensors[i], *b = &padded.tensors[i];
            ck_assert_str_eq(a->name, b->name);
            ck_assert_int_eq(b->offset, a->offset + (a->role == ROLE_ROUTER ? shift : 0));
        }
        tensor_table_free(&padded);
    }
    tensor_table_free(&plain);
}
END_TEST

static void check_tiles(const TensorTable *table, int world, int64_t bucket_elements) {
    int64_t state[64] = {0};
    int count = 0;
    for (int rank = 0; rank < world; rank++) {
        Partition p;
        ck_assert_ok(partition_create(table, rank, world, bucket_elements, false, &p));
        int64_t at = 0;
        ck_assert_int_eq(p.owned * world, table->total);
        for (int i = 0; i < p.count; i++) {
            const Bucket *b = &p.buckets[i];
            ck_assert_int_eq(b->begin, at);
            ck_assert_int_gt(b->part, 0);
            ck_assert(world == 1 || b->part % TENSOR_ALIGN == 0);
            ck_assert_int_eq(b->state, state[rank]);
            ck_assert_int_eq(partition_begin(&p, i), b->begin + rank * b->part);
            // No bucket has elements of two dtypes.
            at = b->begin + world * b->part;
            ck_assert_int_eq(b->begin >= table->router_begin, at > table->router_begin);
            state[rank] += b->part;
        }
        ck_assert_int_eq(at, table->total);
        ck_assert(rank == 0 || p.count == count); // the same cuts on every rank
        count = p.count;
        partition_free(&p);
    }
}

START_TEST(parts_are_equal_and_tile_the_arena_for_any_number_of_ranks) {
    const int64_t sizes[] = {1, 2000003, 8 << 20, INT64_C(1) << 40};
    for (int which = 0; which < 3; which++) {
        ModelConfig c = which == 2 ? untied() : half_billion(6 * which);
        for (int world = 1; world <= 64; world = world < 9 ? world + 1 : world * 3 - 1) {
            TensorTable table;
            ck_assert_ok(tensor_table_build(&c, &table));
            int64_t plain = table.total;
            if (world > 1) ck_assert_ok(tensor_table_pad(&table, world));
            ck_assert_int_le(table.total - plain, 2 * world * TENSOR_ALIGN);
            // Buckets of one part's alignment are too many to look at in the large models.
            for (int s = which == 2 ? 0 : 1; s < 4; s++) check_tiles(&table, world, sizes[s]);
            tensor_table_free(&table);
        }
    }
}
END_TEST

START_TEST(buckets_are_final_only_when_all_their_elements_are) {
    ModelConfig c = half_billion(6);
    TensorTable table;
    Partition p;
    ck_assert_ok(tensor_table_build(&c, &table));
    ck_assert_ok(tensor_table_pad(&table, 7));
    ck_assert_ok(partition_create(&table, 3, 7, 5000000, false, &p));
    ck_assert_int_gt(p.count, 100);
    int *seen = calloc((size_t)p.count, sizeof *seen), ready = 0;
    // As the backward pass goes: from the end of the matrices down, layer by layer.
    for (int layer = c.num_layers; layer >= 0; layer--) {
        int64_t from = layer == c.num_layers ? table.vectors_begin
                       : layer > 0           ? table.layers[layer].qkv_weight
                                             : 0;
        for (int i = 0; i < p.count; i++) {
            const Bucket *b = &p.buckets[i];
            bool inside = b->begin >= from && b->begin + 7 * b->part <= table.vectors_begin;
            ck_assert_int_eq(partition_is_final(&p, i, from), inside || from == 0);
        }
        while (ready < p.count && partition_is_final(&p, partition_order(&p, ready), from))
            seen[partition_order(&p, ready++)]++;
        // None that is final waits behind one that is not.
        for (int n = ready; n < p.count; n++)
            ck_assert(!partition_is_final(&p, partition_order(&p, n), from));
    }
    ck_assert_int_eq(ready, p.count);
    for (int i = 0; i < p.count; i++) ck_assert_int_eq(seen[i], 1);
    free(seen);
    partition_free(&p);
    tensor_table_free(&table);
}
END_TEST

// Where ranks share gradients, sections are cut one by one.
START_TEST(buckets_by_section_stay_in_one) {
    const ModelConfig configs[] = {half_billion(6), untied()};
    for (int which = 0; which < 2; which++) {
        for (int world = 2; world <= 7; world++) {
            TensorTable table;
            Partition p;
            int64_t unit = (int64_t)world * TENSOR_ALIGN, elements = which ? 1 : 3000000;
            ck_assert_ok(tensor_table_build_layout(&configs[which], &(TableLayout){.section = unit},
                                                   &table));
            ck_assert_ok(tensor_table_pad(&table, world));
            ck_assert_ok(partition_create(&table, world - 1, world, elements, true, &p));
            int64_t at = 0;
            for (int i = 0; i < p.count; i++) {
                int64_t end = p.buckets[i].begin + world * p.buckets[i].part;
                ck_assert_int_eq(p.buckets[i].begin, at);
                ck_assert(end - at <= elements || end - at == unit || i >= p.vectors);
                for (int layer = 0; layer < table.num_layers; layer++) {
                    int64_t border = table.layers[layer].qkv_weight;
                    ck_assert(end <= border || at >= border);
                }
                ck_assert(end <= table.lm_head || at >= table.lm_head);
                ck_assert(end <= table.vectors_begin || at >= table.vectors_begin);
                at = end;
            }
            ck_assert_int_eq(at, table.total);
            ck_assert_int_eq(p.owned * world, table.total);
            partition_free(&p);
            tensor_table_free(&table);
        }
    }
}
END_TEST

// Where groups of ranks share out experts, a bucket of experts has fewer and larger parts, and
// holds nothing else; every element belongs to one of the ranks that have it.
START_TEST(buckets_of_shared_out_experts_are_apart) {
    const ModelConfig config = half_billion(6);
    for (int group = 2; group <= 6; group += group == 3 ? 3 : 1) {
        for (int world = group; world <= 3 * group; world += group) {
            const TableLayout layout = {
                .section = (int64_t)world * TENSOR_ALIGN, .expert_ranks = group, .expert_rank = 1};
            TensorTable table, whole;
            Partition p;
            int64_t at = 0, owned = 0, experts = 0;
            ck_assert_ok(tensor_table_build(&config, &whole));
            ck_assert_ok(tensor_table_build_layout(&config, &layout, &table));
            ck_assert_ok(tensor_table_pad(&table, world));
            ck_assert_int_eq(table.parameters, whole.parameters);
            ck_assert_int_eq(table.active_parameters, whole.active_parameters);
            ck_assert_ok(partition_create(&table, group + 1 < world ? group + 1 : 1, world, 3000000,
                                          true, &p));
            const int place = p.rank / group;
            for (int i = 0; i < p.count; i++) {
                const Bucket *b = &p.buckets[i];
                const int parts = b->experts ? world / group : world;
                ck_assert_int_eq(b->begin, at);
                ck_assert_int_eq(partition_begin(&p, i),
                                 at + b->part * (b->experts ? place : p.rank));
                at = partition_end(&p, i);
                ck_assert_int_eq(at - b->begin, parts * b->part);
                ck_assert_int_eq(b->state, owned);
                owned += b->part;
                experts += b->experts ? at - b->begin : 0;
                for (int t = 0; t < table.count; t++) {
                    const Tensor *tensor = &table.tensors[t];
                    bool inside = tensor->offset < at && tensor->offset + tensor->count > b->begin;
                    ck_assert(!inside || (tensor->expert >= 0) == b->experts);
                }
            }
            ck_assert_int_eq(at, table.total);
            ck_assert_int_eq(owned, p.owned);
            ck_assert_int_eq(experts, table.expert_elements);
            // The names are those of the whole model, of the experts that this rank has.
            for (int t = 0; t < table.count; t++) {
                const Tensor *tensor = &table.tensors[t];
                const Tensor *there = tensor_table_find(&whole, tensor->name);
                ck_assert(there && there->count == tensor->count);
                ck_assert(tensor->expert < 0 || tensor->expert / (6 / group) == 1);
            }
            partition_free(&p);
            tensor_table_free(&table);
            tensor_table_free(&whole);
        }
    }
}
END_TEST

TEST_MAIN("partition", TEST(padding_moves_routers_only),
          TEST(parts_are_equal_and_tile_the_arena_for_any_number_of_ranks),
          TEST(buckets_by_section_stay_in_one), TEST(buckets_of_shared_out_experts_are_apart),
          TEST(buckets_are_final_only_when_all_their_elements_are))
