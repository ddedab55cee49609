// The order of the checks is the protection: size and hash of the whole file first, by plain reads;
// only a file that is what its writer made is shown to HDF5, in a child process; only a structure
// that agrees with shards.json is scanned. Shards found in the cache skip hash and scan; their
// structure is read anew, all in one child.
//
// Processes that start together on one host (the ranks of a run) take turns with a lock on
// shards.json: the first verifies, the others then find its cache.
#include "data/verify.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#include "base/clock.h"
#include "base/file.h"
#include "base/log.h"
#include "data/verify_cache.h"

typedef struct Job {
    const char *directory;
    const DataManifest *manifest;
    const VerifyOptions *options;
    ShardFinding *findings;
    VerifyCache *cache;
    char (*paths)[IO_PATH_MAX];
    struct stat *files; // as they were before they were read
    uint64_t bytes_before, bytes_all;
    double last_shown;
} Job;

static void show_progress(void *context, uint64_t bytes) {
    Job *job = context;
    double now = clock_seconds(), giga = 1e-9;
    if (now - job->last_shown < 0.2) return;
    job->last_shown = now;
    log_transient("verifying %s: %.1f of %.1f GB", job->directory,
                  (double)(job->bytes_before + bytes) * giga, (double)job->bytes_all * giga);
}

// --- One shard -----------------------------------------------------------------------------------

static Status examine(const char *path, struct stat *file) {
    uint64_t bytes;
    TRY(io_file_size(path, &bytes)); // its messages for missing and special files
    if (stat(path, file) != 0) FAIL(STATUS_IO, "%s: cannot examine", path);
    return STATUS_OK;
}

static Status check_hash(Job *job, int i) {
    const ManifestShard *shard = &job->manifest->shards[i];
    const char *path = job->paths[i];
    char hash[HASH_HEX_SIZE];
    uint64_t bytes = (uint64_t)job->files[i].st_size;
    if (bytes != shard->bytes) {
        FAIL(STATUS_BAD_DATA, "%s: has %" PRIu64 " bytes, shards.json says %" PRIu64 ": %s", path,
             bytes, shard->bytes, bytes < shard->bytes ? "truncated" : "something was appended");
    }
    TRY(hash_file(path, hash, &bytes, show_progress, job));
    if (strcmp(hash, shard->hash) != 0) {
        FAIL(STATUS_BAD_DATA,
             "%s: its XXH3-128 is %s, shards.json says %s: the file changed after it was written; "
             "copy or prepare it again",
             path, hash, shard->hash);
    }
    return STATUS_OK;
}

static Status check_agreement(const char *path, const ShardLayout *layout,
                              const DatasetSummary *summary, const ManifestShard *shard) {
    const struct {
        const char *name;
        int64_t found, expected;
    } numbers[] = {
        {"tokens", (int64_t)layout->num_tokens, (int64_t)shard->tokens},
        {"documents", (int64_t)layout->num_documents, (int64_t)shard->documents},
        {"vocab_size", layout->vocab_size, summary->vocab_size},
        {"eos_id", layout->eos_id, summary->eos_id},
    };
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        if (numbers[i].found == numbers[i].expected) continue;
        FAIL(STATUS_BAD_DATA, "%s: has %s %" PRId64 ", shards.json says %" PRId64, path,
             numbers[i].name, numbers[i].found, numbers[i].expected);
    }
    if (strcmp(layout->tokenizer_id, summary->tokenizer_id) != 0) {
        FAIL(STATUS_BAD_DATA, "%s: has tokenizer_sha256 %s, shards.json says %s", path,
             layout->tokenizer_id, summary->tokenizer_id);
    }
    return STATUS_OK;
}

static Status check_unchanged(Job *job, int i) {
    struct stat now;
    const struct stat *before = &job->files[i];
    TRY(examine(job->paths[i], &now));
    if (now.st_size != before->st_size || now.st_ino != before->st_ino ||
        memcmp(&now.st_mtim, &before->st_mtim, sizeof now.st_mtim) != 0)
        FAIL(STATUS_BAD_DATA, "%s: changed while it was verified", job->paths[i]);
    return STATUS_OK;
}

// Takes over what a child process said about shard i.
static Status take_verdict(Job *job, int i, const SandboxVerdict *verdict) {
    if (verdict->code != STATUS_OK) FAIL(verdict->code, "%s", verdict->message);
    return check_agreement(job->paths[i], &job->findings[i].layout, &job->manifest->summary,
                           &job->manifest->shards[i]);
}

