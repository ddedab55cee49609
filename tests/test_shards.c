// Token shards: what is accepted, what is refused and how, and that no file, however broken, takes
// the program down or gets wrong tokens through.
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <time.h>
#include "base/random.h"
#include "data/dataset.h"
#include "data/sandbox.h"
#include "data/verify.h"
#include "tests/shard_fixture.h"

// --- The child process ---------------------------------------------------------------------------

typedef enum Behaviour { ANSWER, REFUSE, CRASH, LEAVE, HANG, EAT_MEMORY, BE_KILLED } Behaviour;

static Status behave(const void *context, int index, void *result) {
    const Behaviour *list = context;
    switch (list[index]) {
    case REFUSE:
        FAIL(STATUS_MISSING_INPUT, "item %d refused", index);
    case CRASH:
        signal(SIGSEGV, SIG_DFL); // no sanitizer report: the crash is wanted
        raise(SIGSEGV);
        break;
    case LEAVE:
        _exit(3);
    case BE_KILLED: // by whom cannot be told
        raise(SIGKILL);
        break;
    case HANG:
        for (;;) pause();
    case EAT_MEMORY:
        for (size_t bytes = 0; bytes < ((size_t)8 << 30); bytes += 1 << 20)
            if (!malloc(1 << 20)) FAIL(STATUS_BAD_DATA, "no memory after %zu MB", bytes >> 20);
        break;
    default:
        break;
    }
    *(int *)result = 100 + index;
    return STATUS_OK;
}

START_TEST(sandbox_survives_everything) {
    const Behaviour list[] = {ANSWER, CRASH, ANSWER, REFUSE, LEAVE, HANG, BE_KILLED, ANSWER};
    enum { COUNT = sizeof list / sizeof list[0] };
    const SandboxLimits limits = {.seconds = 1, .memory_bytes = 64 << 20};
    SandboxVerdict verdicts[COUNT];
    int results[COUNT];
    memset(results, 0x55, sizeof results);
    ck_assert_ok(sandbox_run(behave, list, COUNT, &limits, sizeof(int), results, verdicts));
    for (int i = 0; i < COUNT; i++) {
        bool good = list[i] == ANSWER;
        ck_assert_int_eq(verdicts[i].code == STATUS_OK, good);
        ck_assert_int_eq(results[i], good ? 100 + i : 0);
        ck_assert_int_eq(verdicts[i].died, !good && list[i] != REFUSE);
    }
    ck_assert_str_eq(verdicts[1].message, "reading it crashes (signal 11)");
    ck_assert_int_eq(verdicts[3].code, STATUS_MISSING_INPUT);
    ck_assert_str_eq(verdicts[3].message, "item 3 refused");
    ck_assert_ptr_nonnull(strstr(verdicts[4].message, "exit 3"));
    ck_assert_str_eq(verdicts[5].message, "reading it took more than 1 s");
    ck_assert_int_eq(verdicts[5].code, STATUS_BAD_DATA);
    ck_assert_int_eq(verdicts[6].code, STATUS_INTERNAL); // no reason to call the file bad
    ck_assert_ptr_nonnull(strstr(verdicts[6].message, "killed from outside"));
}
END_TEST

START_TEST(sandbox_limits_memory) {
#ifdef __SANITIZE_ADDRESS__
    puts("sandbox_limits_memory: skipped, the sanitizer needs address space without limit");
#else
    const Behaviour list[] = {EAT_MEMORY};
    const SandboxLimits limits = {.seconds = 20, .memory_bytes = 64 << 20};
    SandboxVerdict verdict;
    int result;
    ck_assert_ok(sandbox_run(behave, list, 1, &limits, sizeof result, &result, &verdict));
    ck_assert_int_eq(verdict.code, STATUS_BAD_DATA);
    ck_assert_ptr_nonnull(strstr(verdict.message, "no memory after"));
#endif
}
END_TEST

// --- Helpers -------------------------------------------------------------------------------------

