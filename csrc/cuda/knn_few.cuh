// Exact top-K for few queries a row (decoding): reads every visible key once, whatever the number of rows.
//
//   few_scores   query x key products on the tensor cores (mma m16n8k16, keys are the 16 rows), operands straight from
//                global memory: the order of the columns within a product is free, so each lane takes 16 contiguous bytes.
//                Scores go to a workspace, (B * G, queries, slots) fp32.
//   few_select   a block keeps the K best of one query, or of a part of its slots where there are few queries.
//   few_merge    a warp keeps the K best over the parts of one query.
// Shapes as in knn_scan.cuh; products are exact and accumulate in fp32. No query is ever redone here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "knn_select.cuh"

namespace memtrans {

constexpr int kFewThreads = 256;
constexpr int kFewTile = 128;   // keys of a block's step: 16 per warp
constexpr int kFewBlocks = 2;   // of few_scores on a multiprocessor
constexpr int kSelectThreads = 1024;  // of few_select
constexpr int kSmallestSelection = 8192;  // slots that are worth a block of few_select

struct FewArguments {
  const int64_t* rows;  // the first row of this launch
  const int64_t* start;
  const int64_t* cursor;
  const void* query;    // the first query of this launch
  const void* keys;
  float* products;      // (rows, queries_per_row, stride)
  uint64_t* entries;    // (rows * queries_per_row, parts, k)
  float* scores;
  int32_t* slots;
  int queries_per_row;
  int slot_count;
  int stride;           // slot_count rounded up to 4
  int parts;            // of few_select, part_slots entries each
  int part_slots;
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

// Grid (splits, rows, groups of 8 queries). Each warp takes 16 keys of every tile of its split.
template <typename T, int dim>
__global__ void __launch_bounds__(kFewThreads, dim > 128 ? 1 : kFewBlocks) few_scores(const FewArguments arguments) {
  constexpr int kParts = dim / 32;  // 16 bytes a lane, 4 lanes a row
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane / 4, part = lane % 4;
  const int64_t row = arguments.rows[blockIdx.y];
  const Window window = visible_window(arguments.start, arguments.cursor, row, arguments.capacity, arguments.slot_count);
  const T* keys = static_cast<const T*>(arguments.keys) + row * arguments.slot_count * dim + part * 8;

  const int first_query = blockIdx.z * 8;
  const int64_t query = static_cast<int64_t>(blockIdx.y) * arguments.queries_per_row + first_query;
  uint4 b[kParts];
#pragma unroll
  for (int i = 0; i < kParts; ++i)
    b[i] = first_query + quad < arguments.queries_per_row
               ? *reinterpret_cast<const uint4*>(static_cast<const T*>(arguments.query) + (query + quad) * dim + i * 32 + part * 8)
               : uint4{0, 0, 0, 0};

  const int tiles = (arguments.slot_count + kFewTile - 1) / kFewTile;
  float* products = arguments.products + query * arguments.stride;
  uint4 near[2][kParts], far[2][kParts];  // the keys at hand and those on their way
  const auto load = [&](uint4(&a)[kParts], uint4(&b)[kParts], int tile) {
    const int slot = tile * kFewTile + warp * 16 + quad;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const T* place = keys + static_cast<int64_t>(slot) * dim + i * 32;
      a[i] = window.shows(slot) ? __ldcs(reinterpret_cast<const uint4*>(place)) : uint4{0, 0, 0, 0};
      b[i] = window.shows(slot + 8) ? __ldcs(reinterpret_cast<const uint4*>(place + 8 * dim)) : uint4{0, 0, 0, 0};
    }
  };
  const auto multiply = [&](const uint4(&a)[kParts], const uint4(&c)[kParts], int tile) {
    float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      mma_m16n8k16<T>(d, a[i].x, c[i].x, a[i].y, c[i].y, b[i].x, b[i].y);
      mma_m16n8k16<T>(d, a[i].z, c[i].z, a[i].w, c[i].w, b[i].z, b[i].w);
    }
    const int slot = tile * kFewTile + warp * 16 + quad;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (first_query + part * 2 + e >= arguments.queries_per_row) continue;
      float* const target = products + static_cast<int64_t>(part * 2 + e) * arguments.stride + slot;
      if (slot < arguments.slot_count) target[0] = d[e];
      if (slot + 8 < arguments.slot_count) target[8] = d[2 + e];
    }
  };
  const int step = gridDim.x;
  load(near[0], far[0], blockIdx.x);
  for (int tile = blockIdx.x; tile < tiles; tile += 2 * step) {
    load(near[1], far[1], tile + step);
    multiply(near[0], far[0], tile);
    load(near[0], far[0], tile + 2 * step);
    if (tile + step < tiles) multiply(near[1], far[1], tile + step);
  }
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

