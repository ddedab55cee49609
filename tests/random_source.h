// A model's weights out of nothing, for tests: every value is a function of seed and tensor name,
// so that tests can say what a tensor holds without keeping it.
#ifndef TESTS_RANDOM_SOURCE_H
#define TESTS_RANDOM_SOURCE_H

#include <stdlib.h>
#include "base/random.h"
#include "model/source.h"
#include "tests/test.h"

typedef struct RandomSource {
    TensorSource base;
    ModelConfig config;
    TensorTable table;
    uint64_t seed;
} RandomSource;

// Norm weights around 1, everything else around 0, large enough that each part of a layer matters.
static Status random_source_read_(TensorSource *base, const Tensor *tensor, int64_t first,
                                  int64_t count, float *out) {
    const RandomSource *source = (const RandomSource *)base;
    float mean = tensor->role == ROLE_NORM ? 1.0f : 0.0f;
    random_normal_fill(out, (size_t)count, source->seed, random_stream(tensor->name),
                       (uint64_t)first, mean, 0.15f);
    return STATUS_OK;
}

static void random_source_close_(TensorSource *base) {
    RandomSource *source = (RandomSource *)base;
    tensor_table_free(&source->table);
    free(source);
}

__attribute__((unused)) static TensorSource *random_source(const ModelConfig *config,
                                                           uint64_t seed) {
    RandomSource *source = calloc(1, sizeof *source);
    ck_assert_ptr_nonnull(source);
    source->config = *config;
    source->seed = seed;
    ck_assert_ok(tensor_table_build(config, &source->table));
    source->base = (TensorSource){.config = &source->config,
                                  .table = &source->table,
                                  .dtype = DTYPE_F32,
                                  .read = random_source_read_,
                                  .close = random_source_close_};
    return &source->base;
}

// A dense model with all the shape traits of the real ones, at a size for tests.
__attribute__((unused)) static ModelConfig small_config(int num_layers) {
    return (ModelConfig){.family = FAMILY_QWEN2,
                         .hidden_size = 32,
                         .num_layers = num_layers,
                         .num_heads = 4,
                         .num_kv_heads = 2,
                         .head_dim = 8,
                         .intermediate_size = 48,
                         .moe_intermediate_size = 48,
                         .vocab_size = 80,
                         .max_position_embeddings = 256,
                         .rope_theta = 10000,
                         .rms_norm_eps = 1e-6,
                         .tie_word_embeddings = true,
                         .qkv_bias = true,
                         .bos_token_id = -1,
                         .eos_token_id = -1,
                         .router = {.gate = GATE_SOFTMAX, .gate_scale = 1}};
}

// One whole tensor. malloc'ed.
__attribute__((unused)) static float *read_tensor(TensorSource *source, const char *name,
                                                  int64_t *count) {
    const Tensor *tensor = tensor_table_find(source->table, name);
    ck_assert_msg(tensor != NULL, "no tensor %s", name);
    float *values = malloc((size_t)tensor->count * sizeof *values);
    ck_assert_ptr_nonnull(values);
    ck_assert_ok(source->read(source, tensor, 0, tensor->count, values));
    if (count) *count = tensor->count;
    return values;
}

#endif
