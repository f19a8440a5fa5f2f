// Exact top-K for the queries that knn_scan gave up, whatever the keys: the worst case of the search.
//
// Keys that keep getting better fill the lists of knn_scan faster than its thresholds rise, and a sample that misses or
// hits the best keys by bad luck leads to a threshold that is too low or too high. Such queries come here in tiles of
// up to kQueries of one row and stream its keys through the tensor cores twice:
//   1. Of each group of keys (32 of a tile, those that one thread holds; of more than 512 tiles several together) the
//   largest
//      score goes to memory. The K-th largest of these bounds the K-th score from below: K keys reach it.
//   2. Keys that reach the bound go to lists, as in knn_scan. Those above it lie in fewer than K groups, so at most K
//   times
//      32 (or a 2048th of the keys, if that is more) are ever listed; those equal to it are no more than fill the lists
//      once, because later ones lose to them.
// Products are summed as in knn_scan, so equal keys stay equal. Where there are few tiles, blocks share one: each
// searches a slice of the window, the last one merges.
#pragma once

#include "cuda/knn_search/scan.cuh"

namespace memtrans {

constexpr int kMostGroups = 512;      // maxima of a thread for one query: they fit its list
constexpr int kSmallestSlice = 1024;  // keys that are worth a block of their own
constexpr int kMostMerged = 8192;     // entries of the slices of one query
constexpr int kNeverGivenUp = 255;

// One unit of work: a slice of a stretch against a tile of its queries.
struct RedoJob {
  int64_t index;  // row of the batch
  int row;        // row of the memory
  int part, tile, slice, slices;
  int queries;            // in the tile
  const uint32_t* query;  // numbers in the row, of the tile's queries
  Window part_window, window;

  __device__ RedoJob(const ScanArguments& arguments, uint32_t tiles, int64_t number, int slices)
      : tile(static_cast<int>(number / slices)), slice(static_cast<int>(number % slices)), slices(slices) {
    const uint2 place = arguments.redo_tile[tile];
    index = place.x / arguments.parts;
    part = static_cast<int>(place.x % arguments.parts);
    row = static_cast<int>(arguments.rows[index]);
    const int first = static_cast<int>(place.y) * arguments.redo_queries;
    queries = min(arguments.redo_queries, static_cast<int>(arguments.redo_count[place.x]) - first);
    query = arguments.redo + static_cast<int64_t>(place.x) * arguments.queries_per_row + first;
    part_window = visible_window(arguments.start, arguments.cursor, row, arguments.capacity, arguments.slot_count)
                      .piece(part, arguments.parts);
    window = part_window.piece(slice, slices);
  }

  static __device__ int slices_of(const ScanArguments& arguments, uint32_t tiles) {
    const int wanted = static_cast<int>(gridDim.x / max(tiles, 1u));
    return max(1, min(wanted, min(arguments.capacity / kSmallestSlice, kMostMerged / arguments.k)));
  }
  __device__ uint64_t* entries(const ScanArguments& arguments, int of_slice, int in_tile) const {
    const int64_t slot = static_cast<int64_t>(tile) * slices + of_slice;
    return arguments.redo_entries + (slot * arguments.redo_queries + in_tile) * arguments.k;
  }
};

// Phase 1 leaves groups of maxima where the lists will be: of each query 4 threads' ones, 4 of a thread side by side.
struct TileMaxima {
  char* place[2];  // of the thread's next four, for its two queries
  float kept[2][4], current[2];
  int groups = 0;

  __device__ TileMaxima(char* lists) : current{-INFINITY, -INFINITY} {
    const int lane = threadIdx.x % 32;
    place[0] = lists + static_cast<int64_t>(lane / 4) * 4 * kListBytes + lane % 4 * 16;
    place[1] = place[0] + 32 * kListBytes;
  }
  __device__ void end_group() {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      kept[e][0] = kept[e][1];
      kept[e][1] = kept[e][2];
      kept[e][2] = kept[e][3];
      kept[e][3] = current[e];
      current[e] = -INFINITY;
    }
    if (++groups % 4)
      return;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      *reinterpret_cast<float4*>(place[e]) = {kept[e][0], kept[e][1], kept[e][2], kept[e][3]};
      place[e] += 64;
    }
  }
  // Groups of each thread, some of them maybe without a key.
  __device__ int finish() {
    end_group();
    while (groups % 4)
      end_group();
    __syncwarp();
    return groups;
  }
};

