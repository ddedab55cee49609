// safetensors: every rule of the reader with a file that breaks it, round trips in all types, reads
// of parts, and a writer whose bytes are a function of its input.
#include "tests/test.h"

#include <math.h>
#include <stdint.h>
#include "model/safetensors.h"

// --- Files made by hand --------------------------------------------------------------------------

// A file in memory: length, header text, `data_bytes` of zeros.
static char *make_file(const char *header, size_t data_bytes, size_t *bytes) {
    size_t length = strlen(header);
    *bytes = 8 + length + data_bytes;
    char *file = calloc(1, *bytes);
    ck_assert_ptr_nonnull(file);
    for (int i = 0; i < 8; i++) file[i] = (char)((uint64_t)length >> (8 * i));
    memcpy(file + 8, header, length);
    return file;
}

static Status parse_text(const char *header, size_t data_bytes) {
    size_t bytes;
    char *file = make_file(header, data_bytes, &bytes);
    SafetensorsHeader parsed;
    Status status = safetensors_parse(file, bytes, bytes, "x.safetensors", &parsed);
    if (status == STATUS_OK) {
        safetensors_header_free(&parsed);
    } else {
        ck_assert_ptr_null(parsed.entries); // nothing left to free after a failure
    }
    free(file);
    return status;
}

#define refused(header, data_bytes, text)                                                          \
    ck_assert_fails(parse_text(header, data_bytes), STATUS_BAD_DATA, text)
#define accepted(header, data_bytes) ck_assert_ok(parse_text(header, data_bytes))

#define TENSOR(name, dtype, shape, begin, end)                                                     \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" begin "," end   \
    "]}"

static Status parse_raw(const void *head, size_t bytes) {
    SafetensorsHeader parsed;
    return safetensors_parse(head, bytes, bytes, "x.safetensors", &parsed);
}

START_TEST(lengths) {
    ck_assert_fails(parse_raw("", 0), STATUS_BAD_DATA, "has 0 bytes");
    ck_assert_fails(parse_raw("\2\0\0\0\0\0\0", 7), STATUS_BAD_DATA, "has 7 bytes");
    ck_assert_fails(parse_raw("\377\377\377\377\377\377\377\377{}", 10), STATUS_BAD_DATA,
                    "18446744073709551615");
    // One above the cap of 100,000,000 = 0x5f5e100.
    ck_assert_fails(parse_raw("\1\341\365\5\0\0\0\0{}", 10), STATUS_BAD_DATA, "at most 100000000");
    ck_assert_fails(parse_raw("\3\0\0\0\0\0\0\0{}", 10), STATUS_BAD_DATA, "but the file has 10");
    ck_assert_fails(parse_raw("\0\0\0\0\0\0\0\0", 8), STATUS_BAD_DATA, "x.safetensors");
}
END_TEST

START_TEST(header_is_one_json_object) {
    accepted("{}", 0);
    accepted(" {}   ", 0); // padding on either side
    refused("{", 0, "x.safetensors");
    refused("[]", 0, "expected an object");
    refused("{}x", 0, "end of file expected");
    refused("{\"\xff\":1}", 0, "unable to decode byte 0xff");
    refused("{\"a\\u0000b\":1}", 0, "x.safetensors");
    refused("{" TENSOR("a", "U8", "[1]", "0", "1") "," TENSOR("a", "U8", "[1]", "0", "1") "}", 1,
            "duplicate");
}
END_TEST

START_TEST(metadata_maps_strings_to_strings) {
    accepted("{\"__metadata__\":{\"format\":\"pt\",\"x\":\"\"}}", 0);
    refused("{\"__metadata__\":{\"format\":1}}", 0, "format");
    refused("{\"__metadata__\":[]}", 0, "__metadata__");
    refused("{\"__metadata__\":{\"a\":\"1\",\"a\":\"2\"}}", 0, "duplicate");
}
END_TEST

