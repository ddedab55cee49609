// From a rank's environment to the end of its training (train/world.h).
//
// Ranks meet before anything else that can fail, so that a failure on one of them reaches the
// others as a message and not as a time-out. What must be equal is compared at the door: the
// resolved recipe with the options that change what a run does, and the program itself. (The
// training shards are compared when they are open: train/run_ranks.c.)
#include "train/world.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/hash.h"
#include "base/log.h"
#include "train/device.h"
#include "train/rendezvous.h"
#include "train/stop_signal.h"

enum { WHY_MAX = 500 };

typedef struct World {
    const Launch *launch;
    Rendezvous *rendezvous;
    Communicator *communicator;
    Backend *backend;
    unsigned char id[DEVICE_ID_BYTES]; // train/device.h
} World;

// --- What must be equal --------------------------------------------------------------------------

// The resolved recipe and the options that change what a run does, as lines. malloc'ed.
static Status describe_run(const Recipe *recipe, const RunOptions *options, char **out) {
    char *text;
    TRY(recipe_print(recipe, &text));
    const char *resume = options->resume == RESUME_AUTO    ? "auto"
                         : options->resume == RESUME_NEVER ? "never"
                                                           : options->resume_path;
    int bytes = asprintf(out, "%s\n[command line]\n--resume = %s\n--profile = %" PRId64 "\n", text,
                         resume, options->profile_steps);
    free(text);
    if (bytes < 0) FAIL(STATUS_INTERNAL, "out of memory for the recipe");
    return STATUS_OK;
}

static Status meet(World *world, const Recipe *recipe, const RunOptions *options) {
    const Launch *launch = world->launch;
    char recipe_hex[HASH_HEX_SIZE], build_hex[HASH_HEX_SIZE], *text;
    uint64_t bytes;
    TRY(hash_file("/proc/self/exe", build_hex, &bytes, NULL, NULL));
    TRY(describe_run(recipe, options, &text));
    hash_to_hex(hash_bytes(text, strlen(text)), recipe_hex);
    const RendezvousOptions rendezvous = {.rank = launch->rank,
                                          .world = launch->world,
                                          .master_host = launch->master_host,
                                          .master_port = launch->master_port,
                                          .job = launch->job,
                                          .recipe = recipe_hex,
                                          .recipe_text = text,
                                          .build = build_hex,
                                          .timeout_seconds = recipe->parallel_start_seconds,
                                          .mesh = true,
                                          .listener = launch->listener};
    Status status = rendezvous_join(&rendezvous, &world->rendezvous);
    free(text);
    return status;
}

// --- What may be wrong on one rank only ----------------------------------------------------------

typedef struct Outcome {
    int32_t code;
    char why[WHY_MAX];
} Outcome;

static Status fail_for_all(const World *world, const Outcome *outcomes) {
    int first = 0, failed = 0;
    for (int r = world->launch->world - 1; r >= 0; r--) {
        if (outcomes[r].code == STATUS_OK) continue;
        first = r;
        failed++;
    }
    const Outcome *own = &outcomes[world->launch->rank];
    if (own->code == outcomes[first].code && strcmp(own->why, outcomes[first].why) == 0)
        return (Status)own->code; // has its own record
    status_clear();
    FAIL((Status)outcomes[first].code, "%srank %d (%s): %s", failed > 1 ? "several ranks; " : "",
         first, rendezvous_name(world->rendezvous, first), outcomes[first].why);
}

// How `status` went on all ranks: the failure of the first that failed is everybody's.
static Status agree(const World *world, const char *what, Status status) {
    const int ranks = world->launch->world;
    Outcome own = {.code = (int32_t)status};
    StatusRecord record;
    status_take(&record);
    if (status != STATUS_OK) snprintf(own.why, sizeof own.why, "%.*s", WHY_MAX - 1, record.message);
    Outcome *all = calloc((size_t)ranks, sizeof *all);
    if (!all) FAIL(STATUS_INTERNAL, "out of memory for what %d ranks say", ranks);
    Status agreed = rendezvous_all_gather(world->rendezvous, what, &own, sizeof own, all);
    bool failed = false;
    for (int r = 0; r < ranks && agreed == STATUS_OK; r++) {
        all[r].why[WHY_MAX - 1] = '\0';
        failed |= all[r].code != STATUS_OK;
    }
    if (failed) {
        status_put(&record);
        agreed = fail_for_all(world, all);
        if (world->launch->rank > 0) status_told(); // by rank 0
    }
    free(all);
    return agreed;
}

// --- The run -------------------------------------------------------------------------------------

