// Element types of tensors in memory and in files, and conversions between them.
#ifndef BASE_DTYPE_H
#define BASE_DTYPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum DType { DTYPE_F32, DTYPE_BF16, DTYPE_F16 } DType;

size_t dtype_bytes(DType dtype);
const char *dtype_name(DType dtype); // "F32", "BF16", "F16": safetensors' names
bool dtype_parse(const char *name, DType *out);

// Round to nearest even; NaN stays NaN. Source and destination must not overlap.
void dtype_to_f32(DType from, const void *source, float *destination, size_t count);
void dtype_from_f32(DType to, const float *source, void *destination, size_t count);

#endif
