// Weights in and out of a model: loading from a TensorSource, random initialisation, and the model
// itself as a source. Everything goes through one bounded buffer of fp32 values, whatever the dtype
// and wherever the memory of the backend is.
#include <stdlib.h>
#include "base/random.h"
#include "model/model.h"

enum { PIECE_ELEMENTS = 1 << 20 };

static DType dtype_in_copy(const Model *model, const Tensor *tensor) {
    return tensor->role == ROLE_ROUTER ? DTYPE_F32 : model->backend->compute_dtype;
}

static char *in_copy(const Model *model, const Tensor *tensor, int64_t first) {
    return (char *)model->params + tensor_table_copy_bytes(&model->table,
                                                           model->backend->compute_dtype,
                                                           tensor->offset + first);
}

// --- In ------------------------------------------------------------------------------------------

// The elements [begin, begin + count) of the arena that this rank keeps in fp32.
static Status write_master_parts(Model *model, int64_t begin, int64_t count, const float *values) {
    Backend *backend = model->backend;
    for (int i = 0; i < model->num_master_parts; i++) {
        const MasterPart *part = &model->master_parts[i];
        int64_t from = part->begin > begin ? part->begin : begin;
        int64_t part_end = part->begin + part->count, end = begin + count;
        int64_t to = part_end < end ? part_end : end;
        if (from >= to) continue;
        TRY(backend->ops->upload(backend, part->values + (from - part->begin),
                                 values + (from - begin), (size_t)(to - from) * sizeof(float)));
    }
    return STATUS_OK;
}

// Writes elements [first, first + count) of a tensor from fp32 values; `scratch` has room for as
// many.
static Status write_piece(Model *model, const Tensor *tensor, int64_t first, size_t count,
                          const float *values, void *scratch) {
    Backend *backend = model->backend;
    const BackendOps *ops = backend->ops;
    DType dtype = dtype_in_copy(model, tensor);
    if (model->master)
        TRY(ops->upload(backend, model->master + tensor->offset + first, values,
                        count * sizeof(float)));
    TRY(write_master_parts(model, tensor->offset + first, (int64_t)count, values));
    if (model->params == (void *)model->master) return STATUS_OK;
    dtype_from_f32(dtype, values, scratch, count);
    TRY(ops->upload(backend, in_copy(model, tensor, first), scratch, count * dtype_bytes(dtype)));
    return STATUS_OK;
}

// Gives elements [first, first + count) of a tensor.
typedef Status (*Filler)(void *context, const Tensor *tensor, int64_t first, int64_t count,
                         float *out);

static Status fill_model(Model *model, Filler fill, void *context) {
    Status status = STATUS_OK;
    float *values = malloc(PIECE_ELEMENTS * sizeof *values);
    float *scratch = malloc(PIECE_ELEMENTS * sizeof *scratch);
    if (!values || !scratch) FAIL_GOTO(done, STATUS_INTERNAL, "out of memory for loading weights");
    for (int i = 0; i < model->table.count; i++) {
        const Tensor *tensor = &model->table.tensors[i];
        for (int64_t first = 0; first < tensor->count; first += PIECE_ELEMENTS) {
            int64_t count = tensor->count - first;
            if (count > PIECE_ELEMENTS) count = PIECE_ELEMENTS;
            TRY_GOTO(fill(context, tensor, first, count, values), done);
            TRY_GOTO(write_piece(model, tensor, first, (size_t)count, values, scratch), done);
        }
    }
done:
    free(scratch);
    free(values);
    return status;
}

static Status from_source(void *context, const Tensor *tensor, int64_t first, int64_t count,
                          float *out) {
    TensorSource *source = context;
    const Tensor *theirs = tensor_table_find(source->table, tensor->name);
    if (!theirs) FAIL(STATUS_BAD_DATA, "the weights' source has no tensor %s", tensor->name);
    if (theirs->ndim != tensor->ndim || theirs->shape[0] != tensor->shape[0] ||
        theirs->shape[1] != tensor->shape[1]) {
        FAIL(STATUS_BAD_DATA,
             "tensor %s has shape (%lld, %lld) in the source, expected "
             "(%lld, %lld)",
             tensor->name, (long long)theirs->shape[0], (long long)theirs->shape[1],
             (long long)tensor->shape[0], (long long)tensor->shape[1]);
    }
    TRY(source->read(source, theirs, first, count, out));
    return STATUS_OK;
}

Status model_load(Model *model, TensorSource *source) {
    const bool has_all = model->table.layout.expert_ranks <= 1;
    if (has_all && source->table->count != model->table.count) {
        FAIL(STATUS_BAD_DATA, "the weights' source has %d tensors, the model %d",
             source->table->count, model->table.count);
    }
    TRY(fill_model(model, from_source, source));
    return STATUS_OK;
}

typedef struct RandomWeights {
    uint64_t seed;
    float stddev;
} RandomWeights;

static Status from_random(void *context, const Tensor *tensor, int64_t first, int64_t count,
                          float *out) {
    const RandomWeights *random = context;
    if (tensor->role == ROLE_NORM || tensor->role == ROLE_QKV_BIAS) {
        float value = tensor->role == ROLE_NORM ? 1.0f : 0.0f;
        for (int64_t i = 0; i < count; i++) out[i] = value;
        return STATUS_OK;
    }
    random_normal_fill(out, (size_t)count, random->seed, random_stream(tensor->name),
                       (uint64_t)first, 0.0f, random->stddev);
    return STATUS_OK;
}

Status model_init_random(Model *model, uint64_t seed, float stddev) {
    RandomWeights random = {seed, stddev};
    TRY(fill_model(model, from_random, &random));
    return STATUS_OK;
}

// --- Out -----------------------------------------------------------------------------------------

typedef struct ModelSource {
    TensorSource base;
    Model *model;
} ModelSource;

// The master is fp32 and needs no conversion.
static Status read_model(TensorSource *source, const Tensor *tensor, int64_t first, int64_t count,
                         float *out) {
    Model *model = ((ModelSource *)source)->model;
    Backend *backend = model->backend;
    if (model->master) {
        TRY(backend->ops->download(backend, out, model->master + tensor->offset + first,
                                   (size_t)count * sizeof(float)));
        return STATUS_OK;
    }
    DType dtype = dtype_in_copy(model, tensor);
    _Alignas(float) char piece[1 << 14];
    int64_t room = (int64_t)(sizeof piece / dtype_bytes(dtype));
    for (int64_t done = 0; done < count; done += room) {
        size_t now = (size_t)(count - done < room ? count - done : room);
        TRY(backend->ops->download(backend, piece, in_copy(model, tensor, first + done),
                                   now * dtype_bytes(dtype)));
        dtype_to_f32(dtype, piece, out + done, now);
    }
    return STATUS_OK;
}

static void close_source(TensorSource *source) {
    free(source);
}

Status model_source(Model *model, TensorSource **out) {
    ModelSource *source = calloc(1, sizeof *source);
    if (!source) FAIL(STATUS_INTERNAL, "out of memory for a weight source");
    source->base = (TensorSource){
        .config = &model->config,
        .table = &model->table,
        .dtype = model->master ? DTYPE_F32 : model->backend->compute_dtype,
        .read = read_model,
        .close = close_source,
    };
    source->model = model;
    *out = &source->base;
    return STATUS_OK;
}
