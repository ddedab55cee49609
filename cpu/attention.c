// Causal grouped-query attention in tiles (Dao et al. 2022): no more than a small tile of the
// scores of one head exist at a time on a thread.
//
// Forward walks the key tiles of a query tile with the online softmax: a running maximum m, sum l
// and unnormalised output per row, rescaled when the maximum grows. It keeps out and
// lse = m + ln l. Backward computes each tile's probabilities again as p = exp(s - lse) and, with
// delta = Σ dout·out per row,
//   dv += pᵀ·dout    ds = p·(dout·vᵀ - delta)    dq += ds·k/√D    dk += dsᵀ·q/√D
// One query head of one sequence is the unit of work. The key and value gradients of query heads
// that share a key head meet in a second pass that adds them in head order.
//
// A document mask is a first key per query, non-decreasing: tiles before the first key of their
// first query are skipped, the others are masked row by row.
#include <math.h>
#include <omp.h>
#include "cpu/cpu.h"
#include "cpu/gemm.h"
#include "cpu/vector_math.h"

enum { FORWARD_Q = 32, FORWARD_K = 256, BACKWARD_Q = 256, BACKWARD_K = 32 };
enum { TILE_FLOATS = 256 * 32 }; // of the larger of the two

// Where one query head of one sequence lies.
typedef struct Head {
    const float *q, *k, *v;        // (S, D), rows `stride` apart
    const int32_t *document_start; // (S) or NULL
    float *out;                    // (S, D), rows `out_stride` apart
    float *log_sum_exp;            // (S)
    int64_t length, dim, stride, out_stride;
    float scale; // 1/√D
} Head;

static int64_t qkv_width(const AttentionArgs *args) {
    return (int64_t)(args->num_heads + 2 * args->num_kv_heads) * args->head_dim;
}

static Head head_of(const AttentionArgs *args, int64_t batch, int head) {
    const int64_t length = args->sequence_length, dim = args->head_dim, stride = qkv_width(args);
    const float *rows = (const float *)args->qkv + batch * length * stride;
    const int kv_head = head / (args->num_heads / args->num_kv_heads);
    Head out = {0};
    out.q = rows + head * dim;
    out.k = rows + (args->num_heads + kv_head) * dim;
    out.v = out.k + args->num_kv_heads * dim;
    if (args->document_start) out.document_start = args->document_start + batch * length;
    out.out_stride = args->num_heads * dim;
    out.out = (float *)args->out + batch * length * out.out_stride + head * dim;
    out.log_sum_exp = args->log_sum_exp + (batch * args->num_heads + head) * length;
    out.length = length;
    out.dim = dim;
    out.stride = stride;
    out.scale = (float)(1.0 / sqrt((double)dim));
    return out;
}

// One tile of scores: queries [q, q + rows) and keys [k, k + columns).
typedef struct ScoreTile {
    int64_t q, rows, k, columns;
} ScoreTile;

static int64_t first_key(const Head *head, int64_t query) {
    return head->document_start ? head->document_start[query] : 0;
}

// The keys of the tile that row r may see are the columns [*begin, *end); may be none.
static void visible(const Head *head, const ScoreTile *tile, int64_t r, int64_t *begin,
                    int64_t *end) {
    const int64_t query = tile->q + r;
    *begin = max_i64(0, first_key(head, query) - tile->k);
    *end = min_i64(tile->columns, query + 1 - tile->k);
}

// scores (rows, columns) = q·kᵀ/√D
static void score_tile(const Head *head, const ScoreTile *tile, float *scores) {
    gemm_nt(tile->rows, tile->columns, head->dim, head->scale, head->q + tile->q * head->stride,
            head->stride, head->k + tile->k * head->stride, head->stride, 0.0f, scores,
            tile->columns);
}

// --- Forward ------------------------------------------------------------------------------------

// Largest of m and the scores; a NaN may be passed over, the exponentials will have it.
enum { LANES = 16 };
static float maximum(const float *scores, int64_t count, float m) {
    float lanes[LANES];
    for (int l = 0; l < LANES; l++) lanes[l] = m;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
#pragma omp simd
        for (int l = 0; l < LANES; l++)
            lanes[l] = scores[i + l] > lanes[l] ? scores[i + l] : lanes[l];
    }
    for (; i < count; i++) lanes[0] = scores[i] > lanes[0] ? scores[i] : lanes[0];
    for (int l = 0; l < LANES; l++) m = lanes[l] > m ? lanes[l] : m;
    return m;
}

// Turns a tile's scores into exp(score - m), 0 where masked, and brings m, l and the output rows
// up to date.
static void softmax_tile(const Head *head, const ScoreTile *tile, float *scores, float *m,
                         float *l) {
    for (int64_t r = 0; r < tile->rows; r++) {
        float *row = scores + r * tile->columns;
        int64_t begin, end;
        visible(head, tile, r, &begin, &end);
        if (begin >= end) begin = end = 0;
        for (int64_t c = 0; c < begin; c++) row[c] = 0.0f;
        for (int64_t c = end; c < tile->columns; c++) row[c] = 0.0f;
        if (begin == end) continue;
        const float highest = maximum(row + begin, end - begin, m[r]);
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = begin; c < end; c++) {
            const float e = exp_f32(row[c] - highest);
            row[c] = e;
            sum += e;
        }
        const float shrink = exp_f32(m[r] - highest); // 0 for the first keys of the row
        float *out = head->out + (tile->q + r) * head->out_stride;
        if (shrink != 1.0f) {
#pragma omp simd
            for (int64_t d = 0; d < head->dim; d++) out[d] *= shrink;
        }
        l[r] = l[r] * shrink + sum;
        m[r] = highest;
    }
}

