// Batches: the right tokens in the right order, on any number of ranks and after any interruption.
#include <fcntl.h>
#include <pthread.h>
#include "tests/shard_fixture.h"

enum { VOCAB = 1009, SEQUENCE = 16 };

static LoaderConfig make_config(const char *directory) {
    return (LoaderConfig){.sources = {{directory, 1}},
                          .num_sources = 1,
                          .sequence_length = SEQUENCE,
                          .micro_batch = 4,
                          .global_batch = 24,
                          .world = 1,
                          .seed = 7,
                          .prefetch_steps = 2,
                          .tokenizer_id = ""};
}

static DatasetSpec spec_of(uint64_t tokens, int shards) {
    return (DatasetSpec){
        .num_tokens = tokens, .num_shards = shards, .vocab_size = VOCAB, .token_bytes = 4};
}

// A copy: fixture_dataset returns a static buffer.
static char *make_dataset(const char *name, uint64_t tokens, int shards) {
    DatasetSpec spec = spec_of(tokens, shards);
    return strdup(fixture_dataset(name, &spec));
}

// All tokens and targets of a step in a row, for comparisons.
static void append_step(const StepBatch *step, int32_t *out, int64_t *count) {
    for (int m = 0; m < step->num_micro; m++) {
        const MicroBatch *micro = &step->micro[m];
        for (int64_t i = 0; i < micro->batch * micro->sequence_length; i++) {
            out[(*count)++] = micro->tokens[i];
            out[(*count)++] = micro->targets[i];
        }
    }
}

static int32_t *record_steps(const LoaderConfig *config, const LoaderState *resume, int steps,
                             int64_t *count) {
    Loader *loader;
    const StepBatch *step;
    *count = 0;
    ck_assert_ok(loader_open(config, resume, &loader));
    int32_t *out = NULL;
    for (int s = 0; s < steps; s++) {
        ck_assert_ok(loader_next(loader, &step));
        if (!out) {
            size_t values = 2 * (size_t)step->num_micro * (size_t)config->micro_batch * SEQUENCE;
            out = calloc((size_t)steps * values, sizeof *out);
            ck_assert_ptr_nonnull(out);
        }
        append_step(step, out, count);
    }
    loader_close(loader);
    return out;
}

// The window that a row shows: its first token's place, found from the fixture's pattern.
static int64_t window_of(const int32_t *tokens, const int32_t *targets, int64_t windows) {
    for (int64_t w = 0; w < windows; w++) {
        bool same = true;
        for (int64_t t = 0; t < SEQUENCE && same; t++) {
            uint64_t at = (uint64_t)(w * SEQUENCE + t);
            same = tokens[t] == (int32_t)fixture_token(at, VOCAB) &&
                   targets[t] == (int32_t)fixture_token(at + 1, VOCAB);
        }
        if (same) return w;
    }
    return -1;
}

START_TEST(an_epoch_shows_every_window_once) {
    // 53 windows, across five shards whose borders fall inside windows.
    char *directory = make_dataset("epoch", 53 * SEQUENCE + 9, 5);
    LoaderConfig config = make_config(directory);
    config.global_batch = 53;
    config.micro_batch = 53;
    Loader *loader;
    const StepBatch *step;
    int64_t first_order[53], identical = 0, in_place = 0;
    ck_assert_ok(loader_open(&config, NULL, &loader));
    ck_assert_uint_eq(loader_samples(loader, 0), 53);
    ck_assert_uint_eq(loader_tokens(loader, 0), 53 * SEQUENCE + 9);
    ck_assert_int_eq(loader_vocab_size(loader), VOCAB);
    for (int epoch = 0; epoch < 3; epoch++) {
        int seen[53] = {0};
        ck_assert_ok(loader_next(loader, &step));
        ck_assert_int_eq(step->valid_targets, 53 * SEQUENCE);
        ck_assert_uint_eq(step->first_sample, (uint64_t)epoch * 53);
        for (int row = 0; row < 53; row++) {
            int64_t window = window_of(step->micro[0].tokens + row * SEQUENCE,
                                       step->micro[0].targets + row * SEQUENCE, 53);
            ck_assert_int_ge(window, 0);
            ck_assert_int_eq(seen[window]++, 0);
            if (epoch == 0) first_order[row] = window;
            if (epoch == 1) identical += first_order[row] == window;
            in_place += window == row;
        }
    }
    // Shuffled, and differently in each epoch. Agreements are Poisson with mean 1 (3 for the sum):
    // these bounds are exceeded by chance with p < 1e-6.
    ck_assert_int_lt(identical, 11);
    ck_assert_int_lt(in_place, 17);
    loader_close(loader);
    free(directory);
}
END_TEST

