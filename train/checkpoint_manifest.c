// Reading and writing manifest.json. A manifest may lie (bit rot, an editor, an attacker), so
// nothing in it is used as a path before it is known to be a plain file name, and a manifest that
// leaves out a file that loading needs is as broken as one whose hashes are wrong.
#include "train/checkpoint_manifest.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/file.h"
#include "train/checkpoint_slices.h"

enum { MANIFEST_VERSION = 1, MANIFEST_MAX_BYTES = 64 << 20 };
static const char format_name[] = "dense2moe-checkpoint";

Status manifest_add(Manifest *manifest, const char *name, const FileHash *hash) {
    size_t count = (size_t)manifest->count + 1;
    ManifestFile *grown = realloc(manifest->files, count * sizeof *grown);
    if (!grown) FAIL(STATUS_INTERNAL, "out of memory for the manifest");
    manifest->files = grown;
    ManifestFile *file = &grown[manifest->count++];
    INVARIANT(strlen(name) < sizeof file->name);
    strcpy(file->name, name);
    file->hash = *hash;
    return STATUS_OK;
}

void manifest_free(Manifest *manifest) {
    free(manifest->files);
    *manifest = (Manifest){0};
}

enum { BLOCK_DIGITS = 16 };

static json_t *file_to_json(const ManifestFile *file) {
    const FileHash *hash = &file->hash;
    char blocks[BLOCK_DIGITS * HASH_BLOCKS_MAX + 1] = "";
    json_t *object = json_pack("{s:s, s:I, s:s}", "name", file->name, "bytes",
                               (json_int_t)hash->bytes, "xxh3_128", hash->hex);
    if (!object || hash->block_bytes == 0) return object;
    for (int i = 0; i < hash->num_blocks; i++)
        snprintf(blocks + BLOCK_DIGITS * i, BLOCK_DIGITS + 1, "%016" PRIx64, hash->blocks[i]);
    if (json_object_set_new(object, "block_bytes", json_integer((json_int_t)hash->block_bytes)) ==
            0 &&
        json_object_set_new(object, "xxh3_64", json_string(blocks)) == 0)
        return object;
    json_decref(object);
    return NULL;
}

Status manifest_write(const Manifest *manifest, const char *directory) {
    char path[IO_PATH_MAX];
    TRY(io_path(path, "%s/" MANIFEST_NAME, directory));
    json_t *files = json_array();
    for (int i = 0; i < manifest->count; i++)
        json_array_append_new(files, file_to_json(&manifest->files[i]));
    json_t *root = json_pack("{s:s, s:i, s:I, s:o}", "format", format_name, "version",
                             MANIFEST_VERSION, "step", (json_int_t)manifest->step, "files", files);
    bool complete = root && json_array_size(files) == (size_t)manifest->count;
    if (!complete) {
        json_decref(root);
        FAIL(STATUS_INTERNAL, "%s: out of memory", path);
    }
    Status status = json_write_file(path, root);
    json_decref(root);
    return status;
}

static const ManifestFile *find(const Manifest *manifest, const char *name) {
    for (int i = 0; i < manifest->count; i++)
        if (strcmp(manifest->files[i].name, name) == 0) return &manifest->files[i];
    return NULL;
}

static Status read_blocks(const json_t *object, const char *name, ManifestFile *file) {
    FileHash *hash = &file->hash;
    char text[BLOCK_DIGITS * HASH_BLOCKS_MAX + 1];
    int64_t block_bytes;
    if (!json_object_get(object, "block_bytes") && !json_object_get(object, "xxh3_64"))
        return STATUS_OK;
    TRY(json_get_int(object, name, "block_bytes", 1, INT64_MAX, &block_bytes));
    TRY(json_get_text(object, name, "xxh3_64", text, sizeof text));
    hash->block_bytes = hash_block_bytes(hash->bytes);
    if ((uint64_t)block_bytes != hash->block_bytes)
        FAIL(STATUS_BAD_DATA, "%s: block_bytes of %s is %" PRId64 ", expected %" PRIu64, name,
             file->name, block_bytes, hash->block_bytes);
    const uint64_t blocks = (hash->bytes + hash->block_bytes - 1) / hash->block_bytes;
    const size_t digits = strspn(text, "0123456789abcdef");
    if (text[digits] || digits != BLOCK_DIGITS * blocks)
        FAIL(STATUS_BAD_DATA, "%s: xxh3_64 of %s is not %d hex digits for each of its blocks", name,
             file->name, BLOCK_DIGITS);
    hash->num_blocks = (int)blocks;
    for (int i = 0; i < hash->num_blocks; i++)
        (void)sscanf(text + BLOCK_DIGITS * i, "%16" SCNx64, &hash->blocks[i]);
    return STATUS_OK;
}

