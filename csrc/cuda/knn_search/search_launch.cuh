// Launches the kernels of a search. Each type of keys is a file that includes this one, so that they compile side by
// side.
#pragma once

#include "cuda/knn_search/few_merge.cuh"
#include "cuda/knn_search/few_select.cuh"
#include "cuda/knn_search/scan.cuh"
#include "cuda/knn_search/scan_redo.cuh"
#include "cuda/knn_search/search_plan.cuh"

namespace memtrans {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<EncodeTiled>(found == cudaDriverEntryPointSuccess ? pointer : nullptr);
  }();
  return function;
}

template <typename T, int rank>
bool make_map(
    CUtensorMap& map, const void* data, const cuuint64_t (&sizes)[rank], const cuuint64_t (&strides)[rank - 1],
    const cuuint32_t (&box)[rank]) {
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  return encode_tiled() &&
         encode_tiled()(
             &map, std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank,
             const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <typename T, int dim>
int launch_scan(const KnnSearchShape& shape, const KnnSearchTensors& tensors, cudaStream_t stream) {
  using Shape = ScanShape<dim>;
  const cuuint64_t slots = shape.slots, width = dim * 2, columns = Shape::kColumns;
  const cuuint64_t blocks = slots >= 8 ? slots / 8 : 1, phases = slots >= 8 ? 8 : slots;
  CUtensorMap query_map, key_map, sample_map;
  const bool mapped =
      make_map<T, 2>(
          query_map, tensors.query, {dim, static_cast<cuuint64_t>(shape.row_count * shape.queries_per_row)}, {width},
          {static_cast<cuuint32_t>(columns), 64}) &&
      make_map<T, 3>(
          key_map, tensors.keys, {dim, slots, static_cast<cuuint64_t>(shape.memory_rows)}, {width, slots * width},
          {static_cast<cuuint32_t>(columns), kScanTile, 1}) &&
      make_map<T, 4>(
          sample_map, tensors.keys, {dim, phases, blocks, static_cast<cuuint64_t>(shape.memory_rows)},
          {width, 8 * width, slots * width}, {static_cast<cuuint32_t>(columns), 1, kSampleBox, 1});
  if (!mapped)
    return -3;

  const ScanWorkspace places(shape);
  char* const workspace =
      reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(tensors.workspace), kListAlignment));
  const int parts = static_cast<int>(scan_parts(shape));
  const auto at = [&](int64_t place) { return reinterpret_cast<uint32_t*>(workspace + place); };
  uint64_t* const entries = reinterpret_cast<uint64_t*>(workspace + places.entries);
  const ScanArguments arguments{
      tensors.rows,
      tensors.start,
      tensors.cursor,
      tensors.keys,
      tensors.scores,
      tensors.slots,
      entries,
      workspace + places.lists,
      at(0),
      reinterpret_cast<uint2*>(workspace + places.tile),
      at(places.count),
      at(places.redo),
      at(places.done),
      reinterpret_cast<uint64_t*>(workspace + places.slices),
      shape.row_count,
      static_cast<int>(shape.queries_per_row),
      parts,
      static_cast<int>(shape.slots),
      static_cast<int>(shape.capacity),
      static_cast<int>(shape.k),
      Shape::kQueries};
  const int64_t queries = shape.row_count * shape.queries_per_row;
  const int64_t jobs = shape.row_count * parts * ((shape.queries_per_row + Shape::kQueries - 1) / Shape::kQueries);
  const unsigned blocks_in_grid = static_cast<unsigned>(jobs < multiprocessors() ? jobs : multiprocessors());
  cudaMemsetAsync(workspace, 0, places.counter_bytes, stream);
  cudaFuncSetAttribute(knn_scan<T, dim>, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
  knn_scan<T, dim>
      <<<blocks_in_grid, Shape::kThreads, Shape::kSharedBytes, stream>>>(query_map, key_map, sample_map, arguments);
  cudaFuncSetAttribute(knn_redo<T, dim>, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
  knn_redo<T, dim><<<multiprocessors(), Shape::kThreads, Shape::kSharedBytes, stream>>>(
      key_map, arguments, static_cast<const T*>(tensors.query));
  if (parts > 1) {
    const FewArguments merge{
        tensors.rows,
        tensors.start,
        tensors.cursor,
        nullptr,
        kSameAsKeys,
        nullptr,
        nullptr,
        entries,
        nullptr,
        tensors.scores,
        tensors.slots,
        static_cast<int>(shape.queries_per_row),
        static_cast<int>(shape.slots),
        0,
        parts,
        0,
        static_cast<int>(shape.capacity),
        static_cast<int>(shape.k)};
    few_merge<<<static_cast<unsigned>((queries + 3) / 4), 128, 0, stream>>>(merge, queries);
  }
  return static_cast<int>(cudaGetLastError());
}

template <typename T, int dim>
int launch_few(const KnnSearchShape& shape, const KnnSearchTensors& tensors, cudaStream_t stream) {
  const int64_t rows = few_rows(shape), per_row = shape.queries_per_row, groups = few_groups(shape);
  const int64_t parts = few_parts(shape), tiles = (shape.slots + kFewTile - 1) / kFewTile;
  uint64_t* const entries = reinterpret_cast<uint64_t*>(round_up(reinterpret_cast<int64_t>(tensors.workspace), 256));
  float* const maxima = reinterpret_cast<float*>(entries + (parts > 1 ? rows * per_row * parts * shape.k : 0));
  const int64_t query_bytes = shape.query_type == kFloat32 ? 4 : 2;
  for (int64_t first = 0; first < shape.row_count; first += rows) {
    const int64_t count = shape.row_count - first < rows ? shape.row_count - first : rows, query = first * per_row;
    const FewArguments arguments{
        tensors.rows + first,
        tensors.start,
        tensors.cursor,
        static_cast<const char*>(tensors.query) + query * dim * query_bytes,
        shape.query_type,
        tensors.keys,
        maxima,
        entries,
        reinterpret_cast<uint32_t*>(maxima + rows * per_row * groups),
        tensors.scores + query * shape.k,
        tensors.slots + query * shape.k,
        static_cast<int>(per_row),
        static_cast<int>(shape.slots),
        static_cast<int>(groups),
        static_cast<int>(parts),
        static_cast<int>((groups + parts - 1) / parts),
        static_cast<int>(shape.capacity),
        static_cast<int>(shape.k)};
    const int64_t wanted = (dim > 128 ? 1 : kFewBlocks) * multiprocessors() / count;
    const dim3 grid(
        static_cast<unsigned>(
            wanted < 1       ? 1
            : tiles < wanted ? tiles
                             : wanted),
        static_cast<unsigned>(count), static_cast<unsigned>((per_row + 7) / 8));
    few_maxima<T, dim><<<grid, kFewThreads, 0, stream>>>(arguments);
    few_select<T, dim>
        <<<dim3(static_cast<unsigned>(parts), static_cast<unsigned>(count * per_row)), kSelectThreads, 0, stream>>>(
            arguments);
  }
  return static_cast<int>(cudaGetLastError());
}

template <typename T>
int launch(const KnnSearchShape& shape, const KnnSearchTensors& tensors, cudaStream_t stream) {
  const auto with = [&](auto dim) {
    return takes_few_queries(shape) ? launch_few<T, dim.value>(shape, tensors, stream)
                                    : launch_scan<T, dim.value>(shape, tensors, stream);
  };
  switch (shape.dim) {
    case 32:
      return with(std::integral_constant<int, 32>{});
    case 64:
      return with(std::integral_constant<int, 64>{});
    case 96:
      return with(std::integral_constant<int, 96>{});
    case 128:
      return with(std::integral_constant<int, 128>{});
    case 256:
      return with(std::integral_constant<int, 256>{});
    default:
      return -1;
  }
}

}  // namespace memtrans
