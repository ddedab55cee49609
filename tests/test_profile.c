// A profile changes nothing that it watches, sees every op, and says how fast each was.
#include "train/profile.h"

#include <math.h>
#include "tests/tiny_run.h"
#include "tests/tiny_trainer.h"

// --- The backend in between ----------------------------------------------------------------------

static const int32_t ids[] = {1, 5, 2, 9}, targets[] = {5, 2, 9, 3};

static void two_steps(TinyTrainer *t) {
    MicroBatch batch = {1, 4, ids, targets, NULL};
    LossWeights weights = {
        .target_count = 4, .token_count = 4, .balance = 0.1, .z = 0.01, .balance_micro = true};
    for (int i = 0; i < 2; i++) {
        double norm;
        ck_assert_ok(model_zero_gradients(t->model));
        ck_assert_ok(model_reset_sums(t->model));
        ck_assert_ok(model_forward_backward(t->model, &batch, &weights));
        ck_assert_ok(optimizer_gradient_norm(t->optimizer, &norm));
        ck_assert_ok(optimizer_step(t->optimizer, 1e-3, norm));
    }
}

static void expect_same_arena(const TinyTrainer *a, const TinyTrainer *b, const float *x,
                              const float *y) {
    float *p = download_arena(a, x), *q = download_arena(b, y);
    ck_assert_mem_eq(p, q, (size_t)a->model->table.total * sizeof *p);
    free(p);
    free(q);
}

// As `plain`, on a profile of its backend.
static TinyTrainer watched_trainer(const TinyTrainer *plain, Profile **profile) {
    const ModelConfig *config = &plain->model->config;
    TinyTrainer t;
    TensorSource *source = random_source(config, 1);
    ck_assert_ok(profile_create(plain->backend, profile));
    t.backend = profile_backend(*profile);
    ck_assert_ok(model_create(t.backend, config, &plain->model->options, &t.model));
    ck_assert_ok(model_load(t.model, source));
    ck_assert_ok(optimizer_create(t.model, &plain->optimizer->options, NULL, &t.optimizer));
    source_close(source);
    return t;
}

static TinyTrainer plain_trainer(void) {
    ModelConfig config = tiny_config();
    OptimizerOptions options = tiny_options();
    return tiny_trainer(&config, &options, 1);
}

static const ProfileRow *find_row(const Profile *profile, const char *name) {
    const ProfileRow *const *rows;
    int count = profile_rows(profile, &rows);
    for (int i = 0; i < count; i++)
        if (strcmp(rows[i]->name, name) == 0) return rows[i];
    ck_abort_msg("no row %s", name);
}

START_TEST(results_are_the_same_bits) {
    Profile *profile;
    TinyTrainer plain = plain_trainer(), watched = watched_trainer(&plain, &profile);
    ck_assert_int_eq(watched.backend->compute_dtype, plain.backend->compute_dtype);
    ck_assert_int_eq(watched.backend->num_threads, plain.backend->num_threads);
    two_steps(&plain);
    ck_assert_ok(profile_start(profile, 1));
    two_steps(&watched);
    ck_assert_ok(profile_stop(profile));
    expect_same_arena(&plain, &watched, plain.model->master, watched.model->master);
    expect_same_arena(&plain, &watched, plain.model->grads, watched.model->grads);
    expect_same_arena(&plain, &watched, plain.optimizer->v, watched.optimizer->v);
    ck_assert_int_eq(find_row(profile, "ffn forward")->calls, 2); // one dense layer, two steps
    ck_assert_int_eq(find_row(profile, "moe_ffn backward")->calls, 2);
    ck_assert_int_eq(find_row(profile, "linear forward")->calls, 2 * 2 * 2);
    tiny_trainer_free(&watched); // and with it the profile, but not the backend behind it
    tiny_trainer_free(&plain);
}
END_TEST

// A recording begins empty, and its room follows the one before.
START_TEST(recordings_do_not_add_up) {
    Profile *profile;
    TinyTrainer plain = plain_trainer(), t = watched_trainer(&plain, &profile);
    two_steps(&t); // not recorded
    for (int i = 0; i < 3; i++) {
        ck_assert_ok(profile_start(profile, 1));
        two_steps(&t);
        ck_assert_ok(profile_stop(profile));
        ck_assert_int_eq(find_row(profile, "attention forward")->calls, 4);
        ck_assert_double_gt(profile_total_ms(profile), 0);
    }
    // 2 layers, 1 x 4 tokens, 4 heads of 8: one causal product is 2*4*4*32/2 FLOPs, two a call.
    ck_assert(find_row(profile, "attention forward")->work.flops == 4 * 2 * 512.0);
    tiny_trainer_free(&t);
    tiny_trainer_free(&plain);
}
END_TEST

