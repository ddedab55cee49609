// Durations use the monotonic clock, so that a jump of the wall clock never matters.
#ifndef BASE_CLOCK_H
#define BASE_CLOCK_H

#include <stddef.h>
#include <stdint.h>

int64_t clock_monotonic_ns(void);
double clock_seconds(void); // monotonic, since an arbitrary start
double clock_wall(void);    // Unix time in seconds
enum { CLOCK_TEXT_SIZE = 32 };
void clock_iso8601(char text[CLOCK_TEXT_SIZE]); // "2026-11-24T01:41:28Z"

#endif
