// Sockets with deadlines.
//
// All sockets are non-blocking: a call is tried first and poll(2) waits only when it would block,
// so that a deadline bounds every wait and data that is there costs one system call. Deadlines are
// points in monotonic time; poll's milliseconds are rounded up so that a wait never spins.
#include "base/net.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include "base/clock.h"

enum {
    BACKLOG = 1024,      // a whole cluster connects at once
    POLL_MS_MAX = 60000, // a far deadline is reached in several waits
    FIRST_RETRY_MS = 20,
    LAST_RETRY_MS = 500,
    PORT_TEXT = 8,
};

// --- Waiting -------------------------------------------------------------------------------------

int net_poll_ms(double deadline) {
    double ms = ceil((deadline - clock_seconds()) * 1e3);
    return !(ms > 0) ? 0 : ms > POLL_MS_MAX ? POLL_MS_MAX : (int)ms;
}

bool net_wait(int fd, bool to_write, double deadline) {
    for (;;) {
        struct pollfd entry = {.fd = fd, .events = to_write ? POLLOUT : POLLIN};
        int ms = net_poll_ms(deadline);
        int ready = poll(&entry, 1, ms);
        if (ready > 0) return true;
        if (ready < 0 && errno != EINTR) return true; // the call that follows says what is wrong
        if (ready == 0 && clock_seconds() >= deadline) return false;
    }
}

static void pause_ms(int64_t ms) {
    struct timespec rest = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    while (nanosleep(&rest, &rest) != 0 && errno == EINTR) continue;
}

// --- Addresses -----------------------------------------------------------------------------------

typedef int (*NameCall)(int, struct sockaddr *, socklen_t *);

static void host_of(int fd, NameCall call, char host[NET_HOST_MAX]) {
    static const char mapped[] = "::ffff:"; // how a socket for both families shows IPv4
    struct sockaddr_storage address;
    socklen_t length = sizeof address;
    char text[NET_HOST_MAX];
    snprintf(host, NET_HOST_MAX, "?");
    if (call(fd, (struct sockaddr *)&address, &length) != 0) return;
    if (getnameinfo((struct sockaddr *)&address, length, text, sizeof text, NULL, 0,
                    NI_NUMERICHOST) != 0)
        return;
    bool is_mapped = strncmp(text, mapped, sizeof mapped - 1) == 0;
    snprintf(host, NET_HOST_MAX, "%s", is_mapped ? text + sizeof mapped - 1 : text);
}

void net_peer_host(int fd, char host[NET_HOST_MAX]) {
    host_of(fd, getpeername, host);
}

void net_own_host(int fd, char host[NET_HOST_MAX]) {
    host_of(fd, getsockname, host);
}

static int port_of(int fd) {
    struct sockaddr_storage address;
    socklen_t length = sizeof address;
    if (getsockname(fd, (struct sockaddr *)&address, &length) != 0) return 0;
    if (address.ss_family == AF_INET6)
        return ntohs(((const struct sockaddr_in6 *)&address)->sin6_port);
    return ntohs(((const struct sockaddr_in *)&address)->sin_port);
}

// `flags` of getaddrinfo; free *out with freeaddrinfo.
static Status resolve(const char *host, int port, int flags, struct addrinfo **out) {
    char service[PORT_TEXT];
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = flags | AI_NUMERICSERV};
    if (port < 0 || port > UINT16_MAX)
        FAIL(STATUS_USAGE, "port %d: expected 1 to %d", port, UINT16_MAX);
    snprintf(service, sizeof service, "%d", port);
    int error = getaddrinfo(host, service, &hints, out);
    if (error)
        FAIL(STATUS_USAGE,
             "host %s: cannot be resolved: %s; give a host name or address that this "
             "machine knows",
             host ? host : "(any)", error == EAI_SYSTEM ? strerror(errno) : gai_strerror(error));
    return STATUS_OK;
}

static int new_socket(int family) {
    return socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
}

