// Rows to their experts and back (expert_parallel.h).
//
// "Sent" rows are this rank's own, (T*k) in the order of experts: those for one rank lie together.
// "Received" rows are those of the group for this rank's experts, (R) in the order of the ranks
// that sent them and, of each, by expert. A "call" of the experts covers the received rows of one
// rank or of all.
#include "model/expert_parallel.h"

#include <string.h>
#include "base/checked.h"

typedef struct Group {
    const Pass *p;
    Backend *backend;
    Communicator *comm;
    LayerActivations *layer;
    int ranks, own; // of the group
    int experts;    // of this rank
    int top_k;
    int64_t sent, received; // rows
    void *x;                // those received,
    Routing routing;        // and theirs
} Group;

static Group group_of(const Pass *p, int layer) {
    const Model *model = p->model;
    const LayerConfig *config = &model->config.layers[layer];
    return (Group){
        .p = p,
        .backend = model->backend,
        .comm = model->experts,
        .layer = &model->activations->layers[layer],
        .ranks = model->experts->world,
        .own = model->experts->rank,
        .experts = config->num_experts / model->experts->world,
        .top_k = config->top_k,
        .sent = p->tokens * config->top_k,
    };
}

// Where the rows of rank `rank` for expert `expert` of rank `owner` begin among those it sends.
static int32_t sent_begin(const Group *g, int rank, int owner, int expert) {
    const int32_t *begin = g->layer->received.begin + rank * (g->ranks * g->experts + 1);
    return begin[owner * g->experts + expert];
}

// How many rows go from one rank to another.
static int64_t rows_between(const Group *g, int from, int to) {
    return sent_begin(g, from, to, g->experts) - sent_begin(g, from, to, 0);
}

// --- The routing of the group --------------------------------------------------------------------

// Every rank's expert_begin, (ranks, N + 1), on the host, where each layer has its own: it is known
// until the next pass begins, and the same where backward computes the routing again.
static Status share_routing(Group *g) {
    const Activations *a = g->p->model->activations;
    const int64_t count = g->ranks * g->experts + 1;
    const size_t bytes = (size_t)count * sizeof(int32_t);
    CommTicket ticket;
    TRY(g->backend->ops->copy(g->backend, a->rows.begin + g->own * count,
                              g->layer->routing.expert_begin, bytes));
    TRY(g->comm->ops->all_gather(g->comm, a->rows.begin, (int64_t)bytes, COMM_BYTE, &ticket));
    TRY(g->comm->ops->wait(g->comm, ticket));
    TRY(g->backend->ops->download(g->backend, g->layer->received.begin, a->rows.begin,
                                  bytes * (size_t)g->ranks));
    g->layer->received.known = true;
    return STATUS_OK;
}

static int64_t received_by(const Group *g, int rank) {
    int64_t rows = 0;
    for (int r = 0; r < g->ranks; r++) rows += rows_between(g, r, rank);
    return rows;
}

void expert_parallel_begin(Model *model) {
    TravelBuffers *t = &model->activations->rows;
    if (!model->experts) return;
    for (int layer = 0; layer < model->config.num_layers; layer++)
        model->activations->layers[layer].received.known = false;
    memset(t->used, 0, (size_t)model->experts->world * sizeof *t->used);
    t->scratch_layer = -1;
}

// What a rank's rows take of its pool: layers begin where buffers do, for the matrix units' sake.
static int64_t room_for(const Group *g, int rank) {
    return (int64_t)round_up((uint64_t)received_by(g, rank), TRAVEL_ROWS_ALIGN);
}

// In the pool where there is room on every rank of the group: all come to the same answer.
static void choose_place(Group *g, int layer, bool again) {
    TravelBuffers *t = &g->p->model->activations->rows;
    bool fits = g->p->weights && !again;
    for (int r = 0; r < g->ranks && fits; r++) fits = t->used[r] + room_for(g, r) <= t->pool_rows;
    g->layer->received.place = fits ? t->used[g->own] : -1;
    if (!fits) t->scratch_layer = layer;
    for (int r = 0; r < g->ranks && fits; r++) t->used[r] += room_for(g, r);
}

