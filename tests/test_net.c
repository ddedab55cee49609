// Sockets with deadlines: what arrives, what does not in time, and what is said about it.
#include "tests/ranks.h"

#include <sys/socket.h>
#include "base/net_peers.h"

// A connected pair over loopback.
static void connect_pair(int pair[2]) {
    int listener, port;
    char peer[NET_NAME_MAX];
    ck_assert_ok(net_listen("127.0.0.1", 0, &listener, &port));
    ck_assert_int_gt(port, 0);
    ck_assert_ok(net_connect("peer", "127.0.0.1", port, clock_seconds() + 5, &pair[0]));
    ck_assert_ok(net_accept(listener, clock_seconds() + 5, &pair[1], peer));
    ck_assert_str_eq(peer, "127.0.0.1");
    net_close(listener);
}

START_TEST(nobody_comes_until_the_deadline) {
    int listener, fd, port;
    char peer[NET_NAME_MAX];
    ck_assert_ok(net_listen(NULL, 0, &listener, &port));
    double start = clock_seconds();
    ck_assert_ok(net_accept(listener, start + 0.3, &fd, peer));
    ck_assert_int_eq(fd, -1);
    double seconds = clock_seconds() - start;
    ck_assert_double_ge(seconds, 0.29);
    ck_assert_double_lt(seconds, 2);
    ck_assert_ok(net_accept(listener, 0, &fd, peer)); // a deadline of long ago
    ck_assert_int_eq(fd, -1);
    net_close(listener);
}
END_TEST

START_TEST(silence_and_fullness_end_at_the_deadline) {
    static char data[32 << 20];
    int pair[2];
    connect_pair(pair);
    double start = clock_seconds();
    ck_assert_ok(net_send(pair[1], "peer", "abc", 3, start + 5));
    ck_assert_fails(net_recv(pair[0], "the peer", data, 5, start + 0.3), STATUS_COMMUNICATION,
                    "the peer: 3 of 5 bytes came by the deadline");
    ck_assert_fails(net_send(pair[0], "the peer", data, sizeof data, clock_seconds() + 0.3),
                    STATUS_COMMUNICATION, "of 33554432 bytes by the deadline");
    ck_assert_double_lt(clock_seconds() - start, 3);
    net_close(pair[0]);
    net_close(pair[1]);
}
END_TEST

START_TEST(a_peer_that_left_is_said_and_kills_nobody) {
    static char data[8 << 20];
    int pair[2];
    connect_pair(pair);
    ck_assert_ok(net_send(pair[1], "peer", "last", 4, clock_seconds() + 5));
    net_close(pair[1]);
    ck_assert_ok(net_recv(pair[0], "peer", data, 4, clock_seconds() + 5)); // what it said before
    ck_assert_fails(net_recv(pair[0], "the peer", data, 1, clock_seconds() + 5),
                    STATUS_COMMUNICATION, "the peer: 0 of 1 bytes came, then: the connection is");
    // No SIGPIPE, which would end this process.
    ck_assert_fails(net_send(pair[0], "the peer", data, sizeof data, clock_seconds() + 5),
                    STATUS_COMMUNICATION, "the peer: sent");
    net_close(pair[0]);
}
END_TEST

// A large message through a small buffer, against signals and a slow reader.
static void ignore(int number) {
    (void)number;
}

START_TEST(large_messages_arrive_whole) {
    enum { BYTES = 3000001 };
    static uint8_t out[BYTES], in[BYTES];
    int pair[2];
    struct sigaction action = {.sa_handler = ignore}; // without SA_RESTART
    for (int i = 0; i < BYTES; i++) out[i] = (uint8_t)(i * 7 + i / 256);
    connect_pair(pair);
    sigaction(SIGUSR1, &action, NULL);
    pid_t reader = getpid(), writer = fork();
    if (writer == 0) {
        for (int done = 0; done < BYTES; done += 100000) {
            int some = BYTES - done < 100000 ? BYTES - done : 100000;
            kill(reader, SIGUSR1);
            usleep(2000);
            if (net_send(pair[1], "reader", out + done, (size_t)some, clock_seconds() + 10) !=
                STATUS_OK)
                _exit(1);
        }
        _exit(0);
    }
    ck_assert_ok(net_recv(pair[0], "writer", in, BYTES, clock_seconds() + 20));
    ck_assert_mem_eq(in, out, BYTES);
    int how;
    while (waitpid(writer, &how, 0) < 0) ck_assert_int_eq(errno, EINTR);
    ck_assert_int_eq(how, 0);
    net_close(pair[0]);
    net_close(pair[1]);
}
END_TEST

