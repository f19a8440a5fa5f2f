// Merges what knn_scan found in the parts of a row's window.
#pragma once

#include "cuda/knn_search/few_select.cuh"

namespace memtrans {

// A query a warp.
static __global__ void __launch_bounds__(128) few_merge(const FewArguments arguments, int64_t queries) {
  __shared__ uint64_t buffers[4][WarpTopK::kCapacity];
  const int64_t query = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  if (query >= queries)
    return;
  const int64_t row = arguments.rows[query / arguments.queries_per_row];
  const Window window =
      visible_window(arguments.start, arguments.cursor, row, arguments.capacity, arguments.slot_count);
  merge_parts(arguments, window, query, buffers[threadIdx.x / 32]);
}

}  // namespace memtrans
