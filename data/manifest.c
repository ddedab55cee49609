// Reading shards.json. Every number is range-checked here, so that sums over shards cannot overflow
// and nothing is allocated on a file's word alone.
#include "data/manifest.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include "base/checked.h"
#include "base/file.h"
#include "base/json.h"
#include "data/shard.h"

enum { MANIFEST_VERSION = 1, MANIFEST_MAX_BYTES = 64 << 20, MANIFEST_MAX_SHARDS = 1 << 16 };
static const int64_t max_count = INT64_C(1) << 50; // tokens or bytes of one shard

static Status read_names(const json_t *object, const char *path, ManifestShard *shard) {
    TRY(json_get_text(object, path, "file", shard->name, sizeof shard->name));
    // A name never leads out of the directory.
    if (!shard->name[0] || shard->name[0] == '.' || strchr(shard->name, '/')) {
        FAIL(STATUS_BAD_DATA, "%s: \"%s\" is not the name of a file in the directory", path,
             shard->name);
    }
    TRY(json_get_text(object, path, "xxh3_128", shard->hash, sizeof shard->hash));
    if (strspn(shard->hash, "0123456789abcdef") != HASH_HEX_SIZE - 1) {
        FAIL(STATUS_BAD_DATA, "%s: %s: \"xxh3_128\" is \"%s\", expected %d hex digits", path,
             shard->name, shard->hash, HASH_HEX_SIZE - 1);
    }
    return STATUS_OK;
}

static Status read_shard(const json_t *object, const char *path, ManifestShard *shard) {
    int64_t bytes, tokens, documents;
    if (!json_is_object(object))
        FAIL(STATUS_BAD_DATA, "%s: \"shards\" has a member that is not an object", path);
    TRY(read_names(object, path, shard));
    TRY(json_get_int(object, path, "bytes", 1, max_count, &bytes));
    TRY(json_get_int(object, path, "tokens", 1, max_count, &tokens));
    TRY(json_get_int(object, path, "documents", 1, max_count, &documents));
    shard->bytes = (uint64_t)bytes;
    shard->tokens = (uint64_t)tokens;
    shard->documents = (uint64_t)documents;
    return STATUS_OK;
}

static Status read_shards(const json_t *root, const char *path, DataManifest *out) {
    DatasetSummary *summary = &out->summary;
    json_t *list;
    TRY(json_get_array(root, path, "shards", &list));
    size_t count = json_array_size(list);
    if (count < 1 || count > MANIFEST_MAX_SHARDS) {
        FAIL(STATUS_BAD_DATA, "%s: lists %zu shards, expected 1 to %d", path, count,
             MANIFEST_MAX_SHARDS);
    }
    out->shards = calloc(count, sizeof *out->shards);
    if (!out->shards) FAIL(STATUS_INTERNAL, "out of memory reading %s", path);
    summary->num_shards = (int)count;
    for (size_t i = 0; i < count; i++) {
        TRY(read_shard(json_array_get(list, i), path, &out->shards[i]));
        summary->tokens += out->shards[i].tokens;
        summary->documents += out->shards[i].documents;
    }
    return STATUS_OK;
}

static Status read_header(const json_t *root, const char *path, DatasetSummary *summary) {
    char format[32];
    int64_t version, vocab_size;
    TRY(json_get_text(root, path, "format", format, sizeof format));
    if (strcmp(format, "dense2moe-shards") != 0) {
        FAIL(STATUS_BAD_DATA, "%s: \"format\" is \"%s\", expected \"dense2moe-shards\"", path,
             format);
    }
    TRY(json_get_int(root, path, "version", INT64_MIN, INT64_MAX, &version));
    if (version != MANIFEST_VERSION) {
        FAIL(STATUS_BAD_DATA, "%s: is of version %" PRId64 ", this program reads %d", path, version,
             MANIFEST_VERSION);
    }
    TRY(json_get_int(root, path, "vocab_size", 1, INT32_MAX, &vocab_size));
    TRY(json_get_int(root, path, "eos_id", -1, vocab_size - 1, &summary->eos_id));
    summary->vocab_size = (int)vocab_size;
    return json_get_text(root, path, "tokenizer_sha256", summary->tokenizer_id,
                         sizeof summary->tokenizer_id);
}

static Status check_totals(const json_t *root, const char *path, const DatasetSummary *summary) {
    int64_t tokens, documents;
    TRY(json_get_int(root, path, "tokens", 0, INT64_MAX, &tokens));
    TRY(json_get_int(root, path, "documents", 0, INT64_MAX, &documents));
    if ((uint64_t)tokens != summary->tokens || (uint64_t)documents != summary->documents) {
        FAIL(STATUS_BAD_DATA,
             "%s: says %" PRId64 " tokens in %" PRId64 " documents, its shards add up to %" PRIu64
             " in %" PRIu64,
             path, tokens, documents, summary->tokens, summary->documents);
    }
    return STATUS_OK;
}

Status data_manifest_parse(const char *text, size_t bytes, const char *name, DataManifest *out) {
    Status status = STATUS_OK;
    json_t *root = NULL;
    memset(out, 0, sizeof *out);
    TRY(json_parse(text, bytes, name, &root));
    TRY_GOTO(read_header(root, name, &out->summary), done);
    TRY_GOTO(read_shards(root, name, out), done);
    TRY_GOTO(check_totals(root, name, &out->summary), done);
done:
    json_decref(root);
    if (status != STATUS_OK) data_manifest_free(out);
    return status;
}

Status data_manifest_read(const char *directory, DataManifest *out) {
    char path[IO_PATH_MAX], *text;
    size_t bytes;
    memset(out, 0, sizeof *out);
    if (!directory[0]) FAIL(STATUS_USAGE, "no directory of token shards given");
    if (!io_is_directory(directory)) {
        FAIL(STATUS_MISSING_INPUT,
             "%s: no such directory of token shards; make one with scripts/prepare_data.py",
             directory);
    }
    TRY(io_path(path, "%s/shards.json", directory));
    if (!io_exists(path)) {
        FAIL(STATUS_MISSING_INPUT,
             "%s: no shards.json: not a directory of token shards, or its preparation did not "
             "finish",
             directory);
    }
    TRY(io_read_file(path, MANIFEST_MAX_BYTES, &text, &bytes));
    Status status = data_manifest_parse(text, bytes, path, out);
    free(text);
    return status;
}

void data_manifest_free(DataManifest *manifest) {
    free(manifest->shards);
    memset(manifest, 0, sizeof *manifest);
}

Status dataset_summary(const char *directory, DatasetSummary *out) {
    DataManifest manifest;
    TRY(data_manifest_read(directory, &manifest));
    *out = manifest.summary;
    data_manifest_free(&manifest);
    return STATUS_OK;
}

bool tokenizer_ids_agree(const char *shards_id, const char *model_id) {
    bool unknown = shards_id[strspn(shards_id, "0")] == '\0' || !model_id[0];
    return unknown || strcmp(shards_id, model_id) == 0;
}
