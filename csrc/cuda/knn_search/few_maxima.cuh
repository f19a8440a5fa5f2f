// Exact top-K for few queries a row (decoding): reads every visible key once, whatever the number of rows.
//
//   few_maxima   query x key products on the tensor cores (mma m16n8k16, keys are the 16 rows), operands straight from
//                global memory: the order of the columns within a product is free, so each lane takes 16 contiguous
//                bytes. Of each group of 16 slots only the largest product goes to a workspace, (B * G, queries,
//                groups) fp32.
//
// few_select.cuh finds the neighbours from these. Shapes as in scan.cuh; products are exact and accumulate in fp32. No
// query is ever redone here. Queries of another dtype than the keys' are rounded to theirs as they are read.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/knn_search/search.h"
#include "cuda/knn_search/top_k.cuh"

namespace memtrans {

constexpr int kFewThreads = 256;
constexpr int kFewTile = 128;  // keys of a block's step: a group per warp
constexpr int kFewGroup = 16;  // keys of a tensor-core product
constexpr int kFewBlocks = 2;  // of few_maxima on a multiprocessor

struct FewArguments {
  const int64_t* rows;  // the first row of this launch
  const int64_t* start;
  const int64_t* cursor;
  const void* query;  // the first query of this launch
  QueryType query_type;
  const void* keys;
  float* maxima;      // (rows, queries_per_row, groups)
  uint64_t* entries;  // (rows * queries_per_row, parts, k)
  uint32_t* done;     // (rows * queries_per_row,): parts that few_select has finished; few_maxima clears them
  float* scores;
  int32_t* slots;
  int queries_per_row;
  int slot_count;
  int groups;  // of kFewGroup slots, the last one maybe of fewer
  int parts;   // of few_select, part_groups groups each
  int part_groups;
  int capacity;
  int k;
};

template <typename T>
__device__ inline void mma_m16n8k16(
    float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
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

// Every slot of a row, for keys that are loaded before the window is known.
struct AllSlots {
  int count;
  __device__ bool shows(int slot) const { return slot < count; }
};

// 16 keys, or 8 queries twice, as a lane holds them for a product: rows quad and quad + 8, every fourth 16 bytes of
// each.
template <int dim>
struct Operand {
  static constexpr int kParts = dim / 32;  // 16 bytes a lane, 4 lanes a row
  uint4 near[kParts], far[kParts];

  // Slots of a group that are not shown become zeros. Keys are read once, so they need not stay in a cache.
  template <typename T, typename Shown>
  __device__ void load_keys(const T* keys, int group, const Shown& window) {
    const int lane = threadIdx.x % 32, slot = group * kFewGroup + lane / 4;
    const T* place = keys + static_cast<int64_t>(slot) * dim + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      near[i] = window.shows(slot) ? __ldcs(reinterpret_cast<const uint4*>(place + i * 32)) : uint4{0, 0, 0, 0};
      far[i] =
          window.shows(slot + 8) ? __ldcs(reinterpret_cast<const uint4*>(place + 8 * dim + i * 32)) : uint4{0, 0, 0, 0};
    }
  }
};

// Eight numbers at an address of 16 bytes' alignment, as T; in loads of 16 bytes.
template <typename T, typename From>
__device__ inline uint4 rounded_eight(const From* place) {
  alignas(16) From numbers[8];
#pragma unroll
  for (unsigned i = 0; i < sizeof numbers / sizeof(uint4); ++i)
    reinterpret_cast<uint4*>(numbers)[i] = reinterpret_cast<const uint4*>(place)[i];
  alignas(16) T rounded[8];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    rounded[i] = static_cast<T>(static_cast<float>(numbers[i]));
  return *reinterpret_cast<const uint4*>(rounded);
}

// Eight numbers of queries of any type, as T: together, since number by number takes longer.
template <typename T>
__device__ inline uint4 eight_of(const void* queries, int64_t index, QueryType type) {
  using Other = std::conditional_t<std::is_same_v<T, __half>, __nv_bfloat16, __half>;
  if (type == kSameAsKeys)
    return *reinterpret_cast<const uint4*>(static_cast<const T*>(queries) + index);
  if (type == kFloat32)
    return rounded_eight<T>(static_cast<const float*>(queries) + index);
  return rounded_eight<T>(static_cast<const Other*>(queries) + index);
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
      part[i] = quad < present
                    ? eight_of<T>(arguments.query, (first + quad) * dim + i * 32 + lane % 4 * 8, arguments.query_type)
                    : uint4{0, 0, 0, 0};
  }
};

// Scores of a group, -inf where the window does not show a slot. A lane has those of slots quad (0, 1) and quad + 8 (2,
// 3), with queries 2 * (lane % 4) (0, 2) and the one after it (1, 3).
template <typename T, int dim>
__device__ inline void group_scores(
    float (&d)[4], const Operand<dim>& keys, const QueryOperand<dim>& query, int group, const Window& window) {
  d[0] = d[1] = d[2] = d[3] = 0.0f;
#pragma unroll
  for (int i = 0; i < dim / 32; ++i) {
    mma_m16n8k16<T>(d, keys.near[i].x, keys.far[i].x, keys.near[i].y, keys.far[i].y, query.part[i].x, query.part[i].y);
    mma_m16n8k16<T>(d, keys.near[i].z, keys.far[i].z, keys.near[i].w, keys.far[i].w, query.part[i].z, query.part[i].w);
  }
  const int slot = group * kFewGroup + threadIdx.x % 32 / 4;
  if (!window.shows(slot))
    d[0] = d[1] = -INFINITY;
  if (!window.shows(slot + 8))
    d[2] = d[3] = -INFINITY;
}

// Grid (splits, rows, groups of 8 queries). Each warp takes a group of every tile of its split. The first keys are on
// their way before the window is known, which waits for two more loads.
template <typename T, int dim>
__global__ void __launch_bounds__(kFewThreads, dim > 128 ? 1 : kFewBlocks) few_maxima(const FewArguments arguments) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = arguments.rows[blockIdx.y];
  const T* keys = static_cast<const T*>(arguments.keys) + row * arguments.slot_count * dim;
  constexpr int kWarps = kFewThreads / 32;
  static_assert(kWarps * kFewGroup == kFewTile, "a group per warp");
  const int first = blockIdx.x * kWarps + warp, step = gridDim.x * kWarps;  // groups of this warp
  Operand<dim> here, next;                                                  // the keys at hand and those on their way
  here.load_keys(keys, first, AllSlots{arguments.slot_count});
  const Window window =
      visible_window(arguments.start, arguments.cursor, row, arguments.capacity, arguments.slot_count);

  const int first_query = blockIdx.z * 8, present = min(8, arguments.queries_per_row - first_query);
  const int64_t query = static_cast<int64_t>(blockIdx.y) * arguments.queries_per_row + first_query;
  QueryOperand<dim> queries;
  queries.template load<T>(arguments, query, present);
  float* const maxima = arguments.maxima + query * arguments.groups;
  if (blockIdx.x == 0 && static_cast<int>(threadIdx.x) < present)
    arguments.done[query + threadIdx.x] = 0;

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
  for (int group = first; group < arguments.groups; group += 2 * step) {
    next.load_keys(keys, group + step, window);
    keep_largest(here, group);
    here.load_keys(keys, group + 2 * step, window);
    if (group + step < arguments.groups)
      keep_largest(next, group + step);
  }
}

}  // namespace memtrans
