// The tensor table against known models, and the packing that ops rely on.
#include "model/tensor_table.h"
#include "tests/test.h"

// Qwen2.5-0.5B, as its config.json says.
static ModelConfig qwen_half_billion(void) {
    ModelConfig c = {
        .family = FAMILY_QWEN2,
        .hidden_size = 896,
        .num_layers = 24,
        .num_heads = 14,
        .num_kv_heads = 2,
        .head_dim = 64,
        .intermediate_size = 4864,
        .vocab_size = 151936,
        .max_position_embeddings = 32768,
        .rope_theta = 1e6,
        .rms_norm_eps = 1e-6,
        .tie_word_embeddings = true,
        .qkv_bias = true,
        .bos_token_id = 151643,
        .eos_token_id = 151643,
        .router = {GATE_SOFTMAX, 1.0f, false},
    };
    ck_assert_ok(config_validate(&c, "qwen2.5-0.5b"));
    return c;
}

// A small config in which every kind of tensor occurs: QKV bias, dense and MoE layers, untied.
static ModelConfig small_mixed(void) {
    ModelConfig c = qwen_half_billion();
    c.hidden_size = 24;
    c.num_layers = 3;
    c.num_heads = 4;
    c.num_kv_heads = 2;
    c.head_dim = 6;
    c.intermediate_size = 20;
    c.moe_intermediate_size = 12;
    c.vocab_size = 50;
    c.bos_token_id = c.eos_token_id = -1;
    c.tie_word_embeddings = false;
    c.layers[1] = (LayerConfig){3, 2};
    c.layers[2] = (LayerConfig){2, 1};
    ck_assert_ok(config_validate(&c, "small"));
    return c;
}

static int64_t offset_of(const TensorTable *table, const char *name) {
    const Tensor *tensor = tensor_table_find(table, name);
    ck_assert_msg(tensor != NULL, "no tensor %s", name);
    return tensor->offset;
}

START_TEST(qwen_half_billion_counts) {
    ModelConfig c = qwen_half_billion();
    TensorTable table;
    ck_assert_ok(tensor_table_build(&c, &table));
    // The published checkpoint: 290 tensors in 988,097,824 bytes of bf16 and header.
    ck_assert_int_eq(table.count, 290);
    ck_assert_int_eq(table.parameters, 494032768);
    ck_assert_int_eq(table.active_parameters, table.parameters);
    ck_assert_int_eq(table.lm_head, table.embed);
    ck_assert_ptr_null(tensor_table_find(&table, "lm_head.weight"));
    tensor_table_free(&table);
}
END_TEST

// The paper's fused model: 1.66 B parameters, 0.42 B of them active.
START_TEST(fused_counts) {
    ModelConfig c = qwen_half_billion();
    c.num_layers = 19;
    c.moe_intermediate_size = c.intermediate_size;
    for (int i = 0; i < c.num_layers; i++) c.layers[i] = (LayerConfig){6, 1};
    TensorTable table;
    ck_assert_ok(tensor_table_build(&c, &table));
    int64_t attention = 896 * 896 * 2 + 2 * 128 * 896 + 896 + 2 * 128, norms = 2 * 896;
    int64_t expert = 3 * INT64_C(896) * 4864, router = 6 * 896, embed = INT64_C(151936) * 896;
    ck_assert_int_eq(table.parameters,
                     embed + 896 + 19 * (attention + norms + router + 6 * expert));
    ck_assert_int_eq(table.active_parameters,
                     embed + 896 + 19 * (attention + norms + router + expert));
    ck_assert_double_eq_tol((double)table.parameters, 1.66e9, 0.005e9);        // as printed
    ck_assert_double_eq_tol((double)table.active_parameters, 0.42e9, 0.005e9); // as printed
    tensor_table_free(&table);
}
END_TEST

