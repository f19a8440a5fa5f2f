// Faiss's brute-force search on the GPU, driven from C++ on PyTorch's current stream, one set of keys at a time.
//
// Faiss has neither a batch dimension nor rings: memtrans_kernels/impl/faiss/gpu.py makes of a memory sets of keys of
// one size, all of which may be found, so nothing has to be known on the host.
#include "memtrans.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <faiss/Index.h>
#include <faiss/gpu/GpuDistance.h>
#include <faiss/gpu/StandardGpuResources.h>
#include <faiss/utils/utils.h>

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

const char* element(const Tensor& tensor, int64_t index) {
  return static_cast<const char*>(tensor.const_data_ptr()) + index * tensor.element_size();
}

// What the searches of all sets have in common.
faiss::gpu::GpuDistanceParams common_parameters(const Tensor& query, const Tensor& keys, int64_t k) {
  faiss::gpu::GpuDistanceParams parameters;
  parameters.metric = faiss::METRIC_INNER_PRODUCT;
  parameters.k = static_cast<int>(k);
  parameters.dims = static_cast<int>(keys.size(2));
  parameters.vectorType = parameters.queryType = element_type(keys.scalar_type());
  parameters.numQueries = query.size(1);
  parameters.numVectors = keys.size(1);
  parameters.outIndicesType = faiss::gpu::IndicesDataType::I32;
  parameters.device = keys.get_device_index();
  parameters.use_cuvs = false;
  return parameters;
}

void search_sets(const Tensor& query, const Tensor& keys, int64_t k, Tensor& scores, Tensor& positions) {
  const int64_t queries = query.size(1), width = keys.size(2);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(keys.get_device_index(), &stream));
  auto& provider = resources(keys.get_device_index(), static_cast<cudaStream_t>(stream));
  faiss::gpu::GpuDistanceParams parameters = common_parameters(query, keys, k);
  for (int64_t set = 0; set < keys.size(0); ++set) {
    parameters.queries = element(query, set * queries * width);
    parameters.vectors = element(keys, set * keys.size(1) * width);
    parameters.outDistances = scores.mutable_data_ptr<float>() + set * queries * k;
    parameters.outIndices = positions.mutable_data_ptr<int32_t>() + set * queries * k;
    faiss::gpu::bfKnn(&provider, parameters);
  }
}

// query (sets, Q, D) and keys (sets, C, D). Returns scores and positions (sets, Q, K), best first, then -inf and -1.
std::tuple<Tensor, Tensor> faiss_search(Tensor query, Tensor keys, int64_t k) {
  check_dims(query, "query", 3, "(sets, Q, D)");
  check_shape(keys, "keys", {query.size(0), keys.dim() > 1 ? keys.size(1) : 0, query.size(2)}, "(sets, C, D)");
  MEMTRANS_CHECK(k >= 1, "k must be at least 1, got ", k);
  check_narrow(keys, "keys");
  MEMTRANS_CHECK(query.is_cuda(), "query must be on a CUDA device");
  check_same_device(query, "query", keys, "keys");
  MEMTRANS_CHECK(query.scalar_type() == keys.scalar_type(), "query must be of the keys' dtype");
  MEMTRANS_CHECK(query.is_contiguous() && keys.is_contiguous(), "query and keys must be contiguous");

  const torch::stable::accelerator::DeviceGuard guard(keys.get_device_index());
  const std::initializer_list<int64_t> shape{query.size(0), query.size(1), k};
  Tensor scores = torch::stable::new_empty(query, shape, ScalarType::Float);
  Tensor positions = torch::stable::new_empty(query, shape, ScalarType::Int);
  torch::stable::fill_(scores, -std::numeric_limits<float>::infinity());
  torch::stable::fill_(positions, -1);
  if (query.size(0) * query.size(1) > 0 && keys.size(1) > 0) {
    search_sets(query, keys, k, scores, positions);
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
