// Power loss during a save: whatever had not been synced by then is lost, and what the disk holds
// afterwards still is a directory of checkpoints of which each that looks complete verifies.
//
// A hook watches the file operations of one save. Beside the real files it keeps what a disk would
// have for certain: a file's bytes as of its last fsync, a directory's names as of its last fsync.
// Before each operation it makes the directories that a power loss may leave at that moment, with
// none, all or some of the changes of names since (a file system may write these in any order, and
// before the data), and looks for checkpoints in them.
#include "tests/checkpoint_fixture.h"

#include <dirent.h>
#include <sys/stat.h>

enum { OBJECTS_MAX = 256, NAMES_MAX = 16, NAME_ROOM = 256, MIXTURES = 8 };

// Which of the names that have changed since their directory's last fsync are on the disk: none of
// the changes, all, or some.
typedef enum Names { NAMES_SYNCED, NAMES_OF_NOW, NAMES_MIXED } Names;

typedef struct Object {
    ino_t inode;
    bool directory;
    bool gone;  // its number may belong to another one by now
    char *data; // of a file, as synced; NULL: never
    size_t bytes;
    int num_names; // of a directory, as synced
    char names[NAMES_MAX][NAME_ROOM];
    struct Object *entries[NAMES_MAX];
} Object;

typedef struct Disk {
    Object objects[OBJECTS_MAX];
    int num_objects;
    char synced[IO_PATH_MAX]; // path of an fsync that was about to happen; "": none
    bool inside;              // the hook itself works with files
    uint64_t random;
    int moments, old, new; // moments; in how many looks the newest was 20, 30
} Disk;

static Disk disk;

// --- What is on the disk -------------------------------------------------------------------------

static Object *object_at(const char *path, struct stat *found) {
    if (stat(path, found) != 0) return NULL;
    for (int i = 0; i < disk.num_objects; i++)
        if (disk.objects[i].inode == found->st_ino && !disk.objects[i].gone)
            return &disk.objects[i];
    ck_assert_int_lt(disk.num_objects, OBJECTS_MAX);
    disk.objects[disk.num_objects] =
        (Object){.inode = found->st_ino, .directory = S_ISDIR(found->st_mode)};
    return &disk.objects[disk.num_objects++];
}

static void join(char out[IO_PATH_MAX], const char *directory_path, const char *name) {
    ck_assert_ok(io_path(out, "%s/%s", directory_path, name));
}

static void sync_file(Object *object, const char *path, size_t bytes) {
    FILE *file = fopen(path, "rb");
    ck_assert_ptr_nonnull(file);
    free(object->data);
    object->data = malloc(bytes + 1);
    object->bytes = fread(object->data, 1, bytes, file);
    ck_assert_uint_eq(object->bytes, bytes);
    fclose(file);
}

static void sync_names(Object *object, const char *path) {
    char child[IO_PATH_MAX];
    struct stat found;
    DIR *stream = opendir(path);
    ck_assert_ptr_nonnull(stream);
    object->num_names = 0;
    for (struct dirent *entry; (entry = readdir(stream));) {
        if (entry->d_name[0] == '.') continue;
        ck_assert_int_lt(object->num_names, NAMES_MAX);
        join(child, path, entry->d_name);
        object->entries[object->num_names] = object_at(child, &found);
        snprintf(object->names[object->num_names++], NAME_ROOM, "%s", entry->d_name);
    }
    closedir(stream);
}

static void sync_path(const char *path) {
    struct stat found;
    Object *object = object_at(path, &found);
    if (!object) return; // it failed, or the file is gone again
    if (object->directory)
        sync_names(object, path);
    else
        sync_file(object, path, (size_t)found.st_size);
}

static void sync_tree(const char *path) {
    char child[IO_PATH_MAX];
    struct stat found;
    sync_path(path);
    Object *object = object_at(path, &found);
    for (int i = 0; i < object->num_names; i++) {
        join(child, path, object->names[i]);
        sync_tree(child);
    }
}

// --- What a power loss leaves --------------------------------------------------------------------

static bool is_synced(const Object *directory_object, const char *name, const Object *entry) {
    for (int i = 0; i < directory_object->num_names; i++)
        if (directory_object->entries[i] == entry && strcmp(directory_object->names[i], name) == 0)
            return true;
    return false;
}

static void restore_file(const Object *object, const char *to) {
    FILE *file = fopen(to, "wb");
    ck_assert_ptr_nonnull(file);
    if (object->data)
        ck_assert_uint_eq(fwrite(object->data, 1, object->bytes, file), object->bytes);
    ck_assert_int_eq(fclose(file), 0);
}

// Whether a change of names that was not synced is on the disk.
static bool survives(Names names, bool is_new) {
    if (names != NAMES_MIXED) return is_new == (names == NAMES_OF_NOW);
    disk.random = disk.random * 6364136223846793005u + 1442695040888963407u;
    return disk.random >> 63;
}

