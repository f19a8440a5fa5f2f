// Exact top-K for few queries a row (decoding): reads every visible key once, whatever the number of rows.
//
//   few_maxima   query x key products on the tensor cores (mma m16n8k16, keys are the 16 rows), operands straight from
//                global memory: the order of the columns within a product is free, so each lane takes 16 contiguous bytes.
//                Of each group of 16 slots only the largest product goes to a workspace, (B * G, queries, groups) fp32.
//   few_select   a block keeps the K best of one query, or of a part of its groups where there are few queries. One of the
//                K best keys lies in one of the K best groups; the products of these few are made again, bit for bit.
//   few_merge    a warp keeps the K best over the parts of one query.
// Shapes as in knn_scan.cuh; products are exact and accumulate in fp32. No query is ever redone here. Queries of another
// dtype than the keys' are rounded to theirs as they are read.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "knn_search.h"
#include "knn_select.cuh"

namespace memtrans {

constexpr int kFewThreads = 256;
constexpr int kFewTile = 128;   // keys of a block's step: a group per warp
constexpr int kFewGroup = 16;   // keys of a tensor-core product
constexpr int kFewBlocks = 2;   // of few_maxima on a multiprocessor
constexpr int kSelectThreads = 512;  // of few_select
constexpr int kSelectWarps = kSelectThreads / 32;
constexpr int kSmallestSelection = 8192;  // slots that are worth a block of few_select
constexpr int kHeldMaxima = 8;  // of a thread, in registers: those of 65,536 slots are read once, what is more twice
constexpr int kBoundGroups = 256;  // maxima that few_select takes its bound from
constexpr int kListedGroups = 1024;  // groups that it lists at a time
constexpr int kScoredGroups = 48;  // of those, groups whose slots it scores at a time

struct FewArguments {
  const int64_t* rows;  // the first row of this launch
  const int64_t* start;
  const int64_t* cursor;
  const void* query;    // the first query of this launch
  QueryType query_type;
  const void* keys;
  float* maxima;        // (rows, queries_per_row, groups)
  uint64_t* entries;    // (rows * queries_per_row, parts, k)
  float* scores;
  int32_t* slots;
  int queries_per_row;
  int slot_count;
  int groups;           // of kFewGroup slots, the last one maybe of fewer
  int parts;            // of few_select, part_groups groups each
  int part_groups;
  int capacity;
  int k;
};

template <typename T>
__device__ inline void mma_m16n8k16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 16 keys, or 8 queries twice, as a lane holds them for a product: rows quad and quad + 8, every fourth 16 bytes of each.
template <int dim>
struct Operand {
  static constexpr int kParts = dim / 32;  // 16 bytes a lane, 4 lanes a row
  uint4 near[kParts], far[kParts];

  // Slots of a group that a window does not show become zeros. Keys are read once, so they need not stay in a cache.
  template <typename T>
  __device__ void load_keys(const T* keys, int group, const Window& window) {
    const int lane = threadIdx.x % 32, slot = group * kFewGroup + lane / 4;
    const T* place = keys + static_cast<int64_t>(slot) * dim + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      near[i] = window.shows(slot) ? __ldcs(reinterpret_cast<const uint4*>(place + i * 32)) : uint4{0, 0, 0, 0};
      far[i] = window.shows(slot + 8) ? __ldcs(reinterpret_cast<const uint4*>(place + 8 * dim + i * 32)) : uint4{0, 0, 0, 0};
    }
  }
};

// Eight numbers of queries of any type, as T.
template <typename T>
__device__ inline uint4 eight_of(const void* queries, int64_t index, QueryType type) {
  using Other = std::conditional_t<std::is_same_v<T, __half>, __nv_bfloat16, __half>;
  if (type == kSameAsKeys) return *reinterpret_cast<const uint4*>(static_cast<const T*>(queries) + index);
  alignas(16) T values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    values[i] = static_cast<T>(type == kFloat32 ? static_cast<const float*>(queries)[index + i]
                                                : static_cast<float>(static_cast<const Other*>(queries)[index + i]));
  return *reinterpret_cast<const uint4*>(values);
}

// Up to 8 queries of a row from number `first` on, zeros for those that there are not.
template <int dim>
struct QueryOperand {
  uint4 part[dim / 32];

  template <typename T>
  __device__ void load(const FewArguments& arguments, int64_t first, int present) {
    const int lane = threadIdx.x % 32, quad = lane / 4;
#pragma unroll
    for (int i = 0; i < dim / 32; ++i)
      part[i] = quad < present ? eight_of<T>(arguments.query, (first + quad) * dim + i * 32 + lane % 4 * 8, arguments.query_type)
                               : uint4{0, 0, 0, 0};
  }
};

