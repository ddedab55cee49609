// Inter-layer similarity over calibration text (METHOD.md §2; Dense2MoE, Alg. 1).
#ifndef MODEL_SIMILARITY_H
#define MODEL_SIMILARITY_H

#include "base/batch.h"
#include "base/status.h"
#include "model/model.h"

// Value for the pair (l, l+n), n = 1..max_block, is at [l * max_block + n - 1]; pairs beyond the
// last layer hold NaN.
typedef struct Similarity {
    int num_layers, max_block;
    int64_t tokens;
    double *s_out, *s_mlp, *d_norm;
} Similarity;

// Fills the next micro-batch; *more = false ends the calibration.
typedef Status (*CalibrationNext)(void *context, MicroBatch *batch, bool *more);

// Runs the model forward over all micro-batches, keeping only the last max_block layers' streams.
Status similarity_measure(Model *model, int max_block, CalibrationNext next, void *context,
                          Similarity *out) NODISCARD;
// Bytes of device memory that similarity_measure takes.
uint64_t similarity_bytes(const ModelConfig *config, const ModelOptions *options, int max_block);
void similarity_free(Similarity *similarity);
Status similarity_save(const Similarity *similarity, const char *path) NODISCARD; // HDF5
Status similarity_load(const char *path, Similarity *out) NODISCARD;
void similarity_log(const Similarity *similarity); // a text table through the log

#endif
