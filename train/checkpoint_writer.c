// Writing checkpoints in the background.
//
// checkpoint_begin copies what a save needs into memory that was reserved at the start; a thread of
// its own then writes, syncs, publishes and deletes old checkpoints. The thread touches the
// snapshot, files and nothing else, so training goes on. It lives for one save; among several ranks
// for one half of it, since in between they agree that all have written.
//
// A save that fails leaves no trace but its message: its directory is removed, which also gives
// back the space on a full disk, and the checkpoints before it are untouched. fsync is never tried
// again on the same file; the next save writes everything anew.
#include "train/checkpoint.h"

#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "base/hash.h"
#include "base/log.h"
#include "model/expert_parallel.h"
#include "model/safetensors.h"
#include "train/checkpoint_manifest.h"
#include "train/checkpoint_slices.h"

enum { WIDEN_BLOCK = 4096 }; // elements

struct CheckpointWriter {
    Model *model;
    Optimizer *optimizer;
    CheckpointOptions options;
    char *config_text;           // config.json, or NULL when it cannot express the model
    void *snapshot[SLICE_KINDS]; // (owned) of snapshot_dtype each, host memory
    TensorTable whole;           // where this rank has only some of the experts; else zeros
    const TensorTable *table;    // of all tensors: the model's, or `whole`
    void *weights;               // rank 0 of several: the whole working copy; else NULL
    SliceRange *ranges;          // (num_ranges) what this rank owns
    int num_ranges;
    char *state_text; // state.json of the save in flight
    int64_t step;
    Manifest manifest; // of the save in flight: what this rank has written
    FileHash part;     // this rank's optimizer file
    bool running;      // the thread must be joined
    atomic_bool ended; // joining it will not block
    pthread_t thread;
    StatusRecord record; // how the thread ended
};

// The snapshot is a plain copy; what is kept in bf16 becomes fp32 on its way to the file.
static DType snapshot_dtype(SliceKind kind, DType state_dtype) {
    return kind == SLICE_MASTER ? DTYPE_F32 : state_dtype;
}

static size_t snapshot_bytes(int64_t owned, SliceKind kind, DType state_dtype) {
    return (size_t)owned * dtype_bytes(snapshot_dtype(kind, state_dtype));
}

// With one rank the snapshot of the master is the whole of the weights.
static size_t weights_bytes(const TensorTable *table, DType compute_dtype,
                            const CheckpointOptions *options) {
    if (options->world <= 1 || options->rank > 0) return 0;
    return tensor_table_copy_bytes(table, compute_dtype, table->total);
}

Status checkpoint_plan(const TensorTable *table, const TensorTable *whole, DType state_dtype,
                       DType compute_dtype, const CheckpointOptions *options, MemoryPlan *plan) {
    const int64_t owned = partition_owned(table, options->world > 1 ? options->world : 1);
    uint64_t bytes = weights_bytes(whole, compute_dtype, options);
    for (int kind = 0; kind < SLICE_KINDS; kind++)
        bytes += snapshot_bytes(owned, (SliceKind)kind, state_dtype);
    return memory_plan_add(plan, "checkpoint snapshot", bytes);
}

// --- The files of one checkpoint -----------------------------------------------------------------

static Status write_text(const char *directory, const char *name, const char *text,
                         Manifest *manifest) {
    char path[IO_PATH_MAX];
    FileHash hash;
    size_t bytes = strlen(text);
    TRY(io_path(path, "%s/%s", directory, name));
    TRY(io_write_file_atomic(path, text, bytes));
    TRY(hash_content(text, bytes, &hash));
    return manifest_add(manifest, name, &hash);
}

// From the working copy, whose body may be narrower than what the writer takes.
static Status append_copy(SafetensorsWriter *writer, const void *values, DType dtype,
                          int64_t count) {
    float block[WIDEN_BLOCK];
    for (int64_t done = 0; done < count; done += WIDEN_BLOCK) {
        int64_t some = count - done < WIDEN_BLOCK ? count - done : WIDEN_BLOCK;
        dtype_to_f32(dtype, (const char *)values + (size_t)done * dtype_bytes(dtype), block,
                     (size_t)some);
        TRY(safetensors_writer_append(writer, block, (uint64_t)some));
    }
    return STATUS_OK;
}

static Status append_weights(SafetensorsWriter *file, const CheckpointWriter *writer) {
    const TensorTable *table = writer->table;
    const DType compute = writer->model->backend->compute_dtype;
    const float *master = writer->snapshot[SLICE_MASTER];
    for (int i = 0; i < table->count; i++) {
        const Tensor *tensor = &table->tensors[i];
        if (!writer->weights) {
            TRY(safetensors_writer_append(file, master + tensor->offset, (uint64_t)tensor->count));
            continue;
        }
        const char *from =
            (const char *)writer->weights + tensor_table_copy_bytes(table, compute, tensor->offset);
        DType dtype = tensor->role == ROLE_ROUTER ? DTYPE_F32 : compute;
        TRY(append_copy(file, from, dtype, tensor->count));
    }
    return STATUS_OK;
}

