// Instructions of Hopper chips (sm_90a), one function each: barriers in shared memory, the bulk
// tensor copy engine, clusters of two blocks, and the warpgroup matrix product.
//
// Operands lie in shared memory as the copy engine's 128-byte swizzle leaves them: rows of 64 bf16
// on a multiple of 1024 bytes, the 16-byte chunk c of row r at place c ^ (r & 7). PTX ISA,
// "Strides" and "Matrix descriptor" of wgmma.
#ifndef CUDA_HOPPER_CUH
#define CUDA_HOPPER_CUH

#include <cuda.h>
#include "cuda/mma.cuh"

// --- Barriers ----------------------------------------------------------------------------------

static __device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals));
}
static __device__ __forceinline__ void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}
// Arrives, and lets the phase end only once `bytes` more have been copied in.
static __device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier),
                 "r"(bytes)
                 : "memory");
}
// Arrives at the barrier at the same place in block `block` of the cluster. Orders what this block
// sees, which is enough for a buffer that is read by matrix products and refilled by the copy
// engine; the cluster's scope would wait for all stores of the thread.
static __device__ __forceinline__ void barrier_arrive(uint32_t barrier, uint32_t block) {
    asm volatile("{\n"
                 ".reg .b32 remote;\n"
                 "mapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
                 "}\n" ::"r"(barrier),
                 "r"(block)
                 : "memory");
}
static __device__ __forceinline__ void barrier_arrive_here(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}
// Waits until the phase of this parity has ended.
static __device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}\n" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

// --- Clusters ------------------------------------------------------------------------------------

// A number into the shared memory of block `block` of the cluster; its 4 bytes count at `barrier`
// there. Both places are as in this block.
static __device__ __forceinline__ void send_number(uint32_t to, uint32_t barrier, int number,
                                                   uint32_t block) {
    asm volatile("{\n"
                 ".reg .b32 there, counts;\n"
                 "mapa.shared::cluster.u32 there, %0, %3;\n"
                 "mapa.shared::cluster.u32 counts, %1, %3;\n"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %2, "
                 "[counts];\n"
                 "}\n" ::"r"(to),
                 "r"(barrier), "r"(number), "r"(block)
                 : "memory");
}
static __device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
    return rank;
}
static __device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n"
                 "barrier.cluster.wait.acquire.aligned;\n" ::
                     : "memory");
}

// --- Bulk tensor copies ----------------------------------------------------------------------

// The box of the map at (column, row) into shared memory; its bytes count at `barrier`.
static __device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap *map, int column,
                                                int row, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];\n" ::"r"(to),
                 "l"(map), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}
// The same into every block of the cluster that `blocks` has a bit for, at the same place.
static __device__ __forceinline__ void copy_box_to_all(uint32_t to, const CUtensorMap *map,
                                                       int column, int row, uint32_t barrier,
                                                       uint16_t blocks) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;\n" ::"r"(to),
                 "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
                 : "memory");
}

// The same way back, as one of the thread's groups: the box at (column, row) from shared memory,
// written over what is there or, with `add`, added to it. Boxes are cut off at the map's sizes.
static __device__ __forceinline__ void store_box(uint32_t from, const CUtensorMap *map, int column,
                                                 int row, bool add) {
    if (add)
        asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group "
                     "[%0, {%1, %2}], [%3];\n" ::"l"(map),
                     "r"(column), "r"(row), "r"(from)
                     : "memory");
    else
        asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group "
                     "[%0, {%1, %2}], [%3];\n" ::"l"(map),
                     "r"(column), "r"(row), "r"(from)
                     : "memory");
}
static __device__ __forceinline__ void store_commit() {
    asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}
// Until at most PENDING of the thread's groups still read shared memory.
template <int PENDING> static __device__ __forceinline__ void store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(PENDING) : "memory");
}
static __device__ __forceinline__ void store_wait_all() {
    asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory");
}
// Makes what this thread has written to shared memory visible to bulk copies.
static __device__ __forceinline__ void store_fence() {
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// --- Registers -----------------------------------------------------------------------------------

template <int COUNT> static __device__ __forceinline__ void registers_take() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(COUNT));
}
template <int COUNT> static __device__ __forceinline__ void registers_give() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(COUNT));
}

// --- Warpgroup matrix product --------------------------------------------------------------------

