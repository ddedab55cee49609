// Writing safetensors: the header is complete before the first element, so a file of any size
// streams through one small buffer, and equal input gives equal bytes.
//
// Tensors lie in the declared order. Offsets inside the data section stay a multiple of the element
// size as long as wider types are declared before narrower ones.
#include "model/safetensors.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "base/checked.h"
#include "base/file.h"
#include "base/json.h"

enum { HEADER_ALIGN = 8, LENGTH_BYTES = 8, BUFFER_BYTES = 1 << 20 };

typedef struct Pending {
    char *name;
    DType dtype;
    uint64_t count; // elements
} Pending;

struct SafetensorsWriter {
    char *path;
    int fd;
    bool created; // the file is ours to remove when writing fails
    HashStream *hash;
    uint64_t data_bytes; // that were declared
    Pending *tensors;
    size_t num_tensors, current;
    uint64_t appended; // elements of the current tensor
    size_t used;       // bytes in the buffer
    char *buffer;      // (BUFFER_BYTES)
};

// --- The header ----------------------------------------------------------------------------------

static Status spec_count(const char *path, const SafetensorsSpec *spec, uint64_t *count) {
    INVARIANT(spec->ndim >= 0 && spec->ndim <= SAFETENSORS_MAX_DIMS);
    *count = 1;
    for (int i = 0; i < spec->ndim; i++) {
        if (spec->shape[i] < 0 || !checked_mul(*count, (uint64_t)spec->shape[i], count))
            FAIL(STATUS_INTERNAL, "%s: shape of tensor %s overflows", path, spec->name);
    }
    return STATUS_OK;
}

static json_t *tensor_json(const SafetensorsSpec *spec, uint64_t begin, uint64_t end) {
    json_t *shape = json_array();
    for (int i = 0; i < spec->ndim; i++)
        json_array_append_new(shape, json_integer((json_int_t)spec->shape[i]));
    return json_pack("{s:s, s:o, s:[I, I]}", "dtype", dtype_name(spec->dtype), "shape", shape,
                     "data_offsets", (json_int_t)begin, (json_int_t)end);
}

static Status set_metadata(json_t *root, const char *const *metadata) {
    json_t *object = json_pack("{s:s}", "format", "pt"); // older readers refuse files without it
    json_object_set_new(root, "__metadata__", object);
    for (; object && metadata && metadata[0]; metadata += 2) {
        if (json_object_set_new(object, metadata[0], json_string(metadata[1])) != 0)
            FAIL(STATUS_INTERNAL, "safetensors metadata \"%s\": out of memory or not UTF-8",
                 metadata[0]);
    }
    return STATUS_OK;
}

// Builds the JSON header and the list of pending tensors.
static Status build_header(SafetensorsWriter *writer, const SafetensorsSpec *specs, size_t count,
                           const char *const *metadata, json_t *root) {
    TRY(set_metadata(root, metadata));
    uint64_t begin = 0, end;
    for (size_t i = 0; i < count; i++) {
        Pending *pending = &writer->tensors[i];
        uint64_t bytes;
        TRY(spec_count(writer->path, &specs[i], &pending->count));
        if (!checked_mul(pending->count, dtype_bytes(specs[i].dtype), &bytes) ||
            !checked_add(begin, bytes, &end) || end > INT64_MAX)
            FAIL(STATUS_INTERNAL, "%s: tensor %s: offset overflows", writer->path, specs[i].name);
        INVARIANT(!json_object_get(root, specs[i].name)); // each name once
        pending->dtype = specs[i].dtype;
        pending->name = strdup(specs[i].name);
        if (!pending->name ||
            json_object_set_new(root, specs[i].name, tensor_json(&specs[i], begin, end)) != 0)
            FAIL(STATUS_INTERNAL, "%s: out of memory declaring %s", writer->path, specs[i].name);
        begin = end;
    }
    writer->data_bytes = begin;
    return STATUS_OK;
}

static Status write_bytes(SafetensorsWriter *writer, const void *data, size_t bytes) {
    TRY(io_write(writer->fd, writer->path, data, bytes));
    hash_stream_update(writer->hash, data, bytes);
    return STATUS_OK;
}

// Length, text, and spaces up to a multiple of 8, so that the data section is aligned.
static Status write_header(SafetensorsWriter *writer, const json_t *root) {
    char *text = json_dumps(root, JSON_COMPACT);
    if (!text) FAIL(STATUS_INTERNAL, "%s: out of memory for the header", writer->path);
    size_t length = strlen(text), padded = round_up(length, HEADER_ALIGN);
    uint8_t prefix[LENGTH_BYTES];
    for (int i = 0; i < LENGTH_BYTES; i++) prefix[i] = (uint8_t)((uint64_t)padded >> (8 * i));

    hash_stream_blocks(writer->hash, LENGTH_BYTES + padded + writer->data_bytes);
    Status status = write_bytes(writer, prefix, sizeof prefix);
    if (status == STATUS_OK) status = write_bytes(writer, text, length);
    if (status == STATUS_OK) status = write_bytes(writer, "        ", padded - length);
    free(text);
    return status;
}

