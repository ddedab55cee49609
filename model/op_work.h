// How much work an op is: floating-point operations and the least memory traffic, from its
// arguments. With a device's two rates that gives the shortest time the op can take (roofline,
// Williams et al. 2009), to which a measured time is compared.
//
// The rule of counting:
//  - FLOPs are those of matrix products, 2mnk each; element-wise arithmetic counts nothing, its
//    memory traffic is what bounds it. Causal attention counts half of its S×S products: two in
//    forward, five in backward, where the contract makes the probabilities be computed again.
//    Documents inside a sequence count as one.
//  - Bytes: every operand that the call has to touch is read once and written once, at the
//    backend's dtypes; what accumulates is read and written. Buffers inside an op (logits, rows
//    grouped by expert) count nothing. Of an embedding, the rows that the tokens can name.
//  - Experts: T·k rows, and the weights of as many experts as those rows can reach.
#ifndef MODEL_OP_WORK_H
#define MODEL_OP_WORK_H

#include "model/backend.h"
#include "model/config.h"

typedef struct OpWork {
    double flops, bytes;
} OpWork;

typedef enum OpPass { PASS_FORWARD, PASS_BACKWARD } OpPass;

// `args` is the op's argument struct, and for OP_NORM2 a const int64_t *count of grad_dtype. Ops
// without a backward ignore the pass. Optional operands count when they are given.
OpWork op_work(const Backend *backend, OpKind op, OpPass pass, const void *args);
OpWork op_work_norm2(DType dtype, int64_t count);
OpWork op_work_add(DType dtype, int64_t count);
OpWork op_work_cast(DType to, DType from, int64_t count);

const char *op_name(OpKind op); // "embed", "moe_ffn", ...
bool op_has_backward(OpKind op);
bool op_is_product(OpKind op); // its FLOPs, not its bytes, bound it at useful sizes

// What training costs per token: 6 FLOPs for each parameter that a token is multiplied with (LM
// head included, embedding not), and causal attention's products, forward and backward once each
// (PaLM's model FLOPs, Chowdhery et al. 2022): recomputed work does not count as useful.
double model_flops_per_token(const ModelConfig *config, int64_t sequence_length);

#endif
