// Headers of weight files: any bytes either fail with BAD_DATA and a message that names the file,
// or give tensors that tile the data section, so that no read of an element can leave the file.
#include "tests/fuzz/fuzz.h"

#include <string.h>
#include "model/safetensors.h"

static const char name[] = "fuzz.safetensors";

static void check_header(const SafetensorsHeader *header, uint64_t file_bytes) {
    uint64_t sum = 0;
    FUZZ_CHECK(header->data_offset >= 8 && header->data_offset <= file_bytes);
    for (size_t i = 0; i < header->count; i++) {
        const SafetensorsEntry *entry = &header->entries[i];
        FUZZ_CHECK(entry->begin <= entry->end);
        FUZZ_CHECK(entry->end <= file_bytes - header->data_offset);
        FUZZ_CHECK(entry->ndim >= 0 && entry->ndim <= SAFETENSORS_MAX_DIMS);
        if (entry->known_dtype)
            FUZZ_CHECK(entry->count * dtype_bytes(entry->dtype) == entry->end - entry->begin);
        if (i > 0) FUZZ_CHECK(strcmp(header->entries[i - 1].name, entry->name) < 0);
        sum += entry->end - entry->begin;
    }
    FUZZ_CHECK(sum == file_bytes - header->data_offset);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    SafetensorsHeader header;
    Status status = safetensors_parse(data, size, size, name, &header);
    if (status != STATUS_OK) {
        FUZZ_CHECK(status == STATUS_BAD_DATA);
        FUZZ_CHECK(strncmp(status_message(), name, strlen(name)) == 0);
        FUZZ_CHECK(header.entries == NULL && header.count == 0);
        return 0;
    }
    check_header(&header, size);
    safetensors_header_free(&header);
    return 0;
}