// A shard that the cache does not know.
static Status verify_anew(Job *job, int i) {
    const char *path = job->paths[i];
    SandboxVerdict verdict = {.code = STATUS_OK};
    TRY(check_hash(job, i));
    TRY(shard_parse(&path, 1, &job->findings[i].layout, &verdict));
    TRY(take_verdict(job, i, &verdict));
    TRY(shard_scan(path, &job->findings[i].layout));
    TRY(check_unchanged(job, i));
    verify_cache_add(job->cache, &job->manifest->shards[i], &job->files[i]);
    return STATUS_OK;
}

static Status verify_one(Job *job, int i) {
    TRY(examine(job->paths[i], &job->files[i]));
    if (!job->options->ignore_cache &&
        verify_cache_holds(job->cache, &job->manifest->shards[i], &job->files[i])) {
        job->findings[i].from_cache = true; // verify_cached looks at all of these at once
        return STATUS_OK;
    }
    return verify_anew(job, i);
}

// --- All of them ---------------------------------------------------------------------------------

// Notes how shard i ended; true if the caller shall stop.
static bool note(Job *job, int i, Status status) {
    ShardFinding *finding = &job->findings[i];
    finding->code = status;
    if (status == STATUS_OK) return false;
    snprintf(finding->message, sizeof finding->message, "%s", status_message());
    status_clear();
    return job->options->stop_at_first;
}

// The structure of the shards from the cache, in one child.
static Status verify_cached(Job *job) {
    Status status = STATUS_OK;
    int count = 0, num_shards = job->manifest->summary.num_shards;
    const char **paths = calloc((size_t)num_shards, sizeof *paths);
    ShardLayout *layouts = calloc((size_t)num_shards, sizeof *layouts);
    SandboxVerdict *verdicts = calloc((size_t)num_shards, sizeof *verdicts);
    if (!paths || !layouts || !verdicts)
        FAIL_GOTO(done, STATUS_INTERNAL, "out of memory verifying %s", job->directory);
    for (int i = 0; i < num_shards; i++)
        if (job->findings[i].from_cache) paths[count++] = job->paths[i];
    TRY_GOTO(shard_parse(paths, count, layouts, verdicts), done);
    for (int i = 0, k = 0; i < num_shards; i++) {
        if (!job->findings[i].from_cache) continue;
        job->findings[i].layout = layouts[k];
        if (note(job, i, take_verdict(job, i, &verdicts[k++]))) break;
    }
done:
    free(paths);
    free(layouts);
    free(verdicts);
    return status;
}

static Status verify_all(Job *job) {
    const DataManifest *manifest = job->manifest;
    for (int i = 0; i < manifest->summary.num_shards; i++) {
        TRY(io_path(job->paths[i], "%s/%s", job->directory, manifest->shards[i].name));
        job->bytes_all += manifest->shards[i].bytes;
    }
    bool stop = false;
    for (int i = 0; i < manifest->summary.num_shards && !stop; i++) {
        stop = note(job, i, verify_one(job, i));
        job->bytes_before += manifest->shards[i].bytes;
    }
    return stop ? STATUS_OK : verify_cached(job);
}

// On file systems without locks everybody verifies.
static void wait_for_turn(int fd, const char *directory) {
    if (flock(fd, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) return;
    log_info("%s: waiting for another process that verifies it", directory);
    (void)flock(fd, LOCK_EX);
}

Status verify_shards(const char *directory, const DataManifest *manifest,
                     const VerifyOptions *options, ShardFinding *findings) {
    Status status = STATUS_OK;
    size_t count = (size_t)manifest->summary.num_shards;
    Job job = {.directory = directory,
               .manifest = manifest,
               .options = options,
               .findings = findings,
               .paths = calloc(count, sizeof *job.paths),
               .files = calloc(count, sizeof *job.files)};
    char path[IO_PATH_MAX];
    int lock = -1;
    memset(findings, 0, count * sizeof *findings);
    if (!job.paths || !job.files)
        FAIL_GOTO(done, STATUS_INTERNAL, "out of memory verifying %s", directory);
    TRY_GOTO(io_path(path, "%s/shards.json", directory), done);
    TRY_GOTO(io_open(path, O_RDONLY, &lock), done);
    wait_for_turn(lock, directory);
    job.cache = verify_cache_load(directory);
    TRY_GOTO(verify_all(&job), done);
    verify_cache_save(job.cache);
done:
    verify_cache_free(job.cache);
    if (lock >= 0) close(lock);
    free(job.paths);
    free(job.files);
    return status;
}
