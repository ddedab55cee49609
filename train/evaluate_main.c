// The program `evaluate`: perplexity of a model on token shards or text, and how its routers
// distribute the work.
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/log.h"
#include "data/loader.h"
#include "train/device.h"
#include "train/evaluate.h"
#include "train/recipe.h"
#include "train/router_stats.h"

typedef struct Arguments {
    const char *model, *data, *text, *tokenizer;
    int64_t sequence_length, sequences, batch, threads;
    int device;
    bool json, help, version;
} Arguments;

static const char usage_text[] =
    "usage: evaluate --model DIR --data SHARDS [options]\n"
    "       evaluate --model DIR --text FILE [--tokenizer DIR|bytes] [options]\n"
    "\n"
    "Loss and perplexity of a model; expert load and entropy of its routers.\n"
    "\n"
    "  --model DIR            Hugging Face directory, run directory (its newest checkpoint), or\n"
    "                         checkpoint\n"
    "  --data SHARDS          directory of token shards (shards.json)\n"
    "  --text FILE            text, jsonl, or either compressed; needs the Python environment of\n"
    "                         scripts/setup.sh\n"
    "  --tokenizer DIR|bytes  tokenizer for --text (default: the model's own, where it is known)\n"
    "  --sequence-length N    tokens per window; windows do not overlap (default 1024)\n"
    "  --sequences N          windows, spread evenly over the data (default 0: all)\n"
    "  --batch N              windows per forward pass (default 4)\n"
    "  --device auto|cpu|cuda what to compute on (default auto: a GPU where there is one)\n"
    "  --threads N            CPU threads (default 0: OMP_NUM_THREADS or all available)\n"
    "  --json                 print one JSON object\n"
    "  --help, --version\n";

static const struct option options[] = {
    {"model", required_argument, NULL, 'm'},
    {"data", required_argument, NULL, 'd'},
    {"text", required_argument, NULL, 't'},
    {"tokenizer", required_argument, NULL, 'k'},
    {"sequence-length", required_argument, NULL, 's'},
    {"sequences", required_argument, NULL, 'n'},
    {"batch", required_argument, NULL, 'b'},
    {"device", required_argument, NULL, 'g'},
    {"threads", required_argument, NULL, 'p'},
    {"json", no_argument, NULL, 'j'},
    {"help", no_argument, NULL, 'h'},
    {"version", no_argument, NULL, 'v'},
    {NULL, 0, NULL, 0},
};

// --- Arguments ---------------------------------------------------------------------------------

static Status read_number(const char *option, int64_t min, int64_t max, int64_t *out) {
    char *end;
    errno = 0;
    long long value = strtoll(optarg, &end, 10);
    if (end == optarg || *end || errno || value < min || value > max)
        FAIL(STATUS_USAGE, "%s %.32s: expected a whole number, %" PRId64 " to %" PRId64, option,
             optarg, min, max);
    *out = value;
    return STATUS_OK;
}

static Status read_device(int *out) {
    static const char *const names[] = {"auto", "cpu", "cuda"}; // as DEVICE_*
    for (int i = 0; i < 3; i++) {
        *out = i;
        if (strcmp(optarg, names[i]) == 0) return device_check(&(DeviceOptions){.choice = i});
    }
    FAIL(STATUS_USAGE, "--device %.32s: expected auto, cpu or cuda", optarg);
}

static Status read_option(int option, Arguments *arguments) {
    switch (option) {
    case 'm':
        arguments->model = optarg;
        break;
    case 'd':
        arguments->data = optarg;
        break;
    case 't':
        arguments->text = optarg;
        break;
    case 'k':
        arguments->tokenizer = optarg;
        break;
    case 's':
        return read_number("--sequence-length", 1, 1 << 20, &arguments->sequence_length);
    case 'n':
        return read_number("--sequences", 0, 1 << 24, &arguments->sequences);
    case 'b':
        return read_number("--batch", 1, 1 << 16, &arguments->batch);
    case 'g':
        return read_device(&arguments->device);
    case 'p':
        return read_number("--threads", 0, 1024, &arguments->threads);
    case 'j':
        arguments->json = true;
        break;
    case 'h':
        arguments->help = true;
        break;
    case 'v':
        arguments->version = true;
        break;
    }
    return STATUS_OK;
}

