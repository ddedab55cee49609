// What the driver says about GPUs, through a library that stands in for NVML (tests/fake_nvml.c).
#include "tests/test.h"

#include <fcntl.h>
#include "train/gpu_events.h"

#define FAKE TEST_BINARY_DIR "/libfake_nvml.so"

static Status fail_in_cuda(void) {
    FAIL(STATUS_INTERNAL, "step 7: CUDA: unspecified launch failure");
}

// Watches while `script` happens, then explains a failure. The log is in `log`.
static Status explain(const char *script, Status (*failing)(void), bool say, char *log,
                      size_t room) {
    char path[128];
    int saved = dup(2), fd;
    GpuEvents *events;
    snprintf(path, sizeof path, "%s/log", test_directory());
    fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0666);
    ck_assert(fd >= 0 && dup2(fd, 2) == 2);
    setenv("FAKE_NVML", script, 1);
    ck_assert_ok(gpu_events_start(FAKE, say, &events));
    Status status = gpu_events_explain(events, failing());
    gpu_events_stop(events);
    dup2(saved, 2);
    close(saved);
    ssize_t bytes = pread(fd, log, room - 1, 0);
    log[bytes > 0 ? bytes : 0] = '\0';
    close(fd);
    return status;
}

START_TEST(hardware_errors_are_named_and_mean_elsewhere) {
    char log[4096];
    ck_assert_fails(explain("1:8:79", fail_in_cuda, true, log, sizeof log), STATUS_COMMUNICATION,
                    "GPU 1 (GPU-fake-1): Xid 79, the GPU has fallen off the bus");
    ck_assert_ptr_nonnull(strstr(status_message(), "step 7: CUDA: unspecified"));
    ck_assert_ptr_nonnull(strstr(log, "error: "));
    ck_assert_ptr_nonnull(strstr(log, "Xid 79"));
    ck_assert_fails(explain("1:2:0", fail_in_cuda, false, log, sizeof log), STATUS_COMMUNICATION,
                    "GPU 1 (GPU-fake-1): uncorrectable (double-bit) memory error");
    ck_assert_str_eq(log, ""); // a rank that does not speak
    // The first one is the cause.
    ck_assert_fails(explain("0:8:31 0:8:48 1:8:79", fail_in_cuda, true, log, sizeof log),
                    STATUS_COMMUNICATION, "GPU 0 (GPU-fake-0): Xid 48");
}
END_TEST

START_TEST(errors_of_the_program_stay_errors_of_the_program) {
    char log[4096];
    ck_assert_fails(explain("0:8:31", fail_in_cuda, true, log, sizeof log), STATUS_INTERNAL,
                    "step 7: CUDA");
    ck_assert_ptr_nonnull(strstr(log, "warn: "));
    ck_assert_ptr_nonnull(strstr(log, "Xid 31, illegal memory access"));
    ck_assert_fails(explain("0:8:12345", fail_in_cuda, true, log, sizeof log), STATUS_INTERNAL,
                    "step 7: CUDA");
    ck_assert_ptr_nonnull(strstr(log, "Xid 12345"));
    ck_assert_fails(explain("", fail_in_cuda, true, log, sizeof log), STATUS_INTERNAL, "step 7");
}
END_TEST

static Status fail_otherwise(void) {
    FAIL(STATUS_IO, "disk");
}

START_TEST(other_failures_are_not_touched) {
    char log[4096];
    ck_assert_fails(explain("1:8:79", fail_otherwise, true, log, sizeof log), STATUS_IO, "disk");
    ck_assert_int_eq(gpu_events_explain(NULL, STATUS_INTERNAL), STATUS_INTERNAL);
}
END_TEST

START_TEST(without_nvml_nothing_is_watched) {
    GpuEvents *events;
    ck_assert_ok(gpu_events_start("/no/such/library.so", true, &events));
    ck_assert_ptr_null(events);
    setenv("FAKE_NVML", "none", 1);
    ck_assert_ok(gpu_events_start(FAKE, true, &events));
    ck_assert_ptr_null(events);
    setenv("FAKE_NVML", "broken", 1);
    ck_assert_ok(gpu_events_start(FAKE, true, &events));
    ck_assert_ptr_null(events);
    ck_assert_ok(gpu_events_start("libm.so.6", true, &events)); // a library, but not this one
    ck_assert_ptr_null(events);
    gpu_events_stop(events);
}
END_TEST

TEST_MAIN("gpu events", TEST(hardware_errors_are_named_and_mean_elsewhere),
          TEST(errors_of_the_program_stay_errors_of_the_program),
          TEST(other_failures_are_not_touched), TEST(without_nvml_nothing_is_watched))
