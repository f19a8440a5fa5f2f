// The vector code of both passes of memory_attention: tiles of kKeys local keys by kQueries queries, and neighbours.
//
// A tile is stored key by key, so that vectors run along the queries: what is taken over all keys of a query (maximum,
// sum) needs no step across a vector's lanes. Everything here is inlined into the functions of an instruction set.
#pragma once

#include "cpu/attention.h"
#include "cpu/philox.h"
#include "cpu/product.h"

namespace memtrans {

using Tile = float[kKeys][kQueries];

// The rows of a block as columns, (width, kQueries); zeros for queries that do not exist.
MEMTRANS_INLINE void transpose(const Block& block, Matrix<const float> rows, int64_t width, float* columns) {
  for (int64_t column = 0; column < width; ++column) {
    for (int64_t query = 0; query < block.lanes; ++query) {
      columns[column * kQueries + query] = query < block.queries ? rows.row(query)[column] : 0.0f;
    }
  }
}

// <row, query> for some rows of keys or values and the queries of a block, which are columns.
template <int kLanes, int kRows>
MEMTRANS_INLINE void score(
    const Block& block, Matrix<const float> rows, int64_t keys, int64_t width, const float* columns, Tile tile) {
  std::fill_n(tile[0], keys * kQueries, 0.0f);
  add_product<kLanes, kRows, false>(rows, {columns, kQueries}, keys, width, block.lanes, {tile[0], kQueries});
}

// Adds a bias to a local logit. That of a hidden key is -inf, and stays so where the product is no
// number.
template <int kLanes>
MEMTRANS_INLINE void add_bias(Vector<kLanes>& logit, const Vector<kLanes>& bias) {
  logit = bias == -kInfinity ? bias : logit + bias;
}

// Makes a product of query and key what a soft cap leaves of it; returns the tanh of which it is a multiple.
template <int kLanes>
MEMTRANS_INLINE void cap(float soft_cap, Vector<kLanes>& product, Vector<kLanes>& bent) {
  bent = product * (1.0f / soft_cap);
  take_tanh<kLanes>(bent);
  product = bent * soft_cap;
}

// The dense bias of a tile; -inf, whatever it holds, for keys after their query.
MEMTRANS_INLINE void read_dense(const Attention& attention, const Block& block, int64_t key, int64_t keys, Tile tile) {
  const float* dense = attention.dense->const_data_ptr<float>() + attention.dense_place(block, key);
  for (int64_t row = 0; row < keys; ++row) {
    const int64_t first = attention.causal ? key + row - block.position : 0;  // the first query that sees the key
    for (int64_t query = 0; query < block.lanes; ++query) {
      const float bias = query < block.queries ? dense[query * attention.local + row] : 0.0f;
      tile[row][query] = query < first ? -kInfinity : bias;
    }
  }
}

// Makes what a tile adds to its logits -inf where a query does not see a key for another reason than its distance.
MEMTRANS_INLINE void hide(const Attention& attention, const Block& block, int64_t key, int64_t keys, Tile tile) {
  if (attention.key_mask) {
    const bool* mask = attention.key_mask->const_data_ptr<bool>() + block.document * attention.local + key;
    for (int64_t row = 0; row < keys; ++row) {
      if (!mask[row]) {
        std::fill_n(tile[row], block.lanes, -kInfinity);
      }
    }
  }
  if (!attention.oldest.empty()) {
    const int64_t* oldest = &attention.oldest[block.document * attention.length + block.query];
    for (int64_t query = 0; query < block.queries; ++query) {
      for (int64_t row = 0; row < std::min(keys, oldest[query] - key); ++row) {
        tile[row][query] = -kInfinity;
      }
    }
  }
}

// What a tile adds to its logits beside the bias by distance; nothing is read without `has_extra`.
MEMTRANS_INLINE void read_extra(const Attention& attention, const Block& block, int64_t key, int64_t keys, Tile tile) {
  if (attention.dense) {
    read_dense(attention, block, key, keys, tile);
  } else if (attention.has_extra()) {
    std::fill_n(tile[0], keys * kQueries, 0.0f);
  } else {
    return;
  }
  hide(attention, block, key, keys, tile);
}

// What dropout multiplies the weights of one column by: the K neighbours are columns, then the L local keys.
MEMTRANS_INLINE float dropout_factor(const Attention& attention, const Block& block, int64_t column, int64_t query) {
  const Dropout& dropout = attention.dropout;
  const uint32_t drawn = philox(
      dropout.seed, static_cast<uint32_t>(column), static_cast<uint32_t>(block.query + query),
      static_cast<uint32_t>(block.head), static_cast<uint32_t>(block.document));
  return drawn < dropout.threshold ? 0.0f : dropout.kept;
}

// The same of a tile; nothing without dropout.
MEMTRANS_INLINE void draw_factors(
    const Attention& attention, const Block& block, int64_t key, int64_t keys, Tile tile) {
  if (attention.dropout.any) {
    for (int64_t row = 0; row < keys; ++row) {
#pragma omp simd
      for (int64_t query = 0; query < block.lanes; ++query) {
        tile[row][query] = dropout_factor(attention, block, attention.neighbours + key + row, query);
      }
    }
  }
}

template <typename Element>
MEMTRANS_INLINE const float* widened(const void* ring, int64_t place, int64_t width, float* storage) {
  const Element* stored = static_cast<const Element*>(ring) + place;
  for (int64_t column = 0; column < width; ++column) {
    storage[column] = static_cast<float>(stored[column]);
  }
  return storage;
}

// One entry of a ring in float32: where it lies, or in `storage` if it is stored in another type.
MEMTRANS_INLINE const float* entry(const Ring& ring, int64_t row, int64_t slot, float* storage) {
  const int64_t place = row * ring.row_stride + slot * ring.slot_stride;
  switch (ring.type) {
    case ScalarType::Half:
      return widened<c10::Half>(ring.first, place, ring.width, storage);
    case ScalarType::BFloat16:
      return widened<c10::BFloat16>(ring.first, place, ring.width, storage);
    default:
      return static_cast<const float*>(ring.first) + place;
  }
}

MEMTRANS_INLINE void add_scaled(float factor, const float* row, int64_t width, float* sum) {
#pragma omp simd
  for (int64_t column = 0; column < width; ++column) {
    sum[column] += factor * row[column];
  }
}

// exp(logit - reference) of the retrieved logits of a query, which stand in `weights`, padded.
template <int kLanes>
MEMTRANS_INLINE void exponentials(float reference, std::vector<float>& weights) {
  for (size_t place = 0; place < weights.size(); place += kLanes) {
    at<kLanes>(&weights[place]) -= reference;
    exponentiate<kLanes>(at<kLanes>(&weights[place]));
  }
}

// What a soft cap leaves of a product, one by one.
inline float capped(float soft_cap, float product) { return soft_cap * std::tanh(product / soft_cap); }

// The retrieved logits of a query, -inf where nothing was found. Returns the largest one.
MEMTRANS_INLINE float retrieved_logits(
    const Attention& attention, const Block& block, int64_t query, std::vector<float>& logits) {
  const int64_t neighbours = attention.neighbours, first = (block.first + query) * neighbours;
  const float* scores = attention.scores.const_data_ptr<float>() + first;
  const int32_t* slots = attention.slots.const_data_ptr<int32_t>() + first;
  const float scale = attention.scale[block.head], offset = attention.offset[block.head], cap = attention.soft_cap;
  float highest = -kInfinity;
  std::fill(logits.begin(), logits.end(), -kInfinity);
  if (cap > 0.0f) {  // a loop of its own: the other one is fast without a call in it
    for (int64_t rank = 0; rank < neighbours; ++rank) {
      if (slots[rank] >= 0) {
        logits[rank] = capped(cap, scale * scores[rank]) + offset;
        highest = std::max(highest, logits[rank]);
      }
    }
    return highest;
  }
  for (int64_t rank = 0; rank < neighbours; ++rank) {
    if (slots[rank] >= 0) {
      logits[rank] = scale * scores[rank] + offset;
      highest = std::max(highest, logits[rank]);
    }
  }
  return highest;
}

}  // namespace memtrans
