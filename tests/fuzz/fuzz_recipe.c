// libFuzzer: any bytes as a recipe. What reads must print as text that reads back to the same
// values, and checking the rules between its keys must not crash.
#include <stdlib.h>
#include <string.h>
#include "base/status.h"
#include "train/recipe.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static Recipe recipe, again;
    recipe_defaults(&recipe);
    if (recipe_parse((const char *)data, size, "fuzz", &recipe) != STATUS_OK) {
        status_clear();
        return 0;
    }
    if (recipe_check(&recipe) != STATUS_OK) status_clear();
    char *text;
    if (recipe_print(&recipe, &text) != STATUS_OK) abort();
    recipe_defaults(&again);
    if (recipe_parse(text, strlen(text), "printed", &again) != STATUS_OK) abort();
    free(text);
    if (memcmp(&recipe, &again, sizeof recipe) != 0) abort();
    return 0;
}