START_TEST(groups_are_packed_and_aligned) {
    ModelConfig c = small_mixed();
    TensorTable table;
    ck_assert_ok(tensor_table_build(&c, &table));
    int64_t q = 24 * 24, kv = 12 * 24;
    const LayerOffsets *dense = &table.layers[0], *moe = &table.layers[1];

    int64_t at = offset_of(&table, "model.layers.0.self_attn.q_proj.weight");
    ck_assert_int_eq(dense->qkv_weight, at);
    ck_assert_int_eq(offset_of(&table, "model.layers.0.self_attn.k_proj.weight"), at + q);
    ck_assert_int_eq(offset_of(&table, "model.layers.0.self_attn.v_proj.weight"), at + q + kv);
    at = offset_of(&table, "model.layers.0.self_attn.q_proj.bias");
    ck_assert_int_eq(dense->qkv_bias, at);
    ck_assert_int_eq(offset_of(&table, "model.layers.0.self_attn.k_proj.bias"), at + 24);
    ck_assert_int_eq(offset_of(&table, "model.layers.0.self_attn.v_proj.bias"), at + 36);
    at = offset_of(&table, "model.layers.0.mlp.gate_proj.weight");
    ck_assert_int_eq(dense->gate_up, at);
    ck_assert_int_eq(offset_of(&table, "model.layers.0.mlp.up_proj.weight"), at + 20 * 24);
    ck_assert_int_eq(dense->router, -1);
    ck_assert_int_eq(dense->q_norm, -1);

    int64_t matrix = 12 * 24; // one expert's gate, up or down
    char name[TENSOR_NAME_MAX];
    for (int e = 0; e < 3; e++) {
        snprintf(name, sizeof name, "model.layers.1.mlp.experts.%d.gate_proj.weight", e);
        ck_assert_int_eq(offset_of(&table, name), moe->gate_up + 2 * e * matrix);
        snprintf(name, sizeof name, "model.layers.1.mlp.experts.%d.up_proj.weight", e);
        ck_assert_int_eq(offset_of(&table, name), moe->gate_up + (2 * e + 1) * matrix);
        snprintf(name, sizeof name, "model.layers.1.mlp.experts.%d.down_proj.weight", e);
        ck_assert_int_eq(offset_of(&table, name), moe->down + e * matrix);
    }
    ck_assert_int_eq(offset_of(&table, "model.layers.1.mlp.gate.weight"), moe->router);
    ck_assert_int_ge(moe->router, table.router_begin);
    const int64_t groups[] = {dense->input_norm, dense->qkv_weight,   dense->qkv_bias,
                              dense->o_weight,   dense->post_norm,    dense->gate_up,
                              dense->down,       moe->gate_up,        moe->down,
                              moe->router,       table.router_begin,  table.final_norm,
                              table.lm_head,     table.vectors_begin, table.total};
    for (size_t i = 0; i < sizeof groups / sizeof groups[0]; i++)
        ck_assert_int_eq(groups[i] % TENSOR_ALIGN, 0);
    tensor_table_free(&table);
}
END_TEST

// Tensors are listed by rising offset, do not overlap, and only routers lie in the fp32 tail.
START_TEST(tensors_tile_the_arena) {
    ModelConfig c = small_mixed();
    TensorTable table;
    ck_assert_ok(tensor_table_build(&c, &table));
    int64_t end = 0, sum = 0;
    for (int i = 0; i < table.count; i++) {
        const Tensor *tensor = &table.tensors[i];
        ck_assert_int_ge(tensor->offset, end);
        ck_assert_int_lt(tensor->offset - end, TENSOR_ALIGN);
        ck_assert_int_eq(tensor->role == ROLE_ROUTER, tensor->offset >= table.router_begin);
        const bool matrix = tensor->ndim == 2 && tensor->role != ROLE_ROUTER;
        ck_assert_int_eq(matrix, tensor->offset < table.vectors_begin);
        ck_assert_ptr_eq(tensor_table_find(&table, tensor->name), tensor);
        int64_t count = tensor->shape[0] * (tensor->ndim == 2 ? tensor->shape[1] : 1);
        ck_assert_int_eq(tensor->count, count);
        end = tensor->offset + tensor->count;
        sum += tensor->count;
    }
    ck_assert_int_ge(table.total, end);
    ck_assert_int_eq(table.parameters, sum);
    // Per token, layer 1 leaves out 1 of 3 experts and layer 2 leaves out 1 of 2.
    ck_assert_int_eq(table.active_parameters, sum - 2 * 3 * 12 * 24);
    ck_assert_ptr_null(tensor_table_find(&table, "model.layers.3.mlp.down_proj.weight"));
    tensor_table_free(&table);
}
END_TEST

