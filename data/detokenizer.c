// The inverse of byte-level BPE is a table: the text of a sequence of ids is the bytes of its
// tokens joined. Vocabularies store those bytes as printable characters: a byte that is a printable
// Latin-1 character stands for itself, the other 68 are numbered upwards from U+0100 in the order
// of their values (GPT-2's byte-to-unicode table; 'Ġ', U+0120, is the space). Added tokens, special
// ones above all, are stored as plain text instead.
#include "data/detokenizer.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include "base/file.h"
#include "base/json.h"

enum {
    MAX_FILE_BYTES = 256 << 20,
    MAX_IDS = 1 << 24,
    NUM_BYTES = 256,
    ALPHABET_END = 0x100 + 68, // code points that can stand for a byte
    NO_BYTE = -1,
};

struct Detokenizer {
    char **pieces; // (num_ids), NULL where there is no token
    uint32_t *lengths;
    int64_t num_ids;
};

// --- The table -----------------------------------------------------------------------------------

static bool stands_for_itself(int byte) {
    return (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

static void fill_alphabet(int alphabet[ALPHABET_END]) {
    for (int i = 0; i < ALPHABET_END; i++) alphabet[i] = NO_BYTE;
    for (int byte = 0, next = 0x100; byte < NUM_BYTES; byte++)
        alphabet[stands_for_itself(byte) ? byte : next++] = byte;
}

// The next code point of valid UTF-8 (jansson refuses other); all that matter have at most 2 bytes.
static uint32_t next_code_point(const unsigned char **at) {
    uint32_t first = *(*at)++;
    int more = first < 0x80 ? 0 : first < 0xE0 ? 1 : first < 0xF0 ? 2 : 3;
    uint32_t code = more == 0 ? first : first & (0x3Fu >> more);
    for (; more > 0; more--) code = code << 6 | (*(*at)++ & 0x3Fu);
    return code;
}

static Status reserve(Detokenizer *detokenizer, const char *path, int64_t id) {
    if (id < 0 || id >= MAX_IDS)
        FAIL(STATUS_BAD_DATA, "%s: token id %" PRId64 ", expected 0 to %d", path, id, MAX_IDS - 1);
    if (id < detokenizer->num_ids) return STATUS_OK;
    int64_t count = id + 1 > 2 * detokenizer->num_ids ? id + 1 : 2 * detokenizer->num_ids;
    char **pieces = realloc(detokenizer->pieces, (size_t)count * sizeof *pieces);
    if (pieces) detokenizer->pieces = pieces;
    uint32_t *lengths = realloc(detokenizer->lengths, (size_t)count * sizeof *lengths);
    if (lengths) detokenizer->lengths = lengths;
    if (!pieces || !lengths) FAIL(STATUS_INTERNAL, "%s: out of memory", path);
    memset(pieces + detokenizer->num_ids, 0,
           (size_t)(count - detokenizer->num_ids) * sizeof *pieces);
    detokenizer->num_ids = count;
    return STATUS_OK;
}

static Status set_piece(Detokenizer *detokenizer, const char *path, int64_t id, const char *bytes,
                        size_t length) {
    TRY(reserve(detokenizer, path, id));
    char *piece = malloc(length + 1);
    if (!piece) FAIL(STATUS_INTERNAL, "%s: out of memory", path);
    memcpy(piece, bytes, length);
    piece[length] = '\0';
    free(detokenizer->pieces[id]); // an added token replaces the vocabulary's
    detokenizer->pieces[id] = piece;
    detokenizer->lengths[id] = (uint32_t)length;
    return STATUS_OK;
}

// --- Files ---------------------------------------------------------------------------------------

static Status add_byte_tokens(Detokenizer *detokenizer, const char *path) {
    for (int byte = 0; byte < NUM_BYTES; byte++) {
        char value = (char)byte;
        TRY(set_piece(detokenizer, path, byte, &value, 1));
    }
    return set_piece(detokenizer, path, NUM_BYTES, "", 0); // the end of a document
}

// The bytes that a vocabulary's token stands for, at most as many as it has; false when it has a
// character outside the alphabet.
static bool decode_token(const int *alphabet, const char *token, size_t length, char *bytes,
                         size_t *written) {
    const unsigned char *at = (const unsigned char *)token, *end = at + length;
    *written = 0;
    while (at < end) {
        uint32_t code = next_code_point(&at);
        if (code >= ALPHABET_END || alphabet[code] == NO_BYTE) return false;
        bytes[(*written)++] = (char)alphabet[code];
    }
    return true;
}

// A vocabulary: {token: id}. Tokens outside the alphabet are plain text.
static Status add_vocabulary(Detokenizer *detokenizer, const char *path, json_t *vocabulary) {
    int alphabet[ALPHABET_END];
    const char *token;
    json_t *id;
    fill_alphabet(alphabet);
    json_object_foreach(vocabulary, token, id) {
        size_t length = strlen(token), written;
        if (!json_is_integer(id))
            FAIL(STATUS_BAD_DATA, "%s: token \"%.40s\" has no integer id", path, token);
        char *bytes = malloc(length + 1);
        if (!bytes) FAIL(STATUS_INTERNAL, "%s: out of memory", path);
        bool encoded = decode_token(alphabet, token, length, bytes, &written);
        Status status = set_piece(detokenizer, path, json_integer_value(id),
                                  encoded ? bytes : token, encoded ? written : length);
        free(bytes);
        TRY(status);
    }
    return STATUS_OK;
}

static Status add_content(Detokenizer *detokenizer, const char *path, int64_t id,
                          const json_t *token) {
    const char *content = json_string_value(json_object_get(token, "content"));
    if (!content) FAIL(STATUS_BAD_DATA, "%s: added token %" PRId64 " has no \"content\"", path, id);
    return set_piece(detokenizer, path, id, content, strlen(content));
}

// Whether a component of tokenizer.json, or a member of the sequence that it is, is ByteLevel.
static bool is_byte_level(const json_t *component) {
    static const char *const lists[] = {"decoders", "pretokenizers"};
    const char *type = json_string_value(json_object_get(component, "type"));
    if (type && strcmp(type, "ByteLevel") == 0) return true;
    for (size_t l = 0; l < sizeof lists / sizeof lists[0]; l++) {
        json_t *list = json_object_get(component, lists[l]), *entry;
        size_t i;
        json_array_foreach(list, i, entry) {
            type = json_string_value(json_object_get(entry, "type"));
            if (type && strcmp(type, "ByteLevel") == 0) return true;
        }
    }
    return false;
}

static Status read_single_file(Detokenizer *detokenizer, const char *path, const json_t *root) {
    json_t *model, *vocabulary, *added, *token;
    size_t i;
    TRY(json_get_object(root, path, "model", &model));
    if (!is_byte_level(json_object_get(root, "decoder")) &&
        !is_byte_level(json_object_get(root, "pre_tokenizer"))) {
        FAIL(STATUS_BAD_DATA, "%s: not a byte-level tokenizer, which is all that can be shown here",
             path);
    }
    TRY(json_get_object(model, path, "vocab", &vocabulary));
    TRY(add_vocabulary(detokenizer, path, vocabulary));
    added = json_object_get(root, "added_tokens");
    json_array_foreach(added, i, token) {
        int64_t id;
        TRY(json_get_int(token, path, "id", 0, MAX_IDS - 1, &id));
        TRY(add_content(detokenizer, path, id, token));
    }
    return STATUS_OK;
}

static Status read_added_tokens(Detokenizer *detokenizer, const char *path, const json_t *root) {
    json_t *added = json_object_get(root, "added_tokens_decoder"), *token;
    const char *id;
    json_object_foreach(added, id, token) {
        char *end;
        long long number = strtoll(id, &end, 10);
        if (*end || !*id) FAIL(STATUS_BAD_DATA, "%s: added token id \"%s\"", path, id);
        TRY(add_content(detokenizer, path, number, token));
    }
    return STATUS_OK;
}

typedef Status (*FileReader)(Detokenizer *detokenizer, const char *path, const json_t *root);

static Status read_vocabulary_file(Detokenizer *detokenizer, const char *path, const json_t *root) {
    return add_vocabulary(detokenizer, path, (json_t *)root);
}

static Status read_with(FileReader reader, Detokenizer *detokenizer, const char *path) {
    json_t *root;
    TRY(json_read_file(path, MAX_FILE_BYTES, &root));
    Status status = reader(detokenizer, path, root);
    json_decref(root);
    return status;
}

static Status read_directory(Detokenizer *detokenizer, const char *directory) {
    char marker[IO_PATH_MAX], single[IO_PATH_MAX], vocabulary[IO_PATH_MAX], config[IO_PATH_MAX];
    TRY(io_path(marker, "%s/dense2moe_tokenizer.json", directory));
    TRY(io_path(single, "%s/tokenizer.json", directory));
    TRY(io_path(vocabulary, "%s/vocab.json", directory));
    TRY(io_path(config, "%s/tokenizer_config.json", directory));
    if (io_exists(marker)) return add_byte_tokens(detokenizer, marker);
    if (io_exists(single)) return read_with(read_single_file, detokenizer, single);
    if (!io_exists(vocabulary))
        FAIL(STATUS_MISSING_INPUT, "%s: holds neither tokenizer.json nor vocab.json", directory);
    TRY(read_with(read_vocabulary_file, detokenizer, vocabulary));
    return io_exists(config) ? read_with(read_added_tokens, detokenizer, config) : STATUS_OK;
}

// --- Use -----------------------------------------------------------------------------------------

Status detokenizer_open(const char *directory, Detokenizer **out) {
    Detokenizer *detokenizer = calloc(1, sizeof *detokenizer);
    if (!detokenizer) FAIL(STATUS_INTERNAL, "out of memory reading %s", directory);
    Status status = read_directory(detokenizer, directory);
    if (status != STATUS_OK) {
        detokenizer_close(detokenizer);
        return status;
    }
    *out = detokenizer;
    return STATUS_OK;
}

void detokenizer_close(Detokenizer *detokenizer) {
    if (!detokenizer) return;
    for (int64_t id = 0; id < detokenizer->num_ids; id++) free(detokenizer->pieces[id]);
    free(detokenizer->pieces);
    free(detokenizer->lengths);
    free(detokenizer);
}

const char *detokenizer_piece(const Detokenizer *detokenizer, int32_t id, size_t *bytes) {
    if (id < 0 || id >= detokenizer->num_ids || !detokenizer->pieces[id]) return NULL;
    *bytes = detokenizer->lengths[id];
    return detokenizer->pieces[id];
}
