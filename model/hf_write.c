// Writing a Hugging Face model directory from any TensorSource.
//
// One pass: tensors flow in table order from the source through one chunk into the current weight
// file, so memory does not grow with the model. What the table does not hold but readers expect is
// an item without a source tensor: vLLM keeps a parameter for mlp.shared_expert_gate of every
// qwen2_moe layer even when the shared expert has width 0, so zeros of shape (1, H) are written,
// while the expert's own zero-size matrices have no slot in vLLM and are left out.
//
// Everything is written into "<directory>.tmp" and renamed at the end. A directory cannot be
// renamed over another one, so an earlier export moves to "<directory>.old" for the instant between
// two renames; the next call moves it back should that instant have been the end of the process.
#include "model/hf.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/file.h"
#include "base/json.h"
#include "model/safetensors.h"

enum { CHUNK_ELEMENTS = 1 << 20, FILE_NAME_MAX = 48 };

static const char *const copied_files[] = {
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "dense2moe_tokenizer.json",
    "generation_config.json",
    "LICENSE",
};

// One tensor of the export.
typedef struct Item {
    char name[TENSOR_NAME_MAX];
    const Tensor *tensor; // of the source, or NULL: zeros
    SafetensorsSpec spec;
    uint64_t count;
    int file; // which weight file holds it
} Item;

typedef struct Export {
    TensorSource *source;
    const HfWriteOptions *options;
    json_t *config;
    Item *items;
    size_t num_items;
    int num_files;
    uint64_t done_bytes, total_bytes;
    float *chunk;                // (CHUNK_ELEMENTS)
    char directory[IO_PATH_MAX]; // without a slash at the end
    char temp[IO_PATH_MAX], old[IO_PATH_MAX];
} Export;

// --- What will be written ------------------------------------------------------------------------

static void add_item(Export *export, const Tensor *tensor, Item item) {
    Item *slot = &export->items[export->num_items++];
    *slot = item;
    slot->tensor = tensor;
    slot->spec.name = slot->name; // items never move
    slot->spec.dtype = export->options->dtype;
    slot->count = 1;
    for (int i = 0; i < slot->spec.ndim; i++) slot->count *= (uint64_t)slot->spec.shape[i];
    export->total_bytes += slot->count * dtype_bytes(slot->spec.dtype);
}

static Status list_items(Export *export) {
    const TensorTable *table = export->source->table;
    const ModelConfig *config = export->source->config;
    const char *type = json_string_value(json_object_get(export->config, "model_type"));
    bool shared_gate = type && strcmp(type, "qwen2_moe") == 0;
    export->items = calloc((size_t)table->count + (size_t)table->num_layers, sizeof(Item));
    if (!export->items) FAIL(STATUS_INTERNAL, "out of memory listing tensors");
    for (int i = 0; i < table->count; i++) {
        const Tensor *tensor = &table->tensors[i];
        Item item = {.spec = {.ndim = tensor->ndim, .shape = {tensor->shape[0], tensor->shape[1]}}};
        memcpy(item.name, tensor->name, sizeof item.name);
        add_item(export, tensor, item);
    }
    for (int l = 0; l < table->num_layers && shared_gate; l++) {
        if (!config_layer_is_moe(config, l)) continue;
        Item item = {.spec = {.ndim = 2, .shape = {1, config->hidden_size}}};
        snprintf(item.name, sizeof item.name, "model.layers.%d.mlp.shared_expert_gate.weight", l);
        add_item(export, NULL, item);
    }
    return STATUS_OK;
}

// Fills files in order; a tensor above the limit has a file of its own.
static void assign_files(Export *export) {
    uint64_t limit = export->options->max_shard_bytes, used = 0;
    export->num_files = 1;
    for (size_t i = 0; i < export->num_items; i++) {
        Item *item = &export->items[i];
        uint64_t bytes = item->count * dtype_bytes(item->spec.dtype);
        if (limit && used > 0 && bytes > limit - (used < limit ? used : limit)) {
            export->num_files++;
            used = 0;
        }
        used += bytes;
        item->file = export->num_files - 1;
    }
}

static void file_name(const Export *export, int file, char name[FILE_NAME_MAX]) {
    if (export->num_files == 1)
        snprintf(name, FILE_NAME_MAX, "model.safetensors");
    else
        snprintf(name, FILE_NAME_MAX, "model-%05d-of-%05d.safetensors", file + 1,
                 export->num_files);
}

// --- Weights -------------------------------------------------------------------------------------

// gate_scale multiplies an expert's output, and so does its down_proj, which is linear.
static float scale_of(const Export *export, const Tensor *tensor) {
    bool expert_down = tensor->role == ROLE_DOWN && tensor->expert >= 0;
    return expert_down ? export->source->config->router.gate_scale : 1.0f;
}

