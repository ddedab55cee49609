// Reading safetensors: 8 bytes of header length, a JSON header, packed row-major tensors.
//
// A file from anywhere is parsed as hostile: the header length is checked against a cap and the
// file's size before a byte of it is read, all products and sums are checked, and the tensors must
// tile the data section exactly, in some order, without gap, overlap or rest. What passes here can
// be read anywhere inside without another check of offsets. The rules, in the order in which
// safetensors_parse applies them:
//   1. the file has at least 8 bytes; the length n is at most 100,000,000; 8 + n <= file size
//   2. the header is UTF-8 JSON, an object; spaces around it are padding
//   3. no key twice; __metadata__ maps strings to strings
//   4. every tensor: a known type, integers >= 0 as shape, and end - begin equal to the shape's
//      size in whole bytes (no dimensions, and dimensions of zero, are legal)
//   5. by rising offset the first begins at 0, each begins where the one before ended, and the
//      last ends where the file does
#include "model/safetensors.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "base/checked.h"
#include "base/file.h"
#include "base/json.h"

enum { LENGTH_BYTES = 8, READ_CHUNK_BYTES = 1 << 16 };

// The types of the format (bits per element); the engine computes with three of them.
static const struct {
    const char *name;
    unsigned bits;
} types[] = {
    {"BOOL", 8},        {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
    {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
    {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
    {"I32", 32},        {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
    {"I64", 64},        {"U64", 64},
};

// --- One tensor of the header --------------------------------------------------------------------

static Status parse_type(const char *file, const json_t *info, SafetensorsEntry *entry,
                         unsigned *bits) {
    const char *text = json_string_value(json_object_get(info, "dtype"));
    if (!text) FAIL(STATUS_BAD_DATA, "%s: tensor %s: no dtype", file, entry->name);
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
        if (strcmp(text, types[i].name) != 0) continue;
        *bits = types[i].bits;
        memcpy(entry->dtype_name, text, strlen(text) + 1);
        entry->known_dtype = dtype_parse(text, &entry->dtype);
        return STATUS_OK;
    }
    FAIL(STATUS_BAD_DATA, "%s: tensor %s: unknown dtype \"%.32s\"", file, entry->name, text);
}

static bool parse_size(const json_t *value, uint64_t *out) {
    if (!json_is_integer(value) || json_integer_value(value) < 0) return false;
    *out = (uint64_t)json_integer_value(value);
    return true;
}

// Fills shape and count.
static Status parse_shape(const char *file, const json_t *info, SafetensorsEntry *entry) {
    const json_t *shape = json_object_get(info, "shape");
    if (!json_is_array(shape)) FAIL(STATUS_BAD_DATA, "%s: tensor %s: no shape", file, entry->name);
    size_t ndim = json_array_size(shape);
    if (ndim > SAFETENSORS_MAX_DIMS) {
        FAIL(STATUS_BAD_DATA, "%s: tensor %s: %zu dimensions, expected at most %d", file,
             entry->name, ndim, SAFETENSORS_MAX_DIMS);
    }
    entry->ndim = (int)ndim;
    entry->count = 1;
    for (size_t i = 0; i < ndim; i++) {
        if (!parse_size(json_array_get(shape, i), &entry->shape[i])) {
            FAIL(STATUS_BAD_DATA, "%s: tensor %s: dimension %zu is not an integer >= 0", file,
                 entry->name, i);
        }
        if (!checked_mul(entry->count, entry->shape[i], &entry->count))
            FAIL(STATUS_BAD_DATA, "%s: tensor %s: shape overflows 64 bits", file, entry->name);
    }
    return STATUS_OK;
}

// Fills begin and end, which must enclose exactly the shape's elements.
static Status parse_offsets(const char *file, const json_t *info, unsigned bits,
                            SafetensorsEntry *entry) {
    const json_t *offsets = json_object_get(info, "data_offsets");
    if (json_array_size(offsets) != 2 || !parse_size(json_array_get(offsets, 0), &entry->begin) ||
        !parse_size(json_array_get(offsets, 1), &entry->end)) {
        FAIL(STATUS_BAD_DATA, "%s: tensor %s: data_offsets is not a pair of integers >= 0", file,
             entry->name);
    }
    uint64_t total_bits;
    if (!checked_mul(entry->count, bits, &total_bits))
        FAIL(STATUS_BAD_DATA, "%s: tensor %s: size in bits overflows 64 bits", file, entry->name);
    if (total_bits % 8)
        FAIL(STATUS_BAD_DATA, "%s: tensor %s: not a whole number of bytes", file, entry->name);
    if (entry->end < entry->begin || entry->end - entry->begin != total_bits / 8) {
        FAIL(STATUS_BAD_DATA,
             "%s: tensor %s: data_offsets [%" PRIu64 ", %" PRIu64
             "], but its type and shape make %" PRIu64 " bytes",
             file, entry->name, entry->begin, entry->end, total_bits / 8);
    }
    return STATUS_OK;
}

static Status parse_entry(const char *file, const char *name, const json_t *info,
                          SafetensorsEntry *entry) {
    entry->name = strdup(name);
    if (!entry->name) FAIL(STATUS_INTERNAL, "out of memory parsing %s", file);
    if (!json_is_object(info))
        FAIL(STATUS_BAD_DATA, "%s: tensor %s: its header is not an object", file, name);
    unsigned bits;
    TRY(parse_type(file, info, entry, &bits));
    TRY(parse_shape(file, info, entry));
    TRY(parse_offsets(file, info, bits, entry));
    return STATUS_OK;
}

// --- The header as a whole -----------------------------------------------------------------------

static Status check_metadata(const char *file, json_t *metadata) {
    if (!json_is_object(metadata)) FAIL(STATUS_BAD_DATA, "%s: __metadata__ is not an object", file);
    const char *key;
    json_t *value;
    json_object_foreach(metadata, key, value) {
        if (!json_is_string(value)) {
            FAIL(STATUS_BAD_DATA, "%s: __metadata__ maps \"%.64s\" to something else than a string",
                 file, key);
        }
    }
    return STATUS_OK;
}

// Tensors without bytes come before the tensor that begins at the same place.
static int by_offset(const void *a, const void *b) {
    const SafetensorsEntry *x = a, *y = b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return (x->end > y->end) - (x->end < y->end);
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const SafetensorsEntry *)a)->name, ((const SafetensorsEntry *)b)->name);
}