// All ranks must have the same kind of device; that of rank 0 also makes the id that GPUs find each
// other by.
static Status agree_on_devices(World *world) {
    Status status = STATUS_OK;
    TRY(rendezvous_agree(world->rendezvous, "backend", world->backend->name,
                         "set run.device, or start only ranks that have a GPU"));
    if (world->launch->rank == 0) status = device_communicator_id(world->backend, world->id);
    TRY(agree(world, "communicator", status));
    return rendezvous_broadcast(world->rendezvous, "communicator id", world->id, sizeof world->id);
}

// How many ranks are on this one's host; their names begin with it.
static int ranks_here(const World *world) {
    const char *own = rendezvous_name(world->rendezvous, world->launch->rank);
    const size_t host = strcspn(own, ",") + 1;
    int count = 0;
    for (int r = 0; r < world->launch->world; r++)
        count += strncmp(rendezvous_name(world->rendezvous, r), own, host) == 0;
    return count;
}

// Ranks that somebody has started by hand, and not bound to cores, share those of their host.
// (Slurm binds its tasks; the parent of ranks has told them.)
static Status open_backend(World *world, const Recipe *recipe) {
    const bool told = recipe->run_threads > 0 || getenv("OMP_NUM_THREADS");
    Recipe *own = malloc(sizeof *own);
    if (!own) FAIL(STATUS_INTERNAL, "out of memory for the recipe");
    *own = *recipe;
    if (!told && world->launch->kind == LAUNCH_HAND)
        own->run_threads = launch_cores_for(ranks_here(world));
    Status status = prepare_backend(own, world->launch->local_rank, &world->backend);
    free(own);
    return status;
}

static Status connect_ranks(World *world, const Recipe *recipe) {
    const Launch *launch = world->launch;
    const int ranks = launch->world;
    int *sockets = calloc((size_t)ranks, sizeof *sockets);
    const char **names = calloc((size_t)ranks, sizeof *names);
    Status status = STATUS_OK;
    if (!sockets || !names) FAIL_GOTO(done, STATUS_INTERNAL, "out of memory for %d ranks", ranks);
    for (int r = 0; r < ranks; r++) names[r] = rendezvous_name(world->rendezvous, r);
    TRY_GOTO(rendezvous_take_mesh(world->rendezvous, sockets), done);
    const CommunicatorLinks links = {
        .rank = launch->rank, .world = ranks, .sockets = sockets, .names = names};
    const CommunicatorOptions options = {.timeout_seconds = recipe->parallel_hang_seconds,
                                         .tree = recipe->parallel_pairwise};
    status = device_communicator(world->backend, world->id, &links, &options, &world->communicator);
    for (int r = 0; r < ranks && status != STATUS_OK; r++) net_close(sockets[r]);
done:
    free(sockets);
    free(names);
    return status;
}

static Status train(World *world, const Recipe *recipe, const RunOptions *options) {
    TRY(meet(world, recipe, options));
    log_debug("rank %d of %d has met the others", world->launch->rank, world->launch->world);
    TRY(agree(world, "inputs", prepare_check_inputs(recipe)));
    TRY(agree(world, "devices", open_backend(world, recipe)));
    TRY(agree_on_devices(world));
    TRY(agree(world, "connections", connect_ranks(world, recipe)));
    RunOptions connected = *options;
    connected.communicator = world->communicator;
    connected.local_rank = world->launch->local_rank;
    return run_training_on(world->backend, recipe, &connected);
}

// A scheduler may end all ranks as soon as one has ended with a code other than 0 (srun
// --kill-on-bad-exit), so none of those that have saved leaves before rank 0 has written what there
// is to write.
static void leave_together(const World *world) {
    StatusRecord record;
    status_take(&record);
    char *all = calloc((size_t)world->launch->world, 1), own = 1;
    if (all && rendezvous_all_gather(world->rendezvous, "the end", &own, 1, all) != STATUS_OK)
        log_debug("%s", status_message());
    free(all);
    status_put(&record);
}

static Status run_one_of_several(const Launch *launch, const Recipe *recipe,
                                 const RunOptions *options) {
    World world = {.launch = launch};
    Status status = train(&world, recipe, options);
    if (status == STATUS_PREEMPTED) leave_together(&world);
    communicator_destroy(world.communicator);
    backend_destroy(world.backend);
    rendezvous_close(world.rendezvous);
    return status;
}

// A rank that is asked to stop while it waits for the others comes to the run with them: then all
// end in the same way.
Status world_run_training(const Launch *launch, const Recipe *recipe, const RunOptions *options) {
    if (launch->world == 1) return run_training(recipe, options);
    stop_signal_install(launch->rank == 0);
    Status status = run_one_of_several(launch, recipe, options);
    stop_signal_restore();
    return status;
}
