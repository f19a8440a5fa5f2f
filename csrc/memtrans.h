// What all operators of the extension share: names, input checks and element types.
//
// Only LibTorch's stable ABI is used (torch/csrc/stable, torch/headeronly), so that one build works with every PyTorch
// from 2.10 on. Shape letters as everywhere: B documents, G key heads, N tokens, D head width, R memory rows, M visible
// and S spare slots of a row.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "check.h"

namespace memtrans {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raised by one whenever an operator's schema or meaning changes, together with INTERFACE in
// memtrans_kernels/native.py: a library left over from another version is then refused instead of misused.
constexpr int64_t kInterface = 11;

// Entries ever stored in a row: adding a segment to such a number does not overflow.
constexpr int64_t kMostEntries = int64_t{1} << 62;

// Each module registers it under a name of its own, because each may be left over.
inline int64_t interface_number() { return kInterface; }

inline std::string list_of(const int64_t* numbers, int64_t count) {
  std::string text = "(";
  for (int64_t place = 0; place < count; ++place) {
    text += (place ? ", " : "") + std::to_string(numbers[place]);
  }
  return text + ')';
}

inline std::string shape_of(const Tensor& tensor) { return list_of(tensor.sizes().data(), tensor.dim()); }

inline void check_shape(
    const Tensor& tensor, const char* name, std::initializer_list<int64_t> expected, const char* letters) {
  const auto sizes = tensor.sizes();
  MEMTRANS_CHECK(
      sizes.size() == expected.size() && std::equal(expected.begin(), expected.end(), sizes.begin()), name,
      " must have shape ", letters, " = ", list_of(expected.begin(), static_cast<int64_t>(expected.size())), ", got ",
      shape_of(tensor));
}

inline void check_dims(const Tensor& tensor, const char* name, int64_t dims, const char* letters) {
  MEMTRANS_CHECK(tensor.dim() == dims, name, " must have shape ", letters, ", got ", shape_of(tensor));
}

inline void check_same_device(const Tensor& tensor, const char* name, const Tensor& first, const char* first_name) {
  MEMTRANS_CHECK(
      tensor.is_cuda() == first.is_cuda() && tensor.is_cpu() == first.is_cpu() &&
          tensor.get_device_index() == first.get_device_index(),
      name, " must be on the device of ", first_name);
}

inline void check_int64(const Tensor& tensor, const char* name) {
  MEMTRANS_CHECK(tensor.scalar_type() == ScalarType::Long, name, " must be int64");
}

inline void check_floating(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  const bool supported = type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16 ||
                         type == ScalarType::Double;
  MEMTRANS_CHECK(supported, name, " must be float32, float16, bfloat16 or float64");
}

inline void check_narrow(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  MEMTRANS_CHECK(
      type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, name,
      " must be float32, float16 or bfloat16");
}

// Refuses what is written in place and has fewer places than numbers, as `expand` makes it.
inline void check_writable(const Tensor& tensor, const char* name) {
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    MEMTRANS_CHECK(
        tensor.size(axis) < 2 || tensor.stride(axis) != 0, name,
        " must have a place in memory for each of its numbers, got a stride of 0 for shape ", shape_of(tensor));
  }
}

