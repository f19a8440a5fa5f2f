// What both passes of memory_attention on the CPU work on: its inputs in float32, cut into blocks.
//
// A block is up to kQueries consecutive queries of one head. It looks at the keys it sees tile by tile, kKeys at a
// time, uses what it computed of a tile and forgets it: no (N, L) numbers are ever held.
#pragma once

#include "attention_inputs.h"
#include "cpu/tensors.h"

#include <algorithm>
#include <cstdlib>
#include <limits>

namespace memtrans {

constexpr int64_t kQueries = 32;    // of a block
constexpr int64_t kKeys = 64;       // of a tile
constexpr int64_t kMostLanes = 16;  // of a vector of any instruction set
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A number of floats, filled up to whole vectors.
inline int64_t padded(int64_t size) { return (size + kMostLanes - 1) / kMostLanes * kMostLanes; }

// Weights are dropped where Philox gives less than `threshold`; the others are multiplied by `kept`.
struct Dropout {
  bool any = false;
  uint64_t seed = 0;
  uint32_t threshold = 0;
  float kept = 1.0f;
};

// Consecutive queries of one head of one document.
struct Block {
  int64_t document, head, pair;  // pair: document · G + the head's group
  int64_t query, queries;        // the first one in its segment, and how many there are
  int64_t lanes;                 // that number, filled up to whole vectors; up to kQueries
  int64_t first;                 // the first one among all B · H · N
  int64_t position;              // of the first one among the local keys
  int64_t begin, end;            // the local keys that any of them may see
};

struct Attention {
  int64_t batch, heads, groups, length, local, width, value_width, neighbours;
  int64_t row_width, value_row_width;  // D and E, filled up with zeros
  Tensor query, key, value;            // (B, H or G, N or L, row_width or value_row_width) float32
  Tensor scores, slots;                // (B, H, N, K) float32, int32
  std::vector<float> scale, offset;    // (H,)
  std::vector<float> bias;             // (H, distances()): of distance d at ahead() + d, -inf for a future unseen
  std::optional<Tensor> dense;         // (1 or B, H, N, L) float32
  std::vector<int64_t> rows, local_length;
  Dropout dropout;
  bool causal;
  std::optional<Tensor> key_mask;  // (B, L) bool
  std::vector<int64_t> oldest;     // (B, N), the oldest key that a query sees; empty where all begin alike
  float soft_cap;                  // 0 for none
  std::vector<float> sink;         // (H,); empty without

  // Distances into the future that have a bias; queries of a block that do not exist may look a block further.
  int64_t ahead() const { return (causal ? 0 : local) + kQueries; }

  int64_t distances() const { return ahead() + local + kQueries; }

  // Whether a tile has logits with something of their own: a dense bias, or keys that only some queries see.
  bool has_extra() const { return dense || key_mask || !oldest.empty(); }

  int64_t blocks_of_head() const { return (length + kQueries - 1) / kQueries; }

  const float* bias_of(int64_t head) const { return &bias[head * distances() + ahead()]; }

  // Of the first query of a block and a local key: (N, L) numbers with L of them from query to query.
  int64_t dense_place(const Block& block, int64_t key) const {
    const int64_t document = dense->size(0) == 1 ? 0 : block.document;
    return ((document * heads + block.head) * length + block.query) * local + key;
  }

  Block block(int64_t document, int64_t head, int64_t number) const {
    Block block;
    block.document = document;
    block.head = head;
    block.pair = document * groups + head * groups / heads;
    block.query = number * kQueries;
    block.queries = std::min(kQueries, length - block.query);
    block.lanes = padded(block.queries);
    block.first = (document * heads + head) * length + block.query;
    block.position = local - length + block.query;
    block.begin = local - local_length[document];
    block.end = causal ? std::min(local, block.position + block.queries) : local;
    if (!oldest.empty()) {
      const auto first = oldest.begin() + document * length + block.query;
      block.begin = std::max(block.begin, *std::min_element(first, first + block.queries));
    }
    return block;
  }
};

inline Tensor in_float32(const Tensor& tensor) {
  return torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Float));
}

inline Tensor padded_rows(const Tensor& tensor) {
  const int64_t missing = padded(tensor.size(3)) - tensor.size(3);
  return missing ? torch::stable::pad(in_float32(tensor), {0, missing}) : in_float32(tensor);
}

inline std::vector<float> floats(const Tensor& tensor) {
  const Tensor wide = in_float32(tensor);
  const float* first = wide.const_data_ptr<float>();
  return {first, first + wide.numel()};
}

