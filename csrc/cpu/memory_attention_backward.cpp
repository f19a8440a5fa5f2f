// Gradients of memory_attention on the CPU, from the saved out and lse; the weights are computed again, tile by tile.
//
// With P the softmax, P' = P after dropout, dP' = <grad_out, values> and delta = <grad_out, out>:
//     d logits = P · (keep / (1 - p) · dP' - delta + grad_lse)    d sink = -P_sink · (delta - grad_lse)
//     d products = d logits, with a soft cap times 1 - tanh²(product / cap)
// and from it, with q, k and v of the local keys, m of the retrieved ones:
//     d q = scale · (d products · [m, k])    d k = scale · d productsᵀ · q    d v = P'ᵀ · grad_out
//     d scale = sum d products · <q, [m, k]>    d bias, d offset: sums of d logits
//
// One thread computes all queries of a head of a document, block after block (of all documents, where they share a
// dense bias); what heads or documents share is added up afterwards, in their order: the bits do not depend on threads.
//
// Limits: no float64. Precision: all arithmetic is float32, sums over a whole head or batch are float64.
#include "cpu/attention_gradients.h"
#include "cpu/attention_tile.h"
#include "cpu/parallel.h"

namespace memtrans {
namespace {

// What a block is given from the forward pass and from above.
struct Upstream {
  Tensor grad_out;           // (B, H, N, value_row_width)
  std::vector<float> delta;  // (B, H, N): <grad_out, out> - grad_lse
  std::vector<float> lse;    // (B, H, N), +inf where there was nothing to attend to: weights are then 0
};

struct Work {
  float delta[kQueries], lse[kQueries];
  std::vector<float> query_columns, grad_columns;  // (D, kQueries), (E, kQueries)
  std::vector<float> grad_query;                   // (kQueries, row_width), to be multiplied by scale

