// The MLP's products with SwiGLU inside, of Hopper chips, against sums in double precision.
//
// The ops that use them have tests of their own, in which other products are cuBLAS's. Here nothing
// calls cuBLAS, whose bf16 kernels stop compute-sanitizer's racecheck, so that it sees ours. Every
// run begins with poisoned outputs and scratch, and a second one must give the same bits.
#include "cuda/hopper_mlp.h"
extern "C" {
#include "tests/gpu/gpu_hopper.h"
}

// --- Operands -----------------------------------------------------------------------------------

typedef struct MlpCase {
    int groups;
    int32_t begin[HOPPER_GROUPS_MAX + 1];
    int hidden, inner;
} MlpCase;

// A tile has 256 rows of a group, and 128 of the inner columns in the forward pass, 256 in the
// backward one. The last three cases have more of them than an H200 has clusters, which is 66, so
// that these go from tile to tile: 144 and 80 of many groups; 1264 and 640, 19 and 10 of each
// cluster, which is more than a block remembers the numbers of; 135 and 72 of one group, whose rows
// make two bands.
static const MlpCase cases[] = {
    {1, {0, 1}, 64, 8},      // less than any tile
    {1, {0, 300}, 128, 264}, // a tile stands over on both sides
    {3, {0, 0, 256, 256}, 64, 512},
    {5, {0, 100, 100, 101, 360, 517}, 192, 200}, // begins inside tiles; a group of 0 rows, one of 1
    {16, {0, 1, 1, 30, 41, 60, 75, 76, 100, 107, 130, 149, 160, 181, 200, 207, 480}, 64, 1032},
    {16, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}, 64, 10000},
    {1, {0, 2100}, 64, 1800},
};

typedef enum Scaling { UNSCALED, SCALE_OF_ROW, SCALE_OF_INDEX, SCALINGS } Scaling;

typedef struct MlpOperands {
    Pair in, weight_gate_up, dout, weight_down, gate_up, scale; // gate_up: of the backward pass
    int32_t *index, *gpu_index;                                 // of scale, a permutation
    float *product, *d; // (R, 2I) in · weight_gate_upᵀ, (R, I) dout · weight_down
} MlpOperands;

static void make_products(const MlpCase *c, MlpOperands *o) {
    const int64_t hidden = c->hidden, inner = c->inner, all = c->begin[c->groups];
    o->product = (float *)malloc((size_t)(all * 2 * inner) * sizeof(float));
    o->d = (float *)malloc((size_t)(all * inner) * sizeof(float));
    for (int g = 0; g < c->groups; g++) {
        const int64_t first = c->begin[g], rows = c->begin[g + 1] - first;
        multiply_transposed(rows, 2 * inner, hidden, o->in.cpu + first * hidden,
                            o->weight_gate_up.cpu + g * 2 * inner * hidden,
                            o->product + first * 2 * inner);
        multiply(rows, inner, hidden, o->dout.cpu + first * hidden,
                 o->weight_down.cpu + g * hidden * inner, o->d + first * inner);
    }
}

// Gates and up values have a standard deviation of 1.5, so that silu is met on both sides of 0.
static MlpOperands make_mlp(Backend *gpu, const MlpCase *c) {
    const int64_t rows = c->begin[c->groups], hidden = c->hidden, inner = c->inner;
    const float unit = 1.0f / sqrtf((float)hidden);
    MlpOperands o = {};
    o.in = pair_random(gpu, DTYPE_BF16, rows * hidden, 1.0f);
    o.weight_gate_up = pair_random(gpu, DTYPE_BF16, c->groups * 2 * inner * hidden, 1.5f * unit);
    o.dout = pair_random(gpu, DTYPE_BF16, rows * hidden, 1.0f);
    o.weight_down = pair_random(gpu, DTYPE_BF16, c->groups * hidden * inner, unit);
    o.gate_up = pair_random(gpu, DTYPE_BF16, rows * 2 * inner, 1.5f);
    o.scale = pair_random(gpu, DTYPE_F32, rows, 1.0f);
    o.index = (int32_t *)calloc((size_t)rows, sizeof *o.index);
    for (int32_t r = 0; r < rows; r++) { // shuffles
        const int other = gpu_random_int(r + 1);
        o.index[r] = o.index[other];
        o.index[other] = r;
    }
    o.gpu_index = (int32_t *)gpu_copy_of(gpu, o.index, (size_t)rows * sizeof *o.index);
    make_products(c, &o);
    return o;
}

