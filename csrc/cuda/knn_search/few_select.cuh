// The last steps of the few-query search: from the maxima of groups that few_maxima left to the K best slots.
//
//   few_select   a block keeps the K best of one query, or of a part of its groups where there are few queries. One of
//   the
//                K best keys lies in one of the K best groups; the products of these few are made again, bit for bit.
//   few_merge    a warp keeps the K best over the parts of one query of knn_scan.
#pragma once

#include "cuda/knn_search/few_maxima.cuh"

namespace memtrans {

constexpr int kSelectThreads = 512;  // of few_select
constexpr int kSelectWarps = kSelectThreads / 32;
constexpr int kSmallestSelection = 8192;  // slots that are worth a block of few_select
constexpr int kHeldMaxima = 8;  // of a thread, in registers: those of 65,536 slots are read once, what is more twice
constexpr int kListedGroups = 1024;  // groups that it lists at a time
constexpr int kScoredGroups = 192;   // of those, groups whose slots it scores at a time: all of them, but for ties
constexpr int kRankedEntries = WarpTopK::kCapacity;  // entries that are worth ranking by comparing all pairs

struct Extremes {
  uint32_t smallest, largest;
};

struct SelectShared {
  uint64_t buffer[kRankedEntries];
  uint64_t reaching[kScoredGroups * kFewGroup];  // entries of the slots that reach the bound, `scored` of them
  int listed[kListedGroups];                     // groups that reach the bound, `found` of them
  int found, scored, kept;
  Extremes of_maxima, of_scores, of_groups, of_ages;
  int count[3];  // of the block, taken in turns

  __device__ void reset() {
    found = scored = kept = 0;
    of_maxima = of_scores = of_groups = of_ages = {0xFFFFFFFFu, 0};
  }
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
      for (int i = 0; i < kHeldMaxima; ++i)
        visit(largest[i], base + kSelectThreads * i);
    }
  }

  template <typename Visit>
  __device__ void visit_all(Visit visit) const {
#pragma unroll
    for (int i = 0; i < kHeldMaxima; ++i)
      visit(held[i], begin + threadIdx.x + kSelectThreads * i);
    visit_range(begin + kSelectThreads * kHeldMaxima, end, visit);
  }
};

// A value that k of the block's threads' values reach and few more, but for ties; 0, which stands for no value, if
// fewer do.
__device__ inline uint32_t reached_by_block(uint32_t mine, int k, Extremes& extremes) {
  const uint32_t smallest = __reduce_min_sync(kAllLanes, mine ? mine : 0xFFFFFFFFu),
                 largest = __reduce_max_sync(kAllLanes, mine);
  if (threadIdx.x % 32 == 0) {
    atomicMin(&extremes.smallest, smallest);
    atomicMax(&extremes.largest, largest);
  }
  const int present = __syncthreads_count(mine != 0);
  if (present < k)
    return 0;
  return reached_by(k, kBoundSlack, extremes.smallest, extremes.largest, present, [&](uint32_t value) {
    return __syncthreads_count(mine >= value);
  });
}

// What K of the groups' slots reach, and few more: of the threads' groups' largest maxima, each of some groups.
__device__ inline float lower_bound(const GroupMaxima& groups, int k, SelectShared& shared) {
  float largest = -INFINITY;
  groups.visit_all([&](float score, int) {
    if (score < INFINITY)
      largest = fmaxf(largest, score);  // an infinite one may belong to a key that does not count
  });
  const uint32_t bound = reached_by_block(largest > -INFINITY ? sortable(largest) : 0, k, shared.of_maxima);
  return bound == 0 ? kLowest : unsortable(bound);
}

// Lists the visited groups that reach the bound, in no particular order, and returns how many there are: maybe more
// than fit.
template <typename VisitGroups>
__device__ inline int list_reaching(float bound, SelectShared& shared, VisitGroups visit_groups) {
  visit_groups([&](float score, int group) {
    if (!(score >= bound))
      return;
    const int place = atomicAdd(&shared.found, 1);
    if (place < kListedGroups)
      shared.listed[place] = group;
  });
  __syncthreads();
  return shared.found;
}

