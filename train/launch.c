// The environment of a rank (train/launch.h). A variable that is half right is an error: a rank
// that thought itself alone would train the whole model into the same directory as its neighbours.
#include "train/launch.h"

#include <errno.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SLURM_PORT_BASE = 20000, SLURM_PORTS = 20000, PORT_MAX = 65535 };

static const char *variable(const char *name) {
    const char *text = getenv(name);
    return text && text[0] ? text : NULL;
}

static Status read_number(const char *name, int min, int max, int *out) {
    const char *text = variable(name);
    char *end;
    if (!text) FAIL(STATUS_USAGE, "%s is not set", name);
    errno = 0;
    long value = strtol(text, &end, 10);
    if (errno || end == text || *end || value < min || value > max)
        FAIL(STATUS_USAGE, "%s = %.32s: expected a number from %d to %d", name, text, min, max);
    *out = (int)value;
    return STATUS_OK;
}

static Status read_text(const char *name, char *out, size_t room) {
    const char *text = variable(name);
    if (!text) FAIL(STATUS_USAGE, "%s is not set", name);
    if (strlen(text) >= room)
        FAIL(STATUS_USAGE, "%s: %zu letters, expected at most %zu", name, strlen(text), room - 1);
    strcpy(out, text);
    return STATUS_OK;
}

static Status check_rank(const Launch *launch, const char *rank, const char *world) {
    if (launch->rank < launch->world) return STATUS_OK;
    FAIL(STATUS_USAGE, "%s = %d, but %s = %d: ranks count from 0 to %d", rank, launch->rank, world,
         launch->world, launch->world - 1);
}

// --- By hand, torchrun, or our own parent --------------------------------------------------------

static Status require_all(void) {
    static const char *const names[] = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR",
                                        "MASTER_PORT"};
    char missing[128] = "";
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (variable(names[i])) continue;
        if (missing[0]) strcat(missing, ", ");
        strcat(missing, names[i]);
    }
    if (missing[0])
        FAIL(STATUS_USAGE,
             "RANK or WORLD_SIZE is set, but not %s; set all five of RANK, WORLD_SIZE, LOCAL_RANK, "
             "MASTER_ADDR and MASTER_PORT, or none (docs/cluster.md)",
             missing);
    return STATUS_OK;
}

// torchrun's agent has a store of its own at MASTER_PORT.
static bool agent_has_port(void) {
    const char *agent = variable("TORCHELASTIC_USE_AGENT_STORE");
    return agent && strcmp(agent, "True") == 0;
}

static Status from_hand(Launch *launch) {
    const char *run = variable("TORCHELASTIC_RUN_ID");
    const char *restarts = variable("TORCHELASTIC_RESTART_COUNT");
    TRY(require_all());
    TRY(read_number("WORLD_SIZE", 1, INT_MAX, &launch->world));
    TRY(read_number("RANK", 0, INT_MAX, &launch->rank));
    TRY(read_number("LOCAL_RANK", 0, INT_MAX, &launch->local_rank));
    TRY(read_number("MASTER_PORT", 1, PORT_MAX - 1, &launch->master_port));
    TRY(read_text("MASTER_ADDR", launch->master_host, sizeof launch->master_host));
    if (agent_has_port()) launch->master_port++;
    if (variable(LAUNCH_JOB)) TRY(read_text(LAUNCH_JOB, launch->job, sizeof launch->job));
    if (variable(LAUNCH_LISTENER) && launch->rank == 0)
        TRY(read_number(LAUNCH_LISTENER, 1, INT_MAX, &launch->listener));
    if (!launch->job[0])
        snprintf(launch->job, sizeof launch->job, "%.80s-%.16s", run ? run : "by-hand",
                 restarts ? restarts : "0");
    launch->kind = LAUNCH_HAND;
    return check_rank(launch, "RANK", "WORLD_SIZE");
}

// --- Slurm ---------------------------------------------------------------------------------------

