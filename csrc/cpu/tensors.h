// What the CPU operators share: numbers out of index tensors, and the C++ types of tensor elements.
#pragma once

#include "memtrans.h"

#include <vector>

namespace memtrans {

// The elements of a one-dimensional int64 tensor.
inline std::vector<int64_t> numbers(const Tensor& tensor) {
  const int64_t* data = tensor.const_data_ptr<int64_t>();
  const int64_t stride = tensor.dim() ? tensor.stride(0) : 1;
  std::vector<int64_t> list(tensor.numel());
  for (size_t index = 0; index < list.size(); ++index) {
    list[index] = data[index * stride];
  }
  return list;
}

// Calls action(element) with a value of the C++ type that `type` names; check_floating has admitted only these four.
template <typename Action>
void with_element_type(ScalarType type, const Action& action) {
  switch (type) {
    case ScalarType::Half:
      return action(c10::Half{});
    case ScalarType::BFloat16:
      return action(c10::BFloat16{});
    case ScalarType::Double:
      return action(double{});
    default:
      return action(float{});
  }
}

}  // namespace memtrans