// Rule 5.
static Status check_tiling(const char *file, const SafetensorsHeader *header, uint64_t data_bytes) {
    uint64_t expected = 0;
    for (size_t i = 0; i < header->count; i++) {
        const SafetensorsEntry *entry = &header->entries[i];
        if (entry->begin != expected) {
            FAIL(STATUS_BAD_DATA,
                 "%s: tensor %s begins at byte %" PRIu64 " of the data, expected %" PRIu64
                 ": tensors must follow each other without gap or overlap",
                 file, entry->name, entry->begin, expected);
        }
        expected = entry->end;
    }
    if (expected != data_bytes) {
        FAIL(STATUS_BAD_DATA,
             "%s: tensors end at byte %" PRIu64 " of the data, but the file holds %" PRIu64
             " bytes of it: cut short, or something was appended",
             file, expected, data_bytes);
    }
    return STATUS_OK;
}

static Status parse_tensors(const char *file, json_t *root, SafetensorsHeader *out) {
    json_t *metadata = json_object_get(root, "__metadata__");
    if (metadata) TRY(check_metadata(file, metadata));
    size_t count = json_object_size(root) - (metadata != NULL);
    out->entries = calloc(count ? count : 1, sizeof *out->entries);
    if (!out->entries) FAIL(STATUS_INTERNAL, "out of memory parsing %s", file);

    const char *name;
    json_t *info;
    json_object_foreach(root, name, info) {
        if (info == metadata) continue;
        TRY(parse_entry(file, name, info, &out->entries[out->count++]));
    }
    return STATUS_OK;
}

// Rule 1: the length of the JSON text.
static Status parse_length(const uint8_t *head, size_t head_bytes, uint64_t file_bytes,
                           const char *file, uint64_t *length) {
    if (head_bytes < LENGTH_BYTES || file_bytes < LENGTH_BYTES) {
        FAIL(STATUS_BAD_DATA, "%s: has %" PRIu64 " bytes, expected a safetensors header", file,
             file_bytes);
    }
    *length = 0;
    for (int i = 0; i < LENGTH_BYTES; i++) *length |= (uint64_t)head[i] << (8 * i);
    if (*length > SAFETENSORS_MAX_HEADER) {
        FAIL(STATUS_BAD_DATA, "%s: header of %" PRIu64 " bytes, expected at most %d", file, *length,
             SAFETENSORS_MAX_HEADER);
    }
    if (*length > file_bytes - LENGTH_BYTES) {
        FAIL(STATUS_BAD_DATA, "%s: header of %" PRIu64 " bytes, but the file has %" PRIu64, file,
             *length, file_bytes);
    }
    return STATUS_OK;
}

