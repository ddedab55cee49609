// Host side of the kernels in hopper_*.cu: tensor maps, and the launch of a product.
#ifndef CUDA_HOPPER_LAUNCH_CUH
#define CUDA_HOPPER_LAUNCH_CUH

#include "cuda/hopper_product.cuh"

typedef CUresult (*EncodeTiled)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// A row-major (rows, columns) matrix and the boxes in which it is copied. A box is swizzled by the
// bytes of its rows in shared memory: 128 or 64.
typedef struct MapShape {
    const void *matrix;
    int64_t rows, columns;
    int box_rows, box_columns;
    DType dtype;
    int64_t stride; // elements from row to row; 0 = packed
} MapShape;

static Status make_map_of(CudaBackend *backend, const MapShape *s, CUtensorMap *out) {
    static EncodeTiled encode; // the same for every device
    if (!encode) {
        void *found = NULL;
        cudaDriverEntryPointQueryResult result;
        CUDA_TRY(backend, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                           cudaEnableDefault, &result));
        if (result != cudaDriverEntryPointSuccess)
            FAIL(STATUS_INTERNAL, "the driver has no cuTensorMapEncodeTiled; it must be newer");
        encode = (EncodeTiled)found;
    }
    const size_t element = dtype_bytes(s->dtype), box_bytes = (size_t)s->box_columns * element;
    const cuuint64_t sizes[2] = {(cuuint64_t)s->columns, (cuuint64_t)s->rows};
    const cuuint64_t strides[1] = {(cuuint64_t)(s->stride ? s->stride : s->columns) * element};
    const cuuint32_t box[2] = {(cuuint32_t)s->box_columns, (cuuint32_t)s->box_rows};
    const cuuint32_t steps[2] = {1, 1};
    INVARIANT(box_bytes == 128 || box_bytes == 64);
    const CUresult error = encode(
        out,
        s->dtype == DTYPE_F32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        2, (void *)s->matrix, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        box_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS)
        FAIL(STATUS_INTERNAL, "tensor map of a (%lld, %lld) matrix: driver error %d",
             (long long)s->rows, (long long)s->columns, (int)error);
    return STATUS_OK;
}

// An operand of a product: boxes of 64 columns by `box_rows` rows.
static Status make_map(CudaBackend *backend, const void *matrix, int64_t rows, int64_t columns,
                       int box_rows, CUtensorMap *out) {
    const MapShape shape = {matrix, rows, columns, box_rows, TILE_K, DTYPE_BF16};
    return make_map_of(backend, &shape, out);
}

enum { DEVICES_MAX = 64 }; // of a machine

// How many of the kernel's clusters run at a time: multiprocessors come in groups whose size a
// cluster need not divide. Prepares the kernel when a device sees it for the first time, when the
// device's element of `known` is 0.
static Status count_clusters(CudaBackend *backend, const void *kernel, int threads,
                             int shared_bytes, int *known, int *clusters) {
    INVARIANT(backend->device < DEVICES_MAX);
    *clusters = known[backend->device];
    if (*clusters > 0) return STATUS_OK;
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = CLUSTER;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)(backend->num_sms / CLUSTER * CLUSTER));
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = (size_t)shared_bytes;
    config.attrs = &cluster;
    config.numAttrs = 1;
    CUDA_TRY(backend, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           shared_bytes));
    CUDA_TRY(backend, cudaOccupancyMaxActiveClusters(clusters, kernel, &config));
    if (*clusters < 1) FAIL(STATUS_INTERNAL, "no cluster of %d blocks fits on the GPU", CLUSTER);
    known[backend->device] = *clusters;
    return STATUS_OK;
}

static unsigned blocks_for(int tiles, int clusters) {
    return CLUSTER * (unsigned)(tiles < clusters ? tiles : clusters);
}

template <class Product> static Status launch_product(CudaBackend *backend, Product *product) {
    auto kernel = product_kernel<Product>;
    static int known[DEVICES_MAX];
    int clusters;
    TRY(count_clusters(backend, (const void *)kernel, THREADS, SHARED_BYTES, known, &clusters));
    product->turns = backend->turns;
    kernel<<<blocks_for(product->tiles, clusters), THREADS, SHARED_BYTES, backend->stream>>>(
        *product);
    LAUNCH_TRY(backend);
    return STATUS_OK;
}

#endif
