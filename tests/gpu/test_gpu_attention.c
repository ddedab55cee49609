// Attention on the GPU against the CPU backend: fp32 and bf16, with and without documents, head
// sizes of every kernel, sequence lengths around the tile sizes.
#include "tests/gpu/gpu_test.h"

enum Documents { NONE = 0, ONE = -1 }; // else: the average length of random documents

typedef struct Shape {
    int batch, length, heads, kv_heads, head_dim, documents;
} Shape;

// ONE: a mask that hides nothing, which takes the own kernels where NONE would take cuDNN.
static int32_t *make_documents(const Shape *s) {
    if (s->documents == NONE) return NULL;
    int32_t *start = (int32_t *)calloc((size_t)(s->batch * s->length), sizeof *start);
    for (int b = 0; b < s->batch && s->documents != ONE; b++) {
        for (int i = 1; i < s->length; i++) {
            bool begins = gpu_random_int(s->documents) == 0;
            start[b * s->length + i] = begins ? i : start[b * s->length + i - 1];
        }
    }
    return start;
}

typedef struct Operands {
    Pair qkv, out, log_sum_exp, dout, dqkv;
    int32_t *documents, *gpu_documents;
} Operands;

static AttentionArgs args_of(const Shape *s, const Operands *o, bool gpu) {
    return (AttentionArgs){.batch = s->batch,
                           .sequence_length = s->length,
                           .num_heads = s->heads,
                           .num_kv_heads = s->kv_heads,
                           .head_dim = s->head_dim,
                           .qkv = gpu ? o->qkv.gpu : o->qkv.cpu,
                           .document_start = gpu ? o->gpu_documents : o->documents,
                           .out = gpu ? o->out.gpu : o->out.cpu,
                           .log_sum_exp = (float *)(gpu ? o->log_sum_exp.gpu : o->log_sum_exp.cpu),
                           .dout = gpu ? o->dout.gpu : o->dout.cpu,
                           .dqkv = gpu ? o->dqkv.gpu : o->dqkv.cpu};
}

// dq, dk and dv apart: an error in the small one must not hide behind the large one.
static void check_gradient(const Shape *s, const Pair *dqkv, double tolerance, const char *text) {
    const int ends[4] = {0, s->heads * s->head_dim, (s->heads + s->kv_heads) * s->head_dim,
                         (s->heads + 2 * s->kv_heads) * s->head_dim};
    const char *const names[3] = {"dq", "dk", "dv"};
    float *got = pair_download(dqkv);
    for (int part = 0; part < 3; part++) {
        double difference = 0, size = 0;
        for (int64_t i = 0; i < dqkv->count; i++) {
            int64_t column = i % ends[3];
            if (column < ends[part] || column >= ends[part + 1]) continue;
            double d = (double)got[i] - dqkv->cpu[i];
            difference += d * d;
            size += (double)dqkv->cpu[i] * dqkv->cpu[i];
        }
        // A document of one token has dq = dk = 0, which rounding turns into 1e-7: such noise is
        // measured against the size of dout, about 1 per element.
        size = fmax(size, 1e-4 * (double)dqkv->count);
        gpu_report(isfinite(difference) ? sqrt(difference / size) : INFINITY, tolerance, "%s %s",
                   text, names[part]);
    }
    free(got);
}

