// The LM head's product with softmax inside, of Hopper chips, against sums in double precision.
//
// The op that uses it has a test of its own, in which other products are cuBLAS's. Here nothing
// calls cuBLAS, whose bf16 kernels stop compute-sanitizer's racecheck, so that it sees ours. Every
// run begins with poisoned outputs and scratch, and a second one must give the same bits.
#include "cuda/hopper_loss.h"
extern "C" {
#include "tests/gpu/gpu_hopper.h"
}

// --- Operands -----------------------------------------------------------------------------------

typedef struct LossCase {
    int64_t rows;
    int hidden, vocab;
    int ignored; // of 100 targets
    bool far;    // most rows have logits that are far above their target's
} LossCase;

// The last two have 68 and 90 tiles of 256 rows and 256 columns, more than an H200 has clusters,
// which is 66, so that these go from tile to tile. The last one's rows make two bands.
static const LossCase cases[] = {
    {1, 64, 257, 0, false},      {33, 128, 40, 0, false},   {257, 192, 1003, 10, false},
    {100, 64, 517, 100, false},  {300, 64, 1003, 10, true}, {257, 64, 8449, 10, true},
    {4400, 128, 1027, 5, false},
};

typedef struct LossOperands {
    Pair x, weight;
    int32_t *targets, *gpu_targets;
    float *logits; // (R, V)
    int64_t stride;
    float grad_scale;
} LossOperands;

static void fill_signs(Pair *pair, float size) {
    for (int64_t i = 0; i < pair->count; i++) pair->cpu[i] = gpu_random_int(2) ? size : -size;
    pair_upload(pair);
}

// Logits have a standard deviation of 1. Where they are to be far apart it is 2 in the first 100
// rows and 32 in the others: there are warps without a row beyond what fp32 holds, and one with
// both kinds. bf16 has all of these logits, multiples of 1/2 up to 16 and of 8 up to 256, so that
// no rounding decides between kernel and reference.
static void fill_operands(const LossCase *c, LossOperands *o) {
    if (!c->far) return;
    fill_signs(&o->x, 4.0f);
    fill_signs(&o->weight, 1.0f);
    for (int i = 0; i < 100 * c->hidden; i++) o->x.cpu[i] /= 16;
    pair_upload(&o->x);
}

// Rounded to bf16 as the kernel's are, which then differ only in the rare case that a sum in fp32
// falls on the other side of the middle between two values.
static void make_logits(const LossCase *c, LossOperands *o) {
    const size_t count = (size_t)(c->rows * c->vocab);
    void *rounded = malloc(count * dtype_bytes(DTYPE_BF16));
    o->logits = (float *)malloc(count * sizeof(float));
    multiply_transposed(c->rows, c->vocab, c->hidden, o->x.cpu, o->weight.cpu, o->logits);
    dtype_from_f32(DTYPE_BF16, o->logits, rounded, count);
    dtype_to_f32(DTYPE_BF16, rounded, o->logits, count);
    free(rounded);
}

static LossOperands make_loss(Backend *gpu, const LossCase *c) {
    const int64_t hidden = c->hidden;
    LossOperands o = {};
    o.x = pair_random(gpu, DTYPE_BF16, c->rows * hidden, 1.0f);
    o.weight = pair_random(gpu, DTYPE_BF16, c->vocab * hidden, 1.0f / sqrtf((float)hidden));
    o.targets = (int32_t *)malloc((size_t)c->rows * sizeof *o.targets);
    for (int64_t r = 0; r < c->rows; r++)
        o.targets[r] = gpu_random_int(100) < c->ignored ? -1 : gpu_random_int(c->vocab);
    o.targets[c->rows - 1] = c->ignored < 100 ? c->vocab - 1 : -1;
    o.gpu_targets = (int32_t *)gpu_copy_of(gpu, o.targets, (size_t)c->rows * sizeof *o.targets);
    o.stride = (c->vocab + 7) / 8 * 8; // the least: a piece too many would lie in the next row
    o.grad_scale = 1.0f / (float)c->rows;
    fill_operands(c, &o);
    make_logits(c, &o);
    return o;
}

static void free_loss(Backend *gpu, LossOperands *o) {
    pair_free(&o->x);
    pair_free(&o->weight);
    gpu->ops->release(gpu, o->gpu_targets);
    free(o->targets);
    free(o->logits);
}

// --- Runs ---------------------------------------------------------------------------------------