static Status read_arguments(int argc, char **argv, Arguments *arguments) {
    *arguments = (Arguments){.sequence_length = 1024, .batch = 4};
    opterr = 0; // messages are ours
    int option;
    while ((option = getopt_long(argc, argv, ":h", options, NULL)) != -1) {
        const char *text = argv[optind - 1];
        if (option == ':') FAIL(STATUS_USAGE, "%s needs a value; see evaluate --help", text);
        if (option == '?')
            FAIL(STATUS_USAGE, "%s is not a valid option; see evaluate --help", text);
        TRY(read_option(option, arguments));
    }
    if (arguments->help || arguments->version) return STATUS_OK;
    if (optind < argc)
        FAIL(STATUS_USAGE, "unexpected argument %s; see evaluate --help", argv[optind]);
    if (!arguments->model) FAIL(STATUS_USAGE, "no model given; use --model DIR");
    if (!arguments->data == !arguments->text)
        FAIL(STATUS_USAGE, "give one of --data SHARDS and --text FILE");
    return STATUS_OK;
}

// --- Measuring ---------------------------------------------------------------------------------

static Status forward_all(Model *model, FixedPass *pass) {
    int64_t done = 0;
    for (;;) {
        MicroBatch batch;
        bool more;
        TRY(fixed_pass_next(pass, &batch, &more));
        if (!more) break;
        log_transient("evaluate: sequence %" PRId64, done + 1);
        TRY(model_forward(model, &batch));
        done += batch.batch;
    }
    log_transient("%s", "");
    return STATUS_OK;
}

static Status measure(const Arguments *arguments, const EvalModel *from, const char *shards,
                      Backend *backend, ModelSums *sums) {
    Status status = STATUS_OK;
    Model *model = NULL;
    FixedPass *pass = NULL;
    ModelOptions model_options = {.micro_batch = arguments->batch,
                                  .sequence_length = arguments->sequence_length};
    LoaderConfig data = {.sources = {{.directory = shards, .weight = 1}},
                         .num_sources = 1,
                         .sequence_length = arguments->sequence_length,
                         .micro_batch = arguments->batch,
                         .global_batch = arguments->batch,
                         .world = 1,
                         .prefetch_steps = 1,
                         .vocab_size = from->config.vocab_size,
                         .tokenizer_id = from->tokenizer_id};
    TRY_GOTO(fixed_pass_open(&data, arguments->sequences, &pass), done);
    TRY_GOTO(eval_model_load(from, backend, &model_options, &model), done);
    TRY_GOTO(model_sums_create(model, sums), done);
    TRY_GOTO(model_reset_sums(model), done);
    TRY_GOTO(forward_all(model, pass), done);
    TRY_GOTO(model_read_sums(model, sums), done);
    if (!(sums->loss_count > 0))
        FAIL_GOTO(done, STATUS_BAD_DATA, "%s: holds no token to predict", shards);
done:
    model_destroy(model);
    fixed_pass_close(pass);
    return status;
}

// --- Printing ----------------------------------------------------------------------------------

static void print_text(const EvalModel *from, const ModelSums *sums) {
    double loss = sums->loss_sum / sums->loss_count;
    LayerStats stats;
    printf("model       %s\n", from->path);
    printf("tokens      %.0f\n", sums->loss_count);
    printf("loss        %.6f\n", loss);
    printf("perplexity  %.4f\n", exp(loss));
    if (!config_has_moe(&from->config)) return;
    printf("\nlayer  experts  entropy  max/mean  load of each expert, %%\n");
    for (int l = 0; l < from->config.num_layers; l++) {
        router_layer_stats(&from->config, sums, l, &stats);
        if (stats.num_experts == 0) continue;
        printf("%5d  %7d  %7.3f  %8.2f ", l, stats.num_experts, stats.entropy, stats.max_over_mean);
        for (int e = 0; e < stats.num_experts; e++) printf(" %.1f", 100 * stats.load[e]);
        printf("\n");
    }
}

