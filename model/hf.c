// Reading a Hugging Face model directory as a TensorSource.
//
// Opening reads headers only: config.json, and the header of every weight file. Then each tensor of
// the config's table is located once, by name, and its shape compared, so that a run that starts
// cannot fail later for a missing or misshapen tensor. The weights themselves stay on disk until
// somebody reads a piece.
//
// transformers 5 may store the experts of a layer as two tensors, mlp.experts.gate_up_proj
// (E, 2I, H) and mlp.experts.down_proj (E, H, I). Each expert's matrix is a contiguous part of
// them, so a location is a tensor of a file plus a first element.
#include "model/hf.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/file.h"
#include "base/json.h"
#include "base/log.h"
#include "model/safetensors.h"

enum { MAX_CONFIG_BYTES = 1 << 24, MAX_INDEX_BYTES = 1 << 28, MAX_FILES = 1000 };

typedef struct Location {
    const SafetensorsFile *file;
    const SafetensorsEntry *entry;
    uint64_t first; // element of the entry where the tensor begins
} Location;

typedef struct HfSource {
    TensorSource base; // first: a TensorSource * is an HfSource *
    ModelConfig config;
    TensorTable table;
    SafetensorsFile *files;
    size_t num_files;
    json_t *weight_map;  // tensor name -> file name, NULL for a single file
    Location *locations; // (table.count)
} HfSource;

// --- Files ---------------------------------------------------------------------------------------

static Status open_single(HfSource *source, const char *path) {
    source->files = calloc(1, sizeof *source->files);
    if (!source->files) FAIL(STATUS_INTERNAL, "out of memory opening %s", path);
    TRY(safetensors_open(path, &source->files[0]));
    source->num_files = 1;
    return STATUS_OK;
}

// A name from the index must not lead out of the directory.
static bool is_plain_name(const char *name) {
    return name && name[0] && name[0] != '.' && !strchr(name, '/');
}

static const SafetensorsFile *find_file(const HfSource *source, const char *name) {
    for (size_t i = 0; i < source->num_files; i++)
        if (strcmp(strrchr(source->files[i].path, '/') + 1, name) == 0) return &source->files[i];
    return NULL;
}

static Status read_weight_map(HfSource *source, const char *path) {
    json_t *index, *map;
    TRY(json_read_file(path, MAX_INDEX_BYTES, &index));
    Status status = json_get_object(index, path, "weight_map", &map);
    if (status == STATUS_OK) source->weight_map = json_incref(map);
    json_decref(index);
    return status;
}

// Opens every file that the index names, and checks that it holds what the index says.
static Status open_sharded(HfSource *source, const char *directory, const char *index_path) {
    TRY(read_weight_map(source, index_path));
    source->files = calloc(MAX_FILES, sizeof *source->files);
    if (!source->files) FAIL(STATUS_INTERNAL, "out of memory opening %s", index_path);
    const char *tensor;
    json_t *value;
    json_object_foreach(source->weight_map, tensor, value) {
        const char *name = json_string_value(value);
        char path[IO_PATH_MAX];
        if (!is_plain_name(name)) {
            FAIL(STATUS_BAD_DATA, "%s: weight_map[\"%.100s\"] is not the name of a file beside it",
                 index_path, tensor);
        }
        if (!find_file(source, name)) {
            if (source->num_files == MAX_FILES)
                FAIL(STATUS_BAD_DATA, "%s: more than %d files", index_path, MAX_FILES);
            TRY(io_path(path, "%s/%s", directory, name));
            TRY(safetensors_open(path, &source->files[source->num_files]));
            source->num_files++;
        }
        if (!safetensors_find(find_file(source, name), tensor)) {
            FAIL(STATUS_BAD_DATA, "%s: tensor %.100s should be in %s, which does not hold it",
                 index_path, tensor, name);
        }
    }
    return STATUS_OK;
}

// The single file wins where both are there, as in transformers.
static Status open_files(HfSource *source, const char *directory) {
    char single[IO_PATH_MAX], index[IO_PATH_MAX], torch[IO_PATH_MAX];
    TRY(io_path(single, "%s/model.safetensors", directory));
    TRY(io_path(index, "%s/model.safetensors.index.json", directory));
    TRY(io_path(torch, "%s/pytorch_model.bin", directory));
    if (io_exists(single)) return open_single(source, single);
    if (io_exists(index)) return open_sharded(source, directory, index);
    FAIL(STATUS_MISSING_INPUT, "%s: neither model.safetensors nor model.safetensors.index.json%s",
         directory,
         io_exists(torch) ? " (pytorch_model.bin is there: save it again as safetensors)" : "");
}

