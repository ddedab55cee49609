// How ranks find each other, and what becomes of those that are late, missing, different, or not
// ours at all.
#include "tests/ranks.h"

#include <netinet/in.h>
#include <sys/socket.h>
#include "base/log.h"
#include "base/random.h"
#include "train/rendezvous.h"
#include "train/rendezvous_wire.h"

// What process `index` of a test is and does.
typedef struct Actor {
    RendezvousOptions options;
    int delay_ms;
    Status (*act)(Rendezvous *r, const struct Actor *actor); // after joining, or NULL
    Status (*instead)(const struct Actor *actor);            // of all that
} Actor;

static Actor actors[RANKS_MAX];
static int num_actors;

// A port that nobody has at this moment.
static int free_port(void) {
    int fd, port;
    ck_assert_ok(net_listen("127.0.0.1", 0, &fd, &port));
    net_close(fd);
    return port;
}

// A world of like-minded ranks; tests then change one or the other.
static void cast(int world, double timeout_seconds) {
    int port = free_port();
    num_actors = world;
    for (int rank = 0; rank < world; rank++)
        actors[rank] = (Actor){.options = {.rank = rank,
                                           .world = world,
                                           .master_host = "127.0.0.1",
                                           .master_port = port,
                                           .job = "job-1",
                                           .recipe = "aaaa",
                                           .build = "bbbb",
                                           .timeout_seconds = timeout_seconds}};
}

static Actor *add_actor(void) {
    actors[num_actors] = actors[1];
    return &actors[num_actors++];
}

static Status actor_body(int index, void *context) {
    (void)context;
    const Actor *actor = &actors[index];
    Rendezvous *r;
    usleep((useconds_t)actor->delay_ms * 1000);
    if (actor->instead) return actor->instead(actor);
    TRY(rendezvous_join(&actor->options, &r));
    Status status = actor->act ? actor->act(r, actor) : STATUS_OK;
    rendezvous_close(r);
    return status;
}

static void play(void) {
    processes_start(num_actors, actor_body, NULL);
    ranks_join(num_actors);
}

static void expect_all_ok(int count) {
    for (int i = 0; i < count; i++) ranks_expect(i, STATUS_OK, "");
}

// --- A run that starts ---------------------------------------------------------------------------

static Status talk(Rendezvous *r, const Actor *actor) {
    int world = actor->options.world, rank = actor->options.rank;
    int all[RANKS_MAX] = {0}, own = rank * 10;
    char id[128] = "";
    TRY(rendezvous_all_gather(r, "numbers", &own, sizeof own, all));
    for (int i = 0; i < world; i++) EXPECT(all[i] == i * 10, "%d of rank %d", all[i], i);
    if (rank == 0) snprintf(id, sizeof id, "unique");
    TRY(rendezvous_broadcast(r, "an id", id, sizeof id));
    EXPECT(strcmp(id, "unique") == 0, "'%s'", id);
    for (int i = 0; i < world; i++)
        EXPECT(strstr(rendezvous_name(r, i), ", pid "), "'%s'", rendezvous_name(r, i));
    return rendezvous_agree(r, "data", "the same", "");
}

// The mesh carries a communicator.
static Status sum_over_mesh(Rendezvous *r, const Actor *actor) {
    int sockets[RANKS_MAX], world = actor->options.world;
    const CommunicatorOptions options = {.timeout_seconds = 10};
    Communicator *c;
    CommTicket ticket;
    TRY(talk(r, actor));
    TRY(rendezvous_take_mesh(r, sockets));
    const CommunicatorLinks links = {
        .rank = actor->options.rank, .world = world, .sockets = sockets};
    TRY(communicator_tcp(&links, &options, &c));
    double value = c->rank;
    Status status = c->ops->all_reduce(c, &value, 1, COMM_F64, COMM_SUM, &ticket);
    communicator_destroy(c);
    EXPECT(value == world * (world - 1) / 2, "%g", value);
    return status;
}