Status safetensors_parse(const void *head, size_t head_bytes, uint64_t file_bytes, const char *name,
                         SafetensorsHeader *out) {
    Status status = STATUS_OK;
    uint64_t length;
    json_t *root = NULL;
    memset(out, 0, sizeof *out);
    TRY(parse_length(head, head_bytes, file_bytes, name, &length));
    INVARIANT(head_bytes - LENGTH_BYTES >= length);

    out->data_offset = LENGTH_BYTES + length;
    TRY_GOTO(json_parse((const char *)head + LENGTH_BYTES, (size_t)length, name, &root), failed);
    TRY_GOTO(parse_tensors(name, root, out), failed);
    qsort(out->entries, out->count, sizeof *out->entries, by_offset);
    TRY_GOTO(check_tiling(name, out, file_bytes - out->data_offset), failed);
    qsort(out->entries, out->count, sizeof *out->entries, by_name);
    json_decref(root);
    return STATUS_OK;
failed:
    json_decref(root);
    safetensors_header_free(out);
    return status;
}

void safetensors_header_free(SafetensorsHeader *header) {
    for (size_t i = 0; i < header->count; i++) free(header->entries[i].name);
    free(header->entries);
    memset(header, 0, sizeof *header);
}

// --- An open file --------------------------------------------------------------------------------

static Status read_header(const char *path, int fd, uint64_t file_bytes, SafetensorsHeader *out) {
    uint8_t length_bytes[LENGTH_BYTES];
    uint64_t length, available = file_bytes < LENGTH_BYTES ? file_bytes : LENGTH_BYTES;
    TRY(io_pread(fd, path, length_bytes, available, 0));
    TRY(parse_length(length_bytes, available, file_bytes, path, &length));

    char *head = malloc(LENGTH_BYTES + length);
    if (!head) FAIL(STATUS_INTERNAL, "out of memory for the header of %s", path);
    Status status = io_pread(fd, path, head, LENGTH_BYTES + length, 0);
    if (status == STATUS_OK)
        status = safetensors_parse(head, LENGTH_BYTES + length, file_bytes, path, out);
    free(head);
    return status;
}

Status safetensors_open(const char *path, SafetensorsFile *out) {
    Status status = STATUS_OK;
    uint64_t file_bytes;
    *out = (SafetensorsFile){.fd = -1};
    TRY(io_file_size(path, &file_bytes));
    TRY(io_open(path, O_RDONLY, &out->fd));
    out->path = strdup(path);
    if (!out->path) FAIL_GOTO(failed, STATUS_INTERNAL, "out of memory opening %s", path);
    TRY_GOTO(read_header(path, out->fd, file_bytes, &out->header), failed);
    return STATUS_OK;
failed:
    safetensors_close(out);
    return status;
}

void safetensors_close(SafetensorsFile *file) {
    if (file->fd >= 0) close(file->fd); // read only: a failing close loses nothing
    safetensors_header_free(&file->header);
    free(file->path);
    *file = (SafetensorsFile){.fd = -1};
}

const SafetensorsEntry *safetensors_find(const SafetensorsFile *file, const char *name) {
    const SafetensorsEntry key = {.name = (char *)name};
    if (!file->header.count) return NULL;
    return bsearch(&key, file->header.entries, file->header.count, sizeof key, by_name);
}

Status safetensors_read(const SafetensorsFile *file, const SafetensorsEntry *entry, uint64_t first,
                        uint64_t count, float *out) {
    if (!entry->known_dtype) {
        FAIL(STATUS_BAD_DATA, "%s: tensor %s has dtype %s, expected F32, BF16 or F16", file->path,
             entry->name, entry->dtype_name);
    }
    INVARIANT(first <= entry->count && count <= entry->count - first);
    size_t width = dtype_bytes(entry->dtype);
    uint64_t offset = file->header.data_offset + entry->begin + first * width;
    if (entry->dtype == DTYPE_F32)
        return io_pread(file->fd, file->path, out, count * width, offset);

    char chunk[READ_CHUNK_BYTES];
    while (count > 0) {
        size_t now = count < sizeof chunk / width ? (size_t)count : sizeof chunk / width;
        TRY(io_pread(file->fd, file->path, chunk, now * width, offset));
        dtype_to_f32(entry->dtype, chunk, out, now);
        out += now;
        count -= now;
        offset += now * width;
    }
    return STATUS_OK;
}