// A group that is split from a profile's communicator is a profile's, too.
START_TEST(groups_of_ranks_are_recorded) {
    const int no_peer = -1;
    const CommunicatorLinks alone = {.world = 1, .sockets = &no_peer};
    const CommunicatorOptions options = {.timeout_seconds = 5};
    Communicator *inner, *outer, *group;
    CommTicket ticket;
    Profile *profile;
    Backend *backend;
    double value = 3;
    ck_assert_ok(backend_cpu(1, &backend));
    ck_assert_ok(profile_create(backend, &profile));
    ck_assert_ok(communicator_tcp(&alone, &options, &inner));
    ck_assert_ok(profile_communicator(profile, inner, &outer));
    ck_assert_ok(outer->ops->split(outer, 4, &group));
    ck_assert_int_eq(group->world, 1);
    ck_assert_ptr_null(group->ops->lost(group)); // nor does the one behind it have that function
    ck_assert_ok(profile_start(profile, 1));
    ck_assert_ok(group->ops->all_reduce(group, &value, 1, COMM_F64, COMM_SUM, &ticket));
    ck_assert_ok(group->ops->wait(group, ticket));
    ck_assert_ok(profile_stop(profile));
    ck_assert_int_eq(find_row(profile, "all_reduce")->calls, 1);
    ck_assert_int_eq(find_row(profile, "wait for ranks")->calls, 1);
    ck_assert_double_eq(value, 3);
    communicator_destroy(group);
    communicator_destroy(outer);
    communicator_destroy(inner);
    profile_destroy(profile);
    backend_destroy(backend);
}
END_TEST

// --- Limits --------------------------------------------------------------------------------------

START_TEST(a_profile_has_no_op_that_the_backend_lacks) {
    Profile *profile;
    Backend *backend;
    ck_assert_ok(backend_cpu(1, &backend));
    ck_assert_ok(profile_create(backend, &profile));
    ck_assert(profile_backend(profile)->ops->accumulate != NULL);
    profile_destroy(profile);
    BackendOps fewer = *backend->ops;
    fewer.accumulate = NULL;
    backend->ops = &fewer;
    ck_assert_ok(profile_create(backend, &profile));
    ck_assert(profile_backend(profile)->ops->accumulate == NULL);
    profile_destroy(profile);
    backend_destroy(backend);
}
END_TEST

// Nothing else calls these on one rank.
START_TEST(rows_between_orders_are_timed) {
    Profile *profile;
    Backend *backend;
    const int32_t index[2] = {1, 0};
    const float in[4] = {1, 2, 3, 4};
    float rows[4], out[2];
    GatherRowsArgs gather = {2, 8, 1, index, in, rows};
    CombineRowsArgs combine = {1, 2, 2, index, rows, out};
    ck_assert_ok(backend_cpu(1, &backend));
    ck_assert_ok(profile_create(backend, &profile));
    Backend *watched = profile_backend(profile);
    ck_assert_ok(profile_start(profile, 1));
    ck_assert_ok(watched->ops->gather_rows(watched, &gather));
    ck_assert_ok(watched->ops->combine_rows(watched, &combine));
    ck_assert_ok(profile_stop(profile));
    ck_assert(rows[0] == 3 && rows[1] == 4 && rows[2] == 1 && rows[3] == 2);
    ck_assert(out[0] == 4 && out[1] == 6);
    ck_assert(find_row(profile, "gather_rows")->work.bytes == 8 + 16 + 16);
    ck_assert(find_row(profile, "combine_rows")->work.bytes == 8 + 16 + 8);
    profile_destroy(profile);
    backend_destroy(backend);
}
END_TEST

