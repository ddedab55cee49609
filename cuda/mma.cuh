// Tensor-core and asynchronous-copy instructions of sm_80 and newer, one function each, and the
// shared-memory tile they work on.
//
// A tile is ROWS rows of D bf16 and starts on a multiple of 1024 bytes. Its 16-byte chunks are
// permuted inside a row by XOR with the row number, so that the eight rows an ldmatrix reads at one
// column lie in different banks.
//
// Fragments of mma.m16n8k16, lane = 4 g + t (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//   A (16 x 16): a[0] (g, 2t..), a[1] (g + 8, 2t..), a[2] (g, 2t + 8..), a[3] (g + 8, 2t + 8..)
//   B (16 x 8):  b0 (2t.., g), b1 (2t + 8.., g)
//   C (16 x 8):  c[0] (g, 2t), c[1] (g, 2t + 1), c[2] (g + 8, 2t), c[3] (g + 8, 2t + 1)
// so two neighbouring C tiles, rounded to bf16, are the A fragment of the next product.
#ifndef CUDA_MMA_CUH
#define CUDA_MMA_CUH

#include "cuda/common.cuh"

static __device__ __forceinline__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

// 16 (or 4) bytes from global to shared memory without passing registers; zeros where !valid.
static __device__ __forceinline__ void copy_async_16(uint32_t to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from),
                 "r"(valid ? 16 : 0));
}
static __device__ __forceinline__ void copy_async_4(uint32_t to, const void *from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(to), "l"(from),
                 "r"(valid ? 4 : 0));
}
static __device__ __forceinline__ void copy_async_wait_all() {
    asm volatile("cp.async.wait_all;\n" ::: "memory");
}

static __device__ __forceinline__ void load_matrix_x4(uint32_t r[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from));
}
static __device__ __forceinline__ void load_matrix_x4_transposed(uint32_t r[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from));
}

// c += a · b
static __device__ __forceinline__ void mma_bf16(float c[4], const uint32_t a[4], uint32_t b0,
                                                uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats as one register of bf16, `low` in the lower half.
static __device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&pair);
}

// Byte offset of chunk `chunk` (8 elements) of row `row` in a tile.
template <int D> static __device__ __forceinline__ uint32_t tile_offset(int row, int chunk) {
    return (uint32_t)((row * (D / 8) + (chunk ^ (row & 7))) * 16);
}

// Where the lane's row of 8 elements lies, for k = 0 or n = 0, in the four 8 x 8 matrices of an A
// fragment (also of a transposed B fragment), and of a B fragment. Further columns are an XOR away
// because tiles start on 1024 bytes.
template <int D> static __device__ __forceinline__ uint32_t fragment_lane_a() {
    int lane = threadIdx.x & 31;
    return tile_offset<D>(lane & 15, lane >> 4);
}
template <int D> static __device__ __forceinline__ uint32_t fragment_lane_b() {
    int lane = threadIdx.x & 31;
    return tile_offset<D>((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
}

// The A fragment of rows [row, row + 16), columns [16 k, 16 k + 16). row is a multiple of 16, here
// and below.
template <int D>
static __device__ __forceinline__ void fragment_a(uint32_t r[4], uint32_t tile, int row, int k) {
    load_matrix_x4(r, ((tile + row * D * 2 + fragment_lane_a<D>()) ^ (k * 32)));
}
// B fragments of a tile stored (n, k): n in [row, row + 8) in r[0], r[1] and [row + 8, row + 16)
// in r[2], r[3]; k in [16 k, 16 k + 16).
template <int D>
static __device__ __forceinline__ void fragment_b(uint32_t r[4], uint32_t tile, int row, int k) {
    load_matrix_x4(r, ((tile + fragment_lane_b<D>()) ^ (k * 32)) + row * D * 2);
}
// B fragments of a tile stored (k, n): k in [row, row + 16); n in [16 n, 16 n + 8) in r[0], r[1]
// and [16 n + 8, 16 n + 16) in r[2], r[3].
template <int D>
static __device__ __forceinline__ void fragment_b_transposed(uint32_t r[4], uint32_t tile, int row,
                                                             int n) {
    load_matrix_x4_transposed(r, ((tile + fragment_lane_a<D>()) ^ (n * 32)) + row * D * 2);
}

// Starts the copy of `rows` rows of `width` elements, `stride` apart, into a tile; the rest of the
// ROWS x D tile becomes zero. width is a multiple of 8, `from` 16-byte aligned.
template <int D, int ROWS, int THREADS>
static __device__ __forceinline__ void tile_load(uint32_t tile, const bf16 *from, int64_t stride,
                                                 int rows, int width) {
    constexpr int CHUNKS = D / 8;
    static_assert(ROWS * CHUNKS % THREADS == 0, "every thread copies the same number of chunks");
#pragma unroll
    for (int i = 0; i < ROWS * CHUNKS / THREADS; i++) {
        int at = i * THREADS + (int)threadIdx.x, row = at / CHUNKS, chunk = at % CHUNKS;
        bool valid = row < rows && chunk * 8 < width;
        copy_async_16(tile + tile_offset<D>(row, chunk),
                      valid ? from + row * stride + chunk * 8 : from, valid);
    }
}

#endif
