// Small token shards for tests, written with the HDF5 library: good ones, and every kind that must
// be refused.
#ifndef TESTS_SHARD_FIXTURE_H
#define TESTS_SHARD_FIXTURE_H

#include <hdf5.h>
#include <inttypes.h>
#include <stdint.h>
#include "base/hash.h"
#include "data/loader.h"
#include "tests/test.h"

// How a shard differs from a good one.
typedef enum ShardFlaw {
    SHARD_GOOD,
    SHARD_CHUNKED,
    SHARD_FILTERED,
    SHARD_COMPACT,
    SHARD_EXTERNAL,
    SHARD_VIRTUAL,
    SHARD_SOFT_LINK,
    SHARD_EXTERNAL_LINK,
    SHARD_INT32,
    SHARD_BIG_ENDIAN,
    SHARD_FLOAT,
    SHARD_TWO_DIMENSIONS,
    SHARD_NOT_ALLOCATED,
    SHARD_TOKENS_ARE_A_GROUP,
    SHARD_NO_DOCUMENTS,
    SHARD_EXTRA_OBJECT,
    SHARD_NO_VOCAB_ATTRIBUTE,
    SHARD_VARIABLE_TEXT,
    SHARD_ARRAY_ATTRIBUTE,
    SHARD_OTHER_FORMAT,
    SHARD_OTHER_VERSION,
    SHARD_BAD_TOKENIZER_ID,
} ShardFlaw;

#define FIXTURE_TOKENIZER "1c937cda051e406cb170168253e013168e7f8a4152778b4230b61d101b2e90f4"

typedef struct ShardSpec {
    const uint32_t *tokens;
    uint64_t num_tokens;
    const uint64_t *offsets; // (num_documents + 1)
    uint64_t num_documents;
    int token_bytes; // 2 or 4
    int vocab_size;
    int eos_id;
    const char *tokenizer_id; // NULL: FIXTURE_TOKENIZER
    ShardFlaw flaw;
} ShardSpec;

#define H5_OK(call) ck_assert_msg((call) >= 0, "%s failed", #call)

static void fixture_text(hid_t file, const char *name, const char *text, bool variable) {
    hid_t type = H5Tcopy(H5T_C_S1), space = H5Screate(H5S_SCALAR);
    H5_OK(H5Tset_size(type, variable ? H5T_VARIABLE : strlen(text) + 1));
    hid_t attribute = H5Acreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    H5_OK(H5Awrite(attribute, type, variable ? (const void *)&text : text));
    H5Aclose(attribute);
    H5Sclose(space);
    H5Tclose(type);
}

static void fixture_int(hid_t file, const char *name, int64_t value, bool array) {
    hsize_t one = 1;
    hid_t space = array ? H5Screate_simple(1, &one, NULL) : H5Screate(H5S_SCALAR);
    hid_t attribute = H5Acreate2(file, name, H5T_STD_I64LE, space, H5P_DEFAULT, H5P_DEFAULT);
    H5_OK(H5Awrite(attribute, H5T_NATIVE_INT64, &value));
    H5Aclose(attribute);
    H5Sclose(space);
}

static void fixture_attributes(hid_t file, const ShardSpec *spec) {
    const char *id = spec->tokenizer_id ? spec->tokenizer_id : FIXTURE_TOKENIZER;
    ShardFlaw flaw = spec->flaw;
    fixture_text(file, "format", flaw == SHARD_OTHER_FORMAT ? "other" : "dense2moe-shard",
                 flaw == SHARD_VARIABLE_TEXT);
    fixture_int(file, "version", flaw == SHARD_OTHER_VERSION ? 2 : 1,
                flaw == SHARD_ARRAY_ATTRIBUTE);
    if (flaw != SHARD_NO_VOCAB_ATTRIBUTE) fixture_int(file, "vocab_size", spec->vocab_size, false);
    fixture_int(file, "eos_id", spec->eos_id, false);
    fixture_text(file, "tokenizer_sha256", flaw == SHARD_BAD_TOKENIZER_ID ? "abc" : id, false);
    fixture_text(file, "source", "test", false);
}

// A virtual dataset over one in another file.
static void fixture_virtual(hid_t creation, uint64_t count) {
    hsize_t size = count;
    hid_t space = H5Screate_simple(1, &size, NULL);
    H5_OK(H5Pset_virtual(creation, space, "elsewhere.h5", "/tokens", space));
    H5Sclose(space);
}

// Without the time, so that equal content gives equal bytes (token_shards.py does the same).
static hid_t fixture_timeless(void) {
    hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
    H5_OK(H5Pset_obj_track_times(creation, false));
    return creation;
}