// What K of a query's keys reach: the K-th of its group maxima, or one that at most kBoundSlack more reach. kLowest
// where there are fewer. An infinite maximum may belong to a key that does not count.
__device__ inline float proven_bound(const char* maxima, int groups, int k) {
  constexpr int kLoads = kMostGroups * 4 / 128;
  uint32_t values[4 * kLoads], smallest = 0xFFFFFFFFu, largest = 0;
  int present = 0;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int place = threadIdx.x % 32 + 32 * i;
    const bool is_there = place < groups;
    const float4 four = __ldcg(reinterpret_cast<const float4*>(maxima) + (is_there ? place : 0));
    const float four_values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const bool counts = is_there && fabsf(four_values[c]) < INFINITY;
      const uint32_t value = counts ? sortable(four_values[c]) : 0;
      values[4 * i + c] = value;
      largest = max(largest, value);
      smallest = min(smallest, counts ? value : 0xFFFFFFFFu);
      present += counts;
    }
  }
  present = __reduce_add_sync(kAllLanes, present);
  if (present < k)
    return kLowest;
  smallest = __reduce_min_sync(kAllLanes, smallest);
  largest = __reduce_max_sync(kAllLanes, largest);
  return unsortable(reached_by(k, kBoundSlack, smallest, largest, present, [&](uint32_t value) {
    int reached = 0;
#pragma unroll
    for (int i = 0; i < 4 * kLoads; ++i)
      reached += values[i] >= value;
    return __reduce_add_sync(kAllLanes, reached);
  }));
}

template <typename T, int dim>
struct RedoConsumer {
  using Shape = ScanShape<dim>;
  const ScanArguments& arguments;
  ScanConsumer<T, dim>& scan;
  WarpScratch* scratch;
  char* lists;           // of the warp
  char* shared_queries;  // of the warp's warpgroup
  int group;

  // The warp's 16 queries, to where the tensor cores read them; zeros for those that there are not.
  __device__ void load_queries(const RedoJob& job, const T* queries) const {
    constexpr int kUnits = dim / 8;  // of 16 bytes
    constexpr int kUnitsPerChunk = Shape::kColumns / 8;
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16;
    named_barrier(1 + group, 128);  // the last job's products are made
    for (int number = lane; number < 16 * kUnits; number += 32) {
      const int i = number / kUnits, unit = number % kUnits, row = first % 64 + i;
      const int chunk = unit / kUnitsPerChunk, column = unit % kUnitsPerChunk;
      const int swizzled = column ^ (Shape::kRowBytes == 128 ? row & 7 : row >> 1 & 3);
      uint4 value = {0, 0, 0, 0};
      if (first + i < job.queries) {
        const int64_t query = job.index * arguments.queries_per_row + job.query[first + i];
        value = reinterpret_cast<const uint4*>(queries + query * dim)[unit];
      }
      *reinterpret_cast<uint4*>(shared_queries + (chunk * 64 + row) * Shape::kRowBytes + swizzled * 16) = value;
    }
    async_proxy_fence();
    named_barrier(1 + group, 128);
  }

  // Phase 1. Returns how many groups each thread has.
  __device__ int find_maxima(const TilePlan& plan) const {
    TileMaxima maxima(lists);
    const int tiles_of_group = (plan.tiles + kMostGroups - 2) / kMostGroups;  // the last group may be one larger
    int in_group = 0;
    const auto visit = [&](const float (&scores)[64], int) {
      take_largest(scores, maxima.current);
      if (++in_group < tiles_of_group || maxima.groups == kMostGroups - 1)
        return true;
      in_group = 0;
      maxima.end_group();
      return true;
    };
    scan.stream_visible(plan, visit, [](int) {});
    return maxima.finish();
  }

  __device__ void search(const RedoJob& job) const {
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16;
    const int mine = min(16, job.queries - first);
    if (lane == 0) {
      scratch->plan = TilePlan(job.window);
      scratch->row = job.row;
    }
    __syncwarp();
    const int groups = find_maxima(scratch->plan);
    float threshold[2] = {INFINITY, INFINITY};
#pragma unroll 1
    for (int i = 0; i < mine; ++i) {
      const float bound = proven_bound(lists + static_cast<int64_t>(i) * 4 * kListBytes, groups, arguments.k);
      if (i == lane / 4)
        threshold[0] = bound;
      if (i == lane / 4 + 8)
        threshold[1] = bound;
    }
    const WarpLists<T, dim> of_warp(arguments, scratch);
    HitLists hits = of_warp.open(threshold);
    scan.collect(scratch->plan, arguments.k, threshold, hits, [&](int tile) {
      of_warp.make_room(hits, threshold, tile, kNeverGivenUp);
    });
    of_warp.select_all(hits, mine, kNeverGivenUp, [&](int i) {
      const int64_t query = job.index * arguments.queries_per_row + job.query[first + i];
      return ScanResult{
          arguments, job.window, query, job.part,
          job.slices > 1 ? job.entries(arguments, job.slice, first + i) : nullptr};
    });
  }

