// The loader: a thread that fills steps ahead of the consumer.
//
// Steps lie in a ring of prefetch_steps + 1 slots: one is in the consumer's hands, the others are
// read ahead. Slot n % slots holds step n; three counters say who owns what:
//
//     released <= taken <= produced <= released + slots
//
// The thread fills step `produced` when its slot is free, the consumer takes step `taken` and gives
// back the one before. What a step contains depends on the state before it only, never on timing.
// The thread starts with the first step asked for, not before: shards are verified in child
// processes (data/sandbox.h), and a process must not fork while a thread of it may hold a lock.
// When the thread fails it leaves its error record and ends; the consumer gets the steps that were
// finished before and then the error.
#include "data/loader.h"

#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include "base/checked.h"
#include "base/clock.h"
#include "data/mixture.h"
#include "data/order.h"
#include "data/sources.h"

static const uint64_t max_samples = UINT64_C(1) << 62;

// Rows of a step on one rank.
typedef struct Geometry {
    int64_t rows;                       // of this rank, with those that stay empty
    int num_micro;                      // micro-batches, the same on every rank
    int64_t positions;                  // num_micro * micro_batch * sequence_length
    uint64_t arrays_bytes, micro_bytes; // of one slot
} Geometry;

typedef struct Slot {
    StepBatch batch;
    MicroBatch *micro;         // (num_micro)
    int32_t *tokens, *targets; // (num_micro * micro_batch, S)
    int32_t *document_start;   // the same, or NULL
} Slot;

struct Loader {
    Sources sources;
    Mixture mixture;
    Geometry geometry;
    int64_t global_batch;
    int rank;
    LoaderState state; // the thread's: after the last step it finished
    Slot *slots;
    uint64_t num_slots;
    int32_t *arrays; // what the slots' pointers lead to
    MicroBatch *micros;

    pthread_t thread;
    bool has_thread;
    pthread_mutex_t mutex; // guards what follows
    pthread_cond_t produced_one, released_one;
    uint64_t produced, taken, released;
    bool stop, failed;
    StatusRecord failure;
};

// --- Sizes ---------------------------------------------------------------------------------------

static Status check_config(const LoaderConfig *config) {
    const struct {
        const char *name;
        int64_t value, min, max;
    } ranges[] = {
        {"sequence length", config->sequence_length, 1, INT32_MAX - 1},
        {"micro batch", config->micro_batch, 1, INT32_MAX},
        {"global batch", config->global_batch, 1, INT32_MAX},
        {"world size", config->world, 1, INT32_MAX},
        {"rank", config->rank, 0, (int64_t)config->world - 1},
        {"steps read ahead", config->prefetch_steps, 1, 1024},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof ranges[0]; i++) {
        if (ranges[i].value >= ranges[i].min && ranges[i].value <= ranges[i].max) continue;
        FAIL(STATUS_USAGE, "%s is %" PRId64 ", expected %" PRId64 " to %" PRId64, ranges[i].name,
             ranges[i].value, ranges[i].min, ranges[i].max);
    }
    return STATUS_OK;
}

static Status measure(const LoaderConfig *config, Geometry *out) {
    TRY(check_config(config));
    int64_t all = (config->global_batch + config->micro_batch - 1) / config->micro_batch;
    int64_t micro = (all + config->world - 1) / config->world;
    int64_t rows = micro * config->micro_batch;
    uint64_t per_position = sizeof(int32_t) * (config->mask_documents ? 3 : 2), positions;
    if (!checked_mul((uint64_t)rows, (uint64_t)config->sequence_length, &positions) ||
        !checked_mul(positions, per_position, &out->arrays_bytes) ||
        out->arrays_bytes > PTRDIFF_MAX / ((uint64_t)config->prefetch_steps + 1)) {
        FAIL(STATUS_USAGE, "%" PRId64 " sequences of %" PRId64 " tokens per rank are too large",
             rows, config->sequence_length);
    }
    out->rows = rows;
    out->num_micro = (int)micro;
    out->positions = (int64_t)positions;
    out->micro_bytes = (uint64_t)micro * sizeof(MicroBatch);
    return STATUS_OK;
}

int loader_micro_batches(const LoaderConfig *config) {
    Geometry geometry;
    if (measure(config, &geometry) == STATUS_OK) return geometry.num_micro;
    status_clear();
    return 0;
}

Status loader_plan(const LoaderConfig *config, MemoryPlan *plan) {
    Geometry geometry;
    TRY(measure(config, &geometry));
    uint64_t slots = (uint64_t)config->prefetch_steps + 1;
    uint64_t window = (uint64_t)config->sequence_length + 1;
    uint64_t scratch = window * (sizeof(int32_t) + (config->mask_documents ? sizeof(bool) : 0));
    uint64_t slot = geometry.arrays_bytes + geometry.micro_bytes + sizeof(Slot);
    return memory_plan_add(plan, "data buffers", slots * slot + scratch + sizeof(Loader));
}

