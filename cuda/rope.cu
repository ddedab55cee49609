// Rotary position embedding on packed q|k|v rows, with Qwen3's RMSNorm of each q and k head before.
//
// A pair (a, b) = (n[i], n[i + D/2]) becomes (a·cos - b·sin, b·cos + a·sin); backward turns by the
// angle's negative. The angle position·θ^(-2i/D), in half turns, is formed and brought into [-1, 1]
// in double, and only then handed to the fp32 sine and cosine: exact to 2e-7 at any position.
//
// A head is the work of `lanes` neighbouring threads (a power of two, so that a warp holds whole
// heads), each with 8 pairs at most. Such a team keeps the 8 angles of its token and turns several
// heads of it: h = first, first + teams_per_token, ..., so that neighbouring teams read
// neighbouring heads.
#include "cuda/common.cuh"

enum {
    PAIRS = 8,         // of a head, per thread
    THREADS = 128,     // of a block
    HEADS_ROTATED = 4, // of a team, in forward and without norms
    HEADS_NORMED = 2,
    HEAD_DIM_MAX = 2 * PAIRS * 32,
    BLOCKS_PER_SM = 3, // of the normed backward: what its registers allow
};

typedef struct Frequencies {
    double of[HEAD_DIM_MAX / 2]; // half turns per position
} Frequencies;

// What the kernels share. `in` may be `out` without norms.
template <typename T> struct Rope {
    const T *in, *q_norm, *k_norm;
    T *out;
    const T *saved; // backward with norms: qkv as it entered forward
    float *inv_rms;
    float *parts; // (gridDim.x, 2, D): q_norm's and k_norm's gradients
    int64_t tokens, sequence_length;
    int heads, kv_heads, dim;
    int lanes; // threads per head
    int teams_per_token;
    float epsilon, direction; // direction: 1 forward, -1 backward
};

// The 8 angles of a thread. Pair j of piece p is (p·lanes + lane)·W + j.
template <int W>
static __device__ __forceinline__ void set_angles(const double *frequency, int64_t position,
                                                  int lane, int lanes, int half, float direction,
                                                  float *cosine, float *sine) {
#pragma unroll
    for (int p = 0; p < PAIRS / W; p++) {
#pragma unroll
        for (int j = 0; j < W; j++) {
            const int i = (p * lanes + lane) * W + j;
            const double angle = i < half ? (double)position * frequency[i] : 0.0;
            const float rest = (float)fma(-2.0, rint(0.5 * angle), angle);
            sincospif(rest, &sine[p * W + j], &cosine[p * W + j]);
            sine[p * W + j] *= direction;
        }
    }
}

// A thread's pairs of one head.
template <typename T, int W> struct Pairs { Piece<T, W> a[PAIRS / W], b[PAIRS / W]; };

template <typename T, int W>
static __device__ __forceinline__ void load_pairs(const T *head, int lane, int lanes, int half,
                                                  Pairs<T, W> *out) {
#pragma unroll
    for (int p = 0; p < PAIRS / W; p++) {
        const int i = (p * lanes + lane) * W;
        if (i >= half) break;
        out->a[p] = load_piece<T, W>(head + i);
        out->b[p] = load_piece<T, W>(head + half + i);
    }
}

template <typename T, int W>
static __device__ __forceinline__ void store_pairs(T *head, int lane, int lanes, int half,
                                                   const Pairs<T, W> &pairs) {
#pragma unroll
    for (int p = 0; p < PAIRS / W; p++) {
        const int i = (p * lanes + lane) * W;
        if (i >= half) break;
        store_piece<T, W>(head + i, pairs.a[p]);
        store_piece<T, W>(head + half + i, pairs.b[p]);
    }
}

