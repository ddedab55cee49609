// log.jsonl and event files of a run: their content, after resumes, kills and full disks.
#include "tests/test.h"

#include <errno.h>
#include <math.h>
#include "base/json.h"
#include "tests/event_file.h"
#include "train/report.h"

enum { LAYERS = 3, STRIDE = 4 };

// Layer 0 dense, layer 1 with 4 experts of which one is dead, layer 2 with 2 in balance; 10 tokens.
static double assignments[LAYERS * STRIDE] = {[STRIDE] = 5, 3, 2, 0, 5, 5};
static double probability[LAYERS * STRIDE] = {[STRIDE] = 4, 3, 2, 1, 5, 5};
static double entropy[LAYERS] = {0, 12.5, 7}, z[LAYERS];
static const ModelSums sums = {.tokens = 10,
                               .stride = STRIDE,
                               .assignments = assignments,
                               .probability = probability,
                               .entropy = entropy,
                               .z = z};

static const ModelConfig *moe_config(void) {
    static ModelConfig config;
    config.num_layers = LAYERS;
    config.layers[1] = (LayerConfig){.num_experts = 4, .top_k = 1};
    config.layers[2] = (LayerConfig){.num_experts = 2, .top_k = 1};
    return &config;
}

static StepReport step_at(int64_t step) {
    return (StepReport){.step = step,
                        .total_steps = 100,
                        .tokens = step * 1000,
                        .loss = 3.0 + 1.0 / (double)(step + 1),
                        .cross_entropy = 3.0,
                        .balance = 2.32,
                        .learning_rate = 1e-4,
                        .gradient_norm = 0.5,
                        .tokens_per_second = 1234,
                        .data_wait = 0.01,
                        .eta_seconds = 60,
                        .skipped = 1,
                        .sums = &sums};
}

static Report *opened(int64_t resume_step, bool tensorboard) {
    Report *report;
    setenv("DENSE2MOE_LOG", "error", 0); // the console's lines are tested in test_console.c
    ck_assert_ok(report_open(test_directory(), moe_config(), resume_step, tensorboard, &report));
    return report;
}

static void log_steps(Report *report, int64_t first, int64_t last) {
    for (int64_t step = first; step <= last; step++) {
        StepReport s = step_at(step);
        report_step(report, &s);
    }
}

static const char *log_path(void) {
    static char path[IO_PATH_MAX];
    ck_assert_ok(io_path(path, "%s/log.jsonl", test_directory()));
    return path;
}

// All records of the log as an array; each line must be one whole object.
static json_t *read_log(void) {
    char *text;
    size_t bytes;
    ck_assert_ok(io_read_file(log_path(), 1 << 20, &text, &bytes));
    json_t *records = json_array();
    for (char *line = text, *end; line < text + bytes; line = end + 1) {
        end = strchr(line, '\n');
        ck_assert_msg(end != NULL, "torn line: %s", line);
        json_t *record;
        ck_assert_ok(json_parse(line, (size_t)(end - line), "log.jsonl", &record));
        json_array_append_new(records, record);
    }
    free(text);
    return records;
}

static double real_of(const json_t *record, const char *key) {
    double value;
    ck_assert_ok(json_get_real(record, "log.jsonl", key, &value));
    return value;
}

// The steps of the log's records as text: "1 2 3".
static const char *logged_steps(void) {
    static char text[512];
    size_t index;
    json_t *records = read_log(), *record;
    text[0] = '\0';
    json_array_foreach(records, index, record) {
        size_t used = strlen(text);
        snprintf(text + used, sizeof text - used, "%s%.0f", used ? " " : "",
                 real_of(record, "step"));
    }
    json_decref(records);
    return text;
}

