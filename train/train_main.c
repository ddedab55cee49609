// The program `train`: arguments, then one of dry run, plan, surgery, profile or training; and who
// this process is: a run of its own, a rank that somebody has started, or the parent of ranks.
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/log.h"
#include "base/status.h"
#include "train/device.h"
#include "train/recipe.h"
#include "train/recipe_table.h"
#include "train/run.h"
#include "train/stop_signal.h"
#include "train/supervisor.h"
#include "train/world.h"

enum { MAX_OVERRIDES = 256, MAX_PROFILE_STEPS = 1000, MAX_RESTARTS = 1000000, NUMBER_TEXT = 64 };

typedef struct Arguments {
    const char *recipe;
    const char *overrides[MAX_OVERRIDES];
    size_t num_overrides;
    char device[NUMBER_TEXT];    // --device as an override, "" for none
    char processes[NUMBER_TEXT]; // --processes or --gpus, the same way
    bool on_gpus;                // --gpus
    int max_restarts;
    RunOptions run;
    bool dry_run, plan_only, surgery_only, print_directory;
    bool help, version, markdown;
} Arguments;

static const char usage_text[] =
    "usage: train --recipe FILE [options]\n"
    "\n"
    "Turns a dense language model into a mixture of experts and trains it, as the recipe says.\n"
    "\n"
    "  --recipe FILE            recipe; a bare name is also looked for among the recipes that "
    "come\n"
    "                           with the program\n"
    "  --set section.key=value  overrides the recipe; may be repeated\n"
    "  --device auto|cpu|cuda   the same as --set run.device=...\n"
    "  --processes N            start N ranks on this machine, which train together; the same as\n"
    "                           --set parallel.processes=N. Ranks that srun or torchrun's\n"
    "                           variables start: docs/cluster.md\n"
    "  --gpus N                 the same, each rank on a GPU of its own; default: all visible "
    "ones\n"
    "  --max-restarts N         start the ranks again when one was lost, at most N times\n"
    "  --resume auto            continue from the newest checkpoint, if there is one (default)\n"
    "  --resume never           start from the beginning; older checkpoints are set aside\n"
    "  --resume DIR             continue from this checkpoint or this run's newest one\n"
    "  --dry-run                print recipe, plan, parameters, memory, steps; do nothing\n"
    "  --plan-only              measure and choose the layers to fuse, write the plan, stop\n"
    "  --surgery-only           also write the fused, untrained model to <run>/surgery, stop\n"
    "  --profile N              time N training steps op by op, print the table, stop; uses the\n"
    "                           directory <run>-profile and leaves the run itself alone\n"
    "  --print-directory        print the run's directory, do nothing; for scripts\n"
    "  --help, --version\n"
    "\n"
    "Exit codes: 0 done, 2 usage, 65 bad data, 66 missing input, 70 internal, 73 cannot write,\n"
    "74 I/O, 75 preempted (run the same command again), 76 a rank was lost (the same), 77 "
    "numerics,\n"
    "78 recipe differs from the checkpoint, 93 no progress. docs/troubleshooting.md says more.\n"
    "\n"
    "Settings, as `key = default` of a section in a recipe or `--set section.key=value`\n"
    "(docs/recipe.md):\n";

static const struct option options[] = {
    {"recipe", required_argument, NULL, 'r'},
    {"set", required_argument, NULL, 's'},
    {"device", required_argument, NULL, 'd'},
    {"processes", required_argument, NULL, 'w'},
    {"gpus", required_argument, NULL, 'g'},
    {"max-restarts", required_argument, NULL, 'a'},
    {"resume", required_argument, NULL, 'c'},
    {"dry-run", no_argument, NULL, 'n'},
    {"plan-only", no_argument, NULL, 'p'},
    {"surgery-only", no_argument, NULL, 'o'},
    {"profile", required_argument, NULL, 't'},
    {"print-directory", no_argument, NULL, 'l'},
    {"help", no_argument, NULL, 'h'},
    {"version", no_argument, NULL, 'v'},
    {"print-settings-markdown", no_argument, NULL, 'm'}, // makes docs/recipe.md; not in --help
    {NULL, 0, NULL, 0},
};

static void read_resume(const char *text, RunOptions *run) {
    run->resume = strcmp(text, "auto") == 0    ? RESUME_AUTO
                  : strcmp(text, "never") == 0 ? RESUME_NEVER
                                               : RESUME_FROM;
    run->resume_path = run->resume == RESUME_FROM ? text : NULL;
}

static Status read_number(const char *option, const char *what, int min, int max, int *out) {
    char *end;
    errno = 0;
    long value = strtol(optarg, &end, 10);
    if (errno || end == optarg || *end || value < min || value > max)
        FAIL(STATUS_USAGE, "%s %.32s: expected a number of %s from %d to %d", option, optarg, what,
             min, max);
    *out = (int)value;
    return STATUS_OK;
}