static Status write_weights(const CheckpointWriter *writer, const char *path, FileHash *hash) {
    const TensorTable *table = writer->table;
    SafetensorsWriter *file = NULL;
    SafetensorsSpec *specs = calloc((size_t)table->count, sizeof *specs);
    if (!specs) FAIL(STATUS_INTERNAL, "%s: out of memory", path);
    for (int i = 0; i < table->count; i++) {
        const Tensor *tensor = &table->tensors[i];
        specs[i] = (SafetensorsSpec){
            .name = tensor->name, .dtype = writer->options.dtype, .ndim = tensor->ndim};
        for (int d = 0; d < tensor->ndim; d++) specs[i].shape[d] = tensor->shape[d];
    }
    Status status = safetensors_writer_open(path, specs, (size_t)table->count, NULL, &file);
    free(specs);
    TRY(status);
    status = append_weights(file, writer);
    if (status == STATUS_OK) return safetensors_writer_finish(file, hash);
    safetensors_writer_abort(file);
    return status;
}

// The optimizer file of this rank.
static Status write_slices(CheckpointWriter *writer, const char *directory) {
    SliceArena arenas[SLICE_KINDS];
    char path[IO_PATH_MAX], name[64];
    for (int kind = 0; kind < SLICE_KINDS; kind++)
        arenas[kind] =
            (SliceArena){writer->snapshot[kind],
                         snapshot_dtype((SliceKind)kind, writer->optimizer->options.state_dtype)};
    TRY(slices_file_name(writer->options.rank, writer->options.world, name));
    TRY(io_path(path, "%s/%s", directory, name));
    return slices_write(path, &writer->model->table, writer->ranges, writer->num_ranges, arenas,
                        &writer->part);
}

static Status write_files(CheckpointWriter *writer, const char *directory) {
    char path[IO_PATH_MAX];
    FileHash hash;
    if (writer->options.rank > 0) return write_slices(writer, directory);
    TRY(io_path(path, "%s/model.safetensors", directory));
    TRY(write_weights(writer, path, &hash));
    TRY(manifest_add(&writer->manifest, "model.safetensors", &hash));
    TRY(write_slices(writer, directory));
    if (writer->config_text)
        TRY(write_text(directory, "config.json", writer->config_text, &writer->manifest));
    return write_text(directory, "state.json", writer->state_text, &writer->manifest);
}

// --- One save ------------------------------------------------------------------------------------

static Status temporary_path(const CheckpointWriter *writer, char out[IO_PATH_MAX]) {
    TRY(checkpoint_path(writer->options.directory, writer->step, out));
    size_t length = strlen(out);
    INVARIANT(length + 32 < IO_PATH_MAX);
    snprintf(out + length, IO_PATH_MAX - length, ".tmp-%ld", writer->options.tag);
    return STATUS_OK;
}

// The first failure is the one to report, not that of the clean-up.
static void remove_temporary(const CheckpointWriter *writer) {
    char temp[IO_PATH_MAX];
    StatusRecord record;
    status_take(&record);
    if (temporary_path(writer, temp) != STATUS_OK || io_remove_tree(temp) != STATUS_OK)
        status_clear();
    if (record.code != STATUS_OK) (void)status_put(&record);
}

static Status write_own(CheckpointWriter *writer) {
    char temp[IO_PATH_MAX];
    TRY(temporary_path(writer, temp));
    // Among several ranks another may have begun: nothing is in the way then (checkpoint_discard).
    if (writer->options.world == 1) TRY(io_remove_tree(temp));
    TRY(io_make_directories(temp));
    TRY(write_files(writer, temp));
    return io_fsync_directory(temp);
}

static Status publish(CheckpointWriter *writer) {
    const char *directory = writer->options.directory;
    char temp[IO_PATH_MAX], target[IO_PATH_MAX];
    writer->manifest.step = writer->step;
    TRY(temporary_path(writer, temp));
    TRY(checkpoint_path(directory, writer->step, target));
    TRY(manifest_write(&writer->manifest, temp));
    TRY(io_fsync_directory(temp));
    // Only a broken checkpoint of this step, or one of an abandoned attempt, can be in the way.
    if (io_is_directory(target)) TRY(checkpoint_remove(target));
    TRY(io_rename(temp, target));
    TRY(io_fsync_directory(directory));
    if (checkpoint_retain(&writer->options, writer->step) != STATUS_OK) {
        log_warn("old checkpoints could not be removed: %s", status_message());
        status_clear();
    }
    return STATUS_OK;
}