START_TEST(tensor_headers) {
    accepted("{" TENSOR("a", "F32", "[2,3]", "0", "24") "}", 24);
    accepted("{" TENSOR("a", "F32", "[]", "0", "4") "}", 4);      // a scalar
    accepted("{" TENSOR("a", "F32", "[0,7]", "0", "0") "}", 0);   // no elements
    accepted("{" TENSOR("a", "F4", "[4]", "0", "2") "}", 2);      // two elements in a byte
    accepted("{" TENSOR("a", "F8_E4M3", "[3]", "0", "3") "}", 3); // legal, though not computed
    refused("{\"a\":[]}", 0, "tensor a");
    refused("{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "no dtype");
    refused("{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, "no shape");
    refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "data_offsets");
    refused("{" TENSOR("a", "F33", "[1]", "0", "4") "}", 4, "unknown dtype \"F33\"");
    refused("{" TENSOR("a", "F32", "[-1]", "0", "4") "}", 4, "dimension 0");
    refused("{" TENSOR("a", "F32", "[1.0]", "0", "4") "}", 4, "dimension 0");
    refused("{" TENSOR("a", "F32", "[1,\"1\"]", "0", "4") "}", 4, "dimension 1");
    refused("{" TENSOR("a", "F32", "[1,1,1,1,1,1,1,1,1]", "0", "4") "}", 4, "9 dimensions");
    refused("{" TENSOR("a", "F32", "[1]", "-4", "0") "}", 4, "data_offsets");
    refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4,8]}}", 4,
            "data_offsets");
    refused("{" TENSOR("a", "F4", "[3]", "0", "2") "}", 2, "whole number of bytes");
}
END_TEST

START_TEST(sizes_agree_and_do_not_overflow) {
    refused("{" TENSOR("a", "F32", "[2]", "0", "4") "}", 4, "make 8 bytes");
    refused("{" TENSOR("a", "F32", "[1]", "4", "0") "}", 4, "make 4 bytes"); // end < begin
    // The product of the shape leaves 64 bits; then only the product with the type's width does.
    refused("{" TENSOR("a", "F32", "[4294967296,4294967296]", "0", "0") "}", 0, "shape overflows");
    refused("{" TENSOR("a", "F32", "[4294967296,4294967296,0]", "0", "0") "}", 0,
            "shape overflows");
    refused("{" TENSOR("a", "F32", "[2305843009213693952]", "0", "0") "}", 0,
            "size in bits overflows");
    refused("{" TENSOR("a", "F32", "[1]", "18446744073709551612", "18446744073709551616") "}", 4,
            "too big integer");
    // Offsets near the largest JSON integer that do agree with the shape are still no tiling.
    refused("{" TENSOR("a", "F32", "[1]", "9223372036854775803", "9223372036854775807") "}", 4,
            "begins at byte 9223372036854775803");
}
END_TEST

START_TEST(tensors_tile_the_data) {
#define A TENSOR("a", "F32", "[1]", "0", "4")
    accepted("{" TENSOR("b", "U8", "[2]", "4", "6") "," A "}", 6); // any order in the header
    accepted("{" TENSOR("b", "F32", "[0]", "4", "4") "," A "}", 4);
    accepted("{" TENSOR("b", "F32", "[0]", "0", "0") "," A "}", 4);
    refused("{" A "}", 5, "end at byte 4"); // trailing bytes
    refused("{" A "}", 2, "end at byte 4"); // two bytes short
    refused("{}", 1, "end at byte 0");
    refused("{" TENSOR("b", "F32", "[1]", "2", "6") "," A "}", 6, "tensor b begins at byte 2");
    refused("{" TENSOR("b", "F32", "[1]", "8", "12") "," A "}", 12, "tensor b begins at byte 8");
    refused("{" TENSOR("b", "F32", "[1]", "0", "4") "," A "}", 4, "expected 4"); // the same bytes
    refused("{" TENSOR("a", "F32", "[1]", "1", "5") "}", 5, "expected 0");
    refused("{" TENSOR("b", "F32", "[0]", "2", "2") "," A "}", 4, "tensor b begins at byte 2");
#undef A
}
END_TEST

// --- Writing and reading -------------------------------------------------------------------------

static const char *file_path(const char *name) {
    static char path[IO_PATH_MAX];
    ck_assert_ok(io_path(path, "%s/%s", test_directory(), name));
    return path;
}

enum { ROWS = 300, COLUMNS = 257, COUNT = ROWS * COLUMNS }; // more than one read chunk and odd

// Values that all three types hold exactly: small multiples of 1/8.
static float value_at(size_t i) {
    return (float)((int)(i * 7919 % 255) - 127) / 8;
}

static float *make_values(size_t count) {
    float *values = malloc(count * sizeof *values);
    ck_assert_ptr_nonnull(values);
    for (size_t i = 0; i < count; i++) values[i] = value_at(i);
    return values;
}

