// Final linear layer, softmax and cross-entropy in chunks of tokens.
//
// A chunk's logits (C, V) are computed, turned in place into their gradient, and used for dx and
// the weight's gradient before the next chunk overwrites them. Only the loss is kept, one float a
// token, and summed in double in token order.
#include <math.h>
#include "cpu/cpu.h"
#include "cpu/gemm.h"
#include "cpu/vector_math.h"

// Chunk of the backend's choice: logits of about this size, but enough rows that reading and
// writing the weight's gradient once per chunk stays small beside the products.
enum { CHUNK_BYTES = 16 << 20, CHUNK_ROWS_MIN = 256 };

typedef struct CrossEntropyScratch {
    float *logits; // (chunk, V)
    float *losses; // (T)
} CrossEntropyScratch;

static int64_t chunk_rows(const LinearCrossEntropyArgs *args) {
    int64_t rows = args->chunk_tokens;
    if (rows <= 0) {
        rows = CHUNK_BYTES / ((int64_t)sizeof(float) * args->vocab_size);
        rows = max_i64(rows, CHUNK_ROWS_MIN);
        rows = divide_up(args->tokens, max_i64(1, divide_up(args->tokens, rows))); // equal chunks
    }
    return max_i64(1, min_i64(rows, args->tokens));
}

static void cross_entropy_layout(const LinearCrossEntropyArgs *args, Workspace *workspace,
                                 CrossEntropyScratch *out) {
    out->logits = workspace_floats(workspace, chunk_rows(args) * args->vocab_size);
    out->losses = workspace_floats(workspace, args->tokens);
}

size_t cpu_cross_entropy_workspace(const Backend *backend, const LinearCrossEntropyArgs *args) {
    (void)backend;
    Workspace counter = {NULL, 0};
    CrossEntropyScratch unused;
    cross_entropy_layout(args, &counter, &unused);
    return counter.used;
}

// Largest element. Lanes are kept apart so that the loop vectorises; a NaN may be passed over, the
// sum of exponentials will have it.
enum { LANES = 16 };
static float row_maximum(const float *row, int64_t count) {
    float lanes[LANES];
    for (int l = 0; l < LANES; l++) lanes[l] = -INFINITY;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
#pragma omp simd
        for (int l = 0; l < LANES; l++) lanes[l] = row[i + l] > lanes[l] ? row[i + l] : lanes[l];
    }
    for (; i < count; i++) lanes[0] = row[i] > lanes[0] ? row[i] : lanes[0];
    float highest = lanes[0];
    for (int l = 1; l < LANES; l++) highest = lanes[l] > highest ? lanes[l] : highest;
    return highest;
}

// row[i] = exp(row[i] - highest); returns their sum, in double every SUM_BLOCK elements.
enum { SUM_BLOCK = 1024 };
static double exponentials(float *row, int64_t count, float highest) {
    double sum = 0;
    for (int64_t begin = 0; begin < count; begin += SUM_BLOCK) {
        const int64_t end = min_i64(begin + SUM_BLOCK, count);
        float part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t i = begin; i < end; i++) {
            const float e = exp_f32(row[i] - highest);
            row[i] = e;
            part += e;
        }
        sum += part;
    }
    return sum;
}

// Loss of one token; leaves the logits' gradient in `row`.
static float loss_row(float *row, int64_t vocab, int32_t target, float grad_scale) {
    if (target < 0) {
        for (int64_t i = 0; i < vocab; i++) row[i] = 0.0f;
        return 0.0f;
    }
    const float logit = row[target], highest = row_maximum(row, vocab);
    const double sum = exponentials(row, vocab, highest);
    const float factor = (float)(grad_scale / sum);
#pragma omp simd
    for (int64_t i = 0; i < vocab; i++) row[i] *= factor;
    row[target] -= grad_scale;
    return (float)(log(sum) + highest - logit);
}

// Without a gradient the logits are only read.
static float loss_row_only(float *row, int64_t vocab, int32_t target) {
    if (target < 0) return 0.0f;
    const float logit = row[target], highest = row_maximum(row, vocab);
    return (float)(log(exponentials(row, vocab, highest)) + highest - logit);
}

