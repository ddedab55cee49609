// Log lines: levels, colour and the transient line, seen from the other end of a pipe and of a
// pseudo-terminal.
#include "tests/test.h"

#include <pty.h>
#include <sys/wait.h>
#include "base/log.h"

static void say_everything(void) {
    log_error("one");
    log_transient("bar %d%%", 10);
    log_warn("two");
    log_info("three");
    log_transient("bar %d%%", 20);
    log_transient("%s", "");
    log_debug("four");
}

// Runs say_everything with stderr at `write_end` and returns what arrived at `read_end`.
static void capture(int read_end, int write_end, char *text, size_t size) {
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0) {
        dup2(write_end, STDERR_FILENO);
        say_everything();
        _exit(0);
    }
    close(write_end);
    size_t used = 0;
    ssize_t count; // a pseudo-terminal ends with EIO instead of 0
    while (used < size - 1 && (count = read(read_end, text + used, size - 1 - used)) > 0)
        used += (size_t)count;
    text[used] = '\0';
    close(read_end);
    waitpid(child, NULL, 0);
}

static void capture_pipe(char *text, size_t size) {
    int ends[2];
    ck_assert_int_eq(pipe(ends), 0);
    capture(ends[0], ends[1], text, size);
}

static void capture_terminal(char *text, size_t size) {
    int master, slave;
    ck_assert_int_eq(openpty(&master, &slave, NULL, NULL, NULL), 0);
    capture(master, slave, text, size);
}

START_TEST(plain_lines_in_a_file) {
    char text[1024];
    unsetenv("DENSE2MOE_LOG");
    capture_pipe(text, sizeof text);
    ck_assert_str_eq(text, "error: one\nwarn: two\ninfo: three\n");
}
END_TEST

START_TEST(levels) {
    char text[1024];
    setenv("DENSE2MOE_LOG", "error", 1);
    capture_pipe(text, sizeof text);
    ck_assert_str_eq(text, "error: one\n");
    setenv("DENSE2MOE_LOG", "debug", 1);
    capture_pipe(text, sizeof text);
    ck_assert_str_eq(text, "error: one\nwarn: two\ninfo: three\ndebug: four\n");
    setenv("DENSE2MOE_LOG", "loud", 1);
    capture_pipe(text, sizeof text);
    ck_assert_str_eq(text, "warn: DENSE2MOE_LOG=loud ignored, expected error, warn, info or debug\n"
                           "error: one\nwarn: two\ninfo: three\n");
}
END_TEST

START_TEST(terminal_shows_colour_and_the_transient_line) {
    char text[1024];
    setenv("TERM", "xterm", 1);
    unsetenv("DENSE2MOE_LOG");
    unsetenv("NO_COLOR");
    capture_terminal(text, sizeof text);
    ck_assert_str_eq(text, "\033[1;31merror:\033[0m one\r\n"
                           "bar 10%\r\033[K\033[33mwarn:\033[0m two\r\n"
                           "info: three\r\n"
                           "bar 20%\r\033[K");
}
END_TEST

START_TEST(no_color_is_respected) {
    char text[1024];
    setenv("TERM", "xterm", 1);
    unsetenv("DENSE2MOE_LOG");
    setenv("NO_COLOR", "1", 1);
    capture_terminal(text, sizeof text);
    ck_assert_str_eq(text, "error: one\r\nbar 10%\r\033[Kwarn: two\r\ninfo: three\r\n"
                           "bar 20%\r\033[K");
}
END_TEST

START_TEST(dumb_terminals_get_plain_lines) {
    char text[1024];
    setenv("TERM", "dumb", 1);
    unsetenv("DENSE2MOE_LOG");
    unsetenv("NO_COLOR");
    capture_terminal(text, sizeof text);
    ck_assert_str_eq(text, "error: one\r\nwarn: two\r\ninfo: three\r\n");
}
END_TEST

TEST_MAIN("log", TEST(plain_lines_in_a_file), TEST(levels),
          TEST(terminal_shows_colour_and_the_transient_line), TEST(no_color_is_respected),
          TEST(dumb_terminals_get_plain_lines))
