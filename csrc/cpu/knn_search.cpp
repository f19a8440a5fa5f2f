// knn_search on the CPU: exact top-K of inner products over the visible entries of each query's memory row.
//
// Visible in a row are the entries max(start, cursor - M) .. cursor - 1; entry i lies in slot i mod (M + S), so they
// are one or two pieces of memory, and no other key is touched. The work is cut into parts: up to kQueriesOfPart
// queries of a row and, where there are fewer of those than threads could take, a range of its keys. Parts end in Found
// numbers, whose order does not depend on how the work was cut; merging them gives the result.
#include "cpu/knn_scan.h"
#include "cpu/parallel.h"
#include "cpu/tensors.h"

namespace memtrans {
namespace {

constexpr int64_t kQueriesOfPart = 256;  // their best keys and they themselves fit into the L2 cache
constexpr int64_t kKeysOfPart = 2048;    // fewer are not worth a part of their own
constexpr int64_t kPartsOfThread = 2;

struct Window {
  int64_t row;
  int64_t first;  // the oldest visible entry
  int64_t size;
};

struct Plan {
  int64_t width, slots, k;
  int64_t queries;  // of one row: H / G * N
  int64_t query_parts, key_parts;
  std::vector<Window> windows;  // of each (document, group)

  int64_t parts() const { return static_cast<int64_t>(windows.size()) * query_parts * key_parts; }
};

std::vector<Window> visible_windows(const Tensor& rows, const Tensor& start, const Tensor& cursor, int64_t capacity) {
  const std::vector<int64_t> starts = numbers(start), cursors = numbers(cursor);
  const int64_t ring_rows = static_cast<int64_t>(cursors.size());
  std::vector<Window> windows;
  for (const int64_t row : numbers(rows)) {
    MEMTRANS_CHECK(row >= 0 && row < ring_rows, "rows must lie in 0..", ring_rows - 1, ", got ", row);
    const int64_t end = std::max<int64_t>(0, cursors[row]);  // no entry number overflows from here on
    const int64_t first = std::max({int64_t{0}, starts[row], end - capacity});
    windows.push_back({row, first, std::max<int64_t>(0, end - first)});
  }
  return windows;
}

Plan make_plan(
    const Tensor& query, const Tensor& keys, const Tensor& rows, const Tensor& start, const Tensor& cursor,
    int64_t capacity, int64_t k) {
  Plan plan{keys.size(2), keys.size(1), k, 0, 0, 1, visible_windows(rows, start, cursor, capacity)};
  int64_t longest = 0;
  for (const Window& window : plan.windows) {
    longest = std::max(longest, window.size);
  }
  if (!plan.windows.empty()) {
    plan.queries = query.size(0) * query.size(1) * query.size(2) / static_cast<int64_t>(plan.windows.size());
  }
  plan.query_parts = (plan.queries + kQueriesOfPart - 1) / kQueriesOfPart;
  const int64_t threads = torch::stable::get_num_threads(), wanted = threads > 1 ? threads * kPartsOfThread : 1;
  const int64_t parts = std::max<int64_t>(1, plan.parts());
  plan.key_parts = std::clamp<int64_t>((wanted + parts - 1) / parts, 1, std::max<int64_t>(1, longest / kKeysOfPart));
  return plan;
}

// Scans the entries `begin` to `end` of a window, counted from its oldest one, in the order of their age.
template <typename Key>
void scan_entries(
    const Scan<Key>& scan, const Tensor& keys, const Window& window, int64_t begin, int64_t end, const Queries& queries,
    BestKeys& best) {
  const Key* row = keys.const_data_ptr<Key>() + window.row * keys.stride(0);
  const int64_t slots = keys.size(1);
  while (begin < end) {
    const int64_t slot = (window.first + begin) % slots, size = std::min(end - begin, slots - slot);
    scan.run({row + slot * keys.stride(1), keys.stride(1), size, begin}, queries, best);
    begin += size;
  }
}

// Finds the best K of each query (found, K) in one part of the work.
template <typename Key>
void run_part(const Plan& plan, int64_t part, const Tensor& query, const Tensor& keys, Found* found) {
  const int64_t key_part = part % plan.key_parts, query_part = part / plan.key_parts % plan.query_parts;
  const int64_t index = part / plan.key_parts / plan.query_parts;
  const Window& window = plan.windows[index];
  const int64_t first = query_part * kQueriesOfPart, size = std::min(kQueriesOfPart, plan.queries - first);
  const int64_t begin = window.size * key_part / plan.key_parts, end = window.size * (key_part + 1) / plan.key_parts;
  const int64_t first_of_all = index * plan.queries + first, kept = std::min(plan.k, end - begin);
  if (kept == 0) {
    return;
  }
  const Scan<Key> scan = fastest_scan<Key>();
  const Queries queries(query.const_data_ptr<Key>() + first_of_all * plan.width, size, plan.width, scan.lanes);
  BestKeys best(size, queries.padded(), kept);
  scan_entries(scan, keys, window, begin, end, queries, best);
  for (int64_t number = 0; number < size; ++number) {
    best.take(number, found + ((first_of_all + number) * plan.key_parts + key_part) * plan.k);
  }
}

// Merges what the parts found for one query, and writes its scores and slots.
void write_result(const Plan& plan, int64_t query, Found* found, float* scores, int32_t* slots) {
  const Window& window = plan.windows[query / plan.queries];
  Found* first = found + query * plan.key_parts * plan.k;
  if (plan.key_parts > 1) {
    std::partial_sort(first, first + plan.k, first + plan.key_parts * plan.k, std::greater<Found>());
  }
  for (int64_t rank = 0; rank < plan.k; ++rank) {
    const bool any = first[rank] != 0;
    scores[query * plan.k + rank] = any ? score_of(first[rank]) : -std::numeric_limits<float>::infinity();
    slots[query * plan.k + rank] =
        any ? static_cast<int32_t>((window.first + position_of(first[rank])) % plan.slots) : -1;
  }
}

template <typename Key>
void search(const Plan& plan, const Tensor& query, const Tensor& keys, Tensor& scores, Tensor& slots) {
  const int64_t queries = static_cast<int64_t>(plan.windows.size()) * plan.queries, parts = plan.parts();
  std::vector<Found> found(queries * plan.key_parts * plan.k, 0);
  for_each_part(parts, [&](int64_t part) { run_part<Key>(plan, part, query, keys, found.data()); });
  float* score = scores.mutable_data_ptr<float>();
  int32_t* slot = slots.mutable_data_ptr<int32_t>();
  torch::stable::parallel_for(0, queries, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      write_result(plan, number, found.data(), score, slot);
    }
  });
}

