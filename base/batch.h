// One micro-batch of token ids on the host: what data/ produces and model/ consumes.
#ifndef BASE_BATCH_H
#define BASE_BATCH_H

#include <stdint.h>

typedef struct MicroBatch {
    int64_t batch, sequence_length; // B, S
    const int32_t *tokens;          // (B, S)
    const int32_t *targets;         // (B, S) the next token; -1 = no loss here
    const int32_t *document_start;  // (B, S) first position of the token's document within its
                                    // row, or NULL when documents may see each other
} MicroBatch;

#endif
