// See base/net_peers.h. A look costs one system call per peer.
#include "base/net_peers.h"

#include <pthread.h>
#include <stdlib.h>
#include "base/net.h"

typedef struct Peer {
    int fd; // -1: none
    bool left;
    char name[NET_NAME_MAX];
} Peer;

struct NetPeers {
    pthread_mutex_t mutex;
    int count;
    const char *lost; // of a peer
    Peer peers[];
};

Status net_peers_open(int ranks, const int *sockets, const char *const *names, NetPeers **out) {
    NetPeers *p = *out = calloc(1, sizeof *p + (size_t)ranks * sizeof p->peers[0]);
    if (!p) FAIL(STATUS_INTERNAL, "out of memory for %d peers", ranks);
    pthread_mutex_init(&p->mutex, NULL);
    p->count = ranks;
    for (int i = 0; i < ranks; i++) {
        p->peers[i].fd = sockets[i];
        net_rank_name(i, names ? names[i] : NULL, p->peers[i].name);
    }
    return STATUS_OK;
}

static void look_at(NetPeers *p, Peer *peer) {
    char byte;
    bool gone = false;
    const char *why;
    if (net_recv_some(peer->fd, &byte, 1, &gone, &why) == 0 && !gone) return;
    if (gone) p->lost = peer->name;
    peer->left = true;
}

const char *net_peers_lost(NetPeers *p) {
    if (!p) return NULL;
    pthread_mutex_lock(&p->mutex);
    for (int i = 0; i < p->count && !p->lost; i++)
        if (p->peers[i].fd >= 0 && !p->peers[i].left) look_at(p, &p->peers[i]);
    const char *lost = p->lost;
    pthread_mutex_unlock(&p->mutex);
    return lost;
}

void net_peers_give_back(NetPeers *p) {
    if (!p) return;
    pthread_mutex_destroy(&p->mutex);
    free(p);
}

void net_peers_close(NetPeers *p, bool farewell) {
    const char byte = 1;
    bool gone = false;
    const char *why;
    if (!p) return;
    for (int i = 0; i < p->count; i++) {
        if (p->peers[i].fd < 0) continue;
        if (farewell) (void)net_send_some(p->peers[i].fd, &byte, 1, &gone, &why);
        net_close(p->peers[i].fd);
    }
    net_peers_give_back(p);
}
