// Finds the installation from the running program's own path.
#include "train/installation.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

const char *installation_source_tree(void) {
    return D2M_SOURCE_DIR;
}

void installation_share(char out[IO_PATH_MAX]) {
    char program[IO_PATH_MAX - 64];
    ssize_t length = readlink("/proc/self/exe", program, sizeof program - 1);
    out[0] = '\0';
    for (int cut = 0; cut < 2 && length > 0; cut++) { // the program's name, then bin
        program[length] = '\0';
        char *slash = strrchr(program, '/');
        length = slash ? slash - program : 0;
    }
    if (length <= 0) return;
    program[length] = '\0';
    snprintf(out, IO_PATH_MAX, "%s/share/dense2moe", program);
}
