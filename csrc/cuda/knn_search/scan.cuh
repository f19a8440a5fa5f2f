// Exact top-K for many queries: one persistent, warp-specialised kernel per call.
//
//   scores[b, h, n, :], slots[b, h, n, :] = the K best <query[b, h, n], key> over the visible slots of row rows[b * G +
//   g]
//
// query (B, H, N, D), keys (R, M + S, D), both fp16 or bf16; scores fp32, slots int32, both (B, H, N, K). A block owns
// kQueries queries of one row and streams the row's keys past them through the tensor cores twice:
//   1. a strided sample: every thread keeps running maxima of its columns, 64 groups a query. The rank-th largest group
//      maximum is the query's threshold: about rank / fraction keys are expected to reach it, rarely fewer than K.
//   2. all visible keys: scores stay in registers; pairs of keys that reach the threshold go to a list private to the
//      thread. Most groups of 8 scores cost 8 maxima and one comparison. Where lists get long the warp cuts or shortens
//      them to what may be a neighbour (scan_cut.cuh, scan_select.cuh) and raises thresholds.
//   3. a warp per query selects the K best of its lists.
// A query with fewer than K keys at its threshold, or whose lists were shortened too often, is left to scan_redo.cuh,
// so the result is exact whatever the keys. Products are exact and accumulate in fp32. docs/search.md explains why.
#pragma once

#include "cuda/hopper.cuh"
#include "cuda/knn_search/scan_collect.cuh"
#include "cuda/knn_search/scan_cut.cuh"
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

