// The router: logits, softmax, top-k, gates (METHOD.md §4), and the rows grouped by expert.
//
// With g_j the gates of token t, s = gate_scale and r_j = g_j / s, the gradient of the logits is
//   softmax, straight_through:  dl_i = g_i·dg_i - p_i·Σ_j g_j·dg_j
//   renorm:                     dl_i = g_i·dg_i - r_i·Σ_j g_j·dg_j
// (g_i = dg_i = r_i = 0 for experts not chosen): softmax has g = s·p; straight_through has the
// same form because dL/dp_j = s·dg_j / Σp and p_j / Σp is g_j / s. None of them divides by a
// probability, so an expert chosen with p = 0 (by selection_bias) does no harm. The balance and z
// losses add  p_i·(b·load_i - Σ_l p_l·b·load_l) + 2·z·lse·p_i.
#include <math.h>
#include "cpu/cpu.h"
#include "cpu/gemm.h"
#include "cpu/vector_math.h"

enum { ROUTE_ROWS = 64 }; // tokens that one thread does at a time

typedef struct RouteScratch {
    float *logits;     // (T, N) logits, or their gradient
    int64_t *counters; // (N) next row of each expert
    float *load;       // (N) shares of assignments, when the caller gives none
} RouteScratch;

static void route_layout(const RouteArgs *args, Workspace *workspace, RouteScratch *out) {
    out->logits = workspace_floats(workspace, args->tokens * args->num_experts);
    out->counters = workspace_take(workspace, (size_t)args->num_experts * sizeof(int64_t));
    out->load = workspace_floats(workspace, args->num_experts);
}

size_t cpu_route_workspace(const Backend *backend, const RouteArgs *args) {
    (void)backend;
    Workspace counter = {NULL, 0};
    RouteScratch unused;
    route_layout(args, &counter, &unused);
    return counter.used;
}

static float softmax_row(const float *logits, int count, float *probabilities) {
    float highest = logits[0], sum = 0;
    for (int i = 1; i < count; i++) highest = logits[i] > highest ? logits[i] : highest;
    for (int i = 0; i < count; i++) {
        probabilities[i] = exp_f32(logits[i] - highest);
        sum += probabilities[i];
    }
    const float inverse = 1.0f / sum;
    for (int i = 0; i < count; i++) probabilities[i] *= inverse;
    // cppcheck-suppress invalidFunctionArg ; there is at least one expert, so sum >= 1
    return highest + logf(sum);
}

// The k best by p + bias, lower index first among equals. A NaN is never better than anything, but
// what remains is chosen in index order, so that the k experts are always valid and distinct.
static void choose_experts(const RouteArgs *args, const float *p, int32_t *chosen) {
    for (int j = 0; j < args->top_k; j++) {
        int best = -1;
        float best_score = 0;
        for (int i = 0; i < args->num_experts; i++) {
            bool taken = false;
            for (int l = 0; l < j; l++) taken = taken || chosen[l] == i;
            if (taken) continue;
            const float score = p[i] + (args->selection_bias ? args->selection_bias[i] : 0.0f);
            if (best < 0 || score > best_score) best = i, best_score = score;
        }
        chosen[j] = best;
    }
}

static void set_gates(const RouteArgs *args, const float *p, const int32_t *chosen, float *gate) {
    float sum = 0;
    for (int j = 0; j < args->top_k; j++) sum += p[chosen[j]];
    for (int j = 0; j < args->top_k; j++) {
        float value = p[chosen[j]];
        // Σ p = 0 can only follow from a bias that chose experts of probability 0: share equally.
        if (args->gate_kind != GATE_SOFTMAX)
            value = sum == 0.0f ? 1.0f / (float)args->top_k : value / sum;
        gate[j] = args->gate_scale * value;
    }
}

