// Where the arrays of a shard lie, asked of HDF5.
//
// The library is not safe on hostile files (random changes of a few bytes crash it or make it
// hang), so this code runs in a child process, on files whose hash is known, and accepts one
// profile only: a root group with the two datasets, each contiguous, one-dimensional and of one
// exact type, without filters, external or virtual storage or links, and scalar attributes without
// variable-length data. The offset that HDF5 reports is believed after it lies inside the file and
// the first and last elements read at it are those that HDF5 reads.
#include "data/shard.h"

#include <fcntl.h>
#include <hdf5.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "base/checked.h"
#include "base/file.h"

enum { REASON_MAX = 256 };
static const char other_profile[] = "another shard profile; convert with scripts/import_tokens.py";

// --- HDF5's own account of a failure -------------------------------------------------------------

static herr_t keep_innermost(unsigned depth, const H5E_error2_t *error, void *context) {
    if (depth == 0 && error->desc) snprintf(context, REASON_MAX, "%s", error->desc);
    return 0;
}

static const char *hdf5_reason(char reason[REASON_MAX]) {
    snprintf(reason, REASON_MAX, "no reason given");
    (void)H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, keep_innermost, reason);
    return reason;
}

// --- Attributes ----------------------------------------------------------------------------------

// Opens a scalar attribute of the root group and its type.
static Status open_attribute(hid_t file, const char *path, const char *name, hid_t *attribute,
                             hid_t *type) {
    if (H5Aexists(file, name) <= 0) {
        FAIL(STATUS_BAD_DATA, "%s: attribute \"%s\" is missing: not a token shard (%s)", path, name,
             other_profile);
    }
    *attribute = H5Aopen(file, name, H5P_DEFAULT);
    *type = *attribute < 0 ? -1 : H5Aget_type(*attribute);
    hid_t space = *type < 0 ? -1 : H5Aget_space(*attribute);
    bool scalar = space >= 0 && H5Sget_simple_extent_type(space) == H5S_SCALAR;
    if (space >= 0) H5Sclose(space);
    if (!scalar) FAIL(STATUS_BAD_DATA, "%s: attribute \"%s\" is not a single value", path, name);
    return STATUS_OK;
}

static void close_attribute(hid_t attribute, hid_t type) {
    if (type >= 0) H5Tclose(type);
    if (attribute >= 0) H5Aclose(attribute);
}

static Status read_int(hid_t file, const char *path, const char *name, int64_t min, int64_t max,
                       int64_t *out) {
    Status status = STATUS_OK;
    hid_t attribute = -1, type = -1;
    TRY_GOTO(open_attribute(file, path, name, &attribute, &type), done);
    if (H5Tget_class(type) != H5T_INTEGER || H5Aread(attribute, H5T_NATIVE_INT64, out) < 0)
        FAIL_GOTO(done, STATUS_BAD_DATA, "%s: attribute \"%s\" is not an integer", path, name);
    if (*out < min || *out > max) {
        FAIL_GOTO(done, STATUS_BAD_DATA,
                  "%s: attribute \"%s\" is %" PRId64 ", expected %" PRId64 " to %" PRId64, path,
                  name, *out, min, max);
    }
done:
    close_attribute(attribute, type);
    return status;
}

static Status read_text(hid_t file, const char *path, const char *name, char *out, size_t size) {
    Status status = STATUS_OK;
    hid_t attribute = -1, type = -1;
    TRY_GOTO(open_attribute(file, path, name, &attribute, &type), done);
    char text[SHARD_SOURCE_SIZE + 1] = ""; // a NUL more than the longest text
    bool fixed = H5Tget_class(type) == H5T_STRING && H5Tis_variable_str(type) == 0;
    size_t bytes = fixed ? H5Tget_size(type) : 0;
    if (bytes == 0 || bytes >= sizeof text || H5Aread(attribute, type, text) < 0 ||
        strlen(text) >= size) {
        FAIL_GOTO(done, STATUS_BAD_DATA,
                  "%s: attribute \"%s\" is not a fixed-length string of at most %zu bytes", path,
                  name, size - 1);
    }
    memcpy(out, text, strlen(text) + 1);
done:
    close_attribute(attribute, type);
    return status;
}

