// Descriptors, directories and whole files, each operation announced to the fault hook first.
//
// A partial write or read is continued, an interrupted call repeated, and every failure names the
// file and the operating system's reason. Whole files appear by temp file, fsync, rename and fsync
// of the directory: at each instant the name shows the old content or the new, and after
// io_write_file_atomic returns, a power loss does not take the new one back. The temp name is fixed
// ("<path>.tmp"), so what a killed process leaves is overwritten by the next; it also means that
// one path has one writer at a time, which the run directory's lock ensures.
#include "base/file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#include "base/log.h"

enum { COPY_CHUNK_BYTES = 1 << 20, OPEN_MODE = 0666, DIRECTORY_MODE = 0777, TREE_DEPTH_FDS = 16 };

// --- The hook and DENSE2MOE_IO_FAULT -------------------------------------------------------------

static IoHook hook; // set while no other thread does I/O
static void *hook_context;

static const char *const op_names[] = {
    [IO_OPEN] = "open",     [IO_READ] = "read",     [IO_WRITE] = "write", [IO_FSYNC] = "fsync",
    [IO_RENAME] = "rename", [IO_UNLINK] = "unlink", [IO_MKDIR] = "mkdir", [IO_LOCK] = "lock",
};
enum { NUM_OPS = sizeof op_names / sizeof op_names[0], ANY_OP = -1 };

// The fault that the environment asks for.
static struct {
    enum { FAULT_NONE, FAULT_KILL, FAULT_EIO, FAULT_ENOSPC, FAULT_SHORT } action; // as `actions`
    int op;             // an IoOp, or ANY_OP
    long number;        // the first call that fails, counted from 1
    bool and_all_later; // "3+" instead of "3"
    atomic_long calls;  // so far
} fault;
static pthread_once_t fault_once = PTHREAD_ONCE_INIT;

// `text` is "op:number:action"; false when it is not.
static bool parse_fault(const char *text) {
    static const char *const actions[] = {"kill", "eio", "enospc", "short"};
    char op[16], action[16], plus[2] = "";
    int end = 0;
    if (sscanf(text, "%15[a-z]:%ld:%15[a-z]%n", op, &fault.number, action, &end) != 3 &&
        sscanf(text, "%15[a-z]:%ld%1[+]:%15[a-z]%n", op, &fault.number, plus, action, &end) != 4)
        return false;
    if (text[end] || fault.number < 1) return false;
    fault.and_all_later = plus[0] == '+';

    fault.op = strcmp(op, "any") == 0 ? ANY_OP : NUM_OPS;
    for (int i = 0; i < NUM_OPS; i++)
        if (strcmp(op, op_names[i]) == 0) fault.op = i;
    if (fault.op == NUM_OPS) return false;
    for (int i = 0; i < (int)(sizeof actions / sizeof actions[0]); i++)
        if (strcmp(action, actions[i]) == 0) fault.action = FAULT_KILL + i;
    return fault.action != FAULT_NONE;
}

static void read_fault(void) {
    const char *text = getenv("DENSE2MOE_IO_FAULT");
    if (!text || !text[0]) return;
    if (parse_fault(text)) {
        log_warn("DENSE2MOE_IO_FAULT=%s: file operations will fail as asked", text);
    } else {
        fault.action = FAULT_NONE;
        log_warn("DENSE2MOE_IO_FAULT=%s ignored, expected OP:NUMBER[+]:ACTION, for example "
                 "write:3:enospc (base/file.h)",
                 text);
    }
}

static int environment_fault(IoOp op, size_t *bytes) {
    if (fault.action == FAULT_NONE || (fault.op != ANY_OP && fault.op != (int)op)) return 0;
    long call = atomic_fetch_add(&fault.calls, 1) + 1;
    if (call != fault.number && !(fault.and_all_later && call > fault.number)) return 0;
    switch (fault.action) {
    case FAULT_KILL:
        raise(SIGKILL);
        return 0;
    case FAULT_EIO:
        return EIO;
    case FAULT_ENOSPC:
        return ENOSPC;
    default:
        *bytes = (*bytes + 1) / 2;
        return 0;
    }
}

void io_set_hook(IoHook new_hook, void *context) {
    hook = new_hook;
    hook_context = context;
}

// Asks both whether the operation may happen; 0 or an errno.
static int announce(IoOp op, const char *path, size_t *bytes) {
    pthread_once(&fault_once, read_fault);
    int error = environment_fault(op, bytes);
    return error || !hook ? error : hook(hook_context, op, path, bytes);
}

static int announce_plain(IoOp op, const char *path) {
    size_t unused = 0;
    return announce(op, path, &unused);
}