// A swizzled tile at `address`. stride_bytes: from 8 rows to the next 8. block_bytes: from one
// block of 64 columns to the next, of an operand whose rows are the inner dimension of the product.
static __device__ __forceinline__ uint64_t tile_descriptor(uint32_t address, uint32_t stride_bytes,
                                                           uint32_t block_bytes) {
    return (uint64_t)(address >> 4 & 0x3fff) | (uint64_t)(block_bytes >> 4) << 16 |
           (uint64_t)(stride_bytes >> 4) << 32 | (uint64_t)1 << 62;
}

static __device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
static __device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
// Until at most PENDING committed groups are still running.
template <int PENDING> static __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(PENDING) : "memory");
}

#define HOPPER_F16(c, i)                                                                           \
    "+f"((c)[i]), "+f"((c)[(i) + 1]), "+f"((c)[(i) + 2]), "+f"((c)[(i) + 3]), "+f"((c)[(i) + 4]),  \
        "+f"((c)[(i) + 5]), "+f"((c)[(i) + 6]), "+f"((c)[(i) + 7]), "+f"((c)[(i) + 8]),            \
        "+f"((c)[(i) + 9]), "+f"((c)[(i) + 10]), "+f"((c)[(i) + 11]), "+f"((c)[(i) + 12]),         \
        "+f"((c)[(i) + 13]), "+f"((c)[(i) + 14]), "+f"((c)[(i) + 15])
#define HOPPER_F32(c, i) HOPPER_F16(c, i), HOPPER_F16(c, (i) + 16)

// c (64, N) of the warpgroup = a · b, or += where `add`. a is (64, 16), its inner dimension last in
// memory or, with A_ROWS, first; b is (16, N), its inner dimension last or, with B_ROWS, first. The
// fragment: c[4j], c[4j+1] are row 16·warp + lane/4, columns 8j + 2·(lane%4) and the next; c[4j+2],
// c[4j+3] are 8 rows below.
template <int N, bool A_ROWS, bool B_ROWS>
static __device__ __forceinline__ void wgmma(float *c, uint64_t a, uint64_t b, bool add) {
    static_assert(N == 128 || N == 192 || N == 224 || N == 256, "a width that a kernel uses");
    if constexpr (N == 128)
        asm volatile(
            "{\n"
            ".reg .pred add;\n"
            "setp.ne.b32 add, %66, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
            "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
            "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
            "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
            "%64, %65, add, 1, 1, %67, %68;\n"
            "}\n"
            : HOPPER_F32(c, 0), HOPPER_F32(c, 32)
            : "l"(a), "l"(b), "r"((int)add), "n"((int)A_ROWS), "n"((int)B_ROWS));
    else if constexpr (N == 192)
        asm volatile(
            "{\n"
            ".reg .pred add;\n"
            "setp.ne.b32 add, %98, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
            "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
            "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
            "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "
            "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, "
            "%87, %88, %89, %90, %91, %92, %93, %94, %95}, "
            "%96, %97, add, 1, 1, %99, %100;\n"
            "}\n"
            : HOPPER_F32(c, 0), HOPPER_F32(c, 32), HOPPER_F32(c, 64)
            : "l"(a), "l"(b), "r"((int)add), "n"((int)A_ROWS), "n"((int)B_ROWS));
    else if constexpr (N == 224)
        asm volatile(
            "{\n"
            ".reg .pred add;\n"
            "setp.ne.b32 add, %114, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n224k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
            "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
            "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
            "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "
            "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, "
            "%87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, "
            "%103, %104, %105, %106, %107, %108, %109, %110, %111}, "
            "%112, %113, add, 1, 1, %115, %116;\n"
            "}\n"
            : HOPPER_F32(c, 0), HOPPER_F32(c, 32), HOPPER_F32(c, 64), HOPPER_F16(c, 96)
            : "l"(a), "l"(b), "r"((int)add), "n"((int)A_ROWS), "n"((int)B_ROWS));
    else
        asm volatile(
            "{\n"
            ".reg .pred add;\n"
            "setp.ne.b32 add, %130, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
            "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
            "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
            "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "
            "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, "
            "%87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, "
            "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "
            "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
            "%128, %129, add, 1, 1, %131, %132;\n"
            "}\n"
            : HOPPER_F32(c, 0), HOPPER_F32(c, 32), HOPPER_F32(c, 64), HOPPER_F32(c, 96)
            : "l"(a), "l"(b), "r"((int)add), "n"((int)A_ROWS), "n"((int)B_ROWS));
}

#endif
