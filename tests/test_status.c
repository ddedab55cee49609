// The error record: what FAIL and TRY leave in it, and that threads do not share it.
#include "tests/test.h"

#include <pthread.h>
#include "base/log.h"

static Status third(int value) {
    if (value > 2) FAIL(STATUS_BAD_DATA, "file.x: found %d, expected at most 2", value);
    return STATUS_OK;
}
static Status second(int value) {
    TRY(third(value));
    return STATUS_OK;
}
static Status first(int value) {
    Status status = STATUS_OK;
    TRY_GOTO(second(value), done);
done:
    return status;
}
static Status fail_goto(bool *cleaned) {
    Status status = STATUS_OK;
    FAIL_GOTO(done, STATUS_IO, "went %s", "wrong");
done:
    *cleaned = true;
    return status;
}
static Status invariant(bool holds) {
    INVARIANT(holds);
    return STATUS_OK;
}

START_TEST(message_and_trace) {
    ck_assert_ok(first(2));
    ck_assert_str_eq(status_message(), "");
    ck_assert_int_eq(first(3), STATUS_BAD_DATA);
    ck_assert_str_eq(status_message(), "file.x: found 3, expected at most 2");
    const char *trace = status_trace_text();
    const char *failed = strstr(trace, "tests/test_status.c:8: failed here\n");
    const char *inner = strstr(trace, ": third(value)\n"),
               *outer = strstr(trace, ": second(value)");
    ck_assert_msg(failed && inner && outer && failed < inner && inner < outer, "%s", trace);
    // Paths in traces are relative to the source tree.
    ck_assert_msg(strncmp(trace, "  at tests/", 11) == 0, "%s", trace);
}
END_TEST

START_TEST(goto_form_cleans_up) {
    bool cleaned = false;
    ck_assert_fails(fail_goto(&cleaned), STATUS_IO, "went wrong");
    ck_assert(cleaned);
}
END_TEST

START_TEST(invariants_are_internal_errors) {
    ck_assert_ok(invariant(true));
    ck_assert_fails(invariant(false), STATUS_INTERNAL, "invariant broken: holds");
}
END_TEST

START_TEST(a_new_failure_replaces_the_record) {
    ck_assert_int_eq(first(3), STATUS_BAD_DATA);
    ck_assert_int_eq(third(4), STATUS_BAD_DATA);
    ck_assert_str_eq(status_message(), "file.x: found 4, expected at most 2");
    ck_assert_ptr_null(strstr(status_trace_text(), "second"));
    status_clear();
    ck_assert_str_eq(status_message(), "");
    ck_assert_str_eq(status_trace_text(), "");
}
END_TEST

START_TEST(prefix_keeps_code_and_trace) {
    Status status = first(3);
    ck_assert_int_eq(status_prefix(status, "shard %d: ", 7), STATUS_BAD_DATA);
    ck_assert_str_eq(status_message(), "shard 7: file.x: found 3, expected at most 2");
    ck_assert_ptr_nonnull(strstr(status_trace_text(), "third(value)"));
}
END_TEST

START_TEST(a_message_may_quote_the_one_before) {
    ck_assert_int_eq(third(3), STATUS_BAD_DATA);
    ck_assert_int_eq(status_fail("f", 1, STATUS_IO, "again: %s", status_message()), STATUS_IO);
    ck_assert_str_eq(status_message(), "again: file.x: found 3, expected at most 2");
}
END_TEST

START_TEST(long_messages_and_traces_are_cut) {
    static char text[2 * STATUS_TEXT_MAX];
    memset(text, 'x', sizeof text - 1);
    ck_assert_int_eq(status_fail("f", 1, STATUS_IO, "%s", text), STATUS_IO);
    ck_assert_uint_eq(strlen(status_message()), STATUS_TEXT_MAX - 1);
    for (int i = 0; i < 1000; i++) status_trace("file.c", i, STATUS_IO, "a frame of some length");
    size_t length = strlen(status_trace_text());
    ck_assert_uint_lt(length, STATUS_TEXT_MAX);
    ck_assert_int_eq(status_trace_text()[length - 1], '\n'); // whole frames only
    status_prefix(STATUS_IO, "%s", text);
    ck_assert_uint_eq(strlen(status_message()), STATUS_TEXT_MAX - 1);
}
END_TEST

static void *fail_in_thread(void *out) {
    ck_assert_str_eq(status_message(), "");
    if (first(9) == STATUS_BAD_DATA) status_take(out);
    ck_assert_str_eq(status_message(), "");
    return NULL;
}

START_TEST(threads_have_their_own_record) {
    static StatusRecord taken;
    ck_assert_int_eq(first(3), STATUS_BAD_DATA);
    pthread_t thread;
    ck_assert_int_eq(pthread_create(&thread, NULL, fail_in_thread, &taken), 0);
    pthread_join(thread, NULL);
    ck_assert_str_eq(status_message(), "file.x: found 3, expected at most 2");
    ck_assert_int_eq(status_put(&taken), STATUS_BAD_DATA);
    ck_assert_str_eq(status_message(), "file.x: found 9, expected at most 2");
    ck_assert_ptr_nonnull(strstr(status_trace_text(), "third(value)"));
}
END_TEST

// What `report` prints on stderr, through a pipe.
static int captured_report(Status code, char *text, size_t size) {
    int pipe_ends[2], saved = dup(STDERR_FILENO);
    ck_assert_int_eq(pipe(pipe_ends), 0);
    dup2(pipe_ends[1], STDERR_FILENO);
    int exit_code = status_report(code, "train");
    fflush(stderr);
    dup2(saved, STDERR_FILENO);
    close(pipe_ends[1]);
    ssize_t bytes = read(pipe_ends[0], text, size - 1);
    text[bytes < 0 ? 0 : bytes] = '\0';
    close(pipe_ends[0]);
    close(saved);
    return exit_code;
}

START_TEST(report_prints_and_gives_the_exit_code) {
    char text[512];
    ck_assert_int_eq(captured_report(STATUS_OK, text, sizeof text), 0);
    ck_assert_str_eq(text, "");
    ck_assert_int_eq(captured_report(first(3), text, sizeof text), 65);
    ck_assert_str_eq(text, "train: error: file.x: found 3, expected at most 2\n");
    // Stopping on request is not called an error.
    Status stopped = status_fail("f", 1, STATUS_PREEMPTED, "saved at step 5");
    ck_assert_int_eq(captured_report(stopped, text, sizeof text), 75);
    ck_assert_str_eq(text, "train: saved at step 5\n");
}
END_TEST

START_TEST(debug_level_reports_the_trace) {
    setenv("DENSE2MOE_LOG", "debug", 1);
    char text[512];
    ck_assert_int_eq(captured_report(first(3), text, sizeof text), 65);
    ck_assert_ptr_nonnull(strstr(text, ": third(value)\n"));
}
END_TEST

TEST_MAIN("status", TEST(message_and_trace), TEST(goto_form_cleans_up),
          TEST(invariants_are_internal_errors), TEST(a_new_failure_replaces_the_record),
          TEST(prefix_keeps_code_and_trace), TEST(a_message_may_quote_the_one_before),
          TEST(long_messages_and_traces_are_cut), TEST(threads_have_their_own_record),
          TEST(report_prints_and_gives_the_exit_code), TEST(debug_level_reports_the_trace))
