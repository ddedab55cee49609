// The settings table (train/settings.def) as data: what the INI reader, --set, the printers and
// the comparison walk. Internal to the recipe_*.c files.
#ifndef TRAIN_RECIPE_TABLE_H
#define TRAIN_RECIPE_TABLE_H

#include <stddef.h>
#include <stdint.h>
#include "base/status.h"
#include "train/recipe.h"

typedef enum SettingKind {
    SETTING_INT,
    SETTING_REAL,
    SETTING_FLAG,
    SETTING_TEXT,
    SETTING_PICK,
} SettingKind;

typedef struct Setting {
    SettingKind kind;
    const char *section, *key, *help;
    size_t offset;                         // of the value in Recipe
    int64_t int_default, int_min, int_max; // int; the default also of flag (0/1) and pick (index)
    double real_default, real_min, real_max;
    const char *text_default; // text
    const char *choices;      // pick: "a|b|c"
} Setting;

typedef struct SettingSection {
    const char *name, *help;
} SettingSection;

// One name per setting: only their number is used.
enum {
#define SECTION(section, help)
#define INT(section, key, def, min, max, help)  SETTING_INDEX_##section##_##key,
#define REAL(section, key, def, min, max, help) SETTING_INDEX_##section##_##key,
#define FLAG(section, key, def, help)           SETTING_INDEX_##section##_##key,
#define TEXT(section, key, def, help)           SETTING_INDEX_##section##_##key,
#define PICK(section, key, def, choices, help)  SETTING_INDEX_##section##_##key,
#include "train/settings.def"
#undef SECTION
#undef INT
#undef REAL
#undef FLAG
#undef TEXT
#undef PICK
    NUM_SETTINGS
};

extern const Setting recipe_settings[NUM_SETTINGS]; // in the order of settings.def
extern const SettingSection recipe_sections[];      // ends with name = NULL

// Looks a section or a key up. `where` ("file.ini:12") opens the message of a failure, which gives
// the nearest valid name, or names the section that has the key, or lists what is valid.
Status setting_find_section(const char *where, const char *name, const char **section) NODISCARD;
Status setting_find(const char *where, const char *section, const char *key,
                    const Setting **out) NODISCARD;

// Sets one value from text, checking type and range; on failure the recipe is unchanged.
Status setting_assign(const char *where, const Setting *setting, const char *value,
                      Recipe *recipe) NODISCARD;

// The value as an INI value that setting_assign reads back exactly. `text` holds
// SETTING_VALUE_SIZE bytes.
enum { SETTING_VALUE_SIZE = 2 * RECIPE_TEXT_MAX + 8 };
void setting_format(const Setting *setting, const Recipe *recipe, char *text);
// "0 to 1024", "true or false", "one of a, b, c".
enum { SETTING_RANGE_SIZE = 256 };
void setting_range_text(const Setting *setting, char *text);
// The i-th choice of a pick, NUL-terminated in `text` (SETTING_RANGE_SIZE bytes); false past the
// last one.
bool setting_choice(const Setting *setting, int index, char *text);

// Edit distance (Levenshtein) of two names, at most `cap`.
int name_distance(const char *a, const char *b, int cap);

#endif