static Status fill_chunk(Export *export, const Tensor *tensor, uint64_t first, uint64_t count) {
    if (!tensor) {
        memset(export->chunk, 0, count * sizeof *export->chunk);
        return STATUS_OK;
    }
    TRY(export->source->read(export->source, tensor, (int64_t)first, (int64_t)count,
                             export->chunk));
    float scale = scale_of(export, tensor);
    for (uint64_t i = 0; i < count && scale != 1.0f; i++) export->chunk[i] *= scale;
    return STATUS_OK;
}

static Status append_item(Export *export, SafetensorsWriter *writer, const Item *item) {
    const HfWriteOptions *options = export->options;
    for (uint64_t done = 0; done < item->count;) {
        uint64_t count = item->count - done;
        if (count > CHUNK_ELEMENTS) count = CHUNK_ELEMENTS;
        TRY(fill_chunk(export, item->tensor, done, count));
        TRY(safetensors_writer_append(writer, export->chunk, count));
        done += count;
        export->done_bytes += count * dtype_bytes(item->spec.dtype);
        if (options->progress)
            options->progress(options->context, export->done_bytes, export->total_bytes);
    }
    return STATUS_OK;
}

// Writes items [first, last), which are all of one file.
static Status write_file(Export *export, const char *path, size_t first, size_t last) {
    Status status = STATUS_OK;
    SafetensorsWriter *writer = NULL;
    FileHash hash;
    SafetensorsSpec *specs = calloc(last - first, sizeof *specs);
    if (!specs) FAIL(STATUS_INTERNAL, "out of memory writing %s", path);
    for (size_t i = first; i < last; i++) specs[i - first] = export->items[i].spec;
    TRY_GOTO(safetensors_writer_open(path, specs, last - first, NULL, &writer), done);
    for (size_t i = first; i < last; i++)
        TRY_GOTO(append_item(export, writer, &export->items[i]), done);
    status = safetensors_writer_finish(writer, &hash);
    writer = NULL;
done:
    safetensors_writer_abort(writer);
    free(specs);
    return status;
}

static Status write_weights(Export *export) {
    export->chunk = malloc(CHUNK_ELEMENTS * sizeof *export->chunk);
    if (!export->chunk) FAIL(STATUS_INTERNAL, "out of memory writing %s", export->temp);
    for (size_t first = 0; first < export->num_items;) {
        int file = export->items[first].file;
        size_t last = first;
        while (last < export->num_items && export->items[last].file == file) last++;
        char name[FILE_NAME_MAX], path[IO_PATH_MAX];
        file_name(export, file, name);
        TRY(io_path(path, "%s/%s", export->temp, name));
        TRY(write_file(export, path, first, last));
        first = last;
    }
    return STATUS_OK;
}

static Status write_index(const Export *export) {
    char path[IO_PATH_MAX];
    if (export->num_files == 1) return STATUS_OK;
    TRY(io_path(path, "%s/model.safetensors.index.json", export->temp));
    json_t *map = json_object();
    int failed = 0;
    for (size_t i = 0; i < export->num_items; i++) {
        char name[FILE_NAME_MAX];
        file_name(export, export->items[i].file, name);
        failed |= json_object_set_new(map, export->items[i].name, json_string(name));
    }
    json_t *index = json_pack("{s:{s:I}, s:o}", "metadata", "total_size",
                              (json_int_t) export->total_bytes, "weight_map", map);
    Status status;
    if (!index || failed)
        status = status_fail(__FILE__, __LINE__, STATUS_INTERNAL, "out of memory: %s", path);
    else
        status = json_write_file(path, index);
    json_decref(index);
    return status;
}

// --- Small files ---------------------------------------------------------------------------------

// config.json is read by people: the shortest digits that bring back the same numbers.
static Status write_config(const Export *export) {
    char path[IO_PATH_MAX];
    TRY(io_path(path, "%s/config.json", export->temp));
    for (int precision = 15; precision < 17; precision++) {
        size_t flags = JSON_INDENT(2) | JSON_SORT_KEYS | JSON_REAL_PRECISION((size_t)precision);
        char *text = json_dumps(export->config, flags);
        json_t *again = text ? json_loads(text, 0, NULL) : NULL;
        bool same = again && json_equal(again, export->config);
        json_decref(again);
        Status status = STATUS_OK;
        if (same) {
            size_t bytes = strlen(text);
            text[bytes] = '\n'; // in place of the NUL
            status = io_write_file_atomic(path, text, bytes + 1);
        }
        free(text);
        if (same) return status;
    }
    return json_write_file(path, export->config);
}

static Status copy_files(const Export *export) {
    char from[IO_PATH_MAX], to[IO_PATH_MAX];
    if (!export->options->copy_from) return STATUS_OK;
    for (size_t i = 0; i < sizeof copied_files / sizeof copied_files[0]; i++) {
        TRY(io_path(from, "%s/%s", export->options->copy_from, copied_files[i]));
        TRY(io_path(to, "%s/%s", export->temp, copied_files[i]));
        if (io_exists(from)) TRY(io_copy_file(from, to));
    }
    return STATUS_OK;
}

