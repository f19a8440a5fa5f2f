// What the backward pass of memory_attention on the CPU writes, and the sums over what heads or documents share.
//
// Parts are added up in the order of heads and documents, whoever computed them: the bits do not depend on threads.
#pragma once

#include "cpu/attention.h"

namespace memtrans {

// Where heads or documents share a gradient, the part of each.
struct Gradients {
  const Attention& attention;
  Tensor query;                       // (B, H, N, D)
  Tensor keys, values;                // (B, H, L, row_width or value_row_width), of one head
  std::vector<float> bias;            // (B, H, distances())
  std::optional<Tensor> dense;        // as it is given
  std::vector<double> scale, offset;  // (B, H)

  Gradients(const Attention& attention, const Tensor& like) : attention(attention) {
    const int64_t batch = attention.batch, heads = attention.heads;
    query = torch::stable::new_empty(like, {batch, heads, attention.length, attention.width}, ScalarType::Float);
    keys = torch::stable::new_zeros(like, {batch, heads, attention.local, attention.row_width}, ScalarType::Float);
    values =
        torch::stable::new_zeros(like, {batch, heads, attention.local, attention.value_row_width}, ScalarType::Float);
    bias.assign(batch * heads * attention.distances(), 0.0f);
    scale.assign(batch * heads, 0.0);
    offset.assign(batch * heads, 0.0);
    if (attention.dense) {
      dense = torch::stable::new_zeros(
          like, {attention.dense->size(0), heads, attention.length, attention.local}, ScalarType::Float);
    }
  }
};

// The sum over the heads that share keys, (B, G, L, width), each head's part multiplied by its factor.
inline Tensor sum_over_heads(
    const Attention& attention, const Tensor& parts, int64_t width, const std::vector<float>& factors) {
  const int64_t heads = attention.heads, shared = heads / attention.groups;
  const int64_t local = attention.local, row_width = parts.size(3);
  Tensor sum = torch::stable::new_zeros(parts, {attention.batch, attention.groups, local, width});
  const float* part = parts.const_data_ptr<float>();
  float* sums = sum.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, attention.batch * attention.groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * shared * local; row < end * shared * local; ++row) {
      const int64_t head = row / local, to = head / shared * local + row % local;
      for (int64_t column = 0; column < width; ++column) {
        sums[to * width + column] += factors[head % heads] * part[row * row_width + column];
      }
    }
  });
  return sum;
}

// Of the bias by distance, (H, distances) like the given one: distances beyond the table take its last column.
inline Tensor sum_over_documents(const Gradients& gradients, const Tensor& table) {
  const Attention& attention = gradients.attention;
  const int64_t columns = table.size(1);
  std::vector<double> sums(attention.heads * columns, 0.0);
  for (int64_t part = 0; part < attention.batch * attention.heads; ++part) {
    const float* of_part = &gradients.bias[part * attention.distances() + attention.ahead()];
    for (int64_t distance = attention.causal ? 0 : 1 - attention.local; distance < attention.local; ++distance) {
      sums[part % attention.heads * columns + std::min(std::abs(distance), columns - 1)] += of_part[distance];
    }
  }
  Tensor sum = torch::stable::new_empty(table, {attention.heads, columns}, ScalarType::Float);
  std::copy(sums.begin(), sums.end(), sum.mutable_data_ptr<float>());
  return torch::stable::to(sum, table.scalar_type());
}

// (B, H) to (H,) like the given one.
inline Tensor sum_over_documents(const std::vector<double>& parts, const Tensor& like) {
  const size_t heads = like.size(0);
  std::vector<double> sums(heads, 0.0);
  for (size_t part = 0; part < parts.size(); ++part) {
    sums[part % heads] += parts[part];
  }
  Tensor sum = torch::stable::new_empty(like, {like.size(0)}, ScalarType::Float);
  std::copy(sums.begin(), sums.end(), sum.mutable_data_ptr<float>());
  return torch::stable::to(sum, like.scalar_type());
}

}  // namespace memtrans