static bool is_digest(const char *text) {
    return strlen(text) == SHARD_ID_SIZE - 1 &&
           strspn(text, "0123456789abcdef") == SHARD_ID_SIZE - 1;
}

static Status read_attributes(hid_t file, const char *path, ShardLayout *out) {
    char format[32];
    int64_t version;
    TRY(read_text(file, path, "format", format, sizeof format));
    if (strcmp(format, "dense2moe-shard") != 0) {
        FAIL(STATUS_BAD_DATA, "%s: attribute \"format\" is \"%s\", expected \"dense2moe-shard\"",
             path, format);
    }
    TRY(read_int(file, path, "version", INT64_MIN, INT64_MAX, &version));
    if (version != SHARD_VERSION) {
        FAIL(STATUS_BAD_DATA, "%s: is a shard of version %" PRId64 ", this program reads %d", path,
             version, SHARD_VERSION);
    }
    TRY(read_int(file, path, "vocab_size", 1, INT32_MAX, &out->vocab_size));
    TRY(read_int(file, path, "eos_id", -1, out->vocab_size - 1, &out->eos_id));
    TRY(read_text(file, path, "tokenizer_sha256", out->tokenizer_id, sizeof out->tokenizer_id));
    if (!is_digest(out->tokenizer_id)) {
        FAIL(STATUS_BAD_DATA,
             "%s: attribute \"tokenizer_sha256\" is \"%s\", expected 64 hex digits", path,
             out->tokenizer_id);
    }
    return read_text(file, path, "source", out->source, sizeof out->source);
}

// --- Datasets ------------------------------------------------------------------------------------

static Status check_storage(hid_t dataset, const char *path, const char *name) {
    static const char *const layouts[] = {[H5D_COMPACT] = "compact",
                                          [H5D_CONTIGUOUS] = "contiguous",
                                          [H5D_CHUNKED] = "chunked",
                                          [H5D_VIRTUAL] = "virtual"};
    hid_t creation = H5Dget_create_plist(dataset);
    if (creation < 0) FAIL(STATUS_BAD_DATA, "%s: /%s has no readable properties", path, name);
    H5D_layout_t layout = H5Pget_layout(creation);
    int filters = H5Pget_nfilters(creation), external = H5Pget_external_count(creation);
    H5Pclose(creation);
    if (layout != H5D_CONTIGUOUS) {
        bool known = layout >= H5D_COMPACT && layout <= H5D_VIRTUAL;
        FAIL(STATUS_BAD_DATA, "%s: /%s is %s, expected contiguous (%s)", path, name,
             known ? layouts[layout] : "of an unknown layout", other_profile);
    }
    if (filters != 0) FAIL(STATUS_BAD_DATA, "%s: /%s has filters (%s)", path, name, other_profile);
    if (external != 0)
        FAIL(STATUS_BAD_DATA, "%s: /%s is stored in external files (%s)", path, name,
             other_profile);
    return STATUS_OK;
}

static Status check_shape(hid_t dataset, const char *path, const char *name, uint64_t *count) {
    hid_t space = H5Dget_space(dataset);
    int dimensions = space < 0 ? -1 : H5Sget_simple_extent_ndims(space);
    hsize_t size = 0;
    if (dimensions == 1) H5Sget_simple_extent_dims(space, &size, NULL);
    if (space >= 0) H5Sclose(space);
    if (dimensions != 1) {
        FAIL(STATUS_BAD_DATA, "%s: /%s has %d dimensions, expected 1 (%s)", path, name, dimensions,
             other_profile);
    }
    if (size == 0) FAIL(STATUS_BAD_DATA, "%s: /%s is empty", path, name);
    *count = size;
    return STATUS_OK;
}