Status launch_first_host(const char *list, char *out, size_t room) {
    size_t prefix = strcspn(list, "[,");
    size_t digits = 0;
    const char *number = list + prefix;
    if (*number == '[') {
        number++;
        digits = strcspn(number, "-,]");
        if (digits == 0 || number[digits] == '\0')
            FAIL(STATUS_USAGE, "host list '%.100s': no number after [", list);
    }
    if (prefix + digits == 0) FAIL(STATUS_USAGE, "host list '%.100s' is empty", list);
    // "rack[1-2]node7": what follows the bracket belongs to the name, too.
    const char *rest = digits ? strchr(number, ']') : NULL;
    size_t suffix = rest ? strcspn(rest + 1, ",") : 0;
    if (suffix > 0 && memchr(rest + 1, '[', suffix))
        FAIL(STATUS_USAGE,
             "host list '%.100s' has two brackets in a name; set MASTER_ADDR to the first host",
             list);
    if (prefix + digits + suffix >= room)
        FAIL(STATUS_USAGE, "host list '%.100s': the first name is too long", list);
    memcpy(out, list, prefix);
    memcpy(out + prefix, number, digits);
    if (suffix) memcpy(out + prefix + digits, rest + 1, suffix);
    out[prefix + digits + suffix] = '\0';
    return STATUS_OK;
}

static Status slurm_master(Launch *launch) {
    const char *list = variable("SLURM_STEP_NODELIST");
    int nodes = 0, job;
    if (!list) list = variable("SLURM_JOB_NODELIST");
    if (variable("SLURM_STEP_NUM_NODES"))
        TRY(read_number("SLURM_STEP_NUM_NODES", 1, INT_MAX, &nodes));
    if (variable("MASTER_ADDR")) {
        TRY(read_text("MASTER_ADDR", launch->master_host, sizeof launch->master_host));
    } else if (nodes == 1) {
        strcpy(launch->master_host, "127.0.0.1");
    } else {
        if (!list) FAIL(STATUS_USAGE, "neither MASTER_ADDR nor SLURM_STEP_NODELIST is set");
        TRY(launch_first_host(list, launch->master_host, sizeof launch->master_host));
    }
    if (variable("MASTER_PORT"))
        return read_number("MASTER_PORT", 1, PORT_MAX, &launch->master_port);
    TRY(read_number("SLURM_JOB_ID", 0, INT_MAX, &job));
    launch->master_port = SLURM_PORT_BASE + job % SLURM_PORTS;
    return STATUS_OK;
}

static Status from_slurm(Launch *launch) {
    // Of the step where there is one: a job may have more tasks than this step.
    const char *tasks = variable("SLURM_STEP_NUM_TASKS") ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS";
    const char *restarts = variable("SLURM_RESTART_COUNT");
    TRY(read_number(tasks, 1, INT_MAX, &launch->world));
    TRY(read_number("SLURM_PROCID", 0, INT_MAX, &launch->rank));
    TRY(read_number("SLURM_LOCALID", 0, INT_MAX, &launch->local_rank));
    TRY(check_rank(launch, "SLURM_PROCID", tasks));
    TRY(slurm_master(launch));
    snprintf(launch->job, sizeof launch->job, "slurm-%.20s.%.20s-%.20s", getenv("SLURM_JOB_ID"),
             getenv("SLURM_STEP_ID"), restarts ? restarts : "0");
    launch->kind = LAUNCH_SLURM;
    return STATUS_OK;
}

// In the batch script and in salloc's shell SLURM_PROCID is set, too; a step's number is not.
static bool is_slurm_task(void) {
    return variable("SLURM_STEP_ID") && variable("SLURM_PROCID") && variable("SLURM_JOB_ID");
}

Status launch_from_environment(Launch *out) {
    *out = (Launch){.kind = LAUNCH_NONE, .world = 1, .listener = -1};
    Status status = STATUS_OK;
    if (variable("RANK") || variable("WORLD_SIZE")) {
        status = from_hand(out);
    } else if (is_slurm_task()) {
        status = from_slurm(out);
        if (status != STATUS_OK) status = status_prefix(status, "started by srun: ");
    }
    return status;
}

bool launch_all_here(void) {
    Launch launch;
    if (getenv(LAUNCH_PARENT)) return true;
    if (launch_from_environment(&launch) == STATUS_OK) return launch.kind == LAUNCH_NONE;
    status_clear();
    return false;
}

int launch_cores_for(int processes) {
    cpu_set_t usable;
    if (sched_getaffinity(0, sizeof usable, &usable) != 0) return 1;
    int each = CPU_COUNT(&usable) / processes;
    return each > 1 ? each : 1;
}
