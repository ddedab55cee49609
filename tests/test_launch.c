// Who a process is by its environment, and the life of ranks under their parent. The ranks are this
// program itself, started again as "test_launch as-rank WHAT".
#include "tests/ranks.h"

#include <fcntl.h>
#include "train/launch.h"
#include "train/stop_signal.h"
#include "train/supervisor.h"

// --- The environment -----------------------------------------------------------------------------

static void clear_environment(void) {
    static const char *const names[] = {"RANK",
                                        "WORLD_SIZE",
                                        "LOCAL_RANK",
                                        "MASTER_ADDR",
                                        "MASTER_PORT",
                                        "SLURM_JOB_ID",
                                        "SLURM_PROCID",
                                        "SLURM_NTASKS",
                                        "SLURM_LOCALID",
                                        "SLURM_STEP_ID",
                                        LAUNCH_JOB,
                                        LAUNCH_LISTENER,
                                        "SLURM_STEP_NODELIST",
                                        "SLURM_JOB_NODELIST",
                                        "SLURM_STEP_NUM_TASKS",
                                        "SLURM_STEP_NUM_NODES",
                                        "SLURM_RESTART_COUNT",
                                        "TORCHELASTIC_USE_AGENT_STORE",
                                        "TORCHELASTIC_RUN_ID",
                                        "TORCHELASTIC_RESTART_COUNT"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) unsetenv(names[i]);
}

// "NAME=value NAME=value ..."
static void set_environment(const char *text) {
    char copy[1024];
    clear_environment();
    snprintf(copy, sizeof copy, "%s", text);
    for (char *save, *word = strtok_r(copy, " ", &save); word; word = strtok_r(NULL, " ", &save)) {
        char *equals = strchr(word, '=');
        *equals = '\0';
        setenv(word, equals + 1, 1);
    }
}

START_TEST(alone_without_variables) {
    Launch launch;
    set_environment("MASTER_ADDR=a MASTER_PORT=5 LOCAL_RANK=3"); // left over; no rank
    ck_assert_ok(launch_from_environment(&launch));
    ck_assert_int_eq(launch.kind, LAUNCH_NONE);
    ck_assert_int_eq(launch.world, 1);
    // The batch script of a Slurm job is no task of a step.
    set_environment("SLURM_JOB_ID=7 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=8");
    ck_assert_ok(launch_from_environment(&launch));
    ck_assert_int_eq(launch.kind, LAUNCH_NONE);
}
END_TEST

START_TEST(ranks_by_hand) {
    Launch launch;
    set_environment("RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 MASTER_ADDR=node1 MASTER_PORT=29500");
    ck_assert_ok(launch_from_environment(&launch));
    ck_assert_int_eq(launch.kind, LAUNCH_HAND);
    ck_assert_int_eq(launch.rank, 5);
    ck_assert_int_eq(launch.world, 8);
    ck_assert_int_eq(launch.local_rank, 1);
    ck_assert_str_eq(launch.master_host, "node1");
    ck_assert_int_eq(launch.master_port, 29500);
    ck_assert_str_eq(launch.job, "by-hand-0");
    setenv("TORCHELASTIC_RUN_ID", "abc", 1);
    setenv("TORCHELASTIC_RESTART_COUNT", "2", 1);
    setenv("TORCHELASTIC_USE_AGENT_STORE", "True", 1); // torchrun's agent sits on the port
    ck_assert_ok(launch_from_environment(&launch));
    ck_assert_str_eq(launch.job, "abc-2");
    ck_assert_int_eq(launch.master_port, 29501);
}
END_TEST