START_TEST(ranks_meet_and_talk) {
    for (int world = 1; world <= 5; world++) {
        cast(world, 20);
        for (int i = 0; i < world; i++) {
            actors[i].options.mesh = true;
            actors[i].act = sum_over_mesh;
        }
        play();
        expect_all_ok(world);
        cast(world, 20);
        for (int i = 0; i < world; i++) actors[i].act = talk; // the star alone
        play();
        expect_all_ok(world);
    }
}
END_TEST

START_TEST(whoever_is_first_waits) {
    for (int late = 0; late < 3; late++) {
        cast(3, 20);
        actors[late].delay_ms = 700;
        for (int i = 0; i < 3; i++) {
            actors[i].options.mesh = true;
            actors[i].act = sum_over_mesh;
        }
        play();
        expect_all_ok(3);
    }
}
END_TEST

static Status die(Rendezvous *r, const Actor *actor) {
    (void)r;
    (void)actor;
    raise(SIGKILL);
    return STATUS_OK;
}

// Says hello and dies while it waits for the others.
static Status say_hello_and_die(const Actor *actor) {
    signal(SIGALRM, SIG_DFL); // `check` has a handler of its own
    alarm(1);
    RendezvousOptions options = actor->options;
    Rendezvous *r;
    return rendezvous_join(&options, &r);
}

START_TEST(a_rank_that_dies_waiting_may_come_again) {
    cast(3, 20);
    actors[1].instead = say_hello_and_die;
    actors[2].delay_ms = 2500;
    for (int i = 0; i < 3; i += 2) actors[i].act = talk;
    Actor *again = add_actor();
    again->options.rank = 1;
    again->instead = NULL;
    again->act = talk;
    again->delay_ms = 2000;
    play();
    ck_assert_int_eq(rank_results_[1].status, RANK_KILLED + SIGALRM);
    ranks_expect(0, STATUS_OK, "");
    ranks_expect(2, STATUS_OK, "");
    ranks_expect(3, STATUS_OK, "");
}
END_TEST

// --- Strangers -----------------------------------------------------------------------------------

static Status connect_to_master(const Actor *actor, int *fd) {
    return net_connect("the master", "127.0.0.1", actor->options.master_port, clock_seconds() + 10,
                       fd);
}

static Status say_garbage(const Actor *actor) {
    static const char request[] = "GET / HTTP/1.1\r\nHost: master\r\n\r\n";
    int fd;
    char byte;
    for (int i = 0; i < 20; i++) {
        TRY(connect_to_master(actor, &fd));
        TRY(net_send(fd, "master", request, i % 2 ? sizeof request - 1 : 3, clock_seconds() + 5));
        if (i % 2) { // refused at once
            Status status = net_recv(fd, "master", &byte, 1, clock_seconds() + 3);
            EXPECT(status == STATUS_COMMUNICATION, "%d", status);
            EXPECT(!strstr(status_message(), "deadline"), "%s", status_message());
        }
        net_close(fd);
    }
    return STATUS_OK;
}

// More silent connections than the reception has places, some with half a hello.
static Status say_nothing(const Actor *actor) {
    enum { SILENT = 2 * RECEPTION_GUESTS };
    int fds[SILENT];
    for (int i = 0; i < SILENT; i++) {
        TRY(connect_to_master(actor, &fds[i]));
        if (i % 3 == 0) TRY(net_send(fds[i], "master", HELLO_MAGIC, 8, clock_seconds() + 5));
    }
    usleep(2500000);
    return STATUS_OK;
}

static Status speak_other_protocol(const Actor *actor) {
    Hello hello = {.magic = HELLO_MAGIC, .protocol = PROTOCOL + 1, .rank = 1, .world = 3};
    Verdict verdict;
    int fd;
    TRY(connect_to_master(actor, &fd));
    TRY(net_send(fd, "master", &hello, sizeof hello, clock_seconds() + 5));
    Status status = rendezvous_recv_verdict(fd, "master", &verdict, clock_seconds() + 5);
    EXPECT(status == STATUS_USAGE && strstr(status_message(), "protocol 3 came"), "%s",
           status_message());
    return STATUS_OK;
}

