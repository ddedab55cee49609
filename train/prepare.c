// From a recipe to what a run works with: backend, model source, data.
//
// What can be wrong with the inputs is looked for first (prepare_check_inputs), before a run
// directory exists and before minutes go into a calibration.
#include "train/prepare.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include "base/file.h"
#include "base/log.h"
#include "train/device.h"
#include "train/recipe_lists.h"

enum { CONFIG_JSON_MAX = 16 << 20 };

// --- Backend and options --------------------------------------------------------------------

static DeviceOptions device_options(const Recipe *recipe, int local_rank) {
    bool narrow = recipe->train_grad_dtype == GRADIENTS_BF16;
    return (DeviceOptions){.choice = recipe->run_device,
                           .local_rank = local_rank,
                           .threads = (int)recipe->run_threads,
                           .fp32 = recipe->run_gpu_precision == PRECISION_FP32,
                           .graphs = recipe->run_gpu_graphs,
                           .any_order = !recipe->run_deterministic,
                           .grad_dtype = narrow ? DTYPE_BF16 : DTYPE_F32};
}

Status prepare_backend(const Recipe *recipe, int local_rank, Backend **out) {
    DeviceOptions options = device_options(recipe, local_rank);
    return device_open(&options, out);
}

// The setting that asks for a file of fp32 weights, which no rank of several in bf16 has whole; or
// NULL.
static const char *wants_fp32_files(const Recipe *recipe) {
    if (recipe->checkpoint_dtype == WEIGHTS_F32) return "checkpoint.dtype";
    return recipe->export_hf && recipe->export_dtype == WEIGHTS_F32 ? "export.dtype" : NULL;
}

int prepare_ranks(const Recipe *recipe) {
    if (recipe->parallel_processes > 0) return (int)recipe->parallel_processes;
    const DeviceOptions options = device_options(recipe, 0);
    const int devices = device_count(&options);
    const bool narrow = recipe->run_gpu_precision != PRECISION_FP32;
    // What several ranks on GPUs cannot do one can.
    const char *alone = recipe->parallel_pairwise ? "parallel.pairwise"
                        : narrow                  ? wants_fp32_files(recipe)
                                                  : NULL;
    int ranks = alone ? 1 : devices;
    while (ranks > 1 && (recipe->train_global_batch % (recipe->train_micro_batch * ranks) != 0 ||
                         ranks % recipe->parallel_expert != 0))
        ranks--;
    if (alone && devices > 1)
        log_info("1 of %d visible GPUs, because of %s", devices, alone);
    else if (ranks < devices)
        log_info("%d of %d visible GPUs: among more of them train.global_batch = %" PRId64
                 " sequences in micro-batches of %" PRId64 " do not divide%s",
                 ranks, devices, recipe->train_global_batch, recipe->train_micro_batch,
                 recipe->parallel_expert > 1 ? ", or parallel.expert does not divide them" : "");
    return ranks;
}

OptimizerOptions prepare_optimizer_options(const Recipe *recipe) {
    bool narrow = recipe->optim_state_dtype == STATE_BF16;
    return (OptimizerOptions){.beta1 = recipe->optim_beta1,
                              .beta2 = recipe->optim_beta2,
                              .epsilon = recipe->optim_epsilon,
                              .weight_decay = recipe->optim_weight_decay,
                              .clip_norm = recipe->optim_clip_norm,
                              .decay_embeddings = recipe->optim_decay_embeddings,
                              .state_dtype = narrow ? DTYPE_BF16 : DTYPE_F32};
}

Status prepare_model_options(const Recipe *recipe, bool training, ModelOptions *out) {
    *out = (ModelOptions){.micro_batch = recipe->train_micro_batch,
                          .sequence_length = recipe->data_sequence_length,
                          .training = training,
                          .expert_room = recipe->parallel_expert_room,
                          .loss_chunk_tokens = recipe->train_loss_chunk_tokens};
    return parse_recompute(recipe->train_recompute, &out->recompute);
}