// A value that k of the groups' values reach and few more, but for ties; 0, which stands for no value, if fewer do.
// value_of(largest score, group).
template <typename ValueOf>
__device__ inline uint32_t reached_by_groups(
    const GroupMaxima& groups, int k, Extremes& extremes, SelectShared& shared, ValueOf value_of) {
  __syncthreads();
  if (threadIdx.x < 3)
    shared.count[threadIdx.x] = 0;
  __syncthreads();
  int turn = 0;
  const auto in_block = [&](int mine) {
    mine = __reduce_add_sync(kAllLanes, mine);
    if (threadIdx.x % 32 == 0)
      atomicAdd(&shared.count[turn], mine);
    __syncthreads();
    const int total = shared.count[turn];
    turn = (turn + 1) % 3;
    if (threadIdx.x == 0)
      shared.count[(turn + 1) % 3] = 0;  // the next but one: others may still read the last one
    return total;
  };
  uint32_t smallest = 0xFFFFFFFFu, largest = 0;
  int present = 0;
  groups.visit_all([&](float score, int group) {
    const uint32_t value = value_of(score, group);
    if (value == 0)
      return;
    smallest = min(smallest, value);
    largest = max(largest, value);
    ++present;
  });
  atomicMin(&extremes.smallest, smallest);
  atomicMax(&extremes.largest, largest);
  present = in_block(present);
  if (present < k)
    return 0;
  return reached_by(k, kBoundSlack, extremes.smallest, extremes.largest, present, [&](uint32_t value) {
    int reached = 0;
    groups.visit_all([&](float score, int group) { reached += value_of(score, group) >= value; });
    return in_block(reached);
  });
}

// Lists the groups that may hold one of the K best slots, however many reach the bound: of those whose largest score is
// the K-th only the oldest matter, since each has a slot that wins over all slots of younger ones. The oldest group of
// all may also hold the youngest slots, so it does not count as one of them. Returns how many there are and raises the
// bound.
__device__ inline int list_needed(
    const GroupMaxima& groups, const Window& window, int group_count, int k, float& bound, SelectShared& shared) {
  __syncthreads();
  if (threadIdx.x == 0)
    shared.found = 0;
  const uint32_t kth = reached_by_groups(groups, k, shared.of_groups, shared, [](float score, int) {
    return score > -INFINITY && score < INFINITY ? sortable(score)
                                                 : 0;  // an infinite one may be of a key that does not count
  });
  if (kth != 0)
    bound = unsortable(kth);
  const auto age_of = [&](int group) {
    const int after_first = group - window.first / kFewGroup;
    return static_cast<uint32_t>(after_first >= 0 ? after_first : after_first + group_count);
  };
  const uint32_t oldest = reached_by_groups(groups, k, shared.of_ages, shared, [&](float score, int group) {
    return score == bound && age_of(group) > 0 ? ~age_of(group) : 0;
  });
  return list_reaching(bound, shared, [&](auto visit) {
    groups.visit_all([&](float score, int group) {
      if (score != bound || age_of(group) == 0 || ~age_of(group) >= oldest)
        visit(score, group);
    });
  });
}

// Scores listed groups once more, a group a warp, for one of the queries that were multiplied together.
template <typename T, int dim>
struct GroupScorer {
  const T* keys;  // of the row
  Window window;
  const QueryOperand<dim>& queries;
  int column;  // of the query among them
  float bound;
  SelectShared& shared;

