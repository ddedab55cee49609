// Does an exported directory hold the model that was trained? (METHOD.md §10)
//
// Exporting rounds: bf16 keeps 8 bits of each weight, and a router whose two best experts are close
// may then choose the other one. So the trained model's logits alone cannot tell a rounding from a
// mistake in names, layout or config.json. The check has two parts:
//  1. The directory, read back, must compute what the trained weights compute after the same
//     rounding in memory. Nothing but the files lies between the two, so the logits must be equal
//     (to 1e-5 of the largest: another address may change the order of a GPU's sums).
//  2. The directory must be close to the trained model itself: the median over positions of
//     |difference| / |logits - their mean| is at most 0.5 for 16-bit weights, in the files or on
//     the backend, and 1e-3 for fp32 (folding gate_scale into down_proj rounds once more). Rounding
//     to bf16 gives about 0.01 in a dense model, but up to 0.1 in small random models with top-1
//     experts, where a token that changes its expert is far off without any fault, and others see
//     it through attention; a matrix missing, transposed or badly scaled gives 1 and more.
// Models compute on `trained`'s backend, one inference model beside it at a time; afterwards the
// backend's workspace is unset until the next forward of `trained`.
#ifndef MODEL_EXPORT_CHECK_H
#define MODEL_EXPORT_CHECK_H

#include <stdint.h>
#include "base/status.h"
#include "model/model.h"

typedef struct ExportCheck {
    int64_t tokens;        // positions compared, of one sequence of fixed ids
    double max_file_diff;  // part 1: largest difference of two logits, expected 0
    double max_diff;       // part 2: largest difference of two logits
    double median_error;   // part 2: see above
    double top1_agreement; // part 2: share of positions with the same most likely next token
} ExportCheck;

// `written` is the dtype the directory was written with. A directory that is not the trained model
// is STATUS_INTERNAL saying which part failed and by how much; a trained model whose logits are not
// finite is STATUS_NUMERICS. A selection bias (balance_bias) has no place in a directory: with one
// set, part 2 measures what leaving it out costs.
Status export_verify(Model *trained, const char *directory, DType written,
                     ExportCheck *out) NODISCARD;

#endif