std::tuple<Tensor, Tensor> knn_search(
    Tensor query, Tensor keys, Tensor rows, Tensor start, Tensor cursor, int64_t capacity, int64_t k) {
  check_knn_search(query, keys, rows, start, cursor, capacity, k);
  const auto cast = torch::stable::contiguous(torch::stable::to(query, keys.scalar_type()));
  const Tensor dense = keys.stride(2) == 1 ? keys : torch::stable::contiguous(keys);
  const std::initializer_list<int64_t> shape{query.size(0), query.size(1), query.size(2), k};
  Tensor scores = torch::stable::new_empty(query, shape, ScalarType::Float);
  Tensor slots = torch::stable::new_empty(query, shape, ScalarType::Int);
  const Plan plan = make_plan(query, keys, rows, start, cursor, capacity, k);
  switch (keys.scalar_type()) {
    case ScalarType::Half:
      search<c10::Half>(plan, cast, dense, scores, slots);
      break;
    case ScalarType::BFloat16:
      search<c10::BFloat16>(plan, cast, dense, scores, slots);
      break;
    default:
      search<float>(plan, cast, dense, scores, slots);
  }
  return {scores, slots};
}

}  // namespace
}  // namespace memtrans

STABLE_TORCH_LIBRARY_IMPL(memtrans, CPU, library) {
  library.impl("native_knn_search", TORCH_BOX(&memtrans::knn_search));
}
