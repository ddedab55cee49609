// Writing and finding parts of optimizer state by name (checkpoint_slices.h says why).
//
// The set of all entries is checked once, when it is opened: sorted by tensor, kind and first
// element, the entries of each (tensor, kind) must follow one another from 0 to its last element.
// Then any read is a binary search and a walk.
#include "train/checkpoint_slices.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WIDEN_BLOCK = 4096 }; // elements

static const char *const kind_names[SLICE_KINDS] = {"master", "m", "v"};

Status slices_file_name(int rank, int world, char out[64]) {
    INVARIANT(rank >= 0 && rank < world && world <= CHECKPOINT_MAX_RANKS);
    snprintf(out, 64, "optimizer-%05d-of-%05d.safetensors", rank, world);
    return STATUS_OK;
}

// --- Writing -------------------------------------------------------------------------------------

// A tensor, or the part of it that lies in one range.
typedef struct SlicePart {
    const Tensor *tensor;
    int64_t first, count; // elements of the tensor
    int64_t at;           // of the first one, among all that is written
} SlicePart;

// The parts that the ranges cut out of the tensors; `parts` has room for most_parts().
static int find_parts(const TensorTable *table, const SliceRange *ranges, int num_ranges,
                      SlicePart *parts) {
    int64_t before = 0; // elements of the ranges before this one
    int count = 0;
    for (int r = 0; r < num_ranges; r++) {
        for (int i = 0; i < table->count; i++) {
            const Tensor *tensor = &table->tensors[i];
            int64_t first, some = tensor_part(tensor, ranges[r].begin, ranges[r].end, &first);
            if (some > 0)
                parts[count++] = (SlicePart){tensor, first, some,
                                             before + tensor->offset + first - ranges[r].begin};
        }
        before += ranges[r].end - ranges[r].begin;
    }
    return count;
}

static int most_parts(const TensorTable *table, const SliceRange *ranges, int num_ranges) {
    int count = 0;
    for (int r = 0; r < num_ranges; r++) {
        for (int i = 0; i < table->count; i++) {
            int64_t first;
            count += tensor_part(&table->tensors[i], ranges[r].begin, ranges[r].end, &first) > 0;
        }
    }
    return count;
}

static SafetensorsSpec describe(const SlicePart *part, SliceKind kind, char name[SLICE_NAME_MAX]) {
    const Tensor *tensor = part->tensor;
    SafetensorsSpec spec = {.name = name, .dtype = DTYPE_F32};
    if (part->count == tensor->count) {
        snprintf(name, SLICE_NAME_MAX, "%s.%s", tensor->name, kind_names[kind]);
        spec.ndim = tensor->ndim;
        for (int d = 0; d < tensor->ndim; d++) spec.shape[d] = tensor->shape[d];
    } else {
        snprintf(name, SLICE_NAME_MAX, "%s.%s[%" PRId64 ":%" PRId64 "]", tensor->name,
                 kind_names[kind], part->first, part->first + part->count);
        spec.ndim = 1;
        spec.shape[0] = part->count;
    }
    return spec;
}

static Status append_values(SafetensorsWriter *writer, const SliceArena *arena, int64_t at,
                            int64_t count) {
    if (arena->dtype == DTYPE_F32) {
        const float *values = arena->values;
        return safetensors_writer_append(writer, values + at, (uint64_t)count);
    }
    const size_t width = dtype_bytes(arena->dtype);
    const char *from = (const char *)arena->values + (size_t)at * width;
    float block[WIDEN_BLOCK];
    for (int64_t done = 0; done < count; done += WIDEN_BLOCK) {
        int64_t some = count - done < WIDEN_BLOCK ? count - done : WIDEN_BLOCK;
        dtype_to_f32(arena->dtype, from + (size_t)done * width, block, (size_t)some);
        TRY(safetensors_writer_append(writer, block, (uint64_t)some));
    }
    return STATUS_OK;
}

static Status append_parts(SafetensorsWriter *writer, const SlicePart *parts, int count,
                           const SliceArena arenas[SLICE_KINDS]) {
    for (int kind = 0; kind < SLICE_KINDS; kind++)
        for (int i = 0; i < count; i++)
            TRY(append_values(writer, &arenas[kind], parts[i].at, parts[i].count));
    return STATUS_OK;
}