static Status read_ranks(const char *option, Arguments *arguments) {
    int ranks;
    if (arguments->processes[0]) FAIL(STATUS_USAGE, "--processes and --gpus are one choice");
    TRY(read_number(option, "ranks", 1, SUPERVISOR_RANKS_MAX, &ranks));
    snprintf(arguments->processes, NUMBER_TEXT, "parallel.processes=%d", ranks);
    return STATUS_OK;
}

static Status read_option(int option, Arguments *arguments) {
    int steps;
    switch (option) {
    case 'r':
        if (arguments->recipe)
            FAIL(STATUS_USAGE, "--recipe is given twice (%s and %s)", arguments->recipe, optarg);
        arguments->recipe = optarg;
        break;
    case 's':
        if (arguments->num_overrides == MAX_OVERRIDES)
            FAIL(STATUS_USAGE, "more than %d --set; write them into a recipe", MAX_OVERRIDES);
        arguments->overrides[arguments->num_overrides++] = optarg;
        break;
    case 'd':
        if (strlen(optarg) > 16)
            FAIL(STATUS_USAGE, "--device %.32s: expected auto, cpu or cuda", optarg);
        snprintf(arguments->device, sizeof arguments->device, "run.device=%s", optarg);
        break;
    case 'c':
        read_resume(optarg, &arguments->run);
        break;
    case 'n':
        arguments->dry_run = true;
        break;
    case 'p':
        arguments->plan_only = true;
        break;
    case 'o':
        arguments->surgery_only = true;
        break;
    case 't':
        TRY(read_number("--profile", "steps", 1, MAX_PROFILE_STEPS, &steps));
        arguments->run.profile_steps = steps;
        break;
    case 'w':
        return read_ranks("--processes", arguments);
    case 'g':
        arguments->on_gpus = true;
        return read_ranks("--gpus", arguments);
    case 'a':
        return read_number("--max-restarts", "restarts", 0, MAX_RESTARTS, &arguments->max_restarts);
    case 'l':
        arguments->print_directory = true;
        break;
    case 'h':
        arguments->help = true;
        break;
    case 'v':
        arguments->version = true;
        break;
    case 'm':
        arguments->markdown = true;
        break;
    }
    return STATUS_OK;
}

static Status fail_unknown_option(const char *text) {
    const char *nearest = NULL;
    int best = 4; // at most three letters are wrong
    for (const struct option *o = options; o->name; o++) {
        int distance = strncmp(text, "--", 2) == 0 ? name_distance(text + 2, o->name, best) : best;
        if (distance >= best) continue;
        best = distance;
        nearest = o->name;
    }
    if (nearest) FAIL(STATUS_USAGE, "%s is not a valid option; did you mean --%s?", text, nearest);
    FAIL(STATUS_USAGE, "%s is not a valid option; see train --help", text);
}

static Status read_arguments(int argc, char **argv, Arguments *arguments) {
    opterr = 0; // messages are ours
    int option;
    while ((option = getopt_long(argc, argv, ":h", options, NULL)) != -1) {
        const char *text = argv[optind - 1];
        if (option == ':') FAIL(STATUS_USAGE, "%s needs a value; see train --help", text);
        if (option == '?') return fail_unknown_option(text);
        TRY(read_option(option, arguments));
    }
    if (optind < argc)
        FAIL(STATUS_USAGE, "unexpected argument %s; a recipe is given with --recipe %s",
             argv[optind], argv[optind]);
    if (arguments->on_gpus && strcmp(arguments->device, "run.device=cpu") == 0)
        FAIL(STATUS_USAGE, "--gpus and --device cpu exclude each other; ranks on CPUs are "
                           "--processes");
    bool profile = arguments->run.profile_steps > 0;
    if (arguments->dry_run + arguments->plan_only + arguments->surgery_only + profile > 1)
        FAIL(STATUS_USAGE,
             "--dry-run, --plan-only, --surgery-only and --profile exclude each other");
    return STATUS_OK;
}

static Status load(Arguments *arguments, Recipe *recipe) {
    if (!arguments->recipe)
        FAIL(STATUS_USAGE, "no recipe given; try train --recipe quickstart_dense.ini, or --help");
    TRY(recipe_load(arguments->recipe, arguments->overrides, arguments->num_overrides, recipe));
    if (arguments->device[0]) TRY(recipe_set(recipe, arguments->device));
    if (arguments->processes[0]) TRY(recipe_set(recipe, arguments->processes));
    if (arguments->on_gpus) TRY(recipe_set(recipe, "run.device=cuda"));
    return recipe_check(recipe);
}

