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
        hash_stream_blocks(stream, N);
        for (size_t done = 0; done < N; done += step)
            hash_stream_update(stream, data + done, N - done < step ? N - done : step);
        Hash128 streamed = hash_stream_digest(stream), whole = hash_bytes(data, N);
        ck_assert(streamed.high == whole.high && streamed.low == whole.low);
        FileHash in_pieces, at_once;
        hash_stream_finish(stream, &in_pieces);
        ck_assert_ok(hash_content(data, N, &at_once));
        ck_assert_int_eq(in_pieces.num_blocks, 3);
        ck_assert_mem_eq(&in_pieces, &at_once, sizeof at_once);
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

START_TEST(a_block_has_a_size_that_256_of_them_suffice_with) {
    static const uint64_t sizes[][2] = {
        {0, 4096}, {1, 4096}, {1 << 20, 4096}, {(1 << 20) + 1, 8192}, {2 << 20, 8192}};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        ck_assert_uint_eq(hash_block_bytes(sizes[i][0]), sizes[i][1]);
    for (int bit = 0; bit < 64; bit++) {
        const uint64_t bytes = UINT64_MAX >> bit, block = hash_block_bytes(bytes);
        ck_assert(block % HASH_BLOCK_LEAST == 0 && bytes / block <= HASH_BLOCKS_MAX);
        ck_assert(bytes / block < HASH_BLOCKS_MAX || bytes % block == 0);
    }
}
END_TEST

// A content, in pieces of any size and in a file, has the same blocks; a changed byte is in the
// first that differs.
START_TEST(blocks_say_where_a_file_has_changed) {
    static const size_t sizes[] = {1, 4095, 4096, 4097, 20000, 1 << 20, (1 << 20) + 5000};
    char path[IO_PATH_MAX];
    ck_assert_ok(io_path(path, "%s/blocks", test_directory()));
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        const size_t bytes = sizes[i];
        unsigned char *data = pattern(bytes);
        FileHash whole, found;
        uint64_t begin, end;
        ck_assert_ok(hash_content(data, bytes, &whole));
        ck_assert_uint_eq(whole.bytes, bytes);
        ck_assert_uint_eq((uint64_t)whole.num_blocks,
                          (bytes + whole.block_bytes - 1) / whole.block_bytes);
        for (int turn = 0; turn < 8; turn++) {
            const size_t at = turn < 7 ? bytes / 7 * (size_t)turn : bytes - 1;
            data[at] ^= 4;
            ck_assert_ok(io_write_file_atomic(path, data, bytes));
            ck_assert_ok(hash_file_like(path, &whole, &found));
            ck_assert(hash_first_difference(&found, &whole, &begin, &end));
            ck_assert(begin <= at && at < end && end <= bytes && end - begin <= whole.block_bytes);
            data[at] ^= 4;
        }
        ck_assert_ok(io_write_file_atomic(path, data, bytes));
        ck_assert_ok(hash_file_like(path, &whole, &found));
        ck_assert(!hash_first_difference(&found, &whole, &begin, &end));
        ck_assert_str_eq(found.hex, whole.hex);
        free(data);
    }
}
END_TEST

START_TEST(more_than_was_announced_has_no_blocks) {
    enum { N = HASH_BLOCKS_MAX * HASH_BLOCK_LEAST };
    unsigned char *data = pattern(N + 1);
    for (size_t bytes = N; bytes <= N + 1; bytes++) {
        HashStream *stream;
        FileHash hash;
        ck_assert_ok(hash_stream_create(&stream));
        hash_stream_blocks(stream, 1);
        hash_stream_update(stream, data, bytes);
        hash_stream_finish(stream, &hash);
        hash_stream_free(stream);
        ck_assert_uint_eq(hash.bytes, bytes);
        ck_assert_int_eq(hash.num_blocks, bytes == N ? HASH_BLOCKS_MAX : 0);
        ck_assert_uint_eq(hash.block_bytes, bytes == N ? HASH_BLOCK_LEAST : 0);
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
          TEST(a_block_has_a_size_that_256_of_them_suffice_with),
          TEST(blocks_say_where_a_file_has_changed), TEST(more_than_was_announced_has_no_blocks),
          TEST(missing_files_and_directories_are_named))