START_TEST(half_an_environment_is_refused) {
    Launch launch;
    set_environment("RANK=0 WORLD_SIZE=2 MASTER_PORT=29500");
    ck_assert_fails(launch_from_environment(&launch), STATUS_USAGE, "not LOCAL_RANK, MASTER_ADDR;");
    set_environment("WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=1");
    ck_assert_fails(launch_from_environment(&launch), STATUS_USAGE, "not RANK;");
    set_environment("RANK=2 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=1");
    ck_assert_fails(launch_from_environment(&launch), STATUS_USAGE, "RANK = 2, but WORLD_SIZE = 2");
    set_environment("RANK=x WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=1");
    ck_assert_fails(launch_from_environment(&launch), STATUS_USAGE, "RANK = x: expected a number");
    set_environment("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=70000");
    ck_assert_fails(launch_from_environment(&launch), STATUS_USAGE, "MASTER_PORT = 70000");
    set_environment("SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_LOCALID=0");
    ck_assert_fails(launch_from_environment(&launch), STATUS_USAGE, "SLURM_NTASKS is not set");
}
END_TEST

START_TEST(tasks_of_slurm) {
    Launch launch;
    set_environment("SLURM_JOB_ID=50123 SLURM_STEP_ID=0 SLURM_PROCID=3 SLURM_NTASKS=8 "
                    "SLURM_STEP_NUM_TASKS=4 SLURM_LOCALID=1 SLURM_STEP_NUM_NODES=2 "
                    "SLURM_STEP_NODELIST=gpu[007-008] SLURM_RESTART_COUNT=2");
    ck_assert_ok(launch_from_environment(&launch));
    ck_assert_int_eq(launch.kind, LAUNCH_SLURM);
    ck_assert_int_eq(launch.rank, 3);
    ck_assert_int_eq(launch.world, 4);
    ck_assert_int_eq(launch.local_rank, 1);
    ck_assert_str_eq(launch.master_host, "gpu007");
    ck_assert_int_eq(launch.master_port, 20000 + 50123 % 20000);
    ck_assert_str_eq(launch.job, "slurm-50123.0-2");
    setenv("SLURM_STEP_NUM_NODES", "1", 1);
    ck_assert_ok(launch_from_environment(&launch));
    ck_assert_str_eq(launch.master_host, "127.0.0.1");
    setenv("MASTER_ADDR", "ib-gpu007", 1);
    setenv("MASTER_PORT", "4000", 1);
    ck_assert_ok(launch_from_environment(&launch));
    ck_assert_str_eq(launch.master_host, "ib-gpu007");
    ck_assert_int_eq(launch.master_port, 4000);
}
END_TEST

START_TEST(first_host_of_a_list) {
    static const char *const lists[][2] = {
        {"node1", "node1"},           {"node1,node2", "node1"},    {"gpu[003-005,9],x", "gpu003"},
        {"gpu[7,9]", "gpu7"},         {"a-b.c[10-12]", "a-b.c10"}, {"[5-6]", "5"},
        {"rack[1-2]n4,x", "rack1n4"}, {"login,gpu[1-2]", "login"},
    };
    char host[16];
    for (size_t i = 0; i < sizeof lists / sizeof lists[0]; i++) {
        ck_assert_ok(launch_first_host(lists[i][0], host, sizeof host));
        ck_assert_str_eq(host, lists[i][1]);
    }
    static const char *const bad[] = {
        "", "a[", "a[]", "a[1", "r[1-2]n[3-4]", ",b", "a-very-long-host-name"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        ck_assert_fails(launch_first_host(bad[i], host, sizeof host), STATUS_USAGE, "host list");
}
END_TEST

START_TEST(the_worse_exit_code) {
    static const int order[] = {0, 75, 130, 76, 74, 70, 77, 93, 73, 65, 66, 78, 2};
    for (size_t i = 0; i < sizeof order / sizeof order[0]; i++)
        for (size_t j = 0; j < sizeof order / sizeof order[0]; j++)
            ck_assert_int_eq(supervisor_worse(order[i], order[j]), order[i > j ? i : j]);
    ck_assert_int_eq(supervisor_worse(76, 99), 99); // unknown: as a bug
}
END_TEST

// --- Ranks, in processes of their own ------------------------------------------------------------

static int rank_number(void) {
    return atoi(getenv("RANK"));
}

static void wait_for_request(double seconds) {
    double end = clock_seconds() + seconds;
    while (!stop_requested() && clock_seconds() < end) usleep(10000);
}

static Status meet(void) {
    Launch launch;
    Rendezvous *r;
    int all[RANKS_MAX];
    TRY(launch_from_environment(&launch));
    RendezvousOptions options = {.rank = launch.rank,
                                 .world = launch.world,
                                 .master_host = launch.master_host,
                                 .master_port = launch.master_port,
                                 .job = launch.job,
                                 .recipe = "r",
                                 .build = "b",
                                 .timeout_seconds = 20,
                                 .listener = launch.listener};
    TRY(rendezvous_join(&options, &r));
    TRY(rendezvous_all_gather(r, "ranks", &launch.local_rank, sizeof launch.local_rank, all));
    for (int i = 0; i < launch.world; i++) EXPECT(all[i] == i, "%d", all[i]);
    rendezvous_close(r);
    return STATUS_OK;
}

// Counts its lives in the file `path`.
static int count_life(const char *path) {
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND, 0666);
    if (fd < 0 || write(fd, "x", 1) != 1) _exit(99);
    int lives = (int)lseek(fd, 0, SEEK_END);
    close(fd);
    return lives;
}