// A rank that writes to a disk of its own says that all went well, too.
static Status check_part_is_here(const CheckpointWriter *writer, const char *name, int rank,
                                 const FileHash *part) {
    char temp[IO_PATH_MAX], path[IO_PATH_MAX];
    uint64_t bytes;
    TRY(temporary_path(writer, temp));
    TRY(io_path(path, "%s/%s", temp, name));
    if (io_exists(path)) TRY(io_file_size(path, &bytes));
    if (io_exists(path) && bytes == part->bytes) return STATUS_OK;
    FAIL(STATUS_CANNOT_WRITE,
         "%s: rank %d has written it, but rank 0 does not see it; put run.directory on a file "
         "system that all ranks share",
         path, rank);
}

static Status add_part(CheckpointWriter *writer, int rank, const FileHash *part) {
    char name[64];
    TRY(slices_file_name(rank, writer->options.world, name));
    if (rank > 0) TRY(check_part_is_here(writer, name, rank, part));
    return manifest_add(&writer->manifest, name, part);
}

// With one rank there is nobody to wait for between writing and publishing.
static Status save(CheckpointWriter *writer) {
    Status status = write_own(writer);
    if (writer->options.world > 1) return status;
    if (status == STATUS_OK) status = add_part(writer, 0, &writer->part);
    if (status == STATUS_OK) status = publish(writer);
    if (status != STATUS_OK) remove_temporary(writer);
    return status;
}

static void end_thread(CheckpointWriter *writer, Status status) {
    if (status != STATUS_OK)
        status_take(&writer->record);
    else
        writer->record = (StatusRecord){.code = STATUS_OK};
    atomic_store(&writer->ended, true);
}

static void *save_thread(void *argument) {
    end_thread(argument, save(argument));
    return NULL;
}

static void *publish_thread(void *argument) {
    end_thread(argument, publish(argument));
    return NULL;
}

// Signals are for the thread that trains.
static Status start_thread(CheckpointWriter *writer, void *(*body)(void *)) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    atomic_store(&writer->ended, false);
    int error = pthread_create(&writer->thread, NULL, body, writer);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) FAIL(STATUS_INTERNAL, "cannot start the checkpoint thread: %s", strerror(error));
    writer->running = true;
    return STATUS_OK;
}

// --- Interface -----------------------------------------------------------------------------------

// A router that multiplies its gates by a constant or reads the raw residual stream has no name in
// Hugging Face's configurations; such weights must not pass for something that they are not.
static Status make_config_text(CheckpointWriter *writer) {
    const ModelConfig *config = &writer->model->config;
    bool plain_router = config->router.gate_scale == 1.0f && !config->router.input_is_raw;
    if (config_has_moe(config) && !plain_router) return STATUS_OK;
    json_t *root;
    Status status = config_to_json(config, writer->options.dtype, &root);
    if (status == STATUS_USAGE) {
        status_clear();
        return STATUS_OK;
    }
    TRY(status);
    writer->config_text = json_dumps(root, JSON_INDENT(2) | JSON_SORT_KEYS);
    json_decref(root);
    if (!writer->config_text) FAIL(STATUS_INTERNAL, "out of memory for config.json");
    return STATUS_OK;
}

static Status reserve(CheckpointWriter *writer) {
    const Model *model = writer->model;
    const Optimizer *optimizer = writer->optimizer;
    const Partition *partition = optimizer->partition;
    Backend *backend = model->backend;
    if (model->table.layout.expert_ranks > 1) {
        TRY(tensor_table_build(&model->config, &writer->whole));
        writer->table = &writer->whole;
    }
    size_t weights = weights_bytes(writer->table, backend->compute_dtype, &writer->options);
    for (int kind = 0; kind < SLICE_KINDS; kind++)
        TRY(backend->ops->host_alloc(
            backend,
            snapshot_bytes(partition->owned, (SliceKind)kind, optimizer->options.state_dtype),
            &writer->snapshot[kind]));
    if (weights > 0) TRY(backend->ops->host_alloc(backend, weights, &writer->weights));
    writer->ranges = malloc((size_t)partition->count * sizeof *writer->ranges);
    if (!writer->ranges) FAIL(STATUS_INTERNAL, "out of memory for %d slices", partition->count);
    for (int i = 0; i < partition->count; i++) {
        int64_t begin = partition_begin(partition, i);
        writer->ranges[writer->num_ranges++] =
            (SliceRange){begin, begin + partition->buckets[i].part};
    }
    return STATUS_OK;
}