START_TEST(copy_bytes_keep_routers_in_fp32) {
    ModelConfig c = small_mixed();
    TensorTable table;
    ck_assert_ok(tensor_table_build(&c, &table));
    size_t body = (size_t)table.router_begin, tail = (size_t)(table.total - table.router_begin);
    ck_assert_uint_eq(tensor_table_copy_bytes(&table, DTYPE_BF16, 128), 256);
    ck_assert_uint_eq(tensor_table_copy_bytes(&table, DTYPE_BF16, table.router_begin), 2 * body);
    ck_assert_uint_eq(tensor_table_copy_bytes(&table, DTYPE_BF16, table.total),
                      2 * body + 4 * tail);
    ck_assert_uint_eq(tensor_table_copy_bytes(&table, DTYPE_F32, table.total), 4 * (body + tail));
    tensor_table_free(&table);
}
END_TEST

START_TEST(weight_decay_is_for_matrices) {
    ModelConfig c = small_mixed();
    TensorTable table;
    ck_assert_ok(tensor_table_build(&c, &table));
    static const struct {
        const char *name;
        bool decays, with_embeddings;
    } expected[] = {
        {"model.embed_tokens.weight", false, true},
        {"lm_head.weight", false, true},
        {"model.norm.weight", false, false},
        {"model.layers.0.input_layernorm.weight", false, false},
        {"model.layers.0.self_attn.q_proj.weight", true, true},
        {"model.layers.0.self_attn.q_proj.bias", false, false},
        {"model.layers.0.self_attn.o_proj.weight", true, true},
        {"model.layers.0.mlp.up_proj.weight", true, true},
        {"model.layers.1.mlp.experts.2.down_proj.weight", true, true},
        {"model.layers.1.mlp.gate.weight", false, false},
    };
    for (size_t i = 0; i < sizeof expected / sizeof expected[0]; i++) {
        const Tensor *tensor = tensor_table_find(&table, expected[i].name);
        ck_assert_msg(tensor != NULL, "no tensor %s", expected[i].name);
        ck_assert_int_eq(tensor_decays(tensor, false), expected[i].decays);
        ck_assert_int_eq(tensor_decays(tensor, true), expected[i].with_embeddings);
    }
    tensor_table_free(&table);
}
END_TEST

// Legal member by member, but 2^62 elements in all.
START_TEST(refuses_more_than_can_be_addressed) {
    ModelConfig c = small_mixed();
    c.hidden_size = 1 << 20;
    c.moe_intermediate_size = 1 << 22;
    c.num_layers = MODEL_MAX_LAYERS;
    for (int i = 0; i < c.num_layers; i++) c.layers[i] = (LayerConfig){MODEL_MAX_EXPERTS, 1};
    ck_assert_ok(config_validate(&c, "huge"));
    TensorTable table;
    ck_assert_fails(tensor_table_build(&c, &table), STATUS_BAD_DATA, "2^50 parameters");
}
END_TEST

TEST_MAIN("tensor table", TEST(qwen_half_billion_counts), TEST(fused_counts),
          TEST(groups_are_packed_and_aligned), TEST(tensors_tile_the_arena),
          TEST(copy_bytes_keep_routers_in_fp32), TEST(weight_decay_is_for_matrices),
          TEST(refuses_more_than_can_be_addressed))