static hid_t fixture_creation(const ShardSpec *spec) {
    hid_t creation = fixture_timeless();
    hsize_t chunk[2] = {spec->num_tokens < 64 ? spec->num_tokens : 64, 1};
    switch (spec->flaw) {
    case SHARD_CHUNKED:
        H5_OK(H5Pset_chunk(creation, 1, chunk));
        break;
    case SHARD_FILTERED:
        H5_OK(H5Pset_chunk(creation, 1, chunk));
        H5_OK(H5Pset_fletcher32(creation));
        break;
    case SHARD_COMPACT:
        H5_OK(H5Pset_layout(creation, H5D_COMPACT));
        break;
    case SHARD_EXTERNAL:
        H5_OK(H5Pset_external(creation, "/etc/passwd", 0, H5F_UNLIMITED));
        break;
    case SHARD_VIRTUAL:
        fixture_virtual(creation, spec->num_tokens);
        break;
    default:
        break;
    }
    return creation;
}

static hid_t fixture_type(const ShardSpec *spec) {
    switch (spec->flaw) {
    case SHARD_INT32:
        return H5T_STD_I32LE;
    case SHARD_BIG_ENDIAN:
        return H5T_STD_U32BE;
    case SHARD_FLOAT:
        return H5T_IEEE_F32LE;
    default:
        return spec->token_bytes == 2 ? H5T_STD_U16LE : H5T_STD_U32LE;
    }
}

