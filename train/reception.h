// A listening socket in a place where anybody may knock: takes connections, reads one message of
// fixed size from each, and asks its owner what to do with the guest. Whoever says something else,
// or nothing in time, is sent away; however many do, the others are not held up.
#ifndef TRAIN_RECEPTION_H
#define TRAIN_RECEPTION_H

#include <poll.h>
#include "base/log.h"
#include "base/net.h"

enum {
    RECEPTION_GUESTS = 64,
    RECEPTION_MESSAGE_MAX = 16384,
    RECEPTION_MAGIC = 8,
    RECEPTION_REPORTS = 10
};

typedef struct Guest {
    int fd; // -1: a free place
    char peer[NET_NAME_MAX];
    char message[RECEPTION_MESSAGE_MAX];
    size_t received;
    double deadline;
} Guest;

typedef struct Reception {
    int listener;                // owned by whoever opened it
    const char *name;            // "rendezvous": for the log
    char magic[RECEPTION_MAGIC]; // what a message begins with
    size_t message_bytes;
    double patience_seconds; // for one guest's message
    // Called with a complete message; takes the socket over by setting guest->fd to -1.
    void (*arrived)(void *context, Guest *guest);
    void *context;
    int reports; // of strangers, so far
    Guest guests[RECEPTION_GUESTS];
} Reception;

// Strangers are reported, but a flood of them must not fill the log: the level of the next report,
// which is counted.
static inline LogLevel reception_report_level(int *reports) {
    return ++*reports > RECEPTION_REPORTS ? LOG_DEBUG : LOG_WARN;
}

void reception_open(Reception *reception); // marks all places free
void reception_close(Reception *reception);
// Waits until `deadline` or the first event, and handles what there is. `watched` (may be NULL) are
// further sockets whose readability ends the wait.
Status reception_serve(Reception *reception, const int *watched, int num_watched,
                       double deadline) NODISCARD;

#endif
