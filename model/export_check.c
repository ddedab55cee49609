// Compares three computations of the same logits: the trained model, its weights rounded in memory
// as the export rounds them, and the directory read back. export_check.h says what is compared with
// what, and why.
#include "model/export_check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "base/random.h"
#include "model/hf.h"

enum { CHECK_TOKENS = 64, ROUND_CHUNK = 4096 };
static const double file_tolerance = 1e-5; // of the largest logit

// --- The trained weights as the export stores them -----------------------------------------------

typedef struct RoundedSource {
    TensorSource base;
    TensorSource *inner;
    ModelConfig config; // gate_scale is in down_proj
    float gate_scale;
} RoundedSource;

static Status read_rounded(TensorSource *base, const Tensor *tensor, int64_t first, int64_t count,
                           float *out) {
    const RoundedSource *source = (const RoundedSource *)base;
    TRY(source->inner->read(source->inner, tensor, first, count, out));
    bool scaled = tensor->role == ROLE_DOWN && tensor->expert >= 0;
    for (int64_t i = 0; i < count && scaled; i++) out[i] *= source->gate_scale;
    char stored[ROUND_CHUNK * sizeof(float)];
    for (int64_t done = 0; done < count; done += ROUND_CHUNK) {
        size_t now = (size_t)(count - done < ROUND_CHUNK ? count - done : ROUND_CHUNK);
        dtype_from_f32(base->dtype, out + done, stored, now);
        dtype_to_f32(base->dtype, stored, out + done, now);
    }
    return STATUS_OK;
}

static void close_rounded(TensorSource *base) {
    source_close(((RoundedSource *)base)->inner);
    free(base);
}

static Status rounded_source(Model *trained, DType dtype, TensorSource **out) {
    RoundedSource *source = calloc(1, sizeof *source);
    if (!source) FAIL(STATUS_INTERNAL, "out of memory for the export check");
    Status status = model_source(trained, &source->inner);
    if (status != STATUS_OK) {
        free(source);
        return status;
    }
    source->config = trained->config;
    source->gate_scale = source->config.router.gate_scale;
    source->config.router.gate_scale = 1;
    source->base = (TensorSource){.config = &source->config,
                                  .table = source->inner->table,
                                  .dtype = dtype,
                                  .read = read_rounded,
                                  .close = close_rounded};
    *out = &source->base;
    return STATUS_OK;
}

// --- Logits --------------------------------------------------------------------------------------

// Logits (tokens, V) of a model made for this from `source`, which is closed.
static Status source_logits(Backend *backend, TensorSource *source, const int32_t *ids,
                            int64_t tokens, float *logits) {
    Status status = STATUS_OK;
    Model *model = NULL;
    const ModelOptions options = {.micro_batch = 1, .sequence_length = tokens};
    TRY_GOTO(model_create(backend, source->config, &options, &model), done);
    TRY_GOTO(model_load(model, source), done);
    TRY_GOTO(model_logits(model, ids, tokens, logits), done);
done:
    model_destroy(model);
    source_close(source);
    return status;
}

static double largest(const float *logits, size_t count) {
    double largest = 0;
    for (size_t i = 0; i < count; i++) {
        double magnitude = fabs((double)logits[i]);
        if (!(magnitude <= largest)) largest = magnitude; // a NaN stays
        if (isnan(largest)) break;
    }
    return largest;
}

static double max_difference(const float *a, const float *b, size_t count) {
    double max = 0;
    for (size_t i = 0; i < count; i++) {
        double difference = fabs((double)a[i] - (double)b[i]);
        if (!(difference <= max)) max = difference;
        if (isnan(max)) break;
    }
    return max;
}

static int64_t argmax(const float *row, int64_t count) {
    int64_t best = 0;
    for (int64_t i = 1; i < count; i++)
        if (row[i] > row[best]) best = i;
    return best;
}