typedef struct Chunk {
    int64_t begin, rows;
} Chunk;

// Logits and losses of a chunk. A tile of whole rows could go on to its losses at once, but a large
// vocabulary is cut into columns, too; rows are short work beside the product.
static void chunk_forward(const LinearCrossEntropyArgs *args, const CrossEntropyScratch *scratch,
                          const TileGrid *grid, const Chunk *chunk) {
    const int64_t hidden = args->hidden_size, vocab = args->vocab_size;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < grid->count; i++) {
        const Tile tile = tile_at(grid, i);
        gemm_nt(tile.rows, tile.columns, hidden, 1.0f,
                (const float *)args->x + (chunk->begin + tile.row) * hidden, hidden,
                (const float *)args->weight + tile.column * hidden, hidden, 0.0f,
                scratch->logits + tile.row * vocab + tile.column, vocab);
    }
#pragma omp for schedule(static)
    for (int64_t r = 0; r < chunk->rows; r++) {
        const int64_t t = chunk->begin + r;
        float *row = scratch->logits + r * vocab;
        scratch->losses[t] = args->grad_weight
                                 ? loss_row(row, vocab, args->targets[t], args->grad_scale)
                                 : loss_row_only(row, vocab, args->targets[t]);
    }
}

static void chunk_backward(const LinearCrossEntropyArgs *args, const CrossEntropyScratch *scratch,
                           const TileGrid *weights, const TileGrid *inputs, const Chunk *chunk) {
    const int64_t hidden = args->hidden_size, vocab = args->vocab_size;
    const float beta = args->grad_assign && chunk->begin == 0 ? 0.0f : 1.0f;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < weights->count + inputs->count; i++) {
        if (i < weights->count) {
            const Tile tile = tile_at(weights, i);
            gemm_tn(tile.rows, tile.columns, chunk->rows, 1.0f, scratch->logits + tile.row, vocab,
                    (const float *)args->x + chunk->begin * hidden + tile.column, hidden, beta,
                    (float *)args->grad_weight + tile.row * hidden + tile.column, hidden);
            continue;
        }
        const Tile tile = tile_at(inputs, i - weights->count);
        gemm_nn(tile.rows, tile.columns, vocab, 1.0f, scratch->logits + tile.row * vocab, vocab,
                (const float *)args->weight + tile.column, hidden, 0.0f,
                (float *)args->dx + (chunk->begin + tile.row) * hidden + tile.column, hidden);
    }
}

Status cpu_linear_cross_entropy(Backend *backend, const LinearCrossEntropyArgs *args) {
    Workspace workspace = workspace_open(backend);
    CrossEntropyScratch scratch;
    cross_entropy_layout(args, &workspace, &scratch);
    WORKSPACE_FITS(backend, workspace);
    for (int64_t t = 0; t < args->tokens; t++)
        if (args->targets[t] < -1 || args->targets[t] >= args->vocab_size)
            FAIL(STATUS_BAD_DATA,
                 "target %d at position %lld of the micro-batch is outside the vocabulary of %d",
                 (int)args->targets[t], (long long)t, args->vocab_size);
    const int threads = backend->num_threads;
    const int64_t most = chunk_rows(args);
    for (int64_t begin = 0; begin < args->tokens; begin += most) {
        const Chunk chunk = {begin, min_i64(most, args->tokens - begin)};
        const TileGrid logits = tile_grid(threads, chunk.rows, args->vocab_size);
        const TileGrid weights = tile_grid(threads, args->vocab_size, args->hidden_size);
        const TileGrid inputs = tile_grid(threads, args->dx ? chunk.rows : 0, args->hidden_size);
#pragma omp parallel num_threads(threads)
        {
            chunk_forward(args, &scratch, &logits, &chunk);
            if (args->grad_weight) chunk_backward(args, &scratch, &weights, &inputs, &chunk);
        }
    }
    for (int64_t t = 0; t < args->tokens; t++) {
        if (args->targets[t] >= 0) {
            *args->loss_sum += scratch.losses[t];
            *args->loss_count += 1.0;
        }
        if (args->token_loss) args->token_loss[t] = scratch.losses[t];
    }
    return STATUS_OK;
}