  // The consumers of the tile's last block merge what the slices found.
  __device__ void merge(const RedoJob& job, volatile int* is_last) const {
    constexpr int kConsumers = 128 * Shape::kGroups;
    __threadfence();
    named_barrier(5, kConsumers);
    if (threadIdx.x == 0)
      *is_last = atomicAdd(arguments.redo_done + job.tile, 1u) == static_cast<uint32_t>(job.slices - 1);
    named_barrier(5, kConsumers);
    if (!*is_last)
      return;
    __threadfence();
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16;
    for (int i = first; i < min(first + 16, job.queries); ++i) {
      WarpTopK best(scratch->buffer, arguments.k);
      for (int slice = 0; slice < job.slices; ++slice) {
        const uint64_t* found = job.entries(arguments, slice, i);
        for (int base = 0; base < arguments.k; base += 32) {
          const uint64_t entry = base + lane < arguments.k ? __ldcg(found + base + lane) : 0;
          best.push(entry != 0, entry);
        }
      }
      const ScanResult result{
          arguments, job.part_window, job.index * arguments.queries_per_row + job.query[i], job.part};
      best.finish([&](int rank, uint64_t entry) { result.put(rank, entry); });
      result.pad(best.count);
    }
  }
};

template <int dim>
__device__ void produce_again(
    const CUtensorMap* key_map, const ScanArguments& arguments, uint32_t tiles, int slices, uint32_t stages,
    uint32_t full, uint32_t empty) {
  using Shape = ScanShape<dim>;
  StageCursor<Shape::kStages> cursor;
  for (int64_t number = blockIdx.x; number < static_cast<int64_t>(tiles) * slices; number += gridDim.x) {
    const RedoJob job(arguments, tiles, number, slices);
    const TilePlan plan(job.window);
    for (int i = 0; i < 2 * plan.tiles; ++i, cursor.advance()) {
      const uint32_t barrier = full + 8 * cursor.index();
      barrier_wait_idly(empty + 8 * cursor.index(), cursor.phase() ^ 1);
      barrier_expect_bytes(barrier, Shape::kStageBytes);
      load_keys<dim>(
          stages + cursor.index() * Shape::kStageBytes, key_map, barrier, plan.tile_slot(i % plan.tiles), job.row);
    }
  }
}

template <typename T, int dim>
__global__ void __launch_bounds__(ScanShape<dim>::kThreads, 1) knn_redo(
    const __grid_constant__ CUtensorMap key_map, const __grid_constant__ ScanArguments arguments, const T* queries) {
  using Shape = ScanShape<dim>;
  const uint32_t tiles = *arguments.redo_tiles;
  if (tiles == 0)
    return;
  extern __shared__ char shared[];
  const ScanMemory<dim> memory(shared);
  memory.init_barriers();
  __syncthreads();
  const int slices = RedoJob::slices_of(arguments, tiles);
  const int group = __shfl_sync(kAllLanes, threadIdx.x / 128, 0);  // uniform, as wgmma's branches must be
  if (group == Shape::kGroups) {
    registers_down<24>();
    if (threadIdx.x % 128 == 0)
      produce_again<dim>(&key_map, arguments, tiles, slices, memory.stages, memory.full, memory.empty);
  } else {
    registers_up<Shape::kConsumerRegisters>();
    ScanConsumer<T, dim> scan = memory.template consumer<T>(group);
    char* const own_lists =
        arguments.lists + (static_cast<int64_t>(blockIdx.x) * Shape::kQueries + threadIdx.x / 32 * 16) * 4 * kListBytes;
    const RedoConsumer<T, dim> consumer{
        arguments,
        scan,
        memory.scratch(),
        own_lists,
        memory.pointer(memory.queries) + group * (Shape::kQueryBytes / Shape::kGroups),
        group};
    for (int64_t number = blockIdx.x; number < static_cast<int64_t>(tiles) * slices; number += gridDim.x) {
      const RedoJob job(arguments, tiles, number, slices);
      consumer.load_queries(job, queries);
      consumer.search(job);
      if (slices > 1)
        consumer.merge(job, reinterpret_cast<int*>(memory.pointer(memory.word)));
    }
  }
}

}  // namespace memtrans