// Scores of a group, -inf where the window does not show a slot. A lane has those of slots quad (0, 1) and quad + 8 (2, 3),
// with queries 2 * (lane % 4) (0, 2) and the one after it (1, 3).
template <typename T, int dim>
__device__ inline void group_scores(float (&d)[4], const Operand<dim>& keys, const QueryOperand<dim>& query, int group,
                                    const Window& window) {
  d[0] = d[1] = d[2] = d[3] = 0.0f;
#pragma unroll
  for (int i = 0; i < dim / 32; ++i) {
    mma_m16n8k16<T>(d, keys.near[i].x, keys.far[i].x, keys.near[i].y, keys.far[i].y, query.part[i].x, query.part[i].y);
    mma_m16n8k16<T>(d, keys.near[i].z, keys.far[i].z, keys.near[i].w, keys.far[i].w, query.part[i].z, query.part[i].w);
  }
  const int slot = group * kFewGroup + threadIdx.x % 32 / 4;
  if (!window.shows(slot)) d[0] = d[1] = -INFINITY;
  if (!window.shows(slot + 8)) d[2] = d[3] = -INFINITY;
}

// Grid (splits, rows, groups of 8 queries). Each warp takes a group of every tile of its split.
template <typename T, int dim>
__global__ void __launch_bounds__(kFewThreads, dim > 128 ? 1 : kFewBlocks) few_maxima(const FewArguments arguments) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = arguments.rows[blockIdx.y];
  const Window window = visible_window(arguments.start, arguments.cursor, row, arguments.capacity, arguments.slot_count);
  const T* keys = static_cast<const T*>(arguments.keys) + row * arguments.slot_count * dim;

  const int first_query = blockIdx.z * 8, present = min(8, arguments.queries_per_row - first_query);
  const int64_t query = static_cast<int64_t>(blockIdx.y) * arguments.queries_per_row + first_query;
  QueryOperand<dim> queries;
  queries.template load<T>(arguments, query, present);
  float* const maxima = arguments.maxima + query * arguments.groups;

  const auto keep_largest = [&](const Operand<dim>& loaded, int group) {
    float d[4];
    group_scores<T>(d, loaded, queries, group, window);
    float largest[2] = {fmaxf(fmaxf(-INFINITY, d[0]), d[2]), fmaxf(fmaxf(-INFINITY, d[1]), d[3])};  // none is NaN
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int other = 4; other < 32; other *= 2)
        largest[e] = fmaxf(largest[e], __shfl_xor_sync(kAllLanes, largest[e], other));
      const int column = lane * 2 + e;
      if (column < present && group < arguments.groups)
        maxima[static_cast<int64_t>(column) * arguments.groups + group] = largest[e];
    }
  };
  constexpr int kWarps = kFewThreads / 32;
  static_assert(kWarps * kFewGroup == kFewTile, "a group per warp");
  const int step = gridDim.x * kWarps;
  Operand<dim> here, next;  // the keys at hand and those on their way
  here.load_keys(keys, blockIdx.x * kWarps + warp, window);
  for (int group = blockIdx.x * kWarps + warp; group < arguments.groups; group += 2 * step) {
    next.load_keys(keys, group + step, window);
    keep_largest(here, group);
    here.load_keys(keys, group + 2 * step, window);
    if (group + step < arguments.groups) keep_largest(next, group + step);
  }
}

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
  __shared__ uint64_t buffer[WarpTopK::kCapacity], reaching[kScoredGroups * kFewGroup];
  __shared__ alignas(16) uint32_t bests[kBoundGroups];
  __shared__ uint32_t bound;
  __shared__ int listed[kListedGroups], found, scored;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t query = blockIdx.y, in_launch = query / arguments.queries_per_row;
  const float* maxima = arguments.maxima + query * arguments.groups;
  const int begin = blockIdx.x * arguments.part_groups, end = min(begin + arguments.part_groups, arguments.groups);

  const auto load_maxima = [&](float (&largest)[kHeldMaxima], int group, int to) {
#pragma unroll
    for (int i = 0; i < kHeldMaxima; ++i)
      largest[i] = group + kSelectThreads * i < to ? maxima[group + kSelectThreads * i] : -INFINITY;
  };
  float held[kHeldMaxima];  // under way while the window is looked up
  load_maxima(held, begin + threadIdx.x, end);

  const int in_row = static_cast<int>(query % arguments.queries_per_row), column = in_row % 8;
  const int64_t row = arguments.rows[in_launch];
  const Window window = visible_window(arguments.start, arguments.cursor, row, arguments.capacity, arguments.slot_count);
  const T* keys = static_cast<const T*>(arguments.keys) + row * arguments.slot_count * dim;
  // The eight queries that were multiplied together, so that products come out the same.
  QueryOperand<dim> queries;
  queries.template load<T>(arguments, query - column, min(8, arguments.queries_per_row - in_row + column));

  // visit(largest score, group) for the thread's groups in [from, to); for all of them
  const auto visit_range = [&](int from, int to, auto visit) {
    for (int base = from + threadIdx.x; base < to; base += kSelectThreads * kHeldMaxima) {
      float largest[kHeldMaxima];
      load_maxima(largest, base, to);
#pragma unroll
      for (int i = 0; i < kHeldMaxima; ++i) visit(largest[i], base + kSelectThreads * i);
    }
  };
  const auto visit_all = [&](auto visit) {
#pragma unroll
    for (int i = 0; i < kHeldMaxima; ++i) visit(held[i], begin + threadIdx.x + kSelectThreads * i);
    visit_range(begin + kSelectThreads * kHeldMaxima, end, visit);
  };

  if (threadIdx.x < kBoundGroups) bests[threadIdx.x] = 0;
  if (threadIdx.x == 0) bound = 0xFFFFFFFFu;
  __syncthreads();
  float largest = -INFINITY;
  visit_all([&](float score, int) {
    if (score < INFINITY) largest = fmaxf(largest, score);  // an infinite one may belong to a key that does not count
  });
  if (largest > -INFINITY) atomicMax(&bests[threadIdx.x % kBoundGroups], sortable(largest));
  __syncthreads();
  const uint32_t of_warp = kth_largest_bound(bests, arguments.k);
  if (lane == 0) atomicMin(&bound, of_warp);
  __syncthreads();
  const float lowest = bound == 0 ? -3.402823466e+38f : unsortable(bound);  // 0: of fewer than K groups

  // Lists the groups that reach the bound, in no particular order, and returns how many there are.
  const auto list = [&](auto visit_groups) {
    __syncthreads();
    if (threadIdx.x == 0) found = 0;
    __syncthreads();
    visit_groups([&](float score, int group) {
      if (!(score >= lowest)) return;
      const int place = atomicAdd(&found, 1);
      if (place < kListedGroups) listed[place] = group;
    });
    __syncthreads();
    return found;
  };
  // Adds the slots of a group that reach the bound to those of the other warps' groups, in no particular order.
  const auto score_group = [&](const Operand<dim>& loaded, int group) {
    float d[4];
    group_scores<T>(d, loaded, queries, group, window);
    if (lane % 4 != column / 2) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int slot = group * kFewGroup + lane / 4 + 8 * half;
      const float score = column % 2 ? d[2 * half + 1] : d[2 * half];
      if (!(score >= lowest)) continue;
      if (score == INFINITY && !key_is_finite(keys + static_cast<int64_t>(slot) * dim, dim)) continue;
      reaching[atomicAdd(&scored, 1)] = make_entry(score, window.age(slot));
    }
  };
  // The listed groups [from, to), some of them under way at once: with K = 32 about 34 are listed.
  const auto score_listed = [&](int from, int to) {
    constexpr int kInFlight = dim <= 64 ? 3 : dim <= 128 ? 2 : 1;
    for (int place = from + warp; place < to; place += kSelectWarps * kInFlight) {
      Operand<dim> loaded[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i)
        if (place + kSelectWarps * i < to) loaded[i].load_keys(keys, listed[place + kSelectWarps * i], window);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i)
        if (place + kSelectWarps * i < to) score_group(loaded[i], listed[place + kSelectWarps * i]);
    }
  };
  WarpTopK best(buffer, arguments.k);
  const auto take_listed = [&](int count) {
    for (int first = 0; first < count; first += kScoredGroups) {
      if (threadIdx.x == 0) scored = 0;
      __syncthreads();
      score_listed(first, min(first + kScoredGroups, count));
      __syncthreads();
      for (int i = lane; warp == 0 && i - lane < scored; i += 32) best.push(i < scored, i < scored ? reaching[i] : 0);
      __syncthreads();
    }
  };
  const int reached = list(visit_all);
  if (reached <= kListedGroups) {
    take_listed(reached);
  } else {  // ties
    for (int from = begin; from < end; from += kListedGroups)
      take_listed(list([&](auto visit) { visit_range(from, min(from + kListedGroups, end), visit); }));
  }
  if (warp > 0) return;
  if (arguments.parts == 1) return write_neighbours(best, arguments, query, window);
  best.prune();
  uint64_t* const entries = arguments.entries + (query * arguments.parts + blockIdx.x) * arguments.k;
  for (int i = lane; i < arguments.k; i += 32) entries[i] = i < best.count ? best.buffer[i] : 0;
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
