// The INI reader. Internal to the recipe_*.c files.
#ifndef TRAIN_RECIPE_PARSE_H
#define TRAIN_RECIPE_PARSE_H

#include "base/status.h"
#include "train/recipe.h"

// Caps: what a recipe may make us read.
enum { RECIPE_MAX_BYTES = 1 << 20, RECIPE_MAX_DEPTH = 8, RECIPE_MAX_FILES = 64 };

// Reads a file and what it includes on top of `recipe`.
Status recipe_read_file(const char *path, Recipe *recipe) NODISCARD;

#endif