// Hellos of the right form with bytes of any kind in every field.
static Status say_random_things(const Actor *actor) {
    Hello hello;
    Verdict verdict;
    int fd;
    for (uint64_t round = 0; round < 50; round++) {
        for (size_t i = 0; i < sizeof hello; i++)
            ((uint8_t *)&hello)[i] = (uint8_t)random_u64(3, round, i);
        memcpy(hello.magic, HELLO_MAGIC, sizeof hello.magic);
        if (round % 2) hello.protocol = PROTOCOL;
        TRY(connect_to_master(actor, &fd));
        TRY(net_send(fd, "master", &hello, sizeof hello, clock_seconds() + 5));
        Status status = rendezvous_recv_verdict(fd, "master", &verdict, clock_seconds() + 5);
        EXPECT(status == STATUS_USAGE, "%d: %s", status, status_message());
        for (const char *c = status_message(); *c; c++)
            EXPECT(*c >= ' ' && *c <= '~', "byte %d in the answer", *c);
        net_close(fd);
    }
    return STATUS_OK;
}

START_TEST(strangers_change_nothing) {
    static Status (*const strangers[])(const Actor *) = {say_garbage, say_nothing,
                                                         speak_other_protocol, say_random_things};
    for (int i = 0; i < 4; i++) {
        cast(3, 20);
        actors[1].delay_ms = 1500; // the strangers come first
        for (int rank = 0; rank < 3; rank++) actors[rank].act = talk;
        add_actor()->instead = strangers[i];
        actors[3].delay_ms = 200;
        play();
        expect_all_ok(4);
        ck_assert_double_lt(rank_results_[0].seconds, 4);
    }
}
END_TEST

static Status speak_at_mesh(const Place *place, const void *words, size_t bytes, int *fd) {
    TRY(net_connect("a mesh port", place->host, place->port, clock_seconds() + 10, fd));
    return net_send(*fd, "a mesh port", words, bytes, clock_seconds() + 5);
}

// Whoever does not belong to a mesh is sent away, without a word.
static Status expect_sent_away(const Place *place, const void *words, size_t bytes) {
    int fd;
    char byte;
    TRY(speak_at_mesh(place, words, bytes, &fd));
    Status status = net_recv(fd, "a mesh port", &byte, 1, clock_seconds() + 4);
    EXPECT(status == STATUS_COMMUNICATION, "%d", status);
    EXPECT(!strstr(status_message(), "deadline"), "%s", status_message());
    status_clear();
    net_close(fd);
    return STATUS_OK;
}

// All that may be wrong with a greeting, one thing at a time. At rank 0 the place of rank 1 is
// taken.
static Status say_wrong_things(const Rendezvous *r, int to) {
    static const char request[] = "GET / HTTP/1.1\r\nHost: mesh\r\nAccept: */*\r\n\r\n";
    const Place *place = &r->places[to];
    MeshHello good = {.magic = MESH_MAGIC, .from = 2, .to = to};
    memcpy(good.nonce, r->nonce, sizeof good.nonce);
    TRY(expect_sent_away(place, request, sizeof request - 1));
    for (int i = 0; i < NONCE_BYTES; i++) { // every byte counts
        MeshHello stale = good;
        stale.nonce[i] ^= 1;
        TRY(expect_sent_away(place, &stale, sizeof stale));
    }
    const struct {
        int32_t from, to;
    } ways[] = {{2, 1 - to}, {2, 2},        {2, -1},         {to, to}, {3, to},
                {-1, to},    {1 << 30, to}, {INT32_MIN, to}, {1, to},  {0, to}};
    for (size_t i = 0; i < sizeof ways / sizeof ways[0]; i++) {
        MeshHello lost = good;
        lost.from = ways[i].from;
        lost.to = ways[i].to;
        TRY(expect_sent_away(place, &lost, sizeof lost));
    }
    int silent[2]; // and these two stay
    TRY(speak_at_mesh(place, &good, sizeof good / 2, &silent[0]));
    return speak_at_mesh(place, NULL, 0, &silent[1]);
}

