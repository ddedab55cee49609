// Token embedding: a gather of rows, and its transpose, a scatter-add without atomics.
//
// Backward sorts the positions by token id (a stable radix sort, so that equal ids stay in token
// order) and adds up runs of equal ids. Text repeats few ids very often, so the sorted list is cut
// into tiles of fixed length, and a run that crosses tiles is added up in two steps:
//   1. One block per tile and slice of columns adds up its rows. Runs that lie inside the tile go
//      straight to the gradient. The tile's share of a run that began earlier is its `head`, that
//      of a run that begins in it and goes on is its `tail`; both wait in scratch.
//   2. The tile in which such a run begins adds its tail, then the heads of the tiles after it.
// Every sum has a fixed order, and every row of the gradient one writer per step.
#include <cub/device/device_radix_sort.cuh>
#include "cuda/common.cuh"

enum {
    ROWS_PER_BLOCK = 8, // a warp each
    TILE = 32,          // sorted positions that one block adds up
    TILE_THREADS = 128,
    LOADS = 4, // rows in flight; divides TILE
};

// --- Forward -------------------------------------------------------------------------------------

// An id outside the vocabulary leaves a row of zeros and is noted for synchronize().
template <typename T, int W>
static __global__ void __launch_bounds__(ROWS_PER_BLOCK * 32)
    gather_kernel(int64_t tokens, int hidden, int vocab, const int32_t *__restrict__ ids,
                  const T *__restrict__ weight, T *__restrict__ out, uint64_t *bad_id) {
    const int64_t token = (int64_t)blockIdx.x * ROWS_PER_BLOCK + threadIdx.y;
    if (token >= tokens) return;
    const int32_t id = ids[token];
    const bool valid = id >= 0 && id < vocab;
    if (!valid && threadIdx.x == 0) note_bad_id(bad_id, token, id);
    const T *from = weight + (valid ? (int64_t)id * hidden : 0);
#pragma unroll 4
    for (int h = threadIdx.x * W; h < hidden; h += 32 * W) {
        Piece<T, W> piece = load_piece<T, W>(from + h);
#pragma unroll
        for (int i = 0; i < W; i++)
            if (!valid) piece.v[i] = from_float<T>(0.0f);
        store_piece<T, W>(out + token * hidden + h, piece);
    }
}

Status cuda_embed_forward(Backend *base, const EmbedArgs *args) {
    CudaBackend *backend = cuda_of(base);
    backend->current_op = "embed_forward";
    if (args->tokens == 0) return STATUS_OK;
    const dim3 block(32, ROWS_PER_BLOCK);
    const unsigned blocks = (unsigned)div_up(args->tokens, ROWS_PER_BLOCK);
    const uintptr_t bits = (uintptr_t)args->weight | (uintptr_t)args->out;
    DISPATCH_DTYPE(base->compute_dtype, T, {
        auto kernel = vec_ok<T>((const void *)bits, args->hidden_size)
                          ? gather_kernel<T, Vec<T>::SIZE>
                          : gather_kernel<T, 1>;
        kernel<<<blocks, block, 0, backend->stream>>>(
            args->tokens, args->hidden_size, args->vocab_size, args->ids, (const T *)args->weight,
            (T *)args->out, backend->bad_id);
    });
    LAUNCH_TRY(backend);
    return STATUS_OK;
}

// --- Backward: sorting ---------------------------------------------------------------------------

typedef struct EmbedScratch {
    uint32_t *id, *sorted_id;            // (T)
    int32_t *position, *sorted_position; // (T)
    float *head, *tail;                  // (tiles, H)
    void *sort;
    size_t sort_bytes;
} EmbedScratch;

// An id outside the vocabulary becomes the number `vocab`, which sorts last and is added nowhere.
static __global__ void number_kernel(int64_t tokens, int vocab, const int32_t *__restrict__ ids,
                                     uint32_t *__restrict__ id, int32_t *__restrict__ position) {
    const int64_t t = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= tokens) return;
    id[t] = ids[t] >= 0 && ids[t] < vocab ? (uint32_t)ids[t] : (uint32_t)vocab;
    position[t] = (int32_t)t;
}

// With s->sort NULL only s->sort_bytes is set.
static cudaError_t sort_by_id(const EmbedArgs *args, EmbedScratch *s, cudaStream_t stream) {
    int bits = 1; // of the numbers 0 ... vocab
    while (bits < 32 && (uint64_t)args->vocab_size >> bits) bits++;
    return cub::DeviceRadixSort::SortPairs(s->sort, s->sort_bytes, s->id, s->sorted_id, s->position,
                                           s->sorted_position, (int)args->tokens, 0, bits, stream);
}

