// Requests to stop: SIGTERM, SIGUSR1 (Slurm's --signal) and SIGINT ask the run to finish its step,
// save and exit with STATUS_PREEMPTED. A second one ends the process at once with the same code; in
// a rank that train/supervisor.h has started, one that comes STOP_ECHO_SECONDS later. Meanwhile
// output that nobody reads any more is lost and ends nothing (SIGPIPE).
//
// A request may come before the run is there to hear it: it is kept, and the run stops before its
// first step, in the same orderly way.
#ifndef TRAIN_STOP_SIGNAL_H
#define TRAIN_STOP_SIGNAL_H

#include <stdbool.h>
#include "base/status.h"

enum { STOP_ECHO_SECONDS = 2 }; // signals to several processes count as one request for so long

// From here on requests wait until stop_signal_install. (In ranks, that is what they do from before
// the program begins: train/supervisor.c.)
void stop_signal_hold(void);
// Forgets earlier requests, except those that wait. `speaks`: of several ranks this is the one that
// says that it has heard. Within another pair of install and restore both do nothing.
void stop_signal_install(bool speaks);
void stop_signal_restore(void); // back to the handlers before
bool stop_requested(void);
// What is left to do when a second request ends the process: `say` is called with that signal's
// name, in a thread of its own, while the others hang or go on, and has LAST_WORDS_SECONDS for it.
// Within install and restore, once at a time.
typedef void (*LastWords)(void *context, const char *signal);
Status stop_signal_last_words(LastWords say, void *context) NODISCARD;
void stop_signal_no_last_words(void); // harmless where there were none
const char *stop_signal_name_of(int number);
const char *stop_signal_name(void); // "SIGTERM", ...; "" when none came

#endif
