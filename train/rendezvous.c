// Joining: rank 0 receives, the others come and are told (train/rendezvous.h).
//
// Rank 0 collects until every place is taken. A misfit (another world size, a rank that is there
// already) ends the wait a little later, so that others like it are named in the same message;
// recipes and builds are compared when all have come. A rank that dies while it waits leaves its
// place to whoever comes next. A rank whose connection ends before it is told anything comes again
// until its time is up.
#include "train/rendezvous.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>
#include "base/clock.h"
#include "base/log.h"
#include "train/rendezvous_wire.h"

enum { MISFITS_MAX = 64, GRACE_SECONDS = 2, AGAIN_MS = 200, ID_SHOWN = 32 };

// --- Texts ---------------------------------------------------------------------------------------

void rendezvous_clean_text(char *text, size_t room) {
    text[room - 1] = '\0';
    for (char *c = text; *c; c++)
        if (*c < ' ' || *c > '~') *c = '?';
}

static void clean_lines(char *text, size_t room) {
    text[room - 1] = '\0';
    for (char *c = text; *c; c++)
        if ((*c < ' ' && *c != '\n') || *c > '~') *c = '?';
}

void rendezvous_list(const bool *listed, int world, char *text, size_t room) {
    enum { SHOWN = 16 };
    int count = 0;
    size_t used = 0;
    text[0] = '\0';
    for (int r = 0; r < world; r++) {
        if (!listed[r] || ++count > SHOWN || used >= room) continue;
        int more = snprintf(text + used, room - used, "%s%d", used ? ", " : "", r);
        used += more > 0 ? (size_t)more : 0;
    }
    if (count > SHOWN && used < room)
        snprintf(text + used, room - used, " and %d more", count - SHOWN);
}

void rendezvous_make_verdict(Verdict *verdict, Status code, const char *text) {
    *verdict = (Verdict){.magic = VERDICT_MAGIC, .protocol = PROTOCOL, .code = (int32_t)code};
    snprintf(verdict->text, sizeof verdict->text, "%s", text);
}

Status rendezvous_recv_verdict(int fd, const char *peer, Verdict *verdict, double deadline) {
    Status status = net_recv(fd, peer, verdict, sizeof *verdict, deadline);
    if (status != STATUS_OK) {
        *verdict = (Verdict){0}; // nothing was said
        return status;
    }
    if (memcmp(verdict->magic, VERDICT_MAGIC, RECEPTION_MAGIC) != 0 ||
        verdict->protocol != PROTOCOL)
        FAIL(STATUS_USAGE,
             "%s: something answers there, but it is no rendezvous of this version of the program",
             peer);
    rendezvous_clean_text(verdict->text, sizeof verdict->text);
    if (verdict->code == STATUS_OK) return STATUS_OK;
    status = status_fail(__FILE__, __LINE__, (Status)verdict->code, "%s", verdict->text);
    if (verdict->shared) status_told();
    return status;
}

static void clean_hello(Hello *hello) {
    rendezvous_clean_text(hello->host, sizeof hello->host);
    rendezvous_clean_text(hello->job, sizeof hello->job);
    rendezvous_clean_text(hello->recipe, sizeof hello->recipe);
    rendezvous_clean_text(hello->build, sizeof hello->build);
    clean_lines(hello->recipe_text, sizeof hello->recipe_text);
}

const char *rendezvous_listen_host(const Rendezvous *r) {
    bool local =
        strcmp(r->master_host, "localhost") == 0 || strncmp(r->master_host, "127.", 4) == 0;
    return local ? "127.0.0.1" : NULL;
}

static Status make_hello(const Rendezvous *r, const RendezvousOptions *options, int mesh_port,
                         Hello *hello) {
    *hello = (Hello){.magic = HELLO_MAGIC,
                     .protocol = PROTOCOL,
                     .rank = r->rank,
                     .world = r->world,
                     .pid = (int32_t)getpid(),
                     .mesh_port = mesh_port};
    if (gethostname(hello->host, sizeof hello->host - 1) != 0) strcpy(hello->host, "unknown");
    INVARIANT(strlen(options->job) < RENDEZVOUS_ID_MAX);
    INVARIANT(strlen(options->recipe) < RENDEZVOUS_ID_MAX);
    INVARIANT(strlen(options->build) < RENDEZVOUS_ID_MAX);
    strcpy(hello->job, options->job);
    strcpy(hello->recipe, options->recipe);
    strcpy(hello->build, options->build);
    if (options->recipe_text && strlen(options->recipe_text) < RECIPE_TEXT)
        strcpy(hello->recipe_text, options->recipe_text);
    clean_hello(hello); // so that both sides compare the same
    return STATUS_OK;
}

