// The safetensors file format, read strictly and written byte-deterministically.
// Rules: https://huggingface.co/docs/safetensors; every size is checked before it is used, and a
// violation is STATUS_BAD_DATA naming file, tensor and rule.
#ifndef MODEL_SAFETENSORS_H
#define MODEL_SAFETENSORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "base/dtype.h"
#include "base/hash.h"
#include "base/status.h"

enum { SAFETENSORS_MAX_HEADER = 100000000, SAFETENSORS_MAX_DIMS = 8 };

typedef struct SafetensorsEntry {
    char *name;
    bool known_dtype; // false: a type the engine does not compute with (legal in a file)
    DType dtype;
    char dtype_name[16];
    int ndim;
    uint64_t shape[SAFETENSORS_MAX_DIMS];
    uint64_t count;      // elements
    uint64_t begin, end; // bytes from the start of the data section
} SafetensorsEntry;

typedef struct SafetensorsHeader {
    SafetensorsEntry *entries; // sorted by name
    size_t count;
    uint64_t data_offset; // where the data section starts in the file
} SafetensorsHeader;

// Parses a header from memory: `head` holds the file's first bytes (length and JSON), `file_bytes`
// is the size of the whole file. The fuzz target's entry.
Status safetensors_parse(const void *head, size_t head_bytes, uint64_t file_bytes, const char *name,
                         SafetensorsHeader *out) NODISCARD;
void safetensors_header_free(SafetensorsHeader *header);

// An open file.
typedef struct SafetensorsFile {
    char *path;
    int fd;
    SafetensorsHeader header;
} SafetensorsFile;
Status safetensors_open(const char *path, SafetensorsFile *out) NODISCARD;
void safetensors_close(SafetensorsFile *file);
const SafetensorsEntry *safetensors_find(const SafetensorsFile *file, const char *name);
// Elements [first, first + count) as fp32. Threads may read one file at the same time.
Status safetensors_read(const SafetensorsFile *file, const SafetensorsEntry *entry, uint64_t first,
                        uint64_t count, float *out) NODISCARD;

// Writing: declare all tensors, then append their data in the declared order, in any pieces. Wider
// types first keeps every tensor aligned to its element size.
// The file is `path` itself (the caller owns atomic visibility: write into a temporary directory
// or name). The running hash covers every byte written.
typedef struct SafetensorsWriter SafetensorsWriter;
typedef struct SafetensorsSpec {
    const char *name;
    DType dtype;
    int ndim;
    int64_t shape[SAFETENSORS_MAX_DIMS];
} SafetensorsSpec;
// metadata: alternating keys and values, NULL-terminated, or NULL; {"format": "pt"} is always set.
Status safetensors_writer_open(const char *path, const SafetensorsSpec *specs, size_t count,
                               const char *const *metadata, SafetensorsWriter **out) NODISCARD;
// The next `count` fp32 elements, converted to the current tensor's dtype.
Status safetensors_writer_append(SafetensorsWriter *writer, const float *values,
                                 uint64_t count) NODISCARD;
// Fails unless everything declared was appended; fsyncs; gives size and hashes. Frees the writer
// either way, and removes the file when it fails.
Status safetensors_writer_finish(SafetensorsWriter *writer, FileHash *out) NODISCARD;
void safetensors_writer_abort(SafetensorsWriter *writer); // closes and unlinks; NULL is fine

#endif