// Writes w (ROWS, COLUMNS) of each type, an empty tensor and a scalar, appending in pieces.
static FileHash write_example(const char *path, size_t piece) {
    const SafetensorsSpec specs[] = {
        {"w.F32", DTYPE_F32, 2, {ROWS, COLUMNS}},
        {"none", DTYPE_F32, 2, {0, 5}},
        {"w.BF16", DTYPE_BF16, 2, {ROWS, COLUMNS}},
        {"w.F16", DTYPE_F16, 2, {ROWS, COLUMNS}},
        {"scalar", DTYPE_BF16, 0, {0}},
    };
    const char *const metadata[] = {"step", "12", NULL};
    float *values = make_values(COUNT);
    SafetensorsWriter *writer;
    ck_assert_ok(safetensors_writer_open(path, specs, 5, metadata, &writer));
    for (int tensor = 0; tensor < 3; tensor++) {
        for (size_t done = 0; done < COUNT; done += piece) {
            size_t now = COUNT - done < piece ? COUNT - done : piece;
            ck_assert_ok(safetensors_writer_append(writer, values + done, now));
        }
    }
    ck_assert_ok(safetensors_writer_append(writer, &(float){2.5f}, 1));
    FileHash hash;
    uint64_t bytes;
    ck_assert_ok(safetensors_writer_finish(writer, &hash));
    ck_assert_ok(io_file_size(path, &bytes));
    ck_assert_uint_eq(hash.bytes, bytes);
    free(values);
    return hash;
}

START_TEST(round_trip_in_every_type) {
    const char *path = file_path("round_trip.safetensors");
    write_example(path, COUNT);
    SafetensorsFile file;
    ck_assert_ok(safetensors_open(path, &file));
    ck_assert_uint_eq(file.header.count, 5);
    ck_assert_uint_eq(file.header.data_offset % 8, 0);
    ck_assert_ptr_null(safetensors_find(&file, "w.F64"));

    float *read = malloc(COUNT * sizeof *read);
    static const char *const names[] = {"w.F32", "w.BF16", "w.F16"};
    for (int i = 0; i < 3; i++) {
        const SafetensorsEntry *entry = safetensors_find(&file, names[i]);
        ck_assert_ptr_nonnull(entry);
        ck_assert_str_eq(entry->dtype_name, names[i] + 2);
        ck_assert_uint_eq(entry->shape[0], ROWS);
        ck_assert_uint_eq(entry->shape[1], COLUMNS);
        ck_assert_ok(safetensors_read(&file, entry, 0, COUNT, read));
        for (size_t k = 0; k < COUNT; k++) ck_assert_float_eq(read[k], value_at(k));
        // Any part, the last element included.
        const size_t parts[][2] = {{0, 1}, {COUNT - 1, 1}, {COUNT, 0}, {33333, 40000}};
        for (int p = 0; p < 4; p++) {
            ck_assert_ok(safetensors_read(&file, entry, parts[p][0], parts[p][1], read));
            for (size_t k = 0; k < parts[p][1]; k++)
                ck_assert_float_eq(read[k], value_at(parts[p][0] + k));
        }
    }
    ck_assert_ok(safetensors_read(&file, safetensors_find(&file, "scalar"), 0, 1, read));
    ck_assert_float_eq(read[0], 2.5f);
    ck_assert_uint_eq(safetensors_find(&file, "none")->count, 0);
    free(read);
    safetensors_close(&file);
}
END_TEST

START_TEST(special_values_survive) {
    const char *path = file_path("special.safetensors");
    const SafetensorsSpec specs[] = {{"f", DTYPE_F32, 1, {5}}, {"b", DTYPE_BF16, 1, {5}}};
    const float values[5] = {-0.0f, INFINITY, -INFINITY, NAN, 0x1p-133f}; // the last: subnormal
    SafetensorsWriter *writer;
    ck_assert_ok(safetensors_writer_open(path, specs, 2, NULL, &writer));
    ck_assert_ok(safetensors_writer_append(writer, values, 5));
    ck_assert_ok(safetensors_writer_append(writer, values, 5));
    FileHash hash;
    ck_assert_ok(safetensors_writer_finish(writer, &hash));

    SafetensorsFile file;
    ck_assert_ok(safetensors_open(path, &file));
    for (int i = 0; i < 2; i++) {
        float read[5];
        ck_assert_ok(safetensors_read(&file, safetensors_find(&file, specs[i].name), 0, 5, read));
        for (int k = 0; k < 5; k++) {
            if (k == 3) {
                ck_assert(isnan(read[k]));
            } else {
                ck_assert_mem_eq(&read[k], &values[k], sizeof(float));
            }
        }
    }
    safetensors_close(&file);
}
END_TEST

static void expect_equal_hashes(const FileHash *a, const FileHash *b) {
    ck_assert_str_eq(a->hex, b->hex);
    ck_assert_uint_eq(a->block_bytes, b->block_bytes);
    ck_assert_int_eq(a->num_blocks, b->num_blocks);
    ck_assert_mem_eq(a->blocks, b->blocks, (size_t)a->num_blocks * sizeof a->blocks[0]);
}

