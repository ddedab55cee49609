// similarity.h5: three datasets of doubles, written and read as an image in memory.
//
// The HDF5 library of today's distributions can crash on a damaged file, so it must not see one.
// HDF5 leaves the first 512 bytes of a file (the user block) to its user; here they hold one line
// of text with a hash of everything after them, which is compared before the library looks. Other
// readers (h5py, h5dump) skip the user block by themselves. Building the image in memory also
// gives the same atomic, durable write as for every other file.
#include "model/similarity.h"

#include <hdf5.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/file.h"
#include "base/hash.h"

enum {
    USER_BLOCK = 512,
    MAX_BYTES = 16 << 20, // 1024 layers in blocks of 64 take 1.6 MB
    IMAGE_GROWTH = 1 << 16,
    FORMAT_VERSION = 1,
    HASH_LINE_MAX = 64,
};
static const char FORMAT[] = "dense2moe-similarity";
static const char *const DATASETS[3] = {"s_out", "s_mlp", "d_norm"};

static double *values_of(const Similarity *s, int which) {
    return which == 0 ? s->s_out : which == 1 ? s->s_mlp : s->d_norm;
}

static void hash_line(const void *image, size_t bytes, char line[HASH_LINE_MAX]) {
    char hex[HASH_HEX_SIZE];
    hash_to_hex(hash_bytes(image, bytes), hex);
    snprintf(line, HASH_LINE_MAX, "%s xxh3-128 %s\n", FORMAT, hex);
}

// --- Writing -------------------------------------------------------------------------------------

// HDF5 calls fail with a negative number; what they were doing is all a message can say.
#define H5_GOTO(call, label, path)                                                                 \
    do {                                                                                           \
        if ((call) < 0) FAIL_GOTO(label, STATUS_INTERNAL, "%s: HDF5 failed at: %s", path, #call);  \
    } while (0)

static Status write_dataset(hid_t file, const char *name, const Similarity *s,
                            const double *values) {
    Status status = STATUS_OK;
    hsize_t shape[2] = {(hsize_t)s->num_layers, (hsize_t)s->max_block};
    hid_t space = -1, properties = -1, dataset = -1;
    H5_GOTO(space = H5Screate_simple(2, shape, NULL), done, name);
    H5_GOTO(properties = H5Pcreate(H5P_DATASET_CREATE), done, name);
    // Without times in it, the same similarity is the same file.
    H5_GOTO(H5Pset_obj_track_times(properties, false), done, name);
    H5_GOTO(dataset =
                H5Dcreate2(file, name, H5T_IEEE_F64LE, space, H5P_DEFAULT, properties, H5P_DEFAULT),
            done, name);
    H5_GOTO(H5Dwrite(dataset, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, values), done,
            name);
done:
    if (dataset >= 0) H5Dclose(dataset);
    if (properties >= 0) H5Pclose(properties);
    if (space >= 0) H5Sclose(space);
    return status;
}

static Status write_attribute(hid_t file, const char *name, int64_t value) {
    Status status = STATUS_OK;
    hid_t space = -1, attribute = -1;
    H5_GOTO(space = H5Screate(H5S_SCALAR), done, name);
    H5_GOTO(attribute = H5Acreate2(file, name, H5T_STD_I64LE, space, H5P_DEFAULT, H5P_DEFAULT),
            done, name);
    H5_GOTO(H5Awrite(attribute, H5T_NATIVE_INT64, &value), done, name);
done:
    if (attribute >= 0) H5Aclose(attribute);
    if (space >= 0) H5Sclose(space);
    return status;
}

// The open file's bytes behind a user block that holds their hash. malloc'ed.
static Status take_image(hid_t file, const char *path, char **out, size_t *out_bytes) {
    H5Fflush(file, H5F_SCOPE_GLOBAL);
    ssize_t bytes = H5Fget_file_image(file, NULL, 0);
    if (bytes <= 0) FAIL(STATUS_INTERNAL, "%s: HDF5 gave no file image", path);
    char *data = calloc(1, USER_BLOCK + (size_t)bytes);
    if (!data) FAIL(STATUS_INTERNAL, "%s: out of memory: %zd bytes", path, bytes);
    if (H5Fget_file_image(file, data + USER_BLOCK, (size_t)bytes) != bytes) {
        free(data);
        FAIL(STATUS_INTERNAL, "%s: HDF5 gave half a file image", path);
    }
    hash_line(data + USER_BLOCK, (size_t)bytes, data);
    *out = data;
    *out_bytes = USER_BLOCK + (size_t)bytes;
    return STATUS_OK;
}

Status similarity_save(const Similarity *s, const char *path) {
    Status status = STATUS_OK;
    hid_t access = -1, file = -1;
    char *data = NULL;
    size_t bytes;
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL); // failures are ours to report
    H5_GOTO(access = H5Pcreate(H5P_FILE_ACCESS), done, path);
    H5_GOTO(H5Pset_fapl_core(access, IMAGE_GROWTH, false), done, path);
    H5_GOTO(file = H5Fcreate("similarity", H5F_ACC_TRUNC, H5P_DEFAULT, access), done, path);
    TRY_GOTO(write_attribute(file, "version", FORMAT_VERSION), done);
    TRY_GOTO(write_attribute(file, "tokens", s->tokens), done);
    for (int i = 0; i < 3; i++)
        TRY_GOTO(write_dataset(file, DATASETS[i], s, values_of(s, i)), done);
    TRY_GOTO(take_image(file, path, &data, &bytes), done);
    TRY_GOTO(io_write_file_atomic(path, data, bytes), done);
done:
    if (file >= 0) H5Fclose(file);
    if (access >= 0) H5Pclose(access);
    free(data);
    return status;
}

