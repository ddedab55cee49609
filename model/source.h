// Where weights come from. A TensorSource answers for every tensor of its own config's table, by
// Hugging Face name, in fp32 pieces, so that import, surgery, checkpoints and export are stages of
// one pipe and none of them needs the whole model in memory:
//   safetensors directory ──► [LF-UC surgery] ──► model arena | exported directory
#ifndef MODEL_SOURCE_H
#define MODEL_SOURCE_H

#include <stdint.h>
#include "base/status.h"
#include "model/config.h"
#include "model/tensor_table.h"

typedef struct TensorSource TensorSource;
struct TensorSource {
    const ModelConfig *config; // owned by the source
    const TensorTable *table;  // of that config; owned by the source
    DType dtype;               // what the values are stored as (the precision they really have)
    // Elements [first, first + count) of the tensor, in fp32.
    Status (*read)(TensorSource *, const Tensor *tensor, int64_t first, int64_t count,
                   float *out) NODISCARD;
    void (*close)(TensorSource *);
};

static inline void source_close(TensorSource *source) {
    if (source) source->close(source);
}

#endif