// Joins like a guest, by hand, to learn what only ranks are told: ports of the mesh, and the nonce.
static Status join_by_hand(const Actor *actor, Rendezvous *r) {
    const RendezvousOptions *o = &actor->options;
    Hello hello = {.magic = HELLO_MAGIC,
                   .protocol = PROTOCOL,
                   .rank = o->rank,
                   .world = o->world,
                   .pid = (int32_t)getpid(),
                   .host = "by-hand"};
    Verdict verdict;
    double deadline = clock_seconds() + 10;
    strcpy(hello.job, o->job);
    strcpy(hello.recipe, o->recipe);
    strcpy(hello.build, o->build);
    TRY(rendezvous_mesh_listen(r, &hello.mesh_port));
    TRY(connect_to_master(actor, &r->star[0]));
    TRY(net_send(r->star[0], "master", &hello, sizeof hello, deadline));
    TRY(rendezvous_recv_verdict(r->star[0], "master", &verdict, deadline));
    memcpy(r->nonce, verdict.nonce, sizeof r->nonce);
    TRY(net_recv(r->star[0], "master", r->places, (size_t)o->world * sizeof *r->places, deadline));
    for (int rank = 0; rank < o->world; rank++) strcpy(r->places[rank].host, "127.0.0.1");
    return STATUS_OK;
}

// Rank 2, for which the others wait, and before that a crowd of strangers.
static Status bring_strangers(const Actor *actor) {
    Rendezvous *r = calloc(1, sizeof *r);
    EXPECT(r, "memory");
    *r = (Rendezvous){.rank = actor->options.rank,
                      .world = actor->options.world,
                      .timeout_seconds = actor->options.timeout_seconds,
                      .places = calloc(RANKS_MAX, sizeof *r->places),
                      .star = calloc(RANKS_MAX, sizeof *r->star),
                      .mesh_listener = -1};
    EXPECT(r->places && r->star, "memory");
    strcpy(r->master_host, "127.0.0.1");
    for (int rank = 0; rank < RANKS_MAX; rank++) r->star[rank] = -1;
    TRY(join_by_hand(actor, r));
    // Rank 1 answers once it has gone to rank 0.
    TRY(say_wrong_things(r, 1));
    TRY(say_wrong_things(r, 0));
    TRY(rendezvous_mesh_connect(r, clock_seconds() + 10));
    Status status = sum_over_mesh(r, actor);
    rendezvous_close(r);
    return status;
}

START_TEST(strangers_at_the_mesh_are_sent_away) {
    cast(3, 20);
    for (int i = 0; i < 3; i++) {
        actors[i].options.mesh = true;
        actors[i].act = sum_over_mesh;
    }
    actors[2].instead = bring_strangers;
    play();
    expect_all_ok(3);
    ck_assert_double_lt(rank_results_[0].seconds, 4); // the silent ones were not waited for
}
END_TEST

START_TEST(ranks_of_an_earlier_start_are_refused) {
    cast(2, 20);
    actors[1].delay_ms = 800;
    actors[0].act = actors[1].act = talk;
    Actor *stale = add_actor();
    stale->options.job = "job-0";
    stale->delay_ms = 200;
    stale->act = NULL;
    play();
    ranks_expect(0, STATUS_OK, "");
    ranks_expect(1, STATUS_OK, "");
    ranks_expect(2, STATUS_USAGE, "rank 1 of job job-0");
    ranks_expect(2, STATUS_USAGE, "rendezvous of job job-1");
    ck_assert_double_lt(rank_results_[2].seconds, 5);
}
END_TEST

// Somebody listens at the port, but it is not us.
static Status serve_something_else(const Actor *actor) {
    int listener, fd;
    char peer[NET_NAME_MAX], answer[4096];
    memset(answer, 'x', sizeof answer);
    TRY(net_listen("127.0.0.1", actor->options.master_port, &listener, NULL));
    TRY(net_accept(listener, clock_seconds() + 10, &fd, peer));
    TRY(net_send(fd, peer, answer, sizeof answer, clock_seconds() + 5));
    usleep(500000);
    return STATUS_OK;
}

START_TEST(another_service_is_recognised) {
    cast(2, 5);
    actors[0].instead = serve_something_else;
    play();
    ranks_expect(1, STATUS_USAGE, "no rendezvous");
    ck_assert_double_lt(rank_results_[1].seconds, 4);
}
END_TEST

// --- A run that cannot start ---------------------------------------------------------------------