static int act_as_rank(int argc, char **argv) {
    const char *what = argv[2], *argument = argc > 3 ? argv[3] : "";
    if (strcmp(what, "meet") == 0) return status_report(meet(), "rank");
    if (strcmp(what, "talk") == 0) {
        printf("out of %d\npart", rank_number());
        fflush(stdout);
        fprintf(stderr, "ial of %d\nlast of %d", rank_number(), rank_number());
        return 0;
    }
    if (strcmp(what, "codes") == 0) { // "0,74,76": each its own
        for (int i = 0; i < rank_number(); i++) argument = strchr(argument, ',') + 1;
        return atoi(argument);
    }
    stop_signal_install(true);
    if (strcmp(what, "fail-1") == 0 && rank_number() == 1) return STATUS_IO;
    if (strcmp(what, "kill-1") == 0 && rank_number() == 1) raise(SIGKILL);
    if (strcmp(what, "lives") == 0 && rank_number() == 1)
        return count_life(argument) < 3 ? STATUS_COMMUNICATION : STATUS_OK;
    if (strcmp(what, "lives") == 0) return STATUS_OK;
    bool deaf = strcmp(what, "deaf") == 0, slow = deaf || strcmp(what, "slow") == 0;
    if (slow || strcmp(what, "ready") == 0) count_life(argument);
    if (deaf && rank_number() == 1) raise(SIGSTOP);
    wait_for_request(30);
    if (!stop_requested()) return 98;
    if (slow) usleep(30000000); // a signal ends the process, not the sleep
    if (strcmp(what, "ready") == 0) {
        usleep(300000); // a second signal would end it here
        count_life(argument);
    }
    return STATUS_PREEMPTED;
}

// --- The parent ----------------------------------------------------------------------------------

static struct {
    SupervisorOptions options;
    char *arguments[6];
    char log[256]; // its stderr
} scene;

static void set_scene(int processes, const char *what, const char *argument) {
    memset(&scene, 0, sizeof scene);
    scene.arguments[0] = (char *)"test_launch";
    scene.arguments[1] = (char *)"as-rank";
    scene.arguments[2] = (char *)what;
    scene.arguments[3] = (char *)argument;
    scene.options = (SupervisorOptions){
        .processes = processes, .arguments = scene.arguments, .grace_seconds = 1};
    snprintf(scene.log, sizeof scene.log, "%s/log", test_directory());
}

