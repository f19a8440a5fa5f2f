// knn_add_ on the CPU: writes new (key, value) pairs into the rings of some memory rows and moves their cursors on.
//
// With base = at[row] (cursor[row] without `at`), entry base + j, which is new entry first + j < count, goes to slot
// (base + j) mod (M + S), unless it is stored already (base + j < cursor[row]) or newer entries of the same call would
// overwrite it. Then cursor[row] = max(cursor[row], base + count - first). Entries are cast to the ring's type; finite
// ones saturate instead of overflowing.
#include "cpu/tensors.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

namespace memtrans {
namespace {

// One row's share: entry base + j - skipped, taken from position j of the new entries, for first <= j < last.
struct RowWrite {
  int64_t row;
  int64_t base;
  int64_t skipped;
  int64_t first;
  int64_t last;
};

void check_entry(int64_t entry, const char* name) {
  MEMTRANS_CHECK(entry >= 0, name, " must not be negative, got ", entry);
  MEMTRANS_CHECK(entry <= kMostEntries, name, " must be at most 2^62, got ", entry);
}

std::vector<RowWrite> plan_writes(
    const Tensor& rows, const Tensor& cursor, const std::optional<Tensor>& count, const std::optional<Tensor>& at,
    const std::optional<Tensor>& first, int64_t tokens, int64_t slots) {
  const std::vector<int64_t> row_list = numbers(rows), cursors = numbers(cursor), bases = numbers(at.value_or(cursor));
  const std::vector<int64_t> counts = count ? numbers(*count) : std::vector<int64_t>(row_list.size(), tokens);
  const std::vector<int64_t> skips = first ? numbers(*first) : std::vector<int64_t>(row_list.size(), 0);
  const int64_t ring_rows = static_cast<int64_t>(cursors.size());
  std::vector<bool> seen(cursors.size(), false);
  std::vector<RowWrite> writes;
  writes.reserve(row_list.size());
  for (size_t index = 0; index < row_list.size(); ++index) {
    const int64_t row = row_list[index], skipped = skips[index], last = std::max(counts[index], skipped);
    MEMTRANS_CHECK(row >= 0 && row < ring_rows, "rows must lie in 0..", ring_rows - 1, ", got ", row);
    MEMTRANS_CHECK(!seen[row], "rows must be distinct, got ", row, " twice");
    MEMTRANS_CHECK(
        counts[index] >= 0 && counts[index] <= tokens, "count must lie in 0..", tokens, ", got ", counts[index]);
    MEMTRANS_CHECK(skipped >= 0 && skipped <= tokens, "first must lie in 0..", tokens, ", got ", skipped);
    check_entry(cursors[row], "cursor");
    check_entry(bases[row], "at");
    seen[row] = true;
    const int64_t stored = cursors[row] - bases[row];
    writes.push_back({row, bases[row], skipped, std::max({skipped, skipped + stored, last - slots}), last});
  }
  return writes;
}

template <typename Ring, typename New, bool kSaturateInfinity>
inline Ring saturating_cast(New entry) {
  constexpr bool kDouble = std::is_same_v<Ring, double> || std::is_same_v<New, double>;
  using Wide = std::conditional_t<kDouble, double, float>;
  const Wide wide = static_cast<Wide>(entry), largest = static_cast<Wide>(std::numeric_limits<Ring>::max());
  // A NaN fails every comparison and so stays one.
  Wide bounded = wide > largest ? largest : (wide < -largest ? -largest : wide);
  if constexpr (!kSaturateInfinity) {
    bounded = std::isinf(wide) ? wide : bounded;
  }
  if constexpr (std::is_same_v<Ring, double>) {
    return bounded;
  } else {
    return static_cast<Ring>(static_cast<float>(bounded));
  }
}

template <typename Ring, typename New, bool kSaturateInfinity>
void write_entries(const Tensor& ring, const Tensor& given, const std::vector<RowWrite>& writes) {
  const Tensor entries = given.stride(3) == 1 ? given : torch::stable::contiguous(given);
  const int64_t heads = entries.size(1), tokens = entries.size(2), width = entries.size(3), slots = ring.size(1);
  const int64_t document_stride = entries.stride(0), head_stride = entries.stride(1), token_stride = entries.stride(2);
  const int64_t row_stride = ring.stride(0), slot_stride = ring.stride(1);
  const New* source = entries.const_data_ptr<New>();
  Ring* target = ring.mutable_data_ptr<Ring>();
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width));
  torch::stable::parallel_for(0, static_cast<int64_t>(writes.size()) * tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t work = begin; work < end; ++work) {
      const int64_t index = work / tokens, token = work % tokens;
      const RowWrite& write = writes[index];
      if (token < write.first || token >= write.last) {
        continue;
      }
      const New* from = source + index / heads * document_stride + index % heads * head_stride + token * token_stride;
      Ring* to = target + write.row * row_stride + (write.base + token - write.skipped) % slots * slot_stride;
      for (int64_t column = 0; column < width; ++column) {
        to[column] = saturating_cast<Ring, New, kSaturateInfinity>(from[column]);
      }
    }
  });
}

template <bool kSaturateInfinity>
void write_ring(const Tensor& ring, const Tensor& entries, const std::vector<RowWrite>& writes) {
  with_element_type(ring.scalar_type(), [&](auto stored) {
    with_element_type(entries.scalar_type(), [&](auto given) {
      write_entries<decltype(stored), decltype(given), kSaturateInfinity>(ring, entries, writes);
    });
  });
}

void knn_add(
    Tensor keys, Tensor values, Tensor cursor, Tensor rows, Tensor new_keys, Tensor new_values,
    std::optional<Tensor> count, std::optional<Tensor> at, std::optional<Tensor> first) {
  check_knn_add(keys, values, cursor, rows, new_keys, new_values, count, at, first);
  MEMTRANS_CHECK(keys.size(2) < 2 || keys.stride(2) == 1, "keys must be contiguous in their last dimension");
  MEMTRANS_CHECK(values.size(2) < 2 || values.stride(2) == 1, "values must be contiguous in their last dimension");
  const std::vector<RowWrite> writes = plan_writes(rows, cursor, count, at, first, new_keys.size(2), keys.size(1));
  write_ring<false>(keys, new_keys, writes);  // a non-finite key stays one, so that no search ever retrieves it
  write_ring<true>(values, new_values, writes);
  int64_t* cursors = cursor.mutable_data_ptr<int64_t>();
  for (const RowWrite& write : writes) {
    int64_t& moved = cursors[write.row * cursor.stride(0)];
    moved = std::max(moved, write.base + write.last - write.skipped);
  }
}

}  // namespace
}  // namespace memtrans

STABLE_TORCH_LIBRARY_IMPL(memtrans, CPU, library) { library.impl("native_knn_add_", TORCH_BOX(&memtrans::knn_add)); }