typedef struct LossOutputs {
    Pair losses, gradient, x_scaled, factor, scratch;
} LossOutputs;

static LossOutputs run_loss(Backend *gpu, const LossCase *c, const LossOperands *o, bool gradient) {
    const int64_t scratch_floats =
        (int64_t)(hopper_loss_scratch(c->rows, c->vocab) / sizeof(float));
    LossOutputs out = {};
    out.losses = pair_poisoned(gpu, DTYPE_F32, c->rows);
    out.gradient = pair_poisoned(gpu, DTYPE_BF16, c->rows * o->stride);
    out.x_scaled = pair_poisoned(gpu, DTYPE_BF16, c->rows * c->hidden);
    out.factor = pair_poisoned(gpu, DTYPE_F32, c->rows);
    out.scratch = pair_poisoned(gpu, DTYPE_F32, scratch_floats);
    HopperLoss loss = {};
    loss.rows = c->rows;
    loss.hidden = c->hidden;
    loss.vocab = c->vocab;
    loss.x = o->x.gpu;
    loss.weight = o->weight.gpu;
    loss.targets = o->gpu_targets;
    loss.grad_scale = o->grad_scale;
    loss.losses = (float *)out.losses.gpu;
    loss.stride = o->stride;
    loss.scratch = out.scratch.gpu;
    if (gradient) {
        loss.gradient = out.gradient.gpu;
        loss.x_scaled = out.x_scaled.gpu;
        loss.factor = (float *)out.factor.gpu;
    }
    GPU_OK(hopper_loss(cuda_of(gpu), &loss));
    return out;
}

static void free_outputs(LossOutputs *out) {
    Pair *all[] = {&out->losses, &out->gradient, &out->x_scaled, &out->factor, &out->scratch};
    for (Pair *pair : all) pair_free(pair);
}

// The logits' gradient s·(softmax - [target]), the target's elements (R) apart from the others
// (R, V), beside which they are so large that the others' errors would not show. Which multiple of
// it `gradient` holds is the kernel's affair: times `factor` it must be this.
typedef struct LogitGradient {
    float *others, *of_target;
} LogitGradient;

static LogitGradient make_gradient(const LossCase *c) {
    return LogitGradient{(float *)calloc((size_t)(c->rows * c->vocab), sizeof(float)),
                         (float *)calloc((size_t)c->rows, sizeof(float))};
}
static void free_gradient(LogitGradient *g) {
    free(g->others);
    free(g->of_target);
}

// And the losses. Returns how many rows have a logit so far above the target's that the kernel must
// take another reference for them.
static int make_reference(const LossCase *c, const LossOperands *o, float *losses,
                          LogitGradient *g) {
    int far = 0;
    for (int64_t r = 0; r < c->rows; r++) {
        const float *logits = o->logits + r * c->vocab;
        const int target = o->targets[r];
        double highest = -INFINITY, sum = 0;
        losses[r] = 0;
        if (target < 0) continue;
        for (int v = 0; v < c->vocab; v++) highest = fmax(highest, logits[v]);
        for (int v = 0; v < c->vocab; v++) sum += exp(logits[v] - highest);
        losses[r] = (float)(log(sum) + highest - logits[target]);
        for (int v = 0; v < c->vocab; v++)
            g->others[r * c->vocab + v] = (float)(o->grad_scale * exp(logits[v] - highest) / sum);
        g->others[r * c->vocab + target] = 0;
        g->of_target[r] = (float)(o->grad_scale * (exp(logits[target] - highest) / sum - 1));
        far += (highest - logits[target]) / log(2.0) > HOPPER_LOSS_LOG2;
    }
    return far;
}

// The kernel's; a row whose target is ignored must be zeros without a factor, too.
static void take_gradient(const LossCase *c, const LossOperands *o, const LossOutputs *out,
                          LogitGradient *g) {
    float *gradient = pair_download(&out->gradient), *factor = pair_download(&out->factor);
    for (int64_t r = 0; r < c->rows; r++) {
        const int target = o->targets[r];
        float *others = g->others + r * c->vocab;
        const float f = target < 0 ? 1.0f : factor[r];
        for (int v = 0; v < c->vocab; v++) others[v] = gradient[r * o->stride + v] * f;
        if (target < 0) continue;
        g->of_target[r] = others[target];
        others[target] = 0;
    }
    free(gradient);
    free(factor);
}

