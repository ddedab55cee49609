// The INI reader: strict, so that a typing error costs a second and not a training run.
//
// A file is checked as a whole first (size, UTF-8, no control characters), then read line by line:
// blank, comment, `include = FILE`, `[section]` or `key = value`. Includes stand before the first
// section, because a file overrides what it includes: what is written first is also applied first.
//
//   train_shared.ini          [optim] lr = 1e-4
//   lfuc.ini                  include = train_shared.ini
//                             [optim] lr = 2e-4            -> 2e-4
//
// Every message starts with "file:line: ". Caps on size, depth and number of files bound what a
// hostile recipe can cost.
#include "train/recipe_parse.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include "base/file.h"
#include "train/recipe_table.h"

enum { WHERE_SIZE = IO_PATH_MAX + 16 };

// One file being read. `outer` is the file that includes it.
typedef struct Reader {
    const struct Reader *outer;
    const char *name;      // for messages
    const char *real_path; // NULL: from memory, where nothing can be included
    int *files_read;       // in all
    int depth;
    Recipe *recipe;
    const char *section;        // NULL before the first one
    int line;                   // 1, 2, ...
    int given_at[NUM_SETTINGS]; // line that set the key in this file; 0 = none
    char where[WHERE_SIZE];     // "name:line"
} Reader;

static Status read_file(const char *path, Reader *reader);

// --- Text -----------------------------------------------------------------------------------

// Bytes of the UTF-8 character at `text`, 0 when it is not one (Unicode, table 3-7).
static size_t utf8_character(const unsigned char *text, size_t left) {
    unsigned char a = text[0];
    if (a < 0x80) return 1;
    size_t length = a >= 0xc2 && a <= 0xdf   ? 2
                    : (a & 0xf0) == 0xe0     ? 3
                    : a >= 0xf0 && a <= 0xf4 ? 4
                                             : 0;
    if (length == 0 || length > left) return 0;
    for (size_t i = 1; i < length; i++)
        if ((text[i] & 0xc0) != 0x80) return 0;
    unsigned char b = text[1];
    bool overlong = (a == 0xe0 && b < 0xa0) || (a == 0xf0 && b < 0x90);
    bool surrogate = a == 0xed && b > 0x9f, too_large = a == 0xf4 && b > 0x8f;
    return overlong || surrogate || too_large ? 0 : length;
}

static Status check_text(const char *name, const char *text, size_t bytes) {
    int line = 1;
    for (size_t i = 0; i < bytes;) {
        unsigned char c = (unsigned char)text[i];
        bool line_end = c == '\n' || (c == '\r' && i + 1 < bytes && text[i + 1] == '\n');
        if ((c < ' ' && c != '\t' && !line_end) || c == 0x7f)
            FAIL(STATUS_USAGE, "%s:%d: control character 0x%02x; a recipe is plain text", name,
                 line, c);
        size_t length = utf8_character((const unsigned char *)text + i, bytes - i);
        if (length == 0) FAIL(STATUS_USAGE, "%s:%d: byte 0x%02x is not valid UTF-8", name, line, c);
        line += c == '\n';
        i += length;
    }
    return STATUS_OK;
}

static bool is_blank(char c) {
    return c == ' ' || c == '\t' || c == '\r';
}

// Cuts blanks at both ends of [*text, end) and terminates it.
static char *trim(char *text, char *end) {
    while (text < end && is_blank(*text)) text++;
    while (end > text && is_blank(end[-1])) end--;
    *end = '\0';
    return text;
}

// True when nothing but blanks and a comment follows.
static bool only_comment(const char *text) {
    while (is_blank(*text)) text++;
    return *text == '\0' || *text == '#' || *text == ';';
}

// Takes comment and quotes off a trimmed value, in place.
static Status clean_value(const Reader *reader, char **value) {
    char *text = *value;
    if (*text != '"') {
        for (char *c = text; *c; c++)
            if ((*c == '#' || *c == ';') && (c == text || is_blank(c[-1]))) {
                *value = trim(text, c);
                return STATUS_OK;
            }
        return STATUS_OK;
    }
    char *out = text, *in = text + 1;
    while (*in && *in != '"') {
        if (*in == '\\' && (in[1] == '"' || in[1] == '\\')) in++;
        *out++ = *in++;
    }
    if (*in != '"') FAIL(STATUS_USAGE, "%s: the closing quote \" is missing", reader->where);
    if (!only_comment(in + 1))
        FAIL(STATUS_USAGE, "%s: '%.64s' after the closing quote; write \\\" for a quote inside",
             reader->where, in + 1);
    *out = '\0';
    return STATUS_OK;
}

// --- Lines ----------------------------------------------------------------------------------

static Status read_section(Reader *reader, char *text) {
    char *end = strchr(text, ']');
    if (!end || !only_comment(end + 1))
        FAIL(STATUS_USAGE, "%s: '%.64s' is not a section; expected [name]", reader->where, text);
    return setting_find_section(reader->where, trim(text + 1, end), &reader->section);
}

