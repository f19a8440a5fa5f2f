// Exact top-K for the queries that knn_scan put on its redo list: one block a query, one lane a key, fp32 products.
// Slow by design, rare by design: independent keys send one query in a million here, keys with thousands of ties more.
#pragma once

#include "knn_scan.cuh"

namespace memtrans {

constexpr int kRedoThreads = 1024;
constexpr int kRedoBufferBytes = kRedoThreads / 32 * WarpTopK::kCapacity * 8;

template <typename T, int dim>
__global__ void __launch_bounds__(kRedoThreads) knn_redo(const ScanArguments arguments, const T* queries) {
  constexpr int kWarps = kRedoThreads / 32;
  extern __shared__ uint64_t buffers[];  // WarpTopK::kCapacity of each warp
  __shared__ float query_values[dim];
  __shared__ int counts[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t total = *arguments.redo_count;
  for (uint32_t item = blockIdx.x; item < total; item += gridDim.x) {
    const int64_t query = arguments.redo[item] / arguments.parts;
    const int part = arguments.redo[item] % arguments.parts;
    const int64_t row = arguments.rows[query / arguments.queries_per_row];
    const Window window = visible_window(arguments.start, arguments.cursor, row, arguments.capacity, arguments.slot_count)
                              .piece(part, arguments.parts);
    const T* keys = static_cast<const T*>(arguments.keys) + row * arguments.slot_count * dim;
    for (int i = threadIdx.x; i < dim; i += kRedoThreads) query_values[i] = static_cast<float>(queries[query * dim + i]);
    __syncthreads();

    WarpTopK best(buffers + warp * WarpTopK::kCapacity, arguments.k);
    for (int base = warp * 32; base < window.length; base += kRedoThreads) {
      const int age = base + lane;
      const T* key = keys + static_cast<int64_t>(window.slot(min(age, window.length - 1))) * dim;
      float score = 0.0f;
#pragma unroll 8
      for (int i = 0; i < dim; i += 8) {
        const uint4 packed = *reinterpret_cast<const uint4*>(key + i);
        const T* values = reinterpret_cast<const T*>(&packed);
#pragma unroll
        for (int j = 0; j < 8; ++j) score = fmaf(query_values[i + j], static_cast<float>(values[j]), score);
      }
      bool offered = age < window.length && score > -INFINITY;
      if (offered && score == INFINITY) offered = key_is_finite(key, dim);
      best.push(offered, make_entry(score, age + window.offset));
    }
    best.prune();
    if (lane == 0) counts[warp] = best.count;
    __syncthreads();
    if (warp == 0) {
      for (int other = 1; other < kWarps; ++other)
        for (int i = lane; i < (counts[other] + 31) / 32 * 32; i += 32)
          best.push(i < counts[other], i < counts[other] ? buffers[other * WarpTopK::kCapacity + i] : 0);
      const ScanResult result{arguments, window, query, part};
      best.finish([&](int rank, uint64_t entry) { result.put(rank, entry); });
      result.pad(best.count);
    }
    __syncthreads();
  }
}

}  // namespace memtrans