// Grid (parts, queries). Every group of four threads has a best score; the K-th largest of these 256 bounds the K-th best
// from below, and the few slots that reach it meet in a shared list, in no particular order. Where ties make them many, each
// warp selects first. A query of one part is finished here.
template <typename T>
__global__ void __launch_bounds__(kSelectThreads, 1) few_select(const FewArguments arguments, int dim) {
  constexpr int kUnroll = 16;
  __shared__ uint64_t shared_list[WarpTopK::kCapacity];
  __shared__ uint32_t best_of_group[kSelectThreads / 4];
  __shared__ int survivors;
  static_assert(kSelectThreads / 4 == 256, "as many groups as the bound is taken from");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t query = blockIdx.y;
  const int64_t row = arguments.rows[query / arguments.queries_per_row];
  const Window window = visible_window(arguments.start, arguments.cursor, row, arguments.capacity, arguments.slot_count);
  const float* products = arguments.products + query * arguments.stride;
  const T* keys = static_cast<const T*>(arguments.keys) + row * arguments.slot_count * dim;
  const int begin = blockIdx.x * arguments.part_slots, end = min(begin + arguments.part_slots, window.length);  // ages

  // visit(score, age) for the thread's ages, kUnroll in flight
  const auto for_each = [&](auto visit) {
    for (int base = begin + threadIdx.x; base < end; base += kSelectThreads * kUnroll) {
      float scores[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int age = base + kSelectThreads * i;
        scores[i] = age < end ? products[window.slot(age)] : -INFINITY;
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) visit(scores[i], base + kSelectThreads * i);
    }
  };
  float largest = -INFINITY;
  for_each([&](float score, int) {
    if (score < INFINITY) largest = fmaxf(largest, score);  // an infinite one may belong to a key that does not count
  });
  largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
  if (lane % 4 == 0) best_of_group[threadIdx.x / 4] = largest > -INFINITY ? sortable(largest) : 0;
  if (threadIdx.x == 0) survivors = 0;
  __syncthreads();

  uint32_t values[8];
  int present = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    values[i] = best_of_group[lane + 32 * i];
    present += values[i] != 0;
  }
  present = __reduce_add_sync(kAllLanes, present);
  const float lowest = present < arguments.k ? -3.402823466e+38f : unsortable(kth_largest(values, arguments.k));
  const auto counts = [&](float score, int age) {
    if (score == INFINITY) return key_is_finite(keys + static_cast<int64_t>(window.slot(age)) * dim, dim);
    return score >= lowest;
  };
  for_each([&](float score, int age) {
    if (!(score >= lowest) || !counts(score, age)) return;
    const int place = atomicAdd(&survivors, 1);
    if (place < WarpTopK::kCapacity) shared_list[place] = make_entry(score, age);
  });
  __syncthreads();
  if (warp > 0 && survivors <= WarpTopK::kCapacity) return;

  WarpTopK best(shared_list, arguments.k);
  best.count = survivors;
  if (survivors > WarpTopK::kCapacity) {  // ties: one warp takes them all
    if (warp > 0) return;
    best.count = 0;
    for (int base = begin; base < end; base += 32) {
      const int age = base + lane;
      const float score = age < end ? products[window.slot(age)] : -INFINITY;
      best.push(counts(score, age), make_entry(score, age));
    }
  }
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
