// The program `shards`: looks at token shards, checks them, measures how fast they are read.
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "base/clock.h"
#include "base/file.h"
#include "base/log.h"
#include "base/memory_plan.h"
#include "base/tokenizer_id.h"
#include "data/detokenizer.h"
#include "data/loader.h"
#include "data/manifest.h"
#include "data/shard.h"
#include "data/verify.h"

static const char usage_text[] =
    "usage: shards check DIR\n"
    "       shards show FILE [--doc N] [--tokenizer DIR] [--ids | --text]\n"
    "       shards bench DIR [--sequence-length N] [--seconds S]\n"
    "\n"
    "Token shards: HDF5 files with a shards.json beside them (docs/formats.md).\n"
    "\n"
    "check   reads every shard and compares it with shards.json: size, XXH3-128, structure,\n"
    "        counts, ids below the vocabulary size, document offsets\n"
    "show    prints a document of one shard: its ids and, with a tokenizer, its text\n"
    "bench   reads sequences in the order of training, and says how fast\n"
    "\n"
    "  --doc N              document, counted from 0 (default 0)\n"
    "  --tokenizer DIR      directory with dense2moe_tokenizer.json, tokenizer.json or vocab.json\n"
    "                       (default: the shard's own directory, if it has one)\n"
    "  --ids                print the ids only, on one line\n"
    "  --text               print the text only, byte for byte, without the end token\n"
    "  --sequence-length N  tokens per sequence (default 2048)\n"
    "  --seconds S          how long to read (default 2)\n"
    "  --help, --version\n"
    "\n"
    "exit codes: 0 good, 2 usage, 65 a shard is bad, 66 missing directory or file, 74 I/O error\n";

enum { SHOW_BLOCK = 1 << 16, IDS_PER_LINE = 16 };

typedef struct Arguments {
    const char *command, *path, *tokenizer;
    int64_t document, sequence_length, seconds;
    bool only_ids, only_text, help, version;
} Arguments;

// --- check ---------------------------------------------------------------------------------------

static void print_finding(const ManifestShard *shard, const ShardFinding *finding) {
    char size[BYTES_TEXT_SIZE];
    if (finding->code != STATUS_OK) {
        printf("%s: BAD: %s\n", shard->name, finding->message);
        return;
    }
    printf("%s: good: %" PRIu64 " tokens (uint%d), %" PRIu64 " documents, %s\n", shard->name,
           shard->tokens, 8 * finding->layout.token_bytes, shard->documents,
           bytes_text(shard->bytes, size));
}

static Status report(const char *directory, const DataManifest *manifest,
                     const ShardFinding *findings) {
    const DatasetSummary *summary = &manifest->summary;
    int bad = 0;
    for (int i = 0; i < summary->num_shards; i++) {
        print_finding(&manifest->shards[i], &findings[i]);
        bad += findings[i].code != STATUS_OK;
    }
    printf("%s: %" PRIu64 " tokens in %" PRIu64 " documents, %d shards, vocabulary %d, end token "
           "%" PRId64 ", tokenizer %s\n",
           directory, summary->tokens, summary->documents, summary->num_shards, summary->vocab_size,
           summary->eos_id, summary->tokenizer_id);
    if (bad) FAIL(STATUS_BAD_DATA, "%s: %d of %d shards bad", directory, bad, summary->num_shards);
    return STATUS_OK;
}

static Status check(const Arguments *arguments) {
    const VerifyOptions options = {.ignore_cache = true};
    DataManifest manifest;
    TRY(data_manifest_read(arguments->path, &manifest));
    ShardFinding *findings = calloc((size_t)manifest.summary.num_shards, sizeof *findings);
    Status status = STATUS_OK;
    if (!findings) FAIL_GOTO(done, STATUS_INTERNAL, "out of memory");
    TRY_GOTO(verify_shards(arguments->path, &manifest, &options, findings), done);
    TRY_GOTO(report(arguments->path, &manifest, findings), done);
done:
    free(findings);
    data_manifest_free(&manifest);
    return status;
}

// --- show ----------------------------------------------------------------------------------------

typedef struct Show {
    const Arguments *arguments;
    const char *path;
    int fd;
    ShardLayout layout;
    uint64_t first, end; // tokens of the document
    Detokenizer *detokenizer;
    int32_t *ids; // (SHOW_BLOCK)
} Show;

static Status directory_of(const char *path, char directory[IO_PATH_MAX]) {
    const char *slash = strrchr(path, '/');
    if (!slash) return io_path(directory, ".");
    return io_path(directory, "%.*s", (int)(slash - path + (slash == path)), path);
}

