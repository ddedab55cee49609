// shards.json: any bytes either fail with BAD_DATA and a message that names the file, or give a
// list of shards whose names stay in the directory and whose counts add up.
#include "tests/fuzz/fuzz.h"

#include <string.h>
#include "data/manifest.h"

static const char name[] = "shards.json";

static void check_shards(const DataManifest *manifest) {
    const DatasetSummary *summary = &manifest->summary;
    uint64_t tokens = 0, documents = 0;
    FUZZ_CHECK(summary->num_shards >= 1);
    FUZZ_CHECK(summary->vocab_size >= 1 && summary->eos_id < summary->vocab_size);
    for (int i = 0; i < summary->num_shards; i++) {
        const ManifestShard *shard = &manifest->shards[i];
        FUZZ_CHECK(shard->name[0] && shard->name[0] != '.' && !strchr(shard->name, '/'));
        FUZZ_CHECK(strlen(shard->hash) == HASH_HEX_SIZE - 1);
        FUZZ_CHECK(shard->bytes > 0 && shard->tokens > 0 && shard->documents > 0);
        FUZZ_CHECK(!__builtin_add_overflow(tokens, shard->tokens, &tokens));
        FUZZ_CHECK(!__builtin_add_overflow(documents, shard->documents, &documents));
    }
    FUZZ_CHECK(tokens == summary->tokens && documents == summary->documents);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    DataManifest manifest;
    Status status = data_manifest_parse((const char *)data, size, name, &manifest);
    if (status == STATUS_OK) {
        check_shards(&manifest);
        data_manifest_free(&manifest);
        return 0;
    }
    FUZZ_CHECK(status == STATUS_BAD_DATA);
    FUZZ_CHECK(strncmp(status_message(), name, strlen(name)) == 0);
    return 0;
}
