// Where the files that come with the programs are: recipes and scripts, in an installation
// (<prefix>/share/dense2moe beside <prefix>/bin) or in the source tree.
#ifndef TRAIN_INSTALLATION_H
#define TRAIN_INSTALLATION_H

#include "base/file.h"

// <prefix>/share/dense2moe for a program in <prefix>/bin; "" when it cannot be told.
void installation_share(char out[IO_PATH_MAX]);
// The source tree the program was built from. It may be gone.
const char *installation_source_tree(void);

#endif
