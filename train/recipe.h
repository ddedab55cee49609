// The recipe: all settings of a run, from an INI file, its includes and --set.
//
// The reader is strict: a line is `key = value`, `[section]`, `include = FILE`, blank, or a comment
// starting with # or ;. Lines have any length; values keep their inner text, a comment needs white
// space before its # or ;. Unknown sections or keys (with the nearest valid name), keys given twice
// in one file, and values out of range are STATUS_USAGE with file and line. A file overrides what
// it includes; --set overrides the file.
#ifndef TRAIN_RECIPE_H
#define TRAIN_RECIPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include "base/status.h"

enum { RECIPE_TEXT_MAX = 1024 };

typedef struct Recipe {
    char path[4096]; // the file it came from, "" for none
#define SECTION(section, help)
#define INT(section, key, def, min, max, help)  int64_t section##_##key;
#define REAL(section, key, def, min, max, help) double section##_##key;
#define FLAG(section, key, def, help)           bool section##_##key;
#define TEXT(section, key, def, help)           char section##_##key[RECIPE_TEXT_MAX];
#define PICK(section, key, def, choices, help)  int section##_##key;
#include "train/settings.def"
#undef SECTION
#undef INT
#undef REAL
#undef FLAG
#undef TEXT
#undef PICK
} Recipe;

// Values of the PICK settings, in the order of settings.def.
enum { DEVICE_AUTO, DEVICE_CPU, DEVICE_CUDA };
enum { PRECISION_BF16, PRECISION_FP32 };
enum { LFUC_THRESHOLD, LFUC_BUDGET, LFUC_MANUAL, LFUC_LATENCY, LFUC_LOSS };
enum { ELSEWHERE_COPIES, ELSEWHERE_DENSE };
enum { GATE_SCALE_ONE, GATE_SCALE_EXPERTS_OVER_K };
enum { ROUTER_INPUT_NORMED, ROUTER_INPUT_RAW };
enum { BALANCE_MICRO, BALANCE_GLOBAL };
enum { BAD_SHARD_ABORT, BAD_SHARD_SKIP };
enum { WEIGHTS_BF16, WEIGHTS_F32 };
enum { GRADIENTS_F32, GRADIENTS_BF16 };
enum { STATE_F32, STATE_BF16 };
enum { ZERO_1, ZERO_2 };

void recipe_defaults(Recipe *recipe);
// Finds `name` (as given; then in the recipes of the source tree or the installation when it is a
// bare name), reads it and its includes, then applies `overrides` ("section.key=value").
Status recipe_load(const char *name, const char *const *overrides, size_t num_overrides,
                   Recipe *out) NODISCARD;
// From memory, without includes: the fuzz target's entry.
Status recipe_parse(const char *text, size_t bytes, const char *name, Recipe *recipe) NODISCARD;
Status recipe_set(Recipe *recipe, const char *assignment) NODISCARD; // "section.key=value"
// Rules between keys (steps or tokens given, batches that divide, selections that exist, ...).
Status recipe_check(const Recipe *recipe) NODISCARD;
// The resolved recipe as INI text that reads back to the same values. malloc'ed.
Status recipe_print(const Recipe *recipe, char **text) NODISCARD;
// Settings table as help text or as docs/recipe.md.
void recipe_print_help(FILE *out);
void recipe_print_markdown(FILE *out);
// Calls back for each key whose value differs ("optim.lr", "0.0001", "0.0002").
void recipe_compare(const Recipe *a, const Recipe *b,
                    void (*differ)(void *context, const char *key, const char *a, const char *b),
                    void *context);

// Derived values.
int64_t recipe_steps(const Recipe *recipe); // train.steps, or from tokens
int64_t recipe_tokens_per_step(const Recipe *recipe);
int64_t recipe_warmup_steps(const Recipe *recipe);
Status recipe_run_name(const Recipe *recipe, char *out, size_t size) NODISCARD;

#endif