Status checkpoint_writer_create(Model *model, Optimizer *optimizer,
                                const CheckpointOptions *options, CheckpointWriter **out) {
    Status status = STATUS_OK;
    CheckpointWriter *writer = calloc(1, sizeof *writer);
    if (!writer) FAIL(STATUS_INTERNAL, "out of memory for the checkpoint writer");
    writer->model = model;
    writer->table = &model->table;
    writer->optimizer = optimizer;
    writer->options = *options;
    if (writer->options.world < 1) writer->options.world = 1;
    if (writer->options.tag == 0) writer->options.tag = (long)getpid();
    TRY_GOTO(reserve(writer), fail);
    TRY_GOTO(make_config_text(writer), fail);
    *out = writer;
    return STATUS_OK;
fail:
    checkpoint_writer_destroy(writer);
    return status;
}

void checkpoint_writer_destroy(CheckpointWriter *writer) {
    if (!writer) return;
    if (checkpoint_wait(writer) != STATUS_OK) status_clear();
    Backend *backend = writer->model->backend;
    for (int kind = 0; kind < SLICE_KINDS; kind++)
        if (writer->snapshot[kind]) backend->ops->host_release(backend, writer->snapshot[kind]);
    if (writer->weights) backend->ops->host_release(backend, writer->weights);
    manifest_free(&writer->manifest);
    tensor_table_free(&writer->whole);
    free(writer->ranges);
    free(writer->config_text);
    free(writer->state_text);
    free(writer);
}

// What this rank owns of the master lies in the model's arena, cut by the partition, or is whole in
// the optimizer's.
static Status snapshot_master(CheckpointWriter *writer) {
    const Model *model = writer->model;
    const Optimizer *optimizer = writer->optimizer;
    const Partition *partition = optimizer->partition;
    Backend *backend = model->backend;
    float *to = writer->snapshot[SLICE_MASTER];
    if (!model->master)
        return backend->ops->download(backend, to, optimizer->master,
                                      (size_t)partition->owned * sizeof *to);
    for (int i = 0; i < partition->count; i++)
        TRY(backend->ops->download(backend, to + partition->buckets[i].state,
                                   model->master + partition_begin(partition, i),
                                   (size_t)partition->buckets[i].part * sizeof *to));
    return STATUS_OK;
}

// Of the groups of ranks that share out experts the first sends its rank 0 what that has not got.
static bool shares_experts(const CheckpointWriter *writer) {
    const Communicator *group = writer->model->experts;
    return group && writer->options.rank < group->world;
}

static Status snapshot_weights(CheckpointWriter *writer) {
    Model *model = writer->model;
    Backend *backend = model->backend;
    if (shares_experts(writer) || !writer->weights) return STATUS_OK;
    return backend->ops->download(
        backend, writer->weights, model->params,
        weights_bytes(writer->table, backend->compute_dtype, &writer->options));
}

static Status take_snapshot(CheckpointWriter *writer) {
    const Model *model = writer->model;
    const Optimizer *optimizer = writer->optimizer;
    Backend *backend = model->backend;
    const DType state = optimizer->options.state_dtype;
    const size_t bytes = snapshot_bytes(optimizer->partition->owned, SLICE_M, state);
    TRY(snapshot_master(writer));
    TRY(backend->ops->download(backend, writer->snapshot[SLICE_M], optimizer->m, bytes));
    TRY(backend->ops->download(backend, writer->snapshot[SLICE_V], optimizer->v, bytes));
    return snapshot_weights(writer);
}

Status checkpoint_begin(CheckpointWriter *writer, int64_t step, const json_t *state) {
    INVARIANT(!writer->running);
    char *text = json_dumps(state, JSON_INDENT(1) | JSON_SORT_KEYS | JSON_REAL_PRECISION(17));
    if (!text) FAIL(STATUS_INTERNAL, "state.json: out of memory, or a value that JSON cannot hold");
    free(writer->state_text);
    writer->state_text = text;
    writer->step = step;
    manifest_free(&writer->manifest);
    return take_snapshot(writer);
}

Status checkpoint_start(CheckpointWriter *writer) {
    INVARIANT(!writer->running);
    if (shares_experts(writer))
        TRY(expert_parallel_collect(writer->model, writer->table, writer->weights));
    return start_thread(writer, save_thread);
}

FileHash checkpoint_part(const CheckpointWriter *writer) {
    return writer->part;
}

Status checkpoint_publish(CheckpointWriter *writer, const FileHash *parts) {
    INVARIANT(!writer->running && writer->options.rank == 0);
    for (int r = 0; r < writer->options.world; r++) TRY(add_part(writer, r, &parts[r]));
    return start_thread(writer, publish_thread);
}

void checkpoint_discard(CheckpointWriter *writer) {
    remove_temporary(writer);
}

bool checkpoint_busy(CheckpointWriter *writer) {
    return writer->running && !atomic_load(&writer->ended);
}

Status checkpoint_wait(CheckpointWriter *writer) {
    if (!writer->running) return STATUS_OK;
    pthread_join(writer->thread, NULL);
    writer->running = false;
    return writer->record.code == STATUS_OK ? STATUS_OK : status_put(&writer->record);
}
