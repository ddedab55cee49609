// ZeRO-1 without a trainer: ranks that own parts update and save what one optimizer would, to the
// bit. Gradients are multiples of 1/64, so that their sums are exact in any order.
#include "optim/pairwise.h"
#include "optim/traffic.h"
#include "tests/ranks.h"
#include "tests/tiny_trainer.h"
#include "train/checkpoint.h"
#include "train/team.h"

static const CommunicatorOptions comm_options = {.timeout_seconds = 20};
static char directory[160];

enum { STEPS = 3, WEIGHTS_SEED = 4 };

typedef struct Case {
    DType state_dtype;
    bool own_master; // as on a backend whose weights are bf16: the fp32 ones are shared out
    int64_t bucket_bytes;
} Case;

static float gradient(int64_t step, int rank, const Tensor *tensor, int64_t i) {
    uint64_t bits =
        random_u64((uint64_t)step * 16 + (uint64_t)rank, random_stream(tensor->name), (uint64_t)i);
    return (float)((int)(bits % 63) - 31) / 64;
}

// The gradients of one rank, or of `world` ranks together.
static void set_gradients(Model *model, int64_t step, int first, int last) {
    float *grads = model->grads; // the CPU's memory is ours to write in a test
    for (int t = 0; t < model->table.count; t++) {
        const Tensor *tensor = &model->table.tensors[t];
        for (int64_t i = 0; i < tensor->count; i++) {
            float sum = 0;
            for (int r = first; r <= last; r++) sum += gradient(step, r, tensor, i);
            grads[tensor->offset + i] = sum;
        }
    }
}

typedef struct Rank {
    Backend *backend;
    Team team;
    Model *model, *whole_model;
    Traffic *traffic;
    Optimizer *optimizer, *whole;
} Rank;

static Status open_rank(Communicator *c, const Case *what, Rank *r) {
    ModelConfig config = tiny_config();
    OptimizerOptions options = tiny_options();
    ModelOptions model_options = {.micro_batch = 1, .sequence_length = 4, .training = true};
    TensorSource *source = random_source(&config, WEIGHTS_SEED);
    options.state_dtype = what->state_dtype;
    TRY(backend_cpu(1, &r->backend));
    TRY(team_open(r->backend, c, &r->team));
    TRY(model_create(r->backend, &config, &model_options, &r->whole_model));
    TRY(optimizer_create(r->whole_model, &options, NULL, &r->whole));
    model_options.ranks = c->world;
    TRY(model_create(r->backend, &config, &model_options, &r->model));
    if (what->own_master) r->model->master = NULL;
    TRY(traffic_create(c, NULL, r->model, what->bucket_bytes, &r->traffic));
    TRY(optimizer_create(r->model, &options, r->traffic, &r->optimizer));
    TRY(model_load(r->model, source));
    TRY(model_load(r->whole_model, source));
    source_close(source);
    return STATUS_OK;
}

static void close_rank(Rank *r) {
    optimizer_destroy(r->optimizer);
    optimizer_destroy(r->whole);
    traffic_destroy(r->traffic);
    model_destroy(r->model);
    model_destroy(r->whole_model);
    team_close(&r->team);
    backend_destroy(r->backend);
}

static Status compare_weights(const Rank *r) {
    const TensorTable *mine = &r->model->table, *whole = &r->whole_model->table;
    for (int t = 0; t < mine->count; t++)
        EXPECT(memcmp((float *)r->model->params + mine->tensors[t].offset,
                      (float *)r->whole_model->params + whole->tensors[t].offset,
                      (size_t)mine->tensors[t].count * sizeof(float)) == 0,
               "%s", mine->tensors[t].name);
    return STATUS_OK;
}

static Status step(Rank *r, int64_t number) {
    double sums[2], norm;
    set_gradients(r->model, number, r->team.rank, r->team.rank);
    set_gradients(r->whole_model, number, 0, r->team.world - 1);
    TRY(traffic_reduce(r->traffic));
    TRY(optimizer_gradient_sums(r->optimizer, sums));
    TRY(team_sum(&r->team, sums, 2));
    TRY(optimizer_gradient_norm(r->whole, &norm));
    // Squares of multiples of 1/64 add up without rounding.
    EXPECT(optimizer_norm(sums) == norm, "%.17g, %.17g", optimizer_norm(sums), norm);
    TRY(optimizer_step(r->optimizer, 1e-2, norm));
    TRY(optimizer_step(r->whole, 1e-2, norm));
    TRY(traffic_settle(r->traffic));
    return compare_weights(r);
}

