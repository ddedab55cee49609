// The program `train` as several ranks: started by itself, by hand as torchrun's users do, and by
// Slurm's variables; with everything that may go wrong around them. What the ranks compute together
// is the business of test_data_parallel.
#include "tests/tiny_run.h"

#include <sys/stat.h>
#include "base/clock.h"
#include "base/net.h"

enum { PROCESSES_MAX = 4, ARGUMENTS_MAX = 24 };

// --- Processes of the program --------------------------------------------------------------------

typedef struct Program {
    pid_t pid;
    int code;
    double seconds;
    char output[128]; // a file, of stdout and stderr
} Program;

static char recipe_path[128];

// The recipe as a file, with what makes ranks quick to give up.
static void write_recipe(const char *name, int steps) {
    char *text;
    Recipe recipe = tiny_dense_recipe(name);
    tiny_set(&recipe, "train.steps=%d", steps);
    tiny_set(&recipe, "parallel.hang_seconds=2");
    tiny_set(&recipe, "parallel.start_seconds=4");
    ck_assert_ok(recipe_print(&recipe, &text));
    snprintf(recipe_path, sizeof recipe_path, "%s/%s.ini", test_directory(), name);
    ck_assert_ok(io_write_file_atomic(recipe_path, text, strlen(text)));
    free(text);
}

static int waiting_signal; // that the next program finds waiting for it; 0: none

static void leave_signal(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, waiting_signal);
    if (waiting_signal && (sigprocmask(SIG_BLOCK, &set, NULL) || raise(waiting_signal))) _exit(99);
}

