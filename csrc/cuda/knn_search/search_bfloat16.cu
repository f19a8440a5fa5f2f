#include "cuda/knn_search/search_launch.cuh"

namespace memtrans {

int launch_bfloat16(const KnnSearchShape& shape, const KnnSearchTensors& tensors, cudaStream_t stream) {
  return launch<__nv_bfloat16>(shape, tensors, stream);
}

}  // namespace memtrans