  // Adds the slots of a group that reach the bound to those of the other warps' groups, in no particular order.
  __device__ void score_group(const Operand<dim>& loaded, int group) const {
    const int lane = threadIdx.x % 32;
    float d[4];
    group_scores<T>(d, loaded, queries, group, window);
    if (lane % 4 != column / 2)
      return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int slot = group * kFewGroup + lane / 4 + 8 * half;
      const float score = column % 2 ? d[2 * half + 1] : d[2 * half];
      if (!(score >= bound))
        continue;
      if (score == INFINITY && !key_is_finite(keys + static_cast<int64_t>(slot) * dim, dim))
        continue;
      shared.reaching[atomicAdd(&shared.scored, 1)] = make_entry(score, window.age(slot));
    }
  }

  // The listed groups [from, to), some of them under way at once: with K = 32 about 37 are listed.
  __device__ void score_listed(int from, int to) const {
    constexpr int kInFlight = dim <= 64 ? 3 : 1;  // at 128 two spill
    for (int place = from + threadIdx.x / 32; place < to; place += kSelectWarps * kInFlight) {
      Operand<dim> loaded[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i)
        if (place + kSelectWarps * i < to)
          loaded[i].load_keys(keys, shared.listed[place + kSelectWarps * i], window);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i)
        if (place + kSelectWarps * i < to)
          score_group(loaded[i], shared.listed[place + kSelectWarps * i]);
    }
  }

  // The first warp keeps the best of the listed groups [0, count), however many slots reach the bound.
  __device__ void take_listed(int count, WarpTopK& best) const {
    for (int first = 0; first < count; first += kScoredGroups) {
      if (threadIdx.x == 0)
        shared.scored = 0;
      __syncthreads();
      score_listed(first, min(first + kScoredGroups, count));
      __syncthreads();
      for (int i = threadIdx.x; threadIdx.x < 32 && i - static_cast<int>(threadIdx.x) < shared.scored; i += 32)
        best.push(i < shared.scored, i < shared.scored ? shared.reaching[i] : 0);
      __syncthreads();
    }
  }
};

// Where the neighbours of a query go, or the entries of one part of its groups. An entry of 0 is none.
struct SelectResult {
  const FewArguments& arguments;
  Window window;
  int64_t query;
  uint64_t* entries;  // of the part; null for a query of one part

  __device__ void put(int rank, uint64_t entry) const {
    if (entries != nullptr) {
      entries[rank] = entry;
      return;
    }
    arguments.scores[query * arguments.k + rank] = entry ? entry_score(entry) : -INFINITY;
    arguments.slots[query * arguments.k + rank] = entry ? window.slot(entry_age(entry)) : -1;
  }

  // The k best that a warp kept.
  __device__ void put_best(WarpTopK& best) const {
    best.finish([&](int rank, uint64_t entry) { put(rank, entry); });
    for (int rank = best.count + threadIdx.x % 32; rank < arguments.k; rank += 32)
      put(rank, 0);
  }
};

// Writes the k best of so many entries, an entry a warp.
__device__ inline void put_ranked(const uint64_t* entries, int count, const SelectResult& result) {
  const int lane = threadIdx.x % 32, k = result.arguments.k;
  for (int number = threadIdx.x / 32; number < count; number += kSelectWarps) {
    const uint64_t entry = entries[number];
    int rank = 0;
    for (int other = lane; other < count; other += 32)
      rank += entries[other] > entry;
    rank = __reduce_add_sync(kAllLanes, rank);
    if (lane == 0 && rank < k)
      result.put(rank, entry);
  }
  for (int rank = count + threadIdx.x; rank < k; rank += kSelectThreads)
    result.put(rank, 0);
}

// Writes the k best of the scored slots, unless more of them tie than can be ranked here; returns whether it did. Keys
// of one text lie side by side and are alike, so that nearly all slots of the listed groups may reach the bound: a
// second one, of the slots themselves, leaves few.
__device__ inline bool put_scored(SelectShared& shared, const SelectResult& result) {
  const int scored = shared.scored;
  if (scored <= kRankedEntries) {
    put_ranked(shared.reaching, scored, result);
    return true;
  }
  uint32_t largest = 0;
  for (int i = threadIdx.x; i < scored; i += kSelectThreads)
    largest = max(largest, static_cast<uint32_t>(shared.reaching[i] >> 32));
  const uint32_t bound = reached_by_block(largest, result.arguments.k, shared.of_scores);
  for (int i = threadIdx.x; i < scored; i += kSelectThreads) {
    const uint64_t entry = shared.reaching[i];
    if (static_cast<uint32_t>(entry >> 32) < bound)
      continue;
    const int place = atomicAdd(&shared.kept, 1);
    if (place < kRankedEntries)
      shared.buffer[place] = entry;
  }
  __syncthreads();
  if (shared.kept > kRankedEntries)
    return false;
  put_ranked(shared.buffer, shared.kept, result);
  return true;
}