// Every piece is counted; they are taken from `scratch` when it is not NULL.
static Status lay_out(const EmbedArgs *args, EmbedScratch *s, Scratch *scratch, size_t *total) {
    const size_t tokens = (size_t)args->tokens, hidden = (size_t)args->hidden_size;
    const size_t words = tokens * sizeof(int32_t);
    const size_t sums = (size_t)div_up(args->tokens, TILE) * hidden * sizeof(float);
    *s = {};
    if (sort_by_id(args, s, 0) != cudaSuccess)
        FAIL(STATUS_INTERNAL, "embed: no size for the sort of %zu tokens", tokens);
    void **const pieces[] = {(void **)&s->id,
                             (void **)&s->sorted_id,
                             (void **)&s->position,
                             (void **)&s->sorted_position,
                             (void **)&s->head,
                             (void **)&s->tail,
                             &s->sort};
    const size_t bytes[] = {words, words, words, words, sums, sums, s->sort_bytes};
    *total = 0;
    for (int i = 0; i < 7; i++) {
        *total += scratch_bytes(bytes[i]);
        if (scratch) TRY(scratch_take(scratch, bytes[i], pieces[i]));
    }
    return STATUS_OK;
}

size_t cuda_embed_workspace(const CudaBackend *backend, const EmbedArgs *args) {
    (void)backend;
    EmbedScratch unused;
    size_t total = 0;
    if (lay_out(args, &unused, NULL, &total) != STATUS_OK) status_clear(); // the op will say so
    return total;
}

// --- Backward: adding ----------------------------------------------------------------------------

typedef struct Runs { // of the sorted list
    int64_t tokens;
    int hidden;
    uint32_t vocab;
    const uint32_t *id;
    const int32_t *position;
    float *head, *tail;
} Runs;

template <typename G, int W>
static __device__ __forceinline__ void add_to_gradient(G *grad, const float *sums) {
    constexpr int WIDTH = W % Vec<G>::SIZE == 0 ? Vec<G>::SIZE : 1;
#pragma unroll
    for (int i = 0; i < W; i += WIDTH) {
        Piece<G, WIDTH> piece = load_piece<G, WIDTH>(grad + i);
#pragma unroll
        for (int j = 0; j < WIDTH; j++)
            piece.v[j] = from_float<G>(to_float(piece.v[j]) + sums[i + j]);
        store_piece<G, WIDTH>(grad + i, piece);
    }
}

template <int W> static __device__ __forceinline__ void keep_sums(float *to, const float *sums) {
    constexpr int WIDTH = W % 4 == 0 ? 4 : 1;
#pragma unroll
    for (int i = 0; i < W; i += WIDTH) {
        Piece<float, WIDTH> piece;
#pragma unroll
        for (int j = 0; j < WIDTH; j++) piece.v[j] = sums[i + j];
        store_piece<float, WIDTH>(to + i, piece);
    }
}

// Columns [column, column + W) of one tile; `id` holds the tile's ids between its two neighbours.
template <typename T, typename G, int W>
static __device__ void add_tile(const Runs &r, int column, int count, const uint32_t *id,
                                const int32_t *position, const T *dout, G *grad) {
    float sums[W] = {};
    const int64_t kept = (int64_t)blockIdx.x * r.hidden + column;
    bool began_earlier = id[0] == id[1];
    for (int first = 0; first < count; first += LOADS) {
        Piece<T, W> rows[LOADS];
#pragma unroll
        for (int j = 0; j < LOADS; j++)
            if (first + j < count)
                rows[j] = load_piece<T, W>(dout + (int64_t)position[first + j] * r.hidden + column);
#pragma unroll
        for (int j = 0; j < LOADS; j++) {
            if (first + j >= count) break;
#pragma unroll
            for (int i = 0; i < W; i++) sums[i] += to_float(rows[j].v[i]);
            const uint32_t here = id[first + j + 1];
            if (here == id[first + j + 2]) continue;
            if (began_earlier)
                keep_sums<W>(r.head + kept, sums);
            else if (here != r.vocab)
                add_to_gradient<G, W>(grad + (int64_t)here * r.hidden + column, sums);
            began_earlier = false;
#pragma unroll
            for (int i = 0; i < W; i++) sums[i] = 0.0f;
        }
    }
    if (id[count] == id[count + 1]) // goes on behind the tile
        keep_sums<W>((began_earlier ? r.head : r.tail) + kept, sums);
}