static Status parent_body(int index, void *context) {
    (void)index;
    (void)context;
    SupervisorEnd end;
    int fd = open(scene.log, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    EXPECT(fd >= 0 && dup2(fd, 2) == 2 && dup2(fd, 1) == 1, "the log");
    TRY(supervise(&scene.options, &end));
    return (Status)end.exit_code;
}

static int run_scene(void) {
    clear_environment();
    processes_start(1, parent_body, NULL);
    ranks_join(1);
    return rank_results_[0].status;
}

static void expect_log(const char *text, bool there) {
    char *log;
    size_t bytes;
    ck_assert_ok(io_read_file(scene.log, 1 << 20, &log, &bytes));
    ck_assert_msg((strstr(log, text) != NULL) == there, "log '%s': '%s'", log, text);
    free(log);
}

START_TEST(ranks_meet_through_their_parent) {
    for (int world = 1; world <= 4; world++) {
        set_scene(world, "meet", NULL);
        ck_assert_int_eq(run_scene(), STATUS_OK);
    }
}
END_TEST

START_TEST(lines_of_other_ranks_have_a_name) {
    set_scene(3, "talk", NULL);
    ck_assert_int_eq(run_scene(), STATUS_OK);
    expect_log("rank 1: out of 1\n", true);
    expect_log("rank 1: partial of 1\n", true);
    expect_log("rank 2: last of 2\n", true);
    expect_log("rank 0:", false);
    expect_log("out of 0\n", true);
}
END_TEST

START_TEST(the_worst_code_is_the_exit_code) {
    set_scene(3, "codes", "0,0,0");
    ck_assert_int_eq(run_scene(), 0);
    set_scene(3, "codes", "76,74,76");
    ck_assert_int_eq(run_scene(), 74);
    set_scene(3, "codes", "75,75,75");
    ck_assert_int_eq(run_scene(), 75);
    set_scene(3, "codes", "75,76,75");
    ck_assert_int_eq(run_scene(), 76);
}
END_TEST

START_TEST(a_failing_rank_ends_the_others) {
    set_scene(3, "fail-1", NULL);
    ck_assert_int_eq(run_scene(), STATUS_IO);
    ck_assert_double_ge(rank_results_[0].seconds, 0.9); // they had their grace
    ck_assert_double_lt(rank_results_[0].seconds, 4);
    set_scene(3, "kill-1", NULL);
    ck_assert_int_eq(run_scene(), STATUS_COMMUNICATION);
    ck_assert_double_lt(rank_results_[0].seconds, 4);
    expect_log("rank 1 was killed by signal 9", true);
    expect_log("rank 0 was killed", false); // that was the parent
}
END_TEST

static long file_bytes(const char *path) {
    uint64_t bytes;
    if (io_file_size(path, &bytes) == STATUS_OK) return (long)bytes;
    status_clear();
    return 0;
}

static void wait_for_bytes(const char *path, long bytes) {
    double end = clock_seconds() + 10;
    while (file_bytes(path) < bytes && clock_seconds() < end) usleep(10000);
    ck_assert_int_ge(file_bytes(path), bytes);
}

START_TEST(signals_reach_all_ranks_once) {
    static const int signals[] = {SIGTERM, SIGINT, SIGUSR1};
    char path[128];
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/ready%d", test_directory(), i);
        set_scene(3, "ready", path);
        processes_start(1, parent_body, NULL);
        wait_for_bytes(path, 3);
        usleep(100000);
        kill(rank_pids_[0], signals[i]);
        ranks_join(1);
        ck_assert_int_eq(rank_results_[0].status, STATUS_PREEMPTED);
        ck_assert_int_eq(file_bytes(path), 6); // all came to their end
    }
}
END_TEST

static void signal_children_of(pid_t parent, int number) {
    char path[64];
    int child, count = 0;
    snprintf(path, sizeof path, "/proc/%d/task/%d/children", (int)parent, (int)parent);
    FILE *file = fopen(path, "r");
    ck_assert_ptr_nonnull(file);
    for (; fscanf(file, "%d", &child) == 1; count++) kill(child, number);
    fclose(file);
    ck_assert_int_eq(count, 2);
}

// A signal to all processes at once, as schedulers send it, is one request, not two.
START_TEST(a_signal_to_all_processes_is_one_request) {
    char path[128];
    for (int i = 0; i < 10; i++) {
        snprintf(path, sizeof path, "%s/ready%d", test_directory(), i);
        set_scene(2, "ready", path);
        processes_start(1, parent_body, NULL);
        wait_for_bytes(path, 2);
        usleep(50000);
        if (i % 2) kill(rank_pids_[0], SIGTERM);
        signal_children_of(rank_pids_[0], SIGTERM);
        if (i % 2 == 0) kill(rank_pids_[0], SIGTERM);
        ranks_join(1);
        ck_assert_int_eq(rank_results_[0].status, STATUS_PREEMPTED);
        ck_assert_int_eq(file_bytes(path), 4);
    }
}
END_TEST