// The batch in equal shares; else what to change: the micro-batch where some size of it does.
static Status check_shares(const Recipe *recipe, int world) {
    const int64_t global = recipe->train_global_batch, share = global / world;
    int64_t micro = recipe->train_micro_batch;
    const int64_t micro_all = micro * world;
    char hint[96] = "";
    if (global % micro_all == 0) return STATUS_OK;
    while (micro > 1 && share % micro != 0) micro--;
    if (global % world == 0)
        snprintf(hint, sizeof hint, "set train.micro_batch = %" PRId64, micro);
    else
        snprintf(hint, sizeof hint, "set train.global_batch = %" PRId64,
                 (global / micro_all + 1) * micro_all);
    FAIL(STATUS_USAGE,
         "train.global_batch = %" PRId64 " is not a multiple of train.micro_batch = %" PRId64
         " times %d ranks; %s, or start another number of ranks",
         global, recipe->train_micro_batch, world, hint);
}

// (Whether the experts of a model that has them already divide is asked when it is known:
// tensor_table_build_layout.)
static Status check_expert_ranks(const Recipe *recipe, int world) {
    const int64_t group = recipe->parallel_expert;
    if (group == 1) return STATUS_OK;
    if (world % group != 0)
        FAIL(STATUS_USAGE,
             "parallel.expert = %" PRId64 " does not divide %d ranks; set a divisor of %d, or "
             "start another number of ranks",
             group, world, world);
    if (recipe->lfuc_enabled && recipe->lfuc_num_experts % group != 0)
        FAIL(STATUS_USAGE,
             "parallel.expert = %" PRId64 " does not divide lfuc.num_experts = %" PRId64
             "; set a divisor of %" PRId64,
             group, recipe->lfuc_num_experts, recipe->lfuc_num_experts);
    if (recipe->parallel_pairwise || recipe->parallel_zero == ZERO_2)
        FAIL(STATUS_USAGE, "parallel.expert = %" PRId64 " does not go with parallel.%s", group,
             recipe->parallel_pairwise ? "pairwise = true; set it to false"
                                       : "zero = 2; set it to 1");
    return STATUS_OK;
}

Status prepare_check_world(const Recipe *recipe, const Backend *backend, int world) {
    TRY(check_expert_ranks(recipe, world));
    if (world == 1) return STATUS_OK;
    TRY(check_shares(recipe, world));
    if (recipe->parallel_pairwise && recipe->parallel_zero == ZERO_2)
        FAIL(STATUS_USAGE,
             "parallel.pairwise = true sums up whole gradients, which no rank has with "
             "parallel.zero = 2; set it to 1");
    if (backend->compute_dtype == DTYPE_F32) return STATUS_OK;
    const char *key = wants_fp32_files(recipe);
    if (!key) return STATUS_OK;
    FAIL(STATUS_USAGE,
         "%s = f32: %d ranks share the fp32 weights and none has them whole; set it to bf16 (the "
         "optimizer files of a checkpoint are fp32 in any case)",
         key, world);
}

// --- Data -----------------------------------------------------------------------------------

static Status fill_loader(const Recipe *recipe, const ModelConfig *config, DataConfig *out) {
    LoaderConfig *loader = &out->loader;
    loader->sequence_length = recipe->data_sequence_length;
    loader->micro_batch = recipe->train_micro_batch;
    loader->global_batch = recipe->train_global_batch;
    loader->world = 1;
    loader->seed = (uint64_t)recipe->run_seed;
    loader->mask_documents = recipe->data_mask_documents;
    loader->skip_bad_shards = recipe->data_on_bad_shard == BAD_SHARD_SKIP;
    loader->prefetch_steps = (int)recipe->data_prefetch_steps;
    loader->vocab_size = config->vocab_size;
    if (recipe->model_source[0]) TRY(hf_tokenizer_id(recipe->model_source, out->tokenizer_id));
    loader->tokenizer_id = out->tokenizer_id;
    return STATUS_OK;
}

Status prepare_train_data(const Recipe *recipe, const ModelConfig *config, DataConfig *out) {
    memset(out, 0, sizeof *out);
    TRY(parse_sources("data.train", recipe->data_train, out));
    return fill_loader(recipe, config, out);
}

