// A small JSON file, keyed by shard name. What identifies a file's state is compared as a whole, as
// one JSON object, so that a field added later makes old entries count for nothing.
#include "data/verify_cache.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "base/file.h"
#include "base/json.h"
#include "base/log.h"

enum { CACHE_VERSION = 1, CACHE_MAX_BYTES = 64 << 20, SETTLE_NS = 2000000000 };

struct VerifyCache {
    char directory[IO_PATH_MAX]; // with links resolved
    json_t *entries;             // file name -> entry
    bool changed;
};

static int64_t nanoseconds(const struct timespec *time) {
    return (int64_t)time->tv_sec * 1000000000 + time->tv_nsec;
}

// --- The two places ------------------------------------------------------------------------------

static Status beside_shards(const VerifyCache *cache, char path[IO_PATH_MAX]) {
    return io_path(path, "%s/.verified.json", cache->directory);
}

static Status in_home(const VerifyCache *cache, char folder[IO_PATH_MAX], char path[IO_PATH_MAX]) {
    const char *base = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    char name[HASH_HEX_SIZE];
    hash_to_hex(hash_bytes(cache->directory, strlen(cache->directory)), name);
    if (base && base[0] == '/') {
        TRY(io_path(folder, "%s/dense2moe", base));
    } else if (home && home[0] == '/') {
        TRY(io_path(folder, "%s/.cache/dense2moe", home));
    } else {
        FAIL(STATUS_CANNOT_WRITE, "neither XDG_CACHE_HOME nor HOME names a directory");
    }
    return io_path(path, "%s/verified-%s.json", folder, name);
}

// --- Loading -------------------------------------------------------------------------------------

static Status add_entries_of(const char *path, json_t *entries) {
    Status status = STATUS_OK;
    json_t *root = NULL, *found;
    int64_t version;
    TRY(json_read_file(path, CACHE_MAX_BYTES, &root));
    TRY_GOTO(json_get_int(root, path, "version", CACHE_VERSION, CACHE_VERSION, &version), done);
    TRY_GOTO(json_get_object(root, path, "shards", &found), done);
    if (json_object_update(entries, found) != 0)
        FAIL_GOTO(done, STATUS_INTERNAL, "out of memory reading %s", path);
done:
    json_decref(root);
    return status;
}

static void load_from(VerifyCache *cache, Status located, const char *path) {
    if (located == STATUS_OK && !io_exists(path)) return;
    if (located != STATUS_OK || add_entries_of(path, cache->entries) != STATUS_OK) {
        log_debug("verification cache not used: %s", status_message());
        status_clear();
    }
}

VerifyCache *verify_cache_load(const char *directory) {
    char path[IO_PATH_MAX], folder[IO_PATH_MAX];
    VerifyCache *cache = calloc(1, sizeof *cache);
    if (!cache) return NULL;
    cache->entries = json_object();
    if (!cache->entries || !realpath(directory, cache->directory)) {
        verify_cache_free(cache);
        return NULL;
    }
    load_from(cache, in_home(cache, folder, path), path);
    load_from(cache, beside_shards(cache, path), path);
    return cache;
}

// --- Entries -------------------------------------------------------------------------------------

static json_t *make_entry(const ManifestShard *shard, const struct stat *file) {
    return json_pack("{s:s, s:I, s:I, s:I, s:I}", "xxh3_128", shard->hash, "bytes",
                     (json_int_t)file->st_size, "inode", (json_int_t)file->st_ino, "modified_ns",
                     (json_int_t)nanoseconds(&file->st_mtim), "changed_ns",
                     (json_int_t)nanoseconds(&file->st_ctim));
}

bool verify_cache_holds(const VerifyCache *cache, const ManifestShard *shard,
                        const struct stat *file) {
    if (!cache) return false;
    json_t *now = make_entry(shard, file);
    bool same = now && json_equal(json_object_get(cache->entries, shard->name), now);
    json_decref(now);
    return same;
}

void verify_cache_add(VerifyCache *cache, const ManifestShard *shard, const struct stat *file) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (!cache || nanoseconds(&now) - nanoseconds(&file->st_mtim) < SETTLE_NS ||
        nanoseconds(&now) - nanoseconds(&file->st_ctim) < SETTLE_NS)
        return;
    if (json_object_set_new(cache->entries, shard->name, make_entry(shard, file)) == 0)
        cache->changed = true;
}

// --- Saving --------------------------------------------------------------------------------------

static Status save(VerifyCache *cache, json_t *root) {
    char path[IO_PATH_MAX], folder[IO_PATH_MAX];
    TRY(beside_shards(cache, path));
    if (json_write_file(path, root) == STATUS_OK) return STATUS_OK;
    status_clear(); // a data directory is often read-only
    TRY(in_home(cache, folder, path));
    TRY(io_make_directories(folder));
    return json_write_file(path, root);
}

void verify_cache_save(VerifyCache *cache) {
    if (!cache || !cache->changed) return;
    json_t *root = json_pack("{s:i, s:O}", "version", CACHE_VERSION, "shards", cache->entries);
    Status status = root ? save(cache, root) : STATUS_OK;
    if (status != STATUS_OK) {
        log_debug("verification of %s not remembered: %s", cache->directory, status_message());
        status_clear();
    }
    json_decref(root);
    cache->changed = false;
}

void verify_cache_free(VerifyCache *cache) {
    if (!cache) return;
    json_decref(cache->entries);
    free(cache);
}
