// Exact top-K for many queries: one persistent, warp-specialised kernel per call.
//
//   scores[b, h, n, :], slots[b, h, n, :] = the K best <query[b, h, n], key> over the visible slots of row rows[b * G + g]
//
// query (B, H, N, D), keys (R, M + S, D), both fp16 or bf16; scores fp32, slots int32, both (B, H, N, K). A block owns
// kQueries queries of one row and streams the row's keys past them through the tensor cores twice:
//   1. a strided sample: every thread keeps running maxima of its columns, 64 groups a query. The rank-th largest group
//      maximum is the query's threshold: about rank / fraction keys are expected to reach it, rarely fewer than K.
//   2. all visible keys: scores stay in registers; pairs of keys that reach the threshold go to a list private to the
//      thread. Most groups of 8 scores cost 8 maxima and one comparison.
//   3. a warp per query selects the K best of its lists.
// A query with fewer than K keys at its threshold, or with a full list, is put on the redo list (knn_redo.cuh), so the
// result is exact whatever the keys. Products are exact and accumulate in fp32.
#pragma once

#include "hopper.cuh"
#include "knn_select.cuh"

namespace memtrans {

constexpr int kScanTile = 128;           // keys of one stage
constexpr int kScanThreads = 3 * 128;   // two consumer warpgroups and a producer
constexpr int kSampleBlock = 8 * kScanTile;  // slots that one sample tile represents
constexpr int kGroups = 64;              // group maxima per query
constexpr int kListRecords = 128;        // records of one thread's list for one query
constexpr int kListFull = 123;           // a visit appends at most 4 records to a list
constexpr int kListBytes = kListRecords * 16;
constexpr int kUnsampledLength = 640;    // so few visible keys, and the rest of their tiles, fit the lists whole
constexpr float kLowest = -3.402823466e+38f;

struct ScanArguments {
  const int64_t* rows;
  const int64_t* start;
  const int64_t* cursor;
  const void* keys;
  float* scores;
  int32_t* slots;
  char* lists;          // kListBytes-aligned; 4 lists a query, kQueries queries a block of the grid
  uint32_t* redo_count;
  uint32_t* redo;       // queries to redo
  int64_t row_count;
  int queries_per_row;
  int slot_count;       // M + S
  int capacity;
  int k;
  float hit_cost;       // cost of one candidate, in scanned keys
};

template <int dim>
struct ScanShape {
  static constexpr int kHalves = dim > 128 ? 1 : 2;  // 64-query accumulators of a warpgroup
  static constexpr int kQueries = 128 * kHalves;
  static constexpr int kColumns = dim % 64 == 0 ? 64 : 32;  // columns of one swizzled chunk
  static constexpr int kChunks = dim / kColumns;
  static constexpr int kRowBytes = kColumns * 2;
  static constexpr int kQueryBytes = kQueries * dim * 2;
  static constexpr int kStageBytes = kScanTile * dim * 2;
  static constexpr int kSelectBytes = 8 * WarpTopK::kCapacity * 8;
  static constexpr int kStagesThatFit = (232448 - 1024 - 256 - kSelectBytes - kQueryBytes) / kStageBytes;
  static constexpr int kStages = kStagesThatFit < 6 ? kStagesThatFit : 6;
  static constexpr int kSharedBytes = 1024 + 256 + kSelectBytes + kQueryBytes + kStages * kStageBytes;
};

// What one block streams for one set of queries: sample tiles, then tiles of all visible keys.
struct ScanPlan {
  Window window;
  int first_block, blocks, block_count, phases, skip, rank;  // the sample
  int first_tile, tiles, tile_count;

  __device__ ScanPlan(Window window, int k, float hit_cost) : window(window) {
    const int slots = window.slots;
    tile_count = (slots + kScanTile - 1) / kScanTile;
    first_tile = window.first / kScanTile;
    tiles = span(kScanTile, tile_count);
    block_count = (slots + kSampleBlock - 1) / kSampleBlock;
    first_block = window.first / kSampleBlock;
    blocks = span(kSampleBlock, block_count);
    choose_sample(k, hit_cost);
  }

