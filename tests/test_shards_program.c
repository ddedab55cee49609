// The program `shards`: what it prints, and its exit codes.
#include <fcntl.h>
#include "tests/shard_fixture.h"

// Runs `shards ARGUMENTS`; returns the exit code, with both outputs in `output`.
static int run(char output[8192], const char *arguments) {
    char command[2 * IO_PATH_MAX];
    ck_assert_ok(io_path(command, "%s/bin/shards %.3000s 2>&1", TEST_BINARY_DIR, arguments));
    FILE *pipe = popen(command, "r");
    ck_assert_ptr_nonnull(pipe);
    size_t bytes = fread(output, 1, 8191, pipe);
    output[bytes] = '\0';
    int status = pclose(pipe);
    ck_assert(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static void expect(int code, const char *text, const char *format, const char *path) {
    char output[8192], arguments[IO_PATH_MAX];
    snprintf(arguments, sizeof arguments, format, path);
    int found = run(output, arguments);
    ck_assert_msg(found == code, "shards %s: exit code %d, expected %d: %s", arguments, found, code,
                  output);
    ck_assert_msg(strstr(output, text) != NULL, "shards %s: lacks '%s': %s", arguments, text,
                  output);
}

static const char *make_shards(const char *name) {
    const DatasetSpec spec = {
        .num_tokens = 3000, .num_shards = 3, .vocab_size = 257, .token_bytes = 2};
    return fixture_dataset(name, &spec);
}

START_TEST(help_and_usage) {
    expect(0, "usage: shards check DIR", "--help", "");
    expect(0, "shards 0.", "--version", "");
    expect(2, "expected a command and a path", "", "");
    expect(2, "unknown command \"list\"", "list x", "");
    expect(2, "unknown option", "check --fast x", "");
    expect(2, "--doc -1: expected a whole number", "show x --doc -1", "");
    expect(2, "exclude each other", "show x --ids --text", "");
}
END_TEST

START_TEST(check) {
    char path[IO_PATH_MAX];
    const char *directory = make_shards("check");
    expect(0, "shard-00001.h5: good: 1000 tokens (uint16)", "check %s", directory);
    expect(0, "3000 tokens in", "check %s", directory);
    ck_assert_ok(io_path(path, "%s/shard-00001.h5", directory));
    ck_assert_int_eq(truncate(path, 2100), 0);
    ck_assert_ok(io_path(path, "%s/shard-00002.h5", directory));
    int fd = open(path, O_WRONLY);
    ck_assert_int_eq(pwrite(fd, "\xff", 1, 2048), 1);
    close(fd);
    expect(65, "shard-00000.h5: good", "check %s", directory);
    expect(65, "truncated", "check %s", directory);
    expect(65, "its XXH3-128 is", "check %s", directory);
    expect(65, "2 of 3 shards bad", "check %s", directory);
    expect(66, "no such directory", "check %s/none", directory);
    expect(66, "no shards.json", "check %s", test_directory());
}
END_TEST

START_TEST(show) {
    const char *directory = make_shards("show"), marker[] = "{\"type\": \"bytes\"}";
    char path[IO_PATH_MAX], file[IO_PATH_MAX], text[IO_PATH_MAX] = "", *at = text;
    ck_assert_ok(io_path(file, "%s/shard-00000.h5", directory));
    uint64_t end = 0;
    while (!fixture_is_end(end)) end++;
    for (uint64_t i = 0; i <= end; i++) at += sprintf(at, i ? " %u" : "%u", fixture_token(i, 257));
    expect(0, text, "show %s --ids", file);
    expect(0, "document 0: ", "show %s", file);
    expect(2, "documents, the last is --doc", "show %s --doc 5000", file);
    expect(66, "no tokenizer files there", "show %s --text", file);
    expect(66, "no such file", "show %s.h5", file);
    expect(65, "not a readable HDF5 file", "show %s/../show/shards.json", directory);

    // With the tokenizer beside it: the bytes of the ids, without the end of the document.
    ck_assert_ok(io_path(path, "%s/dense2moe_tokenizer.json", directory));
    ck_assert_ok(io_write_file_atomic(path, marker, strlen(marker)));
    at = text;
    for (uint64_t i = 0; i < end; i++) *at++ = (char)fixture_token(i, 257);
    *at = '\0';
    char output[8192], arguments[IO_PATH_MAX];
    snprintf(arguments, sizeof arguments, "show %.3000s --text", file);
    ck_assert_int_eq(run(output, arguments), 0);
    ck_assert_int_eq(memcmp(output, text, end), 0);
    ck_assert_int_eq(output[end], '\0');
}
END_TEST

START_TEST(show_refuses_another_tokenizer) {
    DatasetSpec spec = {.num_tokens = 500, .num_shards = 1, .vocab_size = 257, .token_bytes = 2};
    char path[IO_PATH_MAX], marker[] = "{\"type\": \"bytes\"}";
    spec.tokenizer_id = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    const char *directory = fixture_dataset("other", &spec);
    ck_assert_ok(io_path(path, "%s/dense2moe_tokenizer.json", directory));
    ck_assert_ok(io_write_file_atomic(path, marker, strlen(marker)));
    expect(65, "tokenizer_sha256", "show %s/shard-00000.h5", directory);
}
END_TEST

START_TEST(bench) {
    const char *directory = make_shards("bench");
    expect(0, "GB/s", "bench %s --seconds 1 --sequence-length 100", directory);
    expect(65, "one sequence needs 3001", "bench %s --sequence-length 3000", directory);
}
END_TEST

TEST_MAIN("shards program", TEST(help_and_usage), TEST(check), TEST(show),
          TEST(show_refuses_another_tokenizer), TEST(bench))
