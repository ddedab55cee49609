// FLOPs and bytes of every op, against numbers worked out by hand from the rule in op_work.h. Sizes
// are small and different from each other, so that no two can be mixed up.
#include "model/op_work.h"
#include "tests/test.h"

// bf16 weights and activations, fp32 gradients, as a GPU has them. No op is called.
static const Backend bf16 = {.compute_dtype = DTYPE_BF16, .grad_dtype = DTYPE_F32};

static const void *const some = "an operand that is given";
static void *const room = (void *)(uintptr_t)64;

static void expect_work(OpKind op, OpPass pass, const void *args, double flops, double bytes) {
    OpWork work = op_work(&bf16, op, pass, args);
    ck_assert_msg(work.flops == flops, "%s: %.0f FLOPs, expected %.0f", op_name(op), work.flops,
                  flops);
    ck_assert_msg(work.bytes == bytes, "%s: %.0f bytes, expected %.0f", op_name(op), work.bytes,
                  bytes);
}

START_TEST(embedding_and_norms) {
    EmbedArgs embed = {.tokens = 10, .hidden_size = 8, .vocab_size = 100};
    // 10 ids of 4; 10 rows read and written at 16.
    expect_work(OP_EMBED, PASS_FORWARD, &embed, 0, 40 + 320);
    // dout 160; 10 gradient rows of 32, read and written.
    expect_work(OP_EMBED, PASS_BACKWARD, &embed, 0, 40 + 160 + 640);
    embed.vocab_size = 3; // 10 tokens name at most 3 rows
    expect_work(OP_EMBED, PASS_FORWARD, &embed, 0, 40 + 160 + 48);

    RmsNormArgs norm = {.tokens = 10, .hidden_size = 8, .x = some, .y = some, .x_out = room};
    // x, y, x_out and out at 160, inv_rms 40, the weight 16.
    expect_work(OP_RMSNORM, PASS_FORWARD, &norm, 0, 640 + 40 + 16);
    norm.y = NULL;
    expect_work(OP_RMSNORM, PASS_FORWARD, &norm, 0, 480 + 40 + 16);
    norm.x_out = (void *)(uintptr_t)norm.x; // in place: only out is written
    expect_work(OP_RMSNORM, PASS_FORWARD, &norm, 0, 320 + 40 + 16);
    // x_out, dout, dx twice; inv_rms; weight; its gradient twice at 32.
    expect_work(OP_RMSNORM, PASS_BACKWARD, &norm, 0, 640 + 40 + 16 + 64);
}
END_TEST

START_TEST(projections_and_attention) {
    LinearArgs linear = {.tokens = 10, .in_features = 8, .out_features = 6};
    expect_work(OP_LINEAR, PASS_FORWARD, &linear, 960, (80 + 60 + 48) * 2);
    linear.bias = some;
    expect_work(OP_LINEAR, PASS_FORWARD, &linear, 960, (80 + 60 + 48 + 6) * 2);
    // x and dout; the gradient of 48 read and written at 4. No dx: one product.
    expect_work(OP_LINEAR, PASS_BACKWARD, &linear, 960, 140 * 2 + 48 * 8);
    linear.dx = linear.grad_bias = room;
    expect_work(OP_LINEAR, PASS_BACKWARD, &linear, 1920, (140 + 48 + 80) * 2 + (48 + 6) * 8);
    linear.dx_accumulate = true;
    expect_work(OP_LINEAR, PASS_BACKWARD, &linear, 1920, (140 + 48 + 160) * 2 + (48 + 6) * 8);

    RopeArgs rope = {
        .batch = 2, .sequence_length = 5, .num_heads = 4, .num_kv_heads = 2, .head_dim = 8};
    rope.qkv = some;
    rope.out = room;
    expect_work(OP_ROPE, PASS_FORWARD, &rope, 0, 2 * 10 * 8 * 8 * 2); // 8 heads, v copied
    rope.dout = rope.dqkv = room;
    expect_work(OP_ROPE, PASS_BACKWARD, &rope, 0, 2 * 10 * 6 * 8 * 2); // in place: 6 heads
    rope.q_norm = some;
    expect_work(OP_ROPE, PASS_FORWARD, &rope, 0, 2560 + 10 * 6 * 4 + 2 * 16);
    // Also q and k again, and both weights' gradients.
    expect_work(OP_ROPE, PASS_BACKWARD, &rope, 0, 1920 + 240 + 32 + 960 + 2 * 8 * 8);

    AttentionArgs attention = {
        .batch = 2, .sequence_length = 6, .num_heads = 4, .num_kv_heads = 2, .head_dim = 8};
    // One product: 2 x 4 heads x 6x6 x 8 x 2, half of it causal: 2304.
    expect_work(OP_ATTENTION, PASS_FORWARD, &attention, 2 * 2304, 12 * (64 + 32) * 2 + 12 * 4 * 4);
    // qkv, out, log_sum_exp; dout and dqkv.
    expect_work(OP_ATTENTION, PASS_BACKWARD, &attention, 5 * 2304,
                2 * 12 * (64 + 32) * 2 + 12 * 4 * 4);
}
END_TEST