// --- Locating tensors ----------------------------------------------------------------------------

static bool find_entry(const HfSource *source, const char *name, Location *out) {
    const SafetensorsFile *file = &source->files[0];
    if (source->weight_map) {
        const json_t *value = json_object_get(source->weight_map, name);
        if (!value) return false;
        file = find_file(source, json_string_value(value));
    }
    *out = (Location){file, safetensors_find(file, name), 0};
    return out->entry != NULL;
}

static void print_shape(char *text, size_t size, int ndim, const uint64_t *shape) {
    size_t used = (size_t)snprintf(text, size, "[");
    for (int i = 0; i < ndim && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, "%s%" PRIu64, i ? ", " : "", shape[i]);
    if (used < size) snprintf(text + used, size - used, "]");
}

static Status check_entry(const Location *at, int ndim, const uint64_t *shape) {
    const SafetensorsEntry *entry = at->entry;
    if (!entry->known_dtype) {
        FAIL(STATUS_BAD_DATA, "%s: tensor %s has dtype %s, expected F32, BF16 or F16",
             at->file->path, entry->name, entry->dtype_name);
    }
    if (entry->ndim == ndim && memcmp(entry->shape, shape, (size_t)ndim * sizeof *shape) == 0)
        return STATUS_OK;
    char found[256], expected[256];
    print_shape(found, sizeof found, entry->ndim, entry->shape);
    print_shape(expected, sizeof expected, ndim, shape);
    FAIL(STATUS_BAD_DATA, "%s: tensor %s has shape %s, expected %s as config.json says",
         at->file->path, entry->name, found, expected);
}

// The part of a fused expert tensor that holds `tensor`; *found = false where there is none.
static Status locate_fused(const HfSource *source, const Tensor *tensor, Location *out,
                           bool *found) {
    char name[TENSOR_NAME_MAX];
    bool down = tensor->role == ROLE_DOWN;
    *found = false;
    if (tensor->expert < 0) return STATUS_OK;
    snprintf(name, sizeof name, "model.layers.%d.mlp.experts.%s", tensor->layer,
             down ? "down_proj" : "gate_up_proj");
    if (!find_entry(source, name, out)) return STATUS_OK;

    uint64_t rows = (uint64_t)tensor->shape[0] * (down ? 1 : 2);
    const uint64_t shape[3] = {(uint64_t)source->config.layers[tensor->layer].num_experts, rows,
                               (uint64_t)tensor->shape[1]};
    TRY(check_entry(out, 3, shape));
    out->first = (uint64_t)tensor->expert * rows * shape[2];
    if (tensor->role == ROLE_UP) out->first += (uint64_t)tensor->count; // after the gate's rows
    *found = true;
    return STATUS_OK;
}

static Status locate(const HfSource *source, const char *directory, const Tensor *tensor,
                     Location *out) {
    if (find_entry(source, tensor->name, out)) {
        const uint64_t shape[2] = {(uint64_t)tensor->shape[0], (uint64_t)tensor->shape[1]};
        TRY(check_entry(out, tensor->ndim, shape));
        return STATUS_OK;
    }
    bool found;
    TRY(locate_fused(source, tensor, out, &found));
    if (!found) {
        FAIL(STATUS_BAD_DATA,
             "%s: tensor %s is missing: config.json needs it, no weight file "
             "holds it",
             directory, tensor->name);
    }
    return STATUS_OK;
}

static Status locate_all(HfSource *source, const char *directory) {
    source->locations = calloc((size_t)source->table.count, sizeof *source->locations);
    if (!source->locations) FAIL(STATUS_INTERNAL, "out of memory opening %s", directory);
    for (int i = 0; i < source->table.count; i++)
        TRY(locate(source, directory, &source->table.tensors[i], &source->locations[i]));
    return STATUS_OK;
}

// --- Tensors nobody asked for --------------------------------------------------------------------

// Parts of other models that compute nothing here: what a shared expert of width 0 leaves behind,
// and the rotary frequencies that old Llama checkpoints store.
static bool is_harmless(const SafetensorsEntry *entry) {
    static const char *const endings[] = {".mlp.shared_expert_gate.weight", ".rotary_emb.inv_freq"};
    size_t length = strlen(entry->name);
    for (int i = 0; i < 2; i++) {
        size_t tail = strlen(endings[i]);
        if (length >= tail && strcmp(entry->name + length - tail, endings[i]) == 0) return true;
    }
    return entry->count == 0;
}

