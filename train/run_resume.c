// Which checkpoint this attempt continues, and whether recipe and data still fit to it.
//
// The same command must continue a run, however often it is started again; so `--resume DIR` on a
// run that has already started from DIR continues the run's own newest checkpoint. What decides
// weights and sample order may not change under a run: every difference is listed with both values
// (STATUS_RECIPE_MISMATCH). All other differences are allowed and named in one warning.
#include "train/trainer.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/log.h"
#include "train/recipe_lists.h"

// A list of differences that a message can hold.
typedef struct Differences {
    char refused[2048], allowed[1024];
} Differences;

static void add_difference(char *list, size_t size, const char *separator, const char *key,
                           const char *saved, const char *now) {
    size_t used = strlen(list);
    int some = 120; // of a long value
    snprintf(list + used, size - used, "%s%s: checkpoint %.*s, now %.*s", used ? separator : "",
             key, some, saved[0] ? saved : "\"\"", some, now[0] ? now : "\"\"");
}

static Status refuse(const Trainer *t, const char *differences) {
    FAIL(
        STATUS_RECIPE_MISMATCH,
        "%s cannot be continued with this recipe:\n    %s\n  give run.name another value for a new "
        "run, or set the recipe back",
        t->resume_path, differences);
}

// --- Choosing ------------------------------------------------------------------------------------

static Status read_origin(const char *checkpoint, char origin[RUN_ORIGIN_MAX]) {
    json_t *state;
    TRY(checkpoint_read_state(checkpoint, &state));
    Status status = json_get_text(state, checkpoint, "origin", origin, RUN_ORIGIN_MAX);
    json_decref(state);
    return status;
}

// True when the run's own newest checkpoint descends from `path` already; then it is chosen.
static bool continues_origin(Trainer *t, const char *path) {
    char origin[RUN_ORIGIN_MAX] = "";
    Status status = checkpoint_find(t->checkpoints, &t->resume_step, t->resume_path);
    if (status == STATUS_OK && t->resume_step >= 0) status = read_origin(t->resume_path, origin);
    if (status != STATUS_OK) status_clear();
    return origin[0] && strcmp(origin, path) == 0;
}

static Status choose_given(Trainer *t, const char *path) {
    char inner[IO_PATH_MAX];
    if (strlen(path) >= RUN_ORIGIN_MAX) FAIL(STATUS_USAGE, "--resume: the path is too long");
    strcpy(t->origin, path);
    if (continues_origin(t, path)) return STATUS_OK;
    TRY(io_path(inner, "%s/checkpoints", path));
    if (io_is_directory(inner)) {
        TRY(checkpoint_find(inner, &t->resume_step, t->resume_path));
        if (t->resume_step < 0)
            FAIL(STATUS_MISSING_INPUT, "--resume %s: this run has no checkpoint yet", path);
        return STATUS_OK;
    }
    TRY(io_path(t->resume_path, "%s", path));
    for (size_t length = strlen(t->resume_path); length > 1 && t->resume_path[length - 1] == '/';)
        t->resume_path[--length] = '\0';
    if (!io_is_directory(path))
        FAIL(STATUS_MISSING_INPUT, "--resume %s: there is no such directory", path);
    if (checkpoint_verify(t->resume_path) != STATUS_OK)
        return status_prefix(STATUS_BAD_DATA, "--resume %s: ", path);
    return STATUS_OK;
}

Status resume_choose(Trainer *t) {
    const RunOptions *options = t->options;
    t->resume_step = -1;
    TRY(io_make_directories(t->checkpoints));
    TRY(checkpoint_clean(t->checkpoints));
    if (options->resume == RESUME_NEVER) return STATUS_OK;
    if (options->resume == RESUME_FROM) {
        TRY(choose_given(t, options->resume_path));
    } else {
        TRY(checkpoint_find(t->checkpoints, &t->resume_step, t->resume_path));
        if (t->resume_step < 0) return STATUS_OK;
        TRY(read_origin(t->resume_path, t->origin));
    }
    TRY(checkpoint_read_state(t->resume_path, &t->resume_state));
    return json_get_int(t->resume_state, t->resume_path, "step", 0, INT64_MAX, &t->resume_step);
}