// A number that the compiler does not know to be the same: what is derived from it is derived again, and not kept in a
// register that the loop over the tiles needs.
__device__ inline int again(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

template <typename T, int dim>
struct ScanConsumer {
  using Shape = ScanShape<dim>;
  static constexpr int kSteps = dim / 16, kStepsPerChunk = Shape::kColumns / 16;

  uint32_t queries, stages;  // matrix_low_word of this warpgroup's queries, of the first stage
  uint32_t full;             // shared address of the stages' barriers: full ones, then empty ones
  StageCursor<Shape::kStages> cursor;

  __device__ void multiply(float (&scores)[64]) {
    const uint32_t keys = stages + cursor.index() * (Shape::kStageBytes / 16);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int chunk = step / kStepsPerChunk, offset = step % kStepsPerChunk * 32;
      const uint64_t a = matrix_descriptor<Shape::kRowBytes>(queries + (chunk * 64 * Shape::kRowBytes + offset) / 16);
      const uint64_t b =
          matrix_descriptor<Shape::kRowBytes>(keys + (chunk * kScanTile * Shape::kRowBytes + offset) / 16);
      if (step == 0)
        wgmma_m64n128k16<T, false>(scores, a, b);
      else
        wgmma_m64n128k16<T, true>(scores, a, b);
    }
    wgmma_commit();
  }

  // visit(scores, at) for tiles at = begin, begin + step, ... before end, until it returns false; returns the first
  // `at` that was not visited. hidden: a bit for each of the thread's columns that do not count, in all of these tiles.
  // Nothing here or in visit is called out of line, since the loop's registers would move to memory; what is rare ends
  // the loop.
  template <int step, typename Visit>
  __device__ int stream(int begin, int end, uint32_t hidden, bool& more, Visit visit) {
    const bool hides = __any_sync(kAllLanes, hidden != 0);
    int at = begin;
    more = true;
    while (more && at < end) {
      float scores[64];
      barrier_wait(full + 8 * cursor.index(), cursor.phase());
      multiply(scores);
      wgmma_wait<0>(scores);
      if (threadIdx.x % 32 == 0)
        barrier_arrive(full + 8 * Shape::kStages + 8 * cursor.index());
      cursor.advance();
      if (hides)
        hide(scores, hidden);
      more = visit(scores, at);
      at += step;
    }
    return at;
  }

  // Phase 1: the thresholds of the thread's two queries.
  __device__ void sample(const SamplePlan& plan, float (&threshold)[2]) {
    threshold[0] = threshold[1] = kLowest;
    if (plan.rank == 0)
      return;
    float maxima[2][16];
#pragma unroll
    for (int i = 0; i < 32; ++i)
      maxima[i / 16][i % 16] = -INFINITY;
    const int tiles = plan.sample_tiles(), tiles_of_turn = (tiles + kSampleTurns - 1) / kSampleTurns;
    for (int tile = 0; tile < tiles;) {
      if (tile > 0 && tile % tiles_of_turn == 0)
        turn_groups(maxima, tile / tiles_of_turn);
      const int turn = min(tiles, tile - tile % tiles_of_turn + tiles_of_turn);
      int stop = tile;
      while (stop < turn && plan.shows_whole_block(plan.sample_block(stop)))
        ++stop;
      const uint32_t hidden = stop == tile ? hidden_samples(plan, tile) : 0;
      bool more;
      tile = stream<1>(tile, max(stop, tile + 1), hidden, more, [&](const float (&scores)[64], int) {
        take_maxima(scores, maxima);
        return true;
      });
    }
#pragma unroll
    for (int e = 0; e < 2; ++e)
      threshold[e] = group_threshold(maxima[e], plan.rank);
  }

  // All keys: visit(scores, half the slot of the thread's first column), where scores of hidden slots are -inf. When it
  // returns false, and at each look, pause(tile) is called before the next tile.
  template <typename Visit, typename Pause>
  __device__ void stream_visible(const TilePlan& plan, Visit visit, Pause pause) {
    constexpr int kPairs = kScanTile / 2;  // of a tile
    int edge = 0;                          // the next tile of which the window may hide a part
    int look = plan.first_look();          // before which tile
    for (int tile = 0; tile < plan.tiles;) {
      const int slot = plan.tile_slot(tile), stop = tile == edge ? tile + 1 : min(edge, look);
      const uint32_t hidden = tile == edge ? hidden_columns(plan.window, slot) : 0;
      if (tile == edge)
        edge = plan.next_edge(tile);
      const int pair = slot / 2 + threadIdx.x % 4;
      bool more;
      const int end = stream<kPairs>(pair, pair + (stop - tile) * kPairs, hidden, more, visit);
      tile += (end - slot / 2) / kPairs;
      if (!more || (tile == look && tile < plan.tiles))
        pause(tile - 1);
      if (tile == look)
        look = plan.look_after(tile);
    }
  }

  // Phase 2: all keys, into the thread's lists. make_room(tile) is called after a tile that left one of the warp's
  // lists long, or at a look that found many longer than was to be expected. It is rare, and has to be: while a warp is
  // busy with it, the other three of its warpgroup wait.
  template <typename MakeRoom>
  __device__ void collect(
      const TilePlan& plan, int k, const float (&threshold)[2], HitLists& hits, MakeRoom make_room) {
    const bool positive = __all_sync(kAllLanes, threshold[0] > 0.0f && threshold[1] > 0.0f);
    const auto visit = [&](const float (&scores)[64], int pair) {
      if (positive)
        collect_hits<true>(scores, threshold, hits, pair);
      else
        collect_hits<false>(scores, threshold, hits, pair);
      if (__any_sync(kAllLanes, cursor.position == 0))
        hits.turn_on();
      return !hits.some_are_long();
    };
    hits.begin_early(k);
    stream_visible(plan, visit, [&](int tile) {
      if (hits.some_are_long() || hits.many_exceed(plan.many_records(tile)))
        make_room(tile);
    });
  }
};

// A tile of keys from a slot on.
template <int dim>
__device__ void load_keys(uint32_t target, const CUtensorMap* map, uint32_t barrier, int slot, int row) {
  using Shape = ScanShape<dim>;
  for (int chunk = 0; chunk < Shape::kChunks; ++chunk)
    load_tile_3d(target + chunk * kScanTile * Shape::kRowBytes, map, barrier, chunk * Shape::kColumns, slot, row);
}

// A tile of sampled keys, box by box.
template <int dim>
__device__ void load_sample(
    uint32_t target, const CUtensorMap* map, uint32_t barrier, const SamplePlan& plan, int tile, int row) {
  using Shape = ScanShape<dim>;
  const int first = plan.sample_block(tile) * kScanTile;
  for (int box = 0; box < kSampleBoxes; ++box) {
    const uint32_t place = target + plan.sample_place(tile, box) * kSampleBox * Shape::kRowBytes;
    for (int chunk = 0; chunk < Shape::kChunks; ++chunk)
      load_tile_4d(
          place + chunk * kScanTile * Shape::kRowBytes, map, barrier, chunk * Shape::kColumns,
          plan.sample_phase(tile, box), first + box * kSampleBox, row);
  }
}

// A block's dynamic shared memory: queries | stages | a scratch for each warp | barriers | a word. Tiles are 1024-byte
// aligned, as the swizzle asks.
template <int dim>
struct ScanMemory {
  using Shape = ScanShape<dim>;
  char* shared;
  uint32_t queries, stages, scratches, full, empty, query_full, query_empty, word;  // shared addresses

