// Where the gradients of a model lie when ranks share them (ZeRO-2, Rajbhandari et al. 2020).
//
// No rank has memory for all gradients. The backward pass writes those of a layer, they leave for
// their owners, and two layers further down the same memory is written again: while layer l
// travels, layer l-1 is computed. So there is a place for each kind of
//     | embedding | even layers | odd layers | LM head | vectors | routers |
// and an element's place is found from its offset in the arenas. The embedding has a place of its
// own, since it is the LM head, too, where they are tied, and so is the first to be written and the
// last to be complete.
#ifndef MODEL_GRADIENT_WINDOW_H
#define MODEL_GRADIENT_WINDOW_H

#include <stddef.h>
#include <stdint.h>
#include "base/dtype.h"
#include "model/tensor_table.h"

typedef struct GradientWindow {
    int64_t layer; // elements of the longest layer; 0 = no window: gradients lie as in the arenas
    int64_t body;  // elements before the routers
} GradientWindow;

// The window for a table whose sections are aligned (TableLayout.section).
GradientWindow gradient_window(const TensorTable *table);
// Byte offset of the gradient of element `offset` of the arenas, and of the end for table->total.
// `window` may be one without layers.
size_t gradient_bytes(const TensorTable *table, const GradientWindow *window, DType dtype,
                      int64_t offset);

// The gaps between and behind the matrices of a layer. In another layer's layout the same memory
// may have held gradients, and sums over a bucket go over its gaps, too: whoever writes a layer's
// gradients zeroes them. Returns how many there are; `gaps` has room for GRADIENT_GAPS_MAX.
enum { GRADIENT_GAPS_MAX = 5 };
typedef struct GradientGap {
    int64_t begin, count; // elements of the arenas
} GradientGap;
int gradient_gaps(const TensorTable *table, int layer, GradientGap gaps[GRADIENT_GAPS_MAX]);

#endif
