// Writing checkpoints in the background.
//
// checkpoint_begin copies what a save needs into memory that was reserved at the start and returns;
// a thread of its own then writes, syncs, publishes and deletes old checkpoints. The thread touches
// the snapshot, files and nothing else, so training goes on. It lives for one save.
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
#include "model/safetensors.h"
#include "train/checkpoint_manifest.h"
#include "train/checkpoint_slices.h"

struct CheckpointWriter {
    Model *model;
    Optimizer *optimizer;
    CheckpointOptions options;
    char *config_text;           // config.json, or NULL when it cannot express the model
    void *snapshot[SLICE_KINDS]; // (table.total) of snapshot_dtype each, host memory
    char *state_text;            // state.json of the save in flight
    int64_t step;
    bool running;      // the thread must be joined
    atomic_bool ended; // joining it will not block
    pthread_t thread;
    StatusRecord record; // how the thread ended
};

// The snapshot is a plain copy; what is kept in bf16 becomes fp32 on its way to the file.
static DType snapshot_dtype(SliceKind kind, DType state_dtype) {
    return kind == SLICE_MASTER ? DTYPE_F32 : state_dtype;
}

static size_t snapshot_bytes(const TensorTable *table, SliceKind kind, DType state_dtype) {
    return (size_t)table->total * dtype_bytes(snapshot_dtype(kind, state_dtype));
}

Status checkpoint_plan(const TensorTable *table, DType state_dtype, MemoryPlan *plan) {
    uint64_t bytes = 0;
    for (int kind = 0; kind < SLICE_KINDS; kind++)
        bytes += snapshot_bytes(table, (SliceKind)kind, state_dtype);
    return memory_plan_add(plan, "checkpoint snapshot", bytes);
}

// --- The files of one checkpoint -----------------------------------------------------------------

static Status write_text(const char *directory, const char *name, const char *text,
                         Manifest *manifest) {
    char path[IO_PATH_MAX], hex[HASH_HEX_SIZE];
    size_t bytes = strlen(text);
    TRY(io_path(path, "%s/%s", directory, name));
    TRY(io_write_file_atomic(path, text, bytes));
    hash_to_hex(hash_bytes(text, bytes), hex);
    return manifest_add(manifest, name, bytes, hex);
}

static Status append_weights(SafetensorsWriter *writer, const TensorTable *table,
                             const float *master) {
    for (int i = 0; i < table->count; i++) {
        const Tensor *tensor = &table->tensors[i];
        TRY(safetensors_writer_append(writer, master + tensor->offset, (uint64_t)tensor->count));
    }
    return STATUS_OK;
}

static Status write_weights(const CheckpointWriter *writer, const char *path, uint64_t *bytes,
                            char hex[HASH_HEX_SIZE]) {
    const TensorTable *table = &writer->model->table;
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
    status = append_weights(file, table, writer->snapshot[SLICE_MASTER]);
    if (status == STATUS_OK) return safetensors_writer_finish(file, bytes, hex);
    safetensors_writer_abort(file);
    return status;
}

static Status write_files(const CheckpointWriter *writer, const char *directory,
                          Manifest *manifest) {
    const TensorTable *table = &writer->model->table;
    SliceArena arenas[SLICE_KINDS];
    char path[IO_PATH_MAX], name[64], hex[HASH_HEX_SIZE];
    uint64_t bytes;
    for (int kind = 0; kind < SLICE_KINDS; kind++)
        arenas[kind] =
            (SliceArena){writer->snapshot[kind],
                         snapshot_dtype((SliceKind)kind, writer->optimizer->options.state_dtype)};
    TRY(io_path(path, "%s/model.safetensors", directory));
    TRY(write_weights(writer, path, &bytes, hex));
    TRY(manifest_add(manifest, "model.safetensors", bytes, hex));
    TRY(slices_file_name(0, 1, name));
    TRY(io_path(path, "%s/%s", directory, name));
    TRY(slices_write(path, table, 0, table->total, arenas, &bytes, hex));
    TRY(manifest_add(manifest, name, bytes, hex));
    if (writer->config_text)
        TRY(write_text(directory, "config.json", writer->config_text, manifest));
    TRY(write_text(directory, "state.json", writer->state_text, manifest));
    return manifest_write(manifest, directory);
}