static Status read_file_entry(const json_t *object, const char *name, Manifest *manifest) {
    ManifestFile file = {0};
    FileHash *hash = &file.hash;
    int64_t bytes;
    if (!json_is_object(object)) FAIL(STATUS_BAD_DATA, "%s: a file is not an object", name);
    TRY(json_get_text(object, name, "name", file.name, sizeof file.name));
    TRY(json_get_int(object, name, "bytes", 0, INT64_MAX, &bytes));
    TRY(json_get_text(object, name, "xxh3_128", hash->hex, sizeof hash->hex));
    if (!file.name[0] || file.name[0] == '.' || strchr(file.name, '/'))
        FAIL(STATUS_BAD_DATA, "%s: \"%s\" is not a plain file name", name, file.name);
    if (strlen(hash->hex) != HASH_HEX_SIZE - 1)
        FAIL(STATUS_BAD_DATA, "%s: xxh3_128 of %s is \"%s\", expected 32 hex digits", name,
             file.name, hash->hex);
    hash->bytes = (uint64_t)bytes;
    TRY(read_blocks(object, name, &file));
    return manifest_add(manifest, file.name, hash);
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const ManifestFile *)a)->name, ((const ManifestFile *)b)->name);
}

static Status check_complete(const Manifest *manifest, const char *name) {
    static const char *const needed[] = {"model.safetensors", "state.json"};
    for (int i = 0; i < 2; i++)
        if (!find(manifest, needed[i]))
            FAIL(STATUS_BAD_DATA, "%s: %s is not listed", name, needed[i]);
    int world = 0, listed = 0;
    for (int i = 0; i < manifest->count; i++) {
        int rank, of;
        char expected[64];
        if (i > 0 && strcmp(manifest->files[i - 1].name, manifest->files[i].name) == 0)
            FAIL(STATUS_BAD_DATA, "%s: %s is listed twice", name, manifest->files[i].name);
        if (sscanf(manifest->files[i].name, "optimizer-%5d-of-%5d.", &rank, &of) != 2) continue;
        if (world == 0) world = of;
        // Sorted by name, the files of one world are the ranks 0, 1, 2, ...
        if (of != world || rank != listed || rank >= world)
            FAIL(STATUS_BAD_DATA, "%s: unexpected optimizer file %s", name,
                 manifest->files[i].name);
        TRY(slices_file_name(rank, world, expected));
        if (strcmp(manifest->files[i].name, expected) != 0)
            FAIL(STATUS_BAD_DATA, "%s: unexpected optimizer file %s, expected %s", name,
                 manifest->files[i].name, expected);
        listed++;
    }
    if (world == 0 || listed != world)
        FAIL(STATUS_BAD_DATA, "%s: lists %d optimizer files of %d", name, listed, world);
    return STATUS_OK;
}

static Status parse(const json_t *root, const char *name, Manifest *out) {
    char format[64];
    int64_t version;
    json_t *files;
    TRY(json_get_text(root, name, "format", format, sizeof format));
    if (strcmp(format, format_name) != 0)
        FAIL(STATUS_BAD_DATA, "%s: format is \"%s\", expected \"%s\"", name, format, format_name);
    TRY(json_get_int(root, name, "version", 1, INT64_MAX, &version));
    if (version > MANIFEST_VERSION)
        FAIL(STATUS_BAD_DATA, "%s: version %lld is newer than this program's %d", name,
             (long long)version, MANIFEST_VERSION);
    TRY(json_get_int(root, name, "step", 0, INT64_MAX, &out->step));
    TRY(json_get_array(root, name, "files", &files));
    if (json_array_size(files) > CHECKPOINT_MAX_RANKS + 16)
        FAIL(STATUS_BAD_DATA, "%s: lists %zu files", name, json_array_size(files));
    for (size_t i = 0; i < json_array_size(files); i++)
        TRY(read_file_entry(json_array_get(files, i), name, out));
    if (out->count > 1) qsort(out->files, (size_t)out->count, sizeof *out->files, by_name);
    return check_complete(out, name);
}

Status manifest_from_json(const json_t *root, const char *name, Manifest *out) {
    *out = (Manifest){0};
    Status status = parse(root, name, out);
    if (status != STATUS_OK) manifest_free(out);
    return status;
}

Status manifest_read(const char *directory, Manifest *out) {
    char path[IO_PATH_MAX];
    json_t *root;
    *out = (Manifest){0};
    TRY(io_path(path, "%s/" MANIFEST_NAME, directory));
    TRY(json_read_file(path, MANIFEST_MAX_BYTES, &root));
    Status status = manifest_from_json(root, path, out);
    json_decref(root);
    return status;
}

bool manifest_is_newer(const char *directory) {
    char path[IO_PATH_MAX];
    json_t *root;
    int64_t version = 0;
    StatusRecord record;
    status_take(&record);
    Status status = io_path(path, "%s/" MANIFEST_NAME, directory);
    if (status == STATUS_OK) status = json_read_file(path, MANIFEST_MAX_BYTES, &root);
    if (status == STATUS_OK) {
        status = json_get_int(root, path, "version", 1, INT64_MAX, &version);
        json_decref(root);
    }
    (void)status_put(&record);
    return status == STATUS_OK && version > MANIFEST_VERSION;
}