// The bytes tokenizer is its identity.
static Status write_tokenizer_marker(const Export *export) {
    static const char text[] = "{\"type\": \"bytes\"}\n";
    const char *id = export->options->tokenizer_id;
    char path[IO_PATH_MAX];
    if (!id || strcmp(id, TOKENIZER_BYTES_ID) != 0) return STATUS_OK;
    TRY(io_path(path, "%s/dense2moe_tokenizer.json", export->temp));
    TRY(io_write_file_atomic(path, text, sizeof text - 1));
    return STATUS_OK;
}

static Status write_generation_config(const Export *export) {
    const ModelConfig *config = export->source->config;
    char path[IO_PATH_MAX];
    TRY(io_path(path, "%s/generation_config.json", export->temp));
    if (io_exists(path)) return STATUS_OK; // copied
    json_t *root = json_object();
    int failed = root ? 0 : -1;
    if (config->bos_token_id >= 0)
        failed |= json_object_set_new(root, "bos_token_id", json_integer(config->bos_token_id));
    if (config->eos_token_id >= 0)
        failed |= json_object_set_new(root, "eos_token_id", json_integer(config->eos_token_id));
    Status status;
    if (failed)
        status = status_fail(__FILE__, __LINE__, STATUS_INTERNAL, "out of memory: %s", path);
    else
        status = json_write_file(path, root);
    json_decref(root);
    return status;
}

// --- The directory -------------------------------------------------------------------------------

static Status name_directories(Export *export, const char *directory) {
    TRY(io_path(export->directory, "%s", directory));
    size_t length = strlen(export->directory);
    while (length > 1 && export->directory[length - 1] == '/') export->directory[--length] = '\0';
    TRY(io_path(export->temp, "%s.tmp", export->directory));
    TRY(io_path(export->old, "%s.old", export->directory));
    return STATUS_OK;
}

// Only a model directory or an empty one is replaced: a mistyped path must not cost a user's files.
static Status check_replaceable(const Export *export) {
    char config[IO_PATH_MAX], **names;
    size_t count;
    if (!io_exists(export->directory)) return STATUS_OK;
    if (!io_is_directory(export->directory))
        FAIL(STATUS_CANNOT_WRITE, "%s: is there and is no directory", export->directory);
    TRY(io_path(config, "%s/config.json", export->directory));
    TRY(io_list_directory(export->directory, &names, &count));
    io_free_names(names, count);
    if (count > 0 && !io_exists(config)) {
        FAIL(STATUS_CANNOT_WRITE,
             "%s: holds files but no config.json: only an earlier export is replaced",
             export->directory);
    }
    return STATUS_OK;
}

static Status fsync_parent(const char *path) {
    char parent[IO_PATH_MAX];
    TRY(io_path(parent, "%s/..", path));
    TRY(io_fsync_directory(parent));
    return STATUS_OK;
}

static Status publish(const Export *export) {
    bool replaces = io_exists(export->directory);
    TRY(io_fsync_directory(export->temp));
    if (replaces) {
        TRY(io_remove_tree(export->old));
        TRY(io_rename(export->directory, export->old));
    }
    Status status = io_rename(export->temp, export->directory);
    if (status != STATUS_OK) {
        // Best effort: the first failure is the one to report, and the next call tries again.
        if (replaces) (void)rename(export->old, export->directory);
        return status;
    }
    TRY(fsync_parent(export->directory));
    if (replaces) TRY(io_remove_tree(export->old));
    return STATUS_OK;
}

static Status write_all(Export *export) {
    TRY(io_remove_tree(export->temp)); // left by a killed process
    TRY(io_make_directories(export->temp));
    TRY(write_weights(export));
    TRY(write_index(export));
    TRY(write_config(export));
    TRY(copy_files(export));
    TRY(write_tokenizer_marker(export));
    TRY(write_generation_config(export));
    TRY(publish(export));
    return STATUS_OK;
}

Status hf_write(const char *directory, TensorSource *source, const HfWriteOptions *options) {
    Status status = STATUS_OK;
    Export *export = calloc(1, sizeof *export); // three paths: large for a stack
    if (!export) FAIL(STATUS_INTERNAL, "out of memory writing %s", directory);
    export->source = source;
    export->options = options;
    TRY_GOTO(config_to_json(source->config, options->dtype, &export->config), done);
    TRY_GOTO(name_directories(export, directory), done);
    if (!io_exists(export->directory) && io_exists(export->old))
        TRY_GOTO(io_rename(export->old, export->directory), done);
    TRY_GOTO(check_replaceable(export), done);
    TRY_GOTO(list_items(export), done);
    assign_files(export);
    status = write_all(export);
    if (status != STATUS_OK) {
        StatusRecord record;
        status_take(&record);
        if (io_remove_tree(export->temp) != STATUS_OK) status_clear(); // frees the space if it can
        status_put(&record);
    }
done:
    json_decref(export->config);
    free(export->items);
    free(export->chunk);
    free(export);
    return status;
}

Status hf_check_writable(const ModelConfig *config) {
    json_t *root;
    TRY(config_to_json(config, DTYPE_F32, &root));
    json_decref(root);
    return STATUS_OK;
}
