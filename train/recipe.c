// Finding and loading a recipe, --set, and the values that follow from its settings.
#include "train/recipe.h"

#include <string.h>
#include "base/file.h"
#include "train/installation.h"
#include "train/recipe_parse.h"
#include "train/recipe_table.h"

// --- Finding --------------------------------------------------------------------------------

// directory/name or directory/name.ini, whichever is a file; "" stands for the current directory.
static bool find_in(const char *directory, const char *name, char path[IO_PATH_MAX]) {
    const char *slash = directory[0] ? "/" : "";
    static const char *const suffixes[] = {"", ".ini"};
    for (int i = 0; i < 2; i++) {
        int length = snprintf(path, IO_PATH_MAX, "%s%s%s%s", directory, slash, name, suffixes[i]);
        if (length > 0 && length < IO_PATH_MAX && io_exists(path) && !io_is_directory(path))
            return true;
    }
    return false;
}

static Status find_recipe(const char *name, char path[IO_PATH_MAX]) {
    if (!name[0]) FAIL(STATUS_USAGE, "the recipe's name is empty");
    if (find_in("", name, path)) return STATUS_OK;
    if (strchr(name, '/'))
        FAIL(STATUS_MISSING_INPUT, "recipe %s: there is no such file (nor with .ini)", name);
    char installed[IO_PATH_MAX], source_tree[IO_PATH_MAX];
    installation_share(installed);
    if (installed[0] && find_in(installed, name, path)) return STATUS_OK;
    TRY(io_path(source_tree, "%s/recipes", installation_source_tree()));
    if (find_in(source_tree, name, path)) return STATUS_OK;
    FAIL(STATUS_MISSING_INPUT,
         "recipe %s: not found in the current directory, in %s or in %s (nor with .ini)", name,
         installed, source_tree);
}

// --- Loading --------------------------------------------------------------------------------

Status recipe_set(Recipe *recipe, const char *assignment) {
    char where[96];
    snprintf(where, sizeof where, "--set %.80s", assignment);
    const char *equals = strchr(assignment, '=');
    const char *dot = strchr(assignment, '.');
    if (!equals || !dot || dot > equals)
        FAIL(STATUS_USAGE, "%s: expected section.key=value", where);

    char section[64], key[64];
    int section_length = (int)(dot - assignment), key_length = (int)(equals - dot - 1);
    if (section_length >= (int)sizeof section || key_length >= (int)sizeof key)
        FAIL(STATUS_USAGE, "%s: expected section.key=value", where);
    snprintf(section, sizeof section, "%.*s", section_length, assignment);
    snprintf(key, sizeof key, "%.*s", key_length, dot + 1);
    const char *known_section = NULL;
    const Setting *setting = NULL;
    TRY(setting_find_section(where, section, &known_section));
    TRY(setting_find(where, known_section, key, &setting));
    return setting_assign(where, setting, equals + 1, recipe);
}

Status recipe_load(const char *name, const char *const *overrides, size_t num_overrides,
                   Recipe *out) {
    recipe_defaults(out);
    TRY(find_recipe(name, out->path));
    TRY(recipe_read_file(out->path, out));
    for (size_t i = 0; i < num_overrides; i++) TRY(recipe_set(out, overrides[i]));
    return STATUS_OK;
}

// --- Derived values -------------------------------------------------------------------------

int64_t recipe_tokens_per_step(const Recipe *recipe) {
    return recipe->train_global_batch * recipe->data_sequence_length;
}

int64_t recipe_steps(const Recipe *recipe) {
    if (recipe->train_steps > 0) return recipe->train_steps;
    int64_t per_step = recipe_tokens_per_step(recipe);
    return recipe->train_tokens / per_step + (recipe->train_tokens % per_step != 0);
}

// Warm-up in tokens becomes the nearest number of steps, at least one.
int64_t recipe_warmup_steps(const Recipe *recipe) {
    if (recipe->optim_warmup_steps > 0 || recipe->optim_warmup_tokens == 0)
        return recipe->optim_warmup_steps;
    int64_t per_step = recipe_tokens_per_step(recipe);
    int64_t steps = recipe->optim_warmup_tokens / per_step;
    steps += recipe->optim_warmup_tokens % per_step >= per_step - per_step / 2;
    return steps > 0 ? steps : 1;
}

Status recipe_run_name(const Recipe *recipe, char *out, size_t size) {
    const char *name = recipe->run_name;
    size_t length = strlen(name);
    if (length == 0) {
        const char *slash = strrchr(recipe->path, '/');
        name = slash ? slash + 1 : recipe->path;
        length = strlen(name);
        if (length > 4 && strcmp(name + length - 4, ".ini") == 0) length -= 4;
    }
    if (length == 0 || name[0] == '.' || memchr(name, '/', length))
        FAIL(STATUS_USAGE, "run.name = '%.*s' cannot name a directory; use letters and digits",
             (int)length, name);
    if (length >= size || length > 200)
        FAIL(STATUS_USAGE, "run.name has %zu bytes; at most 200 are possible", length);
    snprintf(out, size, "%.*s", (int)length, name);
    return STATUS_OK;
}