// Where rank 0 hung so that it did not hear the second request, either.
static void record_second_request(const Recipe *recipe, const SupervisorEnd *end) {
    char name[RECIPE_TEXT_MAX], message[128];
    Status status = recipe_run_name(recipe, name, sizeof name);
    snprintf(message, sizeof message,
             "killed after a second signal (%s); the same command continues",
             stop_signal_name_of(end->insisted));
    if (status == STATUS_OK)
        status = rundir_close_attempt(recipe->run_directory, name, (long)end->first, "preempted",
                                      STATUS_PREEMPTED, message);
    if (status == STATUS_OK) return;
    log_warn("run_status.json could not be written: %s", status_message());
    status_clear();
}

// The ranks of this machine, started with our own arguments. A restart continues what the start
// before it has left, also where that one was told to begin anew.
static Status start_ranks(const Arguments *arguments, const Recipe *recipe, int ranks, int argc,
                          char **argv, int *exit_code) {
    static char resume[] = "--resume", automatic[] = "auto";
    if (arguments->on_gpus) {
        Status status = device_check(&(DeviceOptions){.choice = DEVICE_CUDA});
        if (status != STATUS_OK) return status_prefix(status, "--gpus: ");
    }
    char **again = calloc((size_t)argc + 3, sizeof *again);
    if (!again) FAIL(STATUS_INTERNAL, "out of memory for the arguments");
    memcpy(again, argv, (size_t)argc * sizeof *again);
    if (arguments->run.resume == RESUME_NEVER) {
        again[argc] = resume;
        again[argc + 1] = automatic;
    }
    const SupervisorOptions supervisor = {.processes = ranks,
                                          .max_restarts = arguments->max_restarts,
                                          .arguments = argv,
                                          .on_restart = again};
    SupervisorEnd end;
    Status status = supervise(&supervisor, &end);
    free(again);
    *exit_code = end.exit_code;
    if (end.insisted) record_second_request(recipe, &end);
    return status;
}

static Status print_directory(const Recipe *recipe) {
    char name[RECIPE_TEXT_MAX];
    TRY(recipe_run_name(recipe, name, sizeof name));
    printf("%s/%s\n", recipe->run_directory, name);
    return STATUS_OK;
}

static bool only_prints(const Arguments *arguments) {
    return arguments->dry_run || arguments->plan_only || arguments->surgery_only;
}

// *exit_code is what the ranks' ends mean where this process is their parent, whose messages have
// been printed by them.
static Status execute(Arguments *arguments, Recipe *recipe, int argc, char **argv, int *exit_code) {
    Launch launch;
    if (!arguments->print_directory && !only_prints(arguments)) stop_signal_hold();
    TRY(load(arguments, recipe));
    if (arguments->print_directory) return print_directory(recipe);
    TRY(launch_from_environment(&launch));
    if (launch.kind == LAUNCH_HAND && arguments->processes[0] && !getenv(LAUNCH_PARENT))
        FAIL(STATUS_USAGE,
             "RANK is set: this is one of %d ranks that somebody starts, and "
             "--processes and --gpus start ranks; unset RANK and its kin, or leave "
             "them out",
             launch.world);
    int ranks = launch.kind == LAUNCH_NONE ? prepare_ranks(recipe) : launch.world;
    if (only_prints(arguments) && launch.rank > 0) return STATUS_OK; // rank 0 does it
    if (arguments->dry_run) return dry_run(recipe, ranks);
    if (arguments->plan_only) return prepare_only(recipe, STOP_AFTER_PLAN);
    if (arguments->surgery_only) return prepare_only(recipe, STOP_AFTER_SURGERY);
    bool alone = ranks == 1 && arguments->max_restarts == 0;
    if (launch.kind == LAUNCH_NONE && !alone)
        return start_ranks(arguments, recipe, ranks, argc, argv, exit_code);
    return world_run_training(&launch, recipe, &arguments->run);
}

int main(int argc, char **argv) {
    static Arguments arguments;
    static Recipe recipe;
    int exit_code = 0;
    Status status = read_arguments(argc, argv, &arguments);
    if (status != STATUS_OK) return status_report(status, "train");
    if (arguments.help) {
        fputs(usage_text, stdout);
        recipe_print_help(stdout);
    } else if (arguments.version) {
        printf("dense2moe train %s (backends: %s)\n", D2M_VERSION, device_backends());
    } else if (arguments.markdown) {
        recipe_print_markdown(stdout);
    } else {
        status = execute(&arguments, &recipe, argc, argv, &exit_code);
    }
    if (fflush(stdout) != 0 && status == STATUS_OK)
        status = status_fail(__FILE__, __LINE__, STATUS_IO, "cannot write to standard output");
    return status == STATUS_OK ? exit_code : status_report(status, "train");
}