static Status save_together(Rank *r, const CheckpointOptions *options) {
    CheckpointWriter *writer;
    FileHash parts[RANKS_MAX] = {{0}};
    json_t *state = json_pack("{s:i}", "step", STEPS);
    TRY(checkpoint_writer_create(r->model, r->optimizer, options, &writer));
    TRY(checkpoint_begin(writer, STEPS, state));
    TRY(checkpoint_start(writer));
    TRY(team_agree(&r->team, checkpoint_wait(writer)));
    json_decref(state);
    parts[r->team.rank] = checkpoint_part(writer);
    TRY(team_gather(&r->team, parts, sizeof parts[0]));
    Status status = STATUS_OK;
    if (r->team.rank == 0) status = checkpoint_publish(writer, parts);
    if (status == STATUS_OK) status = checkpoint_wait(writer);
    checkpoint_writer_destroy(writer);
    return team_agree(&r->team, status);
}

// Loads what all have saved into an optimizer that is alone, and into this rank's own.
static Status load_and_compare(Rank *r, const char *path) {
    ModelConfig config = tiny_config();
    OptimizerOptions options = r->whole->options;
    TinyTrainer t = tiny_trainer(&config, &options, 99);
    const size_t count = (size_t)t.model->table.total;
    const size_t width = dtype_bytes(options.state_dtype);
    TRY(checkpoint_verify(path));
    TRY(checkpoint_load(path, t.model, t.optimizer));
    EXPECT(memcmp(t.model->params, r->whole_model->params, count * sizeof(float)) == 0);
    EXPECT(memcmp(t.optimizer->m, r->whole->m, count * width) == 0);
    EXPECT(memcmp(t.optimizer->v, r->whole->v, count * width) == 0);
    tiny_trainer_free(&t);
    // Spoiled, then loaded: this rank's parts are as they were.
    const size_t owned = (size_t)r->optimizer->partition->owned;
    char *m = malloc(owned * width);
    EXPECT(m);
    memcpy(m, r->optimizer->m, owned * width);
    memset(r->optimizer->m, 0, owned * width);
    if (r->optimizer->master) memset(r->optimizer->master, 0, owned * sizeof(float));
    memset(r->model->params, 0, (size_t)r->model->table.total * sizeof(float));
    TRY(checkpoint_load(path, r->model, r->optimizer));
    EXPECT(memcmp(m, r->optimizer->m, owned * width) == 0);
    free(m);
    TRY(compare_weights(r));
    return step(r, STEPS + 1); // and the next update is the one that one optimizer makes
}

static Status update_and_save(Communicator *c, void *context) {
    const Case *what = context;
    char path[IO_PATH_MAX];
    Rank r = {0};
    TRY(open_rank(c, what, &r));
    EXPECT(r.optimizer->partition->owned * c->world == r.model->table.total);
    EXPECT((r.optimizer->master != NULL) == what->own_master);
    for (int64_t i = 1; i <= STEPS; i++) TRY(step(&r, i));
    const CheckpointOptions options = {.directory = directory,
                                       .keep_last = 2,
                                       .dtype = DTYPE_F32,
                                       .rank = c->rank,
                                       .world = c->world,
                                       .tag = 7};
    TRY(save_together(&r, &options));
    TRY(checkpoint_path(directory, STEPS, path));
    TRY(load_and_compare(&r, path));
    close_rank(&r);
    return STATUS_OK;
}

START_TEST(ranks_update_and_save_what_one_optimizer_would) {
    const Case cases[] = {{DTYPE_F32, false, 2048},
                          {DTYPE_BF16, false, 1 << 20},
                          {DTYPE_F32, true, 2048},
                          {DTYPE_BF16, true, 10000}};
    for (int i = 0; i < 4; i++) {
        for (int world = 2; world <= 5; world++) {
            snprintf(directory, sizeof directory, "%s/c%d-%d", test_directory(), i, world);
            Case what = cases[i];
            ranks_expect_ok(world, &comm_options, update_and_save, &what);
        }
    }
}
END_TEST

// Rank 1 writes to a disk of its own.
static Status save_apart(Communicator *c, void *context) {
    const Case *what = context;
    char own[sizeof directory + 8];
    Rank r = {0};
    TRY(open_rank(c, what, &r));
    snprintf(own, sizeof own, "%s%s", directory, c->rank == 1 ? "-own" : "");
    const CheckpointOptions options = {.directory = own,
                                       .keep_last = 2,
                                       .dtype = DTYPE_F32,
                                       .rank = c->rank,
                                       .world = c->world,
                                       .tag = 7};
    Status status = save_together(&r, &options);
    close_rank(&r);
    return status;
}

