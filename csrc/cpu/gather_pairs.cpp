// gather_pairs on the CPU: keys and values of the entries that a search found, straight into the result.
//
// pairs[b, h, n, k, 0] = keys[row, slot] and pairs[b, h, n, k, 1] = values[row, slot], with slot = slots[b, h, n, k]
// and row = rows[b * G + h / (H / G)]; zeros where the slot is negative. Each number of the result is written once.
#include "cpu/parallel.h"
#include "cpu/tensors.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace memtrans {
namespace {

constexpr int64_t kBytesOfPart = 1 << 18;
constexpr int64_t kFresh = 1 << 25;    // bytes from which glibc gives each allocation pages of its own
constexpr int64_t kBytesAhead = 4096;  // asked for early, because entries are far apart
constexpr int64_t kCacheLine = 64;

using CopyNumbers = void (*)(const void* from, void* to, int64_t count);

template <typename Stored, typename Given>
void copy_numbers(const void* from, void* to, int64_t count) {
  if constexpr (std::is_same_v<Stored, Given>) {
    std::memcpy(to, from, count * sizeof(Given));
  } else {
    const Stored* source = static_cast<const Stored*>(from);
    Given* target = static_cast<Given*>(to);
    for (int64_t place = 0; place < count; ++place) {
      if constexpr (std::is_same_v<Given, double>) {
        target[place] = static_cast<double>(source[place]);
      } else {
        target[place] = static_cast<Given>(static_cast<float>(source[place]));
      }
    }
  }
}

// One of the two rings, as bytes.
struct Source {
  const char* first;
  int64_t row_bytes, slot_bytes;
  CopyNumbers copy;

  const char* at(int64_t row, int64_t slot) const { return first + row * row_bytes + slot * slot_bytes; }