  __device__ int span(int size, int count) const {
    if (window.length == 0) return 0;
    const int end = window.first + window.length;
    if (end <= window.slots) return (end - 1) / size - window.first / size + 1;
    return min(count, count - window.first / size + (end - window.slots + size - 1) / size);
  }

  // The fraction of keys to sample: scanning a key costs 1, a candidate hit_cost. rank leaves fewer than K keys at the
  // threshold about once in a million queries of independent keys.
  __device__ void choose_sample(int k, float hit_cost) {
    phases = skip = rank = 0;
    if (window.length <= kUnsampledLength) return;
    float best = 3e38f;
    for (int step = 0; step < 6; ++step) {
      const float fraction = 0.5f / (1 << step);
      const float expected = k * fraction;
      const float keys = expected + 5.0f * sqrtf(expected) + 3.0f;
      const float cost = fraction * window.length + hit_cost * keys / fraction;
      if (cost >= best || (step > 0 && fraction * window.length < 4.0f * keys)) continue;
      best = cost;
      phases = max(1, 4 >> step);
      skip = max(1, (1 << step) / 4);
      rank = static_cast<int>(kGroups * (1.0f - expf(-keys / kGroups)) + 0.5f);
    }
  }

  __device__ int sample_tiles() const { return phases ? (blocks + skip - 1) / skip * phases : 0; }
  __device__ int sample_block(int i) const {
    const int block = first_block + i / phases * skip;
    return block < block_count ? block : block - block_count;
  }
  __device__ int sample_phase(int i) const { return (sample_block(i) * 5 + 3 + i % phases * (8 / phases)) & 7; }
  __device__ int tile_slot(int i) const {
    const int tile = first_tile + i;
    return (tile < tile_count ? tile : tile - tile_count) * kScanTile;
  }
};

// One warpgroup's view of the stages: which one is next, and its phase.
template <int stages>
struct StageCursor {
  int index = 0;
  uint32_t phase = 0;
  __device__ void advance() {
    if (++index == stages) {
      index = 0;
      phase ^= 1;
    }
  }
};

// Takes one 64 x 128 accumulator into the running maxima of the thread's two queries: column pair i into group i. Column c
// is slot base + 8 * c, of which those from limit on, and those outside the window, do not count.
__device__ inline void take_maxima(const float (&scores)[64], float (&maxima)[2][16], const Window& window, int base,
                                   int limit) {
  const int last = base + 8 * (kScanTile - 1);
  if (last < limit && window.age(base) + (last - base) < window.length) {
#pragma unroll
    for (int i = 0; i < 64; i += 2) maxima[i / 2 % 2][i / 4] = fmaxf(maxima[i / 2 % 2][i / 4], fmaxf(scores[i], scores[i + 1]));
    return;
  }
#pragma unroll
  for (int i = 0; i < 64; i += 4) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int slot = base + 8 * (i * 2 + (threadIdx.x & 3) * 2 + e);
      if (slot >= limit || !window.shows(slot)) continue;
      maxima[0][i / 4] = fmaxf(maxima[0][i / 4], scores[i + e]);
      maxima[1][i / 4] = fmaxf(maxima[1][i / 4], scores[i + 2 + e]);
    }
  }
}

// The largest t (to a thousandth of the spread) that at least rank of the 64 maxima of a query reach. Its 4 lanes call.
__device__ inline float group_threshold(float (&maxima)[16], int rank) {
  float low = INFINITY, high = -INFINITY;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    maxima[i] = maxima[i] < INFINITY ? maxima[i] : -INFINITY;  // the group holds a key that is not finite
    low = fminf(low, maxima[i]);
    high = fmaxf(high, maxima[i]);
  }