enum { TOKENS = 1000, DOCUMENTS = 10, VOCAB = 300 };
static uint32_t tokens[TOKENS];
static uint64_t offsets[DOCUMENTS + 1];

static ShardSpec good_spec(void) {
    for (uint64_t i = 0; i < TOKENS; i++) tokens[i] = fixture_token(i, VOCAB);
    for (uint64_t i = 0; i <= DOCUMENTS; i++) offsets[i] = i * (TOKENS / DOCUMENTS);
    return (ShardSpec){.tokens = tokens,
                       .num_tokens = TOKENS,
                       .offsets = offsets,
                       .num_documents = DOCUMENTS,
                       .token_bytes = 4,
                       .vocab_size = VOCAB,
                       .eos_id = VOCAB - 1};
}

static const char *path_in(const char *directory, const char *name) {
    static char path[2][IO_PATH_MAX];
    static int turn;
    turn = !turn;
    ck_assert_ok(io_path(path[turn], "%s/%s", directory, name));
    return path[turn];
}

// A directory with one shard, "a.h5", and a manifest with its true hash.
static const char *make_directory(const char *name, const ShardSpec *spec) {
    const char *names[] = {"a.h5"};
    static char directory[IO_PATH_MAX];
    ck_assert_ok(io_path(directory, "%s/%s", test_directory(), name));
    ck_assert_ok(io_make_directories(directory));
    fixture_write_shard(path_in(directory, "a.h5"), spec);
    fixture_write_manifest(directory, names, spec, 1);
    return directory;
}

static Status open_and_close(const char *directory) {
    const DatasetOptions options = {.tokenizer_id = ""};
    Dataset *dataset;
    TRY(dataset_open(directory, &options, &dataset));
    dataset_close(dataset);
    return STATUS_OK;
}

// Without the fsync of io_write_file_atomic, which takes long when it is called often.
static void write_bytes(const char *path, const char *data, size_t bytes) {
    FILE *file = fopen(path, "wb");
    ck_assert_ptr_nonnull(file);
    ck_assert_uint_eq(fwrite(data, 1, bytes, file), bytes);
    ck_assert_int_eq(fclose(file), 0);
}

static void write_text(const char *path, const char *text) {
    write_bytes(path, text, strlen(text));
}

// --- Profiles ------------------------------------------------------------------------------------

START_TEST(good_shards_are_accepted) {
    ShardSpec spec = good_spec();
    for (spec.token_bytes = 2; spec.token_bytes <= 4; spec.token_bytes += 2) {
        const char *path = path_in(make_directory("good", &spec), "a.h5");
        ShardLayout layout;
        SandboxVerdict verdict;
        uint64_t bytes;
        ck_assert_ok(io_file_size(path, &bytes));
        ck_assert_ok(shard_parse(&path, 1, &layout, &verdict));
        ck_assert_msg(verdict.code == STATUS_OK, "%s", verdict.message);
        ck_assert_uint_eq(layout.file_bytes, bytes);
        ck_assert_uint_eq(layout.num_tokens, TOKENS);
        ck_assert_uint_eq(layout.num_documents, DOCUMENTS);
        ck_assert_int_eq(layout.token_bytes, spec.token_bytes);
        ck_assert_int_eq(layout.vocab_size, VOCAB);
        ck_assert_int_eq(layout.eos_id, VOCAB - 1);
        ck_assert_str_eq(layout.tokenizer_id, FIXTURE_TOKENIZER);
        ck_assert_str_eq(layout.source, "test");
        ck_assert_ok(open_and_close(path_in(test_directory(), "good")));
    }
}
END_TEST

