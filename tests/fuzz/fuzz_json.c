// JSON state files: any bytes either fail with BAD_DATA and a message that names the file, or give
// an object whose members the getters take or refuse cleanly, and that survives writing and
// reading again.
#include "tests/fuzz/fuzz.h"

#include <math.h>
#include <string.h>
#include "base/json.h"

static const char name[] = "state.json";

static void check_refusal(Status status) {
    FUZZ_CHECK(status == STATUS_BAD_DATA);
    FUZZ_CHECK(strncmp(status_message(), name, strlen(name)) == 0);
}

// Exactly one kind of getter takes a member, and it takes it within its promises.
static void check_getters(const json_t *object, const char *key) {
    int64_t integer;
    double real;
    bool truth;
    char text[16];
    json_t *inner;
    Status status = json_get_int(object, name, key, -1000, 1000, &integer);
    if (status == STATUS_OK) FUZZ_CHECK(integer >= -1000 && integer <= 1000);
    if (status != STATUS_OK) check_refusal(status);
    status = json_get_real(object, name, key, &real);
    if (status == STATUS_OK) FUZZ_CHECK(isfinite(real));
    if (status != STATUS_OK) check_refusal(status);
    status = json_get_text(object, name, key, text, sizeof text);
    if (status == STATUS_OK) FUZZ_CHECK(memchr(text, '\0', sizeof text) != NULL);
    if (status != STATUS_OK) check_refusal(status);
    status = json_get_bool(object, name, key, &truth);
    if (status != STATUS_OK) check_refusal(status);
    status = json_get_array(object, name, key, &inner);
    if (status != STATUS_OK) check_refusal(status);
    status = json_get_object(object, name, key, &inner);
    if (status != STATUS_OK) check_refusal(status);
}

static void check_object(json_t *object) {
    const char *key;
    json_t *member;
    json_object_foreach(object, key, member) {
        check_getters(object, key);
        if (json_is_object(member)) check_object(member);
    }
    check_getters(object, "a key that is not there");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    json_t *root, *again;
    Status status = json_parse((const char *)data, size, name, &root);
    if (status != STATUS_OK) {
        check_refusal(status);
        return 0;
    }
    FUZZ_CHECK(json_is_object(root));
    check_object(root);

    char *text = json_dumps(root, JSON_INDENT(2) | JSON_SORT_KEYS | JSON_REAL_PRECISION(17));
    FUZZ_CHECK(text != NULL);
    FUZZ_CHECK(json_parse(text, strlen(text), name, &again) == STATUS_OK);
    FUZZ_CHECK(json_equal(root, again));
    json_decref(again);
    free(text);
    json_decref(root);
    return 0;
}
