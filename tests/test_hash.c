// XXH3-128 against known values (xxhsum -H2), and that files, streams and buffers agree.
#include "tests/test.h"

#include "base/hash.h"

static void check_hex(const void *data, size_t bytes, const char *expected) {
    char hex[HASH_HEX_SIZE];
    hash_to_hex(hash_bytes(data, bytes), hex);
    ck_assert_str_eq(hex, expected);
}

START_TEST(known_values) {
    check_hex("", 0, "99aa06d3014798d86001c324468d497f");
    check_hex("hello", 5, "b5e9c1ad071b3e7fc779cfaa5e523818");
}
END_TEST

static unsigned char *pattern(size_t bytes) {
    unsigned char *data = malloc(bytes + 1);
    for (size_t i = 0; i < bytes; i++) data[i] = (unsigned char)(i * 131 + (i >> 8));
    return data;
}

START_TEST(streams_agree_with_buffers) {
    enum { N = 10000 };
    unsigned char *data = pattern(N);
    for (size_t step = 1; step < N; step = step * 3 + 1) {
        HashStream *stream;
        ck_assert_ok(hash_stream_create(&stream));
        for (size_t done = 0; done < N; done += step)
            hash_stream_update(stream, data + done, N - done < step ? N - done : step);
        Hash128 streamed = hash_stream_digest(stream), whole = hash_bytes(data, N);
        ck_assert(streamed.high == whole.high && streamed.low == whole.low);
        hash_stream_free(stream);
    }
    hash_stream_free(NULL);
    free(data);
}
END_TEST

static void note_progress(void *context, uint64_t done) {
    uint64_t *seen = context;
    ck_assert_uint_gt(done, seen[0]);
    seen[0] = done;
    seen[1]++;
}

START_TEST(files_agree_with_buffers) {
    // Empty, and around the size in which files are read.
    static const size_t sizes[] = {0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        char path[IO_PATH_MAX], of_file[HASH_HEX_SIZE], of_buffer[HASH_HEX_SIZE];
        ck_assert_ok(io_path(path, "%s/file", test_directory()));
        unsigned char *data = pattern(sizes[i]);
        ck_assert_ok(io_write_file_atomic(path, data, sizes[i]));
        uint64_t bytes, seen[2] = {0, 0};
        ck_assert_ok(hash_file(path, of_file, &bytes, note_progress, seen));
        hash_to_hex(hash_bytes(data, sizes[i]), of_buffer);
        ck_assert_str_eq(of_file, of_buffer);
        ck_assert_uint_eq(bytes, sizes[i]);
        ck_assert_uint_eq(seen[0], sizes[i]);
        ck_assert_uint_eq(seen[1], (sizes[i] + (1 << 20) - 1) >> 20);
        free(data);
    }
}
END_TEST

START_TEST(one_bit_changes_the_hash) {
    unsigned char *data = pattern(4096);
    Hash128 before = hash_bytes(data, 4096);
    for (size_t bit = 0; bit < 4096 * 8; bit += 61) {
        data[bit / 8] ^= (unsigned char)(1 << bit % 8);
        Hash128 after = hash_bytes(data, 4096);
        ck_assert(after.high != before.high || after.low != before.low);
        data[bit / 8] ^= (unsigned char)(1 << bit % 8);
    }
    free(data);
}
END_TEST

START_TEST(missing_files_and_directories_are_named) {
    char path[IO_PATH_MAX], hex[HASH_HEX_SIZE];
    uint64_t bytes;
    ck_assert_ok(io_path(path, "%s/absent", test_directory()));
    ck_assert_fails(hash_file(path, hex, &bytes, NULL, NULL), STATUS_MISSING_INPUT, path);
    ck_assert_fails(hash_file(test_directory(), hex, &bytes, NULL, NULL), STATUS_BAD_DATA,
                    "not a regular file");
}
END_TEST

TEST_MAIN("hash", TEST(known_values), TEST(streams_agree_with_buffers),
          TEST(files_agree_with_buffers), TEST(one_bit_changes_the_hash),
          TEST(missing_files_and_directories_are_named))