START_TEST(other_profiles_are_refused) {
    static const struct {
        ShardFlaw flaw;
        const char *text;
    } cases[] = {
        {SHARD_CHUNKED, "/tokens is chunked, expected contiguous"},
        {SHARD_FILTERED, "/tokens is chunked"},
        {SHARD_COMPACT, "/tokens is compact"},
        {SHARD_EXTERNAL, "/tokens is stored in external files"},
        {SHARD_VIRTUAL, "/tokens is virtual"},
        {SHARD_SOFT_LINK, "/tokens is a link to elsewhere"},
        {SHARD_EXTERNAL_LINK, "/tokens is a link to elsewhere"},
        {SHARD_INT32, "/tokens holds integers of 4 bytes"},
        {SHARD_BIG_ENDIAN, "expected little-endian uint32"},
        {SHARD_FLOAT, "/tokens holds another type of 4 bytes"},
        {SHARD_TWO_DIMENSIONS, "/tokens has 2 dimensions, expected 1"},
        {SHARD_NOT_ALLOCATED, "/tokens has no place in the file"},
        {SHARD_TOKENS_ARE_A_GROUP, "/tokens is not a dataset"},
        {SHARD_NO_DOCUMENTS, "holds 1 objects, expected the two datasets"},
        {SHARD_EXTRA_OBJECT, "holds 3 objects"},
        {SHARD_NO_VOCAB_ATTRIBUTE, "attribute \"vocab_size\" is missing"},
        {SHARD_VARIABLE_TEXT, "attribute \"format\" is not a fixed-length string"},
        {SHARD_ARRAY_ATTRIBUTE, "attribute \"version\" is not a single value"},
        {SHARD_OTHER_FORMAT, "attribute \"format\" is \"other\""},
        {SHARD_OTHER_VERSION, "is a shard of version 2, this program reads 1"},
        {SHARD_BAD_TOKENIZER_ID, "attribute \"tokenizer_sha256\" is \"abc\""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        ShardSpec spec = good_spec();
        spec.flaw = cases[i].flaw;
        ck_assert_fails(open_and_close(make_directory("profile", &spec)), STATUS_BAD_DATA,
                        cases[i].text);
        ck_assert_ptr_nonnull(strstr(status_message(), "profile/a.h5: "));
    }
}
END_TEST

START_TEST(content_is_checked) {
    ShardSpec spec = good_spec();
    tokens[777] = VOCAB;
    ck_assert_fails(open_and_close(make_directory("content", &spec)), STATUS_BAD_DATA,
                    "token 777 is id 300, expected below its vocabulary of 300");
    spec = good_spec();
    offsets[4] = offsets[3];
    ck_assert_fails(open_and_close(make_directory("content", &spec)), STATUS_BAD_DATA,
                    "doc_offsets[4] is 300, expected more than 300");
    spec = good_spec();
    offsets[0] = 1;
    ck_assert_fails(open_and_close(make_directory("content", &spec)), STATUS_BAD_DATA,
                    "doc_offsets[0] is 1, expected 0");
    spec = good_spec();
    offsets[DOCUMENTS]++;
    ck_assert_fails(open_and_close(make_directory("content", &spec)), STATUS_BAD_DATA,
                    "doc_offsets ends with 1001, expected the number of tokens, 1000");
    spec = good_spec();
    spec.num_documents = 0;
    ck_assert_fails(open_and_close(make_directory("content", &spec)), STATUS_BAD_DATA,
                    "\"documents\" is 0");
}
END_TEST

START_TEST(manifest_and_shard_must_agree) {
    ShardSpec spec = good_spec(), other = good_spec();
    const char *directory = make_directory("agree", &spec), *names[] = {"a.h5"};
    other.num_tokens--;
    fixture_write_manifest(directory, names, &other, 1);
    ck_assert_fails(open_and_close(directory), STATUS_BAD_DATA,
                    "has tokens 1000, shards.json says 999");
    other = good_spec();
    other.vocab_size++;
    fixture_write_manifest(directory, names, &other, 1);
    ck_assert_fails(open_and_close(directory), STATUS_BAD_DATA,
                    "has vocab_size 300, shards.json says 301");
    other = good_spec();
    other.tokenizer_id = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    fixture_write_manifest(directory, names, &other, 1);
    ck_assert_fails(open_and_close(directory), STATUS_BAD_DATA, "has tokenizer_sha256");
}
END_TEST

START_TEST(manifests_are_hostile_input) {
    static const struct {
        const char *text, *expected;
    } cases[] = {
        {"", "shards.json"},
        {"[]", "expected an object"},
        {"{\"format\": \"x\"}", "\"format\" is \"x\""},
        {"{\"format\": \"dense2moe-shards\", \"version\": 9}", "of version 9"},
        {"{HEAD, \"shards\": []}", "lists 0 shards"},
        {"{HEAD, \"shards\": [3]}", "not an object"},
        {"{HEAD, \"shards\": [{\"file\": \"../a.h5\", \"xxh3_128\": \"\"}]}", "not the name of"},
        {"{HEAD, \"shards\": [{\"file\": \"a.h5\", \"xxh3_128\": \"xy\"}]}", "32 hex digits"},
        {"{HEAD, \"shards\": [{\"file\": \"a.h5\", \"xxh3_128\": \"HASH\", \"bytes\": -1}]}",
         "\"bytes\" is -1"},
        {"{HEAD, \"shards\": [{\"file\": \"a.h5\", \"xxh3_128\": \"HASH\", \"bytes\": 9, "
         "\"tokens\": 9223372036854775807}]}",
         "\"tokens\" is 9223372036854775807"},
        {"{HEAD, \"shards\": [{\"file\": \"a.h5\", \"xxh3_128\": \"HASH\", \"bytes\": 9, "
         "\"tokens\": 7, \"documents\": 1}]}",
         "says 5 tokens in 1 documents, its shards add up to 7 in 1"},
    };
    const char *head = "\"format\": \"dense2moe-shards\", \"version\": 1, \"vocab_size\": 9, "
                       "\"eos_id\": 1, \"tokenizer_sha256\": \"" FIXTURE_TOKENIZER
                       "\", \"tokens\": 5, \"documents\": 1";
    const char *directory = test_directory();
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char text[2048] = "", *at = text;
        for (const char *c = cases[i].text; *c; c++) {
            bool is_head = strncmp(c, "HEAD", 4) == 0, is_hash = strncmp(c, "HASH", 4) == 0;
            if (!is_head && !is_hash) {
                *at++ = *c;
                continue;
            }
            at += sprintf(at, "%s", is_head ? head : "00000000000000000000000000000000");
            c += 3;
        }
        *at = '\0';
        write_text(path_in(directory, "shards.json"), text);
        DatasetSummary summary;
        ck_assert_fails(dataset_summary(directory, &summary), STATUS_BAD_DATA, cases[i].expected);
    }
}
END_TEST