START_TEST(a_rank_that_writes_elsewhere_is_named) {
    Case what = {DTYPE_F32, false, 2048};
    snprintf(directory, sizeof directory, "%s/apart", test_directory());
    ranks_start(3, &comm_options, save_apart, &what);
    ranks_join(3);
    for (int r = 0; r < 3; r++)
        ranks_expect(r, STATUS_CANNOT_WRITE, "rank 1 has written it, but rank 0 does not see it");
}
END_TEST

// --- Memory --------------------------------------------------------------------------------------

START_TEST(plan_is_one_part_for_each_rank) {
    ModelConfig config = tiny_config();
    OptimizerOptions options = tiny_options();
    for (int ranks = 2; ranks <= 7; ranks++) {
        MemoryPlan plan = {.count = 0}, saves = {.count = 0}, first = {.count = 0};
        CheckpointOptions checkpoint = {.rank = 1, .world = ranks};
        TensorTable table;
        ck_assert_ok(tensor_table_build(&config, &table));
        ck_assert_ok(tensor_table_pad(&table, ranks));
        uint64_t owned = (uint64_t)(table.total / ranks);
        ck_assert_ok(optimizer_plan(&table, &options, DTYPE_F32, ranks, &plan));
        ck_assert_uint_eq(memory_plan_total(&plan), owned * 8);
        ck_assert_ok(optimizer_plan(&table, &options, DTYPE_BF16, ranks, &plan));
        ck_assert_uint_eq(memory_plan_total(&plan), owned * (8 + 8 + 4));
        ck_assert_ok(checkpoint_plan(&table, &table, DTYPE_F32, DTYPE_F32, &checkpoint, &saves));
        ck_assert_uint_eq(memory_plan_total(&saves), owned * 12);
        checkpoint.rank = 0; // which also writes model.safetensors
        ck_assert_ok(checkpoint_plan(&table, &table, DTYPE_F32, DTYPE_F32, &checkpoint, &first));
        ck_assert_uint_eq(memory_plan_total(&first), owned * 12 + (uint64_t)table.total * 4);
        tensor_table_free(&table);
    }
}
END_TEST

// --- Sums in pairs -------------------------------------------------------------------------------

// The tree over leaves [first, first + count) that a binary counter makes.
static float tree(const float *leaves, int count) {
    if (count == 1) return leaves[0];
    int left = 1;
    while (left * 2 < count) left *= 2;
    return tree(leaves, left) + tree(leaves + left, count - left);
}

START_TEST(pairs_are_added_as_a_tree) {
    ModelConfig config = tiny_config();
    OptimizerOptions options = tiny_options();
    TinyTrainer t = tiny_trainer(&config, &options, 1);
    float *grads = t.model->grads, leaves[13];
    Pairwise *pairwise;
    MemoryPlan plan = {.count = 0};
    int other_order = 0;
    ck_assert_ok(pairwise_create(t.model, 13, 2, &pairwise));
    ck_assert_ok(pairwise_plan(&t.model->table, 13, &plan));
    ck_assert_uint_eq(memory_plan_total(&plan), (uint64_t)t.model->table.total * 4 * 4 +
                                                    (uint64_t)pairwise_blocks(pairwise) * 16);
    for (int count = 1; count <= 13; count++) {
        double sums[2];
        float sum = 0;
        for (int i = 0; i < count; i++) {
            leaves[i] = (float)((i * 37) % 29 + 1) / 7;
            for (int64_t j = 0; j < t.model->table.total; j++) grads[j] = leaves[i];
            sums[0] = i;
            sums[1] = 1;
            sum += leaves[i];
            ck_assert_ok(pairwise_add(pairwise, sums));
        }
        ck_assert_ok(pairwise_finish(pairwise, sums));
        float expected = tree(leaves, count);
        for (int64_t j = 0; j < t.model->table.total; j++) ck_assert(grads[j] == expected);
        ck_assert(sums[0] == count * (count - 1) / 2 && sums[1] == count);
        other_order += sum != expected;
    }
    ck_assert_int_gt(other_order, 0); // one after the other gives other bits
    pairwise_destroy(pairwise);
    tiny_trainer_free(&t);
}
END_TEST

TEST_MAIN("sharded optimizer", TEST(ranks_update_and_save_what_one_optimizer_would),
          TEST(a_rank_that_writes_elsewhere_is_named), TEST(plan_is_one_part_for_each_rank),
          TEST(pairs_are_added_as_a_tree))