// What every device checks of knn_add_'s inputs; the numbers in rows, count, first and at are each device's own affair.
inline void check_knn_add(
    const Tensor& keys, const Tensor& values, const Tensor& cursor, const Tensor& rows, const Tensor& new_keys,
    const Tensor& new_values, const std::optional<Tensor>& count, const std::optional<Tensor>& at,
    const std::optional<Tensor>& first) {
  check_dims(keys, "keys", 3, "(R, M + S, D)");
  check_dims(values, "values", 3, "(R, M + S, E)");
  check_dims(rows, "rows", 1, "(B * G,)");
  check_dims(new_keys, "new_keys", 4, "(B, G, N, D)");
  const int64_t ring_rows = keys.size(0), slots = keys.size(1), width = keys.size(2);
  MEMTRANS_CHECK(slots > 0, "keys must have at least one slot in a row, got shape ", shape_of(keys));
  check_shape(values, "values", {ring_rows, slots, values.size(2)}, "(R, M + S, E)");
  check_shape(cursor, "cursor", {ring_rows}, "(R,)");
  MEMTRANS_CHECK(
      rows.size(0) == new_keys.size(0) * new_keys.size(1) && new_keys.size(3) == width,
      "new_keys must have shape (B, G, N, D) with B * G = ", rows.size(0), " (the length of rows) and D = ", width,
      ", got ", shape_of(new_keys));
  check_shape(
      new_values, "new_values", {new_keys.size(0), new_keys.size(1), new_keys.size(2), values.size(2)}, "(B, G, N, E)");
  if (count) {
    check_shape(*count, "count", {rows.size(0)}, "(B * G,)");
    check_int64(*count, "count");
    check_same_device(*count, "count", keys, "keys");
  }
  if (first) {
    check_shape(*first, "first", {rows.size(0)}, "(B * G,)");
    check_int64(*first, "first");
    check_same_device(*first, "first", keys, "keys");
  }
  if (at) {
    check_shape(*at, "at", {ring_rows}, "(R,)");
    check_int64(*at, "at");
    check_same_device(*at, "at", keys, "keys");
  }
  check_int64(cursor, "cursor");
  check_int64(rows, "rows");
  check_floating(keys, "keys");
  check_floating(values, "values");
  check_floating(new_keys, "new_keys");
  check_floating(new_values, "new_values");
  check_same_device(values, "values", keys, "keys");
  check_same_device(cursor, "cursor", keys, "keys");
  check_same_device(rows, "rows", keys, "keys");
  check_same_device(new_keys, "new_keys", keys, "keys");
  check_same_device(new_values, "new_values", keys, "keys");
  check_writable(keys, "keys");
  check_writable(values, "values");
  check_writable(cursor, "cursor");
}

// What every search checks of its inputs, wherever they are.
inline void check_search_shapes(
    const Tensor& query, const Tensor& keys, const Tensor& rows, const Tensor& start, const Tensor& cursor,
    int64_t capacity, int64_t k) {
  check_dims(query, "query", 4, "(B, H, N, D)");
  check_dims(keys, "keys", 3, "(R, M + S, D)");
  check_dims(rows, "rows", 1, "(B * G,)");
  check_shape(start, "start", {keys.size(0)}, "(R,)");
  check_shape(cursor, "cursor", {keys.size(0)}, "(R,)");
  const int64_t batch = query.size(0), groups = batch ? rows.size(0) / batch : 0;
  MEMTRANS_CHECK(query.size(3) == keys.size(2), "query must have D = ", keys.size(2), ", got ", shape_of(query));
  MEMTRANS_CHECK(
      groups * batch == rows.size(0) && (groups ? query.size(1) % groups == 0 : query.size(0) == 0),
      "rows must have B * G elements with B and H as in query ", shape_of(query), " and H a multiple of G, got ",
      rows.size(0));
  MEMTRANS_CHECK(
      capacity >= 1 && capacity <= keys.size(1), "capacity must lie in 1..", keys.size(1), ", got ", capacity);
  MEMTRANS_CHECK(k >= 1, "k must be at least 1, got ", k);
  check_narrow(keys, "keys");
  check_floating(query, "query");
}

inline void check_knn_search(
    const Tensor& query, const Tensor& keys, const Tensor& rows, const Tensor& start, const Tensor& cursor,
    int64_t capacity, int64_t k) {
  check_search_shapes(query, keys, rows, start, cursor, capacity, k);
  check_int64(rows, "rows");
  check_int64(start, "start");
  check_int64(cursor, "cursor");
  check_same_device(query, "query", keys, "keys");
  check_same_device(rows, "rows", keys, "keys");
  check_same_device(start, "start", keys, "keys");
  check_same_device(cursor, "cursor", keys, "keys");
}

}  // namespace memtrans
