// The settings table and a recipe's values as text: the resolved recipe, --help, docs/recipe.md,
// and the differences between two recipes.
#include "train/recipe_table.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

// Calls `line` for every section and setting in table order (setting NULL: a section begins).
static void walk(FILE *out, const Recipe *recipe,
                 void (*line)(FILE *out, const SettingSection *section, const Setting *setting,
                              const char *value)) {
    char value[SETTING_VALUE_SIZE];
    for (const SettingSection *section = recipe_sections; section->name; section++) {
        line(out, section, NULL, NULL);
        for (int i = 0; i < NUM_SETTINGS; i++) {
            const Setting *setting = &recipe_settings[i];
            if (strcmp(setting->section, section->name) != 0) continue;
            setting_format(setting, recipe, value);
            line(out, section, setting, value);
        }
    }
}

// --- The resolved recipe --------------------------------------------------------------------

static void ini_line(FILE *out, const SettingSection *section, const Setting *setting,
                     const char *value) {
    if (setting)
        fprintf(out, "%s =%s%s\n", setting->key, value[0] ? " " : "", value);
    else
        fprintf(out, "%s[%s]\n", section == recipe_sections ? "" : "\n", section->name);
}

Status recipe_print(const Recipe *recipe, char **text) {
    size_t bytes;
    FILE *out = open_memstream(text, &bytes);
    if (!out) FAIL(STATUS_INTERNAL, "no memory for the text of a recipe");
    walk(out, recipe, ini_line);
    if (fclose(out) != 0) {
        free(*text);
        FAIL(STATUS_INTERNAL, "no memory for the text of a recipe");
    }
    return STATUS_OK;
}

void recipe_compare(const Recipe *a, const Recipe *b,
                    void (*differ)(void *context, const char *key, const char *a, const char *b),
                    void *context) {
    char a_text[SETTING_VALUE_SIZE], b_text[SETTING_VALUE_SIZE], key[128];
    for (int i = 0; i < NUM_SETTINGS; i++) {
        const Setting *setting = &recipe_settings[i];
        setting_format(setting, a, a_text);
        setting_format(setting, b, b_text);
        if (strcmp(a_text, b_text) == 0) continue;
        snprintf(key, sizeof key, "%s.%s", setting->section, setting->key);
        differ(context, key, a_text, b_text);
    }
}

// --- Help -----------------------------------------------------------------------------------

static void help_line(FILE *out, const SettingSection *section, const Setting *setting,
                      const char *value) {
    if (!setting) {
        fprintf(out, "\n[%s] %s\n", section->name, section->help);
        return;
    }
    enum { HELP_COLUMN = 36 };
    char range[SETTING_RANGE_SIZE];
    setting_range_text(setting, range);
    int used = fprintf(out, "  %s = %s", setting->key, value);
    fprintf(out, "%*s %s", used < HELP_COLUMN ? HELP_COLUMN - used : 0, "", setting->help);
    if (setting->kind != SETTING_TEXT) fprintf(out, " (%s)", range);
    fputc('\n', out);
}

void recipe_print_help(FILE *out) {
    Recipe defaults;
    recipe_defaults(&defaults);
    walk(out, &defaults, help_line);
}

// --- docs/recipe.md -------------------------------------------------------------------------

static const char markdown_head[] =
    "# Recipes\n"
    "\n"
    "Every setting of a run is a key of its recipe. This page is made from the program's own table "
    "of settings\n"
    "(`train --print-settings-markdown`), which is also what reads recipes and prints "
    "`train --help`.\n"
    "\n"
    "    train --recipe lfuc_qwen0.5b.ini --set run.name=first --set train.steps=100\n"
    "\n"
    "## Where a recipe is looked for\n"
    "\n"
    "`--recipe NAME` is first taken as a file, with or without `.ini`. A bare name (no `/`) that "
    "is not in the current\n"
    "directory is then looked for among the installed recipes (`share/dense2moe/` beside the "
    "program's `bin/`) and in\n"
    "the `recipes/` folder of the source tree.\n"
    "\n"
    "## How a recipe is written\n"
    "\n"
    "    include = common.ini      # before the first section; relative to this file\n"
    "\n"
    "    [train]\n"
    "    tokens = 225e9            # 225000000000 works as well\n"
    "    global_batch = 19200\n"
    "\n"
    "- A line is `key = value`, `[section]`, `include = FILE`, blank, or a comment. Lines may have "
    "any length.\n"
    "- A comment starts with `#` or `;`, at the start of a line or after white space. A value that "
    "must keep such a\n"
    "  sign, or outer blanks, goes in double quotes, with `\\\"` and `\\\\` inside: "
    "`source = \"/models/base #2\"`.\n"
    "- Whole numbers may have a point or an exponent when the value is exact: `225e9`, `1.5e3`. "
    "There are no unit letters.\n"
    "- Real numbers are decimal and finite. Switches are `true`/`false`, `on`/`off`, `yes`/`no` or "
    "`1`/`0`.\n"
    "- Relative paths in values are relative to the directory the program is started in; only "
    "`include` is relative to the\n"
    "  file it stands in.\n"
    "- A file overrides what it includes; a later include overrides an earlier one; `--set` "
    "overrides the file, the last\n"
    "  `--set` of a key wins.\n"
    "- An unknown section or key, a key given twice in one file, a value of the wrong type or out "
    "of range, text that is\n"
    "  not UTF-8: each is an error with file, line and the nearest valid name, and exit code 2.\n"
    "\n"
    "The run writes the recipe it really used, with every key, to "
    "`<run>/recipe.resolved.ini`; that file is a recipe, too.\n";

static void markdown_text(FILE *out, const char *text) {
    for (; *text; text++) {
        if (strchr("|*<>", *text)) fputc('\\', out);
        fputc(*text, out);
    }
}

static void markdown_line(FILE *out, const SettingSection *section, const Setting *setting,
                          const char *value) {
    static const char *const kinds[] = {"integer", "real", "switch", "text", "choice"};
    if (!setting) {
        fprintf(out, "\n## [%s]\n\n", section->name);
        fprintf(out, "%c%s.\n\n", toupper(section->help[0]), section->help + 1);
        fprintf(out, "| key | type | default | valid | meaning |\n|---|---|---|---|---|\n");
        return;
    }
    char range[SETTING_RANGE_SIZE];
    setting_range_text(setting, range);
    fprintf(out, "| `%s` | %s | ", setting->key, kinds[setting->kind]);
    if (value[0]) fprintf(out, "`%s` ", value);
    fprintf(out, "| %s | ", setting->kind == SETTING_TEXT ? "" : range);
    markdown_text(out, setting->help);
    fprintf(out, " |\n");
}

void recipe_print_markdown(FILE *out) {
    Recipe defaults;
    recipe_defaults(&defaults);
    fputs(markdown_head, out);
    walk(out, &defaults, markdown_line);
}
