// memory_attention on the CPU: attention to K retrieved neighbours and to the local context in one softmax.
//
//     out = softmax([cap(scale · scores) + offset, cap(scale · k qᵀ) + bias, sink]) · [memory values, values, 0]
//
// query (B, H, N, D) · key (B, G, L, D) · value (B, G, L, E) · memory_values (R, M + S, E) · rows (B·G,)
// scores, slots (B, H, N, K) · scale, offset, sink (H,) · bias by distance (H, distances) or dense (1 or B, H, N, L)
// key_mask (B, L) · first (B, N) · cap(x) = soft_cap · tanh(x / soft_cap) -> out (B, H, N, E), lse (B, H, N)
//
// A block of queries first takes its neighbours, then tile after tile of the local keys that it sees, with a running
// maximum and sum of the softmax. Blocks are computed alone, each by one thread: the bits do not depend on threads.
//
// Source: Wu et al. 2022, section 3.1; the running softmax is that of Milakov and Gimelshein 2018.
// Limits: no float64. Precision: all arithmetic is float32.
#include "cpu/attention_tile.h"
#include "cpu/parallel.h"

namespace memtrans {
namespace {

// What a block knows of its softmax so far; out stands for exp(-highest) times itself.
struct Running {
  float highest[kQueries], total[kQueries];
  std::vector<float> out;  // (kQueries, value_row_width)

