// What knn_scan works on: its arguments, shared-memory shapes, and the jobs and plans that producer and consumers both
// derive.
#pragma once

#include "cuda/knn_search/top_k.cuh"

namespace memtrans {

constexpr int kScanTile = 128;               // keys of one stage
constexpr int kSampleBlock = 8 * kScanTile;  // slots that one sample tile represents
constexpr int kMaxima = 64;                  // group maxima per query
constexpr int kListRecords = 128;            // records of one thread's list for one query
constexpr int kTileRecords = 16;             // that one tile may append to it
constexpr int kLongList = 96;                // records of a list that is shortened
constexpr int kTilesToLook = 16;             // before lists are looked at: are many longer than was to be expected?
constexpr int kMany = 8;                     // lanes of a warp, with two lists each, that are many
constexpr int kLater = 34;                   // records more that a list may have, each time that lists turn
constexpr int kListBytes = kListRecords * 16;
constexpr int kListAlignment = 16 * 4 * kListBytes;  // the lists of a warp: no 4 GB boundary among them
static_assert(kLongList + kTileRecords < kListRecords, "a tile after the last look at a list still fits");
constexpr float kMostCandidates = 440;  // of a query, six deviations above the mean: what its lists hold
constexpr int kUnsampledLength = 640;   // so few visible keys, and the rest of their tiles, fit the lists whole
constexpr int kSampleBox = 16;          // sampled keys that lie 8 slots apart: a piece of a sample tile
constexpr int kSampleBoxes = kScanTile / kSampleBox;
constexpr int kSampleTurns = 8;     // how often a sample's columns go to other groups
constexpr int kMostShortened = 8;   // times that knn_scan shortens a query's long lists before it leaves it to knn_redo
constexpr float kHitCost = 120.0f;  // of one candidate, in scanned keys

// Records that a list has in the first tiles only where so many keys reach a threshold that it is soon full.
__device__ inline int early_records(int k) { return 20 + k / 4; }

// Entries beyond K that may be left in lists that were shortened: it saves most of the steps to find the K-th.
__device__ inline int shortened_slack(int k) { return min(k, 32); }

struct ScanArguments {
  const int64_t* rows;
  const int64_t* start;
  const int64_t* cursor;
  const void* keys;
  float* scores;
  int32_t* slots;
  uint64_t* entries;     // (queries, parts, k), where there are several parts: few_merge makes scores and slots of them
  char* lists;           // kListAlignment-aligned; 4 lists a query, kQueries queries a block of the grid
  uint32_t* redo_tiles;  // how many tiles of queries knn_redo has to search
  uint2*
      redo_tile;  // {stretch, number of the tile in it}; a stretch is a part of a row of the batch: row * parts + part
  uint32_t* redo_count;    // (row_count * parts,): queries that are searched again there
  uint32_t* redo;          // (row_count * parts, queries_per_row): which ones of the row
  uint32_t* redo_done;     // (blocks of the grid,): slices of a tile that are ready
  uint64_t* redo_entries;  // (blocks of the grid, kQueries, k)
  int64_t row_count;
  int queries_per_row;
  int parts;       // pieces of a row's window, searched by different blocks
  int slot_count;  // M + S
  int capacity;
  int k;
  int redo_queries;  // of a tile of knn_redo
};

// One unit of work: a block's queries against one piece of one row's window.
struct ScanJob {
  int64_t index;  // row of the batch, of B * G
  int row;        // row of the memory
  int part;
  int first_query;  // of the row
  Window window;

  __device__ ScanJob(const ScanArguments& arguments, int64_t job, int queries) {
    const int tiles = (arguments.queries_per_row + queries - 1) / queries;
    first_query = static_cast<int>(job % tiles) * queries;
    part = static_cast<int>(job / tiles % arguments.parts);
    index = job / tiles / arguments.parts;
    row = static_cast<int>(arguments.rows[index]);
    window = visible_window(arguments.start, arguments.cursor, row, arguments.capacity, arguments.slot_count)
                 .piece(part, arguments.parts);
  }

