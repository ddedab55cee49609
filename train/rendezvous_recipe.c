// Which settings differ between two resolved recipes. Both list the same keys in the same order, so
// they are compared line by line; whatever does not fit that is left to their hashes.
#include <stdio.h>
#include <string.h>
#include "train/rendezvous_wire.h"

enum { SHOWN = 4, VALUE_SHOWN = 60, SECTION_TEXT = 32 };

typedef struct Line {
    const char *text, *value; // value: behind " = ", or NULL
    int bytes, key_bytes, value_bytes;
} Line;

static Line next_line(const char **at) {
    Line line = {.text = *at, .bytes = (int)strcspn(*at, "\n")};
    *at += line.bytes + (line.text[line.bytes] == '\n');
    const char *equals = memchr(line.text, '=', (size_t)line.bytes);
    if (!equals) return line;
    line.key_bytes = (int)(equals - line.text);
    while (line.key_bytes > 0 && line.text[line.key_bytes - 1] == ' ') line.key_bytes--;
    line.value = equals + 1 + (equals[1] == ' ');
    line.value_bytes = (int)(line.text + line.bytes - line.value);
    if (line.value_bytes < 0) line.value_bytes = 0; // "key =" at the end of its line
    if (line.value_bytes > VALUE_SHOWN) line.value_bytes = VALUE_SHOWN;
    return line;
}

static bool same_bytes(const char *a, int a_bytes, const char *b, int b_bytes) {
    return a_bytes == b_bytes && memcmp(a, b, (size_t)a_bytes) == 0;
}

void rendezvous_recipe_differences(const char *other, const char *own, char *text, size_t room) {
    char section[SECTION_TEXT] = "";
    size_t used = 0;
    int count = 0;
    text[0] = '\0';
    while (*other && *own) {
        Line theirs = next_line(&other), ours = next_line(&own);
        if (ours.text[0] == '[')
            snprintf(section, sizeof section, "%.*s", (int)strcspn(ours.text + 1, "]\n"),
                     ours.text + 1);
        if (same_bytes(theirs.text, theirs.bytes, ours.text, ours.bytes)) continue;
        if (!theirs.value || !ours.value ||
            !same_bytes(theirs.text, theirs.key_bytes, ours.text, ours.key_bytes))
            return; // recipes of different programs
        if (++count > SHOWN || used >= room) continue;
        bool option = ours.text[0] == '-'; // of the command line, not of a section
        int more =
            snprintf(text + used, room - used, "%s%s%s%.*s = %.*s (rank 0: %.*s)", used ? ", " : "",
                     option ? "" : section, option ? "" : ".", ours.key_bytes, ours.text,
                     theirs.value_bytes, theirs.value, ours.value_bytes, ours.value);
        used += more > 0 ? (size_t)more : 0;
    }
    if (count > SHOWN && used < room)
        snprintf(text + used, room - used, " and %d more", count - SHOWN);
}
