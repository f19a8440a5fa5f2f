// One warp of knn_scan, and of knn_redo where it gave queries up, over scores from a table.
#include "warp.h"

#include <cstddef>
#include <numeric>
#include <vector>

#include "cuda/hopper.cuh"
#include "cuda/predicated.cuh"

#include "cuda/knn_search/scan.cuh"
#include "cuda/knn_search/scan_redo.cuh"

using namespace memtrans;

namespace {

constexpr int kWidth = 32, kBlocks = 132;
using Consumer = ScanConsumer<float, kWidth>;

alignas(kListAlignment) char lists[kListAlignment];
WarpScratch scratch;

// What a GPU's memory may hold before anything is stored.
void fill_with_noise(uint64_t seed) {
  std::mt19937 noise(static_cast<uint32_t>(seed));
  for (size_t i = 0; i < sizeof lists / 4; ++i)
    reinterpret_cast<uint32_t*>(lists)[i] = noise() % 4 ? __float_as_uint(noise() % 1000 / 500.0f - 0.5f) : noise();
  for (size_t i = 0; i < sizeof scratch; ++i)
    reinterpret_cast<unsigned char*>(&scratch)[i] = static_cast<unsigned char>(noise());
}

struct Table {
  const float* scores;  // (queries, slots)
  int slots;
  std::vector<int> rows;  // of the warp's queries

  float at(int query, int slot) const {
    const bool is_there = query < static_cast<int>(rows.size()) && slot < slots;
    return is_there ? scores[static_cast<int64_t>(rows[query]) * slots + slot] : 0.0f;
  }
};

// Parts of the window one after the other, as if each had a block.
void scan(ScanArguments arguments, const Table& table, uint64_t seed) {
  gridDim.x = arguments.parts;
  for (int part = 0; part < arguments.parts; ++part) {
    arguments.lists = lists - int64_t{part} * ScanShape<kWidth>::kQueries * 4 * kListBytes;  // one block's serve all
    const ScanJob job(arguments, part, ScanShape<kWidth>::kQueries);
    const SamplePlan plan(job.window, arguments.k);
    score_of = [&](int query, int number, int column) {
      const int tile = number - plan.sample_tiles();
      return table.at(query, tile < 0 ? plan.sample_slot(number, column) : plan.tile_slot(tile) + column);
    };
    blockIdx.x = part;
    Warp::run(
        [&](int) {
          Consumer consumer{0, 0, 1024, {}};
          consume<float, kWidth>(arguments, consumer, &scratch, kQueriesLoaded, 0);
        },
        seed + part);
  }
  blockIdx.x = 0;
}

// Slices of what was given up one after the other, as if each had a block.
void redo(const ScanArguments& arguments, Table table, uint64_t seed) {
  gridDim.x = kBlocks;
  const int tiles = *arguments.redo_tiles, slices = RedoJob::slices_of(arguments, tiles);
  int is_last = 0;
  for (int number = 0; number < tiles * slices; ++number) {
    const RedoJob job(arguments, tiles, number, slices);
    const TilePlan plan(job.window);
    table.rows.assign(job.query, job.query + job.queries);
    score_of = [&](int query, int number, int column) {
      return table.at(query, plan.tile_slot(number % plan.tiles) + column);
    };
    std::fill(tile_of_lane, tile_of_lane + Warp::kLanes, -1);
    Warp::run(
        [&](int) {
          Consumer consumer{0, 0, 1024, {}};
          const RedoConsumer<float, kWidth> again{arguments, consumer, &scratch, lists, nullptr, 0};
          again.search(job);
          if (slices > 1)
            again.merge(job, &is_last);
        },
        seed + number);
  }
}

// As few_merge does.
void merge_parts(const ScanArguments& arguments, const Window& window) {
  for (int query = 0; query < arguments.queries_per_row; ++query) {
    uint64_t* const first = arguments.entries + int64_t{query} * arguments.parts * arguments.k;
    std::sort(first, first + arguments.parts * arguments.k, std::greater<uint64_t>());
    ScanArguments whole = arguments;
    whole.parts = 1;
    const ScanResult result{whole, window, query, 0};
    for (int rank = 0; rank < arguments.k; ++rank)
      result.put(rank, first[rank]);
  }
}

}  // namespace

