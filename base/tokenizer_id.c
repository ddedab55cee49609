// Which tokenizer a directory holds, as a SHA-256 of the files that decide which ids a text has.
#include "base/tokenizer_id.h"

#include <string.h>
#include "base/file.h"
#include "base/json.h"
#include "base/sha256.h"

enum { MAX_MARKER_BYTES = 4096 };
_Static_assert((int)TOKENIZER_ID_SIZE == (int)SHA256_HEX_SIZE, "an identity is a SHA-256");

// The bytes tokenizer has no vocabulary file; a marker names it.
static Status check_marker(const char *path) {
    json_t *root;
    char type[32];
    TRY(json_read_file(path, MAX_MARKER_BYTES, &root));
    Status status = json_get_text(root, path, "type", type, sizeof type);
    size_t keys = json_object_size(root);
    json_decref(root);
    TRY(status);
    if (strcmp(type, "bytes") != 0 || keys != 1)
        FAIL(STATUS_BAD_DATA, "%s: expected {\"type\": \"bytes\"}, found type \"%s\" of %zu keys",
             path, type, keys);
    return STATUS_OK;
}

Status hf_tokenizer_id(const char *directory, char out[TOKENIZER_ID_SIZE]) {
    char marker[IO_PATH_MAX], single[IO_PATH_MAX], vocab[IO_PATH_MAX], merges[IO_PATH_MAX];
    TRY(io_path(marker, "%s/dense2moe_tokenizer.json", directory));
    TRY(io_path(single, "%s/tokenizer.json", directory));
    TRY(io_path(vocab, "%s/vocab.json", directory));
    TRY(io_path(merges, "%s/merges.txt", directory));
    if (io_exists(marker)) {
        TRY(check_marker(marker));
        memcpy(out, TOKENIZER_BYTES_ID, TOKENIZER_ID_SIZE);
        return STATUS_OK;
    }
    Sha256 sha;
    sha256_begin(&sha);
    out[0] = '\0';
    if (io_exists(single)) {
        TRY(sha256_update_file(&sha, single));
    } else if (io_exists(vocab) && io_exists(merges)) {
        TRY(sha256_update_file(&sha, vocab));
        TRY(sha256_update_file(&sha, merges));
    } else {
        return STATUS_OK;
    }
    sha256_hex(&sha, out);
    return STATUS_OK;
}
