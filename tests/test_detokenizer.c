// Ids back to text: every kind of tokenizer directory, and broken ones.
#include "data/detokenizer.h"
#include "tests/test.h"

static const char *write_in(const char *folder, const char *name, const char *text) {
    static char directory[IO_PATH_MAX];
    char path[IO_PATH_MAX];
    ck_assert_ok(io_path(directory, "%s/%s", test_directory(), folder));
    ck_assert_ok(io_make_directories(directory));
    ck_assert_ok(io_path(path, "%s/%s", directory, name));
    ck_assert_ok(io_write_file_atomic(path, text, strlen(text)));
    return directory;
}

static void expect_piece(const Detokenizer *detokenizer, int32_t id, const char *bytes,
                         size_t expected) {
    size_t found = 0;
    const char *piece = detokenizer_piece(detokenizer, id, &found);
    ck_assert_ptr_nonnull(piece);
    ck_assert_uint_eq(found, expected);
    ck_assert_int_eq(memcmp(piece, bytes, expected), 0);
}

// vocab.json of the whole byte alphabet as GPT-2 writes it, computed the way its code does: bytes
// that print stand for themselves, the others are chr(256), chr(257), ...
static void write_alphabet(char *text) {
    int next = 256;
    text += sprintf(text, "{");
    for (int byte = 0; byte < 256; byte++) {
        bool prints = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) ||
                      (byte >= 174 && byte <= 255);
        text += sprintf(text, "%s\"\\u%04x\": %d", byte ? ", " : "", prints ? byte : next++, byte);
    }
    sprintf(text, "}");
}

START_TEST(every_byte_has_its_character) {
    static char text[16384];
    Detokenizer *detokenizer;
    write_alphabet(text);
    ck_assert_ok(detokenizer_open(write_in("alphabet", "vocab.json", text), &detokenizer));
    for (int byte = 0; byte < 256; byte++) {
        char expected = (char)byte;
        expect_piece(detokenizer, byte, &expected, 1);
    }
    detokenizer_close(detokenizer);
}
END_TEST

START_TEST(vocabulary_with_added_tokens) {
    Detokenizer *detokenizer;
    size_t bytes;
    write_in("vocab", "tokenizer_config.json",
             "{\"added_tokens_decoder\": {\"7\": {\"content\": \"<|end of text ä|>\"}}}");
    const char *directory =
        write_in("vocab", "vocab.json",
                 "{\"\\u0120the\": 0, \"\\u00e4\": 1, \"\\u65e5plain\": 2, \"\\u010a\": 5}");
    ck_assert_ok(detokenizer_open(directory, &detokenizer));
    expect_piece(detokenizer, 0, " the", 4);
    expect_piece(detokenizer, 1, "\xe4", 1);
    expect_piece(detokenizer, 2, "\u65e5plain", 8); // not of the alphabet: as it stands
    expect_piece(detokenizer, 5, "\n", 1);
    expect_piece(detokenizer, 7, "<|end of text ä|>", strlen("<|end of text ä|>"));
    const int32_t unknown[] = {-1, 3, 4, 6, 8, 1 << 30};
    for (int i = 0; i < 6; i++)
        ck_assert_ptr_null(detokenizer_piece(detokenizer, unknown[i], &bytes));
    detokenizer_close(detokenizer);
}
END_TEST

START_TEST(single_file) {
    Detokenizer *detokenizer;
    const char *directory = write_in(
        "single", "tokenizer.json",
        "{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"<x>\": 1}}, \"added_tokens\": "
        "[{\"id\": 3, \"content\": \" b c\"}, {\"id\": 1, \"content\": \"<y>\"}], \"decoder\": "
        "{\"type\": \"Sequence\", \"decoders\": [{\"type\": \"Fuse\"}, {\"type\": "
        "\"ByteLevel\"}]}}");
    ck_assert_ok(detokenizer_open(directory, &detokenizer));
    expect_piece(detokenizer, 0, "a", 1);
    expect_piece(detokenizer, 1, "<y>", 3);
    expect_piece(detokenizer, 3, " b c", 4);
    detokenizer_close(detokenizer);
}
END_TEST

START_TEST(bytes) {
    Detokenizer *detokenizer;
    const char *directory = write_in("bytes", "dense2moe_tokenizer.json", "{\"type\": \"bytes\"}");
    size_t length;
    ck_assert_ok(detokenizer_open(directory, &detokenizer));
    expect_piece(detokenizer, 0, "\0", 1);
    expect_piece(detokenizer, 255, "\xff", 1);
    expect_piece(detokenizer, 256, "", 0);
    ck_assert_ptr_null(detokenizer_piece(detokenizer, 257, &length));
    detokenizer_close(detokenizer);
}
END_TEST

START_TEST(broken_directories) {
    static const struct {
        const char *name, *text, *expected;
    } cases[] = {
        {"vocab.json", "{\"a\": \"b\"}", "token \"a\" has no integer id"},
        {"vocab.json", "{\"a\": -1}", "token id -1"},
        {"vocab.json", "{\"a\": 16777216}", "token id 16777216"},
        {"vocab.json", "[1]", "expected an object"},
        {"vocab.json", "{\"a\": 1", "vocab.json:1"},
        {"tokenizer.json", "{}", "\"model\" is missing"},
        {"tokenizer.json", "{\"model\": {\"vocab\": {}}}", "not a byte-level tokenizer"},
        {"tokenizer.json", "{\"model\": {\"vocab\": {}}, \"decoder\": {\"type\": \"Metaspace\"}}",
         "not a byte-level tokenizer"},
        {"tokenizer.json",
         "{\"model\": {\"vocab\": [[\"a\", 0]]}, \"decoder\": {\"type\": \"ByteLevel\"}}",
         "\"vocab\" is an array"},
        {"tokenizer.json",
         "{\"model\": {\"vocab\": {}}, \"decoder\": {\"type\": \"ByteLevel\"}, \"added_tokens\": "
         "[{\"id\": 1}]}",
         "added token 1 has no \"content\""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char folder[16];
        Detokenizer *detokenizer;
        snprintf(folder, sizeof folder, "broken%zu", i);
        const char *directory = write_in(folder, cases[i].name, cases[i].text);
        ck_assert_fails(detokenizer_open(directory, &detokenizer), STATUS_BAD_DATA,
                        cases[i].expected);
    }
    Detokenizer *detokenizer;
    ck_assert_fails(detokenizer_open(write_in("none", "readme", ""), &detokenizer),
                    STATUS_MISSING_INPUT, "neither tokenizer.json nor vocab.json");
    detokenizer_close(NULL);
}
END_TEST

TEST_MAIN("detokenizer", TEST(every_byte_has_its_character), TEST(vocabulary_with_added_tokens),
          TEST(single_file), TEST(bytes), TEST(broken_directories))