START_TEST(ranks_share_one_global_order) {
    char *directory = make_dataset("ranks", 4000, 3);
    LoaderConfig config = make_config(directory);
    enum { STEPS = 25, ROW = 2 * SEQUENCE, GLOBAL = 24 };
    int64_t count;
    config.micro_batch = 1;
    int32_t *alone = record_steps(&config, NULL, STEPS, &count);
    ck_assert_int_eq(count, STEPS * GLOBAL * ROW);
    const int worlds[] = {2, 3, 4, 8};
    for (int w = 0; w < 4; w++) {
        config.world = worlds[w];
        for (config.rank = 0; config.rank < config.world; config.rank++) {
            int64_t own;
            int32_t *mine = record_steps(&config, NULL, STEPS, &own);
            ck_assert_int_eq(own * config.world, count);
            const int64_t share = GLOBAL / config.world; // rows of a step, one after the other
            for (int64_t row = 0; row < own / ROW; row++) {
                int64_t global = row / share * GLOBAL + config.rank * share + row % share;
                ck_assert_msg(memcmp(mine + row * ROW, alone + global * ROW, ROW * 4) == 0,
                              "world %d rank %d row %d", config.world, config.rank, (int)row);
            }
            free(mine);
        }
    }
    free(alone);
    free(directory);
}
END_TEST

// A micro-batch holds the same samples wherever it is computed.
START_TEST(micro_batches_are_the_same_on_every_world) {
    char *directory = make_dataset("micro", 4000, 1);
    LoaderConfig config = make_config(directory);
    enum { MICRO = 4 * 2 * SEQUENCE, ALL = 6 };
    int64_t count;
    int32_t *alone = record_steps(&config, NULL, 1, &count);
    ck_assert_int_eq(count, ALL * MICRO);
    const int worlds[] = {2, 3, 6};
    for (int w = 0; w < 3; w++) {
        config.world = worlds[w];
        for (config.rank = 0; config.rank < config.world; config.rank++) {
            int32_t *mine = record_steps(&config, NULL, 1, &count);
            ck_assert_int_eq(count * config.world, ALL * MICRO);
            ck_assert_mem_eq(mine, alone + config.rank * count, (size_t)count * sizeof *mine);
            free(mine);
        }
    }
    free(alone);
    free(directory);
}
END_TEST

START_TEST(uneven_ranks_make_equal_micro_batches) {
    char *directory = make_dataset("uneven", 4000, 1);
    LoaderConfig config = make_config(directory);
    config.global_batch = 9; // five micro-batches, the last half empty: 2, 2, 1 and none
    config.world = 4;
    config.micro_batch = 2;
    const int64_t rows[] = {4, 4, 1, 0};
    for (config.rank = 0; config.rank < config.world; config.rank++) {
        Loader *loader;
        const StepBatch *step;
        ck_assert_ok(loader_open(&config, NULL, &loader));
        ck_assert_ok(loader_next(loader, &step));
        ck_assert_int_eq(step->num_micro, 2);
        ck_assert_int_eq(step->valid_targets, 9 * SEQUENCE); // of all ranks
        for (int64_t row = 0; row < 4; row++) {
            const MicroBatch *micro = &step->micro[row / 2];
            for (int64_t t = row % 2 * SEQUENCE; t < (row % 2 + 1) * SEQUENCE; t++) {
                ck_assert_int_eq(micro->targets[t] == -1, row >= rows[config.rank]);
                if (row >= rows[config.rank]) ck_assert_int_eq(micro->tokens[t], 0);
            }
        }
        loader_close(loader);
    }
    free(directory);
}
END_TEST

