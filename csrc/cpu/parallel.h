// Work cut into numbered parts, which threads take one after another.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace memtrans {

// Calls action(part) for each part. They differ in length, so a thread takes the next one when it is done.
template <typename Action>
void for_each_part(int64_t parts, const Action& action) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), parts);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t part = next++; part < parts; part = next++) {
      action(part);
    }
  });
}

}  // namespace memtrans