static Status read_include(Reader *reader, const char *file) {
    if (reader->section)
        FAIL(STATUS_USAGE, "%s: include must stand before the first section (here [%s])",
             reader->where, reader->section);
    if (!reader->real_path)
        FAIL(STATUS_USAGE, "%s: include is only possible in a file", reader->where);
    if (!file[0]) FAIL(STATUS_USAGE, "%s: include names no file", reader->where);
    if (reader->depth + 1 >= RECIPE_MAX_DEPTH)
        FAIL(STATUS_USAGE, "%s: includes are nested more than %d deep", reader->where,
             RECIPE_MAX_DEPTH);

    char path[IO_PATH_MAX];
    const char *slash = strrchr(reader->real_path, '/');
    if (file[0] == '/')
        TRY(io_path(path, "%s", file));
    else
        TRY(io_path(path, "%.*s%s", (int)(slash - reader->real_path + 1), reader->real_path, file));
    Reader *inner = calloc(1, sizeof *inner);
    if (!inner) FAIL(STATUS_INTERNAL, "no memory to read a recipe");
    inner->outer = reader;
    inner->files_read = reader->files_read;
    inner->depth = reader->depth + 1;
    inner->recipe = reader->recipe;
    Status status = read_file(path, inner);
    free(inner);
    return status;
}

static Status read_key(Reader *reader, char *text) {
    char *equals = strchr(text, '=');
    if (!equals)
        FAIL(STATUS_USAGE, "%s: '%.64s' is neither key = value nor [section]", reader->where, text);
    char *value = trim(equals + 1, equals + 1 + strlen(equals + 1));
    const char *key = trim(text, equals);
    TRY(clean_value(reader, &value));
    if (strcmp(key, "include") == 0) return read_include(reader, value);
    if (!reader->section)
        FAIL(STATUS_USAGE, "%s: key '%.64s' stands before the first [section]", reader->where, key);

    const Setting *setting = NULL;
    TRY(setting_find(reader->where, reader->section, key, &setting));
    int *given_at = &reader->given_at[setting - recipe_settings];
    if (*given_at)
        FAIL(STATUS_USAGE, "%s: key '%s' of [%s] was already given in line %d", reader->where, key,
             reader->section, *given_at);
    *given_at = reader->line;
    return setting_assign(reader->where, setting, value, reader->recipe);
}

static Status read_line(Reader *reader, char *text) {
    snprintf(reader->where, sizeof reader->where, "%s:%d", reader->name, reader->line);
    text = trim(text, text + strlen(text));
    if (only_comment(text)) return STATUS_OK;
    if (*text == '[') return read_section(reader, text);
    return read_key(reader, text);
}

// `text` holds bytes + 1 bytes, the last of them NUL; it is cut up in place.
static Status read_text(Reader *reader, char *text, size_t bytes) {
    static const char byte_order_mark[] = "\xef\xbb\xbf";
    TRY(check_text(reader->name, text, bytes));
    if (strncmp(text, byte_order_mark, 3) == 0) text += 3;
    while (*text) {
        reader->line++;
        size_t length = strcspn(text, "\n");
        bool last = text[length] == '\0';
        text[length] = '\0';
        TRY(read_line(reader, text));
        text += length + !last;
    }
    return STATUS_OK;
}

// --- Files ----------------------------------------------------------------------------------

static Status check_cycle(const Reader *reader) {
    for (const Reader *r = reader->outer; r; r = r->outer)
        if (strcmp(r->real_path, reader->real_path) == 0)
            FAIL(STATUS_USAGE, "%s: include goes round in a circle: %s includes itself",
                 reader->outer->where, reader->real_path);
    if (++*reader->files_read > RECIPE_MAX_FILES)
        FAIL(STATUS_USAGE, "%s: more than %d files are included", reader->outer->where,
             RECIPE_MAX_FILES);
    return STATUS_OK;
}

// Reads `path` into a prepared reader, whose name and real path it sets while it reads.
static Status read_file(const char *path, Reader *reader) {
    Status status = STATUS_OK;
    char *text = NULL, *real_path = realpath(path, NULL);
    size_t bytes = 0;
    const char *from = reader->outer ? reader->outer->where : "recipe";
    if (!real_path) FAIL(STATUS_MISSING_INPUT, "%s: %s: %s", from, path, strerror(errno));
    reader->name = path;
    reader->real_path = real_path;
    TRY_GOTO(check_cycle(reader), done);
    TRY_GOTO(io_read_file(path, RECIPE_MAX_BYTES, &text, &bytes), done);
    TRY_GOTO(read_text(reader, text, bytes), done);
done:
    free(text);
    free(real_path);
    return status;
}

Status recipe_read_file(const char *path, Recipe *recipe) {
    int files_read = 0;
    Reader *reader = calloc(1, sizeof *reader);
    if (!reader) FAIL(STATUS_INTERNAL, "no memory to read a recipe");
    reader->files_read = &files_read;
    reader->recipe = recipe;
    Status status = read_file(path, reader);
    free(reader);
    return status;
}

Status recipe_parse(const char *text, size_t bytes, const char *name, Recipe *recipe) {
    if (bytes > RECIPE_MAX_BYTES)
        FAIL(STATUS_USAGE, "%s: %zu bytes; a recipe has at most %d", name, bytes, RECIPE_MAX_BYTES);
    Status status = STATUS_OK;
    char *copy = malloc(bytes + 1);
    Reader *reader = calloc(1, sizeof *reader);
    if (!copy || !reader) FAIL_GOTO(done, STATUS_INTERNAL, "no memory to read a recipe");
    if (bytes) memcpy(copy, text, bytes);
    copy[bytes] = '\0';
    reader->name = name;
    reader->recipe = recipe;
    TRY_GOTO(read_text(reader, copy, bytes), done);
done:
    free(reader);
    free(copy);
    return status;
}
