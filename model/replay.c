#include "model/replay.h"

#include <stdlib.h>
#include <string.h>

Status replay_create(Replay **out) {
    *out = calloc(1, sizeof **out);
    if (!*out) FAIL(STATUS_INTERNAL, "out of memory for recorded passes");
    return STATUS_OK;
}

void replay_free(Replay *replay, Backend *backend) {
    if (!replay) return;
    for (int i = 0; i < REPLAY_SLOTS; i++)
        if (replay->slots[i].graph) backend->ops->graph_release(backend, replay->slots[i].graph);
    free(replay);
}

static bool can_replay(const Pass *p) {
    const Model *model = p->model;
    return model->backend->can_capture && p->tokens <= REPLAY_MAX_TOKENS &&
           !config_has_moe(&model->config) && !model->hooks;
}

static bool same_key(const ReplayKey *a, const ReplayKey *b) {
    return a->batch == b->batch && a->sequence_length == b->sequence_length &&
           a->documents == b->documents && a->first_gradients == b->first_gradients &&
           a->target_count == b->target_count && a->token_count == b->token_count;
}

// The slot of the key; a new one, given away in turn, has used = false.
static int find_slot(Replay *replay, Backend *backend, const ReplayKey *key) {
    for (int i = 0; i < REPLAY_SLOTS; i++)
        if (replay->slots[i].used && same_key(&replay->slots[i].key, key)) return i;
    const int i = replay->next;
    replay->next = (i + 1) % REPLAY_SLOTS;
    if (replay->slots[i].graph) backend->ops->graph_release(backend, replay->slots[i].graph);
    memset(&replay->slots[i], 0, sizeof replay->slots[i]);
    replay->slots[i].key = *key;
    return i;
}

static Status record(Backend *backend, const Pass *p, Status (*work)(const Pass *), void **graph) {
    TRY(backend->ops->capture_begin(backend));
    Status status = work(p);
    TRY(backend->ops->capture_end(backend, status == STATUS_OK, graph));
    return status;
}

Status replay_run(Replay *replay, const Pass *p, Status (*work)(const Pass *)) {
    Backend *backend = p->model->backend;
    if (!can_replay(p)) return work(p);
    const ReplayKey key = {.batch = p->batch,
                           .sequence_length = p->sequence_length,
                           .documents = p->documents,
                           .first_gradients = p->first_gradients,
                           .target_count = p->weights->target_count,
                           .token_count = p->weights->token_count};
    const int i = find_slot(replay, backend, &key);
    if (!replay->slots[i].used) {
        TRY(work(p));
        replay->slots[i].used = true;
        return STATUS_OK;
    }
    if (!replay->slots[i].graph) TRY(record(backend, p, work, &replay->slots[i].graph));
    return backend->ops->graph_launch(backend, replay->slots[i].graph);
}
