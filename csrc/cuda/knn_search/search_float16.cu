#include "cuda/knn_search/search_launch.cuh"

namespace memtrans {

int launch_float16(const KnnSearchShape& shape, const KnnSearchTensors& tensors, cudaStream_t stream) {
  return launch<__half>(shape, tensors, stream);
}

}  // namespace memtrans