// expert_begin, slot_of_row and row_of_slot: a counting sort of the slots by expert, stable in t.
static void group_rows(const RouteArgs *args, int64_t *next) {
    const Routing *routing = &args->routing;
    const int64_t slots = args->tokens * args->top_k;
    for (int e = 0; e < args->num_experts; e++) next[e] = 0;
    for (int64_t slot = 0; slot < slots; slot++) next[routing->expert[slot]]++;
    int64_t begin = 0;
    for (int e = 0; e < args->num_experts; e++) {
        const int64_t rows = next[e];
        routing->expert_begin[e] = (int32_t)begin;
        next[e] = begin;
        begin += rows;
    }
    routing->expert_begin[args->num_experts] = (int32_t)begin;
    for (int64_t slot = 0; slot < slots; slot++) {
        const int64_t row = next[routing->expert[slot]]++;
        routing->slot_of_row[row] = (int32_t)slot;
        routing->row_of_slot[slot] = (int32_t)row;
    }
}

Status cpu_route_forward(Backend *backend, const RouteArgs *args) {
    Workspace workspace = workspace_open(backend);
    RouteScratch scratch;
    route_layout(args, &workspace, &scratch);
    WORKSPACE_FITS(backend, workspace);
    INVARIANT(args->top_k >= 1 && args->top_k <= args->num_experts);
    INVARIANT(args->tokens * args->top_k <= INT32_MAX);
    const int64_t hidden = args->hidden_size, experts = args->num_experts, k = args->top_k;
    const Routing *routing = &args->routing;
    const int64_t blocks = divide_up(args->tokens, ROUTE_ROWS);
#pragma omp parallel for num_threads(backend->num_threads) schedule(dynamic)
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t begin = i * ROUTE_ROWS, end = min_i64(begin + ROUTE_ROWS, args->tokens);
        gemm_nt(end - begin, experts, hidden, 1.0f, (const float *)args->x + begin * hidden, hidden,
                args->weight, hidden, 0.0f, scratch.logits + begin * experts, experts);
        for (int64_t t = begin; t < end; t++) {
            float *p = routing->probabilities + t * experts;
            routing->log_sum_exp[t] = softmax_row(scratch.logits + t * experts, (int)experts, p);
            choose_experts(args, p, routing->expert + t * k);
            set_gates(args, p, routing->expert + t * k, routing->gate + t * k);
        }
    }
    group_rows(args, scratch.counters);
    return STATUS_OK;
}

static void own_load(const RouteArgs *args, float *load) {
    const int32_t *begin = args->routing.expert_begin;
    const double slots = (double)(args->tokens * args->top_k);
    for (int e = 0; e < args->num_experts; e++)
        load[e] = (float)((begin[e + 1] - begin[e]) / slots);
}

static void logit_gradient(const RouteArgs *args, const float *load, int64_t t, float *dlogits) {
    const int experts = args->num_experts, k = args->top_k;
    const float *p = args->routing.probabilities + t * experts;
    const float *gate = args->routing.gate + t * k, *dgate = args->dgate + t * k;
    const int32_t *chosen = args->routing.expert + t * k;
    const float z = args->z_scale * 2.0f * args->routing.log_sum_exp[t];
    double dot = 0, mean_load = 0;
    for (int j = 0; j < k; j++) dot += (double)gate[j] * dgate[j];
    for (int i = 0; i < experts; i++) mean_load += (double)p[i] * load[i];
    const bool renorm = args->gate_kind == GATE_RENORM;
    for (int i = 0; i < experts; i++) {
        const float excess = load[i] - (float)mean_load;
        dlogits[i] = p[i] * (args->balance_scale * excess + z - (renorm ? 0.0f : (float)dot));
    }
    for (int j = 0; j < k; j++) {
        const float share = renorm ? (float)(dot / args->gate_scale) : 0.0f;
        dlogits[chosen[j]] += gate[j] * (dgate[j] - share);
    }
}