// `now`: where the object is at this moment; NULL when it has no name any more. Bytes are those
// that were synced; files and directories that never were are empty.
static void restore(const Object *object, const char *now, const char *to, Names names) {
    char source[IO_PATH_MAX], child[IO_PATH_MAX];
    struct stat found;
    if (!object->directory) {
        restore_file(object, to);
        return;
    }
    ck_assert_int_eq(mkdir(to, 0777), 0);
    for (int i = 0; i < object->num_names; i++) {
        join(child, to, object->names[i]);
        if (now) join(source, now, object->names[i]);
        if (now && object_at(source, &found) == object->entries[i])
            restore(object->entries[i], source, child, names);
        else if (survives(names, false))
            restore(object->entries[i], NULL, child, names);
    }
    DIR *stream = now ? opendir(now) : NULL;
    for (struct dirent *entry; stream && (entry = readdir(stream));) {
        if (entry->d_name[0] == '.') continue;
        join(source, now, entry->d_name);
        join(child, to, entry->d_name);
        if (access(child, F_OK) == 0 || is_synced(object, entry->d_name, object_at(source, &found)))
            continue;
        if (survives(names, true)) restore(object_at(source, &found), source, child, names);
    }
    if (stream) closedir(stream);
}

// Each checkpoint with a manifest verifies, and the newest is 20 or 30. Removes `left`.
static void look_at(const char *left) {
    char **names, path[IO_PATH_MAX];
    size_t count;
    int64_t step;
    ck_assert_ok(io_list_directory(left, &names, &count));
    for (size_t i = 0; i < count; i++) {
        char manifest[IO_PATH_MAX];
        join(path, left, names[i]);
        join(manifest, path, MANIFEST_NAME);
        if (checkpoint_step_of(path) < 0 || !io_exists(manifest)) continue;
        ck_assert_msg(checkpoint_verify(path) == STATUS_OK, "moment %d, %s: %s", disk.moments,
                      names[i], status_message());
    }
    io_free_names(names, count);
    ck_assert_ok(checkpoint_find(left, &step, path));
    ck_assert_msg(step == 20 || step == 30, "moment %d: step %" PRId64, disk.moments, step);
    disk.old += step == 20;
    disk.new += step == 30;
    ck_assert_ok(io_remove_tree(left));
}

static void lose_power(void) {
    char left[IO_PATH_MAX];
    struct stat found;
    ck_assert_ok(io_path(left, "%s-left", directory));
    for (int i = 0; i < 2 + MIXTURES; i++) {
        const Names names = i == 0 ? NAMES_SYNCED : i == 1 ? NAMES_OF_NOW : NAMES_MIXED;
        restore(object_at(directory, &found), directory, left, names);
        look_at(left);
    }
    disk.moments++;
}

static int watch(void *context, IoOp op, const char *path, size_t *bytes) {
    struct stat found;
    (void)context;
    (void)bytes;
    if (disk.inside) return 0;
    disk.inside = true;
    if (disk.synced[0]) sync_path(disk.synced); // it has happened by now
    disk.synced[0] = '\0';
    if (op != IO_READ && op != IO_OPEN) lose_power();
    if (op == IO_FSYNC) ck_assert_ok(io_path(disk.synced, "%s", path));
    if (op == IO_UNLINK) {
        Object *object = object_at(path, &found);
        if (object) object->gone = true;
    }
    disk.inside = false;
    return 0;
}

// --- Tests ---------------------------------------------------------------------------------------

START_TEST(what_a_power_loss_leaves_verifies) {
    setenv("DENSE2MOE_LOG", "error", 1);
    use_directory("power");
    Fixture f = fixture();
    ck_assert_ok(save(&f, 10));
    ck_assert_ok(save(&f, 20));
    sync_tree(directory);
    io_set_hook(watch, NULL);
    ck_assert_ok(save(&f, 30)); // and 10 goes
    disk.inside = true;
    sync_path(disk.synced);
    ck_assert_int_ge(disk.old, 100);
    ck_assert_int_ge(disk.new, 50);
    // Once the save has returned, the new one is there for certain.
    const int before = disk.new;
    lose_power();
    io_set_hook(NULL, NULL);
    ck_assert_int_eq(disk.new, before + 2 + MIXTURES);
    ck_assert_int_eq(newest(), 30);
    printf("%d moments, %d times step 20 and %d times step 30\n", disk.moments, disk.old, disk.new);
    for (int i = 0; i < disk.num_objects; i++) free(disk.objects[i].data);
    fixture_free(&f);
}
END_TEST

TEST_MAIN("checkpoint_power", TEST(what_a_power_loss_leaves_verifies))