static __device__ __forceinline__ float team_sum(float x, int lanes) {
    for (int offset = lanes >> 1; offset > 0; offset >>= 1)
        x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// --- Without norms, and forward with them --------------------------------------------------------

// 1 / rms of a head. Every thread of the warp takes part; pairs beyond the head are left out.
template <typename T, int W>
static __device__ __forceinline__ float inverse_rms(const Pairs<T, W> &x, int lane, int lanes,
                                                    int dim, float epsilon) {
    float squares = 0.0f;
#pragma unroll
    for (int p = 0; p < PAIRS / W; p++) {
        if ((p * lanes + lane) * W >= dim / 2) break;
#pragma unroll
        for (int j = 0; j < W; j++) {
            const float a = to_float(x.a[p].v[j]), b = to_float(x.b[p].v[j]);
            squares += a * a + b * b;
        }
    }
    return rsqrtf(team_sum(squares, lanes) / (float)dim + epsilon);
}

// x := x turned; with a norm weight, x·scale·weight turned.
template <typename T, int W>
static __device__ __forceinline__ void turn(Pairs<T, W> *x, const float *cosine, const float *sine,
                                            const T *weight, float scale, int lane, int lanes,
                                            int half) {
    Pairs<T, W> w;
    if (weight) load_pairs<T, W>(weight, lane, lanes, half, &w);
#pragma unroll
    for (int p = 0; p < PAIRS / W; p++) {
        if ((p * lanes + lane) * W >= half) break;
#pragma unroll
        for (int j = 0; j < W; j++) {
            float a = to_float(x->a[p].v[j]), b = to_float(x->b[p].v[j]);
            if (weight) {
                a *= scale * to_float(w.a[p].v[j]);
                b *= scale * to_float(w.b[p].v[j]);
            }
            const float c = cosine[p * W + j], s = sine[p * W + j];
            x->a[p].v[j] = from_float<T>(a * c - b * s);
            x->b[p].v[j] = from_float<T>(b * c + a * s);
        }
    }
}

// Heads behind q and k are v, which is copied (or left alone in place).
template <typename T, int W, bool NORMED>
static __global__ void __launch_bounds__(THREADS) rotate_kernel(Rope<T> r, Frequencies f) {
    constexpr int HEADS = NORMED ? HEADS_NORMED : HEADS_ROTATED;
    __shared__ double frequency[HEAD_DIM_MAX / 2];
    const int half = r.dim / 2, turned = r.heads + r.kv_heads;
    const int all = r.in == r.out ? turned : turned + r.kv_heads;
    for (int i = threadIdx.x; i < half; i += THREADS) frequency[i] = f.of[i];
    __syncthreads();
    const int lane = threadIdx.x % r.lanes, width = (turned + r.kv_heads) * r.dim;
    const int64_t team = (int64_t)blockIdx.x * (THREADS / r.lanes) + threadIdx.x / r.lanes;
    const int64_t token = team / r.teams_per_token;
    const int first = (int)(team - token * r.teams_per_token);
    const bool active = token < r.tokens; // the others still take part in the warp's sums
    Pairs<T, W> x[HEADS] = {};
#pragma unroll
    for (int k = 0; k < HEADS; k++) {
        const int h = first + k * r.teams_per_token;
        if (active && h < all)
            load_pairs<T, W>(r.in + token * width + h * r.dim, lane, r.lanes, half, &x[k]);
    }
    float cosine[PAIRS], sine[PAIRS];
    set_angles<W>(frequency, token % r.sequence_length, lane, r.lanes, half, r.direction, cosine,
                  sine);
#pragma unroll
    for (int k = 0; k < HEADS; k++) {
        const int h = first + k * r.teams_per_token;
        const T *weight = NULL;
        float scale = 1.0f;
        if constexpr (NORMED) {
            scale = inverse_rms<T, W>(x[k], lane, r.lanes, r.dim, r.epsilon);
            weight = h < r.heads ? r.q_norm : r.k_norm;
            if (active && h < turned && lane == 0) r.inv_rms[token * turned + h] = scale;
        }
        if (!active || h >= all) continue;
        if (h < turned) turn<T, W>(&x[k], cosine, sine, weight, scale, lane, r.lanes, half);
        store_pairs<T, W>(r.out + token * width + h * r.dim, lane, r.lanes, half, x[k]);
    }
}

// --- Backward with norms -------------------------------------------------------------------------

// What one team works on: two heads of one kind (q, k or v), of every `walkers`-th token.
typedef struct Unit {
    int kind; // 0 q, 1 k, 2 v
    int first, count;
    int64_t token, walkers;
} Unit;

static __host__ __device__ __forceinline__ int units_of(int heads, int kv_heads, bool in_place) {
    const int q = (heads + 1) / 2, k = (kv_heads + 1) / 2;
    return q + (in_place ? 1 : 2) * k;
}

template <typename T> static __device__ __forceinline__ Unit unit_of(const Rope<T> &r, int team) {
    const int teams = THREADS / r.lanes, q = (r.heads + 1) / 2, k = (r.kv_heads + 1) / 2;
    const int units = units_of(r.heads, r.kv_heads, r.in == r.out);
    const int64_t all = (int64_t)gridDim.x * teams, id = (int64_t)blockIdx.x * teams + team;
    int u = (int)(id % units);
    Unit unit;
    unit.kind = u < q ? 0 : u < q + k ? 1 : 2;
    u -= unit.kind == 0 ? 0 : unit.kind == 1 ? q : q + k;
    const int heads = unit.kind == 0 ? r.heads : r.kv_heads;
    unit.count = min(2, heads - 2 * u);
    unit.first = 2 * u + (unit.kind == 0 ? 0 : r.heads + (unit.kind - 1) * r.kv_heads);
    unit.walkers = all / units;
    unit.token = id / units < unit.walkers ? id / units : r.tokens; // left over: nothing to do
    return unit;
}

// One head: dn = dout turned back, then dx of n = x·r·w as in cuda/norm.cu. Adds dn·x·r to `sums`:
// [0, 8) of the first half of the head, [8, 16) of the second.
template <typename T, int W>
static __device__ __forceinline__ void
head_backward(const Rope<T> &r, Pairs<T, W> *d, const Pairs<T, W> &x, const Pairs<T, W> &w,
              const float *cosine, const float *sine, float inverse, int lane, float *sums) {
    const int half = r.dim / 2;
    float dot = 0.0f;
#pragma unroll
    for (int p = 0; p < PAIRS / W; p++) {
        if ((p * r.lanes + lane) * W >= half) break;
#pragma unroll
        for (int j = 0; j < W; j++) {
            const int i = p * W + j;
            const float a = to_float(d->a[p].v[j]), b = to_float(d->b[p].v[j]);
            const float sum_a = (a * cosine[i] - b * sine[i]) * (to_float(x.a[p].v[j]) * inverse);
            const float sum_b = (b * cosine[i] + a * sine[i]) * (to_float(x.b[p].v[j]) * inverse);
            sums[i] += sum_a;
            sums[i + PAIRS] += sum_b;
            dot += sum_a * to_float(w.a[p].v[j]) + sum_b * to_float(w.b[p].v[j]);
        }
    }
    const float mean = team_sum(dot, r.lanes) / (float)r.dim;
#pragma unroll
    for (int p = 0; p < PAIRS / W; p++) {
        if ((p * r.lanes + lane) * W >= half) break;
#pragma unroll
        for (int j = 0; j < W; j++) {
            const int i = p * W + j;
            const float a = to_float(d->a[p].v[j]), b = to_float(d->b[p].v[j]);
            const float g_a = (a * cosine[i] - b * sine[i]) * to_float(w.a[p].v[j]);
            const float g_b = (b * cosine[i] + a * sine[i]) * to_float(w.b[p].v[j]);
            const float n_a = to_float(x.a[p].v[j]) * inverse;
            const float n_b = to_float(x.b[p].v[j]) * inverse;
            d->a[p].v[j] = from_float<T>(inverse * (g_a - n_a * mean));
            d->b[p].v[j] = from_float<T>(inverse * (g_b - n_b * mean));
        }
    }
}

// The heads of a unit at one token: dout to dqkv. Without work (a token behind the last), the
// thread only takes part in its warp's sums.
template <typename T, int W>
static __device__ __forceinline__ void unit_backward(const Rope<T> &r, const double *frequency,
                                                     const Unit &unit, int64_t token, int lane,
                                                     const Pairs<T, W> &w, float *sums) {
    const int half = r.dim / 2, turned = r.heads + r.kv_heads;
    const int64_t at = (token * (turned + r.kv_heads) + unit.first) * r.dim;
    Pairs<T, W> d[2] = {}, x[2] = {};
    float inverse[2] = {};
#pragma unroll
    for (int k = 0; k < 2; k++) {
        if (token >= r.tokens || k >= unit.count) continue;
        load_pairs<T, W>(r.in + at + k * r.dim, lane, r.lanes, half, &d[k]);
        if (unit.kind == 2) continue;
        load_pairs<T, W>(r.saved + at + k * r.dim, lane, r.lanes, half, &x[k]);
        inverse[k] = r.inv_rms[token * turned + unit.first + k];
    }
    float cosine[PAIRS], sine[PAIRS];
    set_angles<W>(frequency, token % r.sequence_length, lane, r.lanes, half, -1.0f, cosine, sine);
#pragma unroll
    for (int k = 0; k < 2; k++) {
        T *out = r.out + at + k * r.dim;
        if (token < r.tokens && k < unit.count && unit.kind == 2)
            store_pairs<T, W>(out, lane, r.lanes, half, d[k]);
        head_backward<T, W>(r, &d[k], x[k], w, cosine, sine, inverse[k], lane, sums);
        if (token < r.tokens && k < unit.count && unit.kind != 2)
            store_pairs<T, W>(out, lane, r.lanes, half, d[k]);
    }
}

// parts[block][kind] = the sums of the block's teams of that kind, in order.
static __device__ __forceinline__ void add_teams(const float *all_sums, const int *kinds, int teams,
                                                 int dim, float *parts) {
    for (int c = threadIdx.x; c < 2 * dim; c += THREADS) {
        const int kind = c / dim;
        float sum = 0.0f;
        for (int team = 0; team < teams; team++)
            if (kinds[team] == kind) sum += all_sums[team * dim + c % dim];
        parts[(int64_t)blockIdx.x * 2 * dim + c] = sum;
    }
}

// A team walks over the tokens with its share of its norm's gradient in registers.
template <typename T, int W>
static __global__ void __launch_bounds__(THREADS) normed_backward_kernel(Rope<T> r, Frequencies f) {
    __shared__ double frequency[HEAD_DIM_MAX / 2];
    __shared__ float all_sums[THREADS * 2 * PAIRS]; // (teams, D)
    __shared__ int kinds[THREADS];
    const int half = r.dim / 2, lane = threadIdx.x % r.lanes, team = threadIdx.x / r.lanes;
    for (int i = threadIdx.x; i < half; i += THREADS) frequency[i] = f.of[i];
    const Unit unit = unit_of(r, team);
    if (lane == 0) kinds[team] = unit.kind;
    __syncthreads();
    Pairs<T, W> w = {};
    if (unit.kind != 2)
        load_pairs<T, W>(unit.kind == 0 ? r.q_norm : r.k_norm, lane, r.lanes, half, &w);
    float sums[2 * PAIRS] = {};
    const int64_t rounds = (r.tokens + unit.walkers - 1) / unit.walkers;
    for (int64_t i = 0; i < rounds; i++)
        unit_backward<T, W>(r, frequency, unit, unit.token + i * unit.walkers, lane, w, sums);
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int at = (i / W * r.lanes + lane) * W + i % W;
        if (at >= half) break;
        all_sums[team * r.dim + at] = sums[i];
        all_sums[team * r.dim + at + half] = sums[i + PAIRS];
    }
    __syncthreads();
    add_teams(all_sums, kinds, THREADS / r.lanes, r.dim, r.parts);
}