Status cpu_route_backward(Backend *backend, const RouteArgs *args) {
    Workspace workspace = workspace_open(backend);
    RouteScratch scratch;
    route_layout(args, &workspace, &scratch);
    WORKSPACE_FITS(backend, workspace);
    const int64_t hidden = args->hidden_size, experts = args->num_experts;
    const int64_t blocks = divide_up(args->tokens, ROUTE_ROWS);
    float *dlogits = scratch.logits;
    const float *load = args->load ? args->load : scratch.load;
    if (!args->load) own_load(args, scratch.load);
    const TileGrid grid = tile_grid(backend->num_threads, experts, hidden);
#pragma omp parallel num_threads(backend->num_threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < blocks; i++) {
            const int64_t begin = i * ROUTE_ROWS, end = min_i64(begin + ROUTE_ROWS, args->tokens);
            for (int64_t t = begin; t < end; t++)
                logit_gradient(args, load, t, dlogits + t * experts);
            gemm_nn(end - begin, hidden, experts, 1.0f, dlogits + begin * experts, experts,
                    args->weight, hidden, 1.0f, (float *)args->dx + begin * hidden, hidden);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < grid.count; i++) {
            const Tile tile = tile_at(&grid, i);
            gemm_tn(tile.rows, tile.columns, args->tokens, 1.0f, dlogits + tile.row, experts,
                    (const float *)args->x + tile.column, hidden, 1.0f,
                    args->grad_weight + tile.row * hidden + tile.column, hidden);
        }
    }
    return STATUS_OK;
}

// --- Sums for the losses and the report ---------------------------------------------------------

enum { LOSS_PARTS = 32 }; // fixed, so that the sums do not depend on the number of threads

// (LOSS_PARTS, N + 2): Σ p per expert, entropy, Σ lse²
static double *loss_sums(const RouterLossArgs *args, Workspace *workspace) {
    return workspace_take(workspace, LOSS_PARTS * ((size_t)args->num_experts + 2) * sizeof(double));
}

size_t cpu_router_loss_workspace(const Backend *backend, const RouterLossArgs *args) {
    (void)backend;
    Workspace counter = {NULL, 0};
    loss_sums(args, &counter);
    return counter.used;
}

static void sum_part(const RouterLossArgs *args, int part, double *sums) {
    const int experts = args->num_experts;
    for (int i = 0; i < experts + 2; i++) sums[i] = 0;
    const int64_t end = part_begin(args->tokens, LOSS_PARTS, part + 1);
    for (int64_t t = part_begin(args->tokens, LOSS_PARTS, part); t < end; t++) {
        const float *p = args->routing.probabilities + t * experts;
        for (int i = 0; i < experts; i++) {
            sums[i] += p[i];
            if (p[i] != 0.0f) sums[experts] -= (double)p[i] * log((double)p[i]);
        }
        sums[experts + 1] += (double)args->routing.log_sum_exp[t] * args->routing.log_sum_exp[t];
    }
}

Status cpu_router_loss(Backend *backend, const RouterLossArgs *args) {
    Workspace workspace = workspace_open(backend);
    double *sums = loss_sums(args, &workspace);
    WORKSPACE_FITS(backend, workspace);
    const int experts = args->num_experts, width = experts + 2;
#pragma omp parallel for num_threads(backend->num_threads) schedule(static)
    for (int part = 0; part < LOSS_PARTS; part++) sum_part(args, part, sums + part * width);
    for (int part = 0; part < LOSS_PARTS; part++) {
        const double *from = sums + part * width;
        for (int i = 0; i < experts; i++) args->sums.probability[i] += from[i];
        args->sums.entropy[0] += from[experts];
        args->sums.z[0] += from[experts + 1];
    }
    const int32_t *begin = args->routing.expert_begin;
    for (int i = 0; i < experts; i++) args->sums.assignments[i] += begin[i + 1] - begin[i];
    return STATUS_OK;
}