// The tokenizer that was asked for, or the one beside the shard; neither is no error without
// --text.
static Status open_detokenizer(Show *show) {
    char beside[IO_PATH_MAX], id[TOKENIZER_ID_SIZE];
    const char *directory = show->arguments->tokenizer;
    if (show->arguments->only_ids) return STATUS_OK;
    if (!directory) {
        TRY(directory_of(show->path, beside));
        directory = beside;
    }
    TRY(hf_tokenizer_id(directory, id));
    if (!id[0]) {
        if (!show->arguments->tokenizer && !show->arguments->only_text) return STATUS_OK;
        FAIL(STATUS_MISSING_INPUT, "%s: no tokenizer files there; give --tokenizer DIR", directory);
    }
    if (!tokenizer_ids_agree(show->layout.tokenizer_id, id)) {
        FAIL(STATUS_BAD_DATA,
             "%s: was made with tokenizer %.16s..., %s has %.16s... (tokenizer_sha256)", show->path,
             show->layout.tokenizer_id, directory, id);
    }
    return detokenizer_open(directory, &show->detokenizer);
}

static Status open_shard(Show *show) {
    SandboxVerdict verdict = {.code = STATUS_OK};
    uint64_t limits[2], document = (uint64_t)show->arguments->document;
    TRY(shard_parse(&show->path, 1, &show->layout, &verdict));
    if (verdict.code != STATUS_OK) FAIL(verdict.code, "%s", verdict.message);
    if (document >= show->layout.num_documents) {
        FAIL(STATUS_USAGE, "%s: has %" PRIu64 " documents, the last is --doc %" PRIu64, show->path,
             show->layout.num_documents, show->layout.num_documents - 1);
    }
    TRY(io_open(show->path, O_RDONLY, &show->fd));
    TRY(shard_read_documents(show->fd, show->path, &show->layout, document, 2, limits));
    if (limits[0] >= limits[1] || limits[1] > show->layout.num_tokens)
        FAIL(STATUS_BAD_DATA, "%s: document %" PRIu64 " has impossible offsets", show->path,
             document);
    show->first = limits[0];
    show->end = limits[1];
    show->ids = malloc(SHOW_BLOCK * sizeof *show->ids);
    if (!show->ids) FAIL(STATUS_INTERNAL, "out of memory");
    return STATUS_OK;
}

static void print_id(const Show *show, uint64_t index, int32_t id) {
    bool one_line = show->arguments->only_ids;
    bool first_in_line = one_line ? index == 0 : index % IDS_PER_LINE == 0;
    if (first_in_line && index > 0) putchar('\n');
    printf(first_in_line ? "%" PRId32 : " %" PRId32, id);
}

static Status print_piece(const Show *show, uint64_t index, int32_t id) {
    size_t bytes;
    if (show->first + index + 1 == show->end && id == show->layout.eos_id) return STATUS_OK;
    const char *piece = detokenizer_piece(show->detokenizer, id, &bytes);
    if (!piece)
        FAIL(STATUS_BAD_DATA, "%s: token %" PRIu64 " is id %" PRId32 ", not in the vocabulary",
             show->path, show->first + index, id);
    fwrite(piece, 1, bytes, stdout);
    return STATUS_OK;
}

static Status print_document(const Show *show, bool as_text) {
    for (uint64_t at = show->first; at < show->end; at += SHOW_BLOCK) {
        uint64_t left = show->end - at, count = left < SHOW_BLOCK ? left : SHOW_BLOCK;
        TRY(shard_read_tokens(show->fd, show->path, &show->layout, at, count, show->ids));
        for (uint64_t i = 0; i < count; i++) {
            uint64_t index = at - show->first + i;
            if (!as_text) {
                print_id(show, index, show->ids[i]);
            } else {
                TRY(print_piece(show, index, show->ids[i]));
            }
        }
    }
    if (!as_text || !show->arguments->only_text) putchar('\n');
    return STATUS_OK;
}

static Status print_shard(Show *show) {
    const Arguments *arguments = show->arguments;
    TRY(open_shard(show));
    TRY(open_detokenizer(show));
    if (arguments->only_ids || arguments->only_text)
        return print_document(show, arguments->only_text);
    const ShardLayout *layout = &show->layout;
    printf("%s: %" PRIu64 " tokens (uint%d) in %" PRIu64 " documents, vocabulary %" PRId64
           ", end token %" PRId64 "\ntokenizer %s, source: %s\n",
           show->path, layout->num_tokens, 8 * layout->token_bytes, layout->num_documents,
           layout->vocab_size, layout->eos_id, layout->tokenizer_id, layout->source);
    printf("document %" PRId64 ": %" PRIu64 " tokens from token %" PRIu64 " on\n",
           arguments->document, show->end - show->first, show->first);
    TRY(print_document(show, false));
    return show->detokenizer ? print_document(show, true) : STATUS_OK;
}

static Status show_document(const Arguments *arguments) {
    Show show = {.arguments = arguments, .path = arguments->path, .fd = -1};
    Status status = print_shard(&show);
    detokenizer_close(show.detokenizer);
    free(show.ids);
    if (show.fd >= 0) close(show.fd); // read only: nothing to lose
    return status;
}

// --- bench ---------------------------------------------------------------------------------------

