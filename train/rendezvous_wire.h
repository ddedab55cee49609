// What the files of the rendezvous share:
//   rendezvous.c        joining: rank 0's side and the others'
//   rendezvous_star.c   the small collectives over the star
//   rendezvous_mesh.c   a connection of each rank with each
//   rendezvous_recipe.c which settings differ
// and the messages as they go over the wire, in the byte order of the machine (`protocol` shows
// when the other has another one).
#ifndef TRAIN_RENDEZVOUS_WIRE_H
#define TRAIN_RENDEZVOUS_WIRE_H

#include <stdint.h>
#include "base/net.h"
#include "train/reception.h"
#include "train/rendezvous.h"

#define HELLO_MAGIC   "d2m-join"
#define VERDICT_MAGIC "d2m-told"
#define MESH_MAGIC    "d2m-mesh"

enum {
    PROTOCOL = 2,
    NONCE_BYTES = 16,
    HOST_TEXT = 64,
    RECIPE_TEXT = 12288, // longer recipes are compared by their hashes alone
    VERDICT_TEXT = 2048,
    PATIENCE_SECONDS = 5,     // for a guest's message, and for telling a rank the verdict
    ANSWER_EXTRA_SECONDS = 5, // rank 0 finds out first what is missing, and tells
};

// First words of a rank.
typedef struct Hello {
    char magic[RECEPTION_MAGIC];
    uint32_t protocol;
    int32_t rank, world, pid, mesh_port;
    char host[HOST_TEXT];
    char job[RENDEZVOUS_ID_MAX], recipe[RENDEZVOUS_ID_MAX], build[RENDEZVOUS_ID_MAX];
    char recipe_text[RECIPE_TEXT];
} Hello;

// Rank 0's answer, to hello and to every call over the star.
typedef struct Verdict {
    char magic[RECEPTION_MAGIC];
    uint32_t protocol;
    int32_t code;   // a Status
    int32_t shared; // rank 0 fails, too, and reports it
    char text[VERDICT_TEXT];
    char nonce[NONCE_BYTES];
} Verdict;

// After a good verdict on hello: one for each rank.
typedef struct Place {
    char host[NET_HOST_MAX]; // numeric; "": as rank 0's
    int32_t port;            // of its mesh listener
    char name[NET_NAME_MAX]; // "node3, pid 77"
} Place;

typedef struct MeshHello {
    char magic[RECEPTION_MAGIC];
    char nonce[NONCE_BYTES];
    int32_t from, to;
} MeshHello;

_Static_assert(sizeof(Hello) <= RECEPTION_MESSAGE_MAX, "a guest's message holds a Hello");

struct Rendezvous {
    int rank, world, master_port;
    char master_host[NET_HOST_MAX];
    double timeout_seconds;
    char nonce[NONCE_BYTES];
    Place *places; // (world)
    int *star;     // (world): rank 0 has one socket to each, the others only star[0]; else -1
    int mesh_listener;
    int *mesh;        // (world) or NULL
    int mesh_refused; // connections to it that were none of ours
    int64_t calls;    // over the star
};

// A text from the wire: ended, and without anything that a terminal might obey.
void rendezvous_clean_text(char *text, size_t room);
// "train.steps = 5 (rank 0: 9), ..." for what `other` has instead of `own`; "" where they cannot be
// compared line by line.
void rendezvous_recipe_differences(const char *other, const char *own, char *text, size_t room);
// "1, 3, 4 and 9 more"
void rendezvous_list(const bool *listed, int world, char *text, size_t room);
void rendezvous_make_verdict(Verdict *verdict, Status code, const char *text);
// Receives one: its code and text as this thread's failure.
Status rendezvous_recv_verdict(int fd, const char *peer, Verdict *verdict,
                               double deadline) NODISCARD;

// Where to listen: a master address of this machine alone needs no port that others can reach.
const char *rendezvous_listen_host(const Rendezvous *rendezvous);
// Opens the listener that Hello.mesh_port tells of.
Status rendezvous_mesh_listen(Rendezvous *rendezvous, int *port) NODISCARD;
// Once every rank knows the places: connects with all.
Status rendezvous_mesh_connect(Rendezvous *rendezvous, double deadline) NODISCARD;

#endif