// Two sources, weights 3 : 1, epochs of 12 and 31 windows: borders fall everywhere in 40 steps.
static LoaderConfig two_sources(char **a, char **b) {
    *a = make_dataset("two-a", 12 * SEQUENCE + 1, 2);
    *b = make_dataset("two-b", 31 * SEQUENCE + 5, 1);
    LoaderConfig config = make_config(*a);
    config.sources[0].weight = 3;
    config.sources[1] = (LoaderSource){*b, 1};
    config.num_sources = 2;
    config.global_batch = 5;
    config.micro_batch = 2;
    return config;
}

START_TEST(resume_at_every_step) {
    enum { STEPS = 40 };
    char *a, *b;
    LoaderConfig config = two_sources(&a, &b);
    Loader *loader;
    const StepBatch *step;
    LoaderState states[STEPS + 1] = {{.seed = config.seed, .num_sources = 2}};
    int64_t count, rest;
    int32_t *whole = record_steps(&config, NULL, STEPS, &count);
    ck_assert_ok(loader_open(&config, NULL, &loader));
    for (int s = 0; s < STEPS; s++) {
        ck_assert_ok(loader_next(loader, &step));
        ck_assert_uint_eq(step->first_sample, 5 * (uint64_t)s);
        states[s + 1] = step->after;
        uint64_t consumed = step->after.consumed[0] + step->after.consumed[1];
        ck_assert_uint_eq(consumed, 5 * (uint64_t)(s + 1));
        double share = 0.75 * (double)consumed;
        ck_assert_double_lt((double)step->after.consumed[0], share + 1);
        ck_assert_double_gt((double)step->after.consumed[0], share - 1);
    }
    loader_close(loader);
    for (int s = 0; s < STEPS; s++) {
        int32_t *tail = record_steps(&config, &states[s], STEPS - s, &rest);
        ck_assert_msg(memcmp(tail, whole + (count - rest), (size_t)rest * 4) == 0, "step %d", s);
        free(tail);
    }
    free(whole);
    free(a);
    free(b);
}
END_TEST

START_TEST(prefetch_depth_does_not_matter) {
    char *a, *b;
    LoaderConfig config = two_sources(&a, &b);
    int64_t count, other;
    int32_t *one = record_steps(&config, NULL, 20, &count);
    config.prefetch_steps = 7;
    int32_t *seven = record_steps(&config, NULL, 20, &other);
    ck_assert_int_eq(count, other);
    ck_assert(memcmp(one, seven, (size_t)count * 4) == 0);
    config.seed++;
    int32_t *seeded = record_steps(&config, NULL, 20, &other);
    ck_assert(memcmp(one, seeded, (size_t)count * 4) != 0);
    free(one);
    free(seven);
    free(seeded);
    free(a);
    free(b);
}
END_TEST