Status slices_write(const char *path, const TensorTable *table, const SliceRange *ranges,
                    int num_ranges, const SliceArena arenas[SLICE_KINDS], FileHash *out) {
    Status status = STATUS_OK;
    SafetensorsWriter *writer = NULL;
    size_t most = (size_t)most_parts(table, ranges, num_ranges) + 1, used = 0;
    SlicePart *parts = malloc(most * sizeof *parts);
    SafetensorsSpec *specs = malloc(most * SLICE_KINDS * sizeof *specs);
    char(*names)[SLICE_NAME_MAX] = malloc(most * SLICE_KINDS * sizeof *names);
    if (!parts || !specs || !names) FAIL_GOTO(done, STATUS_INTERNAL, "%s: out of memory", path);
    int count = find_parts(table, ranges, num_ranges, parts);
    for (int kind = 0; kind < SLICE_KINDS; kind++)
        for (int i = 0; i < count; i++, used++)
            specs[used] = describe(&parts[i], (SliceKind)kind, names[used]);
    TRY_GOTO(safetensors_writer_open(path, specs, used, NULL, &writer), done);
    status = append_parts(writer, parts, count, arenas);
    if (status != STATUS_OK)
        safetensors_writer_abort(writer);
    else
        status = safetensors_writer_finish(writer, out);
done:
    free(names);
    free(specs);
    free(parts);
    return status;
}

// --- Reading -------------------------------------------------------------------------------------

// "<tensor>.<kind>" or "<tensor>.<kind>[first:end]"
static Status parse_name(const SliceSet *set, const SafetensorsFile *file,
                         const SafetensorsEntry *entry, SliceEntry *out) {
    char name[SLICE_NAME_MAX];
    if (strlen(entry->name) >= sizeof name)
        FAIL(STATUS_BAD_DATA, "%s: tensor name of %zu bytes, expected at most %d", file->path,
             strlen(entry->name), SLICE_NAME_MAX - 1);
    strcpy(name, entry->name);
    uint64_t first = 0, end = 0;
    char *bracket = strchr(name, '[');
    if (bracket) {
        int used = 0;
        if (sscanf(bracket, "[%" SCNu64 ":%" SCNu64 "]%n", &first, &end, &used) != 2 || used == 0 ||
            bracket[used])
            FAIL(STATUS_BAD_DATA, "%s: tensor \"%s\": expected NAME.KIND[FIRST:END]", file->path,
                 entry->name);
        *bracket = '\0';
    }
    char *dot = strrchr(name, '.');
    int kind = 0;
    while (dot && kind < SLICE_KINDS && strcmp(dot + 1, kind_names[kind]) != 0) kind++;
    if (dot) *dot = '\0';
    const Tensor *tensor = dot ? tensor_table_find(set->table, name) : NULL;
    if (!tensor || kind == SLICE_KINDS)
        FAIL(STATUS_BAD_DATA, "%s: tensor \"%s\" belongs to nothing in this model", file->path,
             entry->name);
    if (!bracket) end = (uint64_t)tensor->count;
    if (first >= end || end > (uint64_t)tensor->count || entry->count != end - first ||
        !entry->known_dtype || entry->dtype != DTYPE_F32)
        FAIL(STATUS_BAD_DATA,
             "%s: tensor \"%s\" has %" PRIu64 " elements of %s, expected %" PRIu64 " of F32",
             file->path, entry->name, entry->count, entry->dtype_name, end - first);
    *out = (SliceEntry){
        (SliceKind)kind, (int)(tensor - set->table->tensors), first, end - first, file, entry};
    return STATUS_OK;
}

static int by_position(const void *a, const void *b) {
    const SliceEntry *x = a, *y = b;
    if (x->tensor != y->tensor) return x->tensor < y->tensor ? -1 : 1;
    if (x->kind != y->kind) return x->kind < y->kind ? -1 : 1;
    return (x->first > y->first) - (x->first < y->first);
}