START_TEST(equal_input_gives_equal_bytes) {
    const FileHash first = write_example(file_path("a.safetensors"), COUNT);
    const FileHash second = write_example(file_path("b.safetensors"), 1001); // other pieces
    FileHash of_file;
    ck_assert_ok(hash_file_like(file_path("b.safetensors"), &second, &of_file));
    ck_assert_int_gt(first.num_blocks, 1);
    expect_equal_hashes(&first, &second);
    expect_equal_hashes(&first, &of_file); // the running hashes are the file's
}
END_TEST

START_TEST(writer_wants_exactly_what_was_declared) {
    const char *path = file_path("partial.safetensors");
    const SafetensorsSpec spec = {"t", DTYPE_F32, 1, {4}};
    const float values[5] = {1, 2, 3, 4, 5};
    FileHash hash;
    SafetensorsWriter *writer;
    ck_assert_ok(safetensors_writer_open(path, &spec, 1, NULL, &writer));
    ck_assert_ok(safetensors_writer_append(writer, values, 3));
    ck_assert_fails(safetensors_writer_finish(writer, &hash), STATUS_INTERNAL, "tensor t: 3 of 4");
    ck_assert(!io_exists(path)); // nothing half-written stays

    ck_assert_ok(safetensors_writer_open(path, &spec, 1, NULL, &writer));
    ck_assert_fails(safetensors_writer_append(writer, values, 5), STATUS_INTERNAL, "invariant");
    safetensors_writer_abort(writer);
    ck_assert(!io_exists(path));
    safetensors_writer_abort(NULL);
}
END_TEST

// Fails every write from the nth on.
typedef struct DiskFull {
    int writes_left;
} DiskFull;

static int disk_full(void *context, IoOp op, const char *path, size_t *bytes) {
    (void)path, (void)bytes;
    DiskFull *disk = context;
    return op == IO_WRITE && disk->writes_left-- <= 0 ? 28 /* ENOSPC */ : 0;
}

START_TEST(a_full_disk_is_reported) {
    const char *path = file_path("full.safetensors");
    const SafetensorsSpec spec = {"t", DTYPE_F32, 1, {4}};
    const float values[4] = {1, 2, 3, 4};
    FileHash hash;
    SafetensorsWriter *writer;
    DiskFull disk = {0};
    io_set_hook(disk_full, &disk);
    ck_assert_fails(safetensors_writer_open(path, &spec, 1, NULL, &writer), STATUS_IO, "full");
    ck_assert_ptr_null(writer);
    disk.writes_left = 3; // length, text, padding; the data no longer fits
    ck_assert_ok(safetensors_writer_open(path, &spec, 1, NULL, &writer));
    ck_assert_ok(safetensors_writer_append(writer, values, 4));
    ck_assert_fails(safetensors_writer_finish(writer, &hash), STATUS_IO, "full");
    io_set_hook(NULL, NULL);
    ck_assert(!io_exists(path));
}
END_TEST

START_TEST(files_that_cannot_be_read) {
    SafetensorsFile file;
    ck_assert_fails(safetensors_open(file_path("absent"), &file), STATUS_MISSING_INPUT, "absent");
    ck_assert_fails(safetensors_open(test_directory(), &file), STATUS_BAD_DATA, "regular");

    size_t bytes;
    char *data = make_file("{" TENSOR("ids", "I64", "[1]", "0", "8") "}", 8, &bytes);
    const char *path = file_path("ids.safetensors");
    ck_assert_ok(io_write_file_atomic(path, data, bytes));
    ck_assert_ok(safetensors_open(path, &file));
    float value;
    ck_assert_fails(safetensors_read(&file, safetensors_find(&file, "ids"), 0, 1, &value),
                    STATUS_BAD_DATA, "tensor ids has dtype I64");
    safetensors_close(&file);

    ck_assert_ok(io_write_file_atomic(path, data, bytes - 2));
    ck_assert_fails(safetensors_open(path, &file), STATUS_BAD_DATA, "cut short");
    ck_assert_ok(io_write_file_atomic(path, data, 20));
    ck_assert_fails(safetensors_open(path, &file), STATUS_BAD_DATA, "the file has 20");
    ck_assert_ok(io_write_file_atomic(path, data, 3));
    ck_assert_fails(safetensors_open(path, &file), STATUS_BAD_DATA, "has 3 bytes");
    free(data);
}
END_TEST

TEST_MAIN("safetensors", TEST(lengths), TEST(header_is_one_json_object),
          TEST(metadata_maps_strings_to_strings), TEST(tensor_headers),
          TEST(sizes_agree_and_do_not_overflow), TEST(tensors_tile_the_data),
          TEST(round_trip_in_every_type), TEST(special_values_survive),
          TEST(equal_input_gives_equal_bytes), TEST(writer_wants_exactly_what_was_declared),
          TEST(a_full_disk_is_reported), TEST(files_that_cannot_be_read))
