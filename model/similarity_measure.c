// Measures inter-layer similarity in one forward pass.
//
// The model shows its residual streams through the observer. A pair (l, l+n) can be compared when
// layer l+n runs, if layer l's streams are still there; so a ring of the last max_block layers' h
// and y is all that is ever kept. Sums stay on the device, in double, until the end.
#include "model/similarity.h"

#include <math.h>
#include <stdlib.h>

enum { POINTS = 2, SUMS = 2 }; // h and y; row_similarity's cosine and norm difference

typedef struct Probe {
    Backend *backend;
    int num_layers, hidden_size;
    int max_block;
    int slots;            // layers the ring holds
    int64_t max_tokens;   // of a micro-batch
    size_t element_bytes; // of a stream's element
    char *ring;           // (POINTS, slots, max_tokens, hidden_size) on the device
    double *sums;         // (POINTS, num_layers, max_block, SUMS) on the device
} Probe;

static int ring_slots(int num_layers, int max_block) {
    return max_block < num_layers ? max_block : num_layers;
}

static uint64_t slot_bytes(const Probe *probe) {
    return (uint64_t)probe->max_tokens * (uint64_t)probe->hidden_size * probe->element_bytes;
}

static uint64_t ring_bytes(const Probe *probe) {
    return POINTS * (uint64_t)probe->slots * slot_bytes(probe);
}

static size_t sums_count(const Probe *probe) {
    return POINTS * (size_t)probe->num_layers * (size_t)probe->max_block * SUMS;
}

static Probe probe_shape(const ModelConfig *config, const ModelOptions *options, DType compute,
                         int max_block) {
    return (Probe){.num_layers = config->num_layers,
                   .hidden_size = config->hidden_size,
                   .max_block = max_block,
                   .slots = ring_slots(config->num_layers, max_block),
                   .max_tokens = options->micro_batch * options->sequence_length,
                   .element_bytes = dtype_bytes(compute)};
}

uint64_t similarity_bytes(const ModelConfig *config, const ModelOptions *options, DType compute,
                          int max_block) {
    Probe probe = probe_shape(config, options, compute, max_block);
    return ring_bytes(&probe) + sums_count(&probe) * sizeof(double);
}

static char *probe_slot(const Probe *probe, ObservePoint point, int layer) {
    size_t slot = (size_t)(point * probe->slots + layer % probe->slots);
    return probe->ring + slot * slot_bytes(probe);
}

static size_t probe_index(const Probe *probe, ObservePoint point, int layer, int n) {
    size_t row = (size_t)(point * probe->num_layers + layer);
    return (row * (size_t)probe->max_block + (size_t)(n - 1)) * SUMS;
}

// Compares this layer's stream with those of the layers before it, then takes the place of the
// oldest of them.
static Status observe(void *context, int layer, ObservePoint point, const void *x, int64_t tokens) {
    const Probe *probe = context;
    const BackendOps *ops = probe->backend->ops;
    INVARIANT(tokens <= probe->max_tokens);
    for (int n = 1; n <= probe->slots && n <= layer; n++) {
        RowSimilarityArgs args = {
            .tokens = tokens,
            .hidden_size = probe->hidden_size,
            .a = probe_slot(probe, point, layer - n),
            .b = x,
            .sums = probe->sums + probe_index(probe, point, layer - n, n),
        };
        TRY(ops->row_similarity(probe->backend, &args));
    }
    size_t bytes = (size_t)tokens * (size_t)probe->hidden_size * probe->element_bytes;
    return ops->copy(probe->backend, probe_slot(probe, point, layer), x, bytes);
}

static Status run_calibration(Model *model, CalibrationNext next, void *context, int64_t *tokens) {
    *tokens = 0;
    for (;;) {
        MicroBatch batch;
        bool more;
        TRY(next(context, &batch, &more));
        if (!more) break;
        batch.targets = NULL; // the streams are all we want: no LM head, no loss
        TRY(model_forward(model, &batch));
        *tokens += batch.batch * batch.sequence_length;
    }
    if (*tokens == 0)
        FAIL(STATUS_USAGE, "similarity: no calibration text; lfuc.calibration_sequences and "
                           "data.train must give at least one sequence");
    return STATUS_OK;
}

// Divides the sums into the means of the three measures.
static Status read_means(const Probe *probe, const double *sums, Similarity *out) {
    double tokens = (double)out->tokens;
    for (int l = 0; l < out->num_layers; l++) {
        for (int n = 1; n <= out->max_block && l + n < out->num_layers; n++) {
            const double *h = sums + probe_index(probe, OBSERVE_MLP_INPUT, l, n);
            const double *y = sums + probe_index(probe, OBSERVE_LAYER_OUTPUT, l, n);
            size_t i = similarity_index(out, l, n);
            out->s_out[i] = y[0] / tokens;
            out->s_mlp[i] = h[0] / tokens;
            out->d_norm[i] = h[1] / tokens;
            if (!isfinite(out->s_out[i] + out->s_mlp[i] + out->d_norm[i]))
                FAIL(STATUS_BAD_DATA,
                     "similarity: the hidden states of layer %d or %d are not finite; the model's "
                     "weights are damaged or do not fit its config.json",
                     l, l + n);
        }
    }
    return STATUS_OK;
}

static Status probe_read(const Probe *probe, Similarity *out) {
    size_t count = sums_count(probe);
    double *sums = malloc(count * sizeof *sums);
    if (!sums) FAIL(STATUS_INTERNAL, "out of memory: %zu similarity sums", count);
    Status status;
    TRY_GOTO(probe->backend->ops->download(probe->backend, sums, probe->sums, count * sizeof *sums),
             done);
    status = read_means(probe, sums, out);
done:
    free(sums);
    return status;
}

Status similarity_measure(Model *model, int max_block, CalibrationNext next, void *context,
                          Similarity *out) {
    Backend *backend = model->backend;
    Probe probe = probe_shape(&model->config, &model->options, backend->compute_dtype, max_block);
    probe.backend = backend;
    *out = (Similarity){0};
    Status status;
    TRY_GOTO(similarity_create(model->config.num_layers, max_block, out), done);
    TRY_GOTO(backend->ops->alloc(backend, ring_bytes(&probe), (void **)&probe.ring), done);
    TRY_GOTO(
        backend->ops->alloc(backend, sums_count(&probe) * sizeof(double), (void **)&probe.sums),
        done);
    model_set_observer(model, observe, &probe);
    TRY_GOTO(run_calibration(model, next, context, &out->tokens), done);
    TRY_GOTO(probe_read(&probe, out), done);
done:
    model_set_observer(model, NULL, NULL);
    if (probe.sums) backend->ops->release(backend, probe.sums);
    if (probe.ring) backend->ops->release(backend, probe.ring);
    if (status != STATUS_OK) similarity_free(out);
    return status;
}
