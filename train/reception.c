// Guests at a listening socket (train/reception.h).
#include "train/reception.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include "base/clock.h"
#include "base/log.h"

enum { WATCHED_MAX = 4096 };

void reception_open(Reception *reception) {
    for (int i = 0; i < RECEPTION_GUESTS; i++) reception->guests[i].fd = -1;
}

__attribute__((format(printf, 3, 4))) static void report(Reception *reception, const Guest *guest,
                                                         const char *format, ...) {
    char text[128];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    LogLevel level = reception_report_level(&reception->reports);
    log_line(level, "%s: a connection from %s was closed: %s%s", reception->name, guest->peer, text,
             reception->reports == RECEPTION_REPORTS ? "; others like it are not reported" : "");
}

static void send_away(Guest *guest) {
    net_close(guest->fd);
    guest->fd = -1;
}

void reception_close(Reception *reception) {
    for (int i = 0; i < RECEPTION_GUESTS; i++) send_away(&reception->guests[i]);
}

// A free place; if there is none, that of whoever has been silent for the longest time.
static Guest *find_place(Reception *reception) {
    Guest *oldest = &reception->guests[0];
    for (int i = 0; i < RECEPTION_GUESTS; i++) {
        Guest *guest = &reception->guests[i];
        if (guest->fd < 0) return guest;
        if (guest->deadline < oldest->deadline) oldest = guest;
    }
    report(reception, oldest, "too many others have not said who they are");
    send_away(oldest);
    return oldest;
}

static Status let_in(Reception *reception) {
    for (int i = 0; i < RECEPTION_GUESTS; i++) { // the rest next time: a flood must not hold us
        int fd;
        char peer[NET_NAME_MAX];
        TRY(net_accept(reception->listener, 0, &fd, peer));
        if (fd < 0) return STATUS_OK;
        Guest *guest = find_place(reception);
        *guest = (Guest){.fd = fd, .deadline = clock_seconds() + reception->patience_seconds};
        memcpy(guest->peer, peer, sizeof guest->peer);
    }
    return STATUS_OK;
}

static void listen_to(Reception *reception, Guest *guest) {
    bool gone = false;
    const char *why = "";
    guest->received += net_recv_some(guest->fd, guest->message + guest->received,
                                     reception->message_bytes - guest->received, &gone, &why);
    size_t known = guest->received < RECEPTION_MAGIC ? guest->received : RECEPTION_MAGIC;
    if (memcmp(guest->message, reception->magic, known) != 0) {
        report(reception, guest, "it does not speak our protocol");
        send_away(guest);
    } else if (guest->received == reception->message_bytes) {
        reception->arrived(reception->context, guest);
        send_away(guest);
    } else if (gone) {
        log_debug("%s: a connection from %s ended early: %s", reception->name, guest->peer, why);
        send_away(guest);
    } else if (clock_seconds() >= guest->deadline) {
        report(reception, guest, "%zu of %zu bytes after %.0f s", guest->received,
               reception->message_bytes, reception->patience_seconds);
        send_away(guest);
    }
}

Status reception_serve(Reception *reception, const int *watched, int num_watched, double deadline) {
    static struct pollfd polls[1 + RECEPTION_GUESTS + WATCHED_MAX]; // one thread joins
    nfds_t count = 0;
    polls[count++] = (struct pollfd){.fd = reception->listener, .events = POLLIN};
    for (int i = 0; i < RECEPTION_GUESTS; i++) {
        Guest *guest = &reception->guests[i];
        if (guest->fd < 0) continue;
        polls[count++] = (struct pollfd){.fd = guest->fd, .events = POLLIN};
        if (guest->deadline < deadline) deadline = guest->deadline;
    }
    for (int i = 0; i < num_watched && i < WATCHED_MAX; i++)
        if (watched[i] >= 0) polls[count++] = (struct pollfd){.fd = watched[i], .events = POLLIN};
    (void)poll(polls, count, net_poll_ms(deadline));
    TRY(let_in(reception));
    for (int i = 0; i < RECEPTION_GUESTS; i++)
        if (reception->guests[i].fd >= 0) listen_to(reception, &reception->guests[i]);
    return STATUS_OK;
}