// --- Descriptors ---------------------------------------------------------------------------------

static Status open_failed(const char *path, int flags, int error) {
    if (flags & O_CREAT) FAIL(STATUS_CANNOT_WRITE, "%s: cannot create: %s", path, strerror(error));
    bool writes = (flags & O_ACCMODE) != O_RDONLY;
    if (error == ENOENT && !writes) FAIL(STATUS_MISSING_INPUT, "%s: no such file", path);
    FAIL(STATUS_IO, "%s: cannot open: %s", path, strerror(error));
}

Status io_open(const char *path, int flags, int *fd) {
    *fd = -1;
    int error = announce_plain(IO_OPEN, path);
    if (error) return open_failed(path, flags, error);
    do {
        *fd = open(path, flags | O_CLOEXEC, OPEN_MODE);
    } while (*fd < 0 && errno == EINTR);
    return *fd < 0 ? open_failed(path, flags, errno) : STATUS_OK;
}

Status io_close(int fd, const char *path) {
    // Network file systems report a lost write here. After EINTR Linux has closed the descriptor.
    if (close(fd) != 0 && errno != EINTR)
        FAIL(STATUS_IO, "%s: closing failed: %s", path, strerror(errno));
    return STATUS_OK;
}

// Writes all bytes; at the file position when `offset` is NULL.
static Status write_all(int fd, const char *path, const char *data, size_t bytes,
                        const uint64_t *offset) {
    size_t done = 0;
    while (done < bytes) {
        size_t allowed = bytes - done;
        errno = announce(IO_WRITE, path, &allowed);
        ssize_t count = -1;
        if (errno == 0) {
            count = offset ? pwrite(fd, data + done, allowed, (off_t)(*offset + done))
                           : write(fd, data + done, allowed);
        }
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) {
            FAIL(STATUS_IO, "%s: writing failed after %zu of %zu bytes: %s", path, done, bytes,
                 count < 0 ? strerror(errno) : "nothing was written");
        }
        done += (size_t)count;
    }
    return STATUS_OK;
}

Status io_write(int fd, const char *path, const void *data, size_t bytes) {
    return write_all(fd, path, data, bytes, NULL);
}

Status io_pwrite(int fd, const char *path, const void *data, size_t bytes, uint64_t offset) {
    return write_all(fd, path, data, bytes, &offset);
}

Status io_pread(int fd, const char *path, void *out, size_t bytes, uint64_t offset) {
    size_t done = 0;
    while (done < bytes) {
        size_t allowed = bytes - done;
        errno = announce(IO_READ, path, &allowed);
        ssize_t count = -1;
        if (errno == 0) count = pread(fd, (char *)out + done, allowed, (off_t)(offset + done));
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) FAIL(STATUS_IO, "%s: reading failed: %s", path, strerror(errno));
        if (count == 0) {
            FAIL(STATUS_BAD_DATA,
                 "%s: ends early: expected %zu bytes at offset %" PRIu64 ", found %zu", path, bytes,
                 offset, done);
        }
        done += (size_t)count;
    }
    return STATUS_OK;
}

IoLock io_lock(int fd, const char *path) {
    int error = announce_plain(IO_LOCK, path);
    while (error == 0 && flock(fd, LOCK_EX | LOCK_NB) != 0) {
        if (errno != EINTR) error = errno;
    }
    if (error == 0) return IO_LOCK_TAKEN;
    return error == EWOULDBLOCK ? IO_LOCK_BUSY : IO_LOCK_UNSUPPORTED;
}

Status io_fsync(int fd, const char *path) {
    int error = announce_plain(IO_FSYNC, path);
    // After a failed fsync the kernel may have dropped the dirty pages: trying again could succeed
    // without the data being on disk.
    if (error == 0 && fsync(fd) != 0) error = errno;
    if (error) FAIL(STATUS_IO, "%s: fsync failed: %s", path, strerror(error));
    return STATUS_OK;
}

// --- Names ---------------------------------------------------------------------------------------

Status io_fsync_directory(const char *path) {
    int fd;
    TRY(io_open(path, O_RDONLY | O_DIRECTORY, &fd));
    int error = announce_plain(IO_FSYNC, path);
    if (error == 0 && fsync(fd) != 0) error = errno;
    Status closed = io_close(fd, path);
    // Some network file systems know no fsync of directories; their renames are synchronous.
    if (error && error != EINVAL && error != ENOTSUP)
        FAIL(STATUS_IO, "%s: fsync of the directory failed: %s", path, strerror(error));
    return closed;
}