// `environment` is "NAME=value ...", `arguments` words after --recipe FILE; `folder` to start in.
static Program start_program(const char *environment, const char *arguments, const char *folder) {
    static int count;
    Program program = {0};
    snprintf(program.output, sizeof program.output, "%s/output%d", test_directory(), count++);
    program.seconds = clock_seconds();
    int fd = open(program.output, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    ck_assert_int_ge(fd, 0);
    program.pid = fork();
    ck_assert_int_ge(program.pid, 0);
    if (program.pid > 0) {
        close(fd);
        return program;
    }
    char words[2][1024], *save,
        *argv[ARGUMENTS_MAX] = {(char *)"train", (char *)"--recipe", recipe_path};
    int argc = 3;
    snprintf(words[0], sizeof words[0], "%s", environment);
    snprintf(words[1], sizeof words[1], "%s", arguments);
    for (char *word = strtok_r(words[0], " ", &save); word; word = strtok_r(NULL, " ", &save))
        putenv(word);
    for (char *word = strtok_r(words[1], " ", &save); word; word = strtok_r(NULL, " ", &save))
        argv[argc++] = word;
    setenv("DENSE2MOE_LOG", "info", 1);
    if (dup2(fd, 1) != 1 || dup2(fd, 2) != 2 || (folder && chdir(folder) != 0)) _exit(99);
    leave_signal();
    execv(TEST_BINARY_DIR "/bin/train", argv);
    _exit(98);
}

static void finish_program(Program *program) {
    program->code = tiny_wait(program->pid);
    program->seconds = clock_seconds() - program->seconds;
}

static char *output_of(const Program *program) {
    char *text;
    size_t bytes;
    ck_assert_ok(io_read_file(program->output, 1 << 22, &text, &bytes));
    return text;
}

#define expect_program(program, exit_code, text)                                                   \
    do {                                                                                           \
        char *output_ = output_of(program);                                                        \
        ck_assert_msg((program)->code == (exit_code), "exit code %d, expected %d: %s",             \
                      (program)->code, (int)(exit_code), output_);                                 \
        ck_assert_msg(strstr(output_, (text)) != NULL, "'%s' lacks '%s'", output_, (text));        \
        free(output_);                                                                             \
    } while (0)

// Rank 0 has said why for all of them.
static void expect_quiet(const Program *program, Status code) {
    char *output = output_of(program);
    ck_assert_msg(program->code == (int)code, "exit code %d, expected %d: %s", program->code,
                  (int)code, output);
    ck_assert_msg(strstr(output, "error:") == NULL, "one message is enough: '%s'", output);
    free(output);
}

static Program run_program(const char *environment, const char *arguments) {
    Program program = start_program(environment, arguments, NULL);
    finish_program(&program);
    return program;
}

// Processes of this test's program whose environment has RANK=rank; the parent for -1.
static pid_t find_rank(const Program *program, int rank) {
    char path[64], wanted[32], text[16384];
    if (rank < 0) return program->pid;
    snprintf(wanted, sizeof wanted, "RANK=%d", rank);
    snprintf(path, sizeof path, "/proc/%d/task/%d/children", (int)program->pid, (int)program->pid);
    FILE *children = fopen(path, "r");
    ck_assert_ptr_nonnull(children);
    for (int child, found = 0; !found && fscanf(children, "%d", &child) == 1;) {
        snprintf(path, sizeof path, "/proc/%d/environ", child);
        FILE *file = fopen(path, "r");
        size_t bytes = file ? fread(text, 1, sizeof text - 1, file) : 0;
        if (file) fclose(file);
        text[bytes] = '\0';
        for (char *at = text; at < text + bytes; at += strlen(at) + 1)
            if (strcmp(at, wanted) == 0) found = child;
        if (!found) continue;
        fclose(children);
        return (pid_t)found;
    }
    ck_abort_msg("no rank %d", rank);
}

// Until the program says that it is at work on a step.
static void wait_for_steps(const Program *program) {
    for (double end = clock_seconds() + 20; clock_seconds() < end; usleep(10000)) {
        char *output = output_of(program);
        bool there = strstr(output, "info: step 6/") != NULL;
        free(output);
        if (there) return;
    }
    ck_abort_msg("no steps: %s", output_of(program));
}

static void disturb(Program *program, int rank, int number) {
    wait_for_steps(program);
    kill(find_rank(program, rank), number);
    double now = clock_seconds();
    finish_program(program);
    program->seconds = clock_seconds() - now; // since then
}

// The bits of the final weights.
static void expect_same_weights(const char *a, const char *b) {
    char x[HASH_HEX_SIZE], y[HASH_HEX_SIZE];
    ck_assert_int_eq(tiny_newest(a, "model.safetensors", x),
                     tiny_newest(b, "model.safetensors", y));
    ck_assert_str_eq(x, y);
}

static void expect_status(const char *name, const char *state, Status code, const char *text) {
    json_t *root;
    ck_assert_ok(json_read_file(tiny_run_path(name, "run_status.json"), 1 << 20, &root));
    ck_assert_str_eq(json_string_value(json_object_get(root, "state")), state);
    ck_assert_int_eq(json_integer_value(json_object_get(root, "code")), code);
    const char *message = json_string_value(json_object_get(root, "message"));
    ck_assert_msg(strstr(message, text) != NULL, "'%s' lacks '%s'", message, text);
    json_decref(root);
}

// --- Started by itself ---------------------------------------------------------------------------

enum { LONG_STEPS = 200 };

START_TEST(ranks_of_one_machine) {
    tiny_prepare();
    write_recipe("alone", TINY_STEPS);
    Program program = run_program("", "--set parallel.pairwise=true");
    expect_program(&program, STATUS_OK, "done: 40 steps");
    write_recipe("two", TINY_STEPS);
    program = run_program("", "--processes 2 --set parallel.pairwise=true");
    expect_program(&program, STATUS_OK, "ranks: 2");
    expect_same_weights("alone", "two");
}
END_TEST

START_TEST(a_killed_rank_ends_the_run_or_restarts_it) {
    tiny_prepare();
    write_recipe("whole", LONG_STEPS);
    Program program = run_program("", "--processes 2");
    expect_program(&program, STATUS_OK, "done: 200 steps");
    for (int rank = 0; rank < 2; rank++) {
        char name[16];
        snprintf(name, sizeof name, "killed%d", rank);
        write_recipe(name, LONG_STEPS);
        program = start_program("", "--processes 2", NULL);
        disturb(&program, rank, SIGKILL);
        expect_program(&program, STATUS_COMMUNICATION, "was killed by signal 9");
        ck_assert_double_lt(program.seconds, 5);
        program = start_program("", "--processes 2 --max-restarts 1 --resume auto", NULL);
        finish_program(&program); // the same command continues
        expect_program(&program, STATUS_OK, "done: 200 steps");
        expect_same_weights("whole", name);
    }
    write_recipe("restarted", LONG_STEPS);
    program = start_program("", "--processes 2 --max-restarts 1 --resume never", NULL);
    disturb(&program, 1, SIGKILL);
    expect_program(&program, STATUS_OK, "restart 1 of 1");
    expect_program(&program, STATUS_OK, "done: 200 steps");
    expect_same_weights("whole", "restarted");
}
END_TEST

START_TEST(a_stopped_rank_ends_the_run_in_time) {
    tiny_prepare();
    write_recipe("stopped", 100000);
    Program program = start_program("", "--processes 2", NULL);
    disturb(&program, 1, SIGSTOP);
    expect_program(&program, STATUS_COMMUNICATION, "has not moved a byte");
    expect_program(&program, STATUS_COMMUNICATION, "rank 1 (");
    ck_assert_double_lt(program.seconds, 20); // 2 s to notice, 10 to leave
}
END_TEST

START_TEST(a_request_to_stop_saves_on_all_ranks) {
    static const int signals[] = {SIGTERM, SIGUSR1, SIGINT};
    static const char *const names[] = {"SIGTERM", "SIGUSR1", "SIGINT"};
    tiny_prepare();
    write_recipe("whole", LONG_STEPS);
    Program program = run_program("", "--processes 2");
    expect_program(&program, STATUS_OK, "done");
    for (int i = 0; i < 3; i++) {
        char name[16], text[64];
        snprintf(name, sizeof name, "asked%d", i);
        snprintf(text, sizeof text, "stopped by %s at step", names[i]);
        write_recipe(name, LONG_STEPS);
        program = start_program("", "--processes 2", NULL);
        disturb(&program, -1, signals[i]);
        expect_program(&program, STATUS_PREEMPTED, text);
        program = run_program("", "--processes 2");
        expect_program(&program, STATUS_OK, "done: 200 steps");
        expect_same_weights("whole", name);
    }
}
END_TEST

// The signal is there before the program is.
START_TEST(a_request_before_anything_stops_before_the_first_step) {
    static const char *const processes[] = {"--processes 1", "--processes 2"};
    tiny_prepare();
    for (int i = 0; i < 2; i++) {
        char name[16];
        snprintf(name, sizeof name, "early%d", i);
        write_recipe(name, TINY_STEPS);
        waiting_signal = SIGUSR1;
        Program program = run_program("", processes[i]);
        waiting_signal = 0;
        expect_program(&program, STATUS_PREEMPTED, "stopped by SIGUSR1 at step 0 of 40");
        expect_status(name, "preempted", STATUS_PREEMPTED, "stopped by SIGUSR1");
        program = run_program("", processes[i]);
        expect_program(&program, STATUS_OK, "done: 40 steps");
    }
}
END_TEST

// One rank hears nothing, the other waits for it in a collective. Which of them keeps the record
// makes no difference.
START_TEST(a_second_request_ends_ranks_that_hang) {
    tiny_prepare();
    for (int rank = 0; rank < 2; rank++) {
        char name[16];
        snprintf(name, sizeof name, "hangs%d", rank);
        write_recipe(name, 100000);
        Program program = start_program("", "--processes 2 --set parallel.hang_seconds=60", NULL);
        wait_for_steps(&program);
        kill(find_rank(&program, rank), SIGSTOP);
        usleep(100000);
        kill(program.pid, SIGTERM);
        usleep(2300000);
        kill(program.pid, SIGTERM);
        finish_program(&program);
        expect_program(&program, STATUS_PREEMPTED, "did not notice the end of the run");
        expect_status(name, "preempted", STATUS_PREEMPTED, "second signal (SIGTERM)");
        program = start_program("", "--processes 2 --set parallel.hang_seconds=60", NULL);
        disturb(&program, -1, SIGUSR1); // it can be started again
        expect_program(&program, STATUS_PREEMPTED, "stopped by SIGUSR1");
        expect_status(name, "preempted", STATUS_PREEMPTED, "stopped by SIGUSR1");
    }
}
END_TEST

// --- Started by others ---------------------------------------------------------------------------

static int free_port(void) {
    int fd, port;
    ck_assert_ok(net_listen("127.0.0.1", 0, &fd, &port));
    net_close(fd);
    return port;
}

typedef struct RankStart {
    const char *environment, *arguments, *folder;
} RankStart;

// One process per rank, by hand; NULL members as for all.
static void run_by_hand(Program *programs, int world, int port, const RankStart *starts) {
    char environment[512];
    for (int rank = 0; rank < world; rank++) {
        const RankStart *start = &starts[rank];
        snprintf(environment, sizeof environment,
                 "RANK=%d WORLD_SIZE=%d LOCAL_RANK=%d MASTER_ADDR=127.0.0.1 MASTER_PORT=%d %s",
                 rank, world, rank, port, start->environment ? start->environment : "");
        programs[rank] =
            start_program(environment, start->arguments ? start->arguments : "", start->folder);
    }
    for (int rank = 0; rank < world; rank++) finish_program(&programs[rank]);
}

START_TEST(ranks_by_hand_and_by_slurms_variables) {
    Program programs[PROCESSES_MAX];
    RankStart starts[PROCESSES_MAX] = {{0}};
    char environment[256];
    tiny_prepare();
    write_recipe("itself", TINY_STEPS);
    Program program = run_program("", "--processes 2");
    expect_program(&program, STATUS_OK, "done");
    write_recipe("hand", TINY_STEPS);
    run_by_hand(programs, 2, free_port(), starts);
    expect_program(&programs[0], STATUS_OK, "done: 40 steps");
    ck_assert_int_eq(programs[1].code, STATUS_OK);
    expect_same_weights("itself", "hand");
    write_recipe("slurm", TINY_STEPS);
    for (int rank = 0; rank < 2; rank++) {
        snprintf(environment, sizeof environment,
                 "SLURM_JOB_ID=77 SLURM_STEP_ID=0 SLURM_PROCID=%d SLURM_LOCALID=%d SLURM_NTASKS=2 "
                 "SLURM_STEP_NUM_NODES=1 SLURM_STEP_NODELIST=lab1 MASTER_PORT=%d",
                 rank, rank, 15000 + getpid() % 10000);
        programs[rank] = start_program(environment, "", NULL);
    }
    for (int rank = 0; rank < 2; rank++) finish_program(&programs[rank]);
    expect_program(&programs[0], STATUS_OK, "done: 40 steps");
    expect_same_weights("itself", "slurm");
}
END_TEST

// Rank 0 is asked while it waits for rank 1, as when a scheduler is faster than a node.
START_TEST(a_request_before_the_ranks_have_met_stops_all) {
    Program programs[2];
    char environment[2][256];
    tiny_prepare();
    write_recipe("unmet", TINY_STEPS);
    const int port = free_port();
    for (int rank = 0; rank < 2; rank++)
        snprintf(environment[rank], sizeof environment[rank],
                 "RANK=%d WORLD_SIZE=2 LOCAL_RANK=%d MASTER_ADDR=127.0.0.1 MASTER_PORT=%d", rank,
                 rank, port);
    waiting_signal = SIGTERM;
    programs[0] = start_program(environment[0], "", NULL);
    waiting_signal = 0;
    usleep(300000);
    programs[1] = start_program(environment[1], "", NULL);
    for (int rank = 0; rank < 2; rank++) finish_program(&programs[rank]);
    expect_program(&programs[0], STATUS_PREEMPTED, "info: SIGTERM; the run stops");
    expect_program(&programs[0], STATUS_PREEMPTED, "stopped by SIGTERM at step 0 of 40");
    ck_assert_int_eq(programs[1].code, STATUS_PREEMPTED);
    expect_status("unmet", "preempted", STATUS_PREEMPTED, "stopped by SIGTERM");
}
END_TEST

START_TEST(ranks_that_differ_say_so) {
    Program programs[PROCESSES_MAX];
    tiny_prepare();
    write_recipe("differ", TINY_STEPS);
    // Another recipe, another option, a file that one of them does not find.
    const RankStart recipe[] = {{0}, {.arguments = "--set optim.lr=1e-3"}, {0}};
    run_by_hand(programs, 3, free_port(), recipe);
    expect_program(&programs[0], STATUS_USAGE, "rank 1 (");
    expect_program(&programs[0], STATUS_USAGE, "has optim.lr = 0.001 (rank 0: 0.003)");
    expect_quiet(&programs[1], STATUS_USAGE);
    expect_quiet(&programs[2], STATUS_USAGE);
    const RankStart option[] = {{0}, {.arguments = "--resume never"}};
    run_by_hand(programs, 2, free_port(), option);
    expect_program(&programs[0], STATUS_USAGE, "has --resume = never (rank 0: auto)");
    expect_quiet(&programs[1], STATUS_USAGE);
    char shards[256], link[256];
    snprintf(link, sizeof link, "%s/here", test_directory());
    ck_assert_int_eq(mkdir(link, 0777), 0);
    snprintf(shards, sizeof shards, "%s/here/shards", test_directory());
    ck_assert_int_eq(symlink(tiny_train_, shards), 0);
    const RankStart file[] = {{.arguments = "--set data.train=shards", .folder = link},
                              {.arguments = "--set data.train=shards", .folder = "/"}};
    run_by_hand(programs, 2, free_port(), file);
    expect_program(&programs[0], STATUS_MISSING_INPUT, "shards");
    expect_program(&programs[0], STATUS_MISSING_INPUT, "rank 1 (");
    expect_quiet(&programs[1], STATUS_MISSING_INPUT);
    ck_assert(!io_exists(tiny_run_path("differ", ""))); // nothing was left behind
}
END_TEST

START_TEST(a_start_that_cannot_be_ends_in_time) {
    Program programs[PROCESSES_MAX];
    char environment[256];
    int fd, port;
    tiny_prepare();
    write_recipe("missing", TINY_STEPS);
    // Rank 1 of three never comes.
    port = free_port();
    for (int i = 0; i < 2; i++) {
        snprintf(environment, sizeof environment,
                 "RANK=%d WORLD_SIZE=3 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=%d", 2 * i,
                 port);
        programs[i] = start_program(environment, "", NULL);
    }
    for (int i = 0; i < 2; i++) {
        finish_program(&programs[i]);
        ck_assert_double_lt(programs[i].seconds, 12);
    }
    expect_program(&programs[0], STATUS_COMMUNICATION, "1 of 3 ranks have not come: rank 1");
    expect_quiet(&programs[1], STATUS_COMMUNICATION);
    // The port is taken, the master is not there, the variables are not complete.
    ck_assert_ok(net_listen("127.0.0.1", 0, &fd, &port));
    snprintf(environment, sizeof environment,
             "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=%d", port);
    programs[0] = run_program(environment, "");
    expect_program(&programs[0], STATUS_USAGE, "is taken by another process");
    net_close(fd);
    snprintf(environment, sizeof environment,
             "RANK=1 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=%d", port);
    programs[0] = run_program(environment, "");
    expect_program(&programs[0], STATUS_COMMUNICATION, "cannot be reached");
    ck_assert_double_lt(programs[0].seconds, 12);
    programs[0] = run_program("RANK=1 WORLD_SIZE=2", "");
    expect_program(&programs[0], STATUS_USAGE, "MASTER_ADDR, MASTER_PORT");
    // More ranks than the batch can be shared among.
    programs[0] = run_program("", "--processes 3");
    expect_program(&programs[0], STATUS_USAGE, "train.global_batch = 4");
}
END_TEST

TEST_MAIN_TIMEOUT("world", 300, TEST(ranks_of_one_machine),
                  TEST(a_killed_rank_ends_the_run_or_restarts_it),
                  TEST(a_stopped_rank_ends_the_run_in_time),
                  TEST(a_request_to_stop_saves_on_all_ranks),
                  TEST(a_second_request_ends_ranks_that_hang),
                  TEST(a_request_before_anything_stops_before_the_first_step),
                  TEST(a_request_before_the_ranks_have_met_stops_all),
                  TEST(ranks_by_hand_and_by_slurms_variables), TEST(ranks_that_differ_say_so),
                  TEST(a_start_that_cannot_be_ends_in_time))
