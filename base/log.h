// Log lines on stderr: "level: text". stdout is kept for what a program was asked to print.
// Level from DENSE2MOE_LOG = error | warn | info (default) | debug.
#ifndef BASE_LOG_H
#define BASE_LOG_H

#include <stdbool.h>

typedef enum LogLevel { LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG } LogLevel;

void log_line(LogLevel level, const char *format, ...) __attribute__((format(printf, 2, 3)));
bool log_enabled(LogLevel level);
// From now on one level less than asked for: for processes whose progress another one reports.
void log_lower(void);

// A transient line that the next log or status line overwrites; only shown on a terminal. An empty
// text takes it away.
void log_transient(const char *format, ...) __attribute__((format(printf, 1, 2)));

#define log_error(...) log_line(LOG_ERROR, __VA_ARGS__)
#define log_warn(...)  log_line(LOG_WARN, __VA_ARGS__)
#define log_info(...)  log_line(LOG_INFO, __VA_ARGS__)
#define log_debug(...) log_line(LOG_DEBUG, __VA_ARGS__)

#endif
