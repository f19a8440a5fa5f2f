// The last steps of the few-query search: from the maxima of groups that few_maxima left to the K best slots.
//
//   few_select   a block keeps the K best of one query, or of a part of its groups where there are few queries. One of the
//                K best keys lies in one of the K best groups; the products of these few are made again, bit for bit.
//   few_merge    a warp keeps the K best over the parts of one query.
#pragma once

#include "knn_few.cuh"

namespace memtrans {

constexpr int kSelectThreads = 512;  // of few_select
constexpr int kSelectWarps = kSelectThreads / 32;
constexpr int kSmallestSelection = 8192;  // slots that are worth a block of few_select
constexpr int kHeldMaxima = 8;  // of a thread, in registers: those of 65,536 slots are read once, what is more twice
constexpr int kBoundGroups = 256;  // maxima that few_select takes its bound from
constexpr int kListedGroups = 1024;  // groups that it lists at a time
constexpr int kScoredGroups = 48;  // of those, groups whose slots it scores at a time

struct SelectShared {
  uint64_t buffer[WarpTopK::kCapacity];
  uint64_t reaching[kScoredGroups * kFewGroup];  // entries of the slots that reach the bound, `scored` of them
  alignas(16) uint32_t bests[kBoundGroups];
  uint32_t bound;
  int listed[kListedGroups];  // groups that reach the bound, `found` of them
  int found, scored;
};

// The maxima of one query's groups [begin, end), each for one thread of the block to visit.
struct GroupMaxima {
  const float* maxima;
  int begin, end;
  float held[kHeldMaxima];  // the thread's first ones, under way from the constructor on

  __device__ GroupMaxima(const float* maxima, int begin, int end) : maxima(maxima), begin(begin), end(end) {
    load(held, begin + threadIdx.x, end);
  }

  __device__ void load(float (&largest)[kHeldMaxima], int group, int to) const {
#pragma unroll
    for (int i = 0; i < kHeldMaxima; ++i)
      largest[i] = group + kSelectThreads * i < to ? maxima[group + kSelectThreads * i] : -INFINITY;
  }

  // visit(largest score, group)
  template <typename Visit>
  __device__ void visit_range(int from, int to, Visit visit) const {
    for (int base = from + threadIdx.x; base < to; base += kSelectThreads * kHeldMaxima) {
      float largest[kHeldMaxima];
      load(largest, base, to);
#pragma unroll
      for (int i = 0; i < kHeldMaxima; ++i) visit(largest[i], base + kSelectThreads * i);
    }
  }

