// A thread that ends a rank which makes no progress.
//
// A collective that never finishes, a file system that never answers, a device that never returns:
// the thread that waits for them cannot help itself. This one looks at how long ago the rank last
// told of progress (watchdog_beat), or started another collective. When that is too long, or the
// communicator knows that a peer is gone, it logs step, phase and last collective, aborts the
// communicator, gives the rank some seconds to end in an orderly way, and ends the process with
// STATUS_COMMUNICATION, for the scheduler or the parent to start the run again.
#ifndef TRAIN_WATCHDOG_H
#define TRAIN_WATCHDOG_H

#include <stdint.h>
#include "base/status.h"
#include "model/communicator.h"

typedef struct Watchdog Watchdog;

// `communicator` may be NULL; it must outlive the watchdog.
Status watchdog_start(int rank, double seconds, Communicator *communicator,
                      Watchdog **out) NODISCARD;
// From here on, in any thread: the rank is at `step` and begins `phase` (a string that stays).
// NULL is nothing.
void watchdog_beat(Watchdog *watchdog, int64_t step, const char *phase);
void watchdog_allow(Watchdog *watchdog, double seconds); // the limit from now on
// What to write down before the process is ended, from a thread of its own that has a few seconds.
typedef void (*WatchdogWords)(void *context, const char *why);
void watchdog_last_words(Watchdog *watchdog, WatchdogWords say, void *context);
// Puts step and phase in front of what STATUS_COMMUNICATION says.
Status watchdog_place(Watchdog *watchdog, Status status);
void watchdog_alone(Watchdog *watchdog); // other ranks are needed no more, and may leave
void watchdog_stop(Watchdog *watchdog);  // NULL is nothing

#endif
