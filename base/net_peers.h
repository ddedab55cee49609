// Whether the processes at the other ends of connections are still there.
//
// For ranks that talk by other means (NCCL) and would otherwise learn of a dead peer only by
// waiting for it. Who leaves in good order says so by one byte; a connection that closes without it
// belonged to a process that died, and so did one whose machine answers no keep-alive any more
// (about a minute).
#ifndef BASE_NET_PEERS_H
#define BASE_NET_PEERS_H

#include <stdbool.h>
#include "base/status.h"

typedef struct NetPeers NetPeers;

// Takes over the (ranks) connected sockets; -1: none. names (ranks) or NULL: who they are, as
// net_rank_name takes it.
Status net_peers_open(int ranks, const int *sockets, const char *const *names,
                      NetPeers **out) NODISCARD;

// The name of a peer that is gone without having said so, or NULL; the same answer from then on.
// From any thread, without waiting; NULL has no peers. The string lives as long as `peers`.
const char *net_peers_lost(NetPeers *peers);

void net_peers_give_back(NetPeers *peers); // the sockets are the caller's again; NULL is nothing
// `farewell`: this process leaves in good order. NULL is nothing.
void net_peers_close(NetPeers *peers, bool farewell);

#endif
