// Inter-layer similarity over calibration text (METHOD.md §2; Dense2MoE, Alg. 1).
//
// Two layers of which one can take the other's place leave nearly the same residual stream behind.
// For each pair (l, l+n), n = 1..max_block, three means over all calibration tokens t:
//   s_out  = cos(y_l, y_{l+n})                         y: the stream after the layer
//   s_mlp  = cos(h_l, h_{l+n})                         h: the stream after attention
//   d_norm = | ‖h_l‖ - ‖h_{l+n}‖ | / ‖h_{l+n}‖
#ifndef MODEL_SIMILARITY_H
#define MODEL_SIMILARITY_H

#include "base/batch.h"
#include "base/status.h"
#include "model/model.h"

enum { SIMILARITY_MAX_BLOCK = 64 };

// Value for the pair (l, l+n), n = 1..max_block, is at similarity_index(s, l, n); pairs beyond the
// last layer hold NaN.
typedef struct Similarity {
    int num_layers, max_block;
    int64_t tokens;
    double *s_out, *s_mlp, *d_norm; // (num_layers, max_block)
} Similarity;

static inline size_t similarity_index(const Similarity *s, int layer, int n) {
    return (size_t)layer * (size_t)s->max_block + (size_t)(n - 1);
}

// Fills the next micro-batch; *more = false ends the calibration.
typedef Status (*CalibrationNext)(void *context, MicroBatch *batch, bool *more);

// Runs the model forward over all micro-batches, keeping only the last max_block layers' streams.
// Takes over the model's observer. Values that are not finite (broken weights) are
// STATUS_BAD_DATA naming the first layer; a calibration without tokens is STATUS_USAGE.
Status similarity_measure(Model *model, int max_block, CalibrationNext next, void *context,
                          Similarity *out) NODISCARD;
// Bytes of device memory that similarity_measure takes, for a backend of that compute dtype.
uint64_t similarity_bytes(const ModelConfig *config, const ModelOptions *options, DType compute,
                          int max_block);

// All values NaN, no tokens. Free with similarity_free.
Status similarity_create(int num_layers, int max_block, Similarity *out) NODISCARD;
void similarity_free(Similarity *similarity);

// An HDF5 file (docs/formats.md) whose user block holds a hash of the rest: a damaged file is
// refused before the HDF5 library, which is not safe on such files, sees it.
Status similarity_save(const Similarity *similarity, const char *path) NODISCARD; // atomic
Status similarity_load(const char *path, Similarity *out) NODISCARD;

void similarity_log(const Similarity *similarity); // a text table through the log

#endif