static void forward_query_tile(const Head *head, int64_t q, int64_t rows, float *scores) {
    float m[FORWARD_Q], l[FORWARD_Q];
    for (int64_t r = 0; r < rows; r++) {
        m[r] = -INFINITY;
        l[r] = 0.0f;
        float *out = head->out + (q + r) * head->out_stride;
        for (int64_t d = 0; d < head->dim; d++) out[d] = 0.0f;
    }
    for (int64_t k = first_key(head, q); k < q + rows; k += FORWARD_K) {
        const ScoreTile tile = {q, rows, k, min_i64(FORWARD_K, q + rows - k)};
        score_tile(head, &tile, scores);
        softmax_tile(head, &tile, scores, m, l);
        gemm_nn(rows, head->dim, tile.columns, 1.0f, scores, tile.columns,
                head->v + k * head->stride, head->stride, 1.0f, head->out + q * head->out_stride,
                head->out_stride);
    }
    for (int64_t r = 0; r < rows; r++) {
        float *out = head->out + (q + r) * head->out_stride;
        const float inverse = 1.0f / l[r];
        for (int64_t d = 0; d < head->dim; d++) out[d] *= inverse;
        head->log_sum_exp[q + r] = m[r] + logf(l[r]);
    }
}

// --- Scratch ------------------------------------------------------------------------------------

typedef struct AttentionScratch {
    int64_t tile_floats;     // of one thread
    float *scores, *dscores; // (threads, FORWARD_Q, FORWARD_K)
    float *delta;            // (B, num_heads, S)
    float *dk, *dv;          // (B, num_heads, S, D): by query head
} AttentionScratch;

static void attention_layout(const Backend *backend, const AttentionArgs *args,
                             Workspace *workspace, AttentionScratch *out) {
    const int64_t rows = args->batch * args->num_heads * args->sequence_length;
    out->tile_floats = TILE_FLOATS;
    out->scores = workspace_floats(workspace, backend->num_threads * out->tile_floats);
    out->dscores = workspace_floats(workspace, backend->num_threads * out->tile_floats);
    out->delta = workspace_floats(workspace, rows);
    out->dk = workspace_floats(workspace, rows * args->head_dim);
    out->dv = workspace_floats(workspace, rows * args->head_dim);
}

size_t cpu_attention_workspace(const Backend *backend, const AttentionArgs *args) {
    Workspace counter = {NULL, 0};
    AttentionScratch unused;
    attention_layout(backend, args, &counter, &unused);
    return counter.used;
}

Status cpu_attention_forward(Backend *backend, const AttentionArgs *args) {
    Workspace workspace = workspace_open(backend);
    AttentionScratch scratch;
    attention_layout(backend, args, &workspace, &scratch);
    WORKSPACE_FITS(backend, workspace);
    INVARIANT(args->num_heads % args->num_kv_heads == 0);
    const int64_t tiles = divide_up(args->sequence_length, FORWARD_Q);
    const int64_t units = args->batch * args->num_heads * tiles;
#pragma omp parallel for num_threads(backend->num_threads) schedule(dynamic)
    for (int64_t i = 0; i < units; i++) {
        const int64_t unit = i / tiles, q = (tiles - 1 - i % tiles) * FORWARD_Q; // longest first
        const Head head = head_of(args, unit / args->num_heads, (int)(unit % args->num_heads));
        forward_query_tile(&head, q, min_i64(FORWARD_Q, head.length - q),
                           scratch.scores + omp_get_thread_num() * scratch.tile_floats);
    }
    return STATUS_OK;
}

// --- Backward -----------------------------------------------------------------------------------

// The gradients of one query head.
typedef struct HeadGradient {
    const float *dout; // (S, D), rows out_stride apart
    float *dq;         // (S, D), rows stride apart
    float *dk, *dv;    // (S, D) packed
    float *delta;      // (S)
} HeadGradient;

// From scores and dp = dout·vᵀ to probabilities (in `scores`) and ds/√D (in `dp`).
static void gradient_tile(const Head *head, const ScoreTile *tile, const float *delta,
                          float *scores, float *dp) {
    for (int64_t r = 0; r < tile->rows; r++) {
        float *p = scores + r * tile->columns, *ds = dp + r * tile->columns;
        int64_t begin, end;
        visible(head, tile, r, &begin, &end);
        if (begin >= end) begin = end = 0;
        for (int64_t c = 0; c < begin; c++) p[c] = ds[c] = 0.0f;
        for (int64_t c = end; c < tile->columns; c++) p[c] = ds[c] = 0.0f;
        const float lse = head->log_sum_exp[tile->q + r], mean = delta[tile->q + r];
        const float scale = head->scale;
#pragma omp simd
        for (int64_t c = begin; c < end; c++) {
            const float probability = exp_f32(p[c] - lse);
            p[c] = probability;
            ds[c] = probability * (ds[c] - mean) * scale;
        }
    }
}

