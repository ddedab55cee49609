// Verifying and loading one checkpoint.
//
// Weights are read from the fp32 master parts, not from model.safetensors: bf16 weights would not
// continue bit for bit. model.safetensors is what other programs and exports read; its hash is
// verified all the same.
#include "train/checkpoint.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include "train/checkpoint_manifest.h"
#include "train/checkpoint_slices.h"

enum { STATE_MAX_BYTES = 1 << 30, CHUNK_ELEMENTS = 1 << 20 };

static Status verify_file(const char *directory, const ManifestFile *file, bool hash) {
    const FileHash *written = &file->hash;
    char path[IO_PATH_MAX];
    uint64_t bytes, begin, end;
    FileHash found;
    TRY(io_path(path, "%s/%s", directory, file->name));
    TRY(io_file_size(path, &bytes));
    if (bytes != written->bytes)
        FAIL(STATUS_BAD_DATA, "%s: has %" PRIu64 " bytes, its manifest says %" PRIu64, path, bytes,
             written->bytes);
    if (!hash) return STATUS_OK;
    TRY(hash_file_like(path, written, &found));
    const bool same = strcmp(found.hex, written->hex) == 0;
    const bool located = hash_first_difference(&found, written, &begin, &end);
    if (same && !located) return STATUS_OK;
    if (same)
        FAIL(STATUS_BAD_DATA,
             "%s: its manifest contradicts itself: the hash of all is right, that of bytes %" PRIu64
             " to %" PRIu64 " is not",
             path, begin, end - 1);
    if (!located)
        FAIL(STATUS_BAD_DATA, "%s: content has hash %s, its manifest says %s", path, found.hex,
             written->hex);
    FAIL(STATUS_BAD_DATA,
         "%s: content has hash %s, its manifest says %s; the first change is in bytes %" PRIu64
         " to %" PRIu64,
         path, found.hex, written->hex, begin, end - 1);
}

static Status verify_files(const char *path, const Manifest *manifest) {
    int64_t named = checkpoint_step_of(path);
    if (named >= 0 && named != manifest->step)
        FAIL(STATUS_BAD_DATA, "%s: its manifest is of step %" PRId64, path, manifest->step);
    // All sizes before any hash: a torn checkpoint shows without reading gigabytes.
    for (int hash = 0; hash <= 1; hash++)
        for (int i = 0; i < manifest->count; i++) TRY(verify_file(path, &manifest->files[i], hash));
    return STATUS_OK;
}

Status checkpoint_verify(const char *path) {
    Manifest manifest;
    TRY(manifest_read(path, &manifest));
    Status status = verify_files(path, &manifest);
    manifest_free(&manifest);
    return status;
}

Status checkpoint_read_state(const char *path, json_t **state) {
    char file[IO_PATH_MAX];
    TRY(io_path(file, "%s/state.json", path));
    return json_read_file(file, STATE_MAX_BYTES, state);
}

// --- Loading -------------------------------------------------------------------------------------

// The master weights of a checkpoint as a source for model_load.
typedef struct MasterSource {
    TensorSource base;
    const SliceSet *set;
} MasterSource;

static Status read_master(TensorSource *source, const Tensor *tensor, int64_t first, int64_t count,
                          float *out) {
    const SliceSet *set = ((MasterSource *)source)->set;
    return slices_read(set, SLICE_MASTER, tensor, first, count, out);
}

static void close_nothing(TensorSource *source) {
    (void)source;
}

// One of m and v on its way in.
typedef struct MomentLoad {
    const SliceSet *set;
    SliceKind kind;
    const Optimizer *optimizer;
    char *arena;
    float *chunk; // (CHUNK_ELEMENTS) as read
    void *kept;   // (CHUNK_ELEMENTS) as the optimizer keeps it
} MomentLoad;

// Elements [first, first + count) of a tensor go to place `at`. What was kept in the optimizer's
// own dtype comes back with the same bits; fp32 moments are rounded where they are kept in bf16
// now.
static Status load_piece(const MomentLoad *load, const Tensor *tensor, int64_t first, int64_t count,
                         int64_t at) {
    Backend *backend = load->optimizer->model->backend;
    const DType dtype = load->optimizer->options.state_dtype;
    const size_t width = dtype_bytes(dtype);
    for (int64_t done = 0; done < count; done += CHUNK_ELEMENTS) {
        int64_t some = count - done < CHUNK_ELEMENTS ? count - done : CHUNK_ELEMENTS;
        TRY(slices_read(load->set, load->kind, tensor, first + done, some, load->chunk));
        dtype_from_f32(dtype, load->chunk, load->kept, (size_t)some);
        TRY(backend->ops->upload(backend, load->arena + (size_t)(at + done) * width, load->kept,
                                 (size_t)some * width));
    }
    return STATUS_OK;
}

// What the optimizer's rank owns; gaps between tensors stay zero.
static Status load_owned(const MomentLoad *load) {
    const Partition *partition = load->optimizer->partition;
    const TensorTable *table = &load->optimizer->model->table;
    for (int b = 0; b < partition->count; b++) {
        const int64_t own = partition_begin(partition, b);
        int64_t first;
        for (int i = 0; i < table->count; i++) {
            const Tensor *tensor = &table->tensors[i];
            const int64_t count =
                tensor_part(tensor, own, own + partition->buckets[b].part, &first);
            if (count > 0)
                TRY(load_piece(load, tensor, first, count,
                               partition->buckets[b].state + tensor->offset + first - own));
        }
    }
    return STATUS_OK;
}

static Status load_moments(const SliceSet *set, SliceKind kind, const Optimizer *optimizer,
                           void *arena) {
    Status status = STATUS_OK;
    MomentLoad load = {.set = set, .kind = kind, .optimizer = optimizer, .arena = arena};
    load.chunk = malloc(CHUNK_ELEMENTS * sizeof *load.chunk);
    load.kept = malloc(CHUNK_ELEMENTS * dtype_bytes(optimizer->options.state_dtype));
    if (!load.chunk || !load.kept)
        FAIL_GOTO(done, STATUS_INTERNAL, "out of memory loading optimizer state");
    TRY_GOTO(load_owned(&load), done);
done:
    free(load.kept);
    free(load.chunk);
    return status;
}

Status checkpoint_load(const char *path, Model *model, Optimizer *optimizer) {
    Status status = STATUS_OK;
    SliceSet set = {0};
    TensorTable whole; // of which this rank may have only some experts
    TRY(tensor_table_build(&model->config, &whole));
    TRY_GOTO(slices_open(path, &whole, &set), done);
    MasterSource source = {.base = {.config = &model->config,
                                    .table = &whole,
                                    .dtype = DTYPE_F32,
                                    .read = read_master,
                                    .close = close_nothing},
                           .set = &set};
    TRY_GOTO(model_load(model, &source.base), done);
    if (!optimizer) goto done;
    TRY_GOTO(load_moments(&set, SLICE_M, optimizer, optimizer->m), done);
    TRY_GOTO(load_moments(&set, SLICE_V, optimizer, optimizer->v), done);
done:
    slices_close(&set);
    tensor_table_free(&whole);
    return status;
}