// The received rows of ranks [first, end), which are computed in one call.
typedef struct Call {
    int first, end, index;
    int64_t begin, rows;
} Call;

static bool next_call(const Group *g, Call *call) {
    const int ranks = g->backend->compute_dtype == DTYPE_F32 ? 1 : g->ranks;
    if (call->end == g->ranks) return false;
    *call = (Call){call->end, call->end + ranks, call->index + 1, call->begin + call->rows, 0};
    for (int r = call->first; r < call->end; r++) call->rows += rows_between(g, r, g->own);
    return true;
}

// Fills, for one call, what the experts read of a Routing, with the received rows as tokens of one
// expert each: arrays of the call's rows, and (experts + 1) numbers.
static void route_call(const Group *g, const Call *call, int32_t *slot_of_row, int32_t *row_of_slot,
                       int32_t *expert_begin) {
    int32_t row = 0;
    for (int e = 0; e < g->experts; e++) {
        int64_t slot = 0; // the first of the rank's rows
        expert_begin[e] = row;
        for (int r = call->first; r < call->end; r++) {
            const int32_t base = sent_begin(g, r, g->own, 0);
            const int32_t from = sent_begin(g, r, g->own, e) - base;
            const int32_t to = sent_begin(g, r, g->own, e + 1) - base;
            for (int32_t i = from; i < to; i++, row++) {
                slot_of_row[row] = (int32_t)(slot + i);
                row_of_slot[slot + i] = row;
            }
            slot += rows_between(g, r, g->own);
        }
    }
    expert_begin[g->experts] = row;
}

static Status upload(const Group *g, int32_t *device, const int32_t *host, int64_t count) {
    return g->backend->ops->upload(g->backend, device, host, (size_t)count * sizeof *host);
}

static Status route_received(Group *g) {
    const Activations *a = g->p->model->activations;
    const Routing *routing = &g->routing;
    int32_t *slot_of_row = a->rows.host_index, *row_of_slot = slot_of_row + a->rows.most;
    int32_t *expert_begin = row_of_slot + a->rows.most;
    const int borders = g->experts + 1;
    for (Call call = {.index = -1}; next_call(g, &call);)
        route_call(g, &call, slot_of_row + call.begin, row_of_slot + call.begin,
                   expert_begin + call.index * borders);
    TRY(upload(g, routing->slot_of_row, slot_of_row, g->received));
    TRY(upload(g, routing->row_of_slot, row_of_slot, g->received));
    return upload(g, routing->expert_begin, expert_begin, (int64_t)g->ranks * borders);
}

// --- Travel --------------------------------------------------------------------------------------

enum { GROUP_RANKS_MAX = MODEL_EXPERT_RANKS_MAX };

// Rows of `row_bytes` from the order of sent rows to that of received ones, or back.
static Status travel(const Group *g, bool back, const void *from, void *to, size_t row_bytes) {
    int64_t sent_at[GROUP_RANKS_MAX], sent_bytes[GROUP_RANKS_MAX];
    int64_t received_at[GROUP_RANKS_MAX], received_bytes[GROUP_RANKS_MAX], at = 0;
    const int64_t width = (int64_t)row_bytes;
    CommTicket ticket;
    for (int r = 0; r < g->ranks; r++) {
        sent_at[r] = sent_begin(g, g->own, r, 0) * width;
        sent_bytes[r] = rows_between(g, g->own, r) * width;
        received_at[r] = at;
        received_bytes[r] = rows_between(g, r, g->own) * width;
        at += received_bytes[r];
    }
    if (back)
        TRY(g->comm->ops->all_to_all(g->comm, from, received_at, received_bytes, to, sent_at,
                                     sent_bytes, &ticket));
    else
        TRY(g->comm->ops->all_to_all(g->comm, from, sent_at, sent_bytes, to, received_at,
                                     received_bytes, &ticket));
    return g->comm->ops->wait(g->comm, ticket);
}

