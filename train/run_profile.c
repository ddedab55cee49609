// train --profile N: steps of the recipe's training, timed op by op.
//
// It is the run's own step on the run's own data, in a directory beside the run's (<name>-profile),
// so that it can be asked for at any time: no checkpoint of the run is touched and none is made.
#include "train/trainer.h"

#include <inttypes.h>
#include <stdio.h>
#include "base/log.h"
#include "train/profile.h"
#include "train/stop_signal.h"

// The first steps find algorithms and fill caches. The last of them is recorded once for practice,
// which tells how many calls a step makes.
enum { WARMUP_STEPS = 5 };

static Status steps(Trainer *t, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        if (stop_requested())
            FAIL(STATUS_PREEMPTED, "stopped by %s before the profile was complete",
                 stop_signal_name());
        TRY(train_step(t));
    }
    return STATUS_OK;
}

static Status record(Trainer *t, int64_t count) {
    TRY(profile_start(t->profile, count));
    TRY(steps(t, count));
    return profile_stop(t->profile);
}

static Status write_profile(const Trainer *t, const ProfileRun *run) {
    char path[IO_PATH_MAX];
    TRY(io_path(path, "%s/profile.json", t->dir.path));
    json_t *root = profile_to_json(t->profile, run);
    if (!root || json_object_set_new(root, "device", json_string(t->backend->device_name)) != 0 ||
        json_object_set_new(root, "dtype", json_string(dtype_name(t->backend->compute_dtype)))) {
        json_decref(root);
        FAIL(STATUS_INTERNAL, "%s: out of memory", path);
    }
    Status status = json_write_file(path, root);
    json_decref(root);
    TRY(status);
    log_info("profile: %s", path);
    return STATUS_OK;
}

Status run_profile(Trainer *t) {
    const Recipe *r = t->recipe;
    int64_t count = t->options->profile_steps;
    ProfileRun run = {.steps = count,
                      .warmup_steps = WARMUP_STEPS,
                      .tokens_per_step = (double)recipe_tokens_per_step(r),
                      .flops_per_token = model_flops_per_token(&t->config, r->data_sequence_length),
                      .peak = device_peak(t->backend->device_name, t->backend->compute_dtype)};
    t->total_steps = t->state.step + WARMUP_STEPS + count; // what the progress line counts to
    log_info("profile: %" PRId64 " steps after %d to warm up", count, WARMUP_STEPS);
    TRY(steps(t, WARMUP_STEPS - 1));
    TRY(record(t, 1));
    TRY(record(t, count));
    log_transient("%s", "");
    if (t->team.rank > 0) return STATUS_OK;
    profile_print(t->profile, &run, stdout);
    return write_profile(t, &run);
}
