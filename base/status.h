// Errors travel up.
//
// Every fallible function returns a Status. The place that finds a problem says what is wrong with
// FAIL(); every caller passes it on with TRY(), which adds one line of trace; only `main` prints
// the record and exits, with the Status as the exit code. The record is per thread: a worker hands
// its record to the thread that joins it with status_take() / status_put().
//
// A message names the file, key, tensor or rank, what was found, what was expected, and a hint.
#ifndef BASE_STATUS_H
#define BASE_STATUS_H

#include <stdbool.h>

// The values are the documented process exit codes (docs/troubleshooting.md).
typedef enum Status {
    STATUS_OK = 0,
    STATUS_USAGE = 2,            // command line or recipe
    STATUS_BAD_DATA = 65,        // a file exists but its content is wrong
    STATUS_MISSING_INPUT = 66,   // an input file does not exist
    STATUS_INTERNAL = 70,        // a bug, an allocation failure, a broken device
    STATUS_CANNOT_WRITE = 73,    // an output cannot be created
    STATUS_IO = 74,              // reading or writing failed midway
    STATUS_PREEMPTED = 75,       // stopped on request; run the same command again
    STATUS_COMMUNICATION = 76,   // a rank was lost; retry
    STATUS_NUMERICS = 77,        // too many non-finite steps in a row
    STATUS_RECIPE_MISMATCH = 78, // recipe and checkpoint disagree
    STATUS_NO_PROGRESS = 93,     // three attempts without progress; do not requeue
} Status;

enum { STATUS_TEXT_MAX = 4096 };

// The error record: the message of the first FAIL and the trace added on the way up.
typedef struct StatusRecord {
    Status code;
    char message[STATUS_TEXT_MAX];
    char trace[STATUS_TEXT_MAX]; // "  at file:line: what" per frame; later ones dropped if full
    bool told;                   // another process says the same
} StatusRecord;

// Starts a new record for this thread (message from the format) and returns `code`.
Status status_fail(const char *file, int line, Status code, const char *format, ...)
    __attribute__((format(printf, 4, 5), cold));
// Adds a trace frame to the record and returns `code`. Never called with STATUS_OK.
Status status_trace(const char *file, int line, Status code, const char *what)
    __attribute__((cold));
// Puts words in front of the message ("reading shard x: "), keeping code and trace.
Status status_prefix(Status code, const char *format, ...)
    __attribute__((format(printf, 2, 3), cold));

// The message / trace of this thread's newest failure; "" when there was none.
const char *status_message(void);
const char *status_trace_text(void);
// Moves the record out of / into this thread (for worker threads).
void status_take(StatusRecord *out);
Status status_put(const StatusRecord *record);
// Forgets the record: for callers that handled the failure.
void status_clear(void);
// This thread's failure is that of several processes, and another one reports it.
void status_told(void);
// Prints "program: error: message" and, at log level debug, the trace; returns the exit code. What
// another process says is printed at log level debug only.
int status_report(Status code, const char *program);

#ifdef __cppcheck__
#define NODISCARD // cppcheck cannot parse an attribute after a function pointer
#else
#define NODISCARD __attribute__((warn_unused_result))
#endif

// FAIL(STATUS_BAD_DATA, "%s: ...", path) returns from the calling function. The code is returned
// as written, not as status_fail's result, so that compilers see that a failure is not STATUS_OK
// and do not warn about outputs that only a success fills.
#define FAIL(code, ...)                                                                            \
    do {                                                                                           \
        Status fail_code_ = (code);                                                                \
        status_fail(__FILE__, __LINE__, fail_code_, __VA_ARGS__);                                  \
        return fail_code_;                                                                         \
    } while (0)

// TRY(call) returns from the calling function when the call fails.
#define TRY(call)                                                                                  \
    do {                                                                                           \
        Status try_status_ = (call);                                                               \
        if (__builtin_expect(try_status_ != STATUS_OK, 0)) {                                       \
            status_trace(__FILE__, __LINE__, try_status_, #call);                                  \
            return try_status_;                                                                    \
        }                                                                                          \
    } while (0)

// For functions with clean-up: a local `Status status = STATUS_OK;` and one label.
#define TRY_GOTO(call, label)                                                                      \
    do {                                                                                           \
        status = (call);                                                                           \
        if (__builtin_expect(status != STATUS_OK, 0)) {                                            \
            status_trace(__FILE__, __LINE__, status, #call);                                       \
            goto label;                                                                            \
        }                                                                                          \
    } while (0)

#define FAIL_GOTO(label, code, ...)                                                                \
    do {                                                                                           \
        status = status_fail(__FILE__, __LINE__, (code), __VA_ARGS__);                             \
        goto label;                                                                                \
    } while (0)

// An invariant of the program itself (never of input). Stays in release builds.
#define INVARIANT(condition)                                                                       \
    do {                                                                                           \
        if (__builtin_expect(!(condition), 0))                                                     \
            FAIL(STATUS_INTERNAL, "invariant broken: %s", #condition);                             \
    } while (0)

#endif