// --- The thread ----------------------------------------------------------------------------------

static uint64_t total_consumed(const LoaderState *state) {
    uint64_t total = 0;
    for (int i = 0; i < state->num_sources; i++) total += state->consumed[i];
    return total;
}

// The next sample of the run: advances the state.
static void next_sample(Loader *loader, int *source, uint64_t *window) {
    LoaderState *state = &loader->state;
    *source = mixture_next(&loader->mixture, state->consumed);
    uint64_t windows = loader->sources.windows[*source];
    uint64_t position = state->consumed[*source]++;
    Order order;
    order_init(&order, windows, state->seed, (uint64_t)*source, position / windows);
    *window = order_at(&order, position % windows);
}

static Row slot_row(Loader *loader, Slot *slot, int64_t index) {
    return row_at(&loader->sources, slot->tokens, slot->targets, slot->document_start, index);
}

static Status fill_slot(Loader *loader, Slot *slot) {
    int64_t valid_targets = 0, row_index = 0;
    const int64_t first = loader->rank * loader->geometry.rows;
    slot->batch.first_sample = total_consumed(&loader->state);
    for (int64_t sample = 0; sample < loader->global_batch; sample++) {
        int source;
        uint64_t window;
        next_sample(loader, &source, &window);
        int64_t valid;
        if (sample < first || sample >= first + loader->geometry.rows) {
            // The mean of the loss is over all ranks' targets, and every rank can count them.
            TRY(sources_count_targets(&loader->sources, source, window, &valid));
        } else {
            Row row = slot_row(loader, slot, row_index++);
            TRY(sources_fill(&loader->sources, source, window, &row, &valid));
        }
        valid_targets += valid;
    }
    for (; row_index < loader->geometry.rows; row_index++) {
        Row row = slot_row(loader, slot, row_index);
        sources_fill_empty(&loader->sources, &row);
    }
    slot->batch.valid_targets = valid_targets;
    slot->batch.after = loader->state;
    return STATUS_OK;
}

// Waits for a free slot; false when the loader is being closed.
static bool wait_for_slot(Loader *loader, Slot **slot) {
    pthread_mutex_lock(&loader->mutex);
    while (!loader->stop && loader->produced - loader->released >= loader->num_slots)
        pthread_cond_wait(&loader->released_one, &loader->mutex);
    bool go_on = !loader->stop;
    *slot = &loader->slots[loader->produced % loader->num_slots];
    pthread_mutex_unlock(&loader->mutex);
    return go_on;
}

static void *thread_main(void *context) {
    Loader *loader = context;
    Slot *slot;
    Status status = STATUS_OK;
    while (status == STATUS_OK && wait_for_slot(loader, &slot)) {
        status = fill_slot(loader, slot);
        pthread_mutex_lock(&loader->mutex);
        if (status == STATUS_OK) {
            loader->produced++;
        } else {
            status_take(&loader->failure);
            loader->failed = true;
        }
        pthread_cond_signal(&loader->produced_one);
        pthread_mutex_unlock(&loader->mutex);
    }
    return NULL;
}

static Status start_thread(Loader *loader) {
    // Signals are for the threads that wait for them: this one takes none.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&loader->thread, NULL, thread_main, loader);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) FAIL(STATUS_INTERNAL, "cannot start the data thread: %s", strerror(error));
    loader->has_thread = true;
    return STATUS_OK;
}

// --- Opening and closing -------------------------------------------------------------------------

static Status allocate_slots(const LoaderConfig *config, Loader *loader) {
    const Geometry *geometry = &loader->geometry;
    loader->num_slots = (uint64_t)config->prefetch_steps + 1;
    loader->slots = calloc(loader->num_slots, sizeof *loader->slots);
    loader->arrays = calloc(loader->num_slots, geometry->arrays_bytes);
    loader->micros = calloc(loader->num_slots, geometry->micro_bytes);
    if (!loader->slots || !loader->arrays || !loader->micros)
        FAIL(STATUS_INTERNAL, "out of memory for %" PRIu64 " steps of data", loader->num_slots);
    int64_t micro_positions = config->micro_batch * config->sequence_length;
    for (uint64_t i = 0; i < loader->num_slots; i++) {
        Slot *slot = &loader->slots[i];
        slot->tokens = loader->arrays + i * (geometry->arrays_bytes / sizeof(int32_t));
        slot->targets = slot->tokens + geometry->positions;
        if (config->mask_documents) slot->document_start = slot->targets + geometry->positions;
        slot->micro = loader->micros + i * (uint64_t)geometry->num_micro;
        for (int m = 0; m < geometry->num_micro; m++) {
            int64_t offset = m * micro_positions;
            slot->micro[m] = (MicroBatch){
                .batch = config->micro_batch,
                .sequence_length = config->sequence_length,
                .tokens = slot->tokens + offset,
                .targets = slot->targets + offset,
                .document_start = slot->document_start ? slot->document_start + offset : NULL,
            };
        }
        slot->batch.num_micro = geometry->num_micro;
        slot->batch.micro = slot->micro;
    }
    return STATUS_OK;
}