Status prepare_valid_data(const Recipe *recipe, const ModelConfig *config, DataConfig *out) {
    memset(out, 0, sizeof *out);
    memcpy(out->directories, recipe->data_valid, sizeof out->directories);
    out->loader.sources[0] = (LoaderSource){.directory = out->directories, .weight = 1};
    out->loader.num_sources = 1;
    return fill_loader(recipe, config, out);
}

// Shards made with another tokenizer would train without an error and teach nonsense.
static Status check_shards(const Recipe *recipe, const DataConfig *data) {
    for (int i = 0; i < data->loader.num_sources; i++) {
        const char *directory = data->loader.sources[i].directory;
        DatasetSummary summary;
        TRY(dataset_summary(directory, &summary));
        if (summary.vocab_size > data->loader.vocab_size)
            FAIL(STATUS_BAD_DATA,
                 "%s: the shards have a vocabulary of %d, the model one of %d; prepare the data "
                 "with the model's own tokenizer",
                 directory, summary.vocab_size, data->loader.vocab_size);
        if (!tokenizer_ids_agree(summary.tokenizer_id, data->tokenizer_id))
            FAIL(STATUS_BAD_DATA,
                 "%s: the shards were made with tokenizer %.12s, but %s has tokenizer %.12s; "
                 "prepare the data with scripts/prepare_data.py --tokenizer %s",
                 directory, summary.tokenizer_id, recipe->model_source, data->tokenizer_id,
                 recipe->model_source);
    }
    return STATUS_OK;
}

static Status check_data(const Recipe *recipe, const ModelConfig *config) {
    DataConfig data;
    TRY(prepare_train_data(recipe, config, &data));
    TRY(check_shards(recipe, &data));
    if (!recipe->data_valid[0]) return STATUS_OK;
    TRY(prepare_valid_data(recipe, config, &data));
    return check_shards(recipe, &data);
}

// --- The seed model -------------------------------------------------------------------------

static Status read_source_config(const char *directory, ModelConfig *out) {
    char path[IO_PATH_MAX];
    json_t *root = NULL;
    if (!io_is_directory(directory))
        FAIL(STATUS_MISSING_INPUT,
             "model.source = %s: there is no such directory; name the model's with --set "
             "model.source=DIR",
             directory);
    TRY(io_path(path, "%s/config.json", directory));
    TRY(json_read_file(path, CONFIG_JSON_MAX, &root));
    Status status = config_from_json(root, path, out);
    json_decref(root);
    return status;
}

// Vocabulary and end-of-document id of the first training source.
static Status vocabulary_from_shards(const Recipe *recipe, ModelConfig *config) {
    DataConfig data = {0};
    DatasetSummary summary;
    TRY(parse_sources("data.train", recipe->data_train, &data));
    Status status = dataset_summary(data.loader.sources[0].directory, &summary);
    if (status != STATUS_OK)
        return status_prefix(status, "model.vocab_size = 0 takes the vocabulary from the shards: ");
    config->vocab_size = summary.vocab_size;
    config->eos_token_id = summary.eos_id;
    return STATUS_OK;
}

static Status random_config(const Recipe *recipe, ModelConfig *out) {
    int heads = (int)recipe->model_num_heads, head_dim = (int)recipe->model_head_dim;
    if (head_dim == 0 && recipe->model_hidden_size % heads != 0)
        FAIL(STATUS_USAGE,
             "model.hidden_size = %" PRId64 " is not a multiple of model.num_heads = %d; set "
             "model.head_dim, too",
             recipe->model_hidden_size, heads);
    *out = (ModelConfig){
        .family = (ModelFamily)recipe->model_family,
        .hidden_size = (int)recipe->model_hidden_size,
        .num_layers = (int)recipe->model_num_layers,
        .num_heads = heads,
        .num_kv_heads = (int)recipe->model_num_kv_heads,
        .head_dim = head_dim ? head_dim : (int)recipe->model_hidden_size / heads,
        .intermediate_size = (int)recipe->model_intermediate_size,
        .moe_intermediate_size = (int)recipe->model_intermediate_size,
        .vocab_size = (int)recipe->model_vocab_size,
        .max_position_embeddings = (int)recipe->model_max_position_embeddings,
        .rope_theta = recipe->model_rope_theta,
        .rms_norm_eps = recipe->model_rms_norm_eps,
        .tie_word_embeddings = recipe->model_tie_word_embeddings,
        .qkv_bias = recipe->model_family == FAMILY_QWEN2,
        .qk_norm = recipe->model_family == FAMILY_QWEN3,
        .bos_token_id = -1,
        .eos_token_id = -1,
        .router = {.gate_scale = 1},
    };
    if (out->vocab_size == 0) TRY(vocabulary_from_shards(recipe, out));
    Status status = config_validate(out, "[model]");
    return status == STATUS_OK ? status : status_prefix(STATUS_USAGE, "recipe: ");
}