START_TEST(records_hold_what_was_reported) {
    Report *report = opened(-1, false);
    StepReport step = step_at(6);
    report_eval(report, 0, "valid", 4.5, 2000);
    report_step(report, &step);
    step.step = 7, step.sums = NULL, step.loss = NAN, step.gradient_norm = INFINITY;
    report_step(report, &step);
    report_event(report, 7, "checkpoint", "saved \"it\"\n");
    report_event(report, 7, "odd", "not utf-8: \xff");
    report_close(report);
    report_close(NULL);

    json_t *records = read_log();
    ck_assert_uint_eq(json_array_size(records), 5);
    const json_t *record = json_array_get(records, 0);
    ck_assert_str_eq(json_string_value(json_object_get(record, "kind")), "eval");
    ck_assert(real_of(record, "loss") == 4.5 && real_of(record, "targets") == 2000);
    ck_assert(real_of(record, "perplexity") == exp(4.5));

    record = json_array_get(records, 1);
    ck_assert(real_of(record, "step") == 6 && real_of(record, "tokens") == 6000);
    ck_assert(real_of(record, "loss") == 3.0 + 1.0 / 7); // to the last bit
    ck_assert(real_of(record, "cross_entropy") == 3 && real_of(record, "balance") == 2.32);
    ck_assert(real_of(record, "learning_rate") == 1e-4 && real_of(record, "skipped") == 1);
    ck_assert(real_of(record, "gradient_norm") == 0.5 && real_of(record, "eta_seconds") == 60);
    ck_assert(real_of(record, "data_wait") == 0.01 && real_of(record, "time") > 1.6e9);
    const json_t *experts = json_object_get(record, "experts");
    ck_assert_uint_eq(json_array_size(experts), 2); // the dense layer has none
    const json_t *layer = json_array_get(experts, 0), *load = json_object_get(layer, "load");
    ck_assert(real_of(layer, "layer") == 1 && real_of(layer, "dead") == 1);
    ck_assert(real_of(layer, "max_load") == 0.5 && real_of(layer, "max_over_mean") == 2);
    ck_assert(real_of(layer, "entropy") == 1.25);
    ck_assert_uint_eq(json_array_size(load), 4);
    ck_assert(json_number_value(json_array_get(load, 1)) == 0.3);

    record = json_array_get(records, 2);
    ck_assert(json_is_null(json_object_get(record, "loss"))); // JSON has no NaN
    ck_assert(json_is_null(json_object_get(record, "gradient_norm")));
    ck_assert_ptr_null(json_object_get(record, "experts"));
    record = json_array_get(records, 3);
    ck_assert_str_eq(json_string_value(json_object_get(record, "event")), "checkpoint");
    ck_assert_str_eq(json_string_value(json_object_get(record, "text")), "saved \"it\"\n");
    json_decref(records);
}
END_TEST

START_TEST(a_resume_drops_later_records) {
    Report *report = opened(-1, false);
    log_steps(report, 1, 8);
    report_close(report);
    report = opened(5, false);
    ck_assert_str_eq(logged_steps(), "1 2 3 4 5");
    log_steps(report, 6, 9);
    report_close(report);
    ck_assert_str_eq(logged_steps(), "1 2 3 4 5 6 7 8 9");
    report_close(opened(9, false));
    ck_assert_str_eq(logged_steps(), "1 2 3 4 5 6 7 8 9");
    report = opened(-1, false); // a fresh start
    log_steps(report, 1, 1);
    report_close(report);
    ck_assert_str_eq(logged_steps(), "1");
}
END_TEST

START_TEST(torn_and_strange_lines_are_dropped) {
    Report *report = opened(-1, false);
    log_steps(report, 1, 3);
    report_close(report);
    char *text, *damaged;
    size_t bytes;
    ck_assert_ok(io_read_file(log_path(), 1 << 20, &text, &bytes));
    ck_assert_int_gt(
        asprintf(&damaged, "not json\n{\"step\": -1}\n{}\n\n%s{\"kind\":\"step\",\"st", text), 0);
    ck_assert_ok(io_write_file_atomic(log_path(), damaged, strlen(damaged)));
    free(text);
    free(damaged);
    report = opened(3, false);
    log_steps(report, 4, 4);
    report_close(report);
    ck_assert_str_eq(logged_steps(), "1 2 3 4");
}
END_TEST

START_TEST(an_evaluation_is_recorded_once) {
    Report *report = opened(-1, false);
    report_eval(report, 0, "valid", 5, 100);
    report_eval(report, 0, "end", 5, 100);
    report_eval(report, 4, "valid", 4, 100);
    log_steps(report, 5, 5);
    report_close(report);
    report = opened(4, false); // resumed from a checkpoint saved before its evaluation
    report_eval(report, 4, "valid", 4, 100);
    report_eval(report, 4, "end", 4, 100);
    report_eval(report, 8, "valid", 3, 100);
    report_close(report);
    ck_assert_str_eq(logged_steps(), "0 0 4 4 8");
}
END_TEST