// Names of ignored tensors for the log: the first few, and how many there are.
typedef struct Ignored {
    size_t count, used;
    char names[512];
} Ignored;

static void ignore(Ignored *ignored, const char *name) {
    size_t room = sizeof ignored->names - ignored->used;
    const char *comma = ignored->count++ ? ", " : "";
    int written = snprintf(ignored->names + ignored->used, room, "%s%s", comma, name);
    if (written > 0 && (size_t)written < room) {
        ignored->used += (size_t)written;
    } else {
        ignored->names[ignored->used] = '\0'; // no half names
    }
}

static Status collect_ignored(const HfSource *source, const SafetensorsFile *file,
                              Ignored *ignored) {
    bool *used = calloc(file->header.count + 1, sizeof *used);
    if (!used) FAIL(STATUS_INTERNAL, "out of memory opening %s", file->path);
    for (int i = 0; i < source->table.count; i++) {
        const Location *at = &source->locations[i];
        if (at->file == file) used[at->entry - file->header.entries] = true;
    }
    for (size_t i = 0; i < file->header.count; i++) {
        const SafetensorsEntry *entry = &file->header.entries[i];
        if (used[i] || is_harmless(entry)) continue;
        if (source->config.tie_word_embeddings && strcmp(entry->name, "lm_head.weight") == 0) {
            log_info("%s: lm_head.weight is ignored: tie_word_embeddings is true", file->path);
        } else {
            ignore(ignored, entry->name);
        }
    }
    free(used);
    return STATUS_OK;
}

static Status log_ignored(const HfSource *source, const char *directory) {
    Ignored ignored = {0};
    for (size_t i = 0; i < source->num_files; i++)
        TRY(collect_ignored(source, &source->files[i], &ignored));
    if (ignored.count > 0) {
        log_warn("%s: %zu tensors that the model of config.json does not have are ignored: %s",
                 directory, ignored.count, ignored.names);
    }
    return STATUS_OK;
}

// --- The source ----------------------------------------------------------------------------------

static Status read_tensor(TensorSource *base, const Tensor *tensor, int64_t first, int64_t count,
                          float *out) {
    HfSource *source = (HfSource *)base;
    ptrdiff_t index = tensor - source->table.tensors;
    INVARIANT(index >= 0 && index < source->table.count); // a tensor of this source's own table
    INVARIANT(first >= 0 && count >= 0 && count <= tensor->count - first);
    const Location *at = &source->locations[index];
    return safetensors_read(at->file, at->entry, at->first + (uint64_t)first, (uint64_t)count, out);
}

static void close_source(TensorSource *base) {
    HfSource *source = (HfSource *)base;
    for (size_t i = 0; i < source->num_files; i++) safetensors_close(&source->files[i]);
    free(source->files);
    free(source->locations);
    tensor_table_free(&source->table);
    json_decref(source->weight_map);
    free(source);
}

// The narrowest type that holds every value as it is.
static DType common_dtype(const HfSource *source) {
    DType dtype = source->locations[0].entry->dtype;
    for (int i = 1; i < source->table.count; i++)
        if (source->locations[i].entry->dtype != dtype) return DTYPE_F32;
    return dtype;
}

static Status read_config(const char *directory, ModelConfig *out) {
    char path[IO_PATH_MAX];
    json_t *root;
    if (!io_is_directory(directory))
        FAIL(STATUS_MISSING_INPUT, "%s: no such model directory", directory);
    TRY(io_path(path, "%s/config.json", directory));
    TRY(json_read_file(path, MAX_CONFIG_BYTES, &root));
    Status status = config_from_json(root, path, out);
    json_decref(root);
    return status;
}

static Status open_source(HfSource *source, const char *directory) {
    TRY(read_config(directory, &source->config));
    TRY(tensor_table_build(&source->config, &source->table));
    TRY(open_files(source, directory));
    TRY(locate_all(source, directory));
    TRY(log_ignored(source, directory));
    source->base.config = &source->config;
    source->base.table = &source->table;
    source->base.dtype = common_dtype(source);
    return STATUS_OK;
}

Status hf_open(const char *directory, TensorSource **out) {
    HfSource *source = calloc(1, sizeof *source);
    if (!source) FAIL(STATUS_INTERNAL, "out of memory opening %s", directory);
    source->base.read = read_tensor;
    source->base.close = close_source;
    Status status = open_source(source, directory);
    if (status != STATUS_OK) {
        close_source(&source->base);
        return status;
    }
    *out = &source->base;
    return STATUS_OK;
}
