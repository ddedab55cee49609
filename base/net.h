// TCP between the processes of a run: the only door to a socket.
//
// Every wait has a deadline, a point of clock_seconds(); every failure is STATUS_COMMUNICATION
// (STATUS_USAGE where the address itself is wrong) and names the peer and what was tried. Sockets
// are non-blocking, without Nagle's delay and closed by exec; a peer that is gone never raises
// SIGPIPE.
#ifndef BASE_NET_H
#define BASE_NET_H

#include <stdbool.h>
#include <stddef.h>
#include "base/status.h"

enum { NET_NAME_MAX = 160, NET_HOST_MAX = 256 };

// A listening socket on `host` (NULL: all addresses of this machine). Port 0 lets the system
// choose; *bound_port (may be NULL) is the one it took. A port that is taken is STATUS_USAGE.
Status net_listen(const char *host, int port, int *fd, int *bound_port) NODISCARD;

// Connects. While nobody listens there or the way is not up yet, tries again until the deadline:
// the other side may start later. `name` says in messages who is meant ("rank 0's rendezvous").
Status net_connect(const char *name, const char *host, int port, double deadline,
                   int *fd) NODISCARD;

// The next connection, or *fd = -1 when none came by the deadline. `peer` receives its address.
Status net_accept(int listener, double deadline, int *fd, char peer[NET_NAME_MAX]) NODISCARD;

// All of it, by the deadline.
Status net_send(int fd, const char *peer, const void *data, size_t bytes,
                double deadline) NODISCARD;
Status net_recv(int fd, const char *peer, void *out, size_t bytes, double deadline) NODISCARD;

// What can be moved now, perhaps nothing. *gone becomes true: the peer has closed or reset it, with
// the reason in `why` (a string that stays). For loops over many sockets.
size_t net_send_some(int fd, const void *data, size_t bytes, bool *gone, const char **why);
size_t net_recv_some(int fd, void *out, size_t bytes, bool *gone, const char **why);

// Waits until the socket can be read (or written), the peer has gone, or the deadline: then false.
bool net_wait(int fd, bool to_write, double deadline);

// Milliseconds for poll(2) until the deadline, rounded up; 0 when it has passed.
int net_poll_ms(double deadline);

// The numeric address of the other / this side, without port; "?" when it is not known.
void net_peer_host(int fd, char host[NET_HOST_MAX]);
void net_own_host(int fd, char host[NET_HOST_MAX]);

// "rank 3 (node3, pid 77)"; `who` may be NULL.
void net_rank_name(int rank, const char *who, char name[NET_NAME_MAX]);

void net_close(int fd); // -1 is nothing

#endif
