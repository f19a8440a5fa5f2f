// The CUDA implementation of native_knn_search: checks, outputs and workspace around the launchers of search.cu.
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstdint>

#include "memtrans.h"
#include "cuda/knn_search/search.h"

namespace memtrans {
namespace {

constexpr int64_t kMostQueries = int64_t{1} << 25;  // of one launch, which needs 4 bytes of workspace for each

// The stream that PyTorch would launch on now.
void* current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

void check_status(int status, int64_t width, int64_t k) {
  MEMTRANS_CHECK(status != -1, "D must be 32, 64, 96, 128 or 256 on CUDA, got ", width);
  MEMTRANS_CHECK(status != -2, "k must be from 1 to 128 on CUDA, got ", k);
  MEMTRANS_CHECK(status != -3, "the CUDA driver could not describe query and keys to the copy engine");
  MEMTRANS_CHECK(status == 0, "the search could not be launched: CUDA error ", status);
}

// The kernels take addresses; they load query and keys 16 bytes at a time.
void check_packed(const Tensor& tensor, const char* name, uintptr_t alignment = 1) {
  MEMTRANS_CHECK(
      tensor.is_contiguous() && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % alignment == 0, name,
      " must be contiguous on CUDA and begin at a multiple of ", alignment, " bytes");
}

// How the search reads queries of this dtype; throws for what it does not take.
QueryType query_type(const Tensor& query, ScalarType keys, int64_t per_row) {
  if (query.scalar_type() == keys) {
    return kSameAsKeys;
  }
  MEMTRANS_CHECK(
      per_row <= kFewQueries, "query must be of the keys' dtype where a row has more than ", kFewQueries,
      " queries on CUDA, got ", per_row);
  const bool narrow = query.scalar_type() == ScalarType::Half || query.scalar_type() == ScalarType::BFloat16;
  MEMTRANS_CHECK(
      narrow || query.scalar_type() == ScalarType::Float, "query must be float16, bfloat16 or float32 on CUDA");
  return narrow ? kOtherHalfPrecision : kFloat32;
}

std::tuple<Tensor, Tensor> knn_search(
    Tensor query, Tensor keys, Tensor rows, Tensor start, Tensor cursor, int64_t capacity, int64_t k) {
  check_knn_search(query, keys, rows, start, cursor, capacity, k);
  const bool bfloat16 = keys.scalar_type() == ScalarType::BFloat16;
  MEMTRANS_CHECK(bfloat16 || keys.scalar_type() == ScalarType::Half, "keys must be float16 or bfloat16 on CUDA");
  check_packed(query, "query", 16);
  check_packed(keys, "keys", 16);
  check_packed(rows, "rows");
  check_packed(start, "start");
  check_packed(cursor, "cursor");

  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const int64_t queries = query.size(0) * query.size(1) * query.size(2);
  const int64_t per_row = rows.size(0) ? queries / rows.size(0) : 0, width = keys.size(2);
  const QueryType type = query_type(query, keys.scalar_type(), per_row);
  Tensor scores = torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2), k}, ScalarType::Float);
  Tensor slots = torch::stable::new_empty(scores, {query.size(0), query.size(1), query.size(2), k}, ScalarType::Int);
  if (queries == 0) {
    return {scores, slots};
  }
  const int64_t most_rows = std::max<int64_t>(1, kMostQueries / per_row), most = std::min(per_row, kMostQueries);
  KnnSearchShape shape{
      std::min(rows.size(0), most_rows), most, keys.size(0), keys.size(1), capacity, width, k, bfloat16, type};
  Tensor workspace = torch::stable::new_empty(query, {memtrans_cuda_knn_search_workspace(&shape)}, ScalarType::Byte);
  for (int64_t row = 0; row < rows.size(0); row += most_rows) {
    for (int64_t of_row = 0; of_row < per_row; of_row += most) {
      shape.row_count = std::min(rows.size(0) - row, most_rows);
      shape.queries_per_row = std::min(per_row - of_row, most);
      const int64_t first = row * per_row + of_row;
      const KnnSearchTensors tensors{
          static_cast<const char*>(query.const_data_ptr()) + first * width * query.element_size(),
          keys.const_data_ptr(),
          rows.const_data_ptr<int64_t>() + row,
          start.const_data_ptr<int64_t>(),
          cursor.const_data_ptr<int64_t>(),
          scores.mutable_data_ptr<float>() + first * k,
          slots.mutable_data_ptr<int32_t>() + first * k,
          workspace.mutable_data_ptr()};
      check_status(memtrans_cuda_knn_search(&shape, &tensors, current_stream(query.get_device_index())), width, k);
    }
  }
  return {scores, slots};
}

}  // namespace
}  // namespace memtrans

STABLE_TORCH_LIBRARY_IMPL(memtrans, CUDA, library) {
  library.impl("native_knn_search", TORCH_BOX(&memtrans::knn_search));
}

STABLE_TORCH_LIBRARY_IMPL(memtrans, CompositeExplicitAutograd, library) {
  library.impl("native_cuda_interface", TORCH_BOX(&memtrans::interface_number));
}