START_TEST(devices_are_known_by_name) {
    ck_assert(device_peak("NVIDIA H200", DTYPE_BF16).flops == 989e12);
    ck_assert(device_peak("NVIDIA H200", DTYPE_BF16).bytes_per_second == 4800e9);
    ck_assert(device_peak("NVIDIA GH200 480GB", DTYPE_BF16).bytes_per_second == 4000e9);
    ck_assert(device_peak("NVIDIA H100 80GB HBM3", DTYPE_BF16).bytes_per_second == 3350e9);
    ck_assert(device_peak("NVIDIA H100 PCIe", DTYPE_BF16).flops == 756e12);
    ck_assert(device_peak("NVIDIA A100-SXM4-80GB", DTYPE_BF16).bytes_per_second == 2039e9);
    ck_assert(device_peak("NVIDIA H200", DTYPE_F32).flops == 0);
    ck_assert(device_peak("Orin", DTYPE_BF16).flops == 0);
    ck_assert(device_peak("CPU", DTYPE_F32).bytes_per_second == 0);
}
END_TEST

START_TEST(the_nearer_limit_counts) {
    DevicePeak peak = {100e9, 10e9}, unknown = {0, 0};
    ProfileRow row = {.name = "x", .work = {50e6, 1e6}, .ms = 1};
    // 0.5 ms by FLOPs, 0.1 ms by bytes.
    ProfileRate rate = profile_rate(&row, &peak);
    ck_assert(rate.flops);
    ck_assert_double_eq_tol(rate.value, 50e9, 1);
    ck_assert_double_eq_tol(rate.share, 0.5, 1e-12);
    row.work.bytes = 8e6; // 0.8 ms
    rate = profile_rate(&row, &peak);
    ck_assert(!rate.flops);
    ck_assert_double_eq_tol(rate.value, 8e9, 1);
    ck_assert_double_eq_tol(rate.share, 0.8, 1e-12);
    row.host = true;
    ck_assert(isnan(profile_rate(&row, &peak).share));
    row.host = false;
    rate = profile_rate(&row, &unknown);
    ck_assert(!rate.flops && isnan(rate.share));
    row.product = true;
    rate = profile_rate(&row, &unknown);
    ck_assert(rate.flops && isnan(rate.share));
}
END_TEST

// --- The command ---------------------------------------------------------------------------------

static json_t *read_profile(const char *run) {
    json_t *root;
    ck_assert_ok(json_read_file(tiny_run_path(run, "profile.json"), 1 << 20, &root));
    return root;
}

static const json_t *find_op(const json_t *profile, const char *name) {
    size_t index;
    json_t *op;
    json_array_foreach(json_object_get(profile, "ops"), index, op) {
        if (strcmp(json_string_value(json_object_get(op, "op")), name) == 0) return op;
    }
    return NULL;
}

static double real(const json_t *object, const char *key) {
    const json_t *value = json_object_get(object, key);
    ck_assert_msg(json_is_number(value), "%s is not a number", key);
    return json_number_value(value);
}

static void expect_ops(const json_t *profile, const char *const *names, int count) {
    for (int i = 0; i < count; i++)
        ck_assert_msg(find_op(profile, names[i]) != NULL, "no op %s", names[i]);
}

static void expect_whole(const json_t *profile) {
    double sum = real(profile, "outside_ops_ms"), step = real(profile, "step_ms"), share = 0;
    size_t index;
    json_t *op;
    json_array_foreach(json_object_get(profile, "ops"), index, op) {
        sum += real(op, "ms");
        share += real(op, "share");
        ck_assert_double_ge(real(op, "calls"), 1);
        ck_assert(json_is_null(json_object_get(op, "share_of_limit"))); // of a CPU
    }
    ck_assert_double_eq_tol(sum, step, 1e-9 * step); // rounding
    ck_assert_double_ge(real(profile, "outside_ops_ms"), 0);
    ck_assert_double_gt(share, 0.2); // the tiny model's ops take microseconds each
    ck_assert_double_le(share, 1 + 1e-9);
}

START_TEST(a_profile_names_every_op) {
    static const char *const everywhere[] = {"embed forward",
                                             "embed backward",
                                             "rmsnorm forward",
                                             "rmsnorm backward",
                                             "linear forward",
                                             "linear backward",
                                             "rope forward",
                                             "rope backward",
                                             "attention forward",
                                             "attention backward",
                                             "linear_cross_entropy",
                                             "adamw",
                                             "norm2",
                                             "zero",
                                             "upload",
                                             "download"};
    static const char *const dense[] = {"ffn forward", "ffn backward"};
    static const char *const moe[] = {"route forward", "route backward", "router_loss",
                                      "moe_ffn forward", "moe_ffn backward"};
    enum { EVERYWHERE = sizeof everywhere / sizeof everywhere[0] };
    const TinyRun profiled = {.options = {.profile_steps = 3}};
    tiny_prepare();
    Recipe recipe = tiny_moe_recipe("moe");
    tiny_set(&recipe, "lfuc.elsewhere=dense");
    recipe.export_hf = false; // Hugging Face's formats hold no mixture of dense layers and experts
    expect_exit(&recipe, &profiled, STATUS_OK);
    json_t *profile = read_profile("moe-profile");
    expect_ops(profile, everywhere, EVERYWHERE);
    expect_ops(profile, dense, 2);
    expect_ops(profile, moe, 5);
    expect_whole(profile);
    ck_assert(json_is_null(json_object_get(profile, "mfu")));
    ck_assert_int_eq(json_integer_value(json_object_get(profile, "steps")), 3);
    // 3 layers x 2 micro-batches.
    ck_assert_double_eq(real(find_op(profile, "attention forward"), "calls"), 6);
    json_decref(profile);
}
END_TEST