// --- An earlier course of the run ----------------------------------------------------------------

// "<run>/<name>.before_attempt_N", where what a new course replaces is kept for the user.
static Status aside_path(const Trainer *t, const char *name, char out[IO_PATH_MAX]) {
    return io_path(out, "%s/%s.before_attempt_%d", t->dir.path, name, t->dir.attempt);
}

static Status move_aside(const Trainer *t, const char *name) {
    char from[IO_PATH_MAX], to[IO_PATH_MAX];
    TRY(io_path(from, "%s/%s", t->dir.path, name));
    TRY(aside_path(t, name, to));
    return io_exists(from) ? io_rename(from, to) : STATUS_OK;
}

// Checkpoints above `step`, and the result that they led to.
static Status move_checkpoints_aside(const Trainer *t, int64_t step) {
    char to[IO_PATH_MAX];
    int moved;
    TRY(aside_path(t, "checkpoints", to));
    TRY(checkpoint_set_aside(t->checkpoints, step, to, &moved));
    if (moved == 0) return STATUS_OK;
    log_info("moved %d checkpoints of the earlier course of this run to %s", moved, to);
    return move_aside(t, RESULT_NAME);
}

Status resume_start_anew(Trainer *t) {
    static const char *const names[] = {"plan", "log.jsonl", "tensorboard", RESULT_NAME};
    if (t->options->resume != RESUME_NEVER) return STATUS_OK;
    TRY(move_checkpoints_aside(t, -1));
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) TRY(move_aside(t, names[i]));
    return STATUS_OK;
}

Status resume_set_aside(const Trainer *t) {
    char own[IO_PATH_MAX];
    if (t->options->resume != RESUME_FROM) return STATUS_OK;
    // Of the run's own checkpoints, those up to the one that is continued stay.
    TRY(checkpoint_path(t->checkpoints, t->resume_step, own));
    char *a = realpath(own, NULL), *b = realpath(t->resume_path, NULL);
    bool is_own = a && b && strcmp(a, b) == 0;
    free(a);
    free(b);
    return move_checkpoints_aside(t, is_own ? t->resume_step : -1);
}

// --- The recipe ----------------------------------------------------------------------------------

// Keys that decide weights, mathematics or sample order. Paths are not among them: a model or data
// directory may move; configs, fingerprints and mixture weights are compared by content.
static bool key_decides(const char *key) {
    static const char *const keys[] = {
        "run.seed",        "data.sequence_length", "data.mask_documents", "lfuc.enabled",
        "lfuc.select",     "lfuc.prune_layers",    "lfuc.num_experts",    "lfuc.blocks",
        "lfuc.top_k",      "lfuc.follower_copies", "lfuc.elsewhere",      "lfuc.reinit_ratio",
        "lfuc.copy_noise", "router.gate",          "router.gate_scale",   "router.input",
    };
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++)
        if (strcmp(key, keys[i]) == 0) return true;
    return false;
}

static void on_difference(void *context, const char *key, const char *saved, const char *now) {
    Differences *d = context;
    if (strncmp(key, "run.name", 8) == 0 || strncmp(key, "run.directory", 13) == 0) return;
    if (key_decides(key))
        add_difference(d->refused, sizeof d->refused, "\n    ", key, saved, now);
    else
        add_difference(d->allowed, sizeof d->allowed, "; ", key, saved, now);
}

// The mixture: as many sources with the same weights.
static Status compare_mixture(const Recipe *saved, const Recipe *now, Differences *d) {
    DataConfig before, after;
    TRY(parse_sources("data.train", saved->data_train, &before));
    TRY(parse_sources("data.train", now->data_train, &after));
    bool same = before.loader.num_sources == after.loader.num_sources;
    for (int i = 0; same && i < before.loader.num_sources; i++)
        same = before.loader.sources[i].weight == after.loader.sources[i].weight;
    if (!same)
        add_difference(d->refused, sizeof d->refused, "\n    ", "data.train (mixture)",
                       saved->data_train, now->data_train);
    return STATUS_OK;
}

