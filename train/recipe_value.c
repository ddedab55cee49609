// One value of a recipe: text to number and back, with type and range checked.
//
// Integers may be written with a point or an exponent where the value is exact (225e9, 1.5e3):
// token counts are usually said that way. The arithmetic is done on integers, since a double would
// round above 2^53 without a word.
#include "train/recipe_table.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void recipe_defaults(Recipe *recipe) {
    memset(recipe, 0, sizeof *recipe);
    for (int i = 0; i < NUM_SETTINGS; i++) {
        const Setting *s = &recipe_settings[i];
        void *out = (char *)recipe + s->offset;
        switch (s->kind) {
        case SETTING_INT:
            *(int64_t *)out = s->int_default;
            break;
        case SETTING_REAL:
            *(double *)out = s->real_default;
            break;
        case SETTING_FLAG:
            *(bool *)out = s->int_default;
            break;
        case SETTING_TEXT:
            snprintf(out, RECIPE_TEXT_MAX, "%s", s->text_default);
            break;
        case SETTING_PICK:
            *(int *)out = (int)s->int_default;
            break;
        }
    }
}

// --- Reading --------------------------------------------------------------------------------

// Digits with an optional point, scaled by 10^exponent, when that is an integer. False otherwise.
static bool scale_digits(const char *digits, size_t length, int exponent, int64_t *out) {
    int64_t value = 0;
    int after_point = 0;
    bool point = false, any = false;
    for (size_t i = 0; i < length; i++) {
        if (digits[i] == '.') {
            if (point) return false;
            point = true;
            continue;
        }
        if (digits[i] < '0' || digits[i] > '9') return false;
        any = true;
        if (__builtin_mul_overflow(value, 10, &value) ||
            __builtin_add_overflow(value, digits[i] - '0', &value))
            return false;
        after_point += point;
    }
    if (!any) return false;
    for (exponent -= after_point; exponent > 0 && value; exponent--)
        if (__builtin_mul_overflow(value, 10, &value)) return false;
    for (; exponent < 0 && value; exponent++) {
        if (value % 10) return false;
        value /= 10;
    }
    *out = value;
    return true;
}

static bool parse_integer(const char *text, int64_t *out) {
    bool negative = text[0] == '-';
    if (negative) text++;
    size_t length = strcspn(text, "eE");
    long exponent = 0;
    if (text[length]) {
        const char *digits = text + length + 1;
        const char *first = digits + (*digits == '-' || *digits == '+');
        if (*first < '0' || *first > '9') return false;
        char *end;
        exponent = strtol(digits, &end, 10);
        if (*end || labs(exponent) > 1000) return false;
    }
    if (!scale_digits(text, length, (int)exponent, out)) return false;
    if (negative) *out = -*out;
    return true;
}

static Status assign_int(const char *where, const Setting *s, const char *value, int64_t *out) {
    char range[SETTING_RANGE_SIZE];
    setting_range_text(s, range);
    int64_t parsed;
    if (!parse_integer(value, &parsed))
        FAIL(STATUS_USAGE, "%s: %s.%s = '%.64s' is not a whole number (expected %s)", where,
             s->section, s->key, value, range);
    if (parsed < s->int_min || parsed > s->int_max)
        FAIL(STATUS_USAGE, "%s: %s.%s = %.64s is out of range (expected %s)", where, s->section,
             s->key, value, range);
    *out = parsed;
    return STATUS_OK;
}

static Status assign_real(const char *where, const Setting *s, const char *value, double *out) {
    char range[SETTING_RANGE_SIZE];
    setting_range_text(s, range);
    char *end;
    errno = 0;
    double parsed = strtod(value, &end);
    // The character set keeps out hexadecimal, "inf" and "nan"; ERANGE also reports numbers too
    // small to be held exactly enough.
    if (!*value || *end || value[strspn(value, "+-.0123456789eE")])
        FAIL(STATUS_USAGE, "%s: %s.%s = '%.64s' is not a number (expected %s)", where, s->section,
             s->key, value, range);
    if (errno == ERANGE || !isfinite(parsed) || parsed < s->real_min || parsed > s->real_max)
        FAIL(STATUS_USAGE, "%s: %s.%s = %.64s is out of range (expected %s)", where, s->section,
             s->key, value, range);
    *out = parsed;
    return STATUS_OK;
}

static Status assign_flag(const char *where, const Setting *s, const char *value, bool *out) {
    static const char *const words[][2] = {
        {"false", "true"}, {"off", "on"}, {"no", "yes"}, {"0", "1"}};
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++) {
        for (int truth = 0; truth < 2; truth++) {
            if (strcmp(value, words[i][truth]) != 0) continue;
            *out = truth;
            return STATUS_OK;
        }
    }
    FAIL(STATUS_USAGE, "%s: %s.%s = '%.64s' is not true or false", where, s->section, s->key,
         value);
}

static Status assign_text(const char *where, const Setting *s, const char *value, char *out) {
    size_t length = strlen(value);
    if (length >= RECIPE_TEXT_MAX)
        FAIL(STATUS_USAGE, "%s: %s.%s is %zu bytes long; at most %d are possible", where,
             s->section, s->key, length, RECIPE_TEXT_MAX - 1);
    for (size_t i = 0; i < length; i++)
        if ((unsigned char)value[i] < ' ' || value[i] == 0x7f)
            FAIL(STATUS_USAGE, "%s: %s.%s holds the control character 0x%02x", where, s->section,
                 s->key, (unsigned)(unsigned char)value[i]);
    memcpy(out, value, length + 1);
    return STATUS_OK;
}