#pragma unroll
  for (int offset = 1; offset < 4; offset *= 2) {
    low = fminf(low, __shfl_xor_sync(kAllLanes, low, offset));
    high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, offset));
  }
  low = fmaxf(low, kLowest);
  for (int step = 0; step < 10; ++step) {
    const float middle = 0.5f * low + 0.5f * high;
    int reached = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) reached += maxima[i] >= middle;
    reached += __shfl_xor_sync(kAllLanes, reached, 1);
    reached += __shfl_xor_sync(kAllLanes, reached, 2);
    if (reached >= rank) low = middle;
    else high = middle;
  }
  return low;
}

// Appends {first, second, pair} where the larger of the two reaches the threshold; list is the low word of its address.
__device__ inline void append_pair(uint32_t& list, uint32_t list_high, float larger, float threshold, float first,
                                   float second, int pair) {
  asm volatile(
      "{\n"
      ".reg .pred hit;\n"
      ".reg .b64 address;\n"
      "setp.ge.f32 hit, %1, %2;\n"
      "mov.b64 address, {%0, %6};\n"
      "@hit st.global.v2.f32 [address], {%3, %4};\n"
      "@hit st.global.u32 [address + 8], %5;\n"
      "@hit add.u32 %0, %0, 16;\n"
      "}\n"
      : "+r"(list)
      : "f"(larger), "f"(threshold), "f"(first), "f"(second), "r"(pair), "r"(list_high)
      : "memory");
}

// One 64 x 128 accumulator against the thresholds of the thread's two queries. pair is half the slot of its first column.
__device__ inline void collect_hits(const float (&scores)[64], const float (&threshold)[2], uint32_t (&list)[2],
                                    uint32_t list_high, int pair) {
#pragma unroll
  for (int g = 0; g < 4; ++g) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float larger[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) larger[i] = fmaxf(scores[16 * g + 4 * i + 2 * e], scores[16 * g + 4 * i + 2 * e + 1]);
      const float largest = fmaxf(fmaxf(larger[0], larger[1]), fmaxf(larger[2], larger[3]));
      if (__any_sync(kAllLanes, largest >= threshold[e])) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          append_pair(list[e], list_high, larger[i], threshold[e], scores[16 * g + 4 * i + 2 * e],
                      scores[16 * g + 4 * i + 2 * e + 1], pair + 16 * g + 4 * i);
        list[e] = min(list[e], (list[e] | (kListBytes - 1)) - (kListBytes - 1 - kListFull * 16));
      }
    }
  }
}

template <typename T, int dim>
struct ScanConsumer {
  using Shape = ScanShape<dim>;
  static constexpr int kSteps = dim / 16, kStepsPerChunk = Shape::kColumns / 16;

  int group;                              // which of the two warpgroups
  uint32_t queries, stages, full, empty;  // shared addresses; queries: this warpgroup's
  StageCursor<Shape::kStages> cursor;

  __device__ void multiply(float (&scores)[64], int half, int stage) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int chunk = step / kStepsPerChunk, offset = step % kStepsPerChunk * 32;
      const uint32_t a = queries + (half * Shape::kChunks + chunk) * 64 * Shape::kRowBytes + offset;
      const uint32_t b = stages + stage * Shape::kStageBytes + chunk * kScanTile * Shape::kRowBytes + offset;
      const uint64_t a_matrix = matrix_descriptor<Shape::kRowBytes>(a), b_matrix = matrix_descriptor<Shape::kRowBytes>(b);
      if (step == 0) wgmma_m64n128k16<T, false>(scores, a_matrix, b_matrix);
      else wgmma_m64n128k16<T, true>(scores, a_matrix, b_matrix);
    }
    wgmma_commit();
  }

  __device__ void release() {
    if (threadIdx.x % 32 == 0) barrier_arrive(empty + 8 * cursor.index);
    cursor.advance();
  }

  static __device__ void turn_wait(int group) { asm volatile("bar.sync %0, 256;" ::"r"(group + 1) : "memory"); }
  static __device__ void turn_pass(int group) { asm volatile("bar.arrive %0, 256;" ::"r"(group + 1) : "memory"); }

  // visit(scores, half, tile) for each tile and half, one accumulator at a time. The warpgroups take turns to issue their
  // products, so that the tensor cores work for one while the other looks at its scores.
  template <typename Visit>
  __device__ void stream_singly(int tiles, Visit visit) {
    for (int tile = 0; tile < tiles; ++tile) {
      barrier_wait(full + 8 * cursor.index, cursor.phase);
#pragma unroll
      for (int half = 0; half < Shape::kHalves; ++half) {
        float scores[64];
        turn_wait(group);
        multiply(scores, half, cursor.index);
        turn_pass(group ^ 1);
        wgmma_wait<0>(scores);
        if (half == Shape::kHalves - 1) release();
        visit(scores, half, tile);
      }
    }
  }

  // The same with both accumulators in flight, for a visit that needs fewer registers.
  template <typename Visit>
  __device__ void stream_doubly(int tiles, Visit visit) {
    static_assert(Shape::kHalves == 2, "two accumulators");
    for (int tile = 0; tile < tiles; ++tile) {
      float first[64], second[64];
      barrier_wait(full + 8 * cursor.index, cursor.phase);
      turn_wait(group);
      multiply(first, 0, cursor.index);
      multiply(second, 1, cursor.index);
      turn_pass(group ^ 1);
      wgmma_wait<1>(first);
      visit(first, 0, tile);
      wgmma_wait<0>(second);
      release();
      visit(second, 1, tile);
    }
  }
};

