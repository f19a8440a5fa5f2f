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
// A query with fewer than K keys at its threshold, or with a full list, is put on the redo list (scan_redo.cuh), so the
// result is exact whatever the keys. Products are exact and accumulate in fp32.
#pragma once

#include "cuda/hopper.cuh"
#include "cuda/knn_search/scan_collect.cuh"
#include "cuda/knn_search/scan_select.cuh"

namespace memtrans {

// Goes round the stages twice: which stage is next, and the phase of its barriers.
template <int stages>
struct StageCursor {
  int position = 0;
  __device__ int index() const { return position < stages ? position : position - stages; }
  __device__ uint32_t phase() const { return position >= stages; }
  __device__ void advance() { position = position + 1 < 2 * stages ? position + 1 : 0; }
};

template <typename T, int dim>
struct ScanConsumer {
  using Shape = ScanShape<dim>;
  static constexpr int kSteps = dim / 16, kStepsPerChunk = Shape::kColumns / 16;

  uint32_t queries, stages;  // matrix_low_word of this warpgroup's queries, of the first stage
  uint32_t full, empty;      // shared addresses
  StageCursor<Shape::kStages> cursor;

  __device__ void multiply(float (&scores)[64]) {
    const uint32_t keys = stages + cursor.index() * (Shape::kStageBytes / 16);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int chunk = step / kStepsPerChunk, offset = step % kStepsPerChunk * 32;
      const uint64_t a = matrix_descriptor<Shape::kRowBytes>(queries + (chunk * 64 * Shape::kRowBytes + offset) / 16);
      const uint64_t b = matrix_descriptor<Shape::kRowBytes>(keys + (chunk * kScanTile * Shape::kRowBytes + offset) / 16);
      if (step == 0) wgmma_m64n128k16<T, false>(scores, a, b);
      else wgmma_m64n128k16<T, true>(scores, a, b);
    }
    wgmma_commit();
  }

  // visit(scores, tile) for each tile.
  template <typename Visit>
  __device__ void stream(int tiles, Visit visit) {
    for (int tile = 0; tile < tiles; ++tile) {
      float scores[64];
      barrier_wait(full + 8 * cursor.index(), cursor.phase());
      multiply(scores);
      wgmma_wait<0>(scores);
      if (threadIdx.x % 32 == 0) barrier_arrive(empty + 8 * cursor.index());
      cursor.advance();
      visit(scores, tile);
    }
  }

  // Phase 1: the thresholds of the thread's two queries.
  __device__ void sample(const ScanPlan& plan, int slot_count, float (&threshold)[2]) {
    threshold[0] = threshold[1] = kLowest;
    if (plan.rank == 0) return;
    float maxima[2][16];
#pragma unroll
    for (int i = 0; i < 32; ++i) maxima[i / 16][i % 16] = -INFINITY;
    const int limit = slot_count / 8 * 8;
    stream(plan.sample_tiles(), [&](const float(&scores)[64], int tile) {
      const int slot = plan.sample_block(tile) * kSampleBlock + plan.sample_phase(tile);
      if (plan.shows_all(slot, 8, limit)) take_maxima(scores, maxima);
      else take_visible_maxima(scores, maxima, plan.window, slot, limit);
    });
#pragma unroll
    for (int e = 0; e < 2; ++e) threshold[e] = group_threshold(maxima[e], plan.rank);
  }

  // Phase 2: all keys, into the thread's lists.
  __device__ void collect(const ScanPlan& plan, const float (&threshold)[2], HitLists& hits) {
    const bool positive = __all_sync(kAllLanes, threshold[0] > 0.0f && threshold[1] > 0.0f);
    int pair = plan.first_tile * (kScanTile / 2) + threadIdx.x % 4;
    int careful = 0;  // the next tile that needs care: the first, that at the end of the ring, the last; or each
    stream(plan.tiles, [&](const float(&scores)[64], int tile) {
      if (__all_sync(kAllLanes, tile != careful)) {
        collect_hits(scores, threshold, hits, pair);
      } else {
        collect_carefully(scores, threshold, hits, pair, plan.window);
        const int ring_end = plan.tile_count - 1 - plan.first_tile, last = plan.tiles - 1;
        careful = !positive ? tile + 1 : tile < ring_end && ring_end < last ? ring_end : last;
        if (tile == ring_end) pair = static_cast<int>(threadIdx.x % 4) - kScanTile / 2;
      }
      pair += kScanTile / 2;
    });
  }
};

