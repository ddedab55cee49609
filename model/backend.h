// The backend contract: everything the model asks of a machine.
//
// A Backend is memory, a compute stream in which operations run in order, and the ops below. The
// CPU backend (cpu/) is the reference in fp32; a GPU backend stores weights and activations in
// bf16. model/ and optim/ call only this header; a backend knows nothing of models, recipes or
// files.
//
// Conventions, valid for every op:
//  - T tokens, H hidden size, I intermediate size, V vocabulary, N experts, k experts per token,
//    B sequences of S tokens (T = B*S). All matrices are row-major and packed.
//  - `void *` operands have the backend's compute_dtype, except weight gradients (names starting
//    with `grad_`), which have its grad_dtype. `float *`, `int32_t *` and `double *` are as
//    written.
//  - Weight gradients ACCUMULATE (+=), those of matrices are ASSIGNED (=) when the args say
//    grad_assign (and there is a token, moe_ffn apart): the first micro-batch of a step then needs
//    no zeros to add to. Activation gradients (names starting with `d`) are ASSIGNED unless a
//    comment says otherwise.
//  - Forward and backward of an op take the same argument struct. Forward ignores the gradient
//    members; backward reads the inputs and what the struct calls saved.
//  - No operand aliases another unless the comment allows it.
//  - Results are deterministic for a fixed backend configuration (thread count, device): no float
//    atomics, fixed reduction order. Reductions over tokens accumulate in double on the CPU.
//  - Ops use the workspace set by set_workspace(); workspace_bytes() says how much an op needs for
//    the shape members of its args, forward and backward (pointers are ignored: the answer covers
//    every optional operand). It never shrinks as a shape member grows. The args of OP_NORM2 are
//    a const int64_t *count.
#ifndef MODEL_BACKEND_H
#define MODEL_BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "base/dtype.h"
#include "base/status.h"

typedef struct Backend Backend;

// --- Argument structs -----------------------------------------------------------------------

// out[t] = weight[ids[t]]. Backward: grad_weight[ids[t]] += dout[t], summed in token order.
// An id outside [0, vocab_size) is STATUS_BAD_DATA naming id and position, never a read.
typedef struct EmbedArgs {
    int64_t tokens;
    int hidden_size, vocab_size;
    const int32_t *ids; // (T)
    const void *weight; // (V, H)
    void *out;          // (T, H)
    const void *dout;   // (T, H)
    void *grad_weight;  // (V, H)
} EmbedArgs;

// x_out = x + y (y may be NULL, x_out may alias x); out = x_out / rms(x_out) * weight,
// rms(x) = sqrt(mean(x^2) + epsilon). Zhang & Sennrich 2019.
// Backward: dx holds the gradient that reaches x_out from later on entry, and the gradient of x
// (and equally of y) on exit: dx += RMSNorm'(dout). Reads x_out and inv_rms.
typedef struct RmsNormArgs {
    int64_t tokens;
    int hidden_size;
    float epsilon;
    const void *x;      // (T, H)
    const void *y;      // (T, H) or NULL
    const void *weight; // (H)
    void *x_out;        // (T, H) saved
    void *out;          // (T, H)
    float *inv_rms;     // (T) saved
    const void *dout;   // (T, H)
    void *dx;           // (T, H) in and out
    void *grad_weight;  // (H)
} RmsNormArgs;

// out = x · weightᵀ + bias. Backward: dx = dout · weight (skipped when dx is NULL; added when
// dx_accumulate), grad_weight += doutᵀ · x, grad_bias += column sums of dout. Reads x.
typedef struct LinearArgs {
    int64_t tokens;
    int in_features, out_features;
    const void *x;      // (T, in)
    const void *weight; // (out, in)
    const void *bias;   // (out) or NULL
    void *out;          // (T, out)
    const void *dout;   // (T, out)
    void *dx;           // (T, in) or NULL
    bool dx_accumulate;
    bool grad_assign;  // grad_weight =; grad_bias += as always
    void *grad_weight; // (out, in)
    void *grad_bias;   // (out), NULL when bias is NULL
} LinearArgs;