// config.json tells renormalised gates, but not that their gradient is to be straight through.
static void apply_gate_choice(const Recipe *recipe, ModelConfig *config) {
    if (config->router.gate == GATE_RENORM && recipe->router_gate == GATE_STRAIGHT_THROUGH)
        config->router.gate = GATE_STRAIGHT_THROUGH;
}

Status prepare_seed_config(const Recipe *recipe, ModelConfig *out) {
    if (!recipe->model_source[0]) return random_config(recipe, out);
    TRY(read_source_config(recipe->model_source, out));
    if (!recipe->lfuc_enabled && config_has_moe(out)) apply_gate_choice(recipe, out);
    if (recipe->data_sequence_length > out->max_position_embeddings)
        log_warn("data.sequence_length = %" PRId64 " is longer than the %d positions that %s was "
                 "made for",
                 recipe->data_sequence_length, out->max_position_embeddings, recipe->model_source);
    return STATUS_OK;
}

// A plan that is given needs no text to be measured on.
static Status check_inputs(const Recipe *recipe, bool with_data) {
    ModelConfig *seed = malloc(sizeof *seed);
    FusionPlan *plan = malloc(sizeof *plan);
    TensorSource *source = NULL;
    DeviceOptions device = device_options(recipe, 0);
    Status status = STATUS_OK;
    if (!seed || !plan) FAIL_GOTO(done, STATUS_INTERNAL, "no memory for the model's shape");
    TRY_GOTO(device_check(&device), done);
    TRY_GOTO(prepare_seed_config(recipe, seed), done);
    if (recipe->lfuc_enabled && plan_is_given(recipe))
        TRY_GOTO(plan_from_recipe(recipe, seed, plan), done);
    else if (recipe->lfuc_enabled)
        TRY_GOTO(plan_check_budget(recipe, seed), done);
    if (recipe->model_source[0]) TRY_GOTO(hf_open(recipe->model_source, &source), done);
    if (with_data) TRY_GOTO(check_data(recipe, seed), done);
done:
    source_close(source);
    free(plan);
    free(seed);
    return status;
}

Status prepare_check_inputs(const Recipe *recipe) {
    return check_inputs(recipe, true);
}

// --- The model ------------------------------------------------------------------------------

// The fused view together with the source it looks at.
typedef struct FusedSource {
    TensorSource base;
    TensorSource *fused, *seed;
} FusedSource;

static Status fused_read(TensorSource *source, const Tensor *tensor, int64_t first, int64_t count,
                         float *out) {
    TensorSource *fused = ((FusedSource *)source)->fused;
    return fused->read(fused, tensor, first, count, out);
}

static void fused_close(TensorSource *source) {
    FusedSource *both = (FusedSource *)source;
    source_close(both->fused);
    source_close(both->seed);
    free(both);
}

// Takes over `seed` when it succeeds.
static Status fuse(const FusionPlan *plan, TensorSource *seed, TensorSource **out) {
    FusedSource *both = calloc(1, sizeof *both);
    if (!both) FAIL(STATUS_INTERNAL, "no memory for the fused model's source");
    Status status = fusion_source(plan, seed, &both->fused);
    if (status != STATUS_OK) {
        free(both);
        return status;
    }
    both->seed = seed;
    both->base = *both->fused;
    both->base.read = fused_read;
    both->base.close = fused_close;
    *out = &both->base;
    return STATUS_OK;
}