enum : uint32_t { NO_ID = UINT32_MAX };

template <typename T, typename G, int W>
static __global__ void __launch_bounds__(TILE_THREADS)
    tile_kernel(Runs r, const T *__restrict__ dout, G *__restrict__ grad) {
    __shared__ uint32_t id[TILE + 2];
    __shared__ int32_t position[TILE];
    const int64_t begin = (int64_t)blockIdx.x * TILE;
    const int count = (int)min((int64_t)TILE, r.tokens - begin);
    for (int i = threadIdx.x; i < count + 2; i += TILE_THREADS) {
        const int64_t at = begin + i - 1;
        id[i] = at >= 0 && at < r.tokens ? r.id[at] : NO_ID;
        if (i < count) position[i] = r.position[begin + i];
    }
    __syncthreads();
    const int column = (int)(blockIdx.y * TILE_THREADS + threadIdx.x) * W;
    if (column < r.hidden) add_tile<T, G, W>(r, column, count, id, position, dout, grad);
}

// The run that begins in tile blockIdx.x and goes on behind it, if there is one.
template <typename G, int W>
static __global__ void __launch_bounds__(TILE_THREADS) join_kernel(Runs r, G *__restrict__ grad) {
    const int64_t begin = (int64_t)blockIdx.x * TILE;
    int64_t end = begin + TILE;
    const int column = (int)(blockIdx.y * TILE_THREADS + threadIdx.x) * W;
    if (end >= r.tokens || column >= r.hidden) return;
    const uint32_t id = r.id[end - 1];
    if (id == r.vocab || id != r.id[end] || (begin > 0 && r.id[begin - 1] == id)) return;
    float sums[W];
#pragma unroll
    for (int i = 0; i < W; i++) sums[i] = r.tail[(int64_t)blockIdx.x * r.hidden + column + i];
    for (int64_t tile = blockIdx.x + 1; end < r.tokens && r.id[end] == id; tile++, end += TILE)
#pragma unroll
        for (int i = 0; i < W; i++) sums[i] += r.head[tile * r.hidden + column + i];
    add_to_gradient<G, W>(grad + (int64_t)id * r.hidden + column, sums);
}

template <typename T, typename G, int W>
static void add_runs(const EmbedArgs *args, const Runs *r, cudaStream_t stream) {
    const dim3 grid((unsigned)div_up(r->tokens, TILE),
                    (unsigned)div_up(r->hidden, (int64_t)TILE_THREADS * W));
    tile_kernel<T, G, W>
        <<<grid, TILE_THREADS, 0, stream>>>(*r, (const T *)args->dout, (G *)args->grad_weight);
    join_kernel<G, W><<<grid, TILE_THREADS, 0, stream>>>(*r, (G *)args->grad_weight);
}

Status cuda_embed_backward(Backend *base, const EmbedArgs *args) {
    CudaBackend *backend = cuda_of(base);
    backend->current_op = "embed_backward";
    if (args->tokens == 0) return STATUS_OK;
    Scratch scratch = scratch_open(backend);
    EmbedScratch s;
    size_t total;
    TRY(lay_out(args, &s, &scratch, &total));
    number_kernel<<<(unsigned)div_up(args->tokens, 256), 256, 0, backend->stream>>>(
        args->tokens, args->vocab_size, args->ids, s.id, s.position);
    LAUNCH_TRY(backend);
    CUDA_TRY(backend, sort_by_id(args, &s, backend->stream));
    const Runs runs = {args->tokens, args->hidden_size, (uint32_t)args->vocab_size,
                       s.sorted_id,  s.sorted_position, s.head,
                       s.tail};
    DISPATCH_DTYPE(base->compute_dtype, T, {
        DISPATCH_DTYPE(base->grad_dtype, G, {
            const bool wide = vec_ok<T>(args->dout, args->hidden_size) &&
                              vec_ok<G>(args->grad_weight, args->hidden_size);
            if (wide)
                add_runs<T, G, Vec<T>::SIZE>(args, &runs, backend->stream);
            else
                add_runs<T, G, 1>(args, &runs, backend->stream);
        });
    });
    LAUNCH_TRY(backend);
    return STATUS_OK;
}
