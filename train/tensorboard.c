// The few protobuf fields that a scalar needs, encoded by hand.
//
// An Event is built in one growing buffer and written with one call at the file's known end, so a
// full disk leaves a file that ends with a whole record, and the next event goes to the same place.
#include "train/tensorboard.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "base/clock.h"
#include "base/file.h"

// --- CRC-32C -------------------------------------------------------------------------------------

static const uint32_t CASTAGNOLI = 0x82f63b78; // the polynomial, bits reversed

uint32_t crc32c(const void *data, size_t bytes) {
    const unsigned char *byte = data;
    uint32_t crc = ~0u;
    // Bit by bit: an interval's event is a few kB.
    for (size_t i = 0; i < bytes; i++) {
        crc ^= byte[i];
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? CASTAGNOLI : 0);
    }
    return ~crc;
}

// TFRecord rotates and offsets its checksums, so that a CRC over data holding CRCs stays useful.
static uint32_t masked_crc(const void *data, size_t bytes) {
    uint32_t crc = crc32c(data, bytes);
    return (crc >> 15 | crc << 17) + 0xa282ead8u;
}

// --- A buffer of protobuf ------------------------------------------------------------------------

typedef struct Buffer {
    unsigned char *data;
    size_t bytes, capacity;
    bool failed; // out of memory; later appends do nothing
} Buffer;

static void append(Buffer *buffer, const void *data, size_t bytes) {
    if (buffer->failed) return;
    if (buffer->capacity - buffer->bytes < bytes) {
        size_t larger = 2 * (buffer->bytes + bytes);
        unsigned char *grown = realloc(buffer->data, larger);
        if (!grown) {
            buffer->failed = true;
            return;
        }
        buffer->data = grown;
        buffer->capacity = larger;
    }
    memcpy(buffer->data + buffer->bytes, data, bytes);
    buffer->bytes += bytes;
}

static void append_little_endian(Buffer *buffer, uint64_t value, int bytes) {
    for (int i = 0; i < bytes; i++) {
        unsigned char byte = (unsigned char)(value >> 8 * i);
        append(buffer, &byte, 1);
    }
}

static void append_varint(Buffer *buffer, uint64_t value) {
    do {
        unsigned char byte = (unsigned char)((value & 0x7f) | (value > 0x7f ? 0x80 : 0));
        append(buffer, &byte, 1);
        value >>= 7;
    } while (value);
}

static size_t varint_bytes(uint64_t value) {
    size_t bytes = 1;
    while (value >>= 7) bytes++;
    return bytes;
}

enum { WIRE_VARINT = 0, WIRE_FIXED64 = 1, WIRE_BYTES = 2, WIRE_FIXED32 = 5 };

static void append_key(Buffer *buffer, unsigned field, unsigned wire_type) {
    append_varint(buffer, field << 3 | wire_type);
}

static void append_text(Buffer *buffer, unsigned field, const char *text) {
    append_key(buffer, field, WIRE_BYTES);
    append_varint(buffer, strlen(text));
    append(buffer, text, strlen(text));
}

// --- Events --------------------------------------------------------------------------------------

enum { // field numbers of event.proto and summary.proto
    EVENT_WALL_TIME = 1,
    EVENT_STEP = 2,
    EVENT_FILE_VERSION = 3,
    EVENT_SUMMARY = 5,
    EVENT_SESSION_LOG = 7,
    SESSION_LOG_STATUS = 1,
    SESSION_LOG_START = 1, // a value of SESSION_LOG_STATUS
    SUMMARY_VALUE = 1,
    VALUE_TAG = 1,
    VALUE_SIMPLE = 2,
};
enum { RECORD_HEADER_BYTES = 12 }; // length and its checksum

struct TensorBoard {
    char path[IO_PATH_MAX];
    int fd;
    uint64_t bytes; // of whole records in the file
    Buffer record;
};

// Starts a record: room for the header, then the fields that every event has.
static void begin_event(TensorBoard *board, int64_t step) {
    static const unsigned char header[RECORD_HEADER_BYTES];
    Buffer *record = &board->record;
    double now = clock_wall();
    uint64_t bits;
    memcpy(&bits, &now, sizeof bits);
    record->bytes = 0;
    append(record, header, sizeof header);
    append_key(record, EVENT_WALL_TIME, WIRE_FIXED64);
    append_little_endian(record, bits, 8);
    append_key(record, EVENT_STEP, WIRE_VARINT);
    append_varint(record, (uint64_t)step);
}