// --- Damage --------------------------------------------------------------------------------------

START_TEST(truncated_anywhere_is_refused) {
    ShardSpec spec = good_spec();
    const char *directory = make_directory("cut", &spec);
    char *data;
    size_t bytes;
    char path[IO_PATH_MAX];
    ck_assert_ok(io_path(path, "%s/a.h5", directory));
    ck_assert_ok(io_read_file(path, 1 << 20, &data, &bytes));
    for (size_t size = 0; size < bytes; size += size < 64 ? 1 : 61) {
        ck_assert_int_eq(truncate(path, (off_t)size), 0);
        ck_assert_fails(open_and_close(directory), STATUS_BAD_DATA, "truncated");
        write_bytes(path, data, bytes);
    }
    ck_assert_ok(open_and_close(directory));
    free(data);
}
END_TEST

START_TEST(flipped_bits_never_get_through) {
    ShardSpec spec = good_spec();
    const char *directory = make_directory("flip", &spec);
    char path[IO_PATH_MAX];
    uint64_t bytes;
    ck_assert_ok(io_path(path, "%s/a.h5", directory));
    ck_assert_ok(io_file_size(path, &bytes));
    int fd = open(path, O_RDWR);
    ck_assert_int_ge(fd, 0);
    for (uint64_t i = 0; i < 2000; i++) {
        uint64_t random = random_u64(3, 1, i), at = (random >> 8) % bytes;
        unsigned char before, after;
        ck_assert_int_eq(pread(fd, &before, 1, (off_t)at), 1);
        after = before ^ (unsigned char)(1u << (random % 8));
        ck_assert_int_eq(pwrite(fd, &after, 1, (off_t)at), 1);
        ck_assert_fails(open_and_close(directory), STATUS_BAD_DATA, "XXH3-128");
        ck_assert_int_eq(pwrite(fd, &before, 1, (off_t)at), 1);
    }
    close(fd);
    ck_assert_ok(open_and_close(directory));
}
END_TEST