// The program itself: exit code 0, the table on stdout and nothing else there.
START_TEST(the_program_prints_the_table) {
    char path[IO_PATH_MAX], command[3 * IO_PATH_MAX], output[8192], *text;
    tiny_prepare();
    Recipe recipe = tiny_dense_recipe("printed");
    ck_assert_ok(recipe_print(&recipe, &text));
    ck_assert_ok(io_path(path, "%s/printed.ini", test_directory()));
    ck_assert_ok(io_write_file_atomic(path, text, strlen(text)));
    free(text);
    snprintf(command, sizeof command, "%s/bin/train --recipe %s --profile 2", TEST_BINARY_DIR,
             path);
    FILE *pipe = popen(command, "r");
    ck_assert_ptr_nonnull(pipe);
    output[fread(output, 1, sizeof output - 1, pipe)] = '\0';
    ck_assert_int_eq(pclose(pipe), 0);
    ck_assert_msg(strncmp(output, "op ", 3) == 0, "%s", output);
    ck_assert_msg(strstr(output, "\nffn backward ") != NULL, "%s", output);
    ck_assert_msg(strstr(output, "\noutside ops ") != NULL, "%s", output);
    ck_assert_msg(strstr(output, "tok/s, MFU n/a\n") != NULL, "%s", output);
    ck_assert(io_exists(tiny_run_path("printed-profile", "profile.json")));
    ck_assert(!io_exists(tiny_run_path("printed", "")));
}
END_TEST

// Before, between and after: the run neither sees the profile nor misses anything.
START_TEST(a_profile_leaves_the_run_alone) {
    tiny_prepare();
    Recipe plain = tiny_moe_recipe("plain"), recipe = tiny_moe_recipe("both");
    TinyRun profiled = {.options = {.profile_steps = 2}};
    expect_exit(&plain, NULL, STATUS_OK);
    expect_exit(&recipe, &profiled, STATUS_OK);
    ck_assert(!io_exists(tiny_run_path("both", "")));
    expect_exit(&recipe, NULL, STATUS_OK);
    expect_exit(&recipe, &profiled, STATUS_OK); // the finished run's recipe, from its beginning
    expect_same_run("plain", "both");
    ck_assert(!io_exists(tiny_run_path("both", "profile.json")));
    ck_assert(!io_exists(tiny_run_path("both-profile", "result.json")));
    // With the weights that the run has reached, beyond its last step.
    char from[IO_PATH_MAX], hex[HASH_HEX_SIZE];
    snprintf(from, sizeof from, "%s", tiny_run_path("both", ""));
    profiled.options.resume = RESUME_FROM;
    profiled.options.resume_path = from;
    expect_exit(&recipe, &profiled, STATUS_OK);
    expect_same_run("plain", "both");
    ck_assert_int_eq(tiny_newest("both", "state.json", hex), TINY_STEPS);
    int64_t step;
    char path[IO_PATH_MAX];
    ck_assert_ok(checkpoint_find(tiny_run_path("both-profile", "checkpoints"), &step, path));
    ck_assert_int_eq(step, -1);
}
END_TEST

TEST_MAIN("profile", TEST(results_are_the_same_bits), TEST(recordings_do_not_add_up),
          TEST(groups_of_ranks_are_recorded), TEST(a_profile_has_no_op_that_the_backend_lacks),
          TEST(rows_between_orders_are_timed), TEST(devices_are_known_by_name),
          TEST(the_nearer_limit_counts), TEST(a_profile_names_every_op),
          TEST(the_program_prints_the_table), TEST(a_profile_leaves_the_run_alone))
