// Small agreements between ranks: the same answer on all, and failures that name who failed.
#include "train/team.h"
#include "tests/ranks.h"

static const CommunicatorOptions comm_options = {.timeout_seconds = 20};

static Status with_team(Communicator *communicator, Status (*body)(Team *)) {
    Backend *backend;
    Team team;
    TRY(backend_cpu(1, &backend));
    TRY(team_open(backend, communicator, &team));
    Status status = body(&team);
    team_close(&team);
    backend_destroy(backend);
    return status;
}

// More numbers and bytes than go at once.
enum { MANY = 3 * TEAM_DEVICE_BYTES / 8 + 5, ROW = TEAM_GATHER_MAX };

static Status sums_and_copies(Team *team) {
    double *values = calloc(MANY, sizeof *values);
    char *rows = calloc((size_t)team->world, ROW);
    EXPECT(values && rows);
    for (int i = 0; i < MANY; i++) values[i] = i + team->rank;
    TRY(team_sum(team, values, MANY));
    for (int i = 0; i < MANY; i++)
        EXPECT(values[i] == team->world * i + team->world * (team->world - 1) / 2, "%d", i);
    for (int i = 0; i < MANY; i++) values[i] = team->rank == 0 ? i * 0.5 : -1;
    TRY(team_broadcast(team, values, MANY * sizeof *values));
    for (int i = 0; i < MANY; i++) EXPECT(values[i] == i * 0.5, "%d", i);
    for (int i = 0; i < ROW; i++) rows[team->rank * ROW + i] = (char)(i * 7 + team->rank);
    TRY(team_gather(team, rows, ROW));
    for (int r = 0; r < team->world; r++)
        for (int i = 0; i < ROW; i++)
            EXPECT(rows[r * ROW + i] == (char)(i * 7 + r), "row %d, byte %d", r, i);
    free(values);
    free(rows);
    return STATUS_OK;
}

static Status run_sums(Communicator *communicator, void *context) {
    (void)context;
    return with_team(communicator, sums_and_copies);
}

START_TEST(sums_and_copies_reach_all) {
    for (int world = 2; world <= 5; world++) ranks_expect_ok(world, &comm_options, run_sums, NULL);
    // Alone nothing moves, and nothing is needed for it.
    Team team;
    double value = 3;
    ck_assert_ok(team_open(NULL, NULL, &team));
    ck_assert_ok(team_sum(&team, &value, 1));
    ck_assert(value == 3 && team.rank == 0 && team.world == 1);
    ck_assert_ok(team_agree(&team, STATUS_OK));
    ck_assert_fails(team_agree(&team, status_fail("", 0, STATUS_IO, "alone")), STATUS_IO, "alone");
    team_close(&team);
}
END_TEST

// Which ranks fail, and whether all with the same words.
static struct {
    unsigned ranks;
    bool same;
} fails;

static Status own_part(const Team *team) {
    if (!(fails.ranks >> team->rank & 1)) return STATUS_OK;
    if (fails.same) FAIL(STATUS_USAGE, "the recipe is wrong");
    FAIL(team->rank == 2 ? STATUS_IO : STATUS_BAD_DATA, "disk %d is full", team->rank);
}

static Status agree(Team *team) {
    TRY(team_agree(team, STATUS_OK));
    Status status = team_agree(team, own_part(team));
    // Everybody is in step afterwards.
    double one = 1;
    if (status != STATUS_OK) {
        StatusRecord record;
        status_take(&record);
        TRY(team_sum(team, &one, 1));
        EXPECT(one == team->world);
        return status_put(&record);
    }
    return STATUS_OK;
}

static Status run_agree(Communicator *communicator, void *context) {
    (void)context;
    return with_team(communicator, agree);
}

static void expect_all(unsigned ranks, bool same, Status code, const char *text) {
    fails.ranks = ranks;
    fails.same = same;
    ranks_start(4, &comm_options, run_agree, NULL);
    ranks_join(4);
    for (int r = 0; r < 4; r++) ranks_expect(r, code, text);
}

START_TEST(a_failure_of_one_is_a_failure_of_all_and_names_it) {
    fails.ranks = 0;
    ranks_expect_ok(4, &comm_options, run_agree, NULL);
    expect_all(1 << 2, false, STATUS_IO, "rank 2: disk 2 is full");
    expect_all(1 << 0, false, STATUS_BAD_DATA, "rank 0: disk 0 is full");
    expect_all(1 << 1 | 1 << 2 | 1 << 3, false, STATUS_BAD_DATA, "ranks 1, 2, 3: disk 1 is full");
    expect_all(15, true, STATUS_USAGE, "the recipe is wrong");
    for (int r = 0; r < 4; r++) ck_assert_ptr_null(strstr(rank_results_[r].message, "rank"));
}
END_TEST

TEST_MAIN("team", TEST(sums_and_copies_reach_all),
          TEST(a_failure_of_one_is_a_failure_of_all_and_names_it))