START_TEST(missing_ranks_are_named_to_all_in_time) {
    cast(5, 1.5);
    actors[1] = actors[4]; // ranks 0, 2 and 4 come
    num_actors = 3;
    play();
    for (int i = 0; i < 3; i++) {
        ranks_expect(i, STATUS_COMMUNICATION, "2 of 5 ranks have not come: ranks 1, 3;");
        ck_assert_str_eq(rank_results_[i].message, rank_results_[0].message);
        ck_assert_double_ge(rank_results_[i].seconds, 1);
        ck_assert_double_lt(rank_results_[i].seconds, 6);
    }
}
END_TEST

START_TEST(a_refused_rank_is_mentioned_when_one_is_missing) {
    cast(2, 1.5);
    actors[1].options.job = "job-0";
    play();
    ranks_expect(0, STATUS_COMMUNICATION, "have not come: rank 1");
    ranks_expect(0, STATUS_COMMUNICATION, "rank 1 of job job-0");
}
END_TEST

START_TEST(a_taken_port_is_a_clear_message) {
    int fd, port;
    char text[64];
    ck_assert_ok(net_listen("127.0.0.1", 0, &fd, &port));
    cast(2, 5);
    num_actors = 1;
    actors[0].options.master_port = port;
    play();
    snprintf(text, sizeof text, "port %d on 127.0.0.1 is taken", port);
    ranks_expect(0, STATUS_USAGE, text);
    ck_assert_double_lt(rank_results_[0].seconds, 2);
    net_close(fd);
}
END_TEST

START_TEST(an_unreachable_master_is_a_clear_message) {
    cast(2, 1);
    actors[0] = actors[1]; // both are rank 1; nobody listens
    num_actors = 2;
    actors[1].options.master_host = "no-such-host.invalid";
    play();
    ranks_expect(0, STATUS_COMMUNICATION, "cannot be reached");
    ranks_expect(0, STATUS_COMMUNICATION, "Connection refused");
    ck_assert_double_lt(rank_results_[0].seconds, 4);
    ranks_expect(1, STATUS_USAGE, "host no-such-host.invalid: cannot be resolved");
}
END_TEST

// All ranks are told the same, which names the culprit.
static void expect_disagreement(const char *text) {
    play();
    for (int i = 0; i < num_actors; i++) {
        ranks_expect(i, STATUS_USAGE, "do not agree");
        ranks_expect(i, STATUS_USAGE, text);
        ck_assert_str_eq(rank_results_[i].message, rank_results_[0].message);
        ck_assert_double_lt(rank_results_[i].seconds, 8);
    }
}

START_TEST(ranks_that_differ_are_named_to_all) {
    cast(3, 10);
    actors[2].options.recipe = "cccc";
    expect_disagreement("has recipe cccc, rank 0");
    cast(3, 10); // with the text, what differs is said
    for (int i = 0; i < 3; i++)
        actors[i].options.recipe_text = "[train]\nsteps = 9\n\n[optim]\nlr = 1e-3\nbeta1 =\n";
    actors[2].options.recipe = "cccc";
    actors[2].options.recipe_text = "[train]\nsteps = 9\n\n[optim]\nlr = 2e-3\nbeta1 =\n";
    expect_disagreement("has optim.lr = 2e-3 (rank 0: 1e-3); start all");
    cast(3, 10);
    actors[1].options.build = "dddd";
    expect_disagreement("has build dddd, rank 0");
    cast(3, 10);
    actors[1].options.world = 4;
    expect_disagreement("is rank 1 of 4, rank 0");
    cast(3, 10);
    actors[2].options.rank = 1;
    expect_disagreement("two processes are rank 1");
    cast(2, 10); // more come than there are
    Actor *more = add_actor();
    more->options.rank = 2;
    more->options.world = 3;
    actors[1].delay_ms = 500;
    expect_disagreement("is rank 2 of 3, rank 0");
    cast(4, 10); // several at once
    actors[1].options.recipe = "cccc";
    actors[3].options.build = "dddd";
    expect_disagreement("has recipe cccc");
    ranks_expect(1, STATUS_USAGE, "has build dddd");
}
END_TEST

