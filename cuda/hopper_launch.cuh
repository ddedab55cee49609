// Host side of the kernels in hopper_*.cu: tensor maps, and the launch of a product.
#ifndef CUDA_HOPPER_LAUNCH_CUH
#define CUDA_HOPPER_LAUNCH_CUH

#include "cuda/hopper_product.cuh"

enum { TILES_SHARED = 8 }; // of a cluster, where SMs are shared with collectives

typedef CUresult (*EncodeTiled)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// A row-major (rows, columns) matrix in boxes of 64 columns by `box_rows` rows.
static Status make_map(CudaBackend *backend, const void *matrix, int64_t rows, int64_t columns,
                       int box_rows, CUtensorMap *out) {
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
    const cuuint64_t sizes[2] = {(cuuint64_t)columns, (cuuint64_t)rows};
    const cuuint64_t strides[1] = {(cuuint64_t)columns * sizeof(bf16)};
    const cuuint32_t box[2] = {TILE_K, (cuuint32_t)box_rows}, steps[2] = {1, 1};
    const CUresult error =
        encode(out, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void *)matrix, sizes, strides, box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS)
        FAIL(STATUS_INTERNAL, "tensor map of a (%lld, %lld) matrix: driver error %d",
             (long long)rows, (long long)columns, (int)error);
    return STATUS_OK;
}

// Prepares the kernel and asks how many of its clusters run at a time: multiprocessors come in
// groups whose size a cluster need not divide.
static Status count_clusters(CudaBackend *backend, const void *kernel, int *clusters) {
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = CLUSTER;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)(backend->num_sms / CLUSTER * CLUSTER));
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = SHARED_BYTES;
    config.attrs = &cluster;
    config.numAttrs = 1;
    CUDA_TRY(backend, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           SHARED_BYTES));
    CUDA_TRY(backend, cudaOccupancyMaxActiveClusters(clusters, kernel, &config));
    if (*clusters < 1) FAIL(STATUS_INTERNAL, "no cluster of %d blocks fits on the GPU", CLUSTER);
    return STATUS_OK;
}

template <class Product>
static Status launch_product(CudaBackend *backend, const Product &product) {
    auto kernel = product_kernel<Product>;
    static int clusters; // that fit on the device, the same on every one of a machine
    if (clusters == 0) TRY(count_clusters(backend, (const void *)kernel, &clusters));
    // Blocks that stay for their share of all tiles are late by a whole share where a collective
    // has taken their SMs. Shares of a few tiles then let the others take over.
    const int most = backend->shares_sms ? (int)div_up(product.tiles, TILES_SHARED) : clusters;
    const int used = product.tiles < most ? product.tiles : most;
    kernel<<<CLUSTER *(unsigned)used, THREADS, SHARED_BYTES, backend->stream>>>(product);
    LAUNCH_TRY(backend);
    return STATUS_OK;
}

#endif
