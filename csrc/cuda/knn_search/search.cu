// C entry points of the CUDA search; no torch headers, so that this file compiles in seconds.
//
//   memtrans_cuda_knn_search_workspace   bytes of scratch memory that a search of some queries needs: at most 512 MB
//                                        for rows of up to 2^28 slots
//   memtrans_cuda_knn_search             launches a search on a stream: no allocation, no host synchronisation;
//                                        negative where D is not 32, 64, 96, 128 or 256, or K not in 1..128
#include "cuda/knn_search/search_plan.cuh"

extern "C" int64_t memtrans_cuda_knn_search_workspace(const KnnSearchShape* shape) {
  return memtrans::takes_few_queries(*shape) ? memtrans::few_workspace(*shape) : memtrans::ScanWorkspace(*shape).bytes;
}

extern "C" int memtrans_cuda_knn_search(const KnnSearchShape* shape, const KnnSearchTensors* tensors, void* stream) {
  if (shape->k < 1 || shape->k > 128)
    return -2;
  if (shape->row_count == 0 || shape->queries_per_row == 0)
    return 0;
  const auto launch = shape->bfloat16 ? memtrans::launch_bfloat16 : memtrans::launch_float16;
  return launch(*shape, *tensors, static_cast<cudaStream_t>(stream));
}
