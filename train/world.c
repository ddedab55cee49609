// From a rank's environment to the end of its training (train/world.h).
//
// Ranks meet before anything else that can fail, so that a failure on one of them reaches the
// others as a message and not as a time-out. What must be equal is compared at the door: the
// resolved recipe with the options that change what a run does, and the program itself. (The
// training shards are compared when they are open: train/run_ranks.c.)
#include "train/world.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/hash.h"
#include "base/log.h"
#include "train/rendezvous.h"

enum { WHY_MAX = 500 };

typedef struct World {
    const Launch *launch;
    Rendezvous *rendezvous;
    Communicator *communicator;
    Backend *backend;
} World;

// --- What must be equal --------------------------------------------------------------------------

static Status hash_recipe(const Recipe *recipe, const RunOptions *options,
                          char hex[HASH_HEX_SIZE]) {
    char *text = NULL;
    HashStream *stream;
    TRY(recipe_print(recipe, &text));
    Status status = hash_stream_create(&stream);
    if (status == STATUS_OK) {
        const char *from = options->resume == RESUME_FROM ? options->resume_path : "";
        hash_stream_update(stream, text, strlen(text));
        hash_stream_update(stream, &options->resume, sizeof options->resume);
        hash_stream_update(stream, from, strlen(from));
        hash_stream_update(stream, &options->profile_steps, sizeof options->profile_steps);
        hash_to_hex(hash_stream_digest(stream), hex);
        hash_stream_free(stream);
    }
    free(text);
    return status;
}

static Status meet(World *world, const Recipe *recipe, const RunOptions *options) {
    const Launch *launch = world->launch;
    char recipe_hex[HASH_HEX_SIZE], build_hex[HASH_HEX_SIZE];
    uint64_t bytes;
    TRY(hash_recipe(recipe, options, recipe_hex));
    TRY(hash_file("/proc/self/exe", build_hex, &bytes, NULL, NULL));
    const RendezvousOptions rendezvous = {.rank = launch->rank,
                                          .world = launch->world,
                                          .master_host = launch->master_host,
                                          .master_port = launch->master_port,
                                          .job = launch->job,
                                          .recipe = recipe_hex,
                                          .build = build_hex,
                                          .timeout_seconds = recipe->parallel_start_seconds,
                                          .mesh = true,
                                          .listener = launch->listener};
    return rendezvous_join(&rendezvous, &world->rendezvous);
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
    if (first == world->launch->rank) return (Status)outcomes[first].code; // has its own record
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
    }
    free(all);
    return agreed;
}

// --- The run -------------------------------------------------------------------------------------

static Status connect_ranks(World *world, const Recipe *recipe) {
    const Launch *launch = world->launch;
    const int ranks = launch->world;
    if (strcmp(world->backend->name, "cpu") != 0)
        FAIL(STATUS_USAGE,
             "%d ranks on the %s backend: this build has no communicator for it; train with one "
             "rank, or on the CPU with run.device = cpu",
             ranks, world->backend->name);
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
    status = communicator_tcp(&links, &options, &world->communicator);
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
    TRY(agree(world, "devices", prepare_backend(recipe, &world->backend)));
    TRY(agree(world, "connections", connect_ranks(world, recipe)));
    RunOptions connected = *options;
    connected.communicator = world->communicator;
    connected.local_rank = world->launch->local_rank;
    return run_training_on(world->backend, recipe, &connected);
}

Status world_run_training(const Launch *launch, const Recipe *recipe, const RunOptions *options) {
    if (launch->world == 1) return run_training(recipe, options);
    World world = {.launch = launch};
    Status status = train(&world, recipe, options);
    communicator_destroy(world.communicator);
    backend_destroy(world.backend);
    rendezvous_close(world.rendezvous);
    return status;
}
