// A TensorSource without files: every value is a function of tensor name and position, and exact in
// all element types, so that what comes back from any pipe can be compared for equality.
#ifndef TESTS_SYNTHETIC_H
#define TESTS_SYNTHETIC_H

#include <stdlib.h>
#include "base/random.h"
#include "model/source.h"
#include "tests/test.h"

typedef struct SyntheticSource {
    TensorSource base;
    ModelConfig config;
    TensorTable table;
} SyntheticSource;

// Multiples of 1/64 between -2 and 2: 8 significant bits.
static inline float synthetic_value(const char *name, int64_t index) {
    uint64_t mixed = random_stream(name) + (uint64_t)index * UINT64_C(0x9e3779b97f4a7c15);
    return (float)((int)(mixed >> 40) % 255 - 127) / 64;
}

static inline Status synthetic_read(TensorSource *source, const Tensor *tensor, int64_t first,
                                    int64_t count, float *out) {
    (void)source;
    for (int64_t i = 0; i < count; i++) out[i] = synthetic_value(tensor->name, first + i);
    return STATUS_OK;
}

static inline void synthetic_close(TensorSource *source) {
    tensor_table_free(&((SyntheticSource *)source)->table);
    free(source);
}

static inline TensorSource *synthetic_source(const ModelConfig *config) {
    SyntheticSource *source = calloc(1, sizeof *source);
    ck_assert_ptr_nonnull(source);
    source->config = *config;
    ck_assert_ok(config_validate(config, "synthetic"));
    ck_assert_ok(tensor_table_build(config, &source->table));
    source->base =
        (TensorSource){&source->config, &source->table, DTYPE_F32, synthetic_read, synthetic_close};
    return &source->base;
}

// Small models with every feature of their family.
static inline ModelConfig synthetic_qwen2(void) {
    return (ModelConfig){.family = FAMILY_QWEN2,
                         .hidden_size = 24,
                         .num_layers = 3,
                         .num_heads = 4,
                         .num_kv_heads = 2,
                         .head_dim = 6,
                         .intermediate_size = 40,
                         .moe_intermediate_size = 40,
                         .vocab_size = 50,
                         .max_position_embeddings = 128,
                         .rope_theta = 1e6,
                         .rms_norm_eps = 1e-6,
                         .tie_word_embeddings = true,
                         .qkv_bias = true,
                         .bos_token_id = 48,
                         .eos_token_id = 49,
                         .router = {.gate = GATE_SOFTMAX, .gate_scale = 1}};
}

static inline ModelConfig synthetic_llama(void) {
    ModelConfig config = synthetic_qwen2();
    config.family = FAMILY_LLAMA;
    config.qkv_bias = false;
    config.tie_word_embeddings = false;
    config.rope_theta = 500000;
    config.rms_norm_eps = 1e-5;
    config.bos_token_id = -1;
    return config;
}

static inline ModelConfig synthetic_qwen3(void) {
    ModelConfig config = synthetic_qwen2();
    config.family = FAMILY_QWEN3;
    config.qkv_bias = false;
    config.qk_norm = true;
    config.head_dim = 10; // not hidden_size / num_heads
    return config;
}

// Turns layers 0 and 2 into experts; layer 1 stays dense.
static inline ModelConfig synthetic_moe(ModelConfig config, int num_experts, int top_k,
                                        RouterGate gate) {
    config.layers[0] = config.layers[2] = (LayerConfig){num_experts, top_k};
    config.moe_intermediate_size = 28;
    config.router.gate = gate;
    return config;
}

#endif