// Each (tensor, kind) must be covered from its first to its last element, once.
static Status check_cover(const SliceSet *set, const char *directory) {
    const SliceEntry *slice = set->entries, *end = set->entries + set->count;
    for (int i = 0; i < set->table->count; i++) {
        const Tensor *tensor = &set->table->tensors[i];
        for (int kind = 0; kind < SLICE_KINDS; kind++) {
            uint64_t covered = 0;
            bool gap = false;
            for (; slice < end && slice->tensor == i && (int)slice->kind == kind; slice++) {
                gap |= slice->first != covered;
                covered += slice->count;
            }
            if (gap || covered != (uint64_t)tensor->count)
                FAIL(STATUS_BAD_DATA,
                     "%s: the optimizer files do not hold each of the %" PRId64
                     " elements of %s.%s once",
                     directory, tensor->count, tensor->name, kind_names[kind]);
        }
    }
    return STATUS_OK;
}

// W from the one name of rank 0 that is there.
static Status find_world(const char *directory, int *world) {
    char **names;
    size_t count;
    TRY(io_list_directory(directory, &names, &count));
    *world = 0;
    for (size_t i = 0; i < count && *world == 0; i++) {
        int found, used = 0;
        if (sscanf(names[i], "optimizer-00000-of-%5d.safetensors%n", &found, &used) == 1 && used &&
            !names[i][used])
            *world = found;
    }
    io_free_names(names, count);
    if (*world < 1)
        FAIL(STATUS_BAD_DATA, "%s: holds no optimizer-00000-of-*.safetensors", directory);
    return STATUS_OK;
}

static Status open_files(const char *directory, int world, SliceSet *set) {
    set->files = calloc((size_t)world, sizeof *set->files);
    if (!set->files) FAIL(STATUS_INTERNAL, "%s: out of memory for %d files", directory, world);
    for (int rank = 0; rank < world; rank++) {
        char name[64], path[IO_PATH_MAX];
        TRY(slices_file_name(rank, world, name));
        TRY(io_path(path, "%s/%s", directory, name));
        TRY(safetensors_open(path, &set->files[rank]));
        set->num_files++;
        set->count += set->files[rank].header.count;
    }
    return STATUS_OK;
}

Status slices_open(const char *directory, const TensorTable *table, SliceSet *out) {
    Status status = STATUS_OK;
    int world;
    size_t used = 0;
    *out = (SliceSet){.table = table};
    TRY_GOTO(find_world(directory, &world), fail);
    TRY_GOTO(open_files(directory, world, out), fail);
    out->entries = malloc((out->count + 1) * sizeof *out->entries);
    if (!out->entries) FAIL_GOTO(fail, STATUS_INTERNAL, "%s: out of memory", directory);
    for (int i = 0; i < out->num_files; i++) {
        const SafetensorsHeader *header = &out->files[i].header;
        for (size_t j = 0; j < header->count; j++)
            TRY_GOTO(parse_name(out, &out->files[i], &header->entries[j], &out->entries[used++]),
                     fail);
    }
    qsort(out->entries, out->count, sizeof *out->entries, by_position);
    TRY_GOTO(check_cover(out, directory), fail);
    return STATUS_OK;
fail:
    slices_close(out);
    return status;
}

void slices_close(SliceSet *set) {
    for (int i = 0; i < set->num_files; i++) safetensors_close(&set->files[i]);
    free(set->files);
    free(set->entries);
    *set = (SliceSet){0};
}

// The entry that holds element `first`.
static const SliceEntry *slice_at(const SliceSet *set, SliceKind kind, int tensor, uint64_t first) {
    size_t low = 0, high = set->count; // the last entry not after the position is low
    SliceEntry key = {.kind = kind, .tensor = tensor, .first = first};
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (by_position(&set->entries[middle], &key) <= 0)
            low = middle;
        else
            high = middle;
    }
    return &set->entries[low];
}

Status slices_read(const SliceSet *set, SliceKind kind, const Tensor *tensor, int64_t first,
                   int64_t count, float *out) {
    const Tensor *own = tensor_table_find(set->table, tensor->name);
    INVARIANT(own && own->count == tensor->count);
    const int index = (int)(own - set->table->tensors);
    INVARIANT(first >= 0 && count >= 0 && first + count <= tensor->count);
    uint64_t at = (uint64_t)first, end = (uint64_t)(first + count);
    if (at == end) return STATUS_OK;
    const SliceEntry *slice = slice_at(set, kind, index, at);
    for (; at < end; slice++) {
        uint64_t inside = at - slice->first, some = slice->count - inside;
        if (some > end - at) some = end - at;
        TRY(safetensors_read(slice->file, slice->entry, inside, some, out));
        at += some;
        out += some;
    }
    return STATUS_OK;
}
