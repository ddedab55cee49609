// Hugging Face model directories, in and out.
#ifndef MODEL_HF_H
#define MODEL_HF_H

#include "base/status.h"
#include "base/tokenizer_id.h"
#include "model/source.h"

// Opens config.json and model.safetensors, or model.safetensors.index.json and its files; experts
// may be stored one by one or fused (transformers 5). Every tensor the config needs must be there
// with the right shape; tensors the engine does not need are named in one log line. A missing
// directory or file is STATUS_MISSING_INPUT. Reading is thread-safe.
Status hf_open(const char *directory, TensorSource **out) NODISCARD;

typedef struct HfWriteOptions {
    DType dtype;
    uint64_t max_shard_bytes; // 0 = one file
    const char *copy_from;    // directory whose tokenizer and generation files are copied, or
                              // NULL
    const char *tokenizer_id; // of the training data, or NULL: with TOKENIZER_BYTES_ID, which
                              // has no files to copy, its marker file is written
    void (*progress)(void *context, uint64_t done_bytes, uint64_t total_bytes); // or NULL
    void *context;
} HfWriteOptions;

// Writes config.json, generation_config.json and the weights (names and layout of qwen2, llama,
// qwen3, qwen2_moe, qwen3_moe as the config says; gate_scale folded into down_proj) streaming from
// `source` with bounded memory. Equal sources give equal files. A model that has no Hugging Face
// form (different expert counts, a router on the raw stream) is STATUS_USAGE before anything is
// written. The directory appears whole or not at all: it is written as "<directory>.tmp" (one
// writer at a time; what a killed one left is overwritten) and renamed. An earlier export is
// replaced only then, by way of "<directory>.old"; a directory that holds files but no config.json
// is never replaced.
Status hf_write(const char *directory, TensorSource *source,
                const HfWriteOptions *options) NODISCARD;
// STATUS_USAGE when hf_write could not write a model of this config: asked before training it.
Status hf_check_writable(const ModelConfig *config) NODISCARD;

#endif
