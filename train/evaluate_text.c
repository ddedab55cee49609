// Text for `evaluate`: the same script that prepares training data makes shards of it, so that text
// is tokenized in one place only.
#include <errno.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include "train/evaluate.h"
#include "train/installation.h"

extern char **environ;

static Status find_script(char path[IO_PATH_MAX]) {
    char share[IO_PATH_MAX];
    installation_share(share);
    if (share[0]) {
        TRY(io_path(path, "%s/scripts/prepare_data.py", share));
        if (io_exists(path)) return STATUS_OK;
    }
    TRY(io_path(path, "%s/scripts/prepare_data.py", installation_source_tree()));
    if (io_exists(path)) return STATUS_OK;
    FAIL(STATUS_MISSING_INPUT,
         "--text needs scripts/prepare_data.py, which is neither in %s/scripts nor in %s/scripts",
         share, installation_source_tree());
}

// D2M_PYTHON, the source tree's environment, or what the PATH has.
static Status find_python(char path[IO_PATH_MAX]) {
    const char *wanted = getenv("D2M_PYTHON");
    if (wanted && wanted[0]) return io_path(path, "%s", wanted);
    TRY(io_path(path, "%s/.venv/bin/python", installation_source_tree()));
    if (io_exists(path)) return STATUS_OK;
    return io_path(path, "python3");
}

// Runs a program with its output on our standard error; *code is its exit code.
static Status run_program(char *const *arguments, int *code) {
    posix_spawn_file_actions_t actions;
    pid_t pid;
    int wait_status;
    if (posix_spawn_file_actions_init(&actions) != 0)
        FAIL(STATUS_INTERNAL, "no memory to start %s", arguments[0]);
    int error = posix_spawn_file_actions_adddup2(&actions, STDERR_FILENO, STDOUT_FILENO);
    if (error == 0) error = posix_spawnp(&pid, arguments[0], &actions, NULL, arguments, environ);
    posix_spawn_file_actions_destroy(&actions);
    if (error != 0)
        FAIL(
            STATUS_MISSING_INPUT,
            "%s: %s; --text needs Python: run scripts/setup.sh, or set D2M_PYTHON to a Python that "
            "has the packages of scripts/requirements.txt",
            arguments[0], strerror(error));
    while (waitpid(pid, &wait_status, 0) < 0)
        if (errno != EINTR)
            FAIL(STATUS_INTERNAL, "waiting for %s: %s", arguments[0], strerror(errno));
    *code = WIFEXITED(wait_status) ? WEXITSTATUS(wait_status) : 128 + WTERMSIG(wait_status);
    return STATUS_OK;
}

static Status make_shards(const char *text_file, const char *tokenizer, const char *directory) {
    char python[IO_PATH_MAX], script[IO_PATH_MAX];
    int code;
    TRY(find_script(script));
    TRY(find_python(python));
    char *const arguments[] = {python,
                               script,
                               "--tokenizer",
                               (char *)tokenizer,
                               "--output",
                               (char *)directory,
                               (char *)text_file,
                               NULL};
    TRY(run_program(arguments, &code));
    if (code == 0) return STATUS_OK;
    if (code == 1) // Python's own: an exception, most often a missing package
        FAIL(STATUS_MISSING_INPUT,
             "%s could not run with %s (see above); run scripts/setup.sh, or set D2M_PYTHON to a "
             "Python that has the packages of scripts/requirements.txt",
             script, python);
    // The script's exit codes are ours (docs/troubleshooting.md).
    Status status = code == STATUS_MISSING_INPUT || code == STATUS_IO || code == STATUS_CANNOT_WRITE
                        ? (Status)code
                        : STATUS_BAD_DATA;
    FAIL(status, "%s could not be made into shards: %s ended with code %d (see above)", text_file,
         script, code);
}

Status eval_shards_of_text(const char *text_file, const char *tokenizer,
                           char directory[IO_PATH_MAX]) {
    const char *parent = getenv("TMPDIR");
    if (!io_exists(text_file)) FAIL(STATUS_MISSING_INPUT, "%s: there is no such file", text_file);
    TRY(io_path(directory, "%s/evaluate-XXXXXX", parent && parent[0] ? parent : "/tmp"));
    if (!mkdtemp(directory))
        FAIL(STATUS_CANNOT_WRITE, "temporary directory %s: %s", directory, strerror(errno));
    Status status = make_shards(text_file, tokenizer, directory);
    if (status == STATUS_OK) return STATUS_OK;
    StatusRecord failure;
    status_take(&failure);
    if (io_remove_tree(directory) != STATUS_OK) status_clear();
    return status_put(&failure);
}