// The second line of defence: the parser alone on damaged structure, as if the hash had agreed.
START_TEST(parser_survives_damaged_structure) {
    enum { ROUNDS = 4, FILES = 100 };
    ShardSpec spec = good_spec();
    char *data, paths[FILES][96];
    const char *list[FILES];
    size_t bytes;
    ck_assert_ok(
        io_read_file(path_in(make_directory("fuzz", &spec), "a.h5"), 1 << 20, &data, &bytes));
    for (uint64_t round = 0; round < ROUNDS; round++) {
        ShardLayout layouts[FILES];
        SandboxVerdict verdicts[FILES];
        for (uint64_t i = 0; i < FILES; i++) {
            char *copy = malloc(bytes);
            memcpy(copy, data, bytes);
            for (uint64_t change = 0; change < 4; change++) {
                // Structure is everywhere except in the tokens, which are 4000 bytes of it.
                uint64_t random = random_u64(9, round * FILES + i, change);
                copy[(random >> 8) % bytes] = (char)random;
            }
            // Every fourth is cut as well.
            size_t kept = i % 4 ? bytes : random_u64(9, round * FILES + i, 9) % bytes;
            snprintf(paths[i], sizeof paths[i], "%s/%d.h5", test_directory(), (int)i);
            write_bytes(paths[i], copy, kept);
            free(copy);
            list[i] = paths[i];
        }
        ck_assert_ok(shard_parse(list, FILES, layouts, verdicts));
        for (int i = 0; i < FILES; i++) {
            const ShardLayout *layout = &layouts[i];
            if (verdicts[i].code != STATUS_OK) {
                ck_assert_ptr_nonnull(strstr(verdicts[i].message, paths[i]));
                continue;
            }
            uint64_t end = layout->tokens_offset + layout->num_tokens * 4;
            ck_assert_uint_le(end, layout->file_bytes);
            end = layout->documents_offset + (layout->num_documents + 1) * 8;
            ck_assert_uint_le(end, layout->file_bytes);
        }
    }
    free(data);
}
END_TEST

START_TEST(odd_files_in_place_of_shards) {
    ShardSpec spec = good_spec();
    char path[IO_PATH_MAX];
    const char *directory = make_directory("odd", &spec);
    ck_assert_ok(io_path(path, "%s/a.h5", directory));
    ck_assert_ok(io_unlink(path));
    ck_assert_fails(open_and_close(directory), STATUS_MISSING_INPUT, "a.h5: no such file");
    ck_assert_int_eq(mkfifo(path, 0600), 0); // opening it would block for ever
    ck_assert_fails(open_and_close(directory), STATUS_BAD_DATA, "not a regular file");
    const char *list[] = {path};
    ShardLayout layout;
    SandboxVerdict verdict;
    ck_assert_ok(shard_parse(list, 1, &layout, &verdict));
    ck_assert_int_eq(verdict.code, STATUS_BAD_DATA);
    ck_assert_ok(io_unlink(path));
    write_text(path, "this is a text, not HDF5");
    ck_assert_ok(shard_parse(list, 1, &layout, &verdict));
    ck_assert_ptr_nonnull(strstr(verdict.message, "not a readable HDF5 file"));
}
END_TEST

// --- The cache of verified files -----------------------------------------------------------------