static size_t row_bytes(const Group *g) {
    return (size_t)g->p->model->config.hidden_size * dtype_bytes(g->backend->compute_dtype);
}

// Rows of tokens (T, H) to the experts (R, H), by way of `sent`.
static Status send_tokens(const Group *g, const void *tokens, void *received) {
    const Activations *a = g->p->model->activations;
    const GatherRowsArgs gather = {.rows = g->sent,
                                   .row_bytes = (int64_t)row_bytes(g),
                                   .divisor = g->top_k,
                                   .index = g->layer->routing.slot_of_row,
                                   .in = tokens,
                                   .out = a->rows.sent};
    TRY(g->backend->ops->gather_rows(g->backend, &gather));
    return travel(g, false, a->rows.sent, received, row_bytes(g));
}

// What the experts made of them (R, H), added up by token (T, H).
static Status fetch_tokens(const Group *g, const void *received, void *tokens) {
    const Activations *a = g->p->model->activations;
    const CombineRowsArgs combine = {.tokens = g->p->tokens,
                                     .hidden_size = g->p->model->config.hidden_size,
                                     .top_k = g->top_k,
                                     .row_of_slot = g->layer->routing.row_of_slot,
                                     .rows = a->rows.sent,
                                     .out = tokens};
    TRY(travel(g, true, received, a->rows.sent, row_bytes(g)));
    return g->backend->ops->combine_rows(g->backend, &combine);
}

// One number per row: out[r] = in[index[r]].
static Status gather_floats(const Group *g, const int32_t *index, const float *in, float *out) {
    const GatherRowsArgs gather = {.rows = g->sent,
                                   .row_bytes = sizeof(float),
                                   .divisor = 1,
                                   .index = index,
                                   .in = in,
                                   .out = out};
    return g->backend->ops->gather_rows(g->backend, &gather);
}

// --- The experts ---------------------------------------------------------------------------------

static Status run_experts(const Group *g, int layer,
                          Status (*run)(Backend *, const MoeFfnArgs *args), bool keeps_output) {
    for (Call call = {.index = -1}; next_call(g, &call);) {
        MoeFfnArgs args = args_received(g->p, layer, call.begin, call.rows, call.index);
        if (!keeps_output) args.out = NULL;
        if (call.index > 0) args.grad_assign = false;
        TRY(run(g->backend, &args));
    }
    return STATUS_OK;
}

// Where the received rows lie, once they have a place.
static void find_received(Group *g, int layer) {
    const MoeFfnArgs args = args_received(g->p, layer, 0, 0, 0);
    g->received = received_by(g, g->own);
    g->x = (void *)args.x;
    g->routing = args.routing;
}

Status expert_parallel_forward(const Pass *p, int layer, bool again) {
    const Activations *a = p->model->activations;
    Group g = group_of(p, layer);
    if (!again) TRY(share_routing(&g));
    INVARIANT(g.layer->received.known);
    choose_place(&g, layer, again);
    find_received(&g, layer);
    TRY(route_received(&g));
    TRY(send_tokens(&g, g.layer->middle_normed, g.x));
    TRY(gather_floats(&g, g.layer->routing.slot_of_row, g.layer->routing.gate,
                      a->rows.sent_floats));
    TRY(travel(&g, false, a->rows.sent_floats, g.routing.gate, sizeof(float)));
    TRY(run_experts(&g, layer, g.backend->ops->moe_ffn_forward, !again));
    return again ? STATUS_OK : fetch_tokens(&g, a->rows.out, a->branch);
}

