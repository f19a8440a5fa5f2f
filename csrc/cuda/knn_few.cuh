// Exact top-K for few queries a row (decoding): reads every visible key once, whatever the number of rows.
//
//   few_scores   query x key products on the tensor cores (mma m16n8k16, keys are the 16 rows), operands straight from
//                global memory: the order of the columns within a product is free, so each lane takes 16 contiguous bytes.
//                Scores go to a workspace, (B * G, queries, slots) fp32.
//   few_select   a block keeps the K best of kFewPart slots of one query.
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
constexpr int kFewPart = 8192;  // slots of one few_select block

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
  int parts;
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

// Grid (parts, queries). Every thread's best slot bounds the K-th best from below; few slots reach the K-th largest of these
// and meet in a shared list, in no particular order. Where ties make them many, each warp selects first.
template <typename T>
__global__ void __launch_bounds__(kFewThreads) few_select(const FewArguments arguments, int dim) {
  constexpr int kVectors = kFewPart / 4 / kFewThreads;
  __shared__ uint64_t buffers[8][WarpTopK::kCapacity];
  __shared__ uint32_t best_of_thread[kFewThreads];
  __shared__ int counts[8], survivors;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t query = blockIdx.y;
  const int64_t row = arguments.rows[query / arguments.queries_per_row];
  const Window window = visible_window(arguments.start, arguments.cursor, row, arguments.capacity, arguments.slot_count);
  const float* products = arguments.products + query * arguments.stride;
  const T* keys = static_cast<const T*>(arguments.keys) + row * arguments.slot_count * dim;
  const auto slot_of = [&](int i) { return blockIdx.x * kFewPart + (i * kFewThreads + threadIdx.x) * 4; };

  float4 scores[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
    if (slot_of(i) < arguments.slot_count) scores[i] = *reinterpret_cast<const float4*>(products + slot_of(i));
  float largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int slot = slot_of(i);
    const bool whole = slot + 3 < arguments.slot_count && window.age(slot) + 3 < window.length;
    const auto take = [&](float& score, int slot) {
      if (!whole && !window.shows(slot)) score = -INFINITY;
      if (score < INFINITY) largest = fmaxf(largest, score);  // an infinite one may belong to a key that does not count
    };
    take(scores[i].x, slot);
    take(scores[i].y, slot + 1);
    take(scores[i].z, slot + 2);
    take(scores[i].w, slot + 3);
  }
  best_of_thread[threadIdx.x] = largest > -INFINITY ? sortable(largest) : 0;
  if (threadIdx.x == 0) survivors = 0;
  __syncthreads();

  uint32_t values[kFewThreads / 32];
  int present = 0;
#pragma unroll
  for (int i = 0; i < kFewThreads / 32; ++i) {
    values[i] = best_of_thread[lane + 32 * i];
    present += values[i] != 0;
  }
  present = __reduce_add_sync(kAllLanes, present);
  const float lowest = present < arguments.k ? -3.402823466e+38f : unsortable(kth_largest(values, arguments.k));
  const auto counts_as_neighbour = [&](float score, int slot) {
    return score >= lowest && (score < INFINITY || key_is_finite(keys + static_cast<int64_t>(slot) * dim, dim));
  };
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const auto offer = [&](float score, int slot) {
      if (!counts_as_neighbour(score, slot)) return;
      const int place = atomicAdd(&survivors, 1);
      if (place < WarpTopK::kCapacity) buffers[0][place] = make_entry(score, window.age(slot));
    };
    if (fmaxf(fmaxf(scores[i].x, scores[i].y), fmaxf(scores[i].z, scores[i].w)) < lowest) continue;
    offer(scores[i].x, slot_of(i));
    offer(scores[i].y, slot_of(i) + 1);
    offer(scores[i].z, slot_of(i) + 2);
    offer(scores[i].w, slot_of(i) + 3);
  }
  __syncthreads();

  WarpTopK best(buffers[warp], arguments.k);
  if (survivors <= WarpTopK::kCapacity) {
    best.count = survivors;
  } else {
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < kVectors * 4; ++i) {
      const int slot = blockIdx.x * kFewPart + i * kFewThreads + threadIdx.x;
      const float score = window.shows(slot) ? products[slot] : -INFINITY;
      best.push(counts_as_neighbour(score, slot), make_entry(score, window.age(slot)));
    }
    if (lane == 0) counts[warp] = best.count;
    __syncthreads();
    if (warp == 0)
      for (int other = 1; other < 8; ++other)
        for (int i = 0; i < counts[other]; i += 32)
          best.push(i + lane < counts[other], i + lane < counts[other] ? buffers[other][i + lane] : 0);
  }
  if (warp > 0) return;
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
  float* const scores = arguments.scores + query * arguments.k;
  int32_t* const slots = arguments.slots + query * arguments.k;
  best.finish([&](int rank, uint64_t entry) {
    scores[rank] = entry_score(entry);
    slots[rank] = window.slot(entry_age(entry));
  });
  for (int rank = best.count + lane; rank < arguments.k; rank += 32) {
    scores[rank] = -INFINITY;
    slots[rank] = -1;
  }
}

}  // namespace memtrans
