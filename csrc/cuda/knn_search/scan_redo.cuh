// Exact top-K for the queries that knn_scan put on its redo list: one lane a key, fp32 products.
// Rare by design: independent keys send one query in a million here, keys that cluster in time or tie by the thousand more.
// A few queries are spread over kRedoParts blocks each, the last of which merges; many take a block each.
#pragma once

#include "cuda/knn_search/scan.cuh"

namespace memtrans {

constexpr int kRedoThreads = 256;
constexpr int kRedoWarps = kRedoThreads / 32;
constexpr int kRedoParts = 64;
constexpr int kSpreadQueries = 64;  // up to so many are spread

// Leaves the k best keys of a window in the first warp's selection.
template <typename T, int dim>
__device__ void redo_window(WarpTopK& best, uint64_t* buffers, int* counts, const float* query, const T* keys, const Window& window) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int base = warp * 32; base < window.length; base += kRedoThreads) {
    const int age = base + lane;
    const T* key = keys + static_cast<int64_t>(window.slot(min(age, window.length - 1))) * dim;
    float score = 0.0f;
#pragma unroll 8
    for (int i = 0; i < dim; i += 8) {
      const uint4 packed = *reinterpret_cast<const uint4*>(key + i);
      const T* values = reinterpret_cast<const T*>(&packed);
#pragma unroll
      for (int j = 0; j < 8; ++j) score = fmaf(query[i + j], static_cast<float>(values[j]), score);
    }
    bool offered = age < window.length && score > -INFINITY;
    if (offered && score == INFINITY) offered = key_is_finite(key, dim);
    best.push(offered, make_entry(score, age + window.offset));
  }
  best.prune();
  if (lane == 0) counts[warp] = best.count;
  __syncthreads();
  if (warp > 0) return;
  for (int other = 1; other < kRedoWarps; ++other) {
    for (int i = lane; i < (counts[other] + 31) / 32 * 32; i += 32)
      best.push(i < counts[other], i < counts[other] ? buffers[other * WarpTopK::kCapacity + i] : 0);
  }
  best.prune();
}

// The first warp of a block stores its part's entries; true in the block that is the last of the query.
__device__ inline bool store_part(const ScanArguments& arguments, const WarpTopK& best, uint32_t item, int part, int parts) {
  const int lane = threadIdx.x % 32;
  uint64_t* const entries = arguments.redo_entries + (static_cast<int64_t>(item) * kRedoParts + part) * arguments.k;
  for (int i = lane; i < arguments.k; i += 32) entries[i] = i < best.count ? best.buffer[i] : 0;
  __threadfence();
  __syncwarp();
  uint32_t done = 0;
  if (lane == 0) done = atomicAdd(arguments.redo_done + item, 1);
  const bool last = __shfl_sync(kAllLanes, done, 0) == static_cast<uint32_t>(parts - 1);
  __threadfence();
  return last;
}

template <typename T, int dim>
__global__ void __launch_bounds__(kRedoThreads) knn_redo(const ScanArguments arguments, const T* queries) {
  __shared__ uint64_t buffers[kRedoWarps * WarpTopK::kCapacity];
  __shared__ float query_values[dim];
  __shared__ int counts[kRedoWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t total = *arguments.redo_count;
  const int spread = arguments.k > 32 ? kRedoParts / 4 : kRedoParts;  // merging costs parts * K
  const int parts = total <= kSpreadQueries ? spread : 1;
  for (uint32_t work = blockIdx.x; work < total * parts; work += gridDim.x) {
    const uint32_t item = work / parts;
    const int64_t query = arguments.redo[item];
    const int64_t row = arguments.rows[query / arguments.queries_per_row];
    const Window window = visible_window(arguments.start, arguments.cursor, row, arguments.capacity, arguments.slot_count);
    const T* keys = static_cast<const T*>(arguments.keys) + row * arguments.slot_count * dim;
    __syncthreads();
    for (int i = threadIdx.x; i < dim; i += kRedoThreads) query_values[i] = static_cast<float>(queries[query * dim + i]);
    __syncthreads();

    WarpTopK best(buffers + warp * WarpTopK::kCapacity, arguments.k);
    redo_window<T, dim>(best, buffers, counts, query_values, keys, window.piece(work % parts, parts));
    if (warp > 0) continue;
    if (parts > 1) {
      if (!store_part(arguments, best, item, work % parts, parts)) continue;
      best = WarpTopK(buffers, arguments.k);
      const uint64_t* entries = arguments.redo_entries + static_cast<int64_t>(item) * kRedoParts * arguments.k;
      const int count = parts * arguments.k;
      for (int i = lane; i < (count + 31) / 32 * 32; i += 32) {
        const uint64_t entry = i < count ? __ldcg(entries + i) : 0;
        best.push(entry != 0, entry);
      }
    }
    const ScanResult result{arguments, window, query, 0};
    best.finish([&](int rank, uint64_t entry) { result.put(rank, entry); });
    result.pad(best.count);
    for (int other = 1; other < arguments.parts; ++other) ScanResult{arguments, window, query, other}.pad(0);
  }
}

}  // namespace memtrans