// Lets half of a write through, then the disk is full; off when *on is 0.
static int full_disk(void *context, IoOp op, const char *path, size_t *bytes) {
    (void)path;
    int *on = context;
    if (!*on || op != IO_WRITE) return 0;
    *bytes /= 2;
    return (*on)++ % 2 == 1 ? 0 : ENOSPC;
}

// What goes to stderr while `full` disks refuse three records and later take one.
static void capture_full_disk(char *output, size_t size) {
    int ends[2], saved = dup(STDERR_FILENO), full = 0;
    ck_assert_int_eq(pipe(ends), 0);
    dup2(ends[1], STDERR_FILENO);
    setenv("DENSE2MOE_LOG", "warn", 1);
    Report *report = opened(-1, true);
    log_steps(report, 1, 2);
    io_set_hook(full_disk, &full);
    full = 1;
    log_steps(report, 3, 5);
    full = 0;
    log_steps(report, 6, 6);
    report_close(report);
    io_set_hook(NULL, NULL);
    fflush(stderr);
    dup2(saved, STDERR_FILENO);
    close(ends[1]);
    ssize_t bytes = read(ends[0], output, size - 1);
    output[bytes < 0 ? 0 : bytes] = '\0';
}

START_TEST(a_full_disk_warns_once_and_training_goes_on) {
    char output[4096];
    capture_full_disk(output, sizeof output);
    ck_assert_str_eq(logged_steps(), "1 2 6");
    const char *warning = strstr(output, "log.jsonl: writing failed");
    ck_assert_msg(warning != NULL && strstr(warning + 1, "log.jsonl") == NULL, "%s", output);
    ck_assert_ptr_nonnull(strstr(warning, "training goes on"));
    warning = strstr(output, "tfevents");
    ck_assert_msg(warning != NULL && strstr(warning + 1, "tfevents") == NULL, "%s", output);
}
END_TEST

static int read_board(Event *events, int max) {
    char path[IO_PATH_MAX], **names;
    size_t count;
    ck_assert_ok(io_path(path, "%s/tensorboard", test_directory()));
    ck_assert_ok(io_list_directory(path, &names, &count));
    ck_assert_uint_eq(count, 1);
    ck_assert_ok(io_path(path, "%s/tensorboard/%s", test_directory(), names[0]));
    io_free_names(names, count);
    return event_file_read(path, events, max);
}

START_TEST(tensorboard_scalars) {
    static Event events[8];
    Report *report = opened(-1, true);
    report_eval(report, 0, "start", 4.5, 2000);
    log_steps(report, 6, 6);
    StepReport step = step_at(7);
    step.sums = NULL;
    report_step(report, &step);
    report_close(report);
    ck_assert_int_eq(read_board(events, 8), 5);
    ck_assert(event_value(&events[2], "eval/loss") == 4.5f);
    ck_assert(event_value(&events[2], "eval/perplexity") == (float)exp(4.5));
    ck_assert_int_eq(events[3].step, 6);
    ck_assert(event_value(&events[3], "train/loss") == (float)(3.0 + 1.0 / 7));
    ck_assert(event_value(&events[3], "train/learning_rate") == 1e-4f);
    ck_assert(event_value(&events[3], "router/balance") == 2.32f);
    ck_assert(event_value(&events[3], "router/layer_01/max_load") == 0.5f);
    ck_assert(event_value(&events[3], "router/layer_01/dead_experts") == 1);
    ck_assert(event_value(&events[3], "router/layer_02/entropy") == 0.7f);
    ck_assert_int_eq(events[3].count, 15);
    ck_assert_int_eq(events[4].count, 9); // without expert load
}
END_TEST

START_TEST(unwritable_runs_are_refused_at_the_start) {
    Report *report;
    ck_assert_fails(report_open("/proc/nowhere", moe_config(), -1, true, &report),
                    STATUS_CANNOT_WRITE, "/proc/nowhere/log.jsonl");
}
END_TEST

TEST_MAIN("report", TEST(records_hold_what_was_reported), TEST(a_resume_drops_later_records),
          TEST(torn_and_strange_lines_are_dropped), TEST(an_evaluation_is_recorded_once),
          TEST(a_full_disk_warns_once_and_training_goes_on), TEST(tensorboard_scalars),
          TEST(unwritable_runs_are_refused_at_the_start))
