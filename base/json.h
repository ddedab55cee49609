// JSON state files through jansson, strictly: duplicate keys, trailing text, bad UTF-8 and files
// over the cap are refused with file, line and column. Getters fail naming file and key, so that
// callers read as a list of what a file must hold.
#ifndef BASE_JSON_H
#define BASE_JSON_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "base/status.h"

// `name` is used in messages. The root must be an object. Free with json_decref.
Status json_parse(const char *text, size_t bytes, const char *name, json_t **out) NODISCARD;
Status json_read_file(const char *path, uint64_t max_bytes, json_t **out) NODISCARD;
Status json_write_file(const char *path, const json_t *root) NODISCARD; // atomic, sorted, indented

// Required members; range-checked. `name` is the file's name for messages.
Status json_get_int(const json_t *object, const char *name, const char *key, int64_t min,
                    int64_t max, int64_t *out) NODISCARD;
Status json_get_real(const json_t *object, const char *name, const char *key,
                     double *out) NODISCARD; // accepts integers; finite
Status json_get_bool(const json_t *object, const char *name, const char *key, bool *out) NODISCARD;
Status json_get_text(const json_t *object, const char *name, const char *key, char *out,
                     size_t size) NODISCARD; // fails when it does not fit
Status json_get_object(const json_t *object, const char *name, const char *key,
                       json_t **out) NODISCARD; // borrowed
Status json_get_array(const json_t *object, const char *name, const char *key,
                      json_t **out) NODISCARD;        // borrowed
bool json_has(const json_t *object, const char *key); // present and not null

#endif