template <int dim>
__device__ void produce(const CUtensorMap* query_map, const CUtensorMap* key_map, const CUtensorMap* sample_map,
                        const ScanArguments& arguments, uint32_t queries, uint32_t stages, uint32_t full, uint32_t empty,
                        uint32_t query_full, uint32_t query_empty) {
  using Shape = ScanShape<dim>;
  StageCursor<Shape::kStages> cursor;
  const int tiles_per_row = (arguments.queries_per_row + Shape::kQueries - 1) / Shape::kQueries;
  uint32_t query_phase = 1;
  for (int64_t job = blockIdx.x; job < arguments.row_count * tiles_per_row; job += gridDim.x, query_phase ^= 1) {
    const int64_t index = job / tiles_per_row;
    const int row = static_cast<int>(arguments.rows[index]);
    const int query = static_cast<int>(index * arguments.queries_per_row + job % tiles_per_row * Shape::kQueries);
    const ScanPlan plan(visible_window(arguments.start, arguments.cursor, row, arguments.capacity, arguments.slot_count),
                        arguments.k, arguments.hit_cost);
    barrier_wait(query_empty, query_phase);
    barrier_expect_bytes(query_full, Shape::kQueryBytes);
    for (int part = 0; part < Shape::kQueries / 64; ++part)
      for (int chunk = 0; chunk < Shape::kChunks; ++chunk)
        load_tile_2d(queries + (part * Shape::kChunks + chunk) * 64 * Shape::kRowBytes, query_map, query_full,
                     chunk * Shape::kColumns, query + part * 64);
    const int sample_tiles = plan.sample_tiles();
    for (int i = 0; i < sample_tiles + plan.tiles; ++i, cursor.advance()) {
      const uint32_t target = stages + cursor.index * Shape::kStageBytes, barrier = full + 8 * cursor.index;
      barrier_wait(empty + 8 * cursor.index, cursor.phase ^ 1);
      barrier_expect_bytes(barrier, Shape::kStageBytes);
      for (int chunk = 0; chunk < Shape::kChunks; ++chunk) {
        const uint32_t part = target + chunk * kScanTile * Shape::kRowBytes;
        if (i < sample_tiles)
          load_tile_4d(part, sample_map, barrier, chunk * Shape::kColumns, plan.sample_phase(i), plan.sample_block(i) * kScanTile, row);
        else
          load_tile_3d(part, key_map, barrier, chunk * Shape::kColumns, plan.tile_slot(i - sample_tiles), row);
      }
    }
  }
}