START_TEST(masks_follow_documents) {
    // Small shards, whose borders are document borders, too, even inside a pattern document.
    DatasetSpec spec = spec_of(40 * SEQUENCE + 1, 7);
    char *directory = strdup(fixture_dataset("masks", &spec));
    LoaderConfig config = make_config(directory);
    config.mask_documents = true;
    FixedPass *pass;
    MicroBatch batch;
    bool more;
    int64_t row = 0, masked = 0;
    ck_assert_ok(fixed_pass_open(&config, 0, &pass));
    for (;;) {
        ck_assert_ok(fixed_pass_next(pass, &batch, &more));
        if (!more) break;
        for (int64_t b = 0; b < batch.batch && row < 40; b++, row++) {
            int32_t start = 0;
            for (int64_t t = 0; t < SEQUENCE; t++) {
                uint64_t at = (uint64_t)(row * SEQUENCE + t);
                // A document starts at `at` if one ended before, by the pattern or by the shard.
                bool starts[2];
                for (int next = 0; next < 2; next++) {
                    uint64_t place = at + (uint64_t)next;
                    starts[next] = place == 0 || fixture_is_end(place - 1);
                    for (uint64_t s = 1; s < 7; s++)
                        starts[next] |= place == spec.num_tokens * s / 7;
                }
                if (starts[0]) start = (int32_t)t;
                int64_t i = b * SEQUENCE + t;
                ck_assert_int_eq(batch.tokens[i], (int32_t)fixture_token(at, VOCAB));
                ck_assert_int_eq(batch.document_start[i], start);
                int32_t target = starts[1] ? -1 : (int32_t)fixture_token(at + 1, VOCAB);
                ck_assert_int_eq(batch.targets[i], target);
                masked += starts[1];
            }
        }
    }
    ck_assert_int_eq(row, 40);
    ck_assert_int_gt(masked, 20); // about one in 17 of 640
    fixed_pass_close(pass);
    free(directory);
}
END_TEST

START_TEST(masked_steps_count_valid_targets) {
    char *directory = make_dataset("valid", 3000, 2);
    LoaderConfig config = make_config(directory);
    config.mask_documents = true;
    Loader *loader;
    const StepBatch *step;
    int64_t of_step[10];
    ck_assert_ok(loader_open(&config, NULL, &loader));
    for (int s = 0; s < 10; s++) {
        int64_t valid = 0;
        ck_assert_ok(loader_next(loader, &step));
        for (int m = 0; m < step->num_micro; m++) {
            ck_assert_ptr_nonnull(step->micro[m].document_start);
            for (int i = 0; i < 4 * SEQUENCE; i++) valid += step->micro[m].targets[i] >= 0;
        }
        ck_assert_int_eq(step->valid_targets, valid);
        ck_assert_int_lt(valid, 24 * SEQUENCE);
        ck_assert(step->wait_seconds >= 0);
        of_step[s] = valid;
    }
    loader_close(loader);
    // Every rank counts the targets of all.
    config.world = 3;
    for (config.rank = 0; config.rank < 3; config.rank++) {
        ck_assert_ok(loader_open(&config, NULL, &loader));
        for (int s = 0; s < 10; s++) {
            ck_assert_ok(loader_next(loader, &step));
            ck_assert_int_eq(step->valid_targets, of_step[s]);
        }
        loader_close(loader);
    }
    free(directory);
}
END_TEST

START_TEST(fixed_pass_in_file_order) {
    char *directory = make_dataset("fixed", 21 * SEQUENCE + 3, 2);
    LoaderConfig config = make_config(directory);
    FixedPass *pass;
    MicroBatch batch;
    bool more;
    ck_assert_ok(fixed_pass_open(&config, 0, &pass));
    for (int round = 0; round < 2; round++) { // the second time after a rewind
        int64_t row = 0;
        for (;;) {
            ck_assert_ok(fixed_pass_next(pass, &batch, &more));
            if (!more) break;
            ck_assert_int_eq(batch.batch, 4);
            for (int64_t b = 0; b < 4; b++, row++) {
                const int32_t *targets = batch.targets + b * SEQUENCE;
                if (row < 21) {
                    ck_assert_int_eq(window_of(batch.tokens + b * SEQUENCE, targets, 21), row);
                } else {
                    for (int t = 0; t < SEQUENCE; t++) ck_assert_int_eq(targets[t], -1);
                }
            }
        }
        ck_assert_int_eq(row, 24);
        fixed_pass_rewind(pass);
    }
    fixed_pass_close(pass);
    free(directory);
}
END_TEST