// Rotary position embedding (Su et al. 2021) in the half-split form of Hugging Face's Llama and
// Qwen: pairs are (i, i + head_dim/2), angle = position * theta^(-2i/head_dim), position = t mod S.
// With q_norm/k_norm (Qwen3) each head of q and k first passes an RMSNorm over head_dim.
// The packed row is [q heads | k heads | v heads]; v is copied unchanged.
// out may alias qkv when q_norm is NULL. Backward turns dout (may alias dqkv) into dqkv; with
// q_norm it reads qkv and inv_rms and accumulates the norm weights' gradients.
typedef struct RopeArgs {
    int64_t batch, sequence_length;
    int num_heads, num_kv_heads, head_dim;
    double theta;
    float epsilon;
    const void *qkv;    // (B, S, (num_heads + 2 num_kv_heads) * head_dim); saved with q_norm
    const void *q_norm; // (head_dim) or NULL
    const void *k_norm; // (head_dim) or NULL
    void *out;          // as qkv
    float *inv_rms;     // (B, S, num_heads + num_kv_heads) saved; unused without q_norm
    const void *dout;   // as qkv
    void *dqkv;         // as qkv
    void *grad_q_norm, *grad_k_norm; // (head_dim)
} RopeArgs;

// Causal grouped-query attention, softmax(q·kᵀ / sqrt(head_dim))·v, in tiles: the S×S matrix never
// exists (Dao et al. 2022). With document_start, token s attends to positions
// document_start[s] <= j <= s only. Backward reads qkv, out and log_sum_exp.
typedef struct AttentionArgs {
    int64_t batch, sequence_length;
    int num_heads, num_kv_heads, head_dim;
    const void *qkv;               // (B, S, (num_heads + 2 num_kv_heads) * head_dim) saved
    const int32_t *document_start; // (B, S) or NULL; 0 <= document_start[s] <= s, non-decreasing
    void *out;                     // (B, S, num_heads * head_dim) saved
    float *log_sum_exp;            // (B, num_heads, S) saved
    const void *dout;              // as out
    void *dqkv;                    // as qkv
} AttentionArgs;

// Dense SwiGLU MLP: out = (silu(x·gateᵀ) * (x·upᵀ)) · downᵀ (Shazeer 2020).
// Backward reads x, gate_up and, when not NULL, activation (else it is recomputed). Forward with
// out NULL computes only what backward reads (recompute of a whole layer).
typedef struct FfnArgs {
    int64_t tokens;
    int hidden_size, intermediate_size;
    const void *x;              // (T, H)
    const void *weight_gate_up; // (2I, H): gate rows, then up rows
    const void *weight_down;    // (H, I)
    void *out;                  // (T, H) or NULL
    void *gate_up;              // (T, 2I) saved: gate columns, then up columns
    void *activation;           // (T, I) saved, or NULL: workspace, recomputed in backward
    const void *dout;           // (T, H)
    void *dx;                   // (T, H)
    bool grad_assign;           // both gradients =
    void *grad_gate_up;         // (2I, H)
    void *grad_down;            // (H, I)
} FfnArgs;

// How router probabilities become gates (METHOD.md §4).
typedef enum RouterGate { GATE_SOFTMAX, GATE_RENORM, GATE_STRAIGHT_THROUGH } RouterGate;

// The routing of one layer, filled by route_forward and read by moe_ffn and router_loss.
// Assignment (t, j), j < k, is "slot" t*k + j; grouped buffers hold slots sorted by expert, stable
// in t ("row"). Ties in the probability go to the lower expert index.
typedef struct Routing {
    float *probabilities;  // (T, N) softmax over all experts
    float *log_sum_exp;    // (T) of the logits, for the z-loss and the backward
    int32_t *expert;       // (T, k), by falling probability (+ selection_bias when present)
    float *gate;           // (T, k) the value that multiplies the expert's output
    int32_t *slot_of_row;  // (T*k)
    int32_t *row_of_slot;  // (T*k)
    int32_t *expert_begin; // (N+1): rows of expert e are [expert_begin[e], expert_begin[e+1])
} Routing;