static Status prepare_fused(const Recipe *recipe, Backend *backend, const RunDir *dir,
                            TensorSource **source) {
    FusionPlan *plan = malloc(sizeof *plan);
    if (!plan) FAIL(STATUS_INTERNAL, "no memory for a plan");
    Status status = plan_make(recipe, backend, dir->path, *source, plan);
    if (status == STATUS_OK) status = fuse(plan, *source, source);
    free(plan);
    return status;
}

Status prepare_model(const Recipe *recipe, Backend *backend, const RunDir *dir, ModelConfig *config,
                     TensorSource **source) {
    *source = NULL;
    TRY(prepare_seed_config(recipe, config));
    if (!recipe->model_source[0]) {
        log_info("model: random weights, %s, %d layers, hidden size %d, vocabulary %d",
                 config_family_name(config->family), config->num_layers, config->hidden_size,
                 config->vocab_size);
        return STATUS_OK;
    }
    log_info("model: %s, %s, %d layers, hidden size %d, vocabulary %d", recipe->model_source,
             config_family_name(config->family), config->num_layers, config->hidden_size,
             config->vocab_size);
    TRY(hf_open(recipe->model_source, source));
    if (!recipe->lfuc_enabled) return STATUS_OK;
    Status status = prepare_fused(recipe, backend, dir, source);
    if (status != STATUS_OK) {
        source_close(*source);
        *source = NULL;
        return status;
    }
    *config = *(*source)->config;
    return STATUS_OK;
}

// --- --plan-only and --surgery-only ----------------------------------------------------------

static void show_written(void *context, uint64_t done_bytes, uint64_t total_bytes) {
    (void)context;
    log_transient("surgery: %3.0f %% of %.2f GB", 100.0 * (double)done_bytes / (double)total_bytes,
                  1e-9 * (double)total_bytes);
}

static Status write_surgery(const Recipe *recipe, const RunDir *dir, TensorSource *source) {
    char path[IO_PATH_MAX];
    TRY(io_path(path, "%s/surgery", dir->path));
    HfWriteOptions options = {.dtype = recipe->export_dtype == WEIGHTS_F32 ? DTYPE_F32 : DTYPE_BF16,
                              .max_shard_bytes = (uint64_t)recipe->export_max_shard_bytes,
                              .copy_from = recipe->model_source,
                              .progress = show_written};
    TRY(hf_write(path, source, &options));
    log_info("surgery: the fused model is in %s", path);
    return STATUS_OK;
}

static Status prepare_in(const Recipe *recipe, const RunDir *dir, StopAfter stop) {
    Status status = STATUS_OK;
    Backend *backend = NULL;
    TensorSource *source = NULL;
    ModelConfig *config = malloc(sizeof *config);
    if (!config) FAIL(STATUS_INTERNAL, "no memory for the model's shape");
    TRY_GOTO(prepare_backend(recipe, 0, &backend), done);
    TRY_GOTO(prepare_model(recipe, backend, dir, config, &source), done);
    if (stop == STOP_AFTER_SURGERY) TRY_GOTO(write_surgery(recipe, dir, source), done);
done:
    source_close(source);
    backend_destroy(backend);
    free(config);
    return status;
}

Status prepare_only(const Recipe *recipe, StopAfter stop) {
    if (!recipe->lfuc_enabled)
        FAIL(STATUS_USAGE, "%s needs a recipe with lfuc.enabled = true",
             stop == STOP_AFTER_PLAN ? "--plan-only" : "--surgery-only");
    char name[IO_PATH_MAX];
    RunDir dir;
    TRY(check_inputs(recipe, !plan_is_given(recipe)));
    TRY(recipe_run_name(recipe, name, sizeof name));
    TRY(rundir_open(&dir, recipe->run_directory, name));
    Status status = prepare_in(recipe, &dir, stop);
    StatusRecord failure;
    status_take(&failure);
    const char *state = status == STATUS_OK ? "done" : "failed";
    if (rundir_status(&dir, state, 0, status, failure.message) != STATUS_OK) {
        log_warn("%s", status_message());
        status_clear();
    }
    rundir_close(&dir);
    return status == STATUS_OK ? status : status_put(&failure);
}
