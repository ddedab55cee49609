// similarity.h5: what is saved loads again, and no damaged or foreign file gets through.
#include <hdf5.h>
#include <math.h>
#include "base/hash.h"
#include "base/random.h"
#include "model/similarity.h"
#include "tests/test.h"

static const char *path_of(const char *name) {
    static char path[IO_PATH_MAX];
    ck_assert_ok(io_path(path, "%s/%s", test_directory(), name));
    return path;
}

static Similarity example(int num_layers, int max_block) {
    Similarity s;
    ck_assert_ok(similarity_create(num_layers, max_block, &s));
    s.tokens = 131072;
    for (int l = 0; l < num_layers; l++) {
        for (int n = 1; n <= max_block && l + n < num_layers; n++) {
            size_t i = similarity_index(&s, l, n);
            s.s_out[i] = random_uniform(1, 0, i);
            s.s_mlp[i] = -random_uniform(1, 1, i);
            s.d_norm[i] = 10 * random_uniform(1, 2, i);
        }
    }
    return s;
}

static void assert_round_trip(int num_layers, int max_block) {
    Similarity saved = example(num_layers, max_block), loaded;
    ck_assert_ok(similarity_save(&saved, path_of("similarity.h5")));
    ck_assert_ok(similarity_load(path_of("similarity.h5"), &loaded));
    ck_assert_int_eq(loaded.num_layers, num_layers);
    ck_assert_int_eq(loaded.max_block, max_block);
    ck_assert_int_eq(loaded.tokens, 131072);
    size_t bytes = (size_t)(num_layers * max_block) * sizeof(double);
    ck_assert(memcmp(saved.s_out, loaded.s_out, bytes) == 0);
    ck_assert(memcmp(saved.s_mlp, loaded.s_mlp, bytes) == 0);
    ck_assert(memcmp(saved.d_norm, loaded.d_norm, bytes) == 0);
    similarity_free(&saved);
    similarity_free(&loaded);
}

START_TEST(saved_values_load_again) {
    assert_round_trip(24, 1);
    assert_round_trip(5, 3);
    assert_round_trip(1, 2); // no pair at all
    assert_round_trip(1024, 64);
}
END_TEST

START_TEST(the_same_values_are_the_same_file) {
    Similarity s = example(6, 2);
    char first[HASH_HEX_SIZE], second[HASH_HEX_SIZE];
    uint64_t bytes;
    ck_assert_ok(similarity_save(&s, path_of("a.h5")));
    ck_assert_ok(hash_file(path_of("a.h5"), first, &bytes, NULL, NULL));
    sleep(1); // a time in the file would show
    ck_assert_ok(similarity_save(&s, path_of("a.h5")));
    ck_assert_ok(hash_file(path_of("a.h5"), second, &bytes, NULL, NULL));
    ck_assert_str_eq(first, second);
    similarity_free(&s);
}
END_TEST

START_TEST(impossible_shapes_are_refused) {
    Similarity s;
    ck_assert_fails(similarity_create(0, 1, &s), STATUS_USAGE, "0 layers");
    ck_assert_fails(similarity_create(2, 65, &s), STATUS_USAGE, "blocks of 65");
}
END_TEST

// --- Damage --------------------------------------------------------------------------------------

static char *read_saved(size_t *bytes) {
    Similarity s = example(4, 2);
    ck_assert_ok(similarity_save(&s, path_of("good.h5")));
    similarity_free(&s);
    char *data;
    ck_assert_ok(io_read_file(path_of("good.h5"), 1 << 20, &data, bytes));
    return data;
}

static void assert_refused(const char *data, size_t bytes, const char *message) {
    Similarity s;
    ck_assert_ok(io_write_file_atomic(path_of("bad.h5"), data, bytes));
    ck_assert_fails(similarity_load(path_of("bad.h5"), &s), STATUS_BAD_DATA, message);
    ck_assert_ptr_null(s.s_out);
}

START_TEST(damaged_files_are_refused) {
    size_t bytes;
    char *data = read_saved(&bytes);
    for (int i = 0; i < 200; i++) { // one flipped bit after the first line
        size_t at = 512 + random_u64(7, 0, (uint64_t)i) % (bytes - 512);
        data[at] ^= (char)(1 << i % 8);
        assert_refused(data, bytes, "damaged");
        data[at] ^= (char)(1 << i % 8);
    }
    data[40] ^= 1; // in the hash itself
    assert_refused(data, bytes, "damaged");
    data[40] ^= 1;
    assert_refused(data, bytes - 1, "damaged");
    assert_refused(data, 513, "damaged");
    assert_refused(data, 512, "not a similarity file");
    assert_refused(data, 0, "not a similarity file");
    assert_refused(data + 512, bytes - 512, "not a similarity file"); // HDF5, but not ours
    Similarity s;
    ck_assert_ok(io_write_file_atomic(path_of("bad.h5"), data, bytes));
    ck_assert_ok(similarity_load(path_of("bad.h5"), &s)); // the undamaged bytes do load
    similarity_free(&s);
    ck_assert_fails(similarity_load("/nonexistent/similarity.h5", &s), STATUS_MISSING_INPUT,
                    "/nonexistent");
    free(data);
}
END_TEST

