// Recorded sequences of ops: CUDA graphs.
//
// While a sequence is recorded its launches are not run, and waiting or asking the device anything
// is an error of CUDA's. The first run of any sequence is therefore an ordinary one, in which
// algorithms are chosen and plans built; gemm.cu looks at `capturing` where it would measure.
#include "cuda/cuda.h"

Status cuda_capture_begin(Backend *base) {
    CudaBackend *b = cuda_of(base);
    b->current_op = "recording of ops";
    CUDA_TRY(b, cudaStreamBeginCapture(b->stream, cudaStreamCaptureModeThreadLocal));
    b->capturing = true;
    return STATUS_OK;
}

Status cuda_capture_end(Backend *base, bool keep, void **out) {
    CudaBackend *b = cuda_of(base);
    cudaGraph_t graph = NULL;
    cudaGraphExec_t ready = NULL;
    *out = NULL;
    b->capturing = false;
    cudaError_t error = cudaStreamEndCapture(b->stream, &graph);
    if (!keep) { // something in between has failed and has said so
        cudaGetLastError();
        if (graph) cudaGraphDestroy(graph);
        return STATUS_OK;
    }
    CUDA_TRY(b, error);
    error = cudaGraphInstantiate(&ready, graph, 0);
    cudaGraphDestroy(graph);
    CUDA_TRY(b, error);
    *out = ready;
    return STATUS_OK;
}

Status cuda_graph_launch(Backend *base, void *graph) {
    CudaBackend *b = cuda_of(base);
    b->current_op = "recorded ops";
    CUDA_TRY(b, cudaGraphLaunch((cudaGraphExec_t)graph, b->stream));
    return STATUS_OK;
}

void cuda_graph_release(Backend *base, void *graph) {
    (void)base;
    if (graph) cudaGraphExecDestroy((cudaGraphExec_t)graph);
}
