// File access that survives crashes and can be made to fail.
//
// Every byte the program reads or writes outside HDF5 goes through these functions, so that tests
// inject faults at one place: io_set_hook() sees each operation before it happens and may answer
// with an errno, a short count or the end of the process. DENSE2MOE_IO_FAULT="op:number:action"
// (op = open|read|write|fsync|rename|unlink|mkdir|lock|any; number = which call fails, from 1, "3+"
// = that and all later ones; action = kill|eio|enospc|short) installs the same from outside.
//
// A file becomes visible by write-temp, fsync, rename, fsync-directory (DESIGN.md rule 4).
#ifndef BASE_FILE_H
#define BASE_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "base/status.h"

typedef enum IoOp {
    IO_OPEN,
    IO_READ,
    IO_WRITE,
    IO_FSYNC,
    IO_RENAME,
    IO_UNLINK,
    IO_MKDIR,
    IO_LOCK,
} IoOp;

// Returns 0 to let the operation happen, or an errno to fail with. *bytes may be lowered (a short
// read or write). `path` is the file's name where known, else NULL.
typedef int (*IoHook)(void *context, IoOp op, const char *path, size_t *bytes);
void io_set_hook(IoHook hook, void *context);

// flags as open(2); O_CLOEXEC is added. ENOENT gives STATUS_MISSING_INPUT for reads; a file that
// cannot be created gives STATUS_CANNOT_WRITE; every other failure STATUS_IO.
Status io_open(const char *path, int flags, int *fd) NODISCARD;
Status io_close(int fd, const char *path) NODISCARD;
Status io_write(int fd, const char *path, const void *data, size_t bytes) NODISCARD; // all of it
// Reads exactly `bytes` at `offset`; an early end is STATUS_BAD_DATA naming both sizes.
Status io_pread(int fd, const char *path, void *out, size_t bytes, uint64_t offset) NODISCARD;
Status io_pwrite(int fd, const char *path, const void *data, size_t bytes,
                 uint64_t offset) NODISCARD;
// Takes the whole file's exclusive flock, which ends with the process; does not wait.
typedef enum IoLock { IO_LOCK_TAKEN, IO_LOCK_BUSY, IO_LOCK_UNSUPPORTED } IoLock;
IoLock io_lock(int fd, const char *path);
Status io_fsync(int fd, const char *path) NODISCARD; // a failed fsync is never retried
Status io_fsync_directory(const char *path) NODISCARD;
Status io_rename(const char *from, const char *to) NODISCARD;
Status io_unlink(const char *path) NODISCARD;           // a missing file is no error
Status io_make_directories(const char *path) NODISCARD; // mkdir -p
Status io_remove_tree(const char *path) NODISCARD;      // rm -rf; does not follow links
Status io_file_size(const char *path, uint64_t *bytes) NODISCARD;
bool io_exists(const char *path);
bool io_is_directory(const char *path);

// Whole small files. `max_bytes` caps what a hostile file can make us allocate. *data is
// NUL-terminated (not counted in *bytes) and malloc'ed.
Status io_read_file(const char *path, uint64_t max_bytes, char **data, size_t *bytes) NODISCARD;
// Atomic and durable: temp file beside `path`, fsync, rename, fsync of the directory.
Status io_write_file_atomic(const char *path, const void *data, size_t bytes) NODISCARD;
Status io_copy_file(const char *from, const char *to) NODISCARD; // atomic and durable

// Sorted names in a directory, without "." and "..". Free with io_free_names.
Status io_list_directory(const char *path, char ***names, size_t *count) NODISCARD;
void io_free_names(char **names, size_t count);

// snprintf into a path buffer; fails instead of cutting.
enum { IO_PATH_MAX = 4096 };
Status io_path(char out[IO_PATH_MAX], const char *format, ...)
    __attribute__((format(printf, 2, 3))) NODISCARD;

#endif