static void name_place(Place *place, const Hello *hello) {
    snprintf(place->name, sizeof place->name, "%s, pid %" PRId32, hello->host, hello->pid);
    place->port = hello->mesh_port;
}

// --- Rank 0 --------------------------------------------------------------------------------------

typedef struct Host {
    Rendezvous *r;
    Reception reception;
    Hello *hellos; // (world), those whose star[] is connected
    int misfits[MISFITS_MAX];
    int num_misfits;
    char problems[VERDICT_TEXT]; // why this run cannot start, one after the other
    char refused[512];           // the newest refusal, for the message at a time-out
    int num_refused;
    double deadline;
} Host;

__attribute__((format(printf, 2, 3))) static void add_problem(Host *host, const char *format, ...) {
    size_t used = strlen(host->problems), room = sizeof host->problems - used;
    if (used && room > 2) {
        strcpy(host->problems + used, "; ");
        used += 2;
        room -= 2;
    }
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(host->problems + used, room, format, arguments);
    va_end(arguments);
    double soon = clock_seconds() + GRACE_SECONDS;
    if (soon < host->deadline) host->deadline = soon;
}

static void tell(int fd, const char *peer, const Verdict *verdict) {
    Status status =
        net_send(fd, peer, verdict, sizeof *verdict, clock_seconds() + PATIENCE_SECONDS);
    if (status == STATUS_OK) return;
    log_debug("rendezvous: %s", status_message());
    status_clear();
}

// Not one of us: told why, and remembered in case somebody is missing in the end.
__attribute__((format(printf, 3, 4))) static void refuse(Host *host, Guest *guest,
                                                         const char *format, ...) {
    Verdict verdict;
    char text[400];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    snprintf(host->refused, sizeof host->refused, "a connection from %.80s was refused: %s",
             guest->peer, text);
    log_line(reception_report_level(&host->num_refused), "rendezvous: %s", host->refused);
    rendezvous_make_verdict(&verdict, STATUS_USAGE, text);
    tell(guest->fd, guest->peer, &verdict);
}

// Keeps the connection, to tell it the verdict.
static void keep_misfit(Host *host, Guest *guest) {
    if (host->num_misfits == MISFITS_MAX) return; // named, but not told
    host->misfits[host->num_misfits++] = guest->fd;
    guest->fd = -1;
}

// Whether the connection of a rank that waits has ended. Nothing is expected from it.
static bool has_left(int fd) {
    char byte;
    bool gone = false;
    const char *why;
    return net_recv_some(fd, &byte, 1, &gone, &why) > 0 || gone;
}

static void drop_those_who_left(Host *host) {
    Rendezvous *r = host->r;
    for (int rank = 1; rank < r->world; rank++) {
        if (r->star[rank] < 0 || !has_left(r->star[rank])) continue;
        log_warn("rendezvous: rank %d (%s) left before all had come", rank, r->places[rank].name);
        net_close(r->star[rank]);
        r->star[rank] = -1;
    }
}