  void prefetch(int64_t row, int64_t slot, int64_t bytes) const {
    for (int64_t byte = 0; byte < bytes; byte += kCacheLine) {
      __builtin_prefetch(at(row, slot) + byte);
    }
  }
};

// Lets the kernel lay out the pages of what is about to be written for the first time at once: by a fault for each of
// them they are most of what a fresh result costs. Where it cannot, they come by faults.
void lay_out_pages(char* first, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kPage = 4096;
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, of Linux 5.14; older headers have no name for it
  const int64_t before = (kPage - reinterpret_cast<uintptr_t>(first) % kPage) % kPage;
  if (bytes >= before + kPage) {
    madvise(first + before, (bytes - before) / kPage * kPage, kPopulateWrite);
  }
#endif
}

int64_t bytes_of(ScalarType type) {
  int64_t bytes = 0;
  with_element_type(type, [&](auto number) { bytes = sizeof(number); });
  return bytes;
}

Source source_of(const Tensor& ring, ScalarType given) {
  const int64_t bytes = bytes_of(ring.scalar_type());
  Source source{static_cast<const char*>(ring.data_ptr()), ring.stride(0) * bytes, ring.stride(1) * bytes, nullptr};
  with_element_type(ring.scalar_type(), [&](auto stored) {
    with_element_type(given, [&](auto number) { source.copy = copy_numbers<decltype(stored), decltype(number)>; });
  });
  return source;
}

void check_gather_pairs(
    const Tensor& keys, const Tensor& values, const Tensor& rows, const Tensor& slots, const Tensor& pairs) {
  check_dims(keys, "keys", 3, "(R, M + S, D)");
  check_dims(rows, "rows", 1, "(B * G,)");
  check_dims(slots, "slots", 4, "(B, H, N, K)");
  check_shape(values, "values", {keys.size(0), keys.size(1), keys.size(2)}, "(R, M + S, D)");
  check_shape(
      pairs, "pairs", {slots.size(0), slots.size(1), slots.size(2), slots.size(3), 2, keys.size(2)},
      "(B, H, N, K, 2, D)");
  const int64_t batch = slots.size(0), groups = batch ? rows.size(0) / batch : 0;
  MEMTRANS_CHECK(
      groups * batch == rows.size(0) && (groups ? slots.size(1) % groups == 0 : batch == 0),
      "rows must have B * G elements with B and H as in slots ", shape_of(slots), " and H a multiple of G, got ",
      rows.size(0));
  MEMTRANS_CHECK(slots.scalar_type() == ScalarType::Int, "slots must be int32");
  check_int64(rows, "rows");
  check_floating(keys, "keys");
  check_floating(values, "values");
  check_floating(pairs, "pairs");
  check_same_device(values, "values", keys, "keys");
  check_same_device(rows, "rows", keys, "keys");
  check_same_device(slots, "slots", keys, "keys");
  check_same_device(pairs, "pairs", keys, "keys");
  MEMTRANS_CHECK(pairs.is_contiguous(), "pairs must be contiguous");
}

void gather_pairs(Tensor keys, Tensor values, Tensor rows, Tensor slots, Tensor pairs) {
  check_gather_pairs(keys, values, rows, slots, pairs);
  const Tensor found = torch::stable::contiguous(slots);
  const Tensor dense_keys = keys.stride(2) == 1 ? keys : torch::stable::contiguous(keys);
  const Tensor dense_values = values.stride(2) == 1 ? values : torch::stable::contiguous(values);
  const int64_t neighbours = slots.size(3), width = keys.size(2), ring_slots = keys.size(1), ring_rows = keys.size(0);
  const std::vector<int64_t> row_list = numbers(rows);
  for (const int64_t row : row_list) {
    MEMTRANS_CHECK(row >= 0 && row < ring_rows, "rows must lie in 0..", ring_rows - 1, ", got ", row);
  }
  const int32_t* slot_list = found.const_data_ptr<int32_t>();
  for (int64_t place = 0; place < found.numel(); ++place) {
    MEMTRANS_CHECK(slot_list[place] < ring_slots, "slots must be below ", ring_slots, ", got ", slot_list[place]);
  }
  const int64_t queries = slots.size(0) * slots.size(1) * slots.size(2);
  const int64_t queries_of_row = row_list.empty() ? 0 : queries / static_cast<int64_t>(row_list.size());
  const Source key_source = source_of(dense_keys, pairs.scalar_type());
  const Source value_source = source_of(dense_values, pairs.scalar_type());
  const int64_t bytes = width * bytes_of(pairs.scalar_type());  // of a key or a value in the result
  const int64_t key_bytes = width * bytes_of(keys.scalar_type()), value_bytes = width * bytes_of(values.scalar_type());
  const int64_t ahead = std::max<int64_t>(1, kBytesAhead / std::max<int64_t>(1, key_bytes + value_bytes));
  char* target = static_cast<char*>(pairs.data_ptr());
  const int64_t grain = std::max<int64_t>(1, kBytesOfPart / std::max<int64_t>(1, 2 * bytes * neighbours));
  const auto gather = [&](int64_t query) {
    const int64_t row = row_list[query / queries_of_row];
    const int32_t* of_query = slot_list + query * neighbours;
    for (int64_t place = 0; place < neighbours; ++place) {
      if (place + ahead < neighbours && of_query[place + ahead] >= 0) {
        key_source.prefetch(row, of_query[place + ahead], key_bytes);
        value_source.prefetch(row, of_query[place + ahead], value_bytes);
      }
      char* to = target + (query * neighbours + place) * 2 * bytes;
      if (of_query[place] < 0) {
        std::memset(to, 0, 2 * bytes);
        continue;
      }
      key_source.copy(key_source.at(row, of_query[place]), to, width);
      value_source.copy(value_source.at(row, of_query[place]), to + bytes, width);
    }
  };
  const bool fresh = 2 * bytes * found.numel() >= kFresh;
  for_each_part((queries + grain - 1) / grain, [&](int64_t part) {
    const int64_t begin = part * grain, end = std::min(queries, begin + grain);
    if (fresh) {
      lay_out_pages(target + begin * neighbours * 2 * bytes, (end - begin) * neighbours * 2 * bytes);
    }
    for (int64_t query = begin; query < end; ++query) {
      gather(query);
    }
  });
}

}  // namespace
}  // namespace memtrans

STABLE_TORCH_LIBRARY_IMPL(memtrans, CPU, library) {
  library.impl("native_gather_pairs", TORCH_BOX(&memtrans::gather_pairs));
}