static ShardFinding verify(const char *directory) {
    DataManifest manifest;
    ShardFinding finding;
    const VerifyOptions options = {.stop_at_first = true};
    ck_assert_ok(data_manifest_read(directory, &manifest));
    ck_assert_ok(verify_shards(directory, &manifest, &options, &finding));
    data_manifest_free(&manifest);
    return finding;
}

static void flip_keeping_time(const char *path) {
    struct stat info;
    unsigned char byte;
    ck_assert_int_eq(stat(path, &info), 0);
    int fd = open(path, O_RDWR);
    off_t last = info.st_size - 1;
    ck_assert_int_eq(pread(fd, &byte, 1, last), 1);
    byte ^= 1;
    ck_assert_int_eq(pwrite(fd, &byte, 1, last), 1);
    const struct timespec times[2] = {info.st_atim, info.st_mtim};
    ck_assert_int_eq(futimens(fd, times), 0);
    close(fd);
}

START_TEST(verification_is_remembered_but_never_stale) {
    ShardSpec spec = good_spec();
    char fresh[IO_PATH_MAX], path[IO_PATH_MAX], cache[IO_PATH_MAX];
    setenv("XDG_CACHE_HOME", path_in(test_directory(), "cache-home"), 1);
    ck_assert_ok(io_path(fresh, "%s", make_directory("remember", &spec)));
    ck_assert_ok(io_path(path, "%s/a.h5", fresh));
    ck_assert_ok(io_path(cache, "%s/.verified.json", fresh));

    // A file that was just written is not remembered: it could still change unnoticed.
    ck_assert_int_eq(verify(fresh).code, STATUS_OK);
    ck_assert(!io_exists(cache));
    struct timespec settle = {.tv_sec = 2, .tv_nsec = 100000000};
    nanosleep(&settle, NULL);
    ck_assert(!verify(fresh).from_cache);
    ck_assert(io_exists(cache));
    ShardFinding finding = verify(fresh);
    ck_assert(finding.from_cache);
    ck_assert_int_eq(finding.code, STATUS_OK);
    ck_assert_uint_eq(finding.layout.num_tokens, TOKENS);

    // A broken cache is as good as none, and is replaced.
    write_text(cache, "{\"version\": 1, \"shards\": [");
    ck_assert(!verify(fresh).from_cache);
    ck_assert(verify(fresh).from_cache);

    // Same size, same modification time, other content: the change time tells.
    flip_keeping_time(path);
    finding = verify(fresh);
    ck_assert(!finding.from_cache);
    ck_assert_int_eq(finding.code, STATUS_BAD_DATA);
    ck_assert_ptr_nonnull(strstr(finding.message, "XXH3-128"));
}
END_TEST

START_TEST(verification_is_remembered_elsewhere) {
    ShardSpec spec = good_spec();
    char directory[IO_PATH_MAX];
    setenv("XDG_CACHE_HOME", path_in(test_directory(), "cache-home"), 1);
    ck_assert_ok(io_path(directory, "%s", make_directory("elsewhere", &spec)));
    // A directory of that name is in the way of the cache file, as if the place were read-only.
    ck_assert_ok(io_make_directories(path_in(directory, ".verified.json")));
    struct timespec settle = {.tv_sec = 2, .tv_nsec = 100000000};
    nanosleep(&settle, NULL);
    ck_assert(!verify(directory).from_cache);
    ck_assert(verify(directory).from_cache);
    ck_assert(io_is_directory(path_in(test_directory(), "cache-home/dense2moe")));
}
END_TEST

// --- Reading -------------------------------------------------------------------------------------