static void fixture_tokens(hid_t file, const ShardSpec *spec) {
    ShardFlaw flaw = spec->flaw;
    hsize_t size[2] = {spec->num_tokens, 1};
    if (flaw == SHARD_TOKENS_ARE_A_GROUP) {
        H5Gclose(H5Gcreate2(file, "tokens", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
        return;
    }
    if (flaw == SHARD_SOFT_LINK) {
        H5_OK(H5Lcreate_soft("/doc_offsets", file, "tokens", H5P_DEFAULT, H5P_DEFAULT));
        return;
    }
    if (flaw == SHARD_EXTERNAL_LINK) {
        H5_OK(H5Lcreate_external("good.h5", "/tokens", file, "tokens", H5P_DEFAULT, H5P_DEFAULT));
        return;
    }
    hid_t creation = fixture_creation(spec);
    hid_t space = H5Screate_simple(flaw == SHARD_TWO_DIMENSIONS ? 2 : 1, size, NULL);
    hid_t data =
        H5Dcreate2(file, "tokens", fixture_type(spec), space, H5P_DEFAULT, creation, H5P_DEFAULT);
    ck_assert(data >= 0);
    bool write = flaw != SHARD_NOT_ALLOCATED && flaw != SHARD_VIRTUAL && flaw != SHARD_EXTERNAL;
    if (write)
        H5_OK(H5Dwrite(data, H5T_NATIVE_UINT32, H5S_ALL, H5S_ALL, H5P_DEFAULT, spec->tokens));
    H5Dclose(data);
    H5Sclose(space);
    H5Pclose(creation);
}

static void fixture_offsets(hid_t file, const ShardSpec *spec) {
    hsize_t size = spec->num_documents + 1;
    hid_t space = H5Screate_simple(1, &size, NULL);
    hid_t creation = fixture_timeless();
    hid_t data =
        H5Dcreate2(file, "doc_offsets", H5T_STD_U64LE, space, H5P_DEFAULT, creation, H5P_DEFAULT);
    H5_OK(H5Dwrite(data, H5T_NATIVE_UINT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, spec->offsets));
    H5Dclose(data);
    H5Sclose(space);
    H5Pclose(creation);
}

__attribute__((unused)) static void fixture_write_shard(const char *path, const ShardSpec *spec) {
    hid_t file = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    ck_assert_msg(file >= 0, "cannot create %s", path);
    fixture_attributes(file, spec);
    fixture_tokens(file, spec);
    if (spec->flaw != SHARD_NO_DOCUMENTS) fixture_offsets(file, spec);
    if (spec->flaw == SHARD_EXTRA_OBJECT)
        H5Gclose(H5Gcreate2(file, "more", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
    H5_OK(H5Fclose(file));
}

// shards.json over files that exist, with their true sizes and hashes.
__attribute__((unused)) static void fixture_write_manifest(const char *directory,
                                                           const char *const *names,
                                                           const ShardSpec *specs, int count) {
    char path[IO_PATH_MAX], hash[HASH_HEX_SIZE];
    uint64_t tokens = 0, documents = 0, bytes;
    for (int i = 0; i < count; i++) {
        tokens += specs[i].num_tokens;
        documents += specs[i].num_documents;
    }
    ck_assert_ok(io_path(path, "%s/shards.json", directory));
    FILE *file = fopen(path, "w");
    ck_assert_ptr_nonnull(file);
    fprintf(file,
            "{\"format\": \"dense2moe-shards\", \"version\": 1, \"vocab_size\": %d, \"eos_id\": %d,"
            " \"tokenizer_sha256\": \"%s\", \"tokens\": %" PRIu64 ", \"documents\": %" PRIu64
            ", \"shards\": [",
            specs[0].vocab_size, specs[0].eos_id,
            specs[0].tokenizer_id ? specs[0].tokenizer_id : FIXTURE_TOKENIZER, tokens, documents);
    for (int i = 0; i < count; i++) {
        ck_assert_ok(io_path(path, "%s/%s", directory, names[i]));
        ck_assert_ok(hash_file(path, hash, &bytes, NULL, NULL));
        fprintf(file,
                "%s{\"file\": \"%s\", \"bytes\": %" PRIu64 ", \"xxh3_128\": \"%s\", \"tokens\": "
                "%" PRIu64 ", \"documents\": %" PRIu64 "}",
                i ? ", " : "", names[i], bytes, hash, specs[i].num_tokens, specs[i].num_documents);
    }
    fprintf(file, "]}\n");
    ck_assert_int_eq(fclose(file), 0);
}

// A directory under the test's with `num_shards` shards. Token i of the stream is
// fixture_token(i, vocab_size); documents end with eos (id vocab_size - 1) and have 1 to 40 tokens.
typedef struct DatasetSpec {
    uint64_t num_tokens;
    int num_shards;
    int vocab_size;
    int token_bytes;
    const char *tokenizer_id; // NULL: FIXTURE_TOKENIZER
} DatasetSpec;

// Whether stream token i ends a document: a fixed irregular pattern.
__attribute__((unused)) static bool fixture_is_end(uint64_t i) {
    uint64_t mixed = (i + 1) * UINT64_C(0x9E3779B97F4A7C15);
    return (mixed >> 32) % 17 == 0;
}

// Tokens tell where they come from: any two windows at different places differ.
__attribute__((unused)) static uint32_t fixture_token(uint64_t i, int vocab_size) {
    uint32_t eos = (uint32_t)vocab_size - 1;
    return fixture_is_end(i) ? eos : (uint32_t)(i % eos);
}

__attribute__((unused)) static const char *fixture_dataset(const char *name,
                                                           const DatasetSpec *spec) {
    static char directory[IO_PATH_MAX];
    ck_assert_ok(io_path(directory, "%s/%s", test_directory(), name));
    ck_assert_ok(io_make_directories(directory));
    ck_assert_int_le(spec->num_shards, 16);
    ShardSpec specs[16];
    char texts[16][32], path[IO_PATH_MAX];
    const char *names[16];
    uint32_t *tokens = calloc(spec->num_tokens, sizeof *tokens);
    uint64_t *offsets = calloc(spec->num_tokens + 1, sizeof *offsets);
    ck_assert(tokens && offsets);
    for (int s = 0; s < spec->num_shards; s++) {
        uint64_t first = spec->num_tokens * (uint64_t)s / (uint64_t)spec->num_shards;
        uint64_t end = spec->num_tokens * (uint64_t)(s + 1) / (uint64_t)spec->num_shards;
        uint64_t documents = 0;
        for (uint64_t i = first; i < end; i++) {
            tokens[i - first] = fixture_token(i, spec->vocab_size);
            if (fixture_is_end(i) || i + 1 == end) offsets[++documents] = i + 1 - first;
        }
        specs[s] = (ShardSpec){.tokens = tokens,
                               .num_tokens = end - first,
                               .offsets = offsets,
                               .num_documents = documents,
                               .token_bytes = spec->token_bytes,
                               .vocab_size = spec->vocab_size,
                               .eos_id = spec->vocab_size - 1,
                               .tokenizer_id = spec->tokenizer_id};
        snprintf(texts[s], sizeof texts[s], "shard-%05d.h5", s);
        names[s] = texts[s];
        ck_assert_ok(io_path(path, "%s/%s", directory, names[s]));
        fixture_write_shard(path, &specs[s]);
    }
    fixture_write_manifest(directory, names, specs, spec->num_shards);
    free(tokens);
    free(offsets);
    return directory;
}

#endif