template <int dim>
__device__ void produce(const CUtensorMap* query_map, const CUtensorMap* key_map, const CUtensorMap* sample_map,
                        const ScanArguments& arguments, uint32_t queries, uint32_t stages, uint32_t full, uint32_t empty,
                        uint32_t query_full, uint32_t query_empty) {
  using Shape = ScanShape<dim>;
  StageCursor<Shape::kStages> cursor;
  uint32_t query_phase = 1;
  const int64_t jobs = ScanJob::count(arguments, Shape::kQueries);
  for (int64_t number = blockIdx.x; number < jobs; number += gridDim.x, query_phase ^= 1) {
    const ScanJob job(arguments, number, Shape::kQueries);
    const ScanPlan plan(job.window, arguments.k);
    const int query = static_cast<int>(job.index * arguments.queries_per_row + job.first_query);
    barrier_wait_idly(query_empty, query_phase);
    barrier_expect_bytes(query_full, Shape::kQueryBytes);
    for (int group = 0; group < Shape::kGroups; ++group)
      for (int chunk = 0; chunk < Shape::kChunks; ++chunk)
        load_tile_2d(queries + (group * Shape::kChunks + chunk) * 64 * Shape::kRowBytes, query_map, query_full,
                     chunk * Shape::kColumns, query + group * 64);
    const int sample_tiles = plan.sample_tiles();
    for (int i = 0; i < sample_tiles + plan.tiles; ++i, cursor.advance()) {
      const uint32_t target = stages + cursor.index() * Shape::kStageBytes, barrier = full + 8 * cursor.index();
      barrier_wait_idly(empty + 8 * cursor.index(), cursor.phase() ^ 1);
      barrier_expect_bytes(barrier, Shape::kStageBytes);
      for (int chunk = 0; chunk < Shape::kChunks; ++chunk) {
        const uint32_t part = target + chunk * kScanTile * Shape::kRowBytes;
        if (i < sample_tiles)
          load_tile_4d(part, sample_map, barrier, chunk * Shape::kColumns, plan.sample_phase(i),
                       plan.sample_block(i) * kScanTile, job.row);
        else
          load_tile_3d(part, key_map, barrier, chunk * Shape::kColumns, plan.tile_slot(i - sample_tiles), job.row);
      }
    }
  }
}

// Phase 3: a warp selects for its 16 queries, one after the other; the next one's records load while it ranks.
template <typename T, int dim>
__device__ void select_all(const ScanArguments& arguments, const ScanJob& job, const Window& window, const char* lists,
                           const int (&records)[2], const float (&threshold)[2], uint64_t* buffer) {
  using Selection = ListSelection<T, dim>;
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16;
  const T* keys = static_cast<const T*>(arguments.keys) + static_cast<int64_t>(job.row) * arguments.slot_count * dim;
  const Selection selection{arguments, window, keys, buffer};
  const auto lists_of = [&](int i) {  // the lists of the warp's query i
    typename Selection::Lists found;
    found.place = lists + (static_cast<int64_t>(first + i) * 4 + lane / 8) * kListBytes + lane % 8 * 16;
    found.count = __shfl_sync(kAllLanes, i < 8 ? records[0] : records[1], i % 8 * 4 + lane / 8) - lane % 8;
    found.threshold = __shfl_sync(kAllLanes, i < 8 ? threshold[0] : threshold[1], i % 8 * 4);
    return found;
  };
  const int queries = min(16, arguments.queries_per_row - job.first_query - first);
  typename Selection::Lists current = lists_of(0);
  float4 loaded[Selection::kLoads];
  const auto load = [&] {
#pragma unroll
    for (int i = 0; i < Selection::kLoads; ++i) loaded[i] = current.record(i);
  };
  load();
#pragma unroll 1
  for (int i = 0; i < queries; ++i) {
    const int64_t query = job.index * arguments.queries_per_row + job.first_query + first + i;
    selection.select(current, loaded, {arguments, window, query, job.part}, [&] {
      current = lists_of(min(i + 1, 15));
      load();
    });
  }
  __syncwarp();
}