static Status set_state(const LoaderConfig *config, const LoaderState *resume, LoaderState *state) {
    if (!resume) {
        *state = (LoaderState){.seed = config->seed, .num_sources = config->num_sources};
        return STATUS_OK;
    }
    if (resume->num_sources != config->num_sources) {
        FAIL(STATUS_RECIPE_MISMATCH, "the saved data state has %d sources, the recipe has %d",
             resume->num_sources, config->num_sources);
    }
    if (resume->seed != config->seed) {
        FAIL(STATUS_RECIPE_MISMATCH,
             "the saved data state has seed %" PRIu64 ", the recipe has %" PRIu64, resume->seed,
             config->seed);
    }
    uint64_t total = 0;
    for (int i = 0; i < resume->num_sources; i++) {
        if (!checked_add(total, resume->consumed[i], &total) || total > max_samples)
            FAIL(STATUS_BAD_DATA, "the saved data state counts more than 2^62 samples");
    }
    *state = *resume;
    return STATUS_OK;
}

static Status set_mixture(const LoaderConfig *config, Mixture *mixture) {
    double weights[LOADER_MAX_SOURCES];
    for (int i = 0; i < config->num_sources; i++) weights[i] = config->sources[i].weight;
    return mixture_init(mixture, weights, config->num_sources);
}

static Status set_up(const LoaderConfig *config, const LoaderState *resume, Loader *loader) {
    loader->global_batch = config->global_batch;
    loader->rank = config->rank;
    TRY(measure(config, &loader->geometry));
    TRY(sources_open(config, &loader->sources));
    TRY(set_mixture(config, &loader->mixture));
    TRY(set_state(config, resume, &loader->state));
    return allocate_slots(config, loader);
}

Status loader_open(const LoaderConfig *config, const LoaderState *resume, Loader **out) {
    Loader *loader = calloc(1, sizeof *loader);
    if (!loader) FAIL(STATUS_INTERNAL, "out of memory opening data");
    pthread_mutex_init(&loader->mutex, NULL);
    pthread_cond_init(&loader->produced_one, NULL);
    pthread_cond_init(&loader->released_one, NULL);
    Status status = set_up(config, resume, loader);
    if (status != STATUS_OK) {
        loader_close(loader);
        return status;
    }
    *out = loader;
    return STATUS_OK;
}

void loader_close(Loader *loader) {
    if (!loader) return;
    if (loader->has_thread) {
        pthread_mutex_lock(&loader->mutex);
        loader->stop = true;
        pthread_cond_signal(&loader->released_one);
        pthread_mutex_unlock(&loader->mutex);
        pthread_join(loader->thread, NULL);
    }
    pthread_cond_destroy(&loader->released_one);
    pthread_cond_destroy(&loader->produced_one);
    pthread_mutex_destroy(&loader->mutex);
    sources_close(&loader->sources);
    free(loader->slots);
    free(loader->arrays);
    free(loader->micros);
    free(loader);
}

// --- The consumer's side -------------------------------------------------------------------------

Status loader_next(Loader *loader, const StepBatch **out) {
    double begin = clock_seconds();
    Slot *slot = NULL;
    if (!loader->has_thread) TRY(start_thread(loader));
    pthread_mutex_lock(&loader->mutex);
    loader->released = loader->taken; // the step handed out before is done with
    pthread_cond_signal(&loader->released_one);
    while (loader->produced == loader->taken && !loader->failed)
        pthread_cond_wait(&loader->produced_one, &loader->mutex);
    if (loader->produced > loader->taken)
        slot = &loader->slots[loader->taken++ % loader->num_slots];
    pthread_mutex_unlock(&loader->mutex);

    if (!slot) return status_put(&loader->failure); // the thread has ended: nobody writes to it
    slot->batch.wait_seconds = clock_seconds() - begin;
    *out = &slot->batch;
    return STATUS_OK;
}

uint64_t loader_tokens(const Loader *loader, int source) {
    return dataset_tokens(loader->sources.datasets[source]);
}

uint64_t loader_samples(const Loader *loader, int source) {
    return loader->sources.windows[source];
}

int loader_skipped_shards(const Loader *loader) {
    int skipped = 0;
    for (int i = 0; i < loader->sources.count; i++)
        skipped += dataset_skipped_shards(loader->sources.datasets[i]);
    return skipped;
}

void loader_fingerprint(const Loader *loader, char hex[HASH_HEX_SIZE]) {
    memcpy(hex, loader->sources.fingerprint, HASH_HEX_SIZE);
}

int loader_vocab_size(const Loader *loader) {
    return dataset_info(loader->sources.datasets[0])->vocab_size;
}
