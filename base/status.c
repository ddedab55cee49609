// The error record behind FAIL and TRY: one per thread, fixed size, so that reporting an error
// never allocates and works when memory is what ran out.
#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include "base/log.h"

static _Thread_local StatusRecord record;

Status status_fail(const char *file, int line, Status code, const char *format, ...) {
    // Formatted aside first: the arguments may point into the record (a message that quotes the
    // one before it).
    char message[STATUS_TEXT_MAX];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    memcpy(record.message, message, strlen(message) + 1);
    record.trace[0] = '\0';
    record.told = false;
    return status_trace(file, line, code, "failed here");
}

Status status_trace(const char *file, int line, Status code, const char *what) {
    record.code = code;
    size_t used = strlen(record.trace), room = sizeof record.trace - used;
    int written = snprintf(record.trace + used, room, "  at %s:%d: %s\n", file, line, what);
    if (written < 0 || (size_t)written >= room) record.trace[used] = '\0'; // no half frames
    return code;
}

Status status_prefix(Status code, const char *format, ...) {
    char message[STATUS_TEXT_MAX];
    va_list arguments;
    va_start(arguments, format);
    int used = vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    if (used >= 0 && (size_t)used < sizeof message)
        snprintf(message + used, sizeof message - (size_t)used, "%s", record.message);
    memcpy(record.message, message, strlen(message) + 1);
    record.code = code;
    return code;
}

const char *status_message(void) {
    return record.message;
}

const char *status_trace_text(void) {
    return record.trace;
}

void status_take(StatusRecord *out) {
    *out = record;
    status_clear();
}

Status status_put(const StatusRecord *other) {
    record = *other;
    return record.code;
}

void status_clear(void) {
    record.code = STATUS_OK;
    record.message[0] = record.trace[0] = '\0';
    record.told = false;
}

void status_told(void) {
    record.told = true;
}

int status_report(Status code, const char *program) {
    if (code == STATUS_OK) return 0;
    if (record.told && !log_enabled(LOG_DEBUG)) return (int)code;
    log_transient("%s", ""); // the message must not be glued to a progress bar
    // Stopping on request is no error, though its exit code asks the scheduler to start us again.
    const char *kind = code == STATUS_PREEMPTED ? "" : "error: ";
    fprintf(stderr, "%s: %s%s\n", program, kind, record.message);
    if (log_enabled(LOG_DEBUG)) fputs(record.trace, stderr);
    return (int)code;
}