// One warp selects the k best of the four lists of one query, writes them, or puts the query on the redo list.
template <typename T, int dim>
__device__ void select_from_lists(const ScanArguments& arguments, const ScanPlan& plan, int row, int64_t query,
                                  const char* lists, const int (&counts)[4], float threshold, uint64_t* buffer) {
  const int lane = threadIdx.x & 31;
  WarpTopK best(buffer, arguments.k);
  const int end0 = counts[0], end1 = end0 + counts[1], end2 = end1 + counts[2], total = end2 + counts[3];
  const auto load = [&](int i) {
    const int list = (i >= end0) + (i >= end1) + (i >= end2);
    const int position = i - (list > 2 ? end2 : list > 1 ? end1 : list > 0 ? end0 : 0);
    return i < total ? __ldcg(reinterpret_cast<const float4*>(lists + list * kListBytes) + position)
                     : make_float4(-INFINITY, -INFINITY, 0.0f, 0.0f);
  };
  const T* keys = static_cast<const T*>(arguments.keys) + static_cast<int64_t>(row) * arguments.slot_count * dim;
  float4 record = load(lane);
  for (int i = 0; i < total; i += 32) {
    const float4 next = load(i + 32 + lane);
    const int slot = 2 * __float_as_int(record.z);
    const auto offer = [&](float score, int slot) {
      bool offered = score >= threshold && plan.window.shows(slot);
      if (offered && score == INFINITY) offered = key_is_finite(keys + static_cast<int64_t>(slot) * dim, dim);
      best.push(offered, make_entry(score, plan.window.age(slot)));
    };
    offer(record.x, slot);
    offer(record.y, slot + 1);
    record = next;
  }
  bool full = false;
  for (int list = 0; list < 4; ++list) full = full || counts[list] >= kListFull;
  const bool short_of_keys = best.count < min(arguments.k, plan.window.length) && threshold > kLowest;
  if (full || short_of_keys) {
    if (lane == 0) arguments.redo[atomicAdd(arguments.redo_count, 1)] = static_cast<uint32_t>(query);
    return;
  }
  float* scores = arguments.scores + query * arguments.k;
  int32_t* slots = arguments.slots + query * arguments.k;
  best.finish([&](int rank, uint64_t entry) {
    scores[rank] = entry_score(entry);
    slots[rank] = plan.window.slot(entry_age(entry));
  });
  for (int rank = best.count + lane; rank < arguments.k; rank += 32) {
    scores[rank] = -INFINITY;
    slots[rank] = -1;
  }
}