// The bias by distance of every head, spread out so that consecutive queries read consecutive numbers.
inline std::vector<float> spread_bias(const Attention& attention, const std::optional<Tensor>& table) {
  const int64_t heads = attention.heads, distances = attention.distances(), ahead = attention.ahead();
  std::vector<float> spread(heads * distances, -kInfinity);
  const std::vector<float> given = table ? floats(*table) : std::vector<float>(heads, 0.0f);
  const int64_t columns = table ? table->size(1) : 1;
  for (int64_t head = 0; head < heads; ++head) {
    float* of_head = &spread[head * distances];
    for (int64_t place = attention.causal ? ahead : 0; place < distances; ++place) {
      of_head[place] = given[head * columns + std::min(std::abs(place - ahead), columns - 1)];
    }
  }
  return spread;
}

inline Dropout make_dropout(double probability, const std::optional<Tensor>& seed) {
  if (probability <= 0.0) {
    return {};
  }
  const uint64_t number = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
  return {
      true, number, static_cast<uint32_t>(probability * 4294967296.0), static_cast<float>(1.0 / (1.0 - probability))};
}

// Every index that is about to be read through.
inline void check_indices(const Attention& attention, const Tensor& memory) {
  const int64_t ring_rows = memory.size(0), ring_slots = memory.size(1);
  for (const int64_t row : attention.rows) {
    MEMTRANS_CHECK(row >= 0 && row < ring_rows, "rows must lie in 0..", ring_rows - 1, ", got ", row);
  }
  for (const int64_t length : attention.local_length) {
    MEMTRANS_CHECK(
        length >= 0 && length <= attention.local, "local_length must lie in 0..", attention.local, ", got ", length);
  }
  for (const int64_t oldest : attention.oldest) {
    MEMTRANS_CHECK(
        oldest >= 0 && oldest <= attention.local, "first must lie in 0..", attention.local, ", got ", oldest);
  }
  const int32_t* slots = attention.slots.const_data_ptr<int32_t>();
  const auto [least, most] = std::minmax_element(slots, slots + attention.slots.numel());
  MEMTRANS_CHECK(
      attention.slots.numel() == 0 || (*least >= -1 && *most < ring_slots), "slots must lie in -1..", ring_slots - 1,
      ", got ", *least, "..", *most);
}

inline Attention prepare(const AttentionInputs& inputs) {
  check_memory_attention(inputs);
  Attention attention;
  attention.batch = inputs.query.size(0), attention.heads = inputs.query.size(1);
  attention.groups = inputs.key.size(1), attention.length = inputs.query.size(2);
  attention.local = inputs.key.size(2), attention.width = inputs.query.size(3);
  attention.value_width = inputs.value.size(3);
  attention.neighbours = inputs.slots.size(3);
  attention.query = padded_rows(inputs.query);
  attention.key = padded_rows(inputs.key);
  attention.value = padded_rows(inputs.value);
  attention.row_width = attention.query.size(3), attention.value_row_width = attention.value.size(3);
  attention.scores = in_float32(inputs.scores);
  attention.slots = torch::stable::contiguous(inputs.slots);
  attention.scale = floats(inputs.scale);
  attention.offset = inputs.memory_offset ? floats(*inputs.memory_offset) : std::vector<float>(attention.heads, 0.0f);
  attention.causal = inputs.causal;
  attention.bias = spread_bias(attention, inputs.bias_table);
  if (inputs.bias_dense) {
    attention.dense = in_float32(*inputs.bias_dense);
  }
  attention.rows = numbers(inputs.rows);
  attention.local_length =
      inputs.local_length ? numbers(*inputs.local_length) : std::vector<int64_t>(attention.batch, attention.local);
  attention.dropout = make_dropout(inputs.dropout_p, inputs.seed);
  if (inputs.key_mask) {
    attention.key_mask = torch::stable::contiguous(*inputs.key_mask);
  }
  if (inputs.first) {
    const Tensor packed = torch::stable::contiguous(*inputs.first);
    const int64_t* oldest = packed.const_data_ptr<int64_t>();
    attention.oldest.assign(oldest, oldest + packed.numel());
  }
  attention.soft_cap = static_cast<float>(inputs.soft_cap);
  attention.sink = inputs.sink ? floats(*inputs.sink) : std::vector<float>{};
  check_indices(attention, inputs.memory_keys);
  return attention;
}

// A ring as it is stored, (R, M + S, D) of float32, float16 or bfloat16.
struct Ring {
  Tensor dense;
  const void* first;
  ScalarType type;
  int64_t row_stride, slot_stride, width;

  explicit Ring(const Tensor& ring)
      : dense(ring.stride(2) == 1 ? ring : torch::stable::contiguous(ring)),
        first(dense.const_data_ptr()),
        type(ring.scalar_type()),
        row_stride(dense.stride(0)),
        slot_stride(dense.stride(1)),
        width(dense.size(2)) {}
};

}  // namespace memtrans