// The element size if the type is one of the two expected (`narrow` may be 0).
static Status check_type(hid_t dataset, const char *path, const char *name, hid_t wide,
                         hid_t narrow, int *bytes) {
    hid_t type = H5Dget_type(dataset);
    *bytes = 0;
    if (type >= 0 && H5Tequal(type, wide) > 0) *bytes = (int)H5Tget_size(wide);
    if (type >= 0 && narrow && H5Tequal(type, narrow) > 0) *bytes = (int)H5Tget_size(narrow);
    size_t found_bytes = type >= 0 ? H5Tget_size(type) : 0;
    bool integer = type >= 0 && H5Tget_class(type) == H5T_INTEGER;
    if (type >= 0) H5Tclose(type);
    if (*bytes == 0) {
        FAIL(STATUS_BAD_DATA, "%s: /%s holds %s of %zu bytes, expected %s (%s)", path, name,
             integer ? "integers" : "another type", found_bytes,
             narrow ? "little-endian uint32 or uint16" : "little-endian uint64", other_profile);
    }
    return STATUS_OK;
}

// HDF5's element `index` is the one at `offset` in the file.
static Status check_element(hid_t dataset, int fd, const char *path, const char *name,
                            uint64_t index, uint64_t offset, int bytes) {
    unsigned char expected[8] = {0}, found[8] = {0};
    hsize_t start = index, one = 1;
    hid_t memory = H5Screate_simple(1, &one, NULL), file = H5Dget_space(dataset);
    hid_t type = H5Dget_type(dataset);
    bool read = memory >= 0 && file >= 0 && type >= 0 &&
                H5Sselect_hyperslab(file, H5S_SELECT_SET, &start, NULL, &one, NULL) >= 0 &&
                H5Dread(dataset, type, memory, file, H5P_DEFAULT, expected) >= 0;
    if (type >= 0) H5Tclose(type);
    if (file >= 0) H5Sclose(file);
    if (memory >= 0) H5Sclose(memory);
    if (!read) FAIL(STATUS_BAD_DATA, "%s: /%s cannot be read", path, name);
    TRY(io_pread(fd, path, found, (size_t)bytes, offset + index * (uint64_t)bytes));
    if (memcmp(expected, found, sizeof found) != 0)
        FAIL(STATUS_BAD_DATA, "%s: /%s does not lie where HDF5 says it does", path, name);
    return STATUS_OK;
}

typedef struct Place {
    uint64_t offset, count;
    int bytes;
} Place;

static Status locate(hid_t dataset, int fd, const char *path, const char *name, uint64_t file_bytes,
                     Place *place) {
    uint64_t size, end;
    TRY(check_storage(dataset, path, name));
    TRY(check_shape(dataset, path, name, &place->count));
    haddr_t offset = H5Dget_offset(dataset);
    if (offset == HADDR_UNDEF)
        FAIL(STATUS_BAD_DATA, "%s: /%s has no place in the file: it was never written", path, name);
    place->offset = offset;
    if (!checked_mul(place->count, (uint64_t)place->bytes, &size) ||
        !checked_add(place->offset, size, &end) || end > file_bytes) {
        FAIL(STATUS_BAD_DATA,
             "%s: /%s has %" PRIu64 " elements at offset %" PRIu64 ", beyond the file's %" PRIu64
             " bytes",
             path, name, place->count, place->offset, file_bytes);
    }
    TRY(check_element(dataset, fd, path, name, 0, place->offset, place->bytes));
    return check_element(dataset, fd, path, name, place->count - 1, place->offset, place->bytes);
}

static Status read_dataset(hid_t file, int fd, const char *path, const char *name, hid_t wide,
                           hid_t narrow, uint64_t file_bytes, Place *place) {
    H5L_info_t link;
    if (H5Lexists(file, name, H5P_DEFAULT) <= 0)
        FAIL(STATUS_BAD_DATA, "%s: /%s is missing (%s)", path, name, other_profile);
    // Checked before anything is opened: a link could lead to another file.
    if (H5Lget_info(file, name, &link, H5P_DEFAULT) < 0 || link.type != H5L_TYPE_HARD) {
        FAIL(STATUS_BAD_DATA, "%s: /%s is a link to elsewhere, expected a dataset (%s)", path, name,
             other_profile);
    }
    hid_t dataset = H5Dopen2(file, name, H5P_DEFAULT);
    if (dataset < 0) FAIL(STATUS_BAD_DATA, "%s: /%s is not a dataset", path, name);
    Status status = check_type(dataset, path, name, wide, narrow, &place->bytes);
    if (status == STATUS_OK) status = locate(dataset, fd, path, name, file_bytes, place);
    H5Dclose(dataset);
    return status;
}