static void set_options(int fd) {
    int on = 1;
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    // A machine that lost its power says nothing more; keep-alive finds it in a minute while nobody
    // sends.
    const int idle = 30, pause = 10, tries = 3; // seconds
    (void)setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &pause, sizeof pause);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &tries, sizeof tries);
}

// --- Listening -----------------------------------------------------------------------------------

static int try_listen(const struct addrinfo *address) {
    int on = 1, off = 0;
    int fd = new_socket(address->ai_family);
    if (fd < 0) return -1;
    (void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on); // past TIME_WAIT
    if (address->ai_family == AF_INET6)
        (void)setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    if (bind(fd, address->ai_addr, address->ai_addrlen) == 0 && listen(fd, BACKLOG) == 0) return fd;
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

static Status fail_listen(const char *host, int port, int error) {
    if (error == EADDRINUSE)
        FAIL(STATUS_USAGE,
             "port %d on %s is taken by another process; choose another, or find its holder with "
             "`ss -ltnp`",
             port, host ? host : "this machine");
    FAIL(STATUS_USAGE, "cannot listen on %s port %d: %s", host ? host : "this machine", port,
         strerror(error));
}

Status net_listen(const char *host, int port, int *fd, int *bound_port) {
    struct addrinfo *addresses;
    *fd = -1;
    TRY(resolve(host, port, AI_PASSIVE, &addresses));
    // The socket for IPv6 serves both families; a machine without IPv6 has only the other one.
    int error = 0;
    for (int want6 = 1; want6 >= 0 && *fd < 0 && error != EADDRINUSE; want6--) {
        for (const struct addrinfo *a = addresses; a && *fd < 0; a = a->ai_next) {
            if ((a->ai_family == AF_INET6) != want6) continue;
            *fd = try_listen(a);
            if (*fd < 0) error = errno;
        }
    }
    freeaddrinfo(addresses);
    if (*fd < 0) return fail_listen(host, port, error);
    if (bound_port) *bound_port = port_of(*fd);
    return STATUS_OK;
}

Status net_accept(int listener, double deadline, int *fd, char peer[NET_NAME_MAX]) {
    char host[NET_HOST_MAX];
    for (;;) {
        *fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (*fd >= 0) break;
        if (errno == EINTR || errno == ECONNABORTED) continue; // gone before it was picked up
        if (errno != EAGAIN && errno != EWOULDBLOCK)
            FAIL(STATUS_COMMUNICATION, "cannot accept a connection: %s", strerror(errno));
        if (!net_wait(listener, false, deadline)) return STATUS_OK;
    }
    set_options(*fd);
    net_peer_host(*fd, host);
    snprintf(peer, NET_NAME_MAX, "%.*s", NET_NAME_MAX - 1, host);
    return STATUS_OK;
}

// --- Connecting ----------------------------------------------------------------------------------

// One attempt at one address: a descriptor, or -1 with *error.
static int try_connect(const struct addrinfo *address, double deadline, int *error) {
    socklen_t length = sizeof *error;
    int fd = new_socket(address->ai_family);
    *error = errno;
    if (fd < 0) return -1;
    *error = 0;
    if (connect(fd, address->ai_addr, address->ai_addrlen) != 0) {
        *error = errno;
        if (*error == EINPROGRESS || *error == EINTR) {
            *error = ETIMEDOUT;
            if (net_wait(fd, true, deadline))
                (void)getsockopt(fd, SOL_SOCKET, SO_ERROR, error, &length);
        }
    }
    if (*error == 0) return fd;
    close(fd);
    return -1;
}

// What may pass by itself: nobody listens yet, a network that comes up, a full queue.
static bool may_pass(int error) {
    return error == ECONNREFUSED || error == ECONNRESET || error == ETIMEDOUT ||
           error == EHOSTUNREACH || error == ENETUNREACH || error == EAGAIN || error == ENETDOWN ||
           error == EHOSTDOWN || error == ECONNABORTED;
}

Status net_connect(const char *name, const char *host, int port, double deadline, int *fd) {
    struct addrinfo *addresses;
    int error = ETIMEDOUT, pause = FIRST_RETRY_MS;
    double start = clock_seconds();
    *fd = -1;
    TRY(resolve(host, port, 0, &addresses));
    for (;;) {
        for (const struct addrinfo *a = addresses; a && *fd < 0; a = a->ai_next)
            *fd = try_connect(a, deadline, &error);
        if (*fd >= 0 || !may_pass(error) || clock_seconds() >= deadline) break;
        int left = net_poll_ms(deadline);
        pause_ms(pause < left ? pause : left);
        pause = pause * 2 < LAST_RETRY_MS ? pause * 2 : LAST_RETRY_MS;
    }
    freeaddrinfo(addresses);
    if (*fd < 0)
        FAIL(STATUS_COMMUNICATION,
             "%s at %s port %d cannot be reached (tried for %.1f s): %s; is it running there, and "
             "does a firewall stand between?",
             name, host, port, clock_seconds() - start, strerror(error));
    set_options(*fd);
    return STATUS_OK;
}

// --- Moving bytes --------------------------------------------------------------------------------

static bool would_block(int error) {
    return error == EAGAIN || error == EWOULDBLOCK;
}

size_t net_send_some(int fd, const void *data, size_t bytes, bool *gone, const char **why) {
    for (;;) {
        ssize_t moved = send(fd, data, bytes, MSG_NOSIGNAL);
        if (moved >= 0) return (size_t)moved;
        if (errno == EINTR) continue;
        if (would_block(errno)) return 0;
        *gone = true;
        *why = errno == EPIPE ? "the connection is closed" : strerrordesc_np(errno);
        return 0;
    }
}

size_t net_recv_some(int fd, void *out, size_t bytes, bool *gone, const char **why) {
    for (;;) {
        ssize_t moved = recv(fd, out, bytes, 0);
        if (moved > 0) return (size_t)moved;
        if (moved == 0) {
            if (bytes == 0) return 0;
            *gone = true;
            *why = "the connection is closed";
            return 0;
        }
        if (errno == EINTR) continue;
        if (would_block(errno)) return 0;
        *gone = true;
        *why = strerrordesc_np(errno);
        return 0;
    }
}

Status net_send(int fd, const char *peer, const void *data, size_t bytes, double deadline) {
    size_t done = 0;
    bool gone = false;
    const char *why = "";
    while (done < bytes) {
        size_t moved = net_send_some(fd, (const char *)data + done, bytes - done, &gone, &why);
        done += moved;
        if (gone)
            FAIL(STATUS_COMMUNICATION, "%s: sent %zu of %zu bytes, then: %s", peer, done, bytes,
                 why);
        if (moved == 0 && !net_wait(fd, true, deadline))
            FAIL(STATUS_COMMUNICATION, "%s: took %zu of %zu bytes by the deadline", peer, done,
                 bytes);
    }
    return STATUS_OK;
}

Status net_recv(int fd, const char *peer, void *out, size_t bytes, double deadline) {
    size_t done = 0;
    bool gone = false;
    const char *why = "";
    while (done < bytes) {
        size_t moved = net_recv_some(fd, (char *)out + done, bytes - done, &gone, &why);
        done += moved;
        if (gone)
            FAIL(STATUS_COMMUNICATION, "%s: %zu of %zu bytes came, then: %s", peer, done, bytes,
                 why);
        if (moved == 0 && !net_wait(fd, false, deadline))
            FAIL(STATUS_COMMUNICATION, "%s: %zu of %zu bytes came by the deadline", peer, done,
                 bytes);
    }
    return STATUS_OK;
}

void net_rank_name(int rank, const char *who, char name[NET_NAME_MAX]) {
    if (who)
        snprintf(name, NET_NAME_MAX, "rank %d (%.130s)", rank, who);
    else
        snprintf(name, NET_NAME_MAX, "rank %d", rank);
}

void net_close(int fd) {
    if (fd >= 0) close(fd);
}
