// SHA-256 against the examples published with FIPS 180-4 (NIST CSRC, "Examples with Intermediate
// Values") and against itself at every way of cutting the input.
#include "tests/test.h"

#include "base/sha256.h"

static void digest(const void *data, size_t bytes, size_t piece, char hex[SHA256_HEX_SIZE]) {
    Sha256 sha;
    sha256_begin(&sha);
    for (size_t done = 0; done < bytes; done += piece)
        sha256_update(&sha, (const char *)data + done, bytes - done < piece ? bytes - done : piece);
    sha256_hex(&sha, hex);
}

START_TEST(published_examples) {
    static const struct {
        const char *text, *hex;
    } examples[] = {
        {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
         "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
        {"abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqr"
         "lmnopqrsmnopqrstnopqrstu",
         "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1"},
    };
    for (size_t i = 0; i < sizeof examples / sizeof examples[0]; i++) {
        char hex[SHA256_HEX_SIZE];
        digest(examples[i].text, strlen(examples[i].text), 1000, hex);
        ck_assert_str_eq(hex, examples[i].hex);
    }
}
END_TEST

START_TEST(a_million_letters) {
    char *text = malloc(1000000), hex[SHA256_HEX_SIZE];
    ck_assert_ptr_nonnull(text);
    memset(text, 'a', 1000000);
    digest(text, 1000000, 4097, hex);
    ck_assert_str_eq(hex, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    free(text);
}
END_TEST

// Lengths around the block and around the place where the padding needs a second block.
START_TEST(pieces_do_not_matter) {
    char data[200], whole[SHA256_HEX_SIZE], cut[SHA256_HEX_SIZE];
    for (size_t i = 0; i < sizeof data; i++) data[i] = (char)(i * 7);
    for (size_t bytes = 0; bytes <= sizeof data; bytes++) {
        digest(data, bytes, sizeof data, whole);
        for (size_t piece = 1; piece < 70; piece += 3) {
            digest(data, bytes, piece, cut);
            ck_assert_str_eq(whole, cut);
        }
    }
}
END_TEST

START_TEST(files) {
    char path[IO_PATH_MAX], hex[SHA256_HEX_SIZE];
    ck_assert_ok(io_path(path, "%s/abc", test_directory()));
    ck_assert_ok(io_write_file_atomic(path, "abc", 3));
    Sha256 sha;
    sha256_begin(&sha);
    ck_assert_ok(sha256_update_file(&sha, path));
    sha256_hex(&sha, hex);
    ck_assert_str_eq(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    ck_assert_ok(io_path(path, "%s/absent", test_directory()));
    ck_assert_fails(sha256_update_file(&sha, path), STATUS_MISSING_INPUT, "absent");
}
END_TEST

TEST_MAIN("sha256", TEST(published_examples), TEST(a_million_letters), TEST(pieces_do_not_matter),
          TEST(files))
