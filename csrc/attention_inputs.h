// What memory_attention and its gradients are given, and what every device checks of it.
#pragma once

#include "memtrans.h"

#include <utility>

namespace memtrans {

struct AttentionInputs {
  Tensor query, key, value, memory_keys, memory_values, rows, scores, slots, scale;
  std::optional<Tensor> bias_table, bias_dense, memory_offset, local_length;
  double dropout_p;
  std::optional<Tensor> seed;
  bool causal;
  std::optional<Tensor> key_mask, first;
  double soft_cap;  // 0 for none
  std::optional<Tensor> sink;
};

inline void check_attention_shapes(const AttentionInputs& inputs) {
  const Tensor &query = inputs.query, &key = inputs.key, &memory = inputs.memory_keys;
  check_dims(query, "query", 4, "(B, H, N, D)");
  check_dims(key, "key", 4, "(B, G, L, D)");
  check_dims(memory, "memory_keys", 3, "(R, M + S, D)");
  check_dims(inputs.slots, "slots", 4, "(B, H, N, K)");
  const int64_t batch = query.size(0), heads = query.size(1), length = query.size(2), width = query.size(3);
  const int64_t groups = key.size(1), local = key.size(2), neighbours = inputs.slots.size(3);
  MEMTRANS_CHECK(
      groups > 0 && heads % groups == 0, "key must have G heads of which H = ", heads, " is a multiple, got ",
      shape_of(key));
  MEMTRANS_CHECK(local == 0 || local >= length, "key must have L of 0 or at least N = ", length, ", got ", local);
  check_shape(key, "key", {batch, groups, local, width}, "(B, G, L, D)");
  check_dims(inputs.value, "value", 4, "(B, G, L, E)");
  const int64_t value_width = inputs.value.size(3);
  check_shape(inputs.value, "value", {batch, groups, local, value_width}, "(B, G, L, E)");
  check_shape(memory, "memory_keys", {memory.size(0), memory.size(1), width}, "(R, M + S, D)");
  check_shape(inputs.memory_values, "memory_values", {memory.size(0), memory.size(1), value_width}, "(R, M + S, E)");
  check_shape(inputs.rows, "rows", {batch * groups}, "(B * G,)");
  check_shape(inputs.scores, "scores", {batch, heads, length, neighbours}, "(B, H, N, K)");
  check_shape(inputs.slots, "slots", {batch, heads, length, neighbours}, "(B, H, N, K)");
  check_shape(inputs.scale, "scale", {heads}, "(H,)");
  if (const auto& table = inputs.bias_table) {
    check_dims(*table, "bias_table", 2, "(H, distances)");
    MEMTRANS_CHECK(
        table->size(0) == heads && table->size(1) > 0, "bias_table must have H = ", heads,
        " rows of at least one distance, got ", shape_of(*table));
  }
  if (const auto& dense = inputs.bias_dense) {
    check_dims(*dense, "bias_dense", 4, "(1 or B, H, N, L)");
    check_shape(*dense, "bias_dense", {dense->size(0) == 1 ? 1 : batch, heads, length, local}, "(1 or B, H, N, L)");
  }
  if (inputs.memory_offset) {
    check_shape(*inputs.memory_offset, "memory_offset", {heads}, "(H,)");
  }
  if (inputs.local_length) {
    check_shape(*inputs.local_length, "local_length", {batch}, "(B,)");
  }
  if (inputs.key_mask) {
    check_shape(*inputs.key_mask, "key_mask", {batch, local}, "(B, L)");
  }
  if (inputs.first) {
    check_shape(*inputs.first, "first", {batch, length}, "(B, N)");
  }
  if (inputs.sink) {
    check_shape(*inputs.sink, "sink", {heads}, "(H,)");
  }
  if (inputs.seed) {
    check_dims(*inputs.seed, "seed", 0, "()");
  }
}

inline void check_memory_attention(const AttentionInputs& inputs) {
  check_attention_shapes(inputs);
  MEMTRANS_CHECK(inputs.slots.scalar_type() == ScalarType::Int, "slots must be int32");
  MEMTRANS_CHECK(
      inputs.dropout_p >= 0.0 && inputs.dropout_p < 1.0, "dropout_p must lie in [0, 1), got ", inputs.dropout_p);
  MEMTRANS_CHECK(inputs.dropout_p == 0.0 || inputs.seed, "seed must be given when dropout_p > 0");
  MEMTRANS_CHECK(inputs.soft_cap >= 0.0, "soft_cap must be above 0, got ", inputs.soft_cap);
  const std::pair<const char*, std::optional<Tensor>> floating[] = {
      {"query", inputs.query},
      {"key", inputs.key},
      {"value", inputs.value},
      {"memory_keys", inputs.memory_keys},
      {"memory_values", inputs.memory_values},
      {"scores", inputs.scores},
      {"scale", inputs.scale},
      {"bias_table", inputs.bias_table},
      {"bias_dense", inputs.bias_dense},
      {"memory_offset", inputs.memory_offset},
      {"sink", inputs.sink}};
  for (const auto& [name, tensor] : floating) {
    if (tensor) {
      check_narrow(*tensor, name);
      check_same_device(*tensor, name, inputs.query, "query");
    }
  }
  const std::pair<const char*, std::optional<Tensor>> integers[] = {
      {"rows", inputs.rows}, {"local_length", inputs.local_length}, {"first", inputs.first}, {"seed", inputs.seed}};
  for (const auto& [name, tensor] : integers) {
    if (tensor) {
      check_int64(*tensor, name);
      check_same_device(*tensor, name, inputs.query, "query");
    }
  }
  check_same_device(inputs.slots, "slots", inputs.query, "query");
  if (inputs.key_mask) {
    MEMTRANS_CHECK(inputs.key_mask->scalar_type() == ScalarType::Bool, "key_mask must be bool");
    check_same_device(*inputs.key_mask, "key_mask", inputs.query, "query");
  }
}

}  // namespace memtrans