  __device__ explicit ScanMemory(char* shared) : shared(shared) {
    queries = (shared_address(shared) + 1023) & ~1023u;
    stages = queries + Shape::kQueryBytes;
    scratches = stages + Shape::kStages * Shape::kStageBytes;
    full = scratches + Shape::kSelectBytes;
    empty = full + 8 * Shape::kStages;
    query_full = empty + 8 * Shape::kStages;
    query_empty = query_full + 8;
    word = query_empty + 8;
  }
  __device__ void init_barriers() const {
    if (threadIdx.x > 0)
      return;
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, 4 * Shape::kGroups);
    }
    barrier_init(query_full, 1);
    barrier_init(query_empty, 4 * Shape::kGroups);
    barrier_init_fence();
  }
  __device__ char* pointer(uint32_t address) const { return shared + (address - shared_address(shared)); }
  __device__ WarpScratch* scratch() const {
    return reinterpret_cast<WarpScratch*>(pointer(scratches)) + threadIdx.x / 32;
  }
  template <typename T>
  __device__ ScanConsumer<T, dim> consumer(int group) const {
    uint32_t stages_low = matrix_low_word(stages), barriers = full;
    asm volatile("" : "+r"(stages_low), "+r"(barriers));  // else they are derived again for each tile
    return {matrix_low_word(queries + group * (Shape::kQueryBytes / Shape::kGroups)), stages_low, barriers, {}};
  }
};

template <int dim>
__device__ void produce(
    const CUtensorMap* query_map, const CUtensorMap* key_map, const CUtensorMap* sample_map,
    const ScanArguments& arguments, uint32_t queries, uint32_t stages, uint32_t full, uint32_t empty,
    uint32_t query_full, uint32_t query_empty) {
  using Shape = ScanShape<dim>;
  StageCursor<Shape::kStages> cursor;
  uint32_t query_phase = 1;
  const int64_t jobs = ScanJob::count(arguments, Shape::kQueries);
  for (int64_t number = blockIdx.x; number < jobs; number += gridDim.x, query_phase ^= 1) {
    const ScanJob job(arguments, number, Shape::kQueries);
    const SamplePlan plan(job.window, arguments.k);
    const int query = static_cast<int>(job.index * arguments.queries_per_row + job.first_query);
    barrier_wait_idly(query_empty, query_phase);
    barrier_expect_bytes(query_full, Shape::kQueryBytes);
    for (int group = 0; group < Shape::kGroups; ++group)
      for (int chunk = 0; chunk < Shape::kChunks; ++chunk)
        load_tile_2d(
            queries + (group * Shape::kChunks + chunk) * 64 * Shape::kRowBytes, query_map, query_full,
            chunk * Shape::kColumns, query + group * 64);
    const int sample_tiles = plan.sample_tiles();
    for (int i = 0; i < sample_tiles + plan.tiles; ++i, cursor.advance()) {
      const uint32_t target = stages + cursor.index() * Shape::kStageBytes, barrier = full + 8 * cursor.index();
      barrier_wait_idly(empty + 8 * cursor.index(), cursor.phase() ^ 1);
      barrier_expect_bytes(barrier, Shape::kStageBytes);
      if (i < sample_tiles)
        load_sample<dim>(target, sample_map, barrier, plan, i, job.row);
      else
        load_keys<dim>(target, key_map, barrier, plan.tile_slot(i - sample_tiles), job.row);
    }
  }
}

// What a consumer warp knows about the lists of its 16 queries; query i of them belongs to lanes i % 8 * 4 and the next
// three, as their first one (i < 8) or second one.
template <typename T, int dim>
struct WarpLists {
  using Selection = ListSelection<T, dim>;
  const ScanArguments& arguments;
  WarpScratch* scratch;
  char* lists;  // of the warp's first query

  __device__ WarpLists(const ScanArguments& arguments, WarpScratch* scratch)
      : arguments(arguments),
        scratch(scratch),
        lists(
            arguments.lists +
            (static_cast<int64_t>(again(blockIdx.x)) * ScanShape<dim>::kQueries + threadIdx.x / 32 * 16) * 4 *
                kListBytes) {}

  __device__ Selection selection() const { return {arguments, scratch->plan.window, scratch->buffer}; }