static json_t *layers_json(const EvalModel *from, const ModelSums *sums) {
    LayerStats stats;
    json_t *layers = json_array();
    for (int l = 0; l < from->config.num_layers; l++) {
        router_layer_stats(&from->config, sums, l, &stats);
        if (stats.num_experts == 0) continue;
        json_t *load = json_array();
        for (int e = 0; e < stats.num_experts; e++)
            json_array_append_new(load, json_real(stats.load[e]));
        json_array_append_new(layers, json_pack("{s:i, s:f, s:f, s:o}", "layer", l, "entropy",
                                                stats.entropy, "max_over_mean", stats.max_over_mean,
                                                "load", load));
    }
    return layers;
}

static Status print_json(const EvalModel *from, const ModelSums *sums) {
    double loss = sums->loss_sum / sums->loss_count;
    json_t *root = json_pack("{s:s, s:f, s:f, s:I, s:o}", "model", from->path, "loss", loss,
                             "perplexity", exp(loss), "tokens", (json_int_t)sums->loss_count,
                             "layers", layers_json(from, sums));
    if (!root) FAIL(STATUS_INTERNAL, "the results do not fit into JSON (loss %g)", loss);
    int failed = json_dumpf(root, stdout, JSON_INDENT(2));
    json_decref(root);
    if (failed) FAIL(STATUS_IO, "cannot write to standard output");
    putchar('\n');
    return STATUS_OK;
}

// --- main --------------------------------------------------------------------------------------

static Status measure_and_print(const Arguments *arguments, const EvalModel *from,
                                const char *shards) {
    Backend *backend = NULL;
    ModelSums sums = {0};
    DeviceOptions device = {.choice = arguments->device, .threads = (int)arguments->threads};
    TRY(device_open(&device, &backend));
    Status status = measure(arguments, from, shards, backend, &sums);
    backend_destroy(backend);
    if (status == STATUS_OK && arguments->json)
        status = print_json(from, &sums);
    else if (status == STATUS_OK)
        print_text(from, &sums);
    model_sums_free(&sums);
    return status;
}

static Status evaluate_text(const Arguments *arguments, const EvalModel *from) {
    char shards[IO_PATH_MAX];
    const char *tokenizer = arguments->tokenizer;
    if (!tokenizer && strcmp(from->tokenizer_id, TOKENIZER_BYTES_ID) == 0) tokenizer = "bytes";
    if (!tokenizer && from->source && from->tokenizer_id[0]) tokenizer = from->path;
    if (!tokenizer)
        FAIL(STATUS_USAGE,
             "%s has no tokenizer files; give --tokenizer DIR, or --tokenizer bytes "
             "for a model that reads bytes",
             from->path);
    TRY(eval_shards_of_text(arguments->text, tokenizer, shards));
    Status status = measure_and_print(arguments, from, shards);
    StatusRecord failure;
    status_take(&failure);
    if (io_remove_tree(shards) != STATUS_OK) {
        log_warn("%s", status_message());
        status_clear();
    }
    return status == STATUS_OK ? status : status_put(&failure);
}

static Status evaluate(const Arguments *arguments) {
    EvalModel *from = calloc(1, sizeof *from);
    if (!from) FAIL(STATUS_INTERNAL, "no memory for the model's shape");
    Status status = eval_model_open(arguments->model, from);
    if (status == STATUS_OK)
        status = arguments->data ? measure_and_print(arguments, from, arguments->data)
                                 : evaluate_text(arguments, from);
    eval_model_close(from);
    free(from);
    return status;
}

int main(int argc, char **argv) {
    Arguments arguments;
    Status status = read_arguments(argc, argv, &arguments);
    if (status != STATUS_OK) return status_report(status, "evaluate");
    if (arguments.help)
        fputs(usage_text, stdout);
    else if (arguments.version)
        printf("dense2moe evaluate %s (backends: %s)\n", D2M_VERSION, device_backends());
    else
        status = evaluate(&arguments);
    return status == STATUS_OK ? 0 : status_report(status, "evaluate");
}