  template <typename Visit>
  __device__ void visit_all(Visit visit) const {
#pragma unroll
    for (int i = 0; i < kHeldMaxima; ++i) visit(held[i], begin + threadIdx.x + kSelectThreads * i);
    visit_range(begin + kSelectThreads * kHeldMaxima, end, visit);
  }
};

// A warp's part of finding the k-th largest of all values: the smallest of its own, two threads a value, that fewer than k
// of all exceed. The smallest of what all warps return is the k-th largest.
__device__ inline uint32_t kth_largest_bound(const uint32_t (&values)[kBoundGroups], int k) {
  static_assert(kSelectThreads == 2 * kBoundGroups, "two threads a value");
  const uint32_t mine = values[threadIdx.x / 2];
  int above = 0;
#pragma unroll 8
  for (int i = threadIdx.x % 2; i < kBoundGroups / 4; i += 2) {
    const uint4 four = reinterpret_cast<const uint4*>(values)[i];
    above += (four.x > mine) + (four.y > mine) + (four.z > mine) + (four.w > mine);
  }
  above += __shfl_xor_sync(kAllLanes, above, 1);
  return __reduce_min_sync(kAllLanes, above < k ? mine : 0xFFFFFFFFu);
}

// What K of the groups' slots reach: the K-th largest of kBoundGroups maxima, each of some groups.
__device__ inline float lower_bound(const GroupMaxima& groups, int k, SelectShared& shared) {
  if (threadIdx.x < kBoundGroups) shared.bests[threadIdx.x] = 0;
  if (threadIdx.x == 0) shared.bound = 0xFFFFFFFFu;
  __syncthreads();
  float largest = -INFINITY;
  groups.visit_all([&](float score, int) {
    if (score < INFINITY) largest = fmaxf(largest, score);  // an infinite one may belong to a key that does not count
  });
  if (largest > -INFINITY) atomicMax(&shared.bests[threadIdx.x % kBoundGroups], sortable(largest));
  __syncthreads();
  const uint32_t of_warp = kth_largest_bound(shared.bests, k);
  if (threadIdx.x % 32 == 0) atomicMin(&shared.bound, of_warp);
  __syncthreads();
  return shared.bound == 0 ? kLowest : unsortable(shared.bound);  // 0: of fewer than K groups
}

// Lists the visited groups that reach the bound, in no particular order, and returns how many there are: maybe more than fit.
template <typename VisitGroups>
__device__ inline int list_reaching(float bound, SelectShared& shared, VisitGroups visit_groups) {
  __syncthreads();
  if (threadIdx.x == 0) shared.found = 0;
  __syncthreads();
  visit_groups([&](float score, int group) {
    if (!(score >= bound)) return;
    const int place = atomicAdd(&shared.found, 1);
    if (place < kListedGroups) shared.listed[place] = group;
  });
  __syncthreads();
  return shared.found;
}

// Scores listed groups once more, a group a warp, for one of the queries that were multiplied together.
template <typename T, int dim>
struct GroupScorer {
  const T* keys;  // of the row
  Window window;
  const QueryOperand<dim>& queries;
  int column;     // of the query among them
  float bound;
  SelectShared& shared;

  // Adds the slots of a group that reach the bound to those of the other warps' groups, in no particular order.
  __device__ void score_group(const Operand<dim>& loaded, int group) const {
    const int lane = threadIdx.x % 32;
    float d[4];
    group_scores<T>(d, loaded, queries, group, window);
    if (lane % 4 != column / 2) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int slot = group * kFewGroup + lane / 4 + 8 * half;
      const float score = column % 2 ? d[2 * half + 1] : d[2 * half];
      if (!(score >= bound)) continue;
      if (score == INFINITY && !key_is_finite(keys + static_cast<int64_t>(slot) * dim, dim)) continue;
      shared.reaching[atomicAdd(&shared.scored, 1)] = make_entry(score, window.age(slot));
    }
  }

  // The listed groups [from, to), some of them under way at once: with K = 32 about 34 are listed.
  __device__ void score_listed(int from, int to) const {
    constexpr int kInFlight = dim <= 64 ? 3 : 1;  // at 128 two spill: decode-paper-64k 0.745 ms instead of 0.738
    for (int place = from + threadIdx.x / 32; place < to; place += kSelectWarps * kInFlight) {
      Operand<dim> loaded[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i)
        if (place + kSelectWarps * i < to) loaded[i].load_keys(keys, shared.listed[place + kSelectWarps * i], window);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i)
        if (place + kSelectWarps * i < to) score_group(loaded[i], shared.listed[place + kSelectWarps * i]);
    }
  }

  // The first warp keeps the best of all listed groups' slots.
  __device__ void take_listed(int count, WarpTopK& best) const {
    for (int first = 0; first < count; first += kScoredGroups) {
      if (threadIdx.x == 0) shared.scored = 0;
      __syncthreads();
      score_listed(first, min(first + kScoredGroups, count));
      __syncthreads();
      for (int i = threadIdx.x; threadIdx.x < 32 && i - static_cast<int>(threadIdx.x) < shared.scored; i += 32)
        best.push(i < shared.scored, i < shared.scored ? shared.reaching[i] : 0);
      __syncthreads();
    }
  }
};