// Three peers: one lives, one says farewell, one dies.
START_TEST(a_dead_peer_is_told_from_one_that_left) {
    static const char *const names[] = {"here", "a, pid 1", NULL, "c, pid 3"};
    int pairs[3][2], own[4] = {-1};
    const char *lost = NULL;
    NetPeers *peers, *leaving;
    for (int i = 0; i < 3; i++) {
        connect_pair(pairs[i]);
        own[i + 1] = pairs[i][0];
    }
    ck_assert_ok(net_peers_open(4, own, names, &peers));
    ck_assert_ok(net_peers_open(1, &pairs[1][1], NULL, &leaving));
    ck_assert_ptr_null(net_peers_lost(peers));
    net_peers_close(leaving, true);
    usleep(50000);
    ck_assert_ptr_null(net_peers_lost(peers));
    net_close(pairs[2][1]);
    const double deadline = clock_seconds() + 5;
    while (!(lost = net_peers_lost(peers)) && clock_seconds() < deadline) usleep(1000);
    ck_assert_ptr_nonnull(lost);
    ck_assert_str_eq(lost, "rank 3 (c, pid 3)");
    net_close(pairs[0][1]);
    usleep(50000);
    ck_assert_ptr_eq(net_peers_lost(peers), lost); // the first to go is the one to look at
    net_peers_close(peers, false);
    ck_assert_ptr_null(net_peers_lost(NULL));
}
END_TEST

static Status listen_late(int index, void *context) {
    int listener, fd;
    char peer[NET_NAME_MAX];
    (void)index;
    usleep(600000);
    TRY(net_listen("127.0.0.1", *(const int *)context, &listener, NULL));
    TRY(net_accept(listener, clock_seconds() + 5, &fd, peer));
    EXPECT(fd >= 0, "nobody came");
    return STATUS_OK;
}

START_TEST(whoever_listens_later_is_found) {
    int listener, port, fd;
    ck_assert_ok(net_listen("127.0.0.1", 0, &listener, &port));
    net_close(listener);
    processes_start(1, listen_late, &port);
    ck_assert_ok(net_connect("late", "127.0.0.1", port, clock_seconds() + 10, &fd));
    ranks_join(1);
    ranks_expect(0, STATUS_OK, "");
    net_close(fd);
}
END_TEST

START_TEST(wrong_addresses_are_named) {
    int fd, other, port;
    double start = clock_seconds();
    ck_assert_fails(net_connect("x", "no-such-host.invalid", 5, start + 5, &fd), STATUS_USAGE,
                    "host no-such-host.invalid: cannot be resolved");
    ck_assert_fails(net_connect("x", "127.0.0.1", 70000, start + 5, &fd), STATUS_USAGE,
                    "port 70000: expected");
    ck_assert_ok(net_listen("127.0.0.1", 0, &fd, &port));
    ck_assert_fails(net_listen("127.0.0.1", port, &other, NULL), STATUS_USAGE, "is taken");
    ck_assert_int_eq(other, -1);
    net_close(fd);
    ck_assert_fails(net_connect("the master", "127.0.0.1", port, clock_seconds() + 0.4, &fd),
                    STATUS_COMMUNICATION, "the master at 127.0.0.1 port");
    ck_assert_ptr_nonnull(strstr(status_message(), "Connection refused"));
    ck_assert_fails(net_listen("192.0.2.1", 0, &fd, NULL), STATUS_USAGE,
                    "cannot listen on 192.0.2.1"); // an address of nobody (RFC 5737)
}
END_TEST

TEST_MAIN("net", TEST(nobody_comes_until_the_deadline),
          TEST(silence_and_fullness_end_at_the_deadline),
          TEST(a_peer_that_left_is_said_and_kills_nobody), TEST(large_messages_arrive_whole),
          TEST(a_dead_peer_is_told_from_one_that_left), TEST(whoever_listens_later_is_found),
          TEST(wrong_addresses_are_named))
