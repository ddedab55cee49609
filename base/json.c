// Strict JSON state files. Jansson refuses trailing text, bad UTF-8, NUL characters, numbers that
// do not fit and nesting beyond 2048 levels by itself; duplicate keys only when asked.
//
// Doubles are written with 17 significant digits, which bring back the same bits; integers stay
// integers to the last digit. Keys are sorted, so equal states are equal files.
#include "base/json.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "base/file.h"

Status json_parse(const char *text, size_t bytes, const char *name, json_t **out) {
    json_error_t error;
    json_t *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    if (!root) FAIL(STATUS_BAD_DATA, "%s:%d:%d: %s", name, error.line, error.column, error.text);
    if (!json_is_object(root)) {
        json_decref(root);
        FAIL(STATUS_BAD_DATA, "%s:1:1: expected an object { ... }, found an array", name);
    }
    *out = root;
    return STATUS_OK;
}

Status json_read_file(const char *path, uint64_t max_bytes, json_t **out) {
    char *text;
    size_t bytes;
    TRY(io_read_file(path, max_bytes, &text, &bytes));
    Status status = json_parse(text, bytes, path, out);
    free(text);
    return status;
}

Status json_write_file(const char *path, const json_t *root) {
    char *text = json_dumps(root, JSON_INDENT(2) | JSON_SORT_KEYS | JSON_REAL_PRECISION(17));
    if (!text) FAIL(STATUS_INTERNAL, "%s: out of memory, or a value that JSON cannot hold", path);
    size_t bytes = strlen(text);
    text[bytes] = '\n'; // in place of the NUL: files end with a line end
    Status status = io_write_file_atomic(path, text, bytes + 1);
    free(text);
    return status;
}

static const char *type_name(const json_t *value) {
    static const char *const names[] = {
        [JSON_OBJECT] = "an object",   [JSON_ARRAY] = "an array",     [JSON_STRING] = "a string",
        [JSON_INTEGER] = "an integer", [JSON_REAL] = "a real number", [JSON_TRUE] = "true",
        [JSON_FALSE] = "false",        [JSON_NULL] = "null",
    };
    return names[json_typeof(value)];
}

static Status get_member(const json_t *object, const char *name, const char *key, json_t **out) {
    *out = json_object_get(object, key);
    if (!*out) FAIL(STATUS_BAD_DATA, "%s: key \"%s\" is missing", name, key);
    return STATUS_OK;
}

static Status wrong_type(const json_t *value, const char *name, const char *key,
                         const char *expected) {
    FAIL(STATUS_BAD_DATA, "%s: key \"%s\" is %s, expected %s", name, key, type_name(value),
         expected);
}

Status json_get_int(const json_t *object, const char *name, const char *key, int64_t min,
                    int64_t max, int64_t *out) {
    json_t *value;
    TRY(get_member(object, name, key, &value));
    if (!json_is_integer(value)) return wrong_type(value, name, key, "an integer");
    int64_t number = json_integer_value(value);
    if (number < min || number > max) {
        FAIL(STATUS_BAD_DATA, "%s: key \"%s\" is %" PRId64 ", expected %" PRId64 " to %" PRId64,
             name, key, number, min, max);
    }
    *out = number;
    return STATUS_OK;
}

Status json_get_real(const json_t *object, const char *name, const char *key, double *out) {
    json_t *value;
    TRY(get_member(object, name, key, &value));
    if (!json_is_number(value)) return wrong_type(value, name, key, "a number");
    double number = json_number_value(value);
    if (!isfinite(number)) FAIL(STATUS_BAD_DATA, "%s: key \"%s\" is not finite", name, key);
    *out = number;
    return STATUS_OK;
}

Status json_get_bool(const json_t *object, const char *name, const char *key, bool *out) {
    json_t *value;
    TRY(get_member(object, name, key, &value));
    if (!json_is_boolean(value)) return wrong_type(value, name, key, "true or false");
    *out = json_is_true(value);
    return STATUS_OK;
}

Status json_get_text(const json_t *object, const char *name, const char *key, char *out,
                     size_t size) {
    json_t *value;
    TRY(get_member(object, name, key, &value));
    if (!json_is_string(value)) return wrong_type(value, name, key, "a string");
    size_t length = json_string_length(value);
    if (length >= size) {
        FAIL(STATUS_BAD_DATA, "%s: key \"%s\" has %zu bytes, expected at most %zu", name, key,
             length, size - 1);
    }
    memcpy(out, json_string_value(value), length + 1);
    return STATUS_OK;
}

Status json_get_object(const json_t *object, const char *name, const char *key, json_t **out) {
    json_t *value;
    TRY(get_member(object, name, key, &value));
    if (!json_is_object(value)) return wrong_type(value, name, key, "an object");
    *out = value;
    return STATUS_OK;
}

Status json_get_array(const json_t *object, const char *name, const char *key, json_t **out) {
    json_t *value;
    TRY(get_member(object, name, key, &value));
    if (!json_is_array(value)) return wrong_type(value, name, key, "an array");
    *out = value;
    return STATUS_OK;
}

bool json_has(const json_t *object, const char *key) {
    const json_t *value = json_object_get(object, key);
    return value && !json_is_null(value);
}