// Writes the k best of a warp's entries as the result of a query.
__device__ inline void write_neighbours(WarpTopK& best, const FewArguments& arguments, int64_t query, const Window& window) {
  float* const scores = arguments.scores + query * arguments.k;
  int32_t* const slots = arguments.slots + query * arguments.k;
  best.finish([&](int rank, uint64_t entry) {
    scores[rank] = entry_score(entry);
    slots[rank] = window.slot(entry_age(entry));
  });
  for (int rank = best.count + threadIdx.x % 32; rank < arguments.k; rank += 32) {
    scores[rank] = -INFINITY;
    slots[rank] = -1;
  }
}

// Grid (parts, queries). The K-th largest of 256 maxima of groups bounds the K-th best from below. The warps score the few
// groups that reach the bound, and the first warp keeps the K best of the slots that do. A query of one part is finished here.
// H100, whole searches of decode-d64-64k: 0.0568 ms; 0.0584 while one warp found the bound and each had one group under way;
// 0.0624 while it chose among all slots of the groups instead of those that reach the bound.
template <typename T, int dim>
__global__ void __launch_bounds__(kSelectThreads, 1) few_select(const FewArguments arguments) {
  __shared__ SelectShared shared;
  const int64_t query = blockIdx.y;
  const int begin = blockIdx.x * arguments.part_groups, end = min(begin + arguments.part_groups, arguments.groups);
  const GroupMaxima groups(arguments.maxima + query * arguments.groups, begin, end);

  const int in_row = static_cast<int>(query % arguments.queries_per_row), column = in_row % 8;
  const int64_t row = arguments.rows[query / arguments.queries_per_row];
  const Window window = visible_window(arguments.start, arguments.cursor, row, arguments.capacity, arguments.slot_count);
  const T* keys = static_cast<const T*>(arguments.keys) + row * arguments.slot_count * dim;
  // The eight queries that were multiplied together, so that products come out the same.
  QueryOperand<dim> queries;
  queries.template load<T>(arguments, query - column, min(8, arguments.queries_per_row - in_row + column));

  const float bound = lower_bound(groups, arguments.k, shared);
  const GroupScorer<T, dim> scorer{keys, window, queries, column, bound, shared};
  WarpTopK best(shared.buffer, arguments.k);
  const int reached = list_reaching(bound, shared, [&](auto visit) { groups.visit_all(visit); });
  if (reached <= kListedGroups) {
    scorer.take_listed(reached, best);
  } else {  // ties
    for (int from = begin; from < end; from += kListedGroups) {
      const int to = min(from + kListedGroups, end);
      scorer.take_listed(list_reaching(bound, shared, [&](auto visit) { groups.visit_range(from, to, visit); }), best);
    }
  }
  if (threadIdx.x >= 32) return;
  if (arguments.parts == 1) return write_neighbours(best, arguments, query, window);
  best.prune();
  uint64_t* const entries = arguments.entries + (query * arguments.parts + blockIdx.x) * arguments.k;
  for (int i = threadIdx.x; i < arguments.k; i += 32) entries[i] = i < best.count ? best.buffer[i] : 0;
}

// One warp a query.
__global__ void __launch_bounds__(128) few_merge(const FewArguments arguments, int64_t queries) {
  __shared__ uint64_t buffers[4][WarpTopK::kCapacity];
  const int lane = threadIdx.x % 32;
  const int64_t query = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  if (query >= queries) return;
  const int64_t row = arguments.rows[query / arguments.queries_per_row];
  const Window window = visible_window(arguments.start, arguments.cursor, row, arguments.capacity, arguments.slot_count);
  const int total = arguments.parts * arguments.k;
  const uint64_t* entries = arguments.entries + query * total;
  constexpr int kLoads = 8;
  WarpTopK best(buffers[threadIdx.x / 32], arguments.k);
  for (int base = 0; base < total; base += 32 * kLoads) {
    uint64_t entry[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) entry[i] = base + 32 * i + lane < total ? entries[base + 32 * i + lane] : 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) best.push(entry[i] != 0, entry[i]);
  }
  write_neighbours(best, arguments, query, window);
}

}  // namespace memtrans
