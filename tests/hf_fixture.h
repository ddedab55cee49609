// What the tests of model directories share: names in the test's directory and small exports.
#ifndef TESTS_HF_FIXTURE_H
#define TESTS_HF_FIXTURE_H

#include "model/hf.h"
#include "tests/synthetic.h"
#include "tests/test.h"

// A path in the test's directory; valid for the next three calls. Tests that hold one for longer
// take a copy with KEEP.
static inline const char *in_directory(const char *format, const char *name) {
    static char paths[4][IO_PATH_MAX];
    static int next;
    char *path = paths[next++ % 4], tail[1024];
    snprintf(tail, sizeof tail, format, name);
    ck_assert_ok(io_path(path, "%s/%s", test_directory(), tail));
    return path;
}

#define KEEP(variable, path)                                                                       \
    char variable[IO_PATH_MAX];                                                                    \
    snprintf(variable, sizeof variable, "%s", path)

static inline HfWriteOptions bf16(void) {
    return (HfWriteOptions){.dtype = DTYPE_BF16};
}

static inline void export_model(const char *directory, const ModelConfig *config,
                                const HfWriteOptions *options) {
    TensorSource *source = synthetic_source(config);
    ck_assert_ok(hf_write(directory, source, options));
    source_close(source);
}

static inline void write_text(const char *path, const char *text) {
    ck_assert_ok(io_write_file_atomic(path, text, strlen(text)));
}

#endif
