// The CUDA implementation of native_knn_search: checks, outputs and workspace around the launchers of knn_search.cu.
#include <torch/csrc/stable/accelerator.h>

#include "../memtrans.h"
#include "knn_search.h"

namespace memtrans {
namespace {

// The stream that PyTorch would launch on now.
void* current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

std::tuple<Tensor, Tensor> knn_search(
    Tensor query, Tensor keys, Tensor rows, Tensor start, Tensor cursor, int64_t capacity, int64_t k) {
  check_knn_search(query, keys, rows, start, cursor, capacity, k);
  const bool bfloat16 = keys.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(bfloat16 || keys.scalar_type() == ScalarType::Half, "keys must be float16 or bfloat16 on CUDA");
  STD_TORCH_CHECK(query.scalar_type() == keys.scalar_type(), "query must be of the keys' dtype on CUDA");
  STD_TORCH_CHECK(query.is_contiguous() && keys.is_contiguous(), "query and keys must be contiguous on CUDA");

  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const int64_t queries = query.size(0) * query.size(1) * query.size(2);
  Tensor scores = torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2), k}, ScalarType::Float);
  Tensor slots = torch::stable::new_empty(scores, {query.size(0), query.size(1), query.size(2), k}, ScalarType::Int);
  if (queries == 0) {
    return {scores, slots};
  }
  const KnnSearchShape shape{
      rows.size(0), queries / rows.size(0), keys.size(0), keys.size(1), capacity, keys.size(2), k, bfloat16, 0.0};
  Tensor workspace =
      torch::stable::new_empty(query, {memtrans_cuda_knn_search_workspace(&shape)}, ScalarType::Byte);
  const KnnSearchTensors tensors{
      query.const_data_ptr(), keys.const_data_ptr(), rows.const_data_ptr<int64_t>(), start.const_data_ptr<int64_t>(),
      cursor.const_data_ptr<int64_t>(), scores.mutable_data_ptr<float>(), slots.mutable_data_ptr<int32_t>(),
      workspace.mutable_data_ptr()};
  const int status = memtrans_cuda_knn_search(&shape, &tensors, current_stream(query.get_device_index()));
  STD_TORCH_CHECK(status != -1, "D must be 32, 64, 96, 128 or 256 on CUDA, got ", shape.dim);
  STD_TORCH_CHECK(status != -2, "k must be from 1 to 128 on CUDA, got ", k);
  STD_TORCH_CHECK(status == 0, "the search could not be launched: CUDA error ", status);
  return {scores, slots};
}

}  // namespace
}  // namespace memtrans

STABLE_TORCH_LIBRARY_IMPL(memtrans, CUDA, library) {
  library.impl("native_knn_search", TORCH_BOX(&memtrans::knn_search));
}