static void arrived(void *context, Guest *guest) {
    Host *host = context;
    Rendezvous *r = host->r;
    const Hello *self = &host->hellos[0];
    Hello hello;
    memcpy(&hello, guest->message, sizeof hello);
    clean_hello(&hello);
    if (hello.protocol != PROTOCOL) {
        refuse(host, guest,
               "protocol %" PRIu32 " came, %d is spoken here; use one version of the "
               "program on all nodes",
               hello.protocol, PROTOCOL);
        return;
    }
    if (strcmp(hello.job, self->job) != 0) {
        refuse(host, guest,
               "rank %" PRId32 " of job %s (%s, pid %" PRId32 ") came to the "
               "rendezvous of job %s; it is left over from another start, or two jobs "
               "share a port",
               hello.rank, hello.job, hello.host, hello.pid, self->job);
        return;
    }
    if (hello.world != r->world || hello.rank < 1 || hello.rank >= r->world) {
        add_problem(host,
                    "%s, pid %" PRId32 " is rank %" PRId32 " of %" PRId32
                    ", rank 0 (%s) is one of %d",
                    hello.host, hello.pid, hello.rank, hello.world, r->places[0].name, r->world);
        keep_misfit(host, guest);
        return;
    }
    drop_those_who_left(host); // perhaps it is the one that comes again
    if (r->star[hello.rank] >= 0) {
        add_problem(host, "two processes are rank %" PRId32 ": %s and %s, pid %" PRId32, hello.rank,
                    r->places[hello.rank].name, hello.host, hello.pid);
        keep_misfit(host, guest);
        return;
    }
    Place *place = &r->places[hello.rank];
    host->hellos[hello.rank] = hello;
    name_place(place, &hello);
    // Seen from here as this very machine, a rank is for others where rank 0 is.
    net_peer_host(guest->fd, place->host);
    if (strncmp(place->host, "127.", 4) == 0 || strcmp(place->host, "::1") == 0)
        place->host[0] = '\0';
    r->star[hello.rank] = guest->fd;
    guest->fd = -1;
}

static int count_missing(const Rendezvous *r, bool *missing) {
    int count = 0;
    for (int rank = 1; rank < r->world; rank++) {
        bool absent = r->star[rank] < 0;
        if (missing) missing[rank] = absent;
        count += absent;
    }
    return count;
}

// Recipe and build of every rank that came are those of rank 0.
static void compare_recipes(Host *host) {
    const Rendezvous *r = host->r;
    const Hello *own = &host->hellos[0];
    char differences[512];
    for (int rank = 1; rank < r->world; rank++) {
        const Hello *other = &host->hellos[rank];
        if (r->star[rank] < 0 || strcmp(own->recipe, other->recipe) == 0) continue;
        rendezvous_recipe_differences(other->recipe_text, own->recipe_text, differences,
                                      sizeof differences);
        if (differences[0])
            add_problem(host, "rank %d (%s) has %s", rank, r->places[rank].name, differences);
        else
            add_problem(host, "rank %d (%s) has recipe %.*s, rank 0 (%s) has %.*s", rank,
                        r->places[rank].name, ID_SHOWN, other->recipe, r->places[0].name, ID_SHOWN,
                        own->recipe);
    }
}

static void compare_builds(Host *host) {
    const Rendezvous *r = host->r;
    const Hello *own = &host->hellos[0];
    for (int rank = 1; rank < r->world; rank++) {
        const Hello *other = &host->hellos[rank];
        if (r->star[rank] < 0 || strcmp(own->build, other->build) == 0) continue;
        add_problem(host, "rank %d (%s) has build %.*s, rank 0 (%s) has %.*s", rank,
                    r->places[rank].name, ID_SHOWN, other->build, r->places[0].name, ID_SHOWN,
                    own->build);
    }
}

static Status judge(Host *host, double seconds) {
    Rendezvous *r = host->r;
    char list[160];
    bool *missing = calloc((size_t)r->world, sizeof *missing);
    if (!missing) FAIL(STATUS_INTERNAL, "out of memory");
    int count = count_missing(r, missing);
    rendezvous_list(missing, r->world, list, sizeof list);
    free(missing);
    compare_recipes(host);
    compare_builds(host);
    if (host->problems[0])
        FAIL(STATUS_USAGE,
             "the ranks of this run do not agree: %s; start all with the same program, recipe, "
             "options and number of ranks",
             host->problems);
    if (count > 0)
        FAIL(STATUS_COMMUNICATION,
             "rendezvous at %s port %d: after %.1f s %d of %d ranks have not come: rank%s %s; look "
             "at their logs%s%s",
             r->master_host, r->master_port, seconds, count, r->world, count > 1 ? "s" : "", list,
             host->refused[0] ? "; " : "", host->refused);
    return STATUS_OK;
}