static void free_mlp(Backend *gpu, MlpOperands *o) {
    Pair *all[] = {&o->in, &o->weight_gate_up, &o->dout, &o->weight_down, &o->gate_up, &o->scale};
    for (Pair *pair : all) pair_free(pair);
    gpu->ops->release(gpu, o->gpu_index);
    free(o->index);
    free(o->product);
    free(o->d);
}

// --- Runs ---------------------------------------------------------------------------------------

typedef struct MlpRun {
    bool backward;
    Scaling scaling;
    char text[112];
} MlpRun;

typedef struct MlpOutputs {
    Pair wide, activation, dscale, partial; // wide: gate_up, or dgate_up
} MlpOutputs;

static MlpOutputs run_mlp(Backend *gpu, const MlpCase *c, const MlpOperands *o, const MlpRun *run,
                          bool activation) {
    const int64_t rows = c->begin[c->groups], inner = c->inner;
    MlpOutputs out = {};
    out.wide = pair_poisoned(gpu, DTYPE_BF16, rows * 2 * inner);
    out.activation = pair_poisoned(gpu, DTYPE_BF16, rows * inner);
    out.dscale = pair_poisoned(gpu, DTYPE_F32, rows);
    out.partial = pair_poisoned(gpu, DTYPE_F32, hopper_mlp_partials(rows, c->inner));
    HopperMlp m = {};
    m.groups = c->groups;
    m.begin = c->begin;
    m.hidden = c->hidden;
    m.inner = c->inner;
    if (run->scaling != UNSCALED) m.scale = (const float *)o->scale.gpu;
    if (run->scaling == SCALE_OF_INDEX) m.scale_index = o->gpu_index;
    if (activation) m.activation = out.activation.gpu;
    m.in = run->backward ? o->dout.gpu : o->in.gpu;
    m.weight = run->backward ? o->weight_down.gpu : o->weight_gate_up.gpu;
    m.gate_up = run->backward ? o->gate_up.gpu : out.wide.gpu;
    if (run->backward) m.dgate_up = out.wide.gpu;
    if (run->backward && m.scale) {
        m.dscale = (float *)out.dscale.gpu;
        m.partial = (float *)out.partial.gpu;
    }
    gpu_report(hopper_mlp_takes(cuda_of(gpu), &m) ? 0 : 1, 0, "%s is taken", run->text);
    GPU_OK(run->backward ? hopper_mlp_backward(cuda_of(gpu), &m)
                         : hopper_mlp_forward(cuda_of(gpu), &m));
    return out;
}

static void free_outputs(MlpOutputs *out) {
    Pair *all[] = {&out->wide, &out->activation, &out->dscale, &out->partial};
    for (Pair *pair : all) pair_free(pair);
}

static double sigmoid_of(double x) {
    return 1 / (1 + exp(-x));
}

// Where row r has its factor.
static int64_t place_of(const MlpOperands *o, Scaling scaling, int64_t r) {
    return scaling == SCALE_OF_INDEX ? o->index[r] : r;
}
static double factor_of(const MlpOperands *o, Scaling scaling, int64_t r) {
    return scaling == UNSCALED ? 1 : o->scale.cpu[place_of(o, scaling, r)];
}

// The activation is made from gate and up as they were stored.
static void check_forward(const MlpCase *c, const MlpOperands *o, const MlpRun *run,
                          MlpOutputs *out) {
    const int64_t rows = c->begin[c->groups], inner = c->inner;
    memcpy(out->wide.cpu, o->product, (size_t)out->wide.count * sizeof(float));
    pair_check_rows(&out->wide, inner, run->text, "gate_up");
    pair_adopt(&out->wide);
    for (int64_t r = 0; r < rows; r++) {
        const float *gate = out->wide.cpu + r * 2 * inner, *up = gate + inner;
        const double scale = factor_of(o, run->scaling, r);
        for (int64_t i = 0; i < inner; i++)
            out->activation.cpu[r * inner + i] =
                (float)(scale * gate[i] * sigmoid_of(gate[i]) * up[i]);
    }
    pair_check_rows(&out->activation, inner, run->text, "activation");
}