  __device__ HitLists open(const float (&threshold)[2]) const {
    const int lane = threadIdx.x % 32;
    const uint64_t own = reinterpret_cast<uint64_t>(lists) + lane * kListBytes;
    if (lane < 16)
      scratch->shortened[lane] = 0;
    if (lane % 4 == 0) {
      scratch->floor[lane / 4] = threshold[0];
      scratch->floor[lane / 4 + 8] = threshold[1];
    }
    __syncwarp();
    return {
        {static_cast<uint32_t>(own), static_cast<uint32_t>(own) + 32 * kListBytes}, static_cast<uint32_t>(own >> 32)};
  }

  // The lists of the warp's query i, of which each thread's two have so many records.
  __device__ typename Selection::Lists of_query(int i, int first_length, int second_length) const {
    const int lane = threadIdx.x % 32,
              length = __shfl_sync(kAllLanes, i < 8 ? first_length : second_length, i % 8 * 4 + lane / 8);
    return {
        lists + (static_cast<int64_t>(i) * 4 + lane / 8) * kListBytes + lane % 8 * 16, length - lane % 8,
        scratch->floor[i], scratch->row};
  }

  struct Progress {
    HitLists hits;
    float threshold[2];
  };

  // Where many lists are longer than was to be expected, drops what K of their entries surpass and raises the
  // thresholds; lists that are long all the same are shortened to their K best, one query after the other. A query
  // whose own lists were the long ones more than `most` times collects no more. Out of line and by value, so that the
  // loop that calls it keeps its registers.
  static __device__ __noinline__ Progress make_room(WarpLists self, Progress now, int tile, int most) {
    const int next_age = self.scratch->plan.age_after(tile);
    now.hits.turn_back();
    __syncwarp();
    if (now.hits.is_early() || now.hits.many_exceed(self.scratch->plan.many_records(tile))) {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        self.cut(now, e, next_age, most);
    }
    if (now.hits.longest() > kLongList) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int length = now.hits.length(e);
        unsigned with_long = __ballot_sync(kAllLanes, length > kLongList);
        while (with_long) {
          const int quad = (__ffs(with_long) - 1) / 4, lane = threadIdx.x % 32;
          with_long &= ~(0xFu << quad * 4);
          const float old = __shfl_sync(kAllLanes, now.threshold[e], quad * 4);
          const typename Selection::Shortened left =
              self.shorten(8 * e + quad, self.of_query(8 * e + quad, length, length), old, next_age, most);
          if (lane / 4 != quad)
            continue;
          now.hits.cut(e, (left.count - lane % 4 + 3) / 4);
          now.threshold[e] = left.threshold;
        }
      }
      __syncwarp();
    }
    now.hits.end_early();
    return now;
  }
  // All queries of the warp side by side.
  __device__ void cut(Progress& now, int e, int next_age, int most) const {
    const int lane = threadIdx.x % 32, i = lane / 4 + 8 * e;
    const bool is_long = (__ballot_sync(kAllLanes, now.hits.bytes(e) > now.hits.limit) >> lane / 4 * 4 & 15u) != 0;
    const ListCut::Left left =
        ListCut::cut({now.hits.records(e), now.hits.length(e), scratch->plan.window}, arguments.k);
    const bool gives_up = counted_long(i, is_long, lane / 4 * 4) > most;
    now.hits.cut(e, left.records);
    now.threshold[e] = gives_up ? INFINITY : fmaxf(now.threshold[e], left.bound.threshold(next_age));
    if (lane % 4 == 0)
      scratch->floor[i] = fmaxf(scratch->floor[i], left.bound.score);
    __syncwarp();
  }
  // How often the lists of query i were the long ones. Only lane `source` reads and writes, and tells the others: lanes
  // need not be at the same place here, and one that is behind would read what was counted already.
  __device__ int counted_long(int i, bool once_more, int source) const {
    int times = 0;
    if (static_cast<int>(threadIdx.x % 32) == source) {
      times = min(scratch->shortened[i] + once_more, 255);
      scratch->shortened[i] = static_cast<unsigned char>(times);
    }
    return __shfl_sync(kAllLanes, times, source);
  }

  __device__ void make_room(HitLists& hits, float (&threshold)[2], int tile, int most) const {
    const Progress made = make_room(*this, {hits, {threshold[0], threshold[1]}}, tile, most);
    hits = made.hits;
    threshold[0] = made.threshold[0];
    threshold[1] = made.threshold[1];
  }

  __device__ typename Selection::Shortened shorten(
      int i, const typename Selection::Lists& found, float threshold, int next_age, int most) const {
    typename Selection::Shortened left = Selection::shorten(selection(), found, threshold, next_age);
    if (counted_long(i, true, 0) > most)
      left.threshold = INFINITY;
    if (threadIdx.x % 32 == 0)
      scratch->floor[i] = left.floor;
    __syncwarp();
    return left;
  }

  // Phase 3: selects for the first `queries`, one after the other; the next one's records load while it ranks.
  // result_of(i): where the neighbours of query i go.
  template <typename ResultOf>
  __device__ void select_all(HitLists hits, int queries, int most, ResultOf result_of) const {
    hits.turn_back();
    const int first_length = hits.length(0), second_length = hits.length(1);
    const Selection selection = this->selection();
    typename Selection::Lists current = of_query(0, first_length, second_length);
    float4 loaded[Selection::kLoads];
    const auto load = [&] {
#pragma unroll
      for (int i = 0; i < Selection::kLoads; ++i)
        loaded[i] = current.record(i);
    };
    load();
#pragma unroll 1
    for (int i = 0; i < queries; ++i) {
      selection.select(current, scratch->shortened[i] > most, loaded, result_of(i), [&] {
        current = of_query(min(i + 1, 15), first_length, second_length);
        load();
      });
    }
    __syncwarp();
  }
};