// --- The writer ----------------------------------------------------------------------------------

static void free_writer(SafetensorsWriter *writer) {
    if (writer->fd >= 0) close(writer->fd);
    for (size_t i = 0; i < writer->num_tensors; i++) free(writer->tensors[i].name);
    free(writer->tensors);
    free(writer->buffer);
    free(writer->path);
    hash_stream_free(writer->hash);
    free(writer);
}

static Status create(const char *path, size_t count, SafetensorsWriter **out) {
    SafetensorsWriter *writer = calloc(1, sizeof *writer);
    if (!writer) FAIL(STATUS_INTERNAL, "out of memory writing %s", path);
    *out = writer;
    writer->fd = -1;
    writer->num_tensors = count;
    writer->path = strdup(path);
    writer->buffer = malloc(BUFFER_BYTES);
    writer->tensors = calloc(count ? count : 1, sizeof *writer->tensors);
    if (!writer->tensors) writer->num_tensors = 0;
    if (!writer->path || !writer->buffer || !writer->tensors)
        FAIL(STATUS_INTERNAL, "out of memory writing %s", path);
    TRY(hash_stream_create(&writer->hash));
    return STATUS_OK;
}

Status safetensors_writer_open(const char *path, const SafetensorsSpec *specs, size_t count,
                               const char *const *metadata, SafetensorsWriter **out) {
    Status status = STATUS_OK;
    SafetensorsWriter *writer = NULL;
    json_t *root = json_object();
    *out = NULL;
    if (!root) FAIL(STATUS_INTERNAL, "out of memory writing %s", path);
    TRY_GOTO(create(path, count, &writer), failed);
    TRY_GOTO(build_header(writer, specs, count, metadata, root), failed);
    TRY_GOTO(io_open(path, O_WRONLY | O_CREAT | O_TRUNC, &writer->fd), failed);
    writer->created = true;
    TRY_GOTO(write_header(writer, root), failed);
    json_decref(root);
    *out = writer;
    return STATUS_OK;
failed:
    json_decref(root);
    safetensors_writer_abort(writer);
    return status;
}

static Status flush(SafetensorsWriter *writer) {
    TRY(write_bytes(writer, writer->buffer, writer->used));
    writer->used = 0;
    return STATUS_OK;
}

// Moves on to the next tensor that has elements.
static void skip_complete(SafetensorsWriter *writer) {
    while (writer->current < writer->num_tensors &&
           writer->appended == writer->tensors[writer->current].count) {
        writer->current++;
        writer->appended = 0;
    }
}

Status safetensors_writer_append(SafetensorsWriter *writer, const float *values, uint64_t count) {
    while (count > 0) {
        skip_complete(writer);
        INVARIANT(writer->current < writer->num_tensors); // more than was declared
        const Pending *tensor = &writer->tensors[writer->current];
        size_t width = dtype_bytes(tensor->dtype);
        if (BUFFER_BYTES - writer->used < width) TRY(flush(writer));
        uint64_t now = (BUFFER_BYTES - writer->used) / width;
        if (now > tensor->count - writer->appended) now = tensor->count - writer->appended;
        if (now > count) now = count;
        dtype_from_f32(tensor->dtype, values, writer->buffer + writer->used, now);
        writer->used += now * width;
        writer->appended += now;
        values += now;
        count -= now;
    }
    return STATUS_OK;
}

static Status finish(SafetensorsWriter *writer) {
    skip_complete(writer);
    if (writer->current < writer->num_tensors) {
        const Pending *tensor = &writer->tensors[writer->current];
        FAIL(STATUS_INTERNAL, "%s: tensor %s: %" PRIu64 " of %" PRIu64 " elements were appended",
             writer->path, tensor->name, writer->appended, tensor->count);
    }
    TRY(flush(writer));
    TRY(io_fsync(writer->fd, writer->path));
    int fd = writer->fd;
    writer->fd = -1;
    TRY(io_close(fd, writer->path));
    return STATUS_OK;
}

Status safetensors_writer_finish(SafetensorsWriter *writer, FileHash *out) {
    Status status = STATUS_OK;
    TRY_GOTO(finish(writer), failed);
    hash_stream_finish(writer->hash, out);
    free_writer(writer);
    return STATUS_OK;
failed:
    safetensors_writer_abort(writer);
    return status;
}

void safetensors_writer_abort(SafetensorsWriter *writer) {
    if (!writer) return;
    // What failed first is what gets reported; a rest that cannot be removed adds nothing to it.
    if (writer->created) unlink(writer->path);
    free_writer(writer);
}