static Status parse_saved_recipe(const Trainer *t, Recipe *out) {
    const char *text = json_string_value(json_object_get(t->resume_state, "recipe"));
    if (!text) FAIL(STATUS_BAD_DATA, "%s/state.json: key \"recipe\" is missing", t->resume_path);
    recipe_defaults(out);
    return recipe_parse(text, strlen(text), "the checkpoint's recipe", out);
}

static bool rounds_moments(const Recipe *saved, const Recipe *now) {
    return saved->optim_state_dtype == STATE_F32 && now->optim_state_dtype == STATE_BF16;
}

Status resume_check_recipe(const Trainer *t) {
    if (!t->resume_state) return STATUS_OK;
    Status status = STATUS_OK;
    Differences d = {"", ""};
    Recipe *saved = malloc(sizeof *saved);
    if (!saved) FAIL(STATUS_INTERNAL, "out of memory for the checkpoint's recipe");
    status = parse_saved_recipe(t, saved);
    if (status == STATUS_USAGE) {
        // Written by a version with other keys; config and data are compared all the same.
        log_warn("%s: %s; its recipe is not compared", t->resume_path, status_message());
        status_clear();
        status = STATUS_OK;
        goto done;
    }
    if (status != STATUS_OK) goto done;
    recipe_compare(saved, t->recipe, on_difference, &d);
    TRY_GOTO(compare_mixture(saved, t->recipe, &d), done);
    if (d.refused[0])
        status = refuse(t, d.refused);
    else if (d.allowed[0])
        log_warn("the recipe differs from that of the checkpoint: %s%s", d.allowed,
                 rounds_moments(saved, t->recipe) ? "; its AdamW moments are rounded to bf16" : "");
done:
    free(saved);
    return status;
}

// --- The model -----------------------------------------------------------------------------------

static void add_json_difference(Differences *d, const char *key, const json_t *saved,
                                const json_t *now) {
    char *a = saved ? json_dumps(saved, JSON_ENCODE_ANY | JSON_COMPACT) : NULL;
    char *b = now ? json_dumps(now, JSON_ENCODE_ANY | JSON_COMPACT) : NULL;
    add_difference(d->refused, sizeof d->refused, "\n    ", key, a ? a : "nothing",
                   b ? b : "nothing");
    free(a);
    free(b);
}

Status resume_check_config(const Trainer *t) {
    if (!t->resume_state) return STATUS_OK;
    Differences d = {"", ""};
    json_t *saved, *now;
    const char *key;
    json_t *value;
    TRY(json_get_object(t->resume_state, t->resume_path, "config", &saved));
    TRY(config_to_canonical(&t->config, &now));
    json_object_foreach(now, key, value) {
        const json_t *other = json_object_get(saved, key);
        if (!json_equal(other, value)) add_json_difference(&d, key, other, value);
    }
    json_object_foreach(saved, key, value) {
        if (!json_object_get(now, key)) add_json_difference(&d, key, value, NULL);
    }
    json_decref(now);
    return d.refused[0] ? refuse(t, d.refused) : STATUS_OK;
}

// --- The data ------------------------------------------------------------------------------------

Status resume_check_data(const Trainer *t) {
    if (!t->resume_state) return STATUS_OK;
    Differences d = {"", ""};
    json_t *data;
    char fingerprint[HASH_HEX_SIZE], tokenizer[TOKENIZER_ID_SIZE];
    TRY(json_get_object(t->resume_state, t->resume_path, "data", &data));
    TRY(json_get_text(data, t->resume_path, "fingerprint", fingerprint, sizeof fingerprint));
    TRY(json_get_text(data, t->resume_path, "tokenizer_id", tokenizer, sizeof tokenizer));
    if (strcmp(fingerprint, t->identity.data_fingerprint) != 0)
        add_difference(d.refused, sizeof d.refused, "\n    ",
                       "data.train (fingerprint of the shards' content)", fingerprint,
                       t->identity.data_fingerprint);
    if (strcmp(tokenizer, t->identity.tokenizer_id) != 0)
        add_difference(d.refused, sizeof d.refused, "\n    ", "tokenizer of data.train", tokenizer,
                       t->identity.tokenizer_id);
    return d.refused[0] ? refuse(t, d.refused) : STATUS_OK;
}
