// Faiss's brute-force search on the GPU over rings of keys, driven from C++ on PyTorch's current stream.
//
// Faiss has neither a batch dimension nor rings: each row's visible window is searched in one piece, or in two where it
// wraps round. Both pieces' neighbours are returned side by side, with positions that count from the piece's first key;
// memtrans_kernels/impl/faiss/gpu.py merges them. The row lengths have to be on the host, so none of this can be
// captured.
#include "memtrans.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <faiss/Index.h>
#include <faiss/gpu/GpuDistance.h>
#include <faiss/gpu/StandardGpuResources.h>
#include <faiss/utils/utils.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <map>
#include <tuple>

namespace memtrans {
namespace {

constexpr size_t kTemporaryBytes = size_t{512} << 20;  // Faiss's own default is three times that

// Faiss's resources are not safe to share between threads. They are never freed: when a thread or the process ends, the
// CUDA driver may be gone already.
faiss::gpu::StandardGpuResources& resources(int device, cudaStream_t stream) {
  thread_local std::map<int, faiss::gpu::StandardGpuResources*> of_device;
  auto& found = of_device[device];
  if (found == nullptr) {
    found = new faiss::gpu::StandardGpuResources();
    found->setTempMemory(kTemporaryBytes);
    found->setPinnedMemory(0);
  }
  found->setDefaultStream(device, stream);
  return *found;
}

faiss::gpu::DistanceDataType element_type(ScalarType type) {
  switch (type) {
    case ScalarType::Half:
      return faiss::gpu::DistanceDataType::F16;
    case ScalarType::BFloat16:
      return faiss::gpu::DistanceDataType::BF16;
    default:
      return faiss::gpu::DistanceDataType::F32;
  }
}

// Where the pieces of a row's visible window begin and how many keys they have; the second may be empty.
struct Pieces {
  std::array<int64_t, 2> slot;
  std::array<int64_t, 2> size;
};

Pieces visible_pieces(int64_t start, int64_t cursor, int64_t capacity, int64_t slots) {
  const int64_t end = std::max<int64_t>(0, cursor);  // no entry number overflows from here on
  const int64_t first = std::max({int64_t{0}, start, end - capacity});
  const int64_t visible = std::max<int64_t>(0, end - first), slot = first % slots;
  const int64_t before_end = std::min(visible, slots - slot);
  return {{slot, 0}, {before_end, visible - before_end}};
}

const char* element(const Tensor& tensor, int64_t index) {
  return static_cast<const char*>(tensor.const_data_ptr()) + index * tensor.element_size();
}

// What all pieces have in common.
faiss::gpu::GpuDistanceParams common_parameters(const Tensor& keys, int64_t queries, int64_t k) {
  faiss::gpu::GpuDistanceParams parameters;
  parameters.metric = faiss::METRIC_INNER_PRODUCT;
  parameters.k = static_cast<int>(k);
  parameters.dims = static_cast<int>(keys.size(2));
  parameters.vectorType = parameters.queryType = element_type(keys.scalar_type());
  parameters.numQueries = queries;
  parameters.outIndicesType = faiss::gpu::IndicesDataType::I32;
  parameters.device = keys.get_device_index();
  parameters.use_cuvs = false;
  return parameters;
}

void search_rows(
    const Tensor& query, const Tensor& keys, const Tensor& rows, const Tensor& start, const Tensor& cursor,
    int64_t capacity, int64_t k, Tensor& scores, Tensor& positions) {
  const int64_t count = rows.size(0), of_piece = query.size(0) * query.size(1) * query.size(2);
  const int64_t queries = of_piece / count;
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(keys.get_device_index(), &stream));
  auto& provider = resources(keys.get_device_index(), static_cast<cudaStream_t>(stream));
  faiss::gpu::GpuDistanceParams parameters = common_parameters(keys, queries, k);
  for (int64_t index = 0; index < count; ++index) {
    const int64_t row = rows.const_data_ptr<int64_t>()[index];
    const Pieces pieces = visible_pieces(
        start.const_data_ptr<int64_t>()[row], cursor.const_data_ptr<int64_t>()[row], capacity, keys.size(1));
    parameters.queries = element(query, index * queries * keys.size(2));
    for (int64_t piece = 0; piece < 2; ++piece) {
      if (pieces.size[piece] == 0) {
        continue;
      }
      const int64_t out = (piece * of_piece + index * queries) * k;
      parameters.vectors = element(keys, row * keys.stride(0) + pieces.slot[piece] * keys.size(2));
      parameters.numVectors = pieces.size[piece];
      parameters.outDistances = scores.mutable_data_ptr<float>() + out;
      parameters.outIndices = positions.mutable_data_ptr<int32_t>() + out;
      faiss::gpu::bfKnn(&provider, parameters);
    }
  }
}

void check_on_host(const Tensor& tensor, const char* name) {
  check_int64(tensor, name);
  MEMTRANS_CHECK(tensor.is_cpu() && tensor.is_contiguous(), name, " must be contiguous and on the host");
}

// rows, start and cursor are on the host. Returns scores and positions (2, B, H, N, K), -1 where there is no key.
std::tuple<Tensor, Tensor> faiss_search(
    Tensor query, Tensor keys, Tensor rows, Tensor start, Tensor cursor, int64_t capacity, int64_t k) {
  check_search_shapes(query, keys, rows, start, cursor, capacity, k);
  check_on_host(rows, "rows");
  check_on_host(start, "start");
  check_on_host(cursor, "cursor");
  for (int64_t index = 0; index < rows.size(0); ++index) {
    const int64_t row = rows.const_data_ptr<int64_t>()[index];
    MEMTRANS_CHECK(row >= 0 && row < keys.size(0), "rows must lie in 0..", keys.size(0) - 1, ", got ", row);
  }
  MEMTRANS_CHECK(query.is_cuda(), "query must be on a CUDA device");
  check_same_device(query, "query", keys, "keys");
  MEMTRANS_CHECK(query.scalar_type() == keys.scalar_type(), "query must be of the keys' dtype");
  MEMTRANS_CHECK(query.is_contiguous(), "query must be contiguous");
  MEMTRANS_CHECK(
      keys.stride(2) == 1 && keys.stride(1) == keys.size(2), "the slots of a row of keys must be contiguous");

  const torch::stable::accelerator::DeviceGuard guard(keys.get_device_index());
  const std::initializer_list<int64_t> shape{2, query.size(0), query.size(1), query.size(2), k};
  Tensor scores = torch::stable::new_empty(query, shape, ScalarType::Float);
  Tensor positions = torch::stable::new_empty(query, shape, ScalarType::Int);
  torch::stable::fill_(scores, -std::numeric_limits<float>::infinity());
  torch::stable::fill_(positions, -1);
  if (query.size(0) * query.size(1) * query.size(2) > 0) {
    search_rows(query, keys, rows, start, cursor, capacity, k, scores, positions);
  }
  return {scores, positions};
}

int64_t version_number(int64_t major, int64_t minor, int64_t patch) { return (major * 1000 + minor) * 1000 + patch; }

// Faiss's version as 1000000 · major + 1000 · minor + patch: of the headers of this build, and of the loaded library.
std::tuple<int64_t, int64_t> faiss_versions() {
  int major = 0, minor = 0, patch = 0;
  std::sscanf(faiss::get_version().c_str(), "%d.%d.%d", &major, &minor, &patch);
  return {
      version_number(FAISS_VERSION_MAJOR, FAISS_VERSION_MINOR, FAISS_VERSION_PATCH),
      version_number(major, minor, patch)};
}

}  // namespace
}  // namespace memtrans

STABLE_TORCH_LIBRARY_IMPL(memtrans, CUDA, library) {
  library.impl("native_faiss_search", TORCH_BOX(&memtrans::faiss_search));
}

STABLE_TORCH_LIBRARY_IMPL(memtrans, CompositeExplicitAutograd, library) {
  library.impl("native_faiss_interface", TORCH_BOX(&memtrans::interface_number));
  library.impl("native_faiss_versions", TORCH_BOX(&memtrans::faiss_versions));
}