// --- Host ----------------------------------------------------------------------------------------

static Status check_shape(const RopeArgs *args) {
    if (args->head_dim > HEAD_DIM_MAX || args->head_dim % 2 != 0)
        FAIL(STATUS_USAGE,
             "head size %d: rotary embedding on a GPU takes an even one of at most %d",
             args->head_dim, (int)HEAD_DIM_MAX);
    return STATUS_OK;
}

static Frequencies frequencies_of(const RopeArgs *args) {
    Frequencies f = {};
    for (int i = 0; i < args->head_dim / 2; i++)
        f.of[i] = pow(args->theta, -2.0 * i / args->head_dim) / M_PI;
    return f;
}

static int lanes_of(int head_dim) {
    int lanes = 1;
    while (lanes * 2 * PAIRS < head_dim) lanes *= 2;
    return lanes;
}

// At least one team for every unit.
static int64_t backward_blocks(const CudaBackend *backend, const RopeArgs *args) {
    const int64_t units = units_of(args->num_heads, args->num_kv_heads, false);
    const int64_t teams = THREADS / lanes_of(args->head_dim);
    const int64_t least = div_up(units, teams);
    const int64_t all = div_up(args->batch * args->sequence_length * units, teams);
    int64_t most = (int64_t)backend->num_sms * BLOCKS_PER_SM;
    if (most < least) most = least;
    return all < most ? all : most;
}

