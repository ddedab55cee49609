// The program `train`: arguments, then one of dry run, plan, surgery, profile or training.
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/status.h"
#include "train/device.h"
#include "train/recipe.h"
#include "train/recipe_table.h"
#include "train/run.h"

enum { MAX_OVERRIDES = 256, MAX_PROFILE_STEPS = 1000 };

typedef struct Arguments {
    const char *recipe;
    const char *overrides[MAX_OVERRIDES];
    size_t num_overrides;
    char device[64]; // --device as an override, "" for none
    RunOptions run;
    bool dry_run, plan_only, surgery_only;
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
    "  --resume auto            continue from the newest checkpoint, if there is one (default)\n"
    "  --resume never           start from the beginning; older checkpoints are set aside\n"
    "  --resume DIR             continue from this checkpoint or this run's newest one\n"
    "  --dry-run                print recipe, plan, parameters, memory, steps; do nothing\n"
    "  --plan-only              measure and choose the layers to fuse, write the plan, stop\n"
    "  --surgery-only           also write the fused, untrained model to <run>/surgery, stop\n"
    "  --profile N              time N training steps op by op, print the table, stop; uses the\n"
    "                           directory <run>-profile and leaves the run itself alone\n"
    "  --help, --version\n"
    "\n"
    "Exit codes: 0 done, 2 usage, 65 bad data, 66 missing input, 70 internal, 73 cannot write,\n"
    "74 I/O, 75 preempted (run the same command again), 77 numerics, 78 recipe differs from the\n"
    "checkpoint, 93 no progress. docs/troubleshooting.md says more.\n"
    "\n"
    "Settings, as `key = default` of a section in a recipe or `--set section.key=value`\n"
    "(docs/recipe.md):\n";

static const struct option options[] = {
    {"recipe", required_argument, NULL, 'r'},
    {"set", required_argument, NULL, 's'},
    {"device", required_argument, NULL, 'd'},
    {"resume", required_argument, NULL, 'c'},
    {"dry-run", no_argument, NULL, 'n'},
    {"plan-only", no_argument, NULL, 'p'},
    {"surgery-only", no_argument, NULL, 'o'},
    {"profile", required_argument, NULL, 't'},
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

static Status read_profile(const char *text, RunOptions *run) {
    char *end;
    errno = 0;
    long long steps = strtoll(text, &end, 10);
    if (errno || end == text || *end || steps < 1 || steps > MAX_PROFILE_STEPS)
        FAIL(STATUS_USAGE, "--profile %.32s: expected a number of steps from 1 to %d", text,
             MAX_PROFILE_STEPS);
    run->profile_steps = steps;
    return STATUS_OK;
}

static Status read_option(int option, Arguments *arguments) {
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
        return read_profile(optarg, &arguments->run);
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
    return recipe_check(recipe);
}

static Status execute(Arguments *arguments, Recipe *recipe) {
    TRY(load(arguments, recipe));
    if (arguments->dry_run) return dry_run(recipe, 1);
    if (arguments->plan_only) return prepare_only(recipe, STOP_AFTER_PLAN);
    if (arguments->surgery_only) return prepare_only(recipe, STOP_AFTER_SURGERY);
    return run_training(recipe, &arguments->run);
}

int main(int argc, char **argv) {
    static Arguments arguments;
    static Recipe recipe;
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
        status = execute(&arguments, &recipe);
    }
    if (fflush(stdout) != 0 && status == STATUS_OK)
        status = status_fail(__FILE__, __LINE__, STATUS_IO, "cannot write to standard output");
    return status == STATUS_OK ? 0 : status_report(status, "train");
}
