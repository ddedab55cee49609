// JSON state files: hostile text is refused with its place, getters name file and key, and what is
// written comes back to the last bit.
#include "tests/test.h"

#include <float.h>
#include <limits.h>
#include <math.h>
#include "base/json.h"

static Status parse(const char *text, json_t **out) {
    return json_parse(text, strlen(text), "state.json", out);
}

static json_t *parsed(const char *text) {
    json_t *root;
    ck_assert_ok(parse(text, &root));
    return root;
}

START_TEST(hostile_text_is_refused_with_its_place) {
    static const struct {
        const char *text, *expected;
    } cases[] = {
        {"", "state.json:1:0: '[' or '{' expected near end of file"},
        {"{", "state.json:1:1: string or '}' expected near end of file"},
        {"{\n\"a\": 1,\n\"a\": 2}", "state.json:3:3: duplicate object key near '\"a\"'"},
        {"{\"o\": {\"k\": 1, \"k\": 1}}", "duplicate object key"},
        {"{} x", "state.json:1:4: end of file expected near 'x'"},
        {"{}{}", "end of file expected"},
        {"{\"a\": \"\xff\"}", "unable to decode byte 0xff"},
        {"{\"a\": \"\xc0\x80\"}", "unable to decode byte 0xc0"},     // overlong
        {"{\"a\": \"\xed\xa0\x80\"}", "unable to decode byte 0xed"}, // surrogate
        {"{\"a\": \"\\ud800\"}", "invalid Unicode"},
        {"{\"a\": \"\\u0000\"}", "\\u0000 is not allowed"},
        {"{\"a\": 01}", "state.json:1:"},
        {"{\"a\": 1e999}", "real number overflow"},
        {"{\"a\": 9223372036854775808}", "too big integer"},
        {"{\"a\": NaN}", "state.json:1:"},
        {"{\"a\": 1,}", "state.json:1:"},
        {"{'a': 1}", "state.json:1:"},
        {"// comment\n{}", "state.json:1:"},
        {"[1, 2]", "expected an object"},
        {"\xef\xbb\xbf{}", "state.json:1:"}, // byte order mark
        {"\"text\"", "state.json:1:"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        json_t *root = NULL;
        ck_assert_fails(parse(cases[i].text, &root), STATUS_BAD_DATA, cases[i].expected);
    }
    json_t *root;
    ck_assert_fails(json_parse("{}\0", 3, "state.json", &root), STATUS_BAD_DATA, "state.json:1:");
}
END_TEST

START_TEST(deep_nesting_is_refused_without_a_crash) {
    enum { DEPTH = 1000000 };
    char *text = malloc(6 * DEPTH + 8);
    char *end = text;
    for (int i = 0; i < DEPTH; i++) end = stpcpy(end, "{\"a\":");
    json_t *root;
    ck_assert_fails(json_parse(text, (size_t)(end - text), "state.json", &root), STATUS_BAD_DATA,
                    "maximum parsing depth reached");
    end = stpcpy(text, "{\"a\":");
    memset(end, '[', DEPTH);
    ck_assert_fails(json_parse(text, DEPTH, "state.json", &root), STATUS_BAD_DATA,
                    "maximum parsing depth reached");
    free(text);
}
END_TEST

START_TEST(files_over_the_cap_are_refused) {
    char path[IO_PATH_MAX];
    json_t *root;
    ck_assert_ok(io_path(path, "%s/state.json", test_directory()));
    ck_assert_fails(json_read_file(path, 100, &root), STATUS_MISSING_INPUT, path);
    ck_assert_ok(io_write_file_atomic(path, "{\"a\": 12345}", 12));
    ck_assert_fails(json_read_file(path, 11, &root), STATUS_BAD_DATA, "at most 11");
    ck_assert_ok(json_read_file(path, 12, &root));
    json_decref(root);
    ck_assert_ok(io_write_file_atomic(path, "{\"a\": 12345", 11));
    ck_assert_fails(json_read_file(path, 12, &root), STATUS_BAD_DATA, path);
}
END_TEST

START_TEST(getters_read) {
    json_t *root = parsed("{\"i\": -5, \"r\": 2.5, \"t\": true, \"f\": false, \"s\": \"abc\","
                          " \"o\": {\"x\": 1}, \"a\": [1, 2], \"n\": null}");
    int64_t i;
    double r;
    bool b;
    char text[4];
    json_t *member;
    ck_assert_ok(json_get_int(root, "f", "i", -5, 5, &i));
    ck_assert_int_eq(i, -5);
    ck_assert_ok(json_get_real(root, "f", "r", &r));
    ck_assert(r == 2.5);
    ck_assert_ok(json_get_real(root, "f", "i", &r)); // integers are numbers
    ck_assert(r == -5);
    ck_assert_ok(json_get_bool(root, "f", "t", &b));
    ck_assert(b);
    ck_assert_ok(json_get_bool(root, "f", "f", &b));
    ck_assert(!b);
    ck_assert_ok(json_get_text(root, "f", "s", text, sizeof text));
    ck_assert_str_eq(text, "abc");
    ck_assert_ok(json_get_object(root, "f", "o", &member));
    ck_assert_uint_eq(json_object_size(member), 1);
    ck_assert_ok(json_get_array(root, "f", "a", &member));
    ck_assert_uint_eq(json_array_size(member), 2);
    ck_assert(json_has(root, "i") && !json_has(root, "n") && !json_has(root, "absent"));
    json_decref(root);
}
END_TEST

START_TEST(getters_name_file_key_found_and_expected) {
    json_t *root = parsed("{\"i\": 7, \"r\": 2.5, \"s\": \"abcd\", \"n\": null, \"a\": []}"), *m;
    int64_t i;
    double r;
    bool b;
    char text[4];
    const Status bad = STATUS_BAD_DATA;
    ck_assert_fails(json_get_int(root, "f.json", "x", 0, 9, &i), bad,
                    "f.json: key \"x\" is missing");
    ck_assert_fails(json_get_int(root, "f.json", "i", 0, 6, &i), bad,
                    "f.json: key \"i\" is 7, expected 0 to 6");
    ck_assert_fails(json_get_int(root, "f.json", "i", 8, 9, &i), bad, "is 7, expected 8 to 9");
    ck_assert_fails(json_get_int(root, "f.json", "r", 0, 9, &i), bad,
                    "is a real number, expected an integer");
    ck_assert_fails(json_get_real(root, "f.json", "s", &r), bad, "is a string, expected a number");
    ck_assert_fails(json_get_bool(root, "f.json", "i", &b), bad,
                    "is an integer, expected true or false");
    ck_assert_fails(json_get_text(root, "f.json", "n", text, sizeof text), bad,
                    "is null, expected a string");
    ck_assert_fails(json_get_text(root, "f.json", "s", text, sizeof text), bad,
                    "has 4 bytes, expected at most 3");
    ck_assert_fails(json_get_object(root, "f.json", "a", &m), bad,
                    "is an array, expected an object");
    ck_assert_fails(json_get_array(root, "f.json", "s", &m), bad, "is a string, expected an array");
    json_decref(root);
}
END_TEST

// Writes {"v": value} to a file and reads it back.
static json_t *through_file(json_t *value) {
    char path[IO_PATH_MAX];
    json_t *root = json_pack("{s:o}", "v", value), *back;
    ck_assert_ok(io_path(path, "%s/value.json", test_directory()));
    ck_assert_ok(json_write_file(path, root));
    json_decref(root);
    ck_assert_ok(json_read_file(path, 1 << 20, &back));
    return back;
}

static void check_real(double value) {
    json_t *root = through_file(json_real(value));
    double back;
    ck_assert_ok(json_get_real(root, "f", "v", &back));
    ck_assert_msg(memcmp(&back, &value, sizeof back) == 0, "%a came back as %a", value, back);
    json_decref(root);
}

START_TEST(reals_come_back_to_the_last_bit) {
    static const double values[] = {0.0,     -0.0,    1.0,       0.1,  1.0 / 3, M_PI,
                                    DBL_MAX, DBL_MIN, 0x1p-1074, 1e23, -2e-308, 123456789.125};
    for (size_t i = 0; i < sizeof values / sizeof values[0]; i++) check_real(values[i]);
    uint64_t bits = 0x9e3779b97f4a7c15u;
    for (int i = 0; i < 200; i++) { // bit patterns from all over the range
        bits = bits * 6364136223846793005u + 1442695040888963407u;
        double value;
        memcpy(&value, &bits, sizeof value);
        if (isfinite(value)) check_real(value);
    }
}
END_TEST

START_TEST(integers_and_text_come_back) {
    static const int64_t values[] = {0, -1, INT64_MAX, INT64_MIN, (1LL << 53) + 1};
    for (size_t i = 0; i < sizeof values / sizeof values[0]; i++) {
        json_t *root = through_file(json_integer(values[i]));
        int64_t back;
        ck_assert_ok(json_get_int(root, "f", "v", INT64_MIN, INT64_MAX, &back));
        ck_assert_int_eq(back, values[i]);
        json_decref(root);
    }
    const char *text = "line\n\ttab \"quoted\" \\ \x01 \xc3\xa4 \xf0\x9f\x99\x82";
    json_t *root = through_file(json_string(text));
    char back[64];
    ck_assert_ok(json_get_text(root, "f", "v", back, sizeof back));
    ck_assert_str_eq(back, text);
    json_decref(root);
}
END_TEST

START_TEST(equal_states_are_equal_files) {
    char path[IO_PATH_MAX], *first, *second;
    size_t bytes;
    ck_assert_ok(io_path(path, "%s/sorted.json", test_directory()));
    json_t *a = parsed("{\"b\": 1, \"a\": {\"y\": 2, \"x\": 3}}");
    json_t *b = parsed("{\"a\": {\"x\": 3, \"y\": 2}, \"b\": 1}");
    ck_assert_ok(json_write_file(path, a));
    ck_assert_ok(io_read_file(path, 1000, &first, &bytes));
    ck_assert_ok(json_write_file(path, b));
    ck_assert_ok(io_read_file(path, 1000, &second, &bytes));
    ck_assert_str_eq(first, second);
    ck_assert_int_eq(first[bytes - 1], '\n');
    free(first);
    free(second);
    json_decref(a);
    json_decref(b);
}
END_TEST

TEST_MAIN("json", TEST(hostile_text_is_refused_with_its_place),
          TEST(deep_nesting_is_refused_without_a_crash), TEST(files_over_the_cap_are_refused),
          TEST(getters_read), TEST(getters_name_file_key_found_and_expected),
          TEST(reals_come_back_to_the_last_bit), TEST(integers_and_text_come_back),
          TEST(equal_states_are_equal_files))