START_TEST(differences_of_recipes) {
    static const char own[] = "[a]\nx = 1\ny = 2\n[b]\nx =\nz = 3\nw = 4\nv = 5\n";
    static const char *const cases[][2] = {
        {"[a]\nx = 1\ny = 2\n[b]\nx =\nz = 3\nw = 4\nv = 5\n", ""},
        {"[a]\nx = 1\ny = 7\n[b]\nx = q\nz = 3\nw = 4\nv = 5\n",
         "a.y = 7 (rank 0: 2), b.x = q (rank 0: )"},
        {"[a]\nx = 9\ny = 9\n[b]\nx = 9\nz = 9\nw = 9\nv = 9\n",
         "a.x = 9 (rank 0: 1), a.y = 9 (rank 0: 2), b.x = 9 (rank 0: ), b.z = 9 (rank 0: 3) and 2 "
         "more"},
        {"[a]\nx = 2\nother = 2\n", "a.x = 2 (rank 0: 1)"}, // another program's recipe
        {"garbage", ""},
        {"", ""},
        {"=\n=\n=", ""},
    };
    char text[256], small[8];
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        rendezvous_recipe_differences(cases[i][0], own, text, sizeof text);
        ck_assert_str_eq(text, cases[i][1]);
        rendezvous_recipe_differences(cases[i][0], own, small, sizeof small);
        ck_assert_uint_lt(strlen(small), sizeof small);
    }
}
END_TEST

// --- Afterwards ----------------------------------------------------------------------------------

static Status disagree(Rendezvous *r, const Actor *actor) {
    return rendezvous_agree(r, "training data", actor->options.rank == 1 ? "xx" : "yy",
                            "use the same shards");
}

START_TEST(what_differs_later_is_named_to_all) {
    cast(3, 5);
    for (int i = 0; i < 3; i++) actors[i].act = disagree;
    play();
    for (int i = 0; i < 3; i++) {
        ranks_expect(i, STATUS_USAGE, "has yy, but 1 of 3 ranks differ: rank 1 (");
        ranks_expect(i, STATUS_USAGE, "has xx; use the same shards");
    }
}
END_TEST

static Status sleep_long(Rendezvous *r, const Actor *actor) {
    (void)r;
    (void)actor;
    usleep(3000000);
    return STATUS_OK;
}

START_TEST(a_rank_that_is_lost_later_is_named_to_all) {
    cast(3, 1);
    actors[0].act = actors[2].act = talk;
    actors[1].act = die;
    play();
    for (int i = 0; i < 3; i += 2) ranks_expect(i, STATUS_COMMUNICATION, "numbers: not all");
    ranks_expect(2, STATUS_COMMUNICATION, "rank 1 (");
    cast(3, 1);
    actors[0].act = actors[2].act = talk;
    actors[1].act = sleep_long;
    play();
    for (int i = 0; i < 3; i += 2) {
        ranks_expect(i, STATUS_COMMUNICATION, "rank 1 (");
        ck_assert_double_lt(rank_results_[i].seconds, 3);
    }
    cast(3, 1);
    actors[1].act = actors[2].act = talk;
    actors[0].act = die;
    play();
    for (int i = 1; i < 3; i++) ranks_expect(i, STATUS_COMMUNICATION, "rank 0 (");
}
END_TEST

TEST_MAIN("rendezvous", TEST(ranks_meet_and_talk), TEST(whoever_is_first_waits),
          TEST(a_rank_that_dies_waiting_may_come_again), TEST(strangers_change_nothing),
          TEST(strangers_at_the_mesh_are_sent_away), TEST(ranks_of_an_earlier_start_are_refused),
          TEST(another_service_is_recognised), TEST(missing_ranks_are_named_to_all_in_time),
          TEST(a_refused_rank_is_mentioned_when_one_is_missing),
          TEST(a_taken_port_is_a_clear_message), TEST(an_unreachable_master_is_a_clear_message),
          TEST(ranks_that_differ_are_named_to_all), TEST(differences_of_recipes),
          TEST(what_differs_later_is_named_to_all), TEST(a_rank_that_is_lost_later_is_named_to_all))