static Status fsync_parent(const char *path) {
    char parent[IO_PATH_MAX];
    TRY(io_path(parent, "%s", path));
    char *slash = strrchr(parent, '/');
    if (!slash) return io_fsync_directory(".");
    slash[slash == parent ? 1 : 0] = '\0'; // "/name" is in "/"
    return io_fsync_directory(parent);
}

Status io_rename(const char *from, const char *to) {
    int error = announce_plain(IO_RENAME, from);
    if (error == 0 && rename(from, to) != 0) error = errno;
    if (error) FAIL(STATUS_IO, "%s: cannot rename to %s: %s", from, to, strerror(error));
    return STATUS_OK;
}

Status io_unlink(const char *path) {
    int error = announce_plain(IO_UNLINK, path);
    if (error == 0 && unlink(path) != 0) error = errno;
    if (error && error != ENOENT) FAIL(STATUS_IO, "%s: cannot remove: %s", path, strerror(error));
    return STATUS_OK;
}

static Status make_directory(const char *path) {
    int error = announce_plain(IO_MKDIR, path);
    if (error == 0 && mkdir(path, DIRECTORY_MODE) != 0) error = errno;
    if (error == 0) return fsync_parent(path); // its name must survive a power loss, too
    if (error == EEXIST && io_is_directory(path)) return STATUS_OK;
    FAIL(STATUS_CANNOT_WRITE, "%s: cannot create directory: %s", path, strerror(error));
}

Status io_make_directories(const char *path) {
    char prefix[IO_PATH_MAX];
    TRY(io_path(prefix, "%s", path));
    for (char *c = prefix + 1; prefix[0] && *c; c++) {
        if (*c != '/') continue;
        *c = '\0';
        if (!io_is_directory(prefix)) TRY(make_directory(prefix));
        *c = '/';
    }
    return io_is_directory(path) ? STATUS_OK : make_directory(path);
}

static int remove_entry(const char *path, const struct stat *info, int type, struct FTW *where) {
    (void)info, (void)where;
    if (type != FTW_DP) return (int)io_unlink(path);
    int error = announce_plain(IO_UNLINK, path);
    if (error == 0 && rmdir(path) != 0) error = errno;
    if (error == 0) return STATUS_OK;
    return (int)status_fail(__FILE__, __LINE__, STATUS_IO, "%s: cannot remove: %s", path,
                            strerror(error));
}

Status io_remove_tree(const char *path) {
    int result = nftw(path, remove_entry, TREE_DEPTH_FDS, FTW_DEPTH | FTW_PHYS);
    if (result < 0 && errno == ENOENT) return STATUS_OK;
    if (result < 0) FAIL(STATUS_IO, "%s: cannot remove: %s", path, strerror(errno));
    return (Status)result;
}

Status io_file_size(const char *path, uint64_t *bytes) {
    struct stat info;
    if (stat(path, &info) != 0) {
        if (errno == ENOENT) FAIL(STATUS_MISSING_INPUT, "%s: no such file", path);
        FAIL(STATUS_IO, "%s: cannot examine: %s", path, strerror(errno));
    }
    // A pipe would block the reader and has no size to check against.
    if (!S_ISREG(info.st_mode)) FAIL(STATUS_BAD_DATA, "%s: not a regular file", path);
    *bytes = (uint64_t)info.st_size;
    return STATUS_OK;
}

bool io_exists(const char *path) {
    struct stat info;
    return stat(path, &info) == 0;
}