// --- Files with a right hash and wrong content ---------------------------------------------------

static void put_hash(char *data, size_t bytes) {
    char hex[HASH_HEX_SIZE];
    hash_to_hex(hash_bytes(data + 512, bytes - 512), hex);
    snprintf(data, 512, "dense2moe-similarity xxh3-128 %s\n", hex);
}

START_TEST(what_is_no_hdf5_is_refused) {
    char data[4096] = {0};
    put_hash(data, sizeof data);
    assert_refused(data, sizeof data, "HDF5 cannot open it");
}
END_TEST

typedef struct Forgery {
    const char *message;
    int64_t version, tokens;
    hid_t type;
    hsize_t shape[2], norm_shape[2];
    bool chunked;
    double value;
} Forgery;

static void forge_dataset(hid_t file, const char *name, const Forgery *f, const hsize_t shape[2]) {
    double values[64];
    for (int i = 0; i < 64; i++) values[i] = f->value;
    hid_t space = H5Screate_simple(2, shape, NULL), properties = H5Pcreate(H5P_DATASET_CREATE);
    hsize_t chunk[2] = {1, 1};
    if (f->chunked) H5Pset_chunk(properties, 2, chunk);
    hid_t dataset = H5Dcreate2(file, name, f->type, space, H5P_DEFAULT, properties, H5P_DEFAULT);
    ck_assert(dataset >= 0);
    H5Dwrite(dataset, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, values);
    H5Dclose(dataset);
    H5Pclose(properties);
    H5Sclose(space);
}

static void forge_attribute(hid_t file, const char *name, int64_t value) {
    hid_t space = H5Screate(H5S_SCALAR);
    hid_t attribute = H5Acreate2(file, name, H5T_STD_I64LE, space, H5P_DEFAULT, H5P_DEFAULT);
    H5Awrite(attribute, H5T_NATIVE_INT64, &value);
    H5Aclose(attribute);
    H5Sclose(space);
}

static void assert_forgery_refused(const Forgery *f) {
    hid_t file = H5Fcreate(path_of("forged.h5"), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    ck_assert(file >= 0);
    if (f->version) forge_attribute(file, "version", f->version);
    if (f->tokens) forge_attribute(file, "tokens", f->tokens);
    forge_dataset(file, "s_out", f, f->shape);
    forge_dataset(file, "s_mlp", f, f->shape);
    if (f->norm_shape[0]) forge_dataset(file, "d_norm", f, f->norm_shape);
    H5Fclose(file);
    char *plain, *data;
    size_t bytes;
    ck_assert_ok(io_read_file(path_of("forged.h5"), 1 << 20, &plain, &bytes));
    data = calloc(1, bytes + 512);
    memcpy(data + 512, plain, bytes);
    put_hash(data, bytes + 512);
    assert_refused(data, bytes + 512, f->message);
    free(data);
    free(plain);
}

START_TEST(wrong_content_is_named) {
    const hid_t f64 = H5T_IEEE_F64LE;
    const Forgery cases[] = {
        {"version is missing", 0, 1, f64, {1, 1}, {1, 1}, false, NAN},
        {"version 2, expected 1", 2, 1, f64, {1, 1}, {1, 1}, false, NAN},
        {"tokens is missing", 1, 0, f64, {1, 1}, {1, 1}, false, NAN},
        {"over -5 tokens", 1, -5, f64, {1, 1}, {1, 1}, false, NAN},
        {"expected contiguous doubles", 1, 1, H5T_IEEE_F32LE, {1, 1}, {1, 1}, false, NAN},
        {"expected contiguous doubles", 1, 1, H5T_STD_I64LE, {1, 1}, {1, 1}, false, 0},
        {"expected contiguous doubles", 1, 1, f64, {1, 1}, {1, 1}, true, NAN},
        {"at most (1024, 64)", 1, 1, f64, {0, 1}, {0, 1}, false, NAN},
        {"d_norm is missing", 1, 1, f64, {1, 1}, {0, 0}, false, NAN},
        {"d_norm is (1, 2), but s_out is (2, 1)", 1, 1, f64, {2, 1}, {1, 2}, false, 0},
        {"layers 0 and 1: s_out nan", 1, 1, f64, {2, 1}, {2, 1}, false, NAN},
        {"layers 0 and 1: s_out -1.5", 1, 1, f64, {2, 1}, {2, 1}, false, -1.5},
        {"layers 0 and 1: s_out -0.5", 1, 1, f64, {2, 1}, {2, 1}, false, -0.5}, // d_norm < 0
        {"layers 1 and 2: s_out 0.5", 1, 1, f64, {2, 1}, {2, 1}, false, 0.5},   // beyond the end
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) assert_forgery_refused(&cases[i]);
}
END_TEST

TEST_MAIN("similarity_file", TEST(saved_values_load_again), TEST(the_same_values_are_the_same_file),
          TEST(impossible_shapes_are_refused), TEST(damaged_files_are_refused),
          TEST(what_is_no_hdf5_is_refused), TEST(wrong_content_is_named))
