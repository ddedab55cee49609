// TensorBoard event files, written natively: TFRecord framing (length, masked CRC-32C of the
// length, data, masked CRC-32C of the data; all little-endian) around protobuf `Event` messages
// with scalar summaries. Format: tensorflow/core/lib/io/record_writer.h, core/util/event.proto,
// core/framework/summary.proto.
#ifndef TRAIN_TENSORBOARD_H
#define TRAIN_TENSORBOARD_H

#include <stddef.h>
#include <stdint.h>
#include "base/status.h"

enum { TENSORBOARD_TAG_MAX = 64 };

typedef struct TensorBoardScalar {
    char tag[TENSORBOARD_TAG_MAX]; // "train/loss"
    float value;
} TensorBoardScalar;

typedef struct TensorBoard TensorBoard;

// Creates `directory` and a new file in it whose name sorts after those of earlier attempts, and
// tells TensorBoard to forget what those say about steps after resume_step (-1: everything).
Status tensorboard_open(const char *directory, int64_t resume_step, TensorBoard **out) NODISCARD;
// One event with all scalars. After a failure the file ends where it did before the call.
Status tensorboard_write(TensorBoard *board, int64_t step, const TensorBoardScalar *scalars,
                         size_t count) NODISCARD;
Status tensorboard_close(TensorBoard *board) NODISCARD; // frees it in any case; accepts NULL

uint32_t crc32c(const void *data, size_t bytes); // Castagnoli, as in iSCSI (RFC 3720, B.4)

#endif