START_TEST(documents_are_found) {
    enum { MANY = 3000 };
    static uint32_t ids[MANY * 4];
    static uint64_t starts[MANY + 1];
    uint64_t documents = 0, total = 0;
    while (documents < MANY) { // lengths 1 to 7
        total += 1 + random_u64(4, 4, documents) % 7;
        if (total > MANY * 4) break;
        starts[++documents] = total;
    }
    ShardSpec spec = {.tokens = ids,
                      .num_tokens = starts[documents],
                      .offsets = starts,
                      .num_documents = documents,
                      .token_bytes = 2,
                      .vocab_size = 5,
                      .eos_id = -1};
    const char *path = path_in(make_directory("documents", &spec), "a.h5");
    ShardLayout layout;
    SandboxVerdict verdict;
    ck_assert_ok(shard_parse(&path, 1, &layout, &verdict));
    ck_assert_int_eq(verdict.code, STATUS_OK);
    int fd = open(path, O_RDONLY);
    uint64_t expected = 0, found;
    for (uint64_t token = 0; token < spec.num_tokens; token++) {
        if (token == starts[expected + 1]) expected++;
        ck_assert_ok(shard_find_document(fd, path, &layout, token, &found));
        ck_assert_uint_eq(found, expected);
    }
    close(fd);

    const DatasetOptions options = {.tokenizer_id = ""};
    static bool marks[MANY * 4];
    Dataset *dataset;
    ck_assert_ok(dataset_open(path_in(test_directory(), "documents"), &options, &dataset));
    for (uint64_t first = 0; first < spec.num_tokens; first += 997) {
        uint64_t count = spec.num_tokens - first;
        ck_assert_ok(dataset_document_starts(dataset, first, count, marks));
        uint64_t document = 0;
        for (uint64_t i = 0; i < count; i++) {
            while (starts[document] < first + i) document++;
            ck_assert_int_eq(marks[i], starts[document] == first + i);
        }
    }
    dataset_close(dataset);
}
END_TEST

START_TEST(more_shards_than_open_files) {
    // 150 shards share 128 slots; reads jump between all of them.
    enum { SHARDS = 150 };
    static ShardSpec specs[SHARDS];
    static char texts[SHARDS][16];
    static const char *names[SHARDS];
    char directory[IO_PATH_MAX];
    ck_assert_ok(io_path(directory, "%s/many", test_directory()));
    ck_assert_ok(io_make_directories(directory));
    uint64_t ends[] = {0, 3};
    for (uint32_t s = 0; s < SHARDS; s++) {
        uint32_t ids[3] = {s, s + 1, s + 2};
        specs[s] = (ShardSpec){.tokens = ids,
                               .num_tokens = 3,
                               .offsets = ends,
                               .num_documents = 1,
                               .token_bytes = 4,
                               .vocab_size = SHARDS + 2,
                               .eos_id = -1};
        snprintf(texts[s], sizeof texts[s], "%u.h5", s);
        names[s] = texts[s];
        fixture_write_shard(path_in(directory, texts[s]), &specs[s]);
    }
    fixture_write_manifest(directory, names, specs, SHARDS);
    const DatasetOptions options = {.tokenizer_id = ""};
    Dataset *dataset;
    ck_assert_ok(dataset_open(directory, &options, &dataset));
    ck_assert_uint_eq(dataset_tokens(dataset), 3 * SHARDS);
    for (uint64_t i = 0; i < 2000; i++) {
        int32_t ids[7];
        uint64_t first = random_u64(5, 5, i) % (3 * SHARDS - 6);
        ck_assert_ok(dataset_read(dataset, first, 7, ids));
        for (uint64_t t = 0; t < 7; t++)
            ck_assert_uint_eq((uint64_t)ids[t], (first + t) / 3 + (first + t) % 3);
    }
    dataset_close(dataset);
}
END_TEST

TEST_MAIN("shards", TEST(sandbox_survives_everything), TEST(sandbox_limits_memory),
          TEST(good_shards_are_accepted), TEST(other_profiles_are_refused),
          TEST(content_is_checked), TEST(manifest_and_shard_must_agree),
          TEST(manifests_are_hostile_input), TEST(truncated_anywhere_is_refused),
          TEST(flipped_bits_never_get_through), TEST(parser_survives_damaged_structure),
          TEST(odd_files_in_place_of_shards), TEST(verification_is_remembered_but_never_stale),
          TEST(verification_is_remembered_elsewhere), TEST(documents_are_found),
          TEST(more_shards_than_open_files))