Status expert_parallel_backward(const Pass *p, int layer) {
    const Activations *a = p->model->activations;
    Group g = group_of(p, layer);
    if (g.layer->received.place < 0 && a->rows.scratch_layer != layer)
        TRY(expert_parallel_forward(p, layer, true));
    TRY(send_tokens(&g, a->d_stream, a->rows.dout));
    TRY(run_experts(&g, layer, g.backend->ops->moe_ffn_backward, true));
    TRY(fetch_tokens(&g, a->rows.out, a->d_normed));
    TRY(travel(&g, true, a->rows.d_gate, a->rows.sent_floats, sizeof(float)));
    return gather_floats(&g, g.layer->routing.row_of_slot, a->rows.sent_floats, a->d_gate);
}

// --- All weights in one place --------------------------------------------------------------------

static size_t copy_bytes(const Model *model, const TensorTable *table, int64_t offset) {
    return tensor_table_copy_bytes(table, model->backend->compute_dtype, offset);
}

static Status collect_own(Model *model, const TensorTable *whole, char *weights) {
    Backend *backend = model->backend;
    for (int i = 0; i < model->table.count; i++) {
        const Tensor *own = &model->table.tensors[i];
        const Tensor *there = tensor_table_find(whole, own->name);
        const size_t from = copy_bytes(model, &model->table, own->offset);
        const size_t end = copy_bytes(model, &model->table, own->offset + own->count);
        INVARIANT(there && there->count == own->count);
        TRY(backend->ops->download(backend, weights + copy_bytes(model, whole, there->offset),
                                   (char *)model->params + from, end - from));
    }
    return STATUS_OK;
}

// `bytes` at `from` on rank `sender` to `to` on the group's first, through the rows' buffer.
static Status collect_bytes(Model *model, int sender, const char *from, char *to, size_t bytes) {
    const Activations *a = model->activations;
    Communicator *comm = model->experts;
    Backend *backend = model->backend;
    const size_t room = (size_t)a->rows.most * (size_t)model->config.hidden_size *
                        dtype_bytes(backend->compute_dtype);
    int64_t zeros[GROUP_RANKS_MAX] = {0}, sizes[GROUP_RANKS_MAX] = {0};
    CommTicket ticket;
    for (size_t done = 0; done < bytes; done += room) {
        const size_t some = bytes - done < room ? bytes - done : room;
        const bool sends = comm->rank == sender;
        sizes[sends ? 0 : sender] = (int64_t)some;
        const int64_t *none = zeros;
        TRY(comm->ops->all_to_all(comm, from + done, none, sends ? sizes : none, a->rows.out, none,
                                  comm->rank == 0 ? sizes : none, &ticket));
        TRY(comm->ops->wait(comm, ticket));
        if (comm->rank == 0) TRY(backend->ops->download(backend, to + done, a->rows.out, some));
    }
    return STATUS_OK;
}

// The packed matrices of the sender's experts in one layer.
static Status collect_experts(Model *model, const TensorTable *whole, char *weights, int layer,
                              int sender) {
    const LayerOffsets *own = &model->table.layers[layer], *there = &whole->layers[layer];
    const int experts = model->config.layers[layer].num_experts / model->experts->world;
    const int64_t matrix = (int64_t)model->config.moe_intermediate_size * model->config.hidden_size;
    for (int down = 0; down <= 1; down++) {
        const int64_t count = experts * matrix * (down ? 1 : 2);
        const int64_t from = down ? own->down : own->gate_up;
        const int64_t to = (down ? there->down : there->gate_up) + sender * count;
        TRY(collect_bytes(model, sender,
                          (const char *)model->params + copy_bytes(model, &model->table, from),
                          weights ? weights + copy_bytes(model, whole, to) : NULL,
                          (size_t)count * dtype_bytes(model->backend->compute_dtype)));
    }
    return STATUS_OK;
}

Status expert_parallel_collect(Model *model, const TensorTable *whole, void *weights) {
    if (weights) TRY(collect_own(model, whole, weights));
    for (int sender = 1; sender < model->experts->world; sender++)
        for (int layer = 0; layer < model->config.num_layers; layer++)
            if (tensor_table_shares_experts(&model->table, layer))
                TRY(collect_experts(model, whole, weights, layer, sender));
    return STATUS_OK;
}