static void check_gradient(const LossCase *c, const LossOperands *o, LossOutputs *out,
                           const char *text) {
    LogitGradient got = make_gradient(c), expected = make_gradient(c);
    const int far = make_reference(c, o, out->losses.cpu, &expected);
    take_gradient(c, o, out, &got);
    gpu_report(c->far ? far == 0 : far, 0, "%s has %d rows that need the second product", text,
               far);
    // In fp32 from the same logits. One rounded to the other side moves a loss by less than 1 %,
    // and there are few.
    pair_check(&out->losses, 1e-3, text, "losses");
    check_rows(got.others, expected.others, c->rows * c->vocab, c->vocab, text, "gradient");
    gpu_report(gpu_error_of(got.of_target, expected.of_target, c->rows), gpu_tolerance(DTYPE_BF16),
               "%s gradient of the targets", text);
    free_gradient(&got);
    free_gradient(&expected);
}

// x and a product in fp32, times the factor.
static void check_scaled(Backend *gpu, const LossCase *c, const LossOperands *o, LossOutputs *out,
                         const char *text) {
    const int64_t hidden = c->hidden;
    Pair product = pair_random(gpu, DTYPE_F32, c->rows * hidden, 1.0f);
    Pair dx = pair_poisoned(gpu, DTYPE_BF16, c->rows * hidden);
    Pair again = pair_poisoned(gpu, DTYPE_BF16, c->rows * hidden), *results[] = {&dx, &again};
    for (Pair *to : results)
        GPU_OK(hopper_loss_dx(cuda_of(gpu), c->rows, c->hidden, (const float *)product.gpu,
                              (const float *)out->factor.gpu, to->gpu));
    pair_adopt(&out->factor);
    for (int64_t i = 0; i < c->rows * hidden; i++) {
        const int64_t r = i / hidden;
        const float factor = o->targets[r] < 0 ? 0.0f : out->factor.cpu[r];
        out->x_scaled.cpu[i] = o->x.cpu[i] * factor;
        dx.cpu[i] = product.cpu[i] * factor;
    }
    pair_check_rows(&out->x_scaled, hidden, text, "x_scaled");
    pair_check_rows(&dx, hidden, text, "dx");
    pair_check_same_bits(&again, &dx, text, "dx");
    Pair *all[] = {&product, &dx, &again};
    for (Pair *pair : all) pair_free(pair);
}

// Twice, and once for the losses alone. Padding of a row of the gradient holds anything.
static void check_loss(Backend *gpu, const LossCase *c) {
    if (gpu_skips((double)c->rows * c->hidden * c->vocab * 3 * (c->far ? 2 : 1))) return;
    char text[112];
    snprintf(text, sizeof text, "loss R%d H%d V%d ignored %d%%%s", (int)c->rows, c->hidden,
             c->vocab, c->ignored, c->far ? ", far" : "");
    LossOperands o = make_loss(gpu, c);
    const bool takes =
        hopper_loss_takes(cuda_of(gpu), c->hidden, c->vocab, o.x.gpu, o.weight.gpu, NULL);
    gpu_report(takes ? 0 : 1, 0, "%s is taken", text);
    LossOutputs out = run_loss(gpu, c, &o, true), again = run_loss(gpu, c, &o, true);
    LossOutputs alone = run_loss(gpu, c, &o, false);
    check_gradient(c, &o, &out, text);
    check_scaled(gpu, c, &o, &out, text);
    pair_check_same_bits(&again.losses, &out.losses, text, "losses");
    pair_check_same_bits(&again.gradient, &out.gradient, text, "gradient");
    pair_check_same_bits(&again.x_scaled, &out.x_scaled, text, "x_scaled");
    pair_check_same_bits(&again.factor, &out.factor, text, "factor");
    pair_check_same_bits(&alone.losses, &out.losses, text, "losses alone");
    free_outputs(&out);
    free_outputs(&again);
    free_outputs(&alone);
    free_loss(gpu, &o);
}

int main(void) {
    Backend *gpu = gpu_backend(false);
    if (!hopper_loss_runs(cuda_of(gpu))) {
        printf("hopper_loss: this GPU has no such kernels; skipped\n");
        return GPU_SKIP_CODE;
    }
    for (const LossCase &c : cases) check_loss(gpu, &c);
    backend_destroy(gpu);
    return gpu_test_result("hopper_loss");
}