// Tells everyone who came what `code` (this thread's failure, or STATUS_OK) means for them.
static void tell_everyone(Host *host, Status code) {
    Rendezvous *r = host->r;
    Verdict verdict;
    rendezvous_make_verdict(&verdict, code, code == STATUS_OK ? "" : status_message());
    memcpy(verdict.nonce, r->nonce, sizeof verdict.nonce);
    verdict.shared = code != STATUS_OK;
    StatusRecord record;
    status_take(&record);
    for (int rank = 1; rank < r->world; rank++)
        if (r->star[rank] >= 0) tell(r->star[rank], r->places[rank].name, &verdict);
    verdict.shared = 0; // perhaps of another job, whose logs nobody compares with ours
    for (int i = 0; i < host->num_misfits; i++) {
        tell(host->misfits[i], "a misfit", &verdict);
        net_close(host->misfits[i]);
    }
    status_put(&record);
}

static Status send_places(Rendezvous *r) {
    double deadline = clock_seconds() + r->timeout_seconds;
    for (int rank = 1; rank < r->world; rank++)
        TRY(net_send(r->star[rank], r->places[rank].name, r->places,
                     (size_t)r->world * sizeof *r->places, deadline));
    return STATUS_OK;
}

static Status receive_ranks(Host *host) {
    Rendezvous *r = host->r;
    double start = clock_seconds();
    host->deadline = start + r->timeout_seconds;
    while (count_missing(r, NULL) > 0 && clock_seconds() < host->deadline) {
        TRY(reception_serve(&host->reception, r->star, r->world, host->deadline));
        drop_those_who_left(host);
    }
    return judge(host, clock_seconds() - start);
}

static Status open_listener(const Rendezvous *r, int inherited, int *listener) {
    if (inherited > 0) {
        *listener = inherited;
        if (fcntl(inherited, F_SETFD, FD_CLOEXEC) == 0) return STATUS_OK;
        FAIL(STATUS_USAGE, "descriptor %d, the listening socket from the parent: %s", inherited,
             strerror(errno));
    }
    Status status = net_listen(rendezvous_listen_host(r), r->master_port, listener, NULL);
    if (status != STATUS_OK)
        status = status_prefix(status, "rendezvous of rank 0 (MASTER_ADDR, MASTER_PORT): ");
    return status;
}

static Status join_as_host(Rendezvous *r, const Hello *self, int inherited) {
    Status status = STATUS_OK;
    Host *host = calloc(1, sizeof *host);
    if (!host) FAIL(STATUS_INTERNAL, "out of memory");
    host->r = r;
    host->hellos = calloc((size_t)r->world, sizeof *host->hellos);
    host->reception = (Reception){.listener = -1,
                                  .name = "rendezvous",
                                  .magic = HELLO_MAGIC,
                                  .message_bytes = sizeof(Hello),
                                  .patience_seconds = PATIENCE_SECONDS,
                                  .arrived = arrived,
                                  .context = host};
    reception_open(&host->reception);
    if (!host->hellos) FAIL_GOTO(done, STATUS_INTERNAL, "out of memory");
    host->hellos[0] = *self;
    name_place(&r->places[0], self);
    if (getrandom(r->nonce, sizeof r->nonce, 0) != sizeof r->nonce)
        FAIL_GOTO(done, STATUS_INTERNAL, "the system gave no random bytes");
    TRY_GOTO(open_listener(r, inherited, &host->reception.listener), done);
    status = receive_ranks(host);
    tell_everyone(host, status);
    if (status == STATUS_OK) status = send_places(r);
done:
    reception_close(&host->reception);
    net_close(host->reception.listener);
    free(host->hellos);
    free(host);
    return status;
}

// --- The other ranks -----------------------------------------------------------------------------

// One visit: *again says that it ended before rank 0 said anything.
static Status visit(Rendezvous *r, const Hello *self, double deadline, bool *again) {
    Verdict verdict = {0};
    char peer[NET_NAME_MAX];
    snprintf(peer, sizeof peer, "rank 0's rendezvous at %.100s port %d", r->master_host,
             r->master_port);
    *again = false;
    TRY(net_connect("rank 0's rendezvous", r->master_host, r->master_port, deadline, &r->star[0]));
    Status status = net_send(r->star[0], peer, self, sizeof *self, deadline);
    if (status == STATUS_OK)
        status =
            rendezvous_recv_verdict(r->star[0], peer, &verdict, deadline + ANSWER_EXTRA_SECONDS);
    // What rank 0 said stands; that its connection was lost may be different next time.
    *again = status == STATUS_COMMUNICATION && !verdict.magic[0];
    if (status == STATUS_OK) memcpy(r->nonce, verdict.nonce, sizeof r->nonce);
    return status;
}

