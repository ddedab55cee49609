// Token embedding: a gather of rows, and its transpose, a scatter-add.
#include <string.h>
#include "cpu/cpu.h"

Status cpu_embed_forward(Backend *backend, const EmbedArgs *args) {
    const int64_t hidden = args->hidden_size;
    for (int64_t t = 0; t < args->tokens; t++) {
        if (args->ids[t] < 0 || args->ids[t] >= args->vocab_size)
            FAIL(STATUS_BAD_DATA,
                 "token id %d at position %lld of the micro-batch is outside the vocabulary of %d",
                 (int)args->ids[t], (long long)t, args->vocab_size);
    }
    const float *weight = args->weight;
    float *out = args->out;
#pragma omp parallel for num_threads(backend->num_threads) schedule(static)
    for (int64_t t = 0; t < args->tokens; t++)
        memcpy(out + t * hidden, weight + args->ids[t] * hidden, (size_t)hidden * sizeof(float));
    return STATUS_OK;
}

// Thread w adds the tokens whose id is w modulo the team, in token order: no row has two writers,
// and neighbouring ids, which are often alike in frequency, go to different threads.
Status cpu_embed_backward(Backend *backend, const EmbedArgs *args) {
    const int64_t hidden = args->hidden_size;
    const int threads = backend->num_threads;
    const float *dout = args->dout;
    float *grad = args->grad_weight;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int w = 0; w < threads; w++) {
        for (int64_t t = 0; t < args->tokens; t++) {
            const int32_t id = args->ids[t];
            if (id % threads != w) continue;
            const float *from = dout + t * hidden;
            float *to = grad + id * hidden;
#pragma omp simd
            for (int64_t h = 0; h < hidden; h++) to[h] += from[h];
        }
    }
    return STATUS_OK;
}
