// Which tokenizer a directory holds (docs/formats.md, "Tokenizer identity"): model/ asks it of
// model directories, data/ of shard directories, scripts/token_shards.py computes the same.
#ifndef BASE_TOKENIZER_ID_H
#define BASE_TOKENIZER_ID_H

#include "base/status.h"

// SHA-256 hex (64 digits + NUL) of the tokenizer's files; "" when the directory has none.
enum { TOKENIZER_ID_SIZE = 65 };
Status hf_tokenizer_id(const char *directory, char out[TOKENIZER_ID_SIZE]) NODISCARD;
// Of the bytes tokenizer: SHA-256 of "dense2moe-bytes-v1".
#define TOKENIZER_BYTES_ID "1c937cda051e406cb170168253e013168e7f8a4152778b4230b61d101b2e90f4"

#endif