template <typename T, int dim>
__device__ void consume(const ScanArguments& arguments, ScanConsumer<T, dim>& consumer, uint64_t* buffer, uint32_t query_full,
                        uint32_t query_empty) {
  using Shape = ScanShape<dim>;
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16;  // this warp's first query in the block
  char* const lists = arguments.lists + static_cast<int64_t>(blockIdx.x) * Shape::kQueries * 4 * kListBytes;
  const uint64_t own = reinterpret_cast<uint64_t>(lists) + ((first + lane / 4) * 4 + lane % 4) * kListBytes;
  const uint32_t own_low[2] = {static_cast<uint32_t>(own), static_cast<uint32_t>(own) + 8 * 4 * kListBytes};
  const int64_t jobs = ScanJob::count(arguments, Shape::kQueries);
  uint32_t query_phase = 0;
  for (int64_t number = blockIdx.x; number < jobs; number += gridDim.x, query_phase ^= 1) {
    const ScanJob job(arguments, number, Shape::kQueries);
    const ScanPlan plan(job.window, arguments.k);
    barrier_wait(query_full, query_phase);
    float threshold[2];
    consumer.sample(plan, arguments.slot_count, threshold);
#pragma unroll
    for (int e = 0; e < 2; ++e)  // a block may have queries to spare: what they hold is another row's, or zeros
      if (job.first_query + first + lane / 4 + 8 * e >= arguments.queries_per_row) threshold[e] = INFINITY;
    HitLists hits{{own_low[0], own_low[1]}, static_cast<uint32_t>(own >> 32), arguments.one};
    consumer.collect(plan, threshold, hits);
    if (lane == 0) barrier_arrive(query_empty);
    __syncwarp();
    const int records[2] = {static_cast<int>(hits.next[0] - own_low[0]) / 16, static_cast<int>(hits.next[1] - own_low[1]) / 16};
    select_all<T, dim>(arguments, job, plan.window, lists, records, threshold, buffer);
  }
}

template <typename T, int dim>
__global__ void __launch_bounds__(ScanShape<dim>::kThreads, 1)
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
      barrier_init(empty + 8 * stage, 4 * Shape::kGroups);
    }
    barrier_init(query_full, 1);
    barrier_init(query_empty, 4 * Shape::kGroups);
    barrier_init_fence();
  }
  __syncthreads();
  const int group = __shfl_sync(kAllLanes, threadIdx.x / 128, 0);  // uniform, as wgmma's branches must be
  if (group == Shape::kGroups) {
    registers_down<24>();
    if (threadIdx.x % 128 == 0)
      produce<dim>(&query_map, &key_map, &sample_map, arguments, base, stages, full, empty, query_full, query_empty);
  } else {
    registers_up<Shape::kConsumerRegisters>();
    ScanConsumer<T, dim> consumer{matrix_low_word(base + group * (Shape::kQueryBytes / Shape::kGroups)),
                                  matrix_low_word(stages), full, empty, {}};
    uint64_t* buffer = reinterpret_cast<uint64_t*>(shared + (select - shared_address(shared))) +
                       threadIdx.x / 32 * WarpTopK::kCapacity;
    consume<T, dim>(arguments, consumer, buffer, query_full, query_empty);
  }
}

}  // namespace memtrans