static Status recv_places(Rendezvous *r) {
    char host[NET_HOST_MAX];
    TRY(net_recv(r->star[0], "rank 0", r->places, (size_t)r->world * sizeof *r->places,
                 clock_seconds() + r->timeout_seconds));
    net_peer_host(r->star[0], host);
    for (int rank = 0; rank < r->world; rank++) {
        Place *place = &r->places[rank];
        rendezvous_clean_text(place->host, sizeof place->host);
        rendezvous_clean_text(place->name, sizeof place->name);
        if (!place->host[0]) memcpy(place->host, host, sizeof place->host);
    }
    return STATUS_OK;
}

static Status join_as_guest(Rendezvous *r, const Hello *self) {
    const struct timespec pause = {.tv_nsec = AGAIN_MS * 1000000L};
    double deadline = clock_seconds() + r->timeout_seconds;
    for (;;) {
        bool again;
        Status status = visit(r, self, deadline, &again);
        if (status == STATUS_OK) return recv_places(r);
        if (!again || clock_seconds() >= deadline) return status;
        log_debug("rendezvous: coming again: %s", status_message());
        net_close(r->star[0]);
        r->star[0] = -1;
        nanosleep(&pause, NULL);
    }
}

// --- Both ----------------------------------------------------------------------------------------

static Status create(const RendezvousOptions *options, Rendezvous **out) {
    Rendezvous *r = calloc(1, sizeof *r);
    *out = r;
    if (!r) FAIL(STATUS_INTERNAL, "out of memory for the rendezvous");
    INVARIANT(options->world >= 1 && options->rank >= 0 && options->rank < options->world);
    r->rank = options->rank;
    r->world = options->world;
    r->master_port = options->master_port;
    r->timeout_seconds = options->timeout_seconds;
    r->mesh_listener = -1;
    snprintf(r->master_host, sizeof r->master_host, "%s", options->master_host);
    r->places = calloc((size_t)r->world, sizeof *r->places);
    r->star = malloc((size_t)r->world * sizeof *r->star);
    for (int rank = 0; r->star && rank < r->world; rank++) r->star[rank] = -1;
    if (!r->places || !r->star) FAIL(STATUS_INTERNAL, "out of memory for %d ranks", r->world);
    return STATUS_OK;
}

Status rendezvous_join(const RendezvousOptions *options, Rendezvous **out) {
    Status status = STATUS_OK;
    Hello self;
    Rendezvous *r = NULL;
    int mesh_port = 0;
    *out = NULL;
    TRY_GOTO(create(options, &r), failed);
    if (options->mesh) TRY_GOTO(rendezvous_mesh_listen(r, &mesh_port), failed);
    TRY_GOTO(make_hello(r, options, mesh_port, &self), failed);
    name_place(&r->places[0], &self); // alone: nobody else fills it
    if (r->world > 1 && r->rank == 0) TRY_GOTO(join_as_host(r, &self, options->listener), failed);
    if (r->world > 1 && r->rank > 0) TRY_GOTO(join_as_guest(r, &self), failed);
    if (options->mesh)
        TRY_GOTO(rendezvous_mesh_connect(r, clock_seconds() + r->timeout_seconds), failed);
    *out = r;
    return STATUS_OK;
failed:
    rendezvous_close(r);
    return status;
}

void rendezvous_close(Rendezvous *r) {
    if (!r) return;
    for (int rank = 0; rank < r->world; rank++) {
        if (r->star) net_close(r->star[rank]);
        if (r->mesh) net_close(r->mesh[rank]);
    }
    net_close(r->mesh_listener);
    free(r->places);
    free(r->star);
    free(r->mesh);
    free(r);
}

const char *rendezvous_name(const Rendezvous *r, int rank) {
    return r->places[rank].name;
}
