// manifest.json of a checkpoint: any bytes either fail with BAD_DATA and a message that names the
// file, or give a list of plain file names, each once, that loading can do with.
#include "tests/fuzz/fuzz.h"

#include <string.h>
#include "train/checkpoint_manifest.h"

static const char name[] = "manifest.json";

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    json_t *root;
    Manifest manifest;
    if (json_parse((const char *)data, size, name, &root) != STATUS_OK) return 0;
    Status status = manifest_from_json(root, name, &manifest);
    json_decref(root);
    if (status != STATUS_OK) {
        FUZZ_CHECK(status == STATUS_BAD_DATA);
        FUZZ_CHECK(strncmp(status_message(), name, strlen(name)) == 0);
        return 0;
    }
    FUZZ_CHECK(manifest.step >= 0 && manifest.count >= 3);
    for (int i = 0; i < manifest.count; i++) {
        const ManifestFile *file = &manifest.files[i];
        FUZZ_CHECK(file->name[0] && file->name[0] != '.' && !strchr(file->name, '/'));
        FUZZ_CHECK(strlen(file->hash.hex) == HASH_HEX_SIZE - 1);
        const uint64_t covered = file->hash.block_bytes * (uint64_t)file->hash.num_blocks;
        FUZZ_CHECK(file->hash.num_blocks >= 0 && file->hash.num_blocks <= HASH_BLOCKS_MAX);
        FUZZ_CHECK(file->hash.block_bytes == 0 || covered >= file->hash.bytes);
        FUZZ_CHECK(i == 0 || strcmp(manifest.files[i - 1].name, file->name) < 0);
    }
    manifest_free(&manifest);
    return 0;
}