bool setting_choice(const Setting *setting, int index, char *text) {
    const char *start = setting->choices;
    for (; index > 0; index--) {
        start = strchr(start, '|');
        if (!start) return false;
        start++;
    }
    snprintf(text, SETTING_RANGE_SIZE, "%.*s", (int)strcspn(start, "|"), start);
    return true;
}

static Status assign_pick(const char *where, const Setting *s, const char *value, int *out) {
    char choice[SETTING_RANGE_SIZE], nearest[SETTING_RANGE_SIZE] = "";
    int best = 3; // a choice with at most two wrong letters is offered
    for (int i = 0; setting_choice(s, i, choice); i++) {
        if (strcmp(choice, value) == 0) {
            *out = i;
            return STATUS_OK;
        }
        int distance = name_distance(value, choice, best);
        if (distance < best) {
            best = distance;
            memcpy(nearest, choice, sizeof nearest);
        }
    }
    char range[SETTING_RANGE_SIZE];
    setting_range_text(s, range);
    if (nearest[0])
        FAIL(STATUS_USAGE, "%s: %s.%s = '%.64s' is not %s; did you mean '%s'?", where, s->section,
             s->key, value, range, nearest);
    FAIL(STATUS_USAGE, "%s: %s.%s = '%.64s' is not %s", where, s->section, s->key, value, range);
}

Status setting_assign(const char *where, const Setting *setting, const char *value,
                      Recipe *recipe) {
    void *out = (char *)recipe + setting->offset;
    switch (setting->kind) {
    case SETTING_INT:
        return assign_int(where, setting, value, out);
    case SETTING_REAL:
        return assign_real(where, setting, value, out);
    case SETTING_FLAG:
        return assign_flag(where, setting, value, out);
    case SETTING_TEXT:
        return assign_text(where, setting, value, out);
    case SETTING_PICK:
        return assign_pick(where, setting, value, out);
    }
    FAIL(STATUS_INTERNAL, "setting %s.%s has no kind", setting->section, setting->key);
}

// --- Writing --------------------------------------------------------------------------------

// The shortest decimal that reads back to the same double, as people write it: 100, 0.95, 1e-5.
static void format_real(double value, char *text, size_t size) {
    if (value == floor(value) && fabs(value) < 1e9) {
        snprintf(text, size, "%.0f", value);
        return;
    }
    for (int digits = 1; digits <= 17; digits++) {
        snprintf(text, size, "%.*g", digits, value);
        if (strtod(text, NULL) == value) break;
    }
    char *exponent = strchr(text, 'e'); // "1e-05" and "1e+12" lose what says nothing
    if (!exponent) return;
    char *out = exponent + 1, *in = exponent + 1;
    if (*in == '-') *out++ = '-';
    in += 1 + strspn(in + 1, "0");
    memmove(out, in, strlen(in) + 1);
}

// Quotes only what would not survive plain: a leading quote, outer white space, " #" and " ;".
static void format_text(const char *value, char *text) {
    size_t length = strlen(value);
    bool plain = value[0] != '"';
    for (size_t i = 0; i < length; i++) {
        bool comment = value[i] == '#' || value[i] == ';';
        if (value[i] == ' ' && (i == 0 || i + 1 == length)) plain = false;
        if (comment && (i == 0 || value[i - 1] == ' ')) plain = false;
    }
    if (plain) {
        memcpy(text, value, length + 1);
        return;
    }
    char *out = text;
    *out++ = '"';
    for (size_t i = 0; i < length; i++) {
        if (value[i] == '"' || value[i] == '\\') *out++ = '\\';
        *out++ = value[i];
    }
    *out++ = '"';
    *out = '\0';
}

void setting_format(const Setting *setting, const Recipe *recipe, char *text) {
    const void *value = (const char *)recipe + setting->offset;
    switch (setting->kind) {
    case SETTING_INT:
        snprintf(text, SETTING_VALUE_SIZE, "%" PRId64, *(const int64_t *)value);
        break;
    case SETTING_REAL:
        format_real(*(const double *)value, text, SETTING_VALUE_SIZE);
        break;
    case SETTING_FLAG:
        snprintf(text, SETTING_VALUE_SIZE, "%s", *(const bool *)value ? "true" : "false");
        break;
    case SETTING_TEXT:
        format_text(value, text);
        break;
    case SETTING_PICK:
        if (!setting_choice(setting, *(const int *)value, text)) text[0] = '\0';
        break;
    }
}

void setting_range_text(const Setting *s, char *text) {
    size_t size = SETTING_RANGE_SIZE;
    char low[32], high[32];
    switch (s->kind) {
    case SETTING_INT:
        if (s->int_max == INT64_MAX)
            snprintf(text, size, "%" PRId64 " or more", s->int_min);
        else
            snprintf(text, size, "%" PRId64 " to %" PRId64, s->int_min, s->int_max);
        break;
    case SETTING_REAL:
        format_real(s->real_min, low, sizeof low);
        format_real(s->real_max, high, sizeof high);
        snprintf(text, size, "%s to %s", low, high);
        break;
    case SETTING_FLAG:
        snprintf(text, size, "true or false");
        break;
    case SETTING_TEXT:
        snprintf(text, size, "text");
        break;
    case SETTING_PICK: {
        char choice[SETTING_RANGE_SIZE];
        snprintf(text, size, "one of");
        for (int i = 0; setting_choice(s, i, choice); i++) {
            size_t used = strlen(text);
            snprintf(text + used, size - used, "%s %s", i ? "," : "", choice);
        }
        break;
    }
    }
}