// Any number of groups and of slots that reach the bound: ties. Groups that are listed already take one round.
template <typename T, int dim>
__device__ inline void select_slowly(
    const GroupScorer<T, dim>& scorer, const GroupMaxima& groups, int listed, const SelectResult& result) {
  SelectShared& shared = scorer.shared;
  WarpTopK best(shared.buffer, result.arguments.k);
  const bool all_listed = listed <= kListedGroups;
  for (int from = groups.begin; from < groups.end; from += all_listed ? groups.end : kListedGroups) {
    __syncthreads();
    if (threadIdx.x == 0)
      shared.found = 0;
    __syncthreads();
    const int to = min(from + kListedGroups, groups.end);
    if (!all_listed)
      listed = list_reaching(scorer.bound, shared, [&](auto visit) { groups.visit_range(from, to, visit); });
    scorer.take_listed(listed, best);
  }
  if (threadIdx.x < 32)
    result.put_best(best);
}

// A warp keeps the K best over the parts of a query.
__device__ inline void merge_parts(
    const FewArguments& arguments, const Window& window, int64_t query, uint64_t* buffer) {
  constexpr int kLoads = 8;
  const int total = arguments.parts * arguments.k, lane = threadIdx.x % 32;
  const uint64_t* entries = arguments.entries + query * total;
  WarpTopK best(buffer, arguments.k);
  for (int base = 0; base < total; base += 32 * kLoads) {
    uint64_t entry[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      entry[i] = base + 32 * i + lane < total ? __ldcg(entries + base + 32 * i + lane) : 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      best.push(entry[i] != 0, entry[i]);
  }
  SelectResult{arguments, window, query, nullptr}.put_best(best);
}

// Whether the block is the last one of a query's parts to come here. What the others wrote before can be read then.
__device__ inline bool is_last_part(const FewArguments& arguments, int64_t query, SelectShared& shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0)
    shared.found = atomicAdd(arguments.done + query, 1u) == static_cast<uint32_t>(arguments.parts - 1);
  __syncthreads();
  __threadfence();
  return shared.found;
}

// Grid (parts, queries). A bound from below on the K-th best is what about K of 512 maxima of groups reach. The warps
// score the few groups that reach it, which takes longest, and rank the slots that do: all of them rank, since one warp
// that kept the K best took longer. The last block of a query that has several parts merges them.
template <typename T, int dim>
__global__ void __launch_bounds__(kSelectThreads, 1) few_select(const FewArguments arguments) {
  __shared__ SelectShared shared;
  const int64_t query = blockIdx.y;
  const int begin = blockIdx.x * arguments.part_groups, end = min(begin + arguments.part_groups, arguments.groups);
  const GroupMaxima groups(arguments.maxima + query * arguments.groups, begin, end);
  if (threadIdx.x == 0)
    shared.reset();

  const int in_row = static_cast<int>(query % arguments.queries_per_row), column = in_row % 8;
  // The eight queries that were multiplied together, so that products come out the same.
  QueryOperand<dim> queries;
  queries.template load<T>(arguments, query - column, min(8, arguments.queries_per_row - in_row + column));
  const int64_t row = arguments.rows[query / arguments.queries_per_row];
  const Window window =
      visible_window(arguments.start, arguments.cursor, row, arguments.capacity, arguments.slot_count);
  const T* keys = static_cast<const T*>(arguments.keys) + row * arguments.slot_count * dim;
  __syncthreads();

  float bound = lower_bound(groups, arguments.k, shared);
  int listed = list_reaching(bound, shared, [&](auto visit) { groups.visit_all(visit); });
  if (listed > kScoredGroups)
    listed = list_needed(groups, window, arguments.groups, arguments.k, bound, shared);
  const GroupScorer<T, dim> scorer{keys, window, queries, column, bound, shared};
  uint64_t* const entries = arguments.entries + (query * arguments.parts + blockIdx.x) * arguments.k;
  const SelectResult result{arguments, window, query, arguments.parts > 1 ? entries : nullptr};
  bool selected = false;
  if (listed <= kScoredGroups) {
    scorer.score_listed(0, listed);
    __syncthreads();
    selected = put_scored(shared, result);
  }
  if (!selected)
    select_slowly(scorer, groups, listed, result);
  if (arguments.parts > 1 && is_last_part(arguments, query, shared) && threadIdx.x < 32)
    merge_parts(arguments, window, query, shared.buffer);
}

}  // namespace memtrans
