// The directory of checkpoints: which there are, which is the newest that can be trusted, which may
// go.
#include "train/checkpoint.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include "base/checked.h"
#include "base/log.h"
#include "train/checkpoint_manifest.h"

static const char prefix[] = "step_";
enum { STEP_MIN_DIGITS = 8, STEP_MAX_DIGITS = 18 };

Status checkpoint_path(const char *directory, int64_t step, char out[IO_PATH_MAX]) {
    return io_path(out, "%s/%s%0*" PRId64, directory, prefix, STEP_MIN_DIGITS, step);
}

int64_t checkpoint_step_of(const char *path) {
    const char *slash = strrchr(path, '/');
    const char *name = slash ? slash + 1 : path;
    if (strncmp(name, prefix, sizeof prefix - 1) != 0) return -1;
    const char *digits = name + sizeof prefix - 1;
    size_t length = strspn(digits, "0123456789");
    if (length < STEP_MIN_DIGITS || length > STEP_MAX_DIGITS || digits[length]) return -1;
    return strtoll(digits, NULL, 10);
}

static int falling(const void *a, const void *b) {
    const int64_t *x = a, *y = b;
    return (*x < *y) - (*x > *y);
}

// Steps of the checkpoint directories, newest first, whether they are complete or not. malloc'ed.
static Status list_steps(const char *directory, int64_t **steps, size_t *count) {
    char **names = NULL;
    size_t num_names = 0;
    *steps = NULL;
    *count = 0;
    if (!io_is_directory(directory)) return STATUS_OK;
    TRY(io_list_directory(directory, &names, &num_names));
    *steps = malloc((num_names + 1) * sizeof **steps);
    for (size_t i = 0; *steps && i < num_names; i++) {
        int64_t step = checkpoint_step_of(names[i]);
        if (step >= 0) (*steps)[(*count)++] = step;
    }
    io_free_names(names, num_names);
    if (!*steps) FAIL(STATUS_INTERNAL, "%s: out of memory", directory);
    qsort(*steps, *count, sizeof **steps, falling);
    return STATUS_OK;
}

static bool has_manifest(const char *path) {
    char manifest[IO_PATH_MAX];
    if (io_path(manifest, "%s/" MANIFEST_NAME, path) == STATUS_OK) return io_exists(manifest);
    status_clear();
    return false;
}

// --- Finding -------------------------------------------------------------------------------------

Status checkpoint_find(const char *directory, int64_t *step, char path[IO_PATH_MAX]) {
    Status status = STATUS_OK;
    int64_t *steps;
    size_t count, i;
    char first_reason[512] = "";
    *step = -1;
    TRY(list_steps(directory, &steps, &count));
    for (i = 0; i < count; i++) {
        TRY_GOTO(checkpoint_path(directory, steps[i], path), done);
        if (checkpoint_verify(path) == STATUS_OK) break;
        // It is not broken: going on from an older one would end in writing over it.
        if (manifest_is_newer(path))
            FAIL_GOTO(done, STATUS_BAD_DATA,
                      "%s; a later version of this program saved it: use that one, or name an "
                      "older checkpoint with --resume DIR",
                      status_message());
        if (!first_reason[0]) snprintf(first_reason, sizeof first_reason, "%s", status_message());
        log_warn("checkpoint of step %" PRId64 " is broken and will not be used: %s", steps[i],
                 status_message());
        status_clear();
    }
    if (i < count)
        *step = steps[i];
    else if (count > 0)
        FAIL_GOTO(done, STATUS_BAD_DATA,
                  "%s: none of %zu checkpoints can be used, the newest because: %s; "
                  "--resume never starts the run again and sets them aside",
                  directory, count, first_reason);
done:
    free(steps);
    return status;
}

// --- Removing ------------------------------------------------------------------------------------

Status checkpoint_remove(const char *path) {
    char manifest[IO_PATH_MAX];
    TRY(io_path(manifest, "%s/" MANIFEST_NAME, path));
    // From here on it is no checkpoint any more, wherever the removal is interrupted.
    if (io_exists(manifest)) {
        TRY(io_unlink(manifest));
        TRY(io_fsync_directory(path));
    }
    return io_remove_tree(path);
}

