// One warp of knn_scan, and of knn_redo where it gave queries up, over scores from a table.
#include "warp.h"

#include <cstddef>
#include <vector>

#include "cuda/hopper.cuh"
#include "cuda/predicated.cuh"

#include "cuda/knn_search/scan.cuh"
#include "cuda/knn_search/scan_redo.cuh"

using namespace memtrans;

namespace {

constexpr int kWidth = 32;
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

void scan(const ScanArguments& arguments, const Table& table, uint64_t seed) {
  const ScanJob job(arguments, 0, ScanShape<kWidth>::kQueries);
  const SamplePlan plan(job.window, arguments.k);
  score_of = [&](int query, int number, int column) {
    const int tile = number - plan.sample_tiles();
    return table.at(query, tile < 0 ? plan.sample_slot(number, column) : plan.tile_slot(tile) + column);
  };
  Warp::run(
      [&](int) {
        Consumer consumer{0, 0, 1024, {}};
        consume<float, kWidth>(arguments, consumer, &scratch, kQueriesLoaded, 0);
      },
      seed);
}

// Slices one after the other, as if each had a block.
void redo(const ScanArguments& arguments, const Table& table, uint64_t seed) {
  const int slices = RedoJob::slices_of(arguments, 1);
  int is_last = 0;
  for (int slice = 0; slice < slices; ++slice) {
    const RedoJob job(arguments, 1, slice, slices);
    const TilePlan plan(job.window);
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
        seed + slice);
  }
}

}  // namespace

// scores (queries, slots), is_finite (slots,): of the keys; found_scores and found_slots (queries, k). Up to 16
// queries. Returns how many queries were given up, or -1 where lanes parted.
extern "C" int search_scores(
    const float* scores, const uint8_t* is_finite, int queries, int slots, int64_t start, int64_t cursor, int capacity,
    int k, uint64_t seed, float* found_scores, int32_t* found_slots) try {
  shared_high = reinterpret_cast<uint64_t>(&scratch) >> 32;
  fill_with_noise(seed);
  std::vector<float> keys(static_cast<size_t>(slots) * kWidth);
  for (int slot = 0; slot < slots; ++slot)
    keys[static_cast<size_t>(slot) * kWidth] = is_finite[slot] ? 0.0f : INFINITY;
  const int64_t row = 0;
  uint32_t tiles = 0, given_up = 0, numbers[16], done[132] = {};
  uint2 tile[16];
  std::vector<uint64_t> entries(size_t{132} * 16 * k);
  ScanArguments arguments{};
  arguments.rows = &row;
  arguments.start = &start;
  arguments.cursor = &cursor;
  arguments.keys = keys.data();
  arguments.scores = found_scores;
  arguments.slots = found_slots;
  arguments.lists = lists;
  arguments.redo_tiles = &tiles;
  arguments.redo_tile = tile;
  arguments.redo_count = &given_up;
  arguments.redo = numbers;
  arguments.redo_done = done;
  arguments.redo_entries = entries.data();
  arguments.row_count = arguments.parts = 1;
  arguments.queries_per_row = queries;
  arguments.slot_count = slots;
  arguments.capacity = capacity;
  arguments.k = k;
  arguments.redo_queries = 16;
  Table table{scores, slots, {}};
  for (int query = 0; query < queries; ++query)
    table.rows.push_back(query);
  scan(arguments, table, seed);
  if (given_up > 0) {
    table.rows.assign(numbers, numbers + given_up);
    redo(arguments, table, seed);
  }
  return static_cast<int>(given_up);
} catch (const std::logic_error&) {
  return -1;
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
