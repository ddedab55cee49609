// The table of settings, and finding a setting by name.
//
// A wrong name costs a user the most time when the message only says that it is wrong. So every
// failed look-up says what was probably meant: the nearest name by edit distance, the section that
// really has the key, or, when nothing is near, everything that is valid.
#include "train/recipe_table.h"

#include <stdio.h>
#include <string.h>

#define SECTION(section, help)

#define INT(section_, key_, def, min, max, help_)                                                  \
    {.kind = SETTING_INT,                                                                          \
     .section = #section_,                                                                         \
     .key = #key_,                                                                                 \
     .help = help_,                                                                                \
     .offset = offsetof(Recipe, section_##_##key_),                                                \
     .int_default = def,                                                                           \
     .int_min = min,                                                                               \
     .int_max = max},
#define REAL(section_, key_, def, min, max, help_)                                                 \
    {.kind = SETTING_REAL,                                                                         \
     .section = #section_,                                                                         \
     .key = #key_,                                                                                 \
     .help = help_,                                                                                \
     .offset = offsetof(Recipe, section_##_##key_),                                                \
     .real_default = def,                                                                          \
     .real_min = min,                                                                              \
     .real_max = max},
#define FLAG(section_, key_, def, help_)                                                           \
    {.kind = SETTING_FLAG,                                                                         \
     .section = #section_,                                                                         \
     .key = #key_,                                                                                 \
     .help = help_,                                                                                \
     .offset = offsetof(Recipe, section_##_##key_),                                                \
     .int_default = def},
#define TEXT(section_, key_, def, help_)                                                           \
    {.kind = SETTING_TEXT,                                                                         \
     .section = #section_,                                                                         \
     .key = #key_,                                                                                 \
     .help = help_,                                                                                \
     .offset = offsetof(Recipe, section_##_##key_),                                                \
     .text_default = def},
#define PICK(section_, key_, def, choices_, help_)                                                 \
    {.kind = SETTING_PICK,                                                                         \
     .section = #section_,                                                                         \
     .key = #key_,                                                                                 \
     .help = help_,                                                                                \
     .offset = offsetof(Recipe, section_##_##key_),                                                \
     .int_default = def,                                                                           \
     .choices = choices_},

const Setting recipe_settings[NUM_SETTINGS] = {
#include "train/settings.def"
};

#undef SECTION
#undef INT
#undef REAL
#undef FLAG
#undef TEXT
#undef PICK

#define SECTION(section, help_) {.name = #section, .help = help_},
#define INT(...)
#define REAL(...)
#define FLAG(...)
#define TEXT(...)
#define PICK(...)
const SettingSection recipe_sections[] = {
#include "train/settings.def"
    {NULL, NULL}};

// --- Names ----------------------------------------------------------------------------------

enum { NAME_MAX_COMPARED = 64 };

int name_distance(const char *a, const char *b, int cap) {
    size_t a_length = strlen(a), b_length = strlen(b);
    if (a_length > NAME_MAX_COMPARED || b_length > NAME_MAX_COMPARED) return cap;
    int row[NAME_MAX_COMPARED + 1]; // distances of a[0..i) to every b[0..j)
    for (size_t j = 0; j <= b_length; j++) row[j] = (int)j;
    for (size_t i = 1; i <= a_length; i++) {
        int diagonal = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= b_length; j++) {
            int above = row[j];
            int best = diagonal + (a[i - 1] != b[j - 1]);
            if (above + 1 < best) best = above + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            diagonal = above;
            row[j] = best;
        }
    }
    return row[b_length] < cap ? row[b_length] : cap;
}

// A name is near when no more than a third of it is wrong: "lrr" is near "lr", "foo" is near
// nothing. Distances below the limit count as near.
static int near_limit(const char *name) {
    size_t length = strlen(name);
    return 2 + (int)((length > NAME_MAX_COMPARED ? NAME_MAX_COMPARED : length) / 4);
}

Status setting_find_section(const char *where, const char *name, const char **section) {
    const char *nearest = NULL;
    int best = near_limit(name);
    for (const SettingSection *s = recipe_sections; s->name; s++) {
        if (strcmp(s->name, name) == 0) {
            *section = s->name;
            return STATUS_OK;
        }
        int distance = name_distance(name, s->name, best);
        if (distance < best) {
            best = distance;
            nearest = s->name;
        }
    }
    if (nearest)
        FAIL(STATUS_USAGE, "%s: unknown section [%.64s]; did you mean [%s]?", where, name, nearest);
    char valid[512] = "";
    for (const SettingSection *s = recipe_sections; s->name; s++) {
        size_t used = strlen(valid);
        snprintf(valid + used, sizeof valid - used, "%s[%s]", used ? ", " : "", s->name);
    }
    FAIL(STATUS_USAGE, "%s: unknown section [%.64s]; valid are %s", where, name, valid);
}

static Status fail_unknown_key(const char *where, const char *section, const char *key) {
    const Setting *nearest = NULL;
    int best = near_limit(key);
    char valid[2048] = "";
    for (int i = 0; i < NUM_SETTINGS; i++) {
        const Setting *s = &recipe_settings[i];
        if (strcmp(s->section, section) != 0) {
            if (strcmp(s->key, key) == 0)
                FAIL(STATUS_USAGE, "%s: [%s] has no key '%s'; did you mean [%s] %s?", where,
                     section, key, s->section, key);
            continue;
        }
        int distance = name_distance(key, s->key, best);
        if (distance < best) {
            best = distance;
            nearest = s;
        }
        size_t used = strlen(valid);
        snprintf(valid + used, sizeof valid - used, "%s%s", used ? ", " : "", s->key);
    }
    if (nearest)
        FAIL(STATUS_USAGE, "%s: unknown key '%.64s' in [%s]; did you mean '%s'?", where, key,
             section, nearest->key);
    FAIL(STATUS_USAGE, "%s: unknown key '%.64s' in [%s]; valid are %s", where, key, section, valid);
}

Status setting_find(const char *where, const char *section, const char *key, const Setting **out) {
    for (int i = 0; i < NUM_SETTINGS; i++) {
        const Setting *s = &recipe_settings[i];
        if (strcmp(s->section, section) == 0 && strcmp(s->key, key) == 0) {
            *out = s;
            return STATUS_OK;
        }
    }
    return fail_unknown_key(where, section, key);
}