// logits = x · weightᵀ in fp32; softmax; top-k; gates; grouping. gate_scale multiplies every gate.
// Backward takes dgate (T, k) and adds the router losses' gradients in the same pass:
//   dL/dp[t,i]      += balance_scale * load[i]     (balance: balance_scale = α·N/T_total,
//                                                   load[i] = f_i, a constant; load NULL: f_i of
//                                                   this call, rows of expert i / (T·k))
//   dL/dlogit[t,i]  += z_scale * 2 * lse[t] * p[t,i]   (z-loss: z_scale = ζ/T_total)
// dx is ACCUMULATED (moe_ffn_backward has assigned it); grad_weight accumulates.
typedef struct RouteArgs {
    int64_t tokens;
    int hidden_size, num_experts, top_k;
    RouterGate gate_kind;
    float gate_scale;
    const void *x;               // (T, H)
    const float *weight;         // (N, H), fp32 on every backend
    const float *selection_bias; // (N) or NULL: added to p for the choice only
    Routing routing;
    const float *dgate; // (T, k)
    float balance_scale, z_scale;
    const float *load;  // (N), or NULL: the load of this very routing
    void *dx;           // (T, H) in and out
    float *grad_weight; // (N, H), fp32 on every backend
} RouteArgs;

// Sums over the tokens of one layer, accumulated across micro-batches for the loss report and the
// global balance statistics. All double, so that counts stay exact.
typedef struct RouterSums {
    double *assignments; // (N) += rows of each expert
    double *probability; // (N) += Σ_t p[t,i]
    double *entropy;     // (1) += Σ_t -Σ_i p ln p
    double *z;           // (1) += Σ_t lse²
} RouterSums;

typedef struct RouterLossArgs {
    int64_t tokens;
    int num_experts, top_k;
    Routing routing;
    RouterSums sums;
} RouterLossArgs;

// The expert MLPs, dropless: every assignment is computed, none is padded.
//   out[t] = Σ_j gate[t,j] · MLP_expert[t,j](x[t])
// Backward reads x, routing and gate_up (activations are recomputed); assigns dx and dgate.
// Forward with out NULL computes only gate_up. Experts may be without rows, all of them with
// tokens = 0: a rank's share of the experts can be what no token chose.
typedef struct MoeFfnArgs {
    int64_t tokens;
    int hidden_size, intermediate_size, num_experts, top_k;
    const void *x;              // (T, H)
    const void *weight_gate_up; // (N, 2I, H)
    const void *weight_down;    // (N, H, I)
    Routing routing;
    void *out;          // (T, H) or NULL
    void *gate_up;      // (T*k, 2I) saved, grouped by expert
    const void *dout;   // (T, H)
    void *dx;           // (T, H)
    float *dgate;       // (T, k)
    bool grad_assign;   // both gradients =, zero for an expert without rows
    void *grad_gate_up; // (N, 2I, H)
    void *grad_down;    // (N, H, I)
} MoeFfnArgs;

// Rows of a matrix by an index: out[r] = in[index[r] / divisor], r < rows. Bytes are copied as they
// are. With slot_of_row and divisor k it takes tokens to rows by expert, with divisor 1 what
// belongs to the slots, as gates do. rows may be 0.
typedef struct GatherRowsArgs {
    int64_t rows;
    int64_t row_bytes;    // a multiple of 4, of every row of in and out
    int divisor;          // >= 1
    const int32_t *index; // (rows)
    const void *in;       // rows of row_bytes
    void *out;            // (rows) of row_bytes
} GatherRowsArgs;

// The way back: out[t] = Σ_j rows[row_of_slot[t*k + j]], j < k, summed in fp32 in the order of j
// and rounded once. tokens may be 0.
typedef struct CombineRowsArgs {
    int64_t tokens;
    int hidden_size, top_k;
    const int32_t *row_of_slot; // (T*k)
    const void *rows;           // (T*k, H)
    void *out;                  // (T, H)
} CombineRowsArgs;

// Final linear + softmax + cross-entropy, in chunks of tokens: the T×V logits never exist whole.
//   loss_sum += Σ_t -log softmax(x·weightᵀ)[t, targets[t]] over targets >= 0; loss_count += their
// number. When grad_weight is not NULL also dx = grad_scale · ∂Σ/∂x and grad_weight += ... in the
// same pass (the logits are gone afterwards). Target -1 is ignored (zero gradient).
typedef struct LinearCrossEntropyArgs {
    int64_t tokens;
    int hidden_size, vocab_size;
    int64_t chunk_tokens;   // most rows of logits at once; <= 0: backend's choice
    const void *x;          // (T, H)
    const void *weight;     // (V, H)
    const int32_t *targets; // (T), -1 = ignored
    float grad_scale;
    double *loss_sum;   // (1) accumulated
    double *loss_count; // (1) accumulated
    float *token_loss;  // (T) or NULL: per-token loss, 0 where ignored
    void *dx;           // (T, H) or NULL
    bool grad_assign;   // grad_weight =
    void *grad_weight;  // (V, H) or NULL
} LinearCrossEntropyArgs;