template <typename T, int dim>
__device__ void consume(const ScanArguments& arguments, ScanConsumer<T, dim>& consumer, uint64_t* buffer, uint32_t query_full,
                        uint32_t query_empty) {
  using Shape = ScanShape<dim>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
  const int tiles_per_row = (arguments.queries_per_row + Shape::kQueries - 1) / Shape::kQueries;
  const int local = group * 64 * Shape::kHalves + warp * 16;  // this warp's first query in the block
  char* const lists = arguments.lists + static_cast<int64_t>(blockIdx.x) * Shape::kQueries * 4 * kListBytes;
  const uint64_t own = reinterpret_cast<uint64_t>(lists) + ((local + lane / 4) * 4 + lane % 4) * kListBytes;
  const uint32_t list_high = static_cast<uint32_t>(own >> 32);
  const int sampled_limit = arguments.slot_count / 8 * 8;
  uint32_t query_phase = 0;
  for (int64_t job = blockIdx.x; job < arguments.row_count * tiles_per_row; job += gridDim.x, query_phase ^= 1) {
    const int64_t index = job / tiles_per_row;
    const int row = static_cast<int>(arguments.rows[index]);
    const int tile_query = static_cast<int>(job % tiles_per_row) * Shape::kQueries;
    const ScanPlan plan(visible_window(arguments.start, arguments.cursor, row, arguments.capacity, arguments.slot_count),
                        arguments.k, arguments.hit_cost);
    barrier_wait(query_full, query_phase);

    float threshold[2][2] = {{kLowest, kLowest}, {kLowest, kLowest}};
    if (plan.phases > 0) {
      float maxima[2][2][16];
#pragma unroll
      for (int i = 0; i < 64; ++i) maxima[i / 32][i / 16 % 2][i % 16] = -INFINITY;
      consumer.stream_singly(plan.sample_tiles(), [&](float(&scores)[64], int half, int tile) {
        take_maxima(scores, maxima[half], plan.window, plan.sample_block(tile) * kSampleBlock + plan.sample_phase(tile), sampled_limit);
      });
#pragma unroll
      for (int half = 0; half < Shape::kHalves; ++half)
#pragma unroll
        for (int e = 0; e < 2; ++e) threshold[half][e] = group_threshold(maxima[half][e], plan.rank);
    }

    uint32_t list[2][2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int e = 0; e < 2; ++e) list[half][e] = static_cast<uint32_t>(own) + (half * 64 + e * 8) * 4 * kListBytes;
    const auto collect = [&](float(&scores)[64], int half, int tile) {
      collect_hits(scores, threshold[half], list[half], list_high, plan.tile_slot(tile) / 2 + lane % 4);
    };
    if constexpr (Shape::kHalves == 2) consumer.stream_doubly(plan.tiles, collect);
    else consumer.stream_singly(plan.tiles, collect);
    if (lane == 0) barrier_arrive(query_empty);
    __syncwarp();

#pragma unroll
    for (int half = 0; half < Shape::kHalves; ++half) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int count = (list[half][e] - static_cast<uint32_t>(own) - (half * 64 + e * 8) * 4 * kListBytes) / 16;
        for (int octet = 0; octet < 8; ++octet) {
          int counts[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) counts[i] = __shfl_sync(kAllLanes, count, octet * 4 + i);
          const float bound = __shfl_sync(kAllLanes, threshold[half][e], octet * 4);
          const int query = local + half * 64 + e * 8 + octet;
          if (tile_query + query >= arguments.queries_per_row) continue;
          select_from_lists<T, dim>(arguments, plan, row, index * arguments.queries_per_row + tile_query + query,
                                    lists + static_cast<int64_t>(query) * 4 * kListBytes, counts, bound, buffer);
        }
      }
    }
  }
}

template <typename T, int dim>
__global__ void __launch_bounds__(kScanThreads, 1)
    knn_scan(const __grid_constant__ CUtensorMap query_map, const __grid_constant__ CUtensorMap key_map,
             const __grid_constant__ CUtensorMap sample_map, const __grid_constant__ ScanArguments arguments) {
  using Shape = ScanShape<dim>;
  extern __shared__ char shared[];
  // queries | stages | selection buffers | barriers; tiles are 1024-byte aligned, as the swizzle asks
  const uint32_t base = (shared_address(shared) + 1023) & ~1023u;
  const uint32_t stages = base + Shape::kQueryBytes;
  const uint32_t select = stages + Shape::kStages * Shape::kStageBytes;
  const uint32_t full = select + Shape::kSelectBytes, empty = full + 8 * Shape::kStages;
  const uint32_t query_full = empty + 8 * Shape::kStages, query_empty = query_full + 8;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, 8);
    }
    barrier_init(query_full, 1);
    barrier_init(query_empty, 8);
    barrier_init_fence();
  }
  __syncthreads();
  const int group = __shfl_sync(kAllLanes, threadIdx.x / 128, 0);  // uniform, as wgmma's branches must be
  if (group == 2) {
    registers_down<24>();
    if (threadIdx.x == 256)
      produce<dim>(&query_map, &key_map, &sample_map, arguments, base, stages, full, empty, query_full, query_empty);
  } else {
    registers_up<240>();
    ScanConsumer<T, dim> consumer{group, base + group * (Shape::kQueryBytes / 2), stages, full, empty, {}};
    uint64_t* buffer = reinterpret_cast<uint64_t*>(shared + (select - shared_address(shared))) + threadIdx.x / 32 * WarpTopK::kCapacity;
    if (group == 1) consumer.turn_pass(0);
    consume<T, dim>(arguments, consumer, buffer, query_full, query_empty);
  }
}

}  // namespace memtrans