Status checkpoint_clean(const char *directory) {
    Status status = STATUS_OK;
    char **names, path[IO_PATH_MAX];
    size_t count;
    if (!io_is_directory(directory)) return STATUS_OK;
    TRY(io_list_directory(directory, &names, &count));
    for (size_t i = 0; i < count; i++) {
        const char *temp = strstr(names[i], ".tmp-");
        if (strncmp(names[i], prefix, sizeof prefix - 1) != 0 || !temp) continue;
        log_info("removing %s, left behind by a save that was interrupted", names[i]);
        TRY_GOTO(io_path(path, "%s/%s", directory, names[i]), done);
        TRY_GOTO(io_remove_tree(path), done);
    }
done:
    io_free_names(names, count);
    return status;
}

// Whether checkpoint number `rank` (0 = newest complete one) of `step` stays.
static bool is_kept(const CheckpointOptions *options, int64_t step, int64_t rank) {
    if (rank < options->keep_last) return true;
    return options->keep_every > 0 && step % options->keep_every == 0;
}

Status checkpoint_retain(const CheckpointOptions *options, int64_t step) {
    Status status = STATUS_OK;
    char path[IO_PATH_MAX];
    int64_t *steps, rank = 0;
    size_t count;
    TRY(list_steps(options->directory, &steps, &count));
    for (size_t i = 0; i < count; i++) {
        if (steps[i] > step) continue;
        TRY_GOTO(checkpoint_path(options->directory, steps[i], path), done);
        // Without a manifest it is what an interrupted removal left.
        if (has_manifest(path) && is_kept(options, steps[i], rank++)) continue;
        TRY_GOTO(checkpoint_remove(path), done);
    }
done:
    free(steps);
    return status;
}

Status checkpoint_set_aside(const char *directory, int64_t step, const char *to, int *moved) {
    Status status = STATUS_OK;
    char from[IO_PATH_MAX], target[IO_PATH_MAX];
    int64_t *steps;
    size_t count;
    *moved = 0;
    TRY(list_steps(directory, &steps, &count));
    for (size_t i = 0; i < count && steps[i] > step; i++) {
        if (*moved == 0) TRY_GOTO(io_make_directories(to), done);
        TRY_GOTO(checkpoint_path(directory, steps[i], from), done);
        TRY_GOTO(checkpoint_path(to, steps[i], target), done);
        TRY_GOTO(io_rename(from, target), done);
        ++*moved;
    }
    if (*moved > 0) {
        TRY_GOTO(io_fsync_directory(to), done);
        TRY_GOTO(io_fsync_directory(directory), done);
    }
done:
    free(steps);
    return status;
}

// --- Space ---------------------------------------------------------------------------------------

// Tensors, plus room for headers, state and manifest.
static bool checkpoint_bytes(const CheckpointOptions *options, const TensorTable *table,
                             uint64_t *bytes) {
    const uint64_t per_parameter = 3 * sizeof(float) + dtype_bytes(options->dtype);
    return checked_mul((uint64_t)table->parameters, per_parameter, bytes) &&
           checked_add(*bytes, 1 << 20, bytes);
}

Status checkpoint_check_space(const CheckpointOptions *options, const TensorTable *table,
                              int64_t saves) {
    int64_t *steps;
    size_t count;
    uint64_t one, needed;
    struct statvfs info;
    TRY(list_steps(options->directory, &steps, &count));
    free(steps);
    uint64_t wanted = (uint64_t)options->keep_last + 1;
    uint64_t missing = wanted > count ? wanted - count : 1;
    if (missing > (uint64_t)saves) missing = (uint64_t)saves;
    if (!checkpoint_bytes(options, table, &one) || !checked_mul(one, missing, &needed))
        FAIL(STATUS_CANNOT_WRITE, "%s: checkpoints exceed every file system", options->directory);
    if (statvfs(options->directory, &info) != 0)
        FAIL(STATUS_CANNOT_WRITE, "%s: cannot ask for free space: %s", options->directory,
             strerror(errno));
    uint64_t available = (uint64_t)info.f_bavail * info.f_frsize;
    if (available >= needed) return STATUS_OK;
    char one_text[BYTES_TEXT_SIZE], needed_text[BYTES_TEXT_SIZE], free_text[BYTES_TEXT_SIZE];
    FAIL(STATUS_CANNOT_WRITE,
         "%s: %s free, expected %s: the run will hold %" PRIu64 " more checkpoints of %s at once; "
         "free space, lower checkpoint.keep_last (now %" PRId64 "), or set run.directory to a "
         "larger disk",
         options->directory, bytes_text(available, free_text), bytes_text(needed, needed_text),
         missing, bytes_text(one, one_text), options->keep_last);
}
