// Recording a forward and backward pass once and launching it as one from then on, on backends that
// can. A dense pass asks the device nothing and its launches depend on few numbers, so a graph of
// them can be launched again; experts need their row counts on the host, so MoE models do not, and
// neither do passes with hooks (ModelHooks), which say on the host how far they are.
//
// It pays where kernels are short: the pieces of a small micro-batch take less time than it takes
// to launch them one by one. model/ only.
#ifndef MODEL_REPLAY_H
#define MODEL_REPLAY_H

#include "model/op_args.h"

enum { REPLAY_MAX_TOKENS = 16384, REPLAY_SLOTS = 4 };

// What the launches of a pass depend on, beside the model itself.
typedef struct ReplayKey {
    int64_t batch, sequence_length;
    bool documents, first_gradients;
    double target_count, token_count;
} ReplayKey;

typedef struct Replay {
    struct {
        ReplayKey key;
        bool used;
        void *graph; // NULL: the pass has run once, as it is
    } slots[REPLAY_SLOTS];
    int next; // the slot to give away
} Replay;

Status replay_create(Replay **out) NODISCARD;
void replay_free(Replay *replay, Backend *backend); // NULL is fine

// Runs `work`, which launches the pass: as it is the first time, recorded and launched the second,
// launched from the recording later.
Status replay_run(Replay *replay, const Pass *p, Status (*work)(const Pass *)) NODISCARD;

#endif
