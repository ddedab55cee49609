// Log lines and the one transient line, both on stderr under one lock, so that threads never mix
// their letters and a progress bar never swallows a warning.
//
// What the terminal can do is looked at once, at the first line: colour only on a terminal and
// without NO_COLOR (https://no-color.org), the transient line only where the cursor can go back.
#include "base/log.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { LINE_MAX_BYTES = 8192, DEFAULT_COLUMNS = 80 };

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static LogLevel threshold = LOG_INFO;
static bool is_terminal, use_colour;
static bool transient_shown; // guarded by lock

static const char *const level_names[] = {"error", "warn", "info", "debug"};
static const char *const level_colours[] = {"\033[1;31m", "\033[33m", "", "\033[2m"};

static void look_around(void) {
    const char *terminal = getenv("TERM"), *no_colour = getenv("NO_COLOR");
    is_terminal = isatty(STDERR_FILENO) && terminal && strcmp(terminal, "dumb") != 0;
    use_colour = is_terminal && !(no_colour && no_colour[0]);

    const char *wanted = getenv("DENSE2MOE_LOG");
    if (!wanted || !wanted[0]) return;
    for (int level = LOG_ERROR; level <= LOG_DEBUG; level++) {
        if (strcmp(wanted, level_names[level]) == 0) {
            threshold = (LogLevel)level;
            return;
        }
    }
    fprintf(stderr, "warn: DENSE2MOE_LOG=%s ignored, expected error, warn, info or debug\n",
            wanted);
}

bool log_enabled(LogLevel level) {
    pthread_once(&once, look_around);
    return level <= threshold;
}

void log_lower(void) {
    pthread_once(&once, look_around);
    if (threshold > LOG_ERROR) threshold--;
}

// Called with the lock held.
static void erase_transient(void) {
    if (transient_shown) fputs("\r\033[K", stderr);
    transient_shown = false;
}

void log_line(LogLevel level, const char *format, ...) {
    if (!log_enabled(level)) return;
    char text[LINE_MAX_BYTES];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);

    const char *colour = use_colour ? level_colours[level] : "";
    pthread_mutex_lock(&lock);
    erase_transient();
    fprintf(stderr, "%s%s:%s %s\n", colour, level_names[level], colour[0] ? "\033[0m" : "", text);
    pthread_mutex_unlock(&lock);
}

void log_transient(const char *format, ...) {
    if (!log_enabled(LOG_INFO) || !is_terminal) return;
    char text[LINE_MAX_BYTES];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);

    // A line that wraps cannot be taken back with one carriage return.
    struct winsize window;
    int columns = DEFAULT_COLUMNS;
    if (ioctl(STDERR_FILENO, TIOCGWINSZ, &window) == 0 && window.ws_col > 0)
        columns = window.ws_col;
    pthread_mutex_lock(&lock);
    erase_transient();
    if (text[0]) {
        fprintf(stderr, "%.*s", columns - 1, text);
        transient_shown = true;
    }
    fflush(stderr);
    pthread_mutex_unlock(&lock);
}