// scores (queries, slots), is_finite (slots,): of the keys; found_scores and found_slots (queries, k). Up to 16
// queries. Returns how many queries were given up, of each part, or -1 where lanes parted.
extern "C" int search_scores(
    const float* scores, const uint8_t* is_finite, int queries, int slots, int64_t start, int64_t cursor, int capacity,
    int k, int parts, uint64_t seed, float* found_scores, int32_t* found_slots) try {
  shared_high = reinterpret_cast<uint64_t>(&scratch) >> 32;
  fill_with_noise(seed);
  std::vector<float> keys(static_cast<size_t>(slots) * kWidth);
  for (int slot = 0; slot < slots; ++slot)
    keys[static_cast<size_t>(slot) * kWidth] = is_finite[slot] ? 0.0f : INFINITY;
  const int64_t row = 0;
  uint32_t tiles = 0, done[kBlocks] = {};
  std::vector<uint32_t> given_up(parts), numbers(size_t{16} * parts);
  std::vector<uint2> tile(size_t{16} * parts);
  std::vector<uint64_t> of_parts(size_t{16} * parts * k), of_slices(size_t{kBlocks} * 16 * k);
  ScanArguments arguments{};
  arguments.rows = &row;
  arguments.start = &start;
  arguments.cursor = &cursor;
  arguments.keys = keys.data();
  arguments.scores = found_scores;
  arguments.slots = found_slots;
  arguments.entries = of_parts.data();
  arguments.lists = lists;
  arguments.redo_tiles = &tiles;
  arguments.redo_tile = tile.data();
  arguments.redo_count = given_up.data();
  arguments.redo = numbers.data();
  arguments.redo_done = done;
  arguments.redo_entries = of_slices.data();
  arguments.row_count = 1;
  arguments.parts = parts;
  arguments.queries_per_row = queries;
  arguments.slot_count = slots;
  arguments.capacity = capacity;
  arguments.k = k;
  arguments.redo_queries = 16;
  Table table{scores, slots, {}};
  for (int query = 0; query < queries; ++query)
    table.rows.push_back(query);
  scan(arguments, table, seed);
  if (tiles > 0)
    redo(arguments, table, seed);
  if (parts > 1)
    merge_parts(arguments, visible_window(&start, &cursor, row, capacity, slots));
  return std::accumulate(given_up.begin(), given_up.end(), 0);
} catch (const std::logic_error&) {
  return -1;
}

// Cuts the lists of a warp's first eight queries, of which each lane has one: records (32, kListRecords) of {score,
// score of the next slot, slot / 2, nothing} and lengths (32,), in place; bounds (32,) are scores, of each lane's
// query.
extern "C" void cut_lists(float* records, int32_t* lengths, int k, int slots, float* bounds) {
  const Window window{0, slots, slots};
  Warp::run(
      [&](int lane) {
        float4* const list = reinterpret_cast<float4*>(lists) + lane * kListRecords;
        std::memcpy(list, records + lane * kListRecords * 4, kListBytes);
        __syncwarp();
        const ListCut::Left left = ListCut::cut({list, lengths[lane], window}, k);
        lengths[lane] = left.records;
        bounds[lane] = left.bound.score;
        __syncwarp();
        std::memcpy(records + lane * kListRecords * 4, list, kListBytes);
      },
      k);
}

// A kernel that hangs a GPU: a shuffle that only some lanes come to. Returns whether it was noticed.
extern "C" int notices_lanes_that_part() {
  try {
    Warp::run(
        [](int lane) { lane > 3 ? __shfl_xor_sync(0xFFFFFFFFu, lane, 1) : static_cast<int>(__any_sync(~0u, true)); },
        1);
  } catch (const std::logic_error&) {
    return 1;
  }
  return 0;
}

// A kernel that lacks a barrier: each lane reads what the next one stores. Returns how many of 20 runs differ from the
// first.
extern "C" int runs_that_a_race_changes() {
  int different = 0, first[32];
  for (int run = 0; run < 20; ++run) {
    int stored[32] = {}, read[32];
    Warp::run(
        [&](int lane) {
          stored[lane] = lane + 1;
          read[lane] = stored[(lane + 1) % 32];
        },
        run);
    if (run == 0)
      std::copy(read, read + 32, first);
    different += !std::equal(read, read + 32, first);
  }
  return different;
}
