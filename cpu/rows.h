// Rows between token and expert order, for the ops of their own and inside the expert MLPs.
#ifndef CPU_ROWS_H
#define CPU_ROWS_H

#include "model/backend.h"

// The rows [begin, end) of out.
void gather_rows(const GatherRowsArgs *args, int64_t begin, int64_t end);
// Row t of out.
void combine_token(const CombineRowsArgs *args, int64_t t);

#endif