template <typename T, int dim>
__device__ void consume(
    const ScanArguments& arguments, ScanConsumer<T, dim>& consumer, WarpScratch* scratch, uint32_t query_full,
    uint32_t query_empty) {
  using Shape = ScanShape<dim>;
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16;  // this warp's first query in the block
  uint32_t query_phase = 0;
  for (int number = blockIdx.x; number < ScanJob::count(arguments, Shape::kQueries);
       number += gridDim.x, query_phase ^= 1) {
    float threshold[2];
    {
      const ScanJob job(arguments, number, Shape::kQueries);
      const SamplePlan plan(job.window, arguments.k);
      barrier_wait(query_full, query_phase);
      consumer.sample(plan, threshold);
#pragma unroll
      for (int e = 0; e < 2; ++e)  // a block may have queries to spare: what they hold is another row's, or zeros
        if (job.first_query + first + lane / 4 + 8 * e >= arguments.queries_per_row)
          threshold[e] = INFINITY;
      if (lane == 0) {
        scratch->plan = plan;
        scratch->row = job.row;
      }
    }
    HitLists hits = WarpLists<T, dim>(arguments, scratch).open(threshold);
    consumer.collect(scratch->plan, arguments.k, threshold, hits, [&](int tile) {
      WarpLists<T, dim>(arguments, scratch).make_room(hits, threshold, tile, kMostShortened);
    });
    if (lane == 0)
      barrier_arrive(query_empty);
    __syncwarp();
    const WarpLists<T, dim> of_warp(arguments, scratch);
    const ScanJob job(arguments, again(number), Shape::kQueries);
    const int64_t query = job.index * arguments.queries_per_row + job.first_query + first;
    of_warp.select_all(hits, min(16, arguments.queries_per_row - job.first_query - first), kMostShortened, [&](int i) {
      return ScanResult{arguments, job.window, query + i, job.part};
    });
    __syncwarp();
  }
}

template <typename T, int dim>
__global__ void __launch_bounds__(ScanShape<dim>::kThreads, 1) knn_scan(
    const __grid_constant__ CUtensorMap query_map, const __grid_constant__ CUtensorMap key_map,
    const __grid_constant__ CUtensorMap sample_map, const __grid_constant__ ScanArguments arguments) {
  using Shape = ScanShape<dim>;
  extern __shared__ char shared[];
  const ScanMemory<dim> memory(shared);
  memory.init_barriers();
  __syncthreads();
  const int group = __shfl_sync(kAllLanes, threadIdx.x / 128, 0);  // uniform, as wgmma's branches must be
  if (group == Shape::kGroups) {
    registers_down<24>();
    if (threadIdx.x % 128 == 0)
      produce<dim>(
          &query_map, &key_map, &sample_map, arguments, memory.queries, memory.stages, memory.full, memory.empty,
          memory.query_full, memory.query_empty);
  } else {
    registers_up<Shape::kConsumerRegisters>();
    ScanConsumer<T, dim> consumer = memory.template consumer<T>(group);
    consume<T, dim>(arguments, consumer, memory.scratch(), memory.query_full, memory.query_empty);
  }
}

}  // namespace memtrans
