// What every test program shares: `check` with one suite per file, a temporary directory, and a
// main that fails when no test ran. Run one test: ./test_NAME TEST (or CK_RUN_CASE).
//
//   START_TEST(adds_up) { ck_assert_int_eq(1 + 1, 2); } END_TEST
//   TEST_MAIN("arithmetic", TEST(adds_up))
#ifndef TESTS_TEST_H
#define TESTS_TEST_H

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "base/file.h"
#include "base/status.h"

typedef struct TestEntry {
    const char *name;
    const TTest *test;
} TestEntry;
#define TEST(name)                                                                                 \
    { #name, name }

// The call succeeds, or the test fails with its message.
#define ck_assert_ok(call)                                                                         \
    do {                                                                                           \
        Status test_status_ = (call);                                                              \
        ck_assert_msg(test_status_ == STATUS_OK, "%s -> %d: %s\n%s", #call, (int)test_status_,     \
                      status_message(), status_trace_text());                                      \
    } while (0)
// The call fails with `code` and a message that contains `text`.
#define ck_assert_fails(call, code, text)                                                          \
    do {                                                                                           \
        Status test_status_ = (call);                                                              \
        ck_assert_msg(test_status_ == (code), "%s -> %d, expected %d: %s", #call,                  \
                      (int)test_status_, (int)(code), status_message());                           \
        ck_assert_msg(strstr(status_message(), (text)) != NULL, "%s: message '%s' lacks '%s'",     \
                      #call, status_message(), (text));                                            \
    } while (0)

// A fresh directory under $TMPDIR or /tmp, made once per test process and removed at its exit.
static char test_directory_[64];
static inline void test_remove_directory_(void) {
    if (io_remove_tree(test_directory_) != STATUS_OK) status_clear();
}
__attribute__((unused)) static const char *test_directory(void) {
    if (!test_directory_[0]) {
        const char *parent = getenv("TMPDIR");
        if (!parent || strlen(parent) > 32) parent = "/tmp";
        snprintf(test_directory_, sizeof test_directory_, "%s/d2m-test-XXXXXX", parent);
        if (!mkdtemp(test_directory_)) abort();
        atexit(test_remove_directory_);
    }
    return test_directory_;
}

static inline int test_run_(const char *suite_name, const TestEntry *entries, size_t count,
                            int timeout_s, int argc, char **argv) {
    Suite *suite = suite_create(suite_name);
    for (size_t i = 0; i < count; i++) {
        if (argc > 1 && strcmp(argv[1], entries[i].name) != 0) continue;
        TCase *tcase = tcase_create(entries[i].name);
        tcase_set_timeout(tcase, timeout_s);
        tcase_add_test(tcase, entries[i].test);
        suite_add_tcase(suite, tcase);
    }
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner), ran = srunner_ntests_run(runner);
    srunner_free(runner);
    if (ran == 0) fprintf(stderr, "%s: no test ran\n", suite_name);
    return ran == 0 || failed > 0;
}

#define TEST_MAIN_TIMEOUT(suite_name, timeout_s, ...)                                              \
    int main(int argc, char **argv) {                                                              \
        const TestEntry entries[] = {__VA_ARGS__};                                                 \
        return test_run_(suite_name, entries, sizeof entries / sizeof entries[0], timeout_s, argc, \
                         argv);                                                                    \
    }
#define TEST_MAIN(suite_name, ...) TEST_MAIN_TIMEOUT(suite_name, 120, __VA_ARGS__)

#endif