// |b - a| / |a - mean(a)|: a constant added to all logits of a row would change no probability, so
// it must not hide an error either.
static double row_error(const float *a, const float *b, int64_t count) {
    double mean = 0, spread = 0, difference = 0;
    for (int64_t i = 0; i < count; i++) mean += (double)a[i] / (double)count;
    for (int64_t i = 0; i < count; i++) {
        spread += (a[i] - mean) * (a[i] - mean);
        difference += ((double)b[i] - a[i]) * ((double)b[i] - a[i]);
    }
    return difference == 0 ? 0 : sqrt(difference / spread);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void compare(const float *trained, const float *exported, int64_t vocab, ExportCheck *out) {
    double errors[CHECK_TOKENS] = {0};
    int64_t same = 0;
    for (int64_t t = 0; t < out->tokens; t++) {
        const float *a = trained + t * vocab, *b = exported + t * vocab;
        errors[t] = row_error(a, b, vocab);
        same += argmax(a, vocab) == argmax(b, vocab);
    }
    qsort(errors, (size_t)out->tokens, sizeof *errors, by_value);
    out->median_error = errors[out->tokens / 2];
    out->top1_agreement = (double)same / (double)out->tokens;
    out->max_diff = max_difference(trained, exported, (size_t)(out->tokens * vocab));
}

// --- The check -----------------------------------------------------------------------------------

typedef struct Logits {
    float *trained, *rounded, *exported; // (tokens, V)
} Logits;

static Status compute(Model *trained, const char *directory, DType written, int64_t tokens,
                      Logits *logits) {
    int32_t ids[CHECK_TOKENS];
    uint64_t vocab = (uint64_t)trained->config.vocab_size, stream = random_stream("export check");
    for (int64_t t = 0; t < tokens; t++)
        ids[t] = (int32_t)(random_u64(1, stream, (uint64_t)t) % vocab);
    TensorSource *source;
    TRY(model_logits(trained, ids, tokens, logits->trained));
    TRY(rounded_source(trained, written, &source));
    TRY(source_logits(trained->backend, source, ids, tokens, logits->rounded));
    TRY(hf_open(directory, &source));
    if (source->config->vocab_size != trained->config.vocab_size) {
        int found = source->config->vocab_size;
        source_close(source);
        FAIL(STATUS_INTERNAL, "%s: vocab_size %d, the trained model has %d", directory, found,
             trained->config.vocab_size);
    }
    TRY(source_logits(trained->backend, source, ids, tokens, logits->exported));
    return STATUS_OK;
}

// `fp32`: both the files and the backend hold all of a weight's bits.
static Status judge(const char *directory, DType written, bool fp32, const Logits *logits,
                    int64_t vocab, ExportCheck *out) {
    size_t count = (size_t)(out->tokens * vocab);
    double scale = largest(logits->trained, count);
    if (!isfinite(scale))
        FAIL(STATUS_NUMERICS,
             "the trained model's logits are not finite: nothing to compare %s with", directory);
    out->max_file_diff = max_difference(logits->rounded, logits->exported, count);
    compare(logits->trained, logits->exported, vocab, out);
    if (!(out->max_file_diff <= file_tolerance * scale)) {
        FAIL(STATUS_INTERNAL,
             "%s: read back, it computes logits that differ by up to %g from those of the same "
             "%s weights in memory (largest logit %g), expected equal",
             directory, out->max_file_diff, dtype_name(written), scale);
    }
    double tolerance = fp32 ? 1e-3 : 0.5; // export_check.h, part 2
    if (!(out->median_error <= tolerance)) {
        FAIL(STATUS_INTERNAL,
             "%s: its logits are off by %.2g of their spread (median over positions) from the "
             "trained model's, expected at most %g for %s weights",
             directory, out->median_error, tolerance, dtype_name(written));
    }
    return STATUS_OK;
}

Status export_verify(Model *trained, const char *directory, DType written, ExportCheck *out) {
    Status status = STATUS_OK;
    int64_t room = trained->options.micro_batch * trained->options.sequence_length;
    int64_t vocab = trained->config.vocab_size;
    *out = (ExportCheck){.tokens = room < CHECK_TOKENS ? room : CHECK_TOKENS};
    size_t bytes = (size_t)(out->tokens * vocab) * sizeof(float);
    Logits logits = {malloc(bytes), malloc(bytes), malloc(bytes)};
    if (!logits.trained || !logits.rounded || !logits.exported)
        FAIL_GOTO(done, STATUS_INTERNAL, "out of memory for the logits of the export check");
    TRY_GOTO(compute(trained, directory, written, out->tokens, &logits), done);
    bool fp32 = written == DTYPE_F32 && trained->backend->compute_dtype == DTYPE_F32;
    TRY_GOTO(judge(directory, written, fp32, &logits, vocab, out), done);
done:
    free(logits.trained);
    free(logits.rounded);
    free(logits.exported);
    return status;
}