static Status measure(const Arguments *arguments, Loader *loader, int token_bytes) {
    double begin = clock_seconds(), seconds, waited = 0;
    uint64_t sequences = 0;
    char total[BYTES_TEXT_SIZE];
    do {
        const StepBatch *step;
        TRY(loader_next(loader, &step));
        for (int m = 0; m < step->num_micro; m++) sequences += (uint64_t)step->micro[m].batch;
        waited += step->wait_seconds;
        seconds = clock_seconds() - begin;
    } while (seconds < (double)arguments->seconds);
    uint64_t tokens = sequences * (uint64_t)(arguments->sequence_length + 1);
    double bytes = (double)tokens * token_bytes;
    printf("%s: %" PRIu64 " sequences of %" PRId64 " tokens in %.2f s: %s, %.2f GB/s, %.0f million "
           "tokens/s\n",
           arguments->path, sequences, arguments->sequence_length, seconds,
           bytes_text((uint64_t)bytes, total), bytes / seconds / 1e9,
           (double)tokens / seconds / 1e6);
    return STATUS_OK;
}

static Status bench(const Arguments *arguments) {
    enum { ROWS = 64, STEPS_AHEAD = 4 };
    const LoaderConfig config = {
        .sources = {{.directory = arguments->path, .weight = 1}},
        .num_sources = 1,
        .sequence_length = arguments->sequence_length,
        .micro_batch = ROWS,
        .global_batch = ROWS,
        .world = 1,
        .prefetch_steps = STEPS_AHEAD,
        .tokenizer_id = "",
    };
    Loader *loader;
    TRY(loader_open(&config, NULL, &loader));
    int token_bytes = loader_vocab_size(loader) <= UINT16_MAX + 1 ? 2 : 4;
    Status status = measure(arguments, loader, token_bytes);
    loader_close(loader);
    return status;
}

// --- Arguments -----------------------------------------------------------------------------------

static const struct option options[] = {
    {"doc", required_argument, NULL, 'd'},
    {"tokenizer", required_argument, NULL, 't'},
    {"ids", no_argument, NULL, 'i'},
    {"text", no_argument, NULL, 'x'},
    {"sequence-length", required_argument, NULL, 's'},
    {"seconds", required_argument, NULL, 'w'},
    {"help", no_argument, NULL, 'h'},
    {"version", no_argument, NULL, 'v'},
    {NULL, 0, NULL, 0},
};

static Status read_number(const char *option, int64_t min, int64_t max, int64_t *out) {
    char *end;
    errno = 0;
    long long value = strtoll(optarg, &end, 10);
    if (end == optarg || *end || errno || value < min || value > max) {
        FAIL(STATUS_USAGE, "%s %.32s: expected a whole number, %" PRId64 " to %" PRId64, option,
             optarg, min, max);
    }
    *out = value;
    return STATUS_OK;
}

static Status read_option(int option, Arguments *arguments) {
    switch (option) {
    case 'd':
        return read_number("--doc", 0, INT64_MAX, &arguments->document);
    case 's':
        return read_number("--sequence-length", 1, 1 << 24, &arguments->sequence_length);
    case 'w':
        return read_number("--seconds", 1, 3600, &arguments->seconds);
    case 't':
        arguments->tokenizer = optarg;
        return STATUS_OK;
    case 'i':
        arguments->only_ids = true;
        return STATUS_OK;
    case 'x':
        arguments->only_text = true;
        return STATUS_OK;
    case 'h':
        arguments->help = true;
        return STATUS_OK;
    case 'v':
        arguments->version = true;
        return STATUS_OK;
    default:
        FAIL(STATUS_USAGE, "unknown option, or one without its value; see shards --help");
    }
}

static Status read_arguments(int argc, char **argv, Arguments *arguments) {
    int option;
    opterr = 0; // our own message
    while ((option = getopt_long(argc, argv, "h", options, NULL)) != -1)
        TRY(read_option(option, arguments));
    if (arguments->help || arguments->version) return STATUS_OK;
    if (argc - optind != 2) FAIL(STATUS_USAGE, "expected a command and a path; see shards --help");
    if (arguments->only_ids && arguments->only_text)
        FAIL(STATUS_USAGE, "--ids and --text exclude each other");
    arguments->command = argv[optind];
    arguments->path = argv[optind + 1];
    return STATUS_OK;
}

static Status run(int argc, char **argv) {
    static const struct {
        const char *name;
        Status (*run)(const Arguments *arguments);
    } commands[] = {{"check", check}, {"show", show_document}, {"bench", bench}};
    Arguments arguments = {.sequence_length = 2048, .seconds = 2};
    TRY(read_arguments(argc, argv, &arguments));
    if (arguments.help) fputs(usage_text, stdout);
    if (arguments.version) puts("shards " D2M_VERSION);
    if (arguments.help || arguments.version) return STATUS_OK;
    for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++)
        if (strcmp(arguments.command, commands[i].name) == 0) return commands[i].run(&arguments);
    FAIL(STATUS_USAGE, "unknown command \"%.32s\", expected check, show or bench",
         arguments.command);
}

int main(int argc, char **argv) {
    Status status = run(argc, argv);
    if (status == STATUS_OK && (fflush(stdout) != 0 || ferror(stdout)))
        status = status_fail(__FILE__, __LINE__, STATUS_IO, "cannot write the output");
    return status_report(status, "shards");
}