START_TEST(fixed_pass_spread_over_data_and_ranks) {
    char *directory = make_dataset("spread", 30 * SEQUENCE + 1, 1);
    LoaderConfig config = make_config(directory);
    config.world = 2;
    config.micro_batch = 2;
    // Seven of 30 windows: 0 4 8 12 17 21 25. Rank 0 takes the 1st, 3rd, ...
    const int64_t expected[2][4] = {{0, 8, 17, 25}, {4, 12, 21, -1}};
    for (config.rank = 0; config.rank < 2; config.rank++) {
        FixedPass *pass;
        MicroBatch batch;
        bool more;
        ck_assert_ok(fixed_pass_open(&config, 7, &pass));
        for (int i = 0; i < 2; i++) {
            ck_assert_ok(fixed_pass_next(pass, &batch, &more));
            ck_assert(more);
            for (int b = 0; b < 2; b++)
                ck_assert_int_eq(
                    window_of(batch.tokens + b * SEQUENCE, batch.targets + b * SEQUENCE, 30),
                    expected[config.rank][2 * i + b]);
        }
        ck_assert_ok(fixed_pass_next(pass, &batch, &more));
        ck_assert(!more);
        fixed_pass_close(pass);
    }
    free(directory);
}
END_TEST

START_TEST(plan_counts_the_buffers) {
    char *directory = make_dataset("plan", 1000, 1);
    LoaderConfig config = make_config(directory);
    MemoryPlan plan = {.count = 0}, masked = {.count = 0};
    ck_assert_ok(loader_plan(&config, &plan));
    config.mask_documents = true;
    ck_assert_ok(loader_plan(&config, &masked));
    uint64_t array = (uint64_t)3 * 24 * SEQUENCE * 4; // slots * rows * S * int32
    uint64_t bytes = memory_plan_total(&plan), masked_bytes = memory_plan_total(&masked);
    ck_assert_uint_gt(bytes, 2 * array);
    ck_assert_uint_lt(bytes, 2 * array + 16384); // the rest is bookkeeping
    ck_assert_uint_ge(masked_bytes, bytes + array);
    config.sequence_length = INT32_MAX - 1;
    config.global_batch = config.micro_batch = INT32_MAX;
    ck_assert_fails(loader_plan(&config, &plan), STATUS_USAGE, "too large");
    free(directory);
}
END_TEST

START_TEST(fingerprint_names_the_content) {
    char *a = make_dataset("print-a", 2000, 2), *b = make_dataset("print-b", 2000, 2);
    char *c = make_dataset("print-c", 2001, 2);
    const char *directories[] = {a, b, c};
    char prints[3][HASH_HEX_SIZE];
    for (int i = 0; i < 3; i++) {
        LoaderConfig config = make_config(directories[i]);
        Loader *loader;
        ck_assert_ok(loader_open(&config, NULL, &loader));
        loader_fingerprint(loader, prints[i]);
        loader_close(loader);
        free((char *)directories[i]);
    }
    ck_assert_str_eq(prints[0], prints[1]); // the place is not part of it
    ck_assert_str_ne(prints[0], prints[2]);
}
END_TEST

START_TEST(wrong_use_is_explained) {
    char *directory = make_dataset("use", 1000, 1);
    LoaderConfig config = make_config(directory);
    LoaderState state = {.seed = 8, .num_sources = 1};
    Loader *loader;
    ck_assert_fails(loader_open(&config, &state, &loader), STATUS_RECIPE_MISMATCH, "seed 8");
    state = (LoaderState){.seed = 7, .num_sources = 2};
    ck_assert_fails(loader_open(&config, &state, &loader), STATUS_RECIPE_MISMATCH, "2 sources");
    state = (LoaderState){.seed = 7, .num_sources = 1, .consumed = {UINT64_MAX}};
    ck_assert_fails(loader_open(&config, &state, &loader), STATUS_BAD_DATA, "2^62");
    config.sequence_length = 1000;
    ck_assert_fails(loader_open(&config, NULL, &loader), STATUS_BAD_DATA,
                    "has 1000 tokens, one sequence needs 1001");
    config = make_config("/nonexistent/shards");
    ck_assert_fails(loader_open(&config, NULL, &loader), STATUS_MISSING_INPUT,
                    "/nonexistent/shards");
    config = make_config(test_directory());
    ck_assert_fails(loader_open(&config, NULL, &loader), STATUS_MISSING_INPUT, "no shards.json");
    config = make_config(directory);
    config.prefetch_steps = 0;
    ck_assert_fails(loader_open(&config, NULL, &loader), STATUS_USAGE, "read ahead");
    config = make_config(directory);
    config.sources[0].weight = 0;
    ck_assert_fails(loader_open(&config, NULL, &loader), STATUS_USAGE, "weight");
    free(directory);
}
END_TEST