static void check_shape(Backend *gpu, const Shape *s) {
    if (gpu_skips((double)s->batch * s->heads * s->length * s->length * s->head_dim)) return;
    const DType dtype = gpu->compute_dtype;
    const double tolerance = gpu_tolerance(dtype);
    const int64_t tokens = (int64_t)s->batch * s->length;
    const int64_t width = (int64_t)(s->heads + 2 * s->kv_heads) * s->head_dim;
    char text[128];
    snprintf(text, sizeof text, "%s attention B%d S%d heads %d/%d x %d documents %d",
             dtype_name(dtype), s->batch, s->length, s->heads, s->kv_heads, s->head_dim,
             s->documents);
    Operands o = {.qkv = pair_random(gpu, dtype, tokens * width, 1.0f),
                  .out = pair_poisoned(gpu, dtype, tokens * s->heads * s->head_dim),
                  .log_sum_exp = pair_poisoned(gpu, DTYPE_F32, tokens * s->heads),
                  .dout = pair_random(gpu, dtype, tokens * s->heads * s->head_dim, 1.0f),
                  .dqkv = pair_poisoned(gpu, dtype, tokens * width),
                  .documents = make_documents(s)};
    o.gpu_documents =
        (int32_t *)gpu_copy_of(gpu, o.documents, (size_t)tokens * sizeof *o.documents);
    AttentionArgs cpu_args = args_of(s, &o, false), gpu_args = args_of(s, &o, true);
    GPU_RUN(gpu_reference(), OP_ATTENTION, attention_forward, &cpu_args);
    GPU_RUN(gpu, OP_ATTENTION, attention_forward, &gpu_args);
    pair_check(&o.out, tolerance, text, "out");
    pair_check(&o.log_sum_exp, tolerance, text, "log_sum_exp");
    GPU_RUN(gpu_reference(), OP_ATTENTION, attention_backward, &cpu_args);
    GPU_RUN(gpu, OP_ATTENTION, attention_backward, &gpu_args);
    check_gradient(s, &o.dqkv, tolerance, text);

    Pair again = pair_poisoned(gpu, dtype, tokens * width);
    gpu_args.dqkv = again.gpu;
    GPU_RUN(gpu, OP_ATTENTION, attention_backward, &gpu_args);
    pair_check_same_bits(&again, &o.dqkv, text, "dqkv");

    Pair *all[] = {&o.qkv, &o.out, &o.log_sum_exp, &o.dout, &o.dqkv, &again};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) pair_free(all[i]);
    if (o.gpu_documents) gpu->ops->release(gpu, o.gpu_documents);
    free(o.documents);
}

static const Shape bf16_shapes[] = {
    {1, 1, 1, 1, 64, NONE},    {2, 1, 2, 1, 64, ONE},     {2, 64, 2, 1, 64, NONE},
    {2, 64, 2, 1, 64, ONE},    {1, 127, 14, 2, 64, NONE}, {1, 127, 14, 2, 64, ONE},
    {3, 300, 4, 2, 64, NONE},  {3, 300, 4, 2, 64, 40},    {2, 1024, 14, 2, 64, NONE},
    {2, 1024, 14, 2, 64, ONE}, {2, 1024, 14, 2, 64, 150}, {1, 129, 3, 3, 128, NONE},
    {1, 129, 3, 3, 128, ONE},  {2, 700, 8, 2, 128, NONE}, {2, 700, 8, 2, 128, 90},
    {1, 200, 2, 1, 128, 1},    {2, 90, 2, 1, 40, 25},     {1, 150, 6, 3, 96, NONE},
    {1, 150, 6, 3, 96, ONE},   {1, 50, 2, 1, 20, 9},      {1, 70, 2, 1, 256, ONE},
    {1, 2100, 2, 1, 64, 1000},
};
static const Shape f32_shapes[] = {
    {1, 1, 1, 1, 2, NONE},     {2, 3, 2, 1, 5, NONE},     {1, 31, 4, 2, 16, NONE},
    {2, 33, 3, 3, 8, 7},       {1, 200, 6, 2, 64, NONE},  {1, 200, 6, 2, 64, 1},
    {2, 515, 4, 1, 64, 100},   {1, 130, 2, 1, 128, NONE}, {1, 130, 2, 1, 96, 30},
    {1, 100, 2, 1, 256, NONE}, {1, 100, 2, 1, 200, 20},
};

int main(void) {
    Backend *bf16 = gpu_backend(false), *f32 = gpu_backend(true);
    for (size_t i = 0; i < sizeof f32_shapes / sizeof f32_shapes[0]; i++)
        check_shape(f32, &f32_shapes[i]);
    for (size_t i = 0; i < sizeof bf16_shapes / sizeof bf16_shapes[0]; i++)
        check_shape(bf16, &bf16_shapes[i]);
    backend_destroy(bf16);
    backend_destroy(f32);
    return gpu_test_result("attention");
}