size_t cuda_rope_workspace(const CudaBackend *backend, const RopeArgs *args) {
    return scratch_bytes((size_t)backward_blocks(backend, args) * 2 * (size_t)args->head_dim *
                         sizeof(float));
}

template <typename T>
static Rope<T> rope_of(const RopeArgs *args, const void *in, void *out, int heads_per_team) {
    const int turned = args->num_heads + args->num_kv_heads;
    const int heads = in == out ? turned : turned + args->num_kv_heads;
    Rope<T> r = {};
    r.in = (const T *)in;
    r.out = (T *)out;
    r.q_norm = (const T *)args->q_norm;
    r.k_norm = (const T *)args->k_norm;
    r.saved = (const T *)args->qkv;
    r.inv_rms = args->inv_rms;
    r.tokens = args->batch * args->sequence_length;
    r.sequence_length = args->sequence_length;
    r.heads = args->num_heads;
    r.kv_heads = args->num_kv_heads;
    r.dim = args->head_dim;
    r.lanes = lanes_of(args->head_dim);
    r.teams_per_token = (int)div_up(heads, heads_per_team);
    r.epsilon = args->epsilon;
    r.direction = 1.0f;
    return r;
}

// True when every head begins and splits at a multiple of 16 bytes.
template <typename T> static bool wide_ok(const RopeArgs *args, const void *in, const void *out) {
    uintptr_t bits = (uintptr_t)in | (uintptr_t)out;
    if (args->q_norm)
        bits |= (uintptr_t)args->qkv | (uintptr_t)args->q_norm | (uintptr_t)args->k_norm;
    return vec_ok<T>((const void *)bits, args->head_dim / 2);
}