  explicit Work(const Attention& attention)
      : query_columns(attention.width * kQueries),
        grad_columns(attention.value_width * kQueries),
        grad_query(kQueries * attention.row_width) {}
};

MEMTRANS_INLINE void begin(const Attention& attention, const Block& block, const Upstream& upstream, Work& work) {
  const int64_t row_width = attention.row_width, value_row_width = attention.value_row_width;
  const float* query = attention.query.const_data_ptr<float>() + block.first * row_width;
  const float* grad_out = upstream.grad_out.const_data_ptr<float>() + block.first * value_row_width;
  transpose(block, {query, row_width}, attention.width, work.query_columns.data());
  transpose(block, {grad_out, value_row_width}, attention.value_width, work.grad_columns.data());
  std::fill(work.grad_query.begin(), work.grad_query.end(), 0.0f);
  for (int64_t lane = 0; lane < kQueries; ++lane) {
    work.delta[lane] = lane < block.queries ? upstream.delta[block.first + lane] : 0.0f;
    work.lse[lane] = lane < block.queries ? upstream.lse[block.first + lane] : kInfinity;
  }
}

// What a soft cap multiplies the gradient of a retrieved logit by.
inline float slope(float soft_cap, float product) {
  const float bent = std::tanh(product / soft_cap);
  return 1.0f - bent * bent;
}

template <int kLanes>
MEMTRANS_INLINE void through_retrieved(
    const Attention& attention, const Block& block, const Ring& keys, const Ring& values, const Upstream& upstream,
    Work& work, Gradients& gradients) {
  const int64_t neighbours = attention.neighbours, row = attention.rows[block.pair];
  const int64_t width = attention.width, value_width = attention.value_width;
  const int32_t* slots = attention.slots.const_data_ptr<int32_t>() + block.first * neighbours;
  const float* scores = attention.scores.const_data_ptr<float>() + block.first * neighbours;
  std::vector<float> weights(padded(neighbours)), storage(std::max(width, value_width));
  const float factor_of_score = attention.scale[block.head], soft_cap = attention.soft_cap;
  double scale = 0.0, offset = 0.0;
  for (int64_t query = 0; query < block.queries && neighbours; ++query) {
    const float* grad_out =
        upstream.grad_out.const_data_ptr<float>() + (block.first + query) * attention.value_row_width;
    retrieved_logits(attention, block, query, weights);
    exponentials<kLanes>(work.lse[query], weights);
    for (int64_t rank = 0; rank < neighbours; ++rank) {
      const int64_t place = query * neighbours + rank;
      if (slots[place] >= 0) {
        const float factor = attention.dropout.any ? dropout_factor(attention, block, rank, query) : 1.0f;
        const float grad_weight = dot(grad_out, entry(values, row, slots[place], storage.data()), value_width);
        const float grad_logit = weights[rank] * (factor * grad_weight - work.delta[query]);
        const float grad_product =
            soft_cap > 0.0f ? grad_logit * slope(soft_cap, factor_of_score * scores[place]) : grad_logit;
        add_scaled(
            grad_product, entry(keys, row, slots[place], storage.data()), width,
            &work.grad_query[query * attention.row_width]);
        scale += grad_product * scores[place];
        offset += grad_logit;
      }
    }
  }
  gradients.scale[block.document * attention.heads + block.head] += scale;
  gradients.offset[block.document * attention.heads + block.head] += offset;
}

// Turns the scores of a tile into weights after dropout, and the gradients of these into those of the products, scale
// times score; those of the logits are added to the bias's, and left in `of_dense` if that has a gradient of its own.
template <int kLanes, bool kCapped>
MEMTRANS_INLINE void through_softmax(
    const Attention& attention, const Block& block, int64_t key, int64_t keys, const Work& work, Tile scores,
    Tile grads, Tile of_dense, Gradients& gradients) {
  const int64_t of_head = block.document * attention.heads + block.head, place = block.position - key;
  const float* bias = attention.bias_of(block.head) + place;  // of the first query and the first key
  float* grad_bias = &gradients.bias[of_head * attention.distances() + attention.ahead()] + place;
  const float scale = attention.scale[block.head];
  const bool has_extra = attention.has_extra(), has_dense = attention.dense.has_value();
  const bool drops = attention.dropout.any;
  Tile extra, factors;
  read_extra(attention, block, key, keys, extra);
  draw_factors(attention, block, key, keys, factors);
  Vector<kLanes> grad_scale = {};
  for (int64_t row = 0; row < keys; ++row) {
    for (int64_t lane = 0; lane < block.lanes; lane += kLanes) {
      // Each is read once and written once: a write in between might be to any of them, as far as a compiler knows.
      const Vector<kLanes> score = load<kLanes>(&scores[row][lane]);
      Vector<kLanes> grad = load<kLanes>(&grads[row][lane]), logit = scale * score, bent;
      if constexpr (kCapped) {
        cap<kLanes>(attention.soft_cap, logit, bent);
      }
      add_bias<kLanes>(logit, load<kLanes>(bias + lane - row));
      if (has_extra) {
        add_bias<kLanes>(logit, load<kLanes>(&extra[row][lane]));
      }
      Vector<kLanes> weight = logit - load<kLanes>(&work.lse[lane]), dropped;
      exponentiate<kLanes>(weight);
      dropped = weight;
      if (drops) {
        dropped *= load<kLanes>(&factors[row][lane]);
        grad *= load<kLanes>(&factors[row][lane]);
      }
      grad = weight * (grad - load<kLanes>(&work.delta[lane]));
      const Vector<kLanes> of_logit = grad;
      if constexpr (kCapped) {
        grad *= 1.0f - bent * bent;
      }
      grad_scale += grad * score;
      at<kLanes>(&scores[row][lane]) = dropped;
      at<kLanes>(&grads[row][lane]) = grad;
      at<kLanes>(grad_bias + lane - row) += of_logit;
      if (has_dense) {
        at<kLanes>(&of_dense[row][lane]) = of_logit;
      }
    }
  }
  double sum = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) {
    sum += grad_scale[lane];
  }
  gradients.scale[of_head] += sum;
}

MEMTRANS_INLINE void add_dense(
    const Attention& attention, const Block& block, int64_t key, int64_t keys, const Tile grads, Gradients& gradients) {
  if (gradients.dense) {
    float* dense = gradients.dense->mutable_data_ptr<float>() + attention.dense_place(block, key);
    for (int64_t query = 0; query < block.queries; ++query) {
      for (int64_t row = 0; row < keys; ++row) {
        dense[query * attention.local + row] += grads[row][query];
      }
    }
  }
}

template <int kLanes, int kRows>
MEMTRANS_INLINE void through_local(
    const Attention& attention, const Block& block, const Upstream& upstream, Work& work, Gradients& gradients) {
  const int64_t row_width = attention.row_width, value_width = attention.value_row_width;
  const Matrix<const float> query{attention.query.const_data_ptr<float>() + block.first * row_width, row_width};
  const Matrix<const float> grad_out{
      upstream.grad_out.const_data_ptr<float>() + block.first * value_width, value_width};
  Tile scores, grads, of_dense;
  for (int64_t key = block.begin; key < block.end; key += kKeys) {
    const int64_t count = std::min(kKeys, block.end - key);
    const int64_t place = block.pair * attention.local + key;
    const int64_t of_head = (block.document * attention.heads + block.head) * attention.local + key;
    const float* keys = attention.key.const_data_ptr<float>() + place * row_width;
    const float* values = attention.value.const_data_ptr<float>() + place * value_width;
    score<kLanes, kRows>(block, {keys, row_width}, count, attention.width, work.query_columns.data(), scores);
    score<kLanes, kRows>(block, {values, value_width}, count, attention.value_width, work.grad_columns.data(), grads);
    if (attention.soft_cap > 0.0f) {
      through_softmax<kLanes, true>(attention, block, key, count, work, scores, grads, of_dense, gradients);
    } else {
      through_softmax<kLanes, false>(attention, block, key, count, work, scores, grads, of_dense, gradients);
    }
    add_dense(attention, block, key, count, of_dense, gradients);
    add_product<kLanes, kRows, false>(
        {scores[0], kQueries}, grad_out, count, block.queries, value_width,
        {gradients.values.mutable_data_ptr<float>() + of_head * value_width, value_width});
    add_product<kLanes, kRows, false>(
        {grads[0], kQueries}, query, count, block.queries, row_width,
        {gradients.keys.mutable_data_ptr<float>() + of_head * row_width, row_width});
    add_product<kLanes, kRows, true>(
        {grads[0], kQueries}, {keys, row_width}, block.queries, count, row_width, {work.grad_query.data(), row_width});
  }
}

// All queries of one head of one document.
template <int kLanes, int kRows>
MEMTRANS_INLINE void go_back(
    const Attention& attention, int64_t document, int64_t head, const Ring& keys, const Ring& values,
    const Upstream& upstream, Gradients& gradients) {
  Work work(attention);
  float* grad_query = gradients.query.mutable_data_ptr<float>();
  for (int64_t number = 0; number < attention.blocks_of_head(); ++number) {
    const Block block = attention.block(document, head, number);
    begin(attention, block, upstream, work);
    through_retrieved<kLanes>(attention, block, keys, values, upstream, work, gradients);
    through_local<kLanes, kRows>(attention, block, upstream, work, gradients);
    for (int64_t query = 0; query < block.queries; ++query) {
      for (int64_t column = 0; column < attention.width; ++column) {
        grad_query[(block.first + query) * attention.width + column] =
            attention.scale[head] * work.grad_query[query * attention.row_width + column];
      }
    }
  }
}

using GoBack = void (*)(
    const Attention&, int64_t document, int64_t head, const Ring& keys, const Ring& values, const Upstream&,
    Gradients&);

#if defined(__x86_64__)
MEMTRANS_AVX512 void go_back_avx512(
    const Attention& attention, int64_t document, int64_t head, const Ring& keys, const Ring& values,
    const Upstream& upstream, Gradients& gradients) {
  go_back<16, 8>(attention, document, head, keys, values, upstream, gradients);
}

MEMTRANS_AVX2 void go_back_avx2(
    const Attention& attention, int64_t document, int64_t head, const Ring& keys, const Ring& values,
    const Upstream& upstream, Gradients& gradients) {
  go_back<8, 4>(attention, document, head, keys, values, upstream, gradients);
}
#endif

void go_back_anywhere(
    const Attention& attention, int64_t document, int64_t head, const Ring& keys, const Ring& values,
    const Upstream& upstream, Gradients& gradients) {
  go_back<4, 4>(attention, document, head, keys, values, upstream, gradients);
}

GoBack fastest_go_back() {
#if defined(__x86_64__)
  return fastest<GoBack>(go_back_avx512, go_back_avx2, go_back_anywhere);
#else
  return go_back_anywhere;
#endif
}

Upstream take_upstream(const Tensor& grad_out, const Tensor& grad_lse, const Tensor& out, const Tensor& lse) {
  Upstream upstream{padded_rows(grad_out), floats(grad_lse), floats(lse)};
  const Tensor wide_out = padded_rows(out);
  const float *grads = upstream.grad_out.const_data_ptr<float>(), *outs = wide_out.const_data_ptr<float>();
  const int64_t row_width = wide_out.size(3);
  for (size_t query = 0; query < upstream.lse.size(); ++query) {
    upstream.delta[query] = dot(grads + query * row_width, outs + query * row_width, row_width) - upstream.delta[query];
    upstream.lse[query] = upstream.lse[query] == -kInfinity ? kInfinity : upstream.lse[query];
  }
  return upstream;
}

void compute(
    const Attention& attention, const Ring& keys, const Ring& values, const Upstream& upstream, Gradients& gradients) {
  const int64_t heads = attention.heads;
  const bool documents_share = attention.dense && attention.dense->size(0) == 1;
  const int64_t together = documents_share ? std::max<int64_t>(1, attention.batch) : 1;
  const GoBack go_back = fastest_go_back();
  for_each_part(attention.batch / together * heads, [&](int64_t part) {
    for (int64_t document = 0; document < together; ++document) {
      go_back(attention, part / heads * together + document, part % heads, keys, values, upstream, gradients);
    }
  });
}

// Of the sink (H,): it weighs exp(sink - lse) and is worth nothing.
std::vector<double> sink_gradients(const Attention& attention, const Upstream& upstream) {
  std::vector<double> parts(attention.batch * attention.heads, 0.0);
  for (size_t query = 0; query < upstream.lse.size() && !attention.sink.empty(); ++query) {
    const size_t part = query / attention.length;
    parts[part] -= std::exp(attention.sink[part % attention.heads] - upstream.lse[query]) * upstream.delta[query];
  }
  return parts;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> memory_attention_backward(
    Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse, Tensor query, Tensor key, Tensor value,
    Tensor memory_keys, Tensor memory_values, Tensor rows, Tensor scores, Tensor slots, Tensor scale,
    std::optional<Tensor> bias_table, std::optional<Tensor> bias_dense, std::optional<Tensor> memory_offset,
    std::optional<Tensor> local_length, double dropout_p, std::optional<Tensor> seed, bool causal,
    std::optional<Tensor> key_mask, std::optional<Tensor> first, double soft_cap, std::optional<Tensor> sink) {
  const AttentionInputs inputs{query, key,    value,      memory_keys, memory_values, rows,         scores,
                               slots, scale,  bias_table, bias_dense,  memory_offset, local_length, dropout_p,
                               seed,  causal, key_mask,   first,       soft_cap,      sink};
  const Attention attention = prepare(inputs);
  const std::initializer_list<int64_t> of_out{
      attention.batch, attention.heads, attention.length, attention.value_width};
  check_shape(grad_out, "grad_out", of_out, "(B, H, N, E)");
  check_shape(out, "out", of_out, "(B, H, N, E)");
  check_shape(grad_lse, "grad_lse", {attention.batch, attention.heads, attention.length}, "(B, H, N)");
  check_shape(lse, "lse", {attention.batch, attention.heads, attention.length}, "(B, H, N)");
  Gradients gradients(attention, query);
  const Upstream upstream = take_upstream(grad_out, grad_lse, out, lse);
  compute(attention, Ring(memory_keys), Ring(memory_values), upstream, gradients);
  const auto nothing = [&] { return torch::stable::new_empty(query, {0}); };  // no two results may share memory
  const std::vector<float> ones(attention.heads, 1.0f);
  return {
      torch::stable::to(gradients.query, query.scalar_type()),
      torch::stable::to(sum_over_heads(attention, gradients.keys, attention.width, attention.scale), key.scalar_type()),
      torch::stable::to(sum_over_heads(attention, gradients.values, attention.value_width, ones), value.scalar_type()),
      sum_over_documents(gradients.scale, scale),
      bias_table ? sum_over_documents(gradients, *bias_table) : nothing(),
      bias_dense ? torch::stable::to(*gradients.dense, bias_dense->scalar_type()) : nothing(),
      memory_offset ? sum_over_documents(gradients.offset, *memory_offset) : nothing(),
      sink ? sum_over_documents(sink_gradients(attention, upstream), *sink) : nothing()};
}

}  // namespace
}  // namespace memtrans

STABLE_TORCH_LIBRARY_IMPL(memtrans, CPU, library) {
  library.impl("native_memory_attention_backward", TORCH_BOX(&memtrans::memory_attention_backward));
}
