// Event files read back by an independent reader, checksums against the published vectors.
#include "tests/test.h"

#include <errno.h>
#include <math.h>
#include "base/clock.h"
#include "tests/event_file.h"
#include "train/tensorboard.h"

START_TEST(crc32c_vectors) {
    unsigned char data[32];
    // RFC 3720, B.4, and the usual check value.
    memset(data, 0, sizeof data);
    ck_assert_uint_eq(crc32c(data, 32), 0x8a9136aau);
    memset(data, 0xff, sizeof data);
    ck_assert_uint_eq(crc32c(data, 32), 0x62a8ab43u);
    for (int i = 0; i < 32; i++) data[i] = (unsigned char)i;
    ck_assert_uint_eq(crc32c(data, 32), 0x46dd794eu);
    for (int i = 0; i < 32; i++) data[i] = (unsigned char)(31 - i);
    ck_assert_uint_eq(crc32c(data, 32), 0x113fdb5cu);
    ck_assert_uint_eq(crc32c("123456789", 9), 0xe3069283u);
    ck_assert_uint_eq(crc32c("", 0), 0);
}
END_TEST

// The directory's files, in the order in which TensorBoard reads them.
static char **board_files(size_t *count) {
    char **names;
    ck_assert_ok(io_list_directory(test_directory(), &names, count));
    return names;
}

static int read_file_number(size_t number, Event *events, int max) {
    size_t count;
    char path[IO_PATH_MAX], **names = board_files(&count);
    ck_assert_uint_lt(number, count);
    ck_assert_ptr_nonnull(strstr(names[number], "tfevents"));
    ck_assert_ok(io_path(path, "%s/%s", test_directory(), names[number]));
    io_free_names(names, count);
    return event_file_read(path, events, max);
}

START_TEST(scalars_are_read_back) {
    TensorBoard *board;
    static Event events[8];
    double before = clock_wall();
    const TensorBoardScalar scalars[] = {{"train/loss", 3.25f}, {"router/layer_03/max_load", 0.1f}};
    const TensorBoardScalar odd[] = {{"a", NAN}, {"b", -INFINITY}, {"c", 1e-45f}};
    ck_assert_ok(tensorboard_open(test_directory(), -1, &board));
    ck_assert_ok(tensorboard_write(board, 10, scalars, 2));
    ck_assert_ok(tensorboard_write(board, (int64_t)1 << 40, odd, 3));
    ck_assert_ok(tensorboard_write(board, 11, NULL, 0));
    ck_assert_ok(tensorboard_close(board));
    ck_assert_ok(tensorboard_close(NULL));

    ck_assert_int_eq(read_file_number(0, events, 8), 5);
    ck_assert_str_eq(events[0].file_version, "brain.Event:2");
    ck_assert(events[0].wall_time >= before && events[0].wall_time <= clock_wall());
    ck_assert_int_eq(events[1].session_status, 1);
    ck_assert_int_eq(events[1].step, 0);
    ck_assert_int_eq(events[2].step, 10);
    ck_assert_int_eq(events[2].count, 2);
    ck_assert(event_value(&events[2], "train/loss") == 3.25f);
    ck_assert(event_value(&events[2], "router/layer_03/max_load") == 0.1f);
    ck_assert_int_eq(events[3].step, (int64_t)1 << 40);
    ck_assert(isnan(event_value(&events[3], "a")));
    ck_assert(event_value(&events[3], "b") == -INFINITY);
    ck_assert(event_value(&events[3], "c") == 1e-45f);
    ck_assert_int_eq(events[4].count, 0);
}
END_TEST

START_TEST(attempts_sort_and_purge) {
    static Event events[8];
    for (int attempt = 0; attempt < 5; attempt++) {
        TensorBoard *board;
        const TensorBoardScalar scalar = {"attempt", (float)attempt};
        ck_assert_ok(tensorboard_open(test_directory(), attempt * 100, &board));
        ck_assert_ok(tensorboard_write(board, 1, &scalar, 1));
        ck_assert_ok(tensorboard_close(board));
    }
    for (int attempt = 0; attempt < 5; attempt++) {
        ck_assert_int_eq(read_file_number((size_t)attempt, events, 8), 3);
        ck_assert_int_eq(events[1].session_status, 1);
        ck_assert_int_eq(events[1].step, attempt * 100 + 1);
        ck_assert(event_value(&events[2], "attempt") == (float)attempt);
    }
}
END_TEST

// Lets half of a write through, then the disk is full; off when *on is 0.
static int full_disk(void *context, IoOp op, const char *path, size_t *bytes) {
    (void)path;
    int *on = context;
    if (!*on || op != IO_WRITE) return 0;
    *bytes /= 2;
    return (*on)++ == 1 ? 0 : ENOSPC;
}

START_TEST(a_full_disk_leaves_whole_records) {
    TensorBoard *board;
    static Event events[8];
    int full = 0;
    const TensorBoardScalar scalar = {"train/loss", 1.0f};
    io_set_hook(full_disk, &full);
    ck_assert_ok(tensorboard_open(test_directory(), -1, &board));
    ck_assert_ok(tensorboard_write(board, 1, &scalar, 1));
    full = 1;
    ck_assert_fails(tensorboard_write(board, 2, &scalar, 1), STATUS_IO, "tfevents");
    ck_assert_int_eq(read_file_number(0, events, 8), 3);
    full = 0;
    ck_assert_ok(tensorboard_write(board, 3, &scalar, 1));
    ck_assert_ok(tensorboard_close(board));
    ck_assert_int_eq(read_file_number(0, events, 8), 4);
    ck_assert_int_eq(events[3].step, 3);
}
END_TEST

START_TEST(unwritable_directories_are_named) {
    TensorBoard *board;
    ck_assert_fails(tensorboard_open("/proc/nowhere", -1, &board), STATUS_CANNOT_WRITE,
                    "/proc/nowhere");
}
END_TEST

TEST_MAIN("tensorboard", TEST(crc32c_vectors), TEST(scalars_are_read_back),
          TEST(attempts_sort_and_purge), TEST(a_full_disk_leaves_whole_records),
          TEST(unwritable_directories_are_named))