template <typename T>
static void rotate(const RopeArgs *args, const void *in, void *out, bool normed, float direction,
                   cudaStream_t stream) {
    Rope<T> r = rope_of<T>(args, in, out, normed ? HEADS_NORMED : HEADS_ROTATED);
    r.direction = direction;
    constexpr int WIDE = Vec<T>::SIZE;
    const bool wide = wide_ok<T>(args, in, out);
    auto kernel = normed ? (wide ? rotate_kernel<T, WIDE, true> : rotate_kernel<T, 1, true>)
                         : (wide ? rotate_kernel<T, WIDE, false> : rotate_kernel<T, 1, false>);
    const int64_t blocks = div_up(r.tokens * r.teams_per_token, THREADS / r.lanes);
    kernel<<<(unsigned)blocks, THREADS, 0, stream>>>(r, frequencies_of(args));
}

Status cuda_rope_forward(Backend *base, const RopeArgs *args) {
    CudaBackend *backend = cuda_of(base);
    backend->current_op = "rope_forward";
    TRY(check_shape(args));
    if (args->batch * args->sequence_length == 0) return STATUS_OK;
    DISPATCH_DTYPE(base->compute_dtype, T, {
        rotate<T>(args, args->qkv, args->out, args->q_norm != NULL, 1.0f, backend->stream);
    });
    LAUNCH_TRY(backend);
    return STATUS_OK;
}

static Status normed_backward(CudaBackend *backend, const RopeArgs *args) {
    const int64_t blocks = backward_blocks(backend, args), dim = args->head_dim;
    Scratch scratch = scratch_open(backend);
    float *parts = NULL;
    TRY(scratch_take(&scratch, (size_t)(blocks * 2 * dim) * sizeof(float), (void **)&parts));
    DISPATCH_DTYPE(backend->base.compute_dtype, T, {
        Rope<T> r = rope_of<T>(args, args->dout, args->dqkv, HEADS_NORMED);
        r.parts = parts;
        auto kernel = wide_ok<T>(args, args->dout, args->dqkv)
                          ? normed_backward_kernel<T, Vec<T>::SIZE>
                          : normed_backward_kernel<T, 1>;
        kernel<<<(unsigned)blocks, THREADS, 0, backend->stream>>>(r, frequencies_of(args));
    });
    LAUNCH_TRY(backend);
    TRY(add_column_sums(backend, parts, blocks, 2 * dim, dim, backend->base.grad_dtype,
                        args->grad_q_norm));
    return add_column_sums(backend, parts + dim, blocks, 2 * dim, dim, backend->base.grad_dtype,
                           args->grad_k_norm);
}

Status cuda_rope_backward(Backend *base, const RopeArgs *args) {
    CudaBackend *backend = cuda_of(base);
    backend->current_op = "rope_backward";
    TRY(check_shape(args));
    if (args->batch * args->sequence_length == 0) return STATUS_OK;
    if (args->q_norm) return normed_backward(backend, args);
    DISPATCH_DTYPE(base->compute_dtype, T,
                   { rotate<T>(args, args->dout, args->dqkv, false, -1.0f, backend->stream); });
    LAUNCH_TRY(backend);
    return STATUS_OK;
}