  static __device__ int64_t count(const ScanArguments& arguments, int queries) {
    return arguments.row_count * arguments.parts * ((arguments.queries_per_row + queries - 1) / queries);
  }
};

// The tiles that hold a window's keys, in the order of their ages.
struct TilePlan {
  Window window;
  int first_tile, tiles;
  int expected = kLongList;  // records of a list at the end of a scan, if keys are in no order

  TilePlan() = default;
  __device__ explicit TilePlan(Window window) : window(window) {
    first_tile = window.first / kScanTile;
    tiles = span(kScanTile, tile_count());
  }
  __device__ int tile_count() const { return (window.slots + kScanTile - 1) / kScanTile; }  // of the ring

  __device__ int span(int size, int count) const {
    if (window.length == 0)
      return 0;
    const int end = window.first + window.length;
    if (end <= window.slots)
      return (end - 1) / size - window.first / size + 1;
    return min(count, count - window.first / size + (end - window.slots + size - 1) / size);
  }
  __device__ int tile_slot(int i) const {
    const int tile = first_tile + i;
    return (tile < tile_count() ? tile : tile - tile_count()) * kScanTile;
  }
  // The first tile after `tile` of which the window may hide a part or whose slot does not follow on the last one's.
  __device__ int next_edge(int tile) const {
    const int ring_end = tile_count() - 1 - first_tile, last = tiles - 1;
    return tile < ring_end ? min(ring_end, last) : tile == ring_end ? min(tile + 1, last) : last;
  }
  // Lists are looked at after an eighth of the tiles, two, four and six of them; not so often where there are few.
  __device__ int first_look() const { return max(tiles / 8, kTilesToLook); }
  __device__ int look_after(int tile) const { return tile + min(tile, 2 * first_look()); }
  // A list that has more records after `tile` is longer than was to be expected.
  __device__ int many_records(int tile) const {
    return min(kLongList, 8 + (expected + expected / 2) * (tile + 1) / tiles);
  }
  // The age of the oldest key of the tiles after `tile`, of which there are some.
  __device__ int age_after(int tile) const { return window.age(tile_slot(tile + 1)); }
};

// What a block streams for one job: sample tiles, if a sample was chosen, then all tiles.
struct SamplePlan : TilePlan {
  int first_block, blocks, block_count, phase_bits = 0, skip_bits = 0, rank = 0;  // rank 0: no sample

  __device__ SamplePlan(Window window, int k) : TilePlan(window) {
    block_count = (window.slots + kSampleBlock - 1) / kSampleBlock;
    first_block = window.first / kSampleBlock;
    blocks = span(kSampleBlock, block_count);
    if (blocks >= 8) {  // the first and the last are partly out of sight
      first_block = first_block + 1 < block_count ? first_block + 1 : 0;
      blocks -= 2;
    }
    choose_sample(k);
  }

  // The fraction of keys to sample: scanning a key costs 1, a candidate kHitCost. The K - 1 best keys have a binomial
  // number in the sample, which fall into so many distinct groups; rank is what that number reaches about once in a
  // million queries of independent keys (4.6 deviations and a little, within 1 of the exact number for K from 1 to
  // 128).
  __device__ void choose_sample(int k) {
    if (window.length <= kUnsampledLength)
      return;
    float best = 3e38f;
    const float covered = fminf(1.0f, static_cast<float>(blocks) * kSampleBlock / window.length);
    for (int step = 0; step < 6; ++step) {
      const float fraction = 0.5f / (1 << step) * covered;
      const float expected = k * fraction, empty = expf(-expected / kMaxima);
      const float variance =
          expected * (1.0f - fraction) * empty * empty + kMaxima * empty * (1.0f - (1.0f + expected / kMaxima) * empty);
      const float groups =
          fminf(fminf(k, 60.0f), ceilf(kMaxima * (1.0f - empty) + 4.6f * sqrtf(variance) + 2.5f - 2.2f * fraction));
      const float keys = -kMaxima * logf(1.0f - groups / kMaxima);
      const float cost = fraction * window.length + kHitCost * keys / fraction;
      const bool fits =
          fraction * window.length >= 4.0f * keys && keys + 6.0f * sqrtf(keys) <= kMostCandidates * fraction;
      if (step > 0 && (cost >= best || !fits))
        continue;
      best = cost;
      phase_bits = max(0, 2 - step);
      skip_bits = max(0, step - 2);
      rank = static_cast<int>(groups);
      this->expected = static_cast<int>(keys / fraction / 4.0f);
    }
  }