START_TEST(mlps) {
    FfnArgs ffn = {.tokens = 10, .hidden_size = 8, .intermediate_size = 6, .out = room};
    // x, out, gate_up, weights.
    expect_work(OP_FFN, PASS_FORWARD, &ffn, 3 * 960, (80 + 80 + 120 + 144) * 2);
    ffn.activation = room;
    expect_work(OP_FFN, PASS_FORWARD, &ffn, 3 * 960, (80 + 80 + 180 + 144) * 2);
    expect_work(OP_FFN, PASS_BACKWARD, &ffn, 6 * 960, (240 + 180 + 144) * 2 + 144 * 8);
    ffn.out = NULL; // only what backward reads
    expect_work(OP_FFN, PASS_FORWARD, &ffn, 2 * 960, (80 + 180 + 96) * 2);

    MoeFfnArgs moe = {.tokens = 10,
                      .hidden_size = 8,
                      .intermediate_size = 6,
                      .num_experts = 3,
                      .top_k = 2,
                      .out = room};
    // 20 rows through 3 experts of 144 weights; gates 80; three lists of 20 and 4 begins: 256.
    expect_work(OP_MOE_FFN, PASS_FORWARD, &moe, 3 * 1920, (80 + 80 + 240 + 432) * 2 + 80 + 256);
    expect_work(OP_MOE_FFN, PASS_BACKWARD, &moe, 6 * 1920,
                (240 + 240 + 432) * 2 + 432 * 8 + 160 + 256);
    moe.out = NULL;
    expect_work(OP_MOE_FFN, PASS_FORWARD, &moe, 2 * 1920, (80 + 240 + 288) * 2 + 256);
    moe.out = room;
    moe.tokens = 1; // 2 rows reach 2 experts
    expect_work(OP_MOE_FFN, PASS_FORWARD, &moe, 3 * 192, (8 + 8 + 24 + 288) * 2 + 8 + 40);
}
END_TEST

START_TEST(router) {
    RouteArgs route = {.tokens = 10, .hidden_size = 8, .num_experts = 3, .top_k = 2};
    // x 160, probabilities 120, log_sum_exp 40, weight 96, gates 80; the lists 256.
    expect_work(OP_ROUTE, PASS_FORWARD, &route, 480, 160 + 120 + 40 + 96 + 80 + 256);
    // As read by backward, experts chosen 80, dgate 80, load 12; dx twice, gradient twice.
    expect_work(OP_ROUTE, PASS_BACKWARD, &route, 960,
                160 + 120 + 40 + 96 + 80 + 80 + 80 + 12 + 320 + 192);
    RouterLossArgs loss = {.tokens = 10, .num_experts = 3, .top_k = 2};
    // Probabilities, log_sum_exp, 4 begins; 8 sums read and written.
    expect_work(OP_ROUTER_LOSS, PASS_FORWARD, &loss, 0, 120 + 40 + 16 + 128);
}
END_TEST

START_TEST(loss_optimizer_and_the_rest) {
    LinearCrossEntropyArgs loss = {.tokens = 10, .hidden_size = 8, .vocab_size = 20};
    expect_work(OP_LINEAR_CROSS_ENTROPY, PASS_FORWARD, &loss, 3200, (80 + 160) * 2 + 40);
    loss.dx = loss.grad_weight = room;
    expect_work(OP_LINEAR_CROSS_ENTROPY, PASS_FORWARD, &loss, 3 * 3200,
                (80 + 160 + 80) * 2 + 160 * 8 + 40);

    AdamwArgs adamw = {.count = 10, .grad_dtype = DTYPE_F32};
    // master, m and v twice, the gradient once.
    expect_work(OP_ADAMW, PASS_FORWARD, &adamw, 0, 10 * 28);
    adamw.copy = room;
    adamw.copy_dtype = DTYPE_BF16;
    expect_work(OP_ADAMW, PASS_FORWARD, &adamw, 0, 10 * 30);

    int64_t count = 10;
    expect_work(OP_NORM2, PASS_FORWARD, &count, 0, 40);
    RowSimilarityArgs rows = {.tokens = 10, .hidden_size = 8};
    expect_work(OP_ROW_SIMILARITY, PASS_FORWARD, &rows, 0, 320);
    GatherRowsArgs gather = {.rows = 20, .row_bytes = 16, .divisor = 2};
    // The index 80; 10 rows read, 20 written.
    expect_work(OP_GATHER_ROWS, PASS_FORWARD, &gather, 0, 80 + 160 + 320);
    CombineRowsArgs combine = {.tokens = 10, .hidden_size = 8, .top_k = 2};
    // The index 80; 20 rows read, 10 written.
    expect_work(OP_COMBINE_ROWS, PASS_FORWARD, &combine, 0, 80 + 320 + 160);
    ck_assert(op_work_add(DTYPE_BF16, 10).bytes == 60);
    ck_assert(op_work_cast(DTYPE_F32, DTYPE_BF16, 10).bytes == 60);
}
END_TEST

// The two models of scripts/bench_gpu_shapes.py, by its formula.
START_TEST(model_flops) {
    static ModelConfig config;
    config = (ModelConfig){.hidden_size = 896,
                           .num_layers = 24,
                           .num_heads = 14,
                           .num_kv_heads = 2,
                           .head_dim = 64,
                           .intermediate_size = 4864,
                           .moe_intermediate_size = 4864,
                           .vocab_size = 151936};
    // 24 x (1,835,008 of attention + 13,074,432 of the MLP) + 136,134,656 of the LM head, each 6
    // times; attention 6 x 24 x 896 x 2048.
    ck_assert(model_flops_per_token(&config, 2048) == 6.0 * 493961216 + 264241152);
    config.num_layers = 19;
    for (int l = 0; l < 19; l++) config.layers[l] = (LayerConfig){.num_experts = 6, .top_k = 1};
    // 19 x (1,835,008 + 13,074,432 + 5,376 of the router) + 136,134,656.
    ck_assert(model_flops_per_token(&config, 2048) == 6.0 * 419516160 + 209190912);
}
END_TEST

TEST_MAIN("op work", TEST(embedding_and_norms), TEST(projections_and_attention), TEST(mlps),
          TEST(router), TEST(loss_optimizer_and_the_rest), TEST(model_flops))