// silu'(g) = σ + silu(g)·(1 - σ).
static void check_backward(const MlpCase *c, const MlpOperands *o, const MlpRun *run,
                           MlpOutputs *out) {
    const int64_t rows = c->begin[c->groups], inner = c->inner;
    for (int64_t r = 0; r < rows; r++) {
        const float *gate = o->gate_up.cpu + r * 2 * inner, *up = gate + inner;
        const float *d = o->d + r * inner;
        float *dgate = out->wide.cpu + r * 2 * inner, *dup = dgate + inner;
        const double scale = factor_of(o, run->scaling, r);
        double dscale = 0;
        for (int64_t i = 0; i < inner; i++) {
            const double s = sigmoid_of(gate[i]), silu = gate[i] * s;
            dgate[i] = (float)(d[i] * scale * up[i] * (s + silu * (1 - s)));
            dup[i] = (float)(d[i] * scale * silu);
            out->activation.cpu[r * inner + i] = (float)(scale * silu * up[i]);
            dscale += d[i] * silu * up[i];
        }
        out->dscale.cpu[place_of(o, run->scaling, r)] = (float)dscale;
    }
    pair_check_rows(&out->wide, inner, run->text, "dgate_up");
    pair_check_rows(&out->activation, inner, run->text, "activation");
    // Sums of terms whose d was rounded to bf16.
    if (run->scaling != UNSCALED)
        pair_check(&out->dscale, gpu_tolerance(DTYPE_BF16), run->text, "dscale");
}

// Twice, and once without the activation.
static void check_mlp_run(Backend *gpu, const MlpCase *c, const MlpOperands *o, bool backward,
                          Scaling scaling) {
    static const char *const names[] = {"", ", scaled", ", scaled by index"};
    static const char *const wide[] = {"gate_up", "dgate_up"};
    static const char *const without_text[] = {"gate_up, no activation,",
                                               "dgate_up, no activation,"};
    MlpRun run = {backward, scaling, ""};
    snprintf(run.text, sizeof run.text, "%s G%d R%d H%d I%d%s", backward ? "backward" : "forward",
             c->groups, (int)c->begin[c->groups], c->hidden, c->inner, names[scaling]);
    MlpOutputs out = run_mlp(gpu, c, o, &run, true), again = run_mlp(gpu, c, o, &run, true);
    MlpOutputs without = run_mlp(gpu, c, o, &run, false);
    if (backward)
        check_backward(c, o, &run, &out);
    else
        check_forward(c, o, &run, &out);
    pair_check_same_bits(&again.wide, &out.wide, run.text, wide[backward]);
    pair_check_same_bits(&again.activation, &out.activation, run.text, "activation");
    pair_check_same_bits(&without.wide, &out.wide, run.text, without_text[backward]);
    if (backward && scaling != UNSCALED) {
        pair_check_same_bits(&again.dscale, &out.dscale, run.text, "dscale");
        pair_check_same_bits(&without.dscale, &out.dscale, run.text, "dscale, no activation,");
    }
    free_outputs(&out);
    free_outputs(&again);
    free_outputs(&without);
}

static void check_mlp(Backend *gpu, const MlpCase *c) {
    const double product = (double)c->begin[c->groups] * c->hidden * c->inner;
    if (gpu_skips(SCALINGS * 3 * (2 * product + product))) return; // of all runs
    MlpOperands o = make_mlp(gpu, c);
    for (int s = UNSCALED; s < SCALINGS; s++) {
        check_mlp_run(gpu, c, &o, false, (Scaling)s);
        check_mlp_run(gpu, c, &o, true, (Scaling)s);
    }
    free_mlp(gpu, &o);
}

int main(void) {
    Backend *gpu = gpu_backend(false);
    const int32_t one_row[] = {0, 1};
    HopperMlp any = {};
    any.groups = 1;
    any.begin = one_row;
    if (!hopper_mlp_takes(cuda_of(gpu), &any)) {
        printf("hopper_mlp: this GPU has no such kernels; skipped\n");
        return GPU_SKIP_CODE;
    }
    for (const MlpCase &c : cases) check_mlp(gpu, &c);
    backend_destroy(gpu);
    return gpu_test_result("hopper_mlp");
}