// "deaf": one of them hears nothing, and is killed when the others are gone.
START_TEST(a_second_request_ends_them_at_once) {
    static const char *const kinds[] = {"slow", "deaf"};
    char path[128];
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/%s", test_directory(), kinds[i]);
        set_scene(2, kinds[i], path);
        processes_start(1, parent_body, NULL);
        wait_for_bytes(path, 2);
        usleep(100000);
        kill(rank_pids_[0], SIGTERM);
        usleep(2300000);
        kill(rank_pids_[0], SIGTERM);
        ranks_join(1);
        ck_assert_int_eq(rank_results_[0].status, STATUS_PREEMPTED);
        ck_assert_double_lt(rank_results_[0].seconds, 10);
        expect_log("did not notice the end of the run and will be killed", i == 1);
    }
}
END_TEST

START_TEST(ranks_save_when_their_parent_dies) {
    char path[128];
    snprintf(path, sizeof path, "%s/ready", test_directory());
    set_scene(3, "ready", path);
    processes_start(1, parent_body, NULL);
    wait_for_bytes(path, 3);
    usleep(100000);
    kill(rank_pids_[0], SIGKILL);
    ranks_join(1);
    wait_for_bytes(path, 6);
}
END_TEST

START_TEST(a_lost_rank_is_started_again) {
    char path[128];
    snprintf(path, sizeof path, "%s/lives", test_directory());
    set_scene(2, "lives", path);
    scene.options.max_restarts = 3;
    ck_assert_int_eq(run_scene(), STATUS_OK);
    ck_assert_int_eq(file_bytes(path), 3);
    expect_log("restart 2 of 3", true);
    expect_log("restart 3 of 3", false);
    ck_assert_ok(io_unlink(path));
    scene.options.max_restarts = 1; // one too few
    ck_assert_int_eq(run_scene(), STATUS_COMMUNICATION);
    ck_assert_int_eq(file_bytes(path), 2);
    ck_assert_ok(io_unlink(path)); // other arguments the second time
    static char *again[] = {(char *)"test_launch", (char *)"as-rank", (char *)"codes",
                            (char *)"77,0", NULL};
    scene.options.on_restart = again;
    scene.options.max_restarts = 3;
    ck_assert_int_eq(run_scene(), STATUS_NUMERICS); // and that is no reason for a third
    ck_assert_int_eq(file_bytes(path), 1);
}
END_TEST

START_TEST(a_program_that_cannot_start_is_said) {
    set_scene(2, "meet", NULL);
    scene.options.program = "/no/such/program";
    scene.options.max_restarts = 2;
    ck_assert_int_eq(run_scene(), 127);
    expect_log("cannot start", true);
    expect_log("restart", false);
}
END_TEST

int main(int argc, char **argv) {
    const TestEntry entries[] = {TEST(alone_without_variables),
                                 TEST(ranks_by_hand),
                                 TEST(half_an_environment_is_refused),
                                 TEST(tasks_of_slurm),
                                 TEST(first_host_of_a_list),
                                 TEST(the_worse_exit_code),
                                 TEST(ranks_meet_through_their_parent),
                                 TEST(lines_of_other_ranks_have_a_name),
                                 TEST(the_worst_code_is_the_exit_code),
                                 TEST(a_failing_rank_ends_the_others),
                                 TEST(signals_reach_all_ranks_once),
                                 TEST(a_signal_to_all_processes_is_one_request),
                                 TEST(a_second_request_ends_them_at_once),
                                 TEST(ranks_save_when_their_parent_dies),
                                 TEST(a_lost_rank_is_started_again),
                                 TEST(a_program_that_cannot_start_is_said)};
    if (argc > 2 && strcmp(argv[1], "as-rank") == 0) return act_as_rank(argc, argv);
    return test_run_("launch", entries, sizeof entries / sizeof entries[0], 120, argc, argv);
}