START_TEST(vocabulary_and_tokenizer_must_fit) {
    char *directory = make_dataset("fit", 1000, 1);
    DatasetSpec spec = spec_of(1000, 1);
    spec.tokenizer_id = "0000000000000000000000000000000000000000000000000000000000000001";
    char *other = strdup(fixture_dataset("fit-other", &spec));
    LoaderConfig config = make_config(directory);
    Loader *loader;
    config.vocab_size = VOCAB - 1;
    ck_assert_fails(loader_open(&config, NULL, &loader), STATUS_BAD_DATA,
                    "vocabulary of 1009 ids, the model's has 1008");
    config.vocab_size = VOCAB + 100; // embeddings are often padded
    config.tokenizer_id = spec.tokenizer_id;
    ck_assert_fails(loader_open(&config, NULL, &loader), STATUS_BAD_DATA, "tokenizer_sha256");
    config.tokenizer_id = FIXTURE_TOKENIZER;
    ck_assert_ok(loader_open(&config, NULL, &loader));
    loader_close(loader);
    config.tokenizer_id = "";
    config.sources[1] = (LoaderSource){other, 1};
    config.num_sources = 2;
    ck_assert_fails(loader_open(&config, NULL, &loader), STATUS_BAD_DATA, "disagree");
    free(directory);
    free(other);
}
END_TEST

START_TEST(failure_in_the_thread_reaches_the_consumer) {
    char *directory = make_dataset("failing", 4000, 1);
    LoaderConfig config = make_config(directory);
    Loader *loader;
    const StepBatch *step;
    char path[IO_PATH_MAX];
    ck_assert_ok(loader_open(&config, NULL, &loader));
    ck_assert_ok(loader_next(loader, &step));
    ck_assert_ok(io_path(path, "%s/shard-00000.h5", directory));
    ck_assert_int_eq(truncate(path, 2048), 0); // behind the loader's back
    Status status = STATUS_OK;
    for (int s = 0; s < 20 && status == STATUS_OK; s++) status = loader_next(loader, &step);
    ck_assert_int_eq(status, STATUS_BAD_DATA);
    ck_assert_ptr_nonnull(strstr(status_message(), "shard-00000.h5: ends early"));
    ck_assert_fails(loader_next(loader, &step), STATUS_BAD_DATA, "ends early"); // and again
    loader_close(loader);
    free(directory);
}
END_TEST

START_TEST(ids_are_checked_at_every_read) {
    char *directory = make_dataset("guard", 4000, 1);
    LoaderConfig config = make_config(directory);
    Loader *loader;
    const StepBatch *step;
    char path[IO_PATH_MAX];
    ck_assert_ok(loader_open(&config, NULL, &loader));
    ck_assert_ok(io_path(path, "%s/shard-00000.h5", directory));
    int fd = open(path, O_WRONLY);
    static const unsigned char ones[16384] = {[0 ... 16383] = 0xff};
    ck_assert_int_eq(pwrite(fd, ones, sizeof ones, 2048), sizeof ones);
    close(fd);
    Status status = STATUS_OK;
    for (int s = 0; s < 20 && status == STATUS_OK; s++) status = loader_next(loader, &step);
    ck_assert_int_eq(status, STATUS_BAD_DATA);
    ck_assert_ptr_nonnull(strstr(status_message(), "is id 4294967295"));
    loader_close(loader);
    free(directory);
}
END_TEST