// Decoupled weight decay (Loshchilov & Hutter 2019) on a flat slice. With g' = grad_scale·g:
//   m = β1·m + (1-β1)·g';  v = β2·v + (1-β2)·g'²;
//   p -= lr · ( (m/(1-β1^step)) / (sqrt(v/(1-β2^step)) + ε) + weight_decay·p )
// and, when copy is not NULL, copy = cast(p). Arithmetic is fp32; p moves by the new m and v as
// computed, and what is kept of them is rounded to state_dtype, to nearest even.
typedef struct AdamwArgs {
    int64_t count;
    float *master;     // (count)
    const void *grad;  // (count) of grad_dtype
    DType grad_dtype;  // the backend's, or F32 for the routers' gradients
    void *m, *v;       // (count) of state_dtype
    DType state_dtype; // F32 or BF16
    void *copy;        // (count) of copy_dtype, or NULL
    DType copy_dtype;
    double learning_rate, beta1, beta2, epsilon, weight_decay, grad_scale;
    int64_t step; // 1 for the first update
} AdamwArgs;

// Row-wise comparison of two activations, summed over rows in double (METHOD.md §2):
//   sums[0] += Σ_t cos(a_t, b_t);  sums[1] += Σ_t |‖a_t‖ - ‖b_t‖| / ‖b_t‖
// A zero row counts as cos 0 (and ratio 0 where both are zero).
typedef struct RowSimilarityArgs {
    int64_t tokens;
    int hidden_size;
    const void *a, *b; // (T, H)
    double *sums;      // (2) accumulated
} RowSimilarityArgs;

typedef enum OpKind {
    OP_EMBED,
    OP_RMSNORM,
    OP_LINEAR,
    OP_ROPE,
    OP_ATTENTION,
    OP_FFN,
    OP_ROUTE,
    OP_ROUTER_LOSS,
    OP_MOE_FFN,
    OP_LINEAR_CROSS_ENTROPY,
    OP_ADAMW,
    OP_NORM2,
    OP_ROW_SIMILARITY,
    OP_GATHER_ROWS,
    OP_COMBINE_ROWS,
    OP_KIND_COUNT
} OpKind;

// --- The table ------------------------------------------------------------------------------