// --- Reading -------------------------------------------------------------------------------------

static Status check_hash(const char *data, size_t bytes, const char *path) {
    if (bytes <= USER_BLOCK || strncmp(data, FORMAT, strlen(FORMAT)) != 0)
        FAIL(STATUS_BAD_DATA, "%s: not a similarity file: it does not start with \"%s\"", path,
             FORMAT);
    char expected[HASH_LINE_MAX];
    hash_line(data + USER_BLOCK, bytes - USER_BLOCK, expected);
    if (strncmp(data, expected, strlen(expected)) != 0)
        FAIL(STATUS_BAD_DATA,
             "%s: damaged: its content has another hash than its first line says; delete it to "
             "measure again",
             path);
    return STATUS_OK;
}

static Status read_attribute(hid_t file, const char *path, const char *name, int64_t *value) {
    hid_t attribute = H5Aopen(file, name, H5P_DEFAULT);
    if (attribute < 0) FAIL(STATUS_BAD_DATA, "%s: attribute %s is missing", path, name);
    hid_t space = H5Aget_space(attribute), type = H5Aget_type(attribute);
    bool good = space >= 0 && type >= 0 && H5Sget_simple_extent_npoints(space) == 1 &&
                H5Tget_class(type) == H5T_INTEGER &&
                H5Aread(attribute, H5T_NATIVE_INT64, value) >= 0;
    if (type >= 0) H5Tclose(type);
    if (space >= 0) H5Sclose(space);
    H5Aclose(attribute);
    if (!good) FAIL(STATUS_BAD_DATA, "%s: attribute %s is not one integer", path, name);
    return STATUS_OK;
}

// (0, 0) unless the dataset is two-dimensional, of doubles, and stored as plain bytes.
static void dataset_shape(hid_t dataset, hsize_t shape[2]) {
    hid_t space = H5Dget_space(dataset), type = H5Dget_type(dataset);
    hid_t properties = H5Dget_create_plist(dataset);
    shape[0] = shape[1] = 0;
    if (space >= 0 && type >= 0 && properties >= 0 && H5Tget_class(type) == H5T_FLOAT &&
        H5Tget_size(type) == sizeof(double) && H5Pget_layout(properties) == H5D_CONTIGUOUS &&
        H5Pget_external_count(properties) == 0 && H5Sget_simple_extent_ndims(space) == 2)
        H5Sget_simple_extent_dims(space, shape, NULL);
    if (properties >= 0) H5Pclose(properties);
    if (type >= 0) H5Tclose(type);
    if (space >= 0) H5Sclose(space);
}