  // The slot of column c of sample tile i.
  __device__ int sample_slot(int i, int c) const {
    const int box = box_at(i, c / kSampleBox);
    return sample_block(i) * kSampleBlock + (box * kSampleBox + c % kSampleBox) * 8 + sample_phase(i, box);
  }
  __device__ int sample_tiles() const {
    return rank ? ((blocks + (1 << skip_bits) - 1) >> skip_bits) << phase_bits : 0;
  }
  __device__ int sample_block(int i) const {
    const int block = first_block + (i >> phase_bits << skip_bits);
    return block < block_count ? block : block - block_count;
  }
  // Which of 8 slots a box of sample tile i takes, and where in the tile it goes: at random, so that no pattern among
  // the keys is sampled more or less often than others, nor equal keys into one group again and again.
  __device__ int sample_phase(int i, int box) const {
    return (scrambled(sample_block(i) * kSampleBoxes + box) + (i << (3 - phase_bits))) & 7;
  }
  __device__ int sample_place(int i, int box) const { return (box + scrambled(~sample_block(i))) % kSampleBoxes; }
  __device__ int box_at(int i, int place) const {
    return (place + kSampleBoxes - scrambled(~sample_block(i))) % kSampleBoxes;
  }
  static __device__ int scrambled(int number) {  // 0 to 7
    uint32_t bits = static_cast<uint32_t>(number) * 0x9E3779B1u;
    bits = (bits ^ bits >> 15) * 0x85EBCA77u;
    return static_cast<int>(bits >> 29);
  }
  // Can every slot of a sample block be sampled, and is it visible?
  __device__ bool shows_whole_block(int block) const {
    const int slot = block * kSampleBlock;
    return slot + kSampleBlock <= window.slots && window.age(slot) + kSampleBlock <= window.length;
  }
};

// Shared memory of one consumer warp, which searches for 16 queries.
struct alignas(8) WarpScratch {
  uint64_t buffer[WarpTopK::kCapacity];
  float floor[16];              // scores of the lists' entries below it do not count
  TilePlan plan;                // here and not in registers, which the loop over the tiles needs
  int row;                      // of the memory
  unsigned char shortened[16];  // how often a query's lists were the long ones; more than allowed: given up
};

template <int dim>
struct ScanShape {
  static constexpr int kGroups = dim > 128 ? 2 : 4;  // consumer warpgroups, of 64 queries each
  static constexpr int kQueries = 64 * kGroups;
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kConsumerRegisters = kGroups == 4 ? 112 : 208;
  static constexpr int kColumns = dim % 64 == 0 ? 64 : 32;  // columns of one swizzled chunk
  static constexpr int kChunks = dim / kColumns;
  static constexpr int kRowBytes = kColumns * 2;
  static constexpr int kQueryBytes = kQueries * dim * 2;
  static constexpr int kStageBytes = kScanTile * dim * 2;
  static constexpr int kSelectBytes = 4 * kGroups * sizeof(WarpScratch);
  static constexpr int kStagesThatFit = (232448 - 1024 - 256 - kSelectBytes - kQueryBytes) / kStageBytes;
  static constexpr int kStages = kStagesThatFit < 6 ? kStagesThatFit : 6;
  static constexpr int kSharedBytes =
      1024 + 256 + kSelectBytes + kQueryBytes + kStages * kStageBytes;  // all that there is, at D 96 and 128
};

}  // namespace memtrans