// All queries that see the keys [k, k + columns).
static void backward_key_tile(const Head *head, const HeadGradient *gradient, int64_t k,
                              int64_t columns, float *scores, float *dscores) {
    const int64_t dim = head->dim;
    const float *keys = head->k + k * head->stride, *values = head->v + k * head->stride;
    for (int64_t q = k; q < head->length; q += BACKWARD_Q) {
        if (first_key(head, q) >= k + columns) break; // this document and all later ones
        const ScoreTile tile = {q, min_i64(BACKWARD_Q, head->length - q), k, columns};
        const float *queries = head->q + q * head->stride;
        const float *dout = gradient->dout + q * head->out_stride;
        const float beta = q == k ? 0.0f : 1.0f; // the first tile assigns
        score_tile(head, &tile, scores);
        gemm_nt(tile.rows, columns, dim, 1.0f, dout, head->out_stride, values, head->stride, 0.0f,
                dscores, columns);
        gradient_tile(head, &tile, gradient->delta, scores, dscores);
        gemm_tn(columns, dim, tile.rows, 1.0f, scores, columns, dout, head->out_stride, beta,
                gradient->dv + k * dim, dim);
        gemm_tn(columns, dim, tile.rows, 1.0f, dscores, columns, queries, head->stride, beta,
                gradient->dk + k * dim, dim);
        gemm_nn(tile.rows, dim, columns, 1.0f, dscores, columns, keys, head->stride, 1.0f,
                gradient->dq + q * head->stride, head->stride);
    }
}

static void backward_head(const Head *head, const HeadGradient *gradient, float *scores,
                          float *dscores) {
    const int64_t dim = head->dim;
    for (int64_t s = 0; s < head->length; s++) {
        const float *out = head->out + s * head->out_stride;
        const float *dout = gradient->dout + s * head->out_stride;
        float *dq = gradient->dq + s * head->stride, sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < dim; d++) {
            sum += out[d] * dout[d];
            dq[d] = 0.0f;
        }
        gradient->delta[s] = sum;
    }
    for (int64_t k = 0; k < head->length; k += BACKWARD_K)
        backward_key_tile(head, gradient, k, min_i64(BACKWARD_K, head->length - k), scores,
                          dscores);
}

// dk and dv of one token: sums over the query heads of each group.
static void sum_groups(const AttentionArgs *args, const AttentionScratch *scratch, int64_t batch,
                       int64_t s) {
    const int64_t dim = args->head_dim, length = args->sequence_length;
    const int group = args->num_heads / args->num_kv_heads;
    float *dk =
        (float *)args->dqkv + (batch * length + s) * qkv_width(args) + args->num_heads * dim;
    float *dv = dk + args->num_kv_heads * dim;
    for (int kv_head = 0; kv_head < args->num_kv_heads; kv_head++) {
        for (int g = 0; g < group; g++) {
            const int64_t head = batch * args->num_heads + kv_head * group + g;
            const float *from_k = scratch->dk + (head * length + s) * dim;
            const float *from_v = scratch->dv + (head * length + s) * dim;
            float *to_k = dk + kv_head * dim, *to_v = dv + kv_head * dim;
            for (int64_t d = 0; d < dim; d++) {
                to_k[d] = g == 0 ? from_k[d] : to_k[d] + from_k[d];
                to_v[d] = g == 0 ? from_v[d] : to_v[d] + from_v[d];
            }
        }
    }
}

Status cpu_attention_backward(Backend *backend, const AttentionArgs *args) {
    Workspace workspace = workspace_open(backend);
    AttentionScratch scratch;
    attention_layout(backend, args, &workspace, &scratch);
    WORKSPACE_FITS(backend, workspace);
    INVARIANT(args->num_heads % args->num_kv_heads == 0);
    const int64_t length = args->sequence_length, units = args->batch * args->num_heads;
#pragma omp parallel num_threads(backend->num_threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < units; unit++) {
            const int64_t batch = unit / args->num_heads, h = unit % args->num_heads;
            const Head head = head_of(args, batch, (int)h);
            const HeadGradient gradient = {
                .dout = (const float *)args->dout + (head.out - (const float *)args->out),
                .dq = (float *)args->dqkv + (head.q - (const float *)args->qkv),
                .dk = scratch.dk + unit * length * head.dim,
                .dv = scratch.dv + unit * length * head.dim,
                .delta = scratch.delta + unit * length,
            };
            const int64_t offset = omp_get_thread_num() * scratch.tile_floats;
            backward_head(&head, &gradient, scratch.scores + offset, scratch.dscores + offset);
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < args->batch * length; t++)
            sum_groups(args, &scratch, t / length, t % length);
    }
    return STATUS_OK;
}