typedef struct BackendOps {
    // Memory. alloc gives zeroed device memory aligned to 256 bytes; the host may read and write
    // it only through the copies (the CPU backend's is ordinary memory, but nobody relies on it).
    // host_alloc gives zeroed page-locked memory where the device profits from it.
    Status (*alloc)(Backend *, size_t bytes, void **out) NODISCARD;
    void (*release)(Backend *, void *pointer);
    Status (*host_alloc)(Backend *, size_t bytes, void **out) NODISCARD;
    void (*host_release)(Backend *, void *pointer);
    // Ordered on the compute stream. upload and download return when the host side may be reused.
    Status (*upload)(Backend *, void *device, const void *host, size_t bytes) NODISCARD;
    Status (*download)(Backend *, void *host, const void *device, size_t bytes) NODISCARD;
    Status (*copy)(Backend *, void *to, const void *from, size_t bytes) NODISCARD;
    Status (*zero)(Backend *, void *device, size_t bytes) NODISCARD;
    // Waits. Reports errors of anything before it, as download does.
    Status (*synchronize)(Backend *) NODISCARD;
    // Device memory that is free now, and all of it; both 0 where it is the machine's own memory.
    Status (*memory)(Backend *, uint64_t *free_bytes, uint64_t *total_bytes) NODISCARD;

    // Where Backend.can_capture (else NULL): ops between capture_begin and capture_end are recorded
    // instead of run, with the arguments they have now, and graph_launch runs them all. Nothing in
    // between may wait, copy from or to the host, or be a sequence that has not run before. `keep`
    // false gives up a recording; *out is NULL then.
    Status (*capture_begin)(Backend *) NODISCARD;
    Status (*capture_end)(Backend *, bool keep, void **out) NODISCARD;
    Status (*graph_launch)(Backend *, void *graph) NODISCARD;
    void (*graph_release)(Backend *, void *graph);
    // Time. timestamp notes in slot 0, 1, ... when the compute stream gets there, without waiting
    // for it; the backend grows its slots to the largest number asked for. elapsed_ms is the time
    // between two slots that have been noted, after synchronize.
    Status (*timestamp)(Backend *, int64_t slot) NODISCARD;
    Status (*elapsed_ms)(Backend *, int64_t from, int64_t to, double *ms) NODISCARD;
    // Opens a named range for the tools that draw time lines (NVTX on an NVIDIA GPU, nothing
    // elsewhere); NULL closes the innermost. Costs next to nothing when no tool looks.
    void (*range)(Backend *, const char *name);

    size_t (*workspace_bytes)(Backend *, OpKind op, const void *args);
    void (*set_workspace)(Backend *, void *device, size_t bytes);

    Status (*embed_forward)(Backend *, const EmbedArgs *) NODISCARD;
    Status (*embed_backward)(Backend *, const EmbedArgs *) NODISCARD;
    Status (*rmsnorm_forward)(Backend *, const RmsNormArgs *) NODISCARD;
    Status (*rmsnorm_backward)(Backend *, const RmsNormArgs *) NODISCARD;
    Status (*linear_forward)(Backend *, const LinearArgs *) NODISCARD;
    Status (*linear_backward)(Backend *, const LinearArgs *) NODISCARD;
    Status (*rope_forward)(Backend *, const RopeArgs *) NODISCARD;
    Status (*rope_backward)(Backend *, const RopeArgs *) NODISCARD;
    Status (*attention_forward)(Backend *, const AttentionArgs *) NODISCARD;
    Status (*attention_backward)(Backend *, const AttentionArgs *) NODISCARD;
    Status (*ffn_forward)(Backend *, const FfnArgs *) NODISCARD;
    Status (*ffn_backward)(Backend *, const FfnArgs *) NODISCARD;
    Status (*route_forward)(Backend *, const RouteArgs *) NODISCARD;
    Status (*route_backward)(Backend *, const RouteArgs *) NODISCARD;
    Status (*router_loss)(Backend *, const RouterLossArgs *) NODISCARD;
    Status (*moe_ffn_forward)(Backend *, const MoeFfnArgs *) NODISCARD;
    Status (*moe_ffn_backward)(Backend *, const MoeFfnArgs *) NODISCARD;
    Status (*linear_cross_entropy)(Backend *, const LinearCrossEntropyArgs *) NODISCARD;
    Status (*adamw)(Backend *, const AdamwArgs *) NODISCARD;
    // sums[0] += Σ g², sums[1] += number of non-finite values; sums is device memory. `dtype` is
    // the backend's grad_dtype, or F32 for the routers' gradients.
    Status (*norm2)(Backend *, DType dtype, const void *grad, int64_t count,
                    double *sums) NODISCARD;
    Status (*row_similarity)(Backend *, const RowSimilarityArgs *) NODISCARD;
    Status (*gather_rows)(Backend *, const GatherRowsArgs *) NODISCARD;
    Status (*combine_rows)(Backend *, const CombineRowsArgs *) NODISCARD;
    // sum += values, in fp32. NULL where a backend has not got it: ranks cannot share gradients.
    Status (*accumulate)(Backend *, float *sum, DType, const void *values, int64_t count) NODISCARD;
    // a += b, compute_dtype.
    Status (*add)(Backend *, void *a, const void *b, int64_t count) NODISCARD;
    Status (*cast)(Backend *, DType to, void *out, DType from, const void *in,
                   int64_t count) NODISCARD;

    void (*destroy)(Backend *);
} BackendOps;

struct Backend {
    const BackendOps *ops;
    const char *name;        // "cpu", "cuda"
    const char *device_name; // "CPU", "NVIDIA H200"
    DType compute_dtype;     // weights and activations
    DType grad_dtype;        // weight gradients
    int num_threads;         // CPU threads it computes with
    bool can_capture;        // has capture_begin and its kin
    // followed by the backend's own state
};

// threads <= 0: OMP_NUM_THREADS or all cores this process may use.
Status backend_cpu(int threads, Backend **out) NODISCARD;
static inline void backend_destroy(Backend *backend) {
    if (backend) backend->ops->destroy(backend);
}

#endif
