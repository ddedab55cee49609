// A reader of TensorBoard event files for tests, written from the formats' definitions and not from
// train/tensorboard.c: framing with checksums by table, then the protobuf fields of scalar events.
#ifndef TESTS_EVENT_FILE_H
#define TESTS_EVENT_FILE_H

#include <stdint.h>
#include "tests/test.h"

enum { EVENT_TAG_SIZE = 64, EVENT_SCALARS_MAX = 64 };

typedef struct Event {
    double wall_time;
    int64_t step;
    char file_version[32];
    int session_status; // 0 = no session log
    int count;
    struct {
        char tag[EVENT_TAG_SIZE];
        float value;
    } scalars[EVENT_SCALARS_MAX];
} Event;

static inline uint32_t event_masked_crc(const unsigned char *data, size_t bytes) {
    static uint32_t table[256];
    for (uint32_t i = 0; i < 256 && !table[255]; i++) {
        uint32_t entry = i;
        for (int bit = 0; bit < 8; bit++) entry = (entry >> 1) ^ ((entry & 1) ? 0x82F63B78u : 0);
        table[i] = entry;
    }
    uint32_t crc = 0xffffffff;
    for (size_t i = 0; i < bytes; i++) crc = table[(crc ^ data[i]) & 0xff] ^ (crc >> 8);
    crc ^= 0xffffffff;
    return ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
}

static inline uint64_t event_varint(const unsigned char **at, const unsigned char *end) {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
        ck_assert(*at < end);
        unsigned char byte = *(*at)++;
        value |= (uint64_t)(byte & 0x7f) << shift;
        if (!(byte & 0x80)) return value;
    }
    ck_abort_msg("varint of more than ten bytes");
    return 0;
}

// The next field of a message; fills number and either value (varint, fixed) or data and bytes.
typedef struct EventField {
    unsigned number, wire;
    uint64_t value;
    const unsigned char *data;
    size_t bytes;
} EventField;
static inline int event_field(const unsigned char **at, const unsigned char *end, EventField *out) {
    if (*at == end) return 0;
    uint64_t key = event_varint(at, end);
    *out = (EventField){.number = (unsigned)(key >> 3), .wire = (unsigned)(key & 7)};
    if (out->wire == 0) {
        out->value = event_varint(at, end);
        return 1;
    }
    out->bytes = out->wire == 1 ? 8 : out->wire == 5 ? 4 : (size_t)event_varint(at, end);
    ck_assert(out->wire == 1 || out->wire == 2 || out->wire == 5);
    ck_assert_uint_ge((size_t)(end - *at), out->bytes);
    out->data = *at;
    *at += out->bytes;
    if (out->wire != 2) memcpy(&out->value, out->data, out->bytes);
    return 1;
}

static inline void event_scalar(EventField value, Event *event) {
    const unsigned char *at = value.data, *end = at + value.bytes;
    EventField field;
    ck_assert_int_lt(event->count, EVENT_SCALARS_MAX);
    while (event_field(&at, end, &field)) {
        if (field.number == 1) {
            ck_assert_uint_lt(field.bytes, EVENT_TAG_SIZE);
            memcpy(event->scalars[event->count].tag, field.data, field.bytes);
        }
        if (field.number == 2) {
            ck_assert_uint_eq(field.wire, 5);
            memcpy(&event->scalars[event->count].value, field.data, 4);
        }
    }
    event->count++;
}

static inline void event_decode(const unsigned char *at, const unsigned char *end, Event *event) {
    EventField field, inner;
    memset(event, 0, sizeof *event);
    while (event_field(&at, end, &field)) {
        const unsigned char *inside = field.data, *inside_end = inside + field.bytes;
        if (field.number == 1) memcpy(&event->wall_time, field.data, 8);
        if (field.number == 2) event->step = (int64_t)field.value;
        if (field.number == 3) memcpy(event->file_version, field.data, field.bytes);
        if (field.number == 5) {
            while (event_field(&inside, inside_end, &inner)) event_scalar(inner, event);
        }
        if (field.number == 7) {
            while (event_field(&inside, inside_end, &inner)) {
                if (inner.number == 1) event->session_status = (int)inner.value;
            }
        }
    }
}

// Reads up to `max` events of the file; every checksum must hold and no byte may be left over.
static inline int event_file_read(const char *path, Event *events, int max) {
    char *data;
    size_t bytes, at = 0;
    int count = 0;
    ck_assert_ok(io_read_file(path, 1 << 20, &data, &bytes));
    const unsigned char *raw = (const unsigned char *)data;
    while (at < bytes) {
        uint64_t length;
        uint32_t crc;
        ck_assert_uint_ge(bytes - at, 16);
        memcpy(&length, raw + at, 8);
        memcpy(&crc, raw + at + 8, 4);
        ck_assert_uint_eq(crc, event_masked_crc(raw + at, 8));
        ck_assert_uint_le(length, bytes - at - 16);
        memcpy(&crc, raw + at + 12 + length, 4);
        ck_assert_uint_eq(crc, event_masked_crc(raw + at + 12, length));
        ck_assert_int_lt(count, max);
        event_decode(raw + at + 12, raw + at + 12 + length, &events[count++]);
        at += 16 + length;
    }
    free(data);
    return count;
}

// The value of a tag; the test fails when the event lacks it.
static inline float event_value(const Event *event, const char *tag) {
    for (int i = 0; i < event->count; i++)
        if (strcmp(event->scalars[i].tag, tag) == 0) return event->scalars[i].value;
    ck_abort_msg("no scalar %s", tag);
    return 0;
}

#endif