bool io_is_directory(const char *path) {
    struct stat info;
    return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

// --- Whole files ---------------------------------------------------------------------------------

Status io_read_file(const char *path, uint64_t max_bytes, char **data, size_t *bytes) {
    Status status = STATUS_OK;
    char *buffer = NULL;
    uint64_t size;
    int fd;
    TRY(io_file_size(path, &size));
    if (size > max_bytes) {
        FAIL(STATUS_BAD_DATA, "%s: has %" PRIu64 " bytes, expected at most %" PRIu64, path, size,
             max_bytes);
    }
    TRY(io_open(path, O_RDONLY, &fd));
    buffer = malloc(size + 1);
    if (!buffer) FAIL_GOTO(done, STATUS_INTERNAL, "out of memory reading %s", path);
    TRY_GOTO(io_pread(fd, path, buffer, size, 0), done);
    buffer[size] = '\0';
done:
    close(fd); // read only: a failing close loses nothing
    if (status != STATUS_OK) {
        free(buffer);
        return status;
    }
    *data = buffer;
    *bytes = size;
    return STATUS_OK;
}

// The three steps of a visible file, shared by writing and copying: open the temp file, fill it
// (the caller), then publish it or take it away.
static Status begin_temp(const char *path, char temp[IO_PATH_MAX], int *fd) {
    TRY(io_path(temp, "%s.tmp", path));
    return io_open(temp, O_WRONLY | O_CREAT | O_TRUNC, fd);
}

static Status finish_temp(Status status, int fd, const char *temp, const char *path) {
    if (status == STATUS_OK) status = io_fsync(fd, temp);
    if (status != STATUS_OK) {
        close(fd);
    } else {
        status = io_close(fd, temp);
        if (status == STATUS_OK) status = io_rename(temp, path);
    }
    if (status != STATUS_OK) {
        unlink(temp); // frees the space of a full disk; the first failure is the one to report
        return status;
    }
    return fsync_parent(path);
}

Status io_write_file_atomic(const char *path, const void *data, size_t bytes) {
    char temp[IO_PATH_MAX];
    int fd;
    TRY(begin_temp(path, temp, &fd));
    TRY(finish_temp(io_write(fd, temp, data, bytes), fd, temp, path));
    return STATUS_OK;
}

static Status copy_bytes(int from, const char *from_path, int to, const char *to_path,
                         uint64_t bytes) {
    Status status = STATUS_OK;
    char *chunk = malloc(COPY_CHUNK_BYTES);
    if (!chunk) FAIL(STATUS_INTERNAL, "out of memory copying %s", from_path);
    for (uint64_t done = 0; done < bytes;) {
        size_t count = bytes - done < COPY_CHUNK_BYTES ? (size_t)(bytes - done) : COPY_CHUNK_BYTES;
        TRY_GOTO(io_pread(from, from_path, chunk, count, done), out);
        TRY_GOTO(io_write(to, to_path, chunk, count), out);
        done += count;
    }
out:
    free(chunk);
    return status;
}

Status io_copy_file(const char *from, const char *to) {
    Status status = STATUS_OK;
    char temp[IO_PATH_MAX];
    uint64_t bytes;
    int in, out;
    TRY(io_file_size(from, &bytes));
    TRY(io_open(from, O_RDONLY, &in));
    TRY_GOTO(begin_temp(to, temp, &out), done);
    TRY_GOTO(finish_temp(copy_bytes(in, from, out, temp, bytes), out, temp, to), done);
done:
    close(in);
    return status;
}

// --- Listings ------------------------------------------------------------------------------------

static int compare_names(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static Status append_name(char ***names, size_t *count, size_t *capacity, const char *name) {
    if (*count == *capacity) {
        size_t larger = *capacity ? *capacity * 2 : 16;
        char **grown = realloc(*names, larger * sizeof *grown);
        if (!grown) FAIL(STATUS_INTERNAL, "out of memory listing a directory");
        *names = grown;
        *capacity = larger;
    }
    char *copy = strdup(name);
    if (!copy) FAIL(STATUS_INTERNAL, "out of memory listing a directory");
    (*names)[(*count)++] = copy;
    return STATUS_OK;
}

static Status read_names(DIR *directory, const char *path, char ***names, size_t *count) {
    size_t capacity = 0;
    for (;;) {
        errno = 0;
        const struct dirent *entry = readdir(directory);
        if (!entry && errno) FAIL(STATUS_IO, "%s: cannot list: %s", path, strerror(errno));
        if (!entry) return STATUS_OK;
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        TRY(append_name(names, count, &capacity, entry->d_name));
    }
}

Status io_list_directory(const char *path, char ***names, size_t *count) {
    *names = NULL;
    *count = 0;
    DIR *directory = NULL;
    int error = announce_plain(IO_READ, path);
    if (error == 0 && !(directory = opendir(path))) error = errno;
    if (error == ENOENT) FAIL(STATUS_MISSING_INPUT, "%s: no such directory", path);
    if (error) FAIL(STATUS_IO, "%s: cannot list: %s", path, strerror(error));

    Status status = read_names(directory, path, names, count);
    closedir(directory);
    if (status != STATUS_OK) {
        io_free_names(*names, *count);
        *names = NULL;
        *count = 0;
        return status;
    }
    if (*count) qsort(*names, *count, sizeof **names, compare_names);
    return STATUS_OK;
}

void io_free_names(char **names, size_t count) {
    for (size_t i = 0; i < count; i++) free(names[i]);
    free(names);
}

Status io_path(char out[IO_PATH_MAX], const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(out, IO_PATH_MAX, format, arguments);
    va_end(arguments);
    if (length < 0 || length >= IO_PATH_MAX) {
        FAIL(STATUS_USAGE, "path of %d bytes is too long, expected at most %d: %.64s...", length,
             IO_PATH_MAX - 1, out);
    }
    return STATUS_OK;
}