  explicit Running(int64_t value_row_width) : out(kQueries * value_row_width, 0.0f) {
    std::fill_n(highest, kQueries, -kInfinity);
    std::fill_n(total, kQueries, 0.0f);
  }
};

template <int kLanes>
MEMTRANS_INLINE void attend_to_retrieved(
    const Attention& attention, const Block& block, const Ring& values, Running& running) {
  const int64_t neighbours = attention.neighbours, row = attention.rows[block.pair];
  const int32_t* slots = attention.slots.const_data_ptr<int32_t>() + block.first * neighbours;
  std::vector<float> weights(padded(neighbours)), storage(attention.value_width);
  for (int64_t query = 0; query < block.queries && neighbours; ++query) {
    const float highest = retrieved_logits(attention, block, query, weights);
    exponentials<kLanes>(highest == -kInfinity ? 0.0f : highest, weights);
    running.highest[query] = highest;
    for (int64_t rank = 0; rank < neighbours; ++rank) {
      const int32_t slot = slots[query * neighbours + rank];
      if (slot >= 0) {
        const float factor = attention.dropout.any ? dropout_factor(attention, block, rank, query) : 1.0f;
        running.total[query] += weights[rank];
        add_scaled(
            weights[rank] * factor, entry(values, row, slot, storage.data()), attention.value_width,
            &running.out[query * attention.value_row_width]);
      }
    }
  }
}

// Turns the scores of a tile into weights, and what is known so far into what it is relative to the new maximum.
template <int kLanes, bool kCapped>
MEMTRANS_INLINE void take_weights(
    const Attention& attention, const Block& block, int64_t key, int64_t keys, Tile tile, Running& running) {
  const float scale = attention.scale[block.head];
  const float* bias = attention.bias_of(block.head) + block.position - key;  // of the first query and the first key
  const bool has_extra = attention.has_extra();
  Tile extra;
  read_extra(attention, block, key, keys, extra);
  float shrink[kQueries];
  for (int64_t lane = 0; lane < block.lanes; lane += kLanes) {
    const Vector<kLanes> before = load<kLanes>(&running.highest[lane]);
    Vector<kLanes> highest = before;
    for (int64_t row = 0; row < keys; ++row) {
      Vector<kLanes>& logit = at<kLanes>(&tile[row][lane]);
      logit *= scale;
      if constexpr (kCapped) {
        Vector<kLanes> bent;
        cap<kLanes>(attention.soft_cap, logit, bent);
      }
      add_bias<kLanes>(logit, load<kLanes>(bias + lane - row));
      if (has_extra) {
        add_bias<kLanes>(logit, load<kLanes>(&extra[row][lane]));
      }
      highest = logit > highest ? logit : highest;
    }
    const Vector<kLanes> finite = highest == -kInfinity ? Vector<kLanes>{} : highest;
    Vector<kLanes> factor = before - finite;
    exponentiate<kLanes>(factor);
    Vector<kLanes> total = load<kLanes>(&running.total[lane]) * factor;
    for (int64_t row = 0; row < keys; ++row) {
      Vector<kLanes>& weight = at<kLanes>(&tile[row][lane]);
      weight -= finite;
      exponentiate<kLanes>(weight);
      total += weight;
    }
    at<kLanes>(&running.highest[lane]) = highest;
    at<kLanes>(&running.total[lane]) = total;
    at<kLanes>(&shrink[lane]) = factor;
  }
  for (int64_t query = 0; query < block.queries; ++query) {
    float* out = &running.out[query * attention.value_row_width];
#pragma omp simd
    for (int64_t column = 0; column < attention.value_row_width; ++column) {
      out[column] *= shrink[query];
    }
  }
}

MEMTRANS_INLINE void drop_weights(
    const Attention& attention, const Block& block, int64_t key, int64_t keys, Tile tile) {
  if (attention.dropout.any) {
    Tile factors;
    draw_factors(attention, block, key, keys, factors);
    for (int64_t row = 0; row < keys; ++row) {
#pragma omp simd
      for (int64_t query = 0; query < block.lanes; ++query) {
        tile[row][query] *= factors[row][query];
      }
    }
  }
}

template <int kLanes, int kRows>
MEMTRANS_INLINE void attend_to_local(const Attention& attention, const Block& block, Running& running) {
  const int64_t row_width = attention.row_width, value_width = attention.value_row_width;
  const int64_t first_row = block.pair * attention.local;
  const float* query = attention.query.const_data_ptr<float>() + block.first * row_width;
  const float *keys = attention.key.const_data_ptr<float>(), *values = attention.value.const_data_ptr<float>();
  std::vector<float> columns(attention.width * kQueries);
  transpose(block, {query, row_width}, attention.width, columns.data());
  Tile tile;
  for (int64_t key = block.begin; key < block.end; key += kKeys) {
    const int64_t count = std::min(kKeys, block.end - key), place = first_row + key;
    score<kLanes, kRows>(block, {keys + place * row_width, row_width}, count, attention.width, columns.data(), tile);
    if (attention.soft_cap > 0.0f) {
      take_weights<kLanes, true>(attention, block, key, count, tile, running);
    } else {
      take_weights<kLanes, false>(attention, block, key, count, tile, running);
    }
    drop_weights(attention, block, key, count, tile);
    add_product<kLanes, kRows, true>(
        {tile[0], kQueries}, {values + place * value_width, value_width}, block.queries, count, value_width,
        {running.out.data(), value_width});
  }
}

// Adds the sink to the denominators; returns what their numerators are to be multiplied by.
MEMTRANS_INLINE float take_sink(float sink, float& highest, float& total) {
  const float higher = std::max(highest, sink), finite = higher == -kInfinity ? 0.0f : higher;
  const float shrink = std::exp(highest - finite);
  total = total * shrink + std::exp(sink - finite);
  highest = higher;
  return shrink;
}

template <int kLanes, int kRows>
MEMTRANS_INLINE void attend(
    const Attention& attention, const Block& block, const Ring& values, float* out, float* lse) {
  Running running(attention.value_row_width);
  attend_to_retrieved<kLanes>(attention, block, values, running);
  attend_to_local<kLanes, kRows>(attention, block, running);
  for (int64_t query = 0; query < block.queries; ++query) {
    float highest = running.highest[query], total = running.total[query], shrink = 1.0f;
    if (!attention.sink.empty()) {
      shrink = take_sink(attention.sink[block.head], highest, total);
    }
    const float factor = total == 0.0f ? 0.0f : shrink / total;
    lse[block.first + query] = total == 0.0f ? -kInfinity : highest + std::log(total);
    for (int64_t column = 0; column < attention.value_width; ++column) {
      out[(block.first + query) * attention.value_width + column] =
          running.out[query * attention.value_row_width + column] * factor;
    }
  }
}

using Attend = void (*)(const Attention&, const Block&, const Ring&, float* out, float* lse);

#if defined(__x86_64__)
MEMTRANS_AVX512 void attend_avx512(
    const Attention& attention, const Block& block, const Ring& values, float* out, float* lse) {
  attend<16, 8>(attention, block, values, out, lse);
}

MEMTRANS_AVX2 void attend_avx2(
    const Attention& attention, const Block& block, const Ring& values, float* out, float* lse) {
  attend<8, 4>(attention, block, values, out, lse);
}
#endif

void attend_anywhere(const Attention& attention, const Block& block, const Ring& values, float* out, float* lse) {
  attend<4, 4>(attention, block, values, out, lse);
}

Attend fastest_attend() {
#if defined(__x86_64__)
  return fastest<Attend>(attend_avx512, attend_avx2, attend_anywhere);
#else
  return attend_anywhere;
#endif
}

std::tuple<Tensor, Tensor> memory_attention(
    Tensor query, Tensor key, Tensor value, Tensor memory_keys, Tensor memory_values, Tensor rows, Tensor scores,
    Tensor slots, Tensor scale, std::optional<Tensor> bias_table, std::optional<Tensor> bias_dense,
    std::optional<Tensor> memory_offset, std::optional<Tensor> local_length, double dropout_p,
    std::optional<Tensor> seed, bool causal, std::optional<Tensor> key_mask, std::optional<Tensor> first,
    double soft_cap, std::optional<Tensor> sink) {
  const AttentionInputs inputs{query, key,    value,      memory_keys, memory_values, rows,         scores,
                               slots, scale,  bias_table, bias_dense,  memory_offset, local_length, dropout_p,
                               seed,  causal, key_mask,   first,       soft_cap,      sink};
  const Attention attention = prepare(inputs);
  const Ring values(memory_values);
  const int64_t batch = attention.batch, heads = attention.heads, length = attention.length;
  Tensor out = torch::stable::new_empty(query, {batch, heads, length, attention.value_width}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(query, {batch, heads, length}, ScalarType::Float);
  float *out_data = out.mutable_data_ptr<float>(), *lse_data = lse.mutable_data_ptr<float>();
  const Attend attend = fastest_attend();
  const int64_t blocks = attention.blocks_of_head();
  for_each_part(batch * heads * blocks, [&](int64_t part) {
    const int64_t head = part / blocks % heads, document = part / blocks / heads;
    attend(attention, attention.block(document, head, part % blocks), values, out_data, lse_data);
  });
  return {torch::stable::to(out, query.scalar_type()), lse};
}

}  // namespace
}  // namespace memtrans

STABLE_TORCH_LIBRARY_IMPL(memtrans, CPU, library) {
  library.impl("native_memory_attention", TORCH_BOX(&memtrans::memory_attention));
}
