// Token ids back to text, natively: what `shards show --tokenizer` prints.
#ifndef DATA_DETOKENIZER_H
#define DATA_DETOKENIZER_H

#include <stddef.h>
#include <stdint.h>
#include "base/status.h"

typedef struct Detokenizer Detokenizer;

// Reads a directory's tokenizer: dense2moe_tokenizer.json (bytes), tokenizer.json, or vocab.json
// with the added tokens of tokenizer_config.json. Byte-level BPE only; others are STATUS_BAD_DATA.
Status detokenizer_open(const char *directory, Detokenizer **out) NODISCARD;
void detokenizer_close(Detokenizer *detokenizer);

// The bytes of a token, valid as long as the detokenizer; NULL when the vocabulary lacks the id. A
// character of the text may be spread over several tokens.
const char *detokenizer_piece(const Detokenizer *detokenizer, int32_t id, size_t *bytes);

#endif