START_TEST(bad_shards_are_skipped_on_request) {
    char *directory = make_dataset("skip", 3000, 3), path[IO_PATH_MAX];
    LoaderConfig config = make_config(directory);
    Loader *loader;
    const StepBatch *step;
    ck_assert_ok(io_path(path, "%s/shard-00001.h5", directory));
    ck_assert_int_eq(truncate(path, 3000), 0);
    ck_assert_fails(loader_open(&config, NULL, &loader), STATUS_BAD_DATA, "shard-00001.h5: has");
    config.skip_bad_shards = true;
    ck_assert_ok(loader_open(&config, NULL, &loader));
    ck_assert_int_eq(loader_skipped_shards(loader), 1);
    ck_assert_uint_eq(loader_tokens(loader, 0), 2000);
    for (int s = 0; s < 20; s++) ck_assert_ok(loader_next(loader, &step));
    loader_close(loader);
    ck_assert_ok(io_unlink(path)); // a missing file is a bad shard, too
    ck_assert_ok(loader_open(&config, NULL, &loader));
    ck_assert_int_eq(loader_skipped_shards(loader), 1);
    loader_close(loader);
    ck_assert_ok(io_path(path, "%s/shard-00000.h5", directory));
    ck_assert_ok(io_unlink(path));
    ck_assert_ok(io_path(path, "%s/shard-00002.h5", directory));
    ck_assert_ok(io_unlink(path));
    ck_assert_fails(loader_open(&config, NULL, &loader), STATUS_BAD_DATA, "all 3 shards are bad");
    free(directory);
}
END_TEST

START_TEST(narrow_tokens_read_the_same) {
    DatasetSpec spec = spec_of(3000, 2);
    char *wide = strdup(fixture_dataset("wide", &spec));
    spec.token_bytes = 2;
    char *narrow = strdup(fixture_dataset("narrow", &spec));
    LoaderConfig a = make_config(wide), b = make_config(narrow);
    int64_t count, other;
    int32_t *x = record_steps(&a, NULL, 8, &count), *y = record_steps(&b, NULL, 8, &other);
    ck_assert_int_eq(count, other);
    ck_assert(memcmp(x, y, (size_t)count * 4) == 0);
    free(x);
    free(y);
    free(wide);
    free(narrow);
}
END_TEST

START_TEST(closing_early_ends_the_thread) {
    char *directory = make_dataset("close", 4000, 1);
    LoaderConfig config = make_config(directory);
    for (int i = 0; i < 30; i++) { // with the thread in every state
        Loader *loader;
        const StepBatch *step;
        ck_assert_ok(loader_open(&config, NULL, &loader));
        for (int s = 0; s < i % 4; s++) ck_assert_ok(loader_next(loader, &step));
        loader_close(loader);
    }
    loader_close(NULL);
    fixed_pass_close(NULL);
    free(directory);
}
END_TEST

TEST_MAIN("loader", TEST(an_epoch_shows_every_window_once), TEST(ranks_share_one_global_order),
          TEST(micro_batches_are_the_same_on_every_world),
          TEST(uneven_ranks_make_equal_micro_batches), TEST(resume_at_every_step),
          TEST(prefetch_depth_does_not_matter), TEST(masks_follow_documents),
          TEST(masked_steps_count_valid_targets), TEST(fixed_pass_in_file_order),
          TEST(fixed_pass_spread_over_data_and_ranks), TEST(plan_counts_the_buffers),
          TEST(fingerprint_names_the_content), TEST(wrong_use_is_explained),
          TEST(vocabulary_and_tokenizer_must_fit), TEST(failure_in_the_thread_reaches_the_consumer),
          TEST(ids_are_checked_at_every_read), TEST(bad_shards_are_skipped_on_request),
          TEST(narrow_tokens_read_the_same), TEST(closing_early_ends_the_thread))