static Status finish_event(TensorBoard *board) {
    Buffer *record = &board->record;
    if (!record->failed) {
        size_t payload = record->bytes - RECORD_HEADER_BYTES;
        uint32_t payload_crc = masked_crc(record->data + RECORD_HEADER_BYTES, payload);
        for (int i = 0; i < 8; i++) record->data[i] = (unsigned char)((uint64_t)payload >> 8 * i);
        uint32_t length_crc = masked_crc(record->data, 8);
        for (int i = 0; i < 4; i++) record->data[8 + i] = (unsigned char)(length_crc >> 8 * i);
        append_little_endian(record, payload_crc, 4);
    }
    if (record->failed) {
        record->failed = false;
        FAIL(STATUS_INTERNAL, "%s: out of memory", board->path);
    }
    Status status = io_pwrite(board->fd, board->path, record->data, record->bytes, board->bytes);
    if (status != STATUS_OK) {
        // Take back what was written of it. Should even that fail, the next event overwrites it.
        (void)!ftruncate(board->fd, (off_t)board->bytes);
        return status;
    }
    board->bytes += record->bytes;
    return STATUS_OK;
}

Status tensorboard_write(TensorBoard *board, int64_t step, const TensorBoardScalar *scalars,
                         size_t count) {
    // Lengths come before contents in protobuf, so the summary's size is added up first.
    size_t summary_bytes = 0;
    for (size_t i = 0; i < count; i++) {
        size_t tag = strlen(scalars[i].tag), value = 1 + varint_bytes(tag) + tag + 1 + 4;
        summary_bytes += 1 + varint_bytes(value) + value;
    }
    Buffer *record = &board->record;
    begin_event(board, step);
    append_key(record, EVENT_SUMMARY, WIRE_BYTES);
    append_varint(record, summary_bytes);
    for (size_t i = 0; i < count; i++) {
        size_t tag = strlen(scalars[i].tag);
        uint32_t bits;
        memcpy(&bits, &scalars[i].value, sizeof bits);
        append_key(record, SUMMARY_VALUE, WIRE_BYTES);
        append_varint(record, 1 + varint_bytes(tag) + tag + 1 + 4);
        append_text(record, VALUE_TAG, scalars[i].tag);
        append_key(record, VALUE_SIMPLE, WIRE_FIXED32);
        append_little_endian(record, bits, 4);
    }
    return finish_event(board);
}

static Status write_opening(TensorBoard *board, int64_t resume_step) {
    begin_event(board, 0);
    append_text(&board->record, EVENT_FILE_VERSION, "brain.Event:2");
    TRY(finish_event(board));
    begin_event(board, resume_step + 1); // everything from this step on is said anew
    append_key(&board->record, EVENT_SESSION_LOG, WIRE_BYTES);
    append_varint(&board->record, 2);
    append_key(&board->record, SESSION_LOG_STATUS, WIRE_VARINT);
    append_varint(&board->record, SESSION_LOG_START);
    return finish_event(board);
}

Status tensorboard_open(const char *directory, int64_t resume_step, TensorBoard **out) {
    Status status = STATUS_OK;
    char host[128];
    if (gethostname(host, sizeof host - 1) != 0) strcpy(host, "unknown");
    host[sizeof host - 1] = '\0';
    TensorBoard *board = calloc(1, sizeof *board);
    if (!board) FAIL(STATUS_INTERNAL, "out of memory for a TensorBoard file");
    board->fd = -1;
    TRY_GOTO(io_make_directories(directory), fail);
    // TensorBoard takes any name with "tfevents" in it and reads them in order; microseconds keep
    // attempts within one second apart.
    int64_t microseconds = (int64_t)(clock_wall() * 1e6);
    TRY_GOTO(io_path(board->path, "%s/events.out.tfevents.%010" PRId64 ".%06" PRId64 ".%s",
                     directory, microseconds / 1000000, microseconds % 1000000, host),
             fail);
    TRY_GOTO(io_open(board->path, O_WRONLY | O_CREAT | O_EXCL, &board->fd), fail);
    TRY_GOTO(write_opening(board, resume_step), fail);
    *out = board;
    return STATUS_OK;
fail:
    if (board->fd >= 0) close(board->fd);
    free(board->record.data);
    free(board);
    return status;
}

Status tensorboard_close(TensorBoard *board) {
    if (!board) return STATUS_OK;
    Status status = io_close(board->fd, board->path);
    free(board->record.data);
    free(board);
    return status;
}