// Reads one dataset; the first one decides the shape that all share.
static Status read_dataset(hid_t file, const char *path, int which, Similarity *s) {
    hid_t dataset = H5Dopen2(file, DATASETS[which], H5P_DEFAULT);
    if (dataset < 0) FAIL(STATUS_BAD_DATA, "%s: dataset %s is missing", path, DATASETS[which]);
    Status status = STATUS_OK;
    hsize_t shape[2];
    dataset_shape(dataset, shape);
    if (shape[0] < 1 || shape[0] > MODEL_MAX_LAYERS || shape[1] < 1 ||
        shape[1] > SIMILARITY_MAX_BLOCK)
        FAIL_GOTO(done, STATUS_BAD_DATA,
                  "%s: dataset %s: expected contiguous doubles (layers, block) of at most (%d, %d)",
                  path, DATASETS[which], MODEL_MAX_LAYERS, SIMILARITY_MAX_BLOCK);
    if (which == 0) TRY_GOTO(similarity_create((int)shape[0], (int)shape[1], s), done);
    if ((int)shape[0] != s->num_layers || (int)shape[1] != s->max_block)
        FAIL_GOTO(done, STATUS_BAD_DATA, "%s: dataset %s is (%d, %d), but s_out is (%d, %d)", path,
                  DATASETS[which], (int)shape[0], (int)shape[1], s->num_layers, s->max_block);
    if (H5Dread(dataset, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, values_of(s, which)) < 0)
        FAIL_GOTO(done, STATUS_BAD_DATA, "%s: dataset %s cannot be read", path, DATASETS[which]);
done:
    H5Dclose(dataset);
    return status;
}

// Cosines in [-1, 1] (plus rounding of the sums), norm differences not negative, and NaN exactly
// where there is no pair.
static Status check_values(const Similarity *s, const char *path) {
    const double limit = 1.0 + 1e-6;
    for (int l = 0; l < s->num_layers; l++) {
        for (int n = 1; n <= s->max_block; n++) {
            size_t i = similarity_index(s, l, n);
            double out = s->s_out[i], mlp = s->s_mlp[i], norm = s->d_norm[i];
            bool good = l + n < s->num_layers ? fabs(out) <= limit && fabs(mlp) <= limit &&
                                                    norm >= 0 && isfinite(norm)
                                              : isnan(out) && isnan(mlp) && isnan(norm);
            if (!good)
                FAIL(STATUS_BAD_DATA,
                     "%s: layers %d and %d: s_out %g, s_mlp %g, d_norm %g are no similarity", path,
                     l, l + n, out, mlp, norm);
        }
    }
    return STATUS_OK;
}

static Status read_file(hid_t file, const char *path, Similarity *s) {
    int64_t version, tokens;
    TRY(read_attribute(file, path, "version", &version));
    if (version != FORMAT_VERSION)
        FAIL(STATUS_BAD_DATA, "%s: version %" PRId64 ", expected %d", path, version,
             FORMAT_VERSION);
    TRY(read_attribute(file, path, "tokens", &tokens));
    if (tokens < 1) FAIL(STATUS_BAD_DATA, "%s: measured over %" PRId64 " tokens", path, tokens);
    for (int i = 0; i < 3; i++) TRY(read_dataset(file, path, i, s));
    s->tokens = tokens;
    return check_values(s, path);
}

static Status read_image(char *image, size_t bytes, const char *path, Similarity *s) {
    Status status = STATUS_OK;
    hid_t access = -1, file = -1;
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
    H5_GOTO(access = H5Pcreate(H5P_FILE_ACCESS), done, path);
    H5_GOTO(H5Pset_fapl_core(access, IMAGE_GROWTH, false), done, path);
    H5_GOTO(H5Pset_file_image(access, image, bytes), done, path);
    file = H5Fopen("similarity", H5F_ACC_RDONLY, access);
    if (file < 0) FAIL_GOTO(done, STATUS_BAD_DATA, "%s: HDF5 cannot open it", path);
    TRY_GOTO(read_file(file, path, s), done);
done:
    if (file >= 0) H5Fclose(file);
    if (access >= 0) H5Pclose(access);
    return status;
}

Status similarity_load(const char *path, Similarity *out) {
    *out = (Similarity){0};
    char *data;
    size_t bytes;
    TRY(io_read_file(path, MAX_BYTES, &data, &bytes));
    Status status;
    TRY_GOTO(check_hash(data, bytes, path), done);
    TRY_GOTO(read_image(data + USER_BLOCK, bytes - USER_BLOCK, path, out), done);
done:
    free(data);
    if (status != STATUS_OK) similarity_free(out);
    return status;
}