// --- One save ------------------------------------------------------------------------------------

static Status write_and_publish(const CheckpointWriter *writer, const char *temp,
                                Manifest *manifest) {
    const char *directory = writer->options.directory;
    char target[IO_PATH_MAX];
    TRY(checkpoint_path(directory, writer->step, target));
    TRY(io_remove_tree(temp));
    TRY(io_make_directories(temp));
    TRY(write_files(writer, temp, manifest));
    TRY(io_fsync_directory(temp));
    // Only a broken checkpoint of this step, or one of an abandoned attempt, can be in the way.
    if (io_is_directory(target)) TRY(checkpoint_remove(target));
    TRY(io_rename(temp, target));
    return io_fsync_directory(directory);
}

static Status save(const CheckpointWriter *writer) {
    const char *directory = writer->options.directory;
    char temp[IO_PATH_MAX];
    Manifest manifest = {.step = writer->step};
    TRY(checkpoint_path(directory, writer->step, temp));
    size_t length = strlen(temp);
    INVARIANT(length + 32 < sizeof temp);
    snprintf(temp + length, sizeof temp - length, ".tmp-%ld", (long)getpid());

    Status status = write_and_publish(writer, temp, &manifest);
    manifest_free(&manifest);
    if (status != STATUS_OK) {
        // The first failure is the one to report, not that of the clean-up.
        StatusRecord record;
        status_take(&record);
        if (io_remove_tree(temp) != STATUS_OK) status_clear();
        return status_put(&record);
    }
    if (checkpoint_retain(&writer->options, writer->step) != STATUS_OK) {
        log_warn("old checkpoints could not be removed: %s", status_message());
        status_clear();
    }
    return STATUS_OK;
}

static void *save_thread(void *argument) {
    CheckpointWriter *writer = argument;
    if (save(writer) != STATUS_OK)
        status_take(&writer->record);
    else
        writer->record = (StatusRecord){.code = STATUS_OK};
    atomic_store(&writer->ended, true);
    return NULL;
}

// Signals are for the thread that trains.
static Status start_thread(CheckpointWriter *writer) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    atomic_store(&writer->ended, false);
    int error = pthread_create(&writer->thread, NULL, save_thread, writer);
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

Status checkpoint_writer_create(Model *model, Optimizer *optimizer,
                                const CheckpointOptions *options, CheckpointWriter **out) {
    Status status = STATUS_OK;
    Backend *backend = model->backend;
    CheckpointWriter *writer = calloc(1, sizeof *writer);
    if (!writer) FAIL(STATUS_INTERNAL, "out of memory for the checkpoint writer");
    writer->model = model;
    writer->optimizer = optimizer;
    writer->options = *options;
    for (int kind = 0; kind < SLICE_KINDS; kind++)
        TRY_GOTO(backend->ops->host_alloc(
                     backend,
                     snapshot_bytes(&model->table, (SliceKind)kind, optimizer->options.state_dtype),
                     &writer->snapshot[kind]),
                 fail);
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
    free(writer->config_text);
    free(writer->state_text);
    free(writer);
}

static Status take_snapshot(CheckpointWriter *writer) {
    const Model *model = writer->model;
    const Optimizer *optimizer = writer->optimizer;
    Backend *backend = model->backend;
    const void *const from[SLICE_KINDS] = {model->master, optimizer->m, optimizer->v};
    for (int kind = 0; kind < SLICE_KINDS; kind++)
        TRY(backend->ops->download(
            backend, writer->snapshot[kind], from[kind],
            snapshot_bytes(&model->table, (SliceKind)kind, optimizer->options.state_dtype)));
    return STATUS_OK;
}

Status checkpoint_begin(CheckpointWriter *writer, int64_t step, const json_t *state) {
    INVARIANT(!writer->running);
    char *text = json_dumps(state, JSON_INDENT(1) | JSON_SORT_KEYS | JSON_REAL_PRECISION(17));
    if (!text) FAIL(STATUS_INTERNAL, "state.json: out of memory, or a value that JSON cannot hold");
    free(writer->state_text);
    writer->state_text = text;
    writer->step = step;
    TRY(take_snapshot(writer));
    return start_thread(writer);
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