static Status check_root(hid_t file, const char *path) {
    H5G_info_t group;
    if (H5Gget_info(file, &group) < 0) FAIL(STATUS_BAD_DATA, "%s: no readable root group", path);
    if (group.nlinks != 2) {
        FAIL(STATUS_BAD_DATA,
             "%s: holds %" PRIu64 " objects, expected the two datasets /tokens and /doc_offsets "
             "(%s)",
             path, (uint64_t)group.nlinks, other_profile);
    }
    return STATUS_OK;
}

// --- The file ------------------------------------------------------------------------------------

static Status read_file(hid_t file, int fd, const char *path, ShardLayout *out) {
    Place tokens, documents;
    TRY(read_attributes(file, path, out));
    TRY(check_root(file, path));
    TRY(read_dataset(file, fd, path, "tokens", H5T_STD_U32LE, H5T_STD_U16LE, out->file_bytes,
                     &tokens));
    TRY(read_dataset(file, fd, path, "doc_offsets", H5T_STD_U64LE, 0, out->file_bytes, &documents));
    out->tokens_offset = tokens.offset;
    out->num_tokens = tokens.count;
    out->token_bytes = tokens.bytes;
    out->documents_offset = documents.offset;
    out->num_documents = documents.count - 1;
    if (out->num_documents == 0)
        FAIL(STATUS_BAD_DATA, "%s: /doc_offsets has 1 element, expected documents + 1", path);
    return STATUS_OK;
}

static Status open_hdf5(const char *path, hid_t *file) {
    char reason[REASON_MAX];
    hid_t access = H5Pcreate(H5P_FILE_ACCESS);
    // Closing the file closes all of it, whatever a failure left open. No file locks: network file
    // systems refuse them, and published shards are never written.
    bool ready = access >= 0 && H5Pset_fclose_degree(access, H5F_CLOSE_STRONG) >= 0 &&
                 H5Pset_file_locking(access, false, true) >= 0;
    *file = ready ? H5Fopen(path, H5F_ACC_RDONLY, access) : H5I_INVALID_HID;
    if (*file < 0) hdf5_reason(reason);
    if (access >= 0) H5Pclose(access);
    if (!ready) FAIL(STATUS_INTERNAL, "HDF5 cannot set up file access");
    if (*file < 0) FAIL(STATUS_BAD_DATA, "%s: not a readable HDF5 file: %s", path, reason);
    return STATUS_OK;
}

Status shard_read_structure(const char *path, ShardLayout *out) {
    Status status = STATUS_OK;
    hid_t file = H5I_INVALID_HID;
    int fd = -1;
    memset(out, 0, sizeof *out);
    (void)H5Eset_auto2(H5E_DEFAULT, NULL, NULL); // its errors become ours, not lines on stderr
    (void)H5PLset_loading_state(0);              // a shard never makes us load a plugin
    TRY(io_file_size(path, &out->file_bytes));
    TRY(io_open(path, O_RDONLY, &fd));
    TRY_GOTO(open_hdf5(path, &file), done);
    TRY_GOTO(read_file(file, fd, path, out), done);
done:
    if (file >= 0) H5Fclose(file);
    close(fd); // read only: a failing close loses nothing
    return status;
}

static Status parse_item(const void *context, int index, void *result) {
    const char *const *paths = context;
    return shard_read_structure(paths[index], result);
}

Status shard_parse(const char *const *paths, int count, ShardLayout *layouts,
                   SandboxVerdict *verdicts) {
    // A second is plenty on a local disk; a busy network file system gets its time.
    const SandboxLimits limits = {.seconds = 60, .memory_bytes = (size_t)1 << 30};
    TRY(sandbox_run(parse_item, paths, count, &limits, sizeof *layouts, layouts, verdicts));
    for (int i = 0; i < count; i++) {
        if (!verdicts[i].died) continue; // else the message names the file
        char text[SANDBOX_TEXT_MAX / 4];
        snprintf(text, sizeof text, "%.*s", (int)sizeof text - 1, verdicts[i].message);
        snprintf(verdicts[i].message, sizeof verdicts[i].message, "%.700s: %s", paths[i], text);
    }
    return STATUS_OK;
}
