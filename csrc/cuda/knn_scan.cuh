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
constexpr int kSampleBlock = 8 * kScanTile;  // slots that one sample tile represents
constexpr int kMaxima = 64;              // group maxima per query
constexpr int kListRecords = 128;        // records of one thread's list for one query
constexpr int kListFull = 123;           // a visit appends at most 4 records to a list
constexpr int kListBytes = kListRecords * 16;
constexpr int kListAlignment = 16 * 4 * kListBytes;  // the lists of a warp: no 4 GB boundary among them
constexpr float kMostCandidates = 440;   // of a query, six deviations above the mean: what its lists hold
constexpr int kUnsampledLength = 640;    // so few visible keys, and the rest of their tiles, fit the lists whole
constexpr float kLowest = -3.402823466e+38f;

struct ScanArguments {
  const int64_t* rows;
  const int64_t* start;
  const int64_t* cursor;
  const void* keys;
  float* scores;
  int32_t* slots;
  uint64_t* entries;    // (queries, parts, k), where there are several parts: few_merge makes scores and slots of them
  char* lists;          // kListAlignment-aligned; 4 lists a query, kQueries queries a block of the grid
  uint32_t* redo_count;
  uint32_t* redo;       // query * parts + part
  uint32_t* redo_done;  // (kSpreadQueries,): parts of a redone query that are ready
  uint64_t* redo_entries;  // (kSpreadQueries, kRedoParts, k)
  int64_t row_count;
  int queries_per_row;
  int parts;            // pieces of a row's window, searched by different blocks
  int slot_count;       // M + S
  int capacity;
  int k;
  float hit_cost;       // cost of one candidate, in scanned keys
  int one;              // 1
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
  static constexpr int kSelectBytes = 4 * kGroups * WarpTopK::kCapacity * 8;
  static constexpr int kStagesThatFit = (232448 - 1024 - 256 - kSelectBytes - kQueryBytes) / kStageBytes;
  static constexpr int kStages = kStagesThatFit < 6 ? kStagesThatFit : 6;
  static constexpr int kSharedBytes = 1024 + 256 + kSelectBytes + kQueryBytes + kStages * kStageBytes;
};

// One unit of work: a block's queries against one piece of one row's window.
struct ScanJob {
  int64_t index;    // row of the batch, of B * G
  int row;          // row of the memory
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

// What one block streams for one job: sample tiles, then tiles of all visible keys.
struct ScanPlan {
  Window window;
  int first_block, blocks, block_count, phase_bits, skip_bits, rank;  // the sample; rank 0: none
  int first_tile, tiles, tile_count;

  __device__ ScanPlan(Window window, int k, float hit_cost) : window(window) {
    tile_count = (window.slots + kScanTile - 1) / kScanTile;
    first_tile = window.first / kScanTile;
    tiles = span(kScanTile, tile_count);
    block_count = (window.slots + kSampleBlock - 1) / kSampleBlock;
    first_block = window.first / kSampleBlock;
    blocks = span(kSampleBlock, block_count);
    if (blocks >= 8) {  // the first and the last are partly out of sight
      first_block = first_block + 1 < block_count ? first_block + 1 : 0;
      blocks -= 2;
    }
    choose_sample(k, hit_cost);
  }

  __device__ int span(int size, int count) const {
    if (window.length == 0) return 0;
    const int end = window.first + window.length;
    if (end <= window.slots) return (end - 1) / size - window.first / size + 1;
    return min(count, count - window.first / size + (end - window.slots + size - 1) / size);
  }

  // The fraction of keys to sample: scanning a key costs 1, a candidate hit_cost. The K - 1 best keys have a binomial number
  // in the sample, which fall into so many distinct groups; rank is what that number reaches about once in a million queries
  // of independent keys (4.6 deviations and a little, within 1 of the exact number for K from 1 to 128).
  __device__ void choose_sample(int k, float hit_cost) {
    phase_bits = skip_bits = rank = 0;
    if (window.length <= kUnsampledLength) return;
    float best = 3e38f;
    const float covered = fminf(1.0f, static_cast<float>(blocks) * kSampleBlock / window.length);
    for (int step = 0; step < 6; ++step) {
      const float fraction = 0.5f / (1 << step) * covered;
      const float expected = k * fraction, empty = expf(-expected / kMaxima);
      const float variance = expected * (1.0f - fraction) * empty * empty +
                             kMaxima * empty * (1.0f - (1.0f + expected / kMaxima) * empty);
      const float groups = fminf(fminf(k, 60.0f), ceilf(kMaxima * (1.0f - empty) + 4.6f * sqrtf(variance) + 2.5f - 2.2f * fraction));
      const float keys = -kMaxima * logf(1.0f - groups / kMaxima);
      const float cost = fraction * window.length + hit_cost * keys / fraction;
      const bool fits = fraction * window.length >= 4.0f * keys && keys + 6.0f * sqrtf(keys) <= kMostCandidates * fraction;
      if (step > 0 && (cost >= best || !fits)) continue;
      best = cost;
      phase_bits = max(0, 2 - step);
      skip_bits = max(0, step - 2);
      rank = static_cast<int>(groups);
    }
  }

  __device__ int sample_tiles() const { return rank ? ((blocks + (1 << skip_bits) - 1) >> skip_bits) << phase_bits : 0; }
  __device__ int sample_block(int i) const {
    const int block = first_block + (i >> phase_bits << skip_bits);
    return block < block_count ? block : block - block_count;
  }
  __device__ int sample_phase(int i) const { return (sample_block(i) * 5 + 3 + (i << (3 - phase_bits))) & 7; }
  __device__ int tile_slot(int i) const {
    const int tile = first_tile + i;
    return (tile < tile_count ? tile : tile - tile_count) * kScanTile;
  }
  // Are all of `count` slots from `slot` on, in steps of `step`, visible?
  __device__ bool shows_all(int slot, int step, int limit) const {
    const int span = step * (kScanTile - 1);
    return slot + span < limit && window.age(slot) + span < window.length;
  }
};

// Goes round the stages twice: which stage is next, and the phase of its barriers.
template <int stages>
struct StageCursor {
  int position = 0;
  __device__ int index() const { return position < stages ? position : position - stages; }
  __device__ uint32_t phase() const { return position >= stages; }
  __device__ void advance() { position = position + 1 < 2 * stages ? position + 1 : 0; }
};

// Takes one 64 x 128 accumulator into the running maxima of the thread's two queries: column pair i into group i.
__device__ inline void take_maxima(const float (&scores)[64], float (&maxima)[2][16]) {
#pragma unroll
  for (int i = 0; i < 64; i += 2) maxima[i / 2 % 2][i / 4] = fmaxf(maxima[i / 2 % 2][i / 4], fmaxf(scores[i], scores[i + 1]));
}

// The same where column c, slot base + 8 * c, may be out of sight.
__device__ inline void take_visible_maxima(const float (&scores)[64], float (&maxima)[2][16], const Window& window, int base,
                                           int limit) {
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

// A thread's lists, one for each of its two queries: where the next record {score, score of the next slot, slot / 2} goes.
// `one` is 1, unknown to the compiler: sums through it use the multiply pipe and leave the adder to the comparisons.
struct HitLists {
  uint32_t next[2];  // low words of the addresses
  uint32_t high;     // high word of all of them
  int one;

  // Appends where value >= threshold. The record's slot / 2 is pair + step.
  __device__ void append(int e, int value, int threshold, float first, float second, int pair, int step) {
    asm volatile(
        "{\n"
        ".reg .pred hit;\n"
        ".reg .b64 address;\n"
        ".reg .b32 id;\n"
        "setp.ge.s32 hit, %1, %2;\n"
        "mov.b64 address, {%0, %6};\n"
        "mad.lo.u32 id, %7, %8, %5;\n"
        "@hit st.global.v2.f32 [address], {%3, %4};\n"
        "@hit st.global.u32 [address + 8], id;\n"
        "@hit mad.lo.u32 %0, %7, 16, %0;\n"
        "}\n"
        : "+r"(next[e])
        : "r"(value), "r"(threshold), "f"(first), "f"(second), "r"(pair), "r"(high), "r"(one), "r"(step)
        : "memory");
  }
  __device__ void stop_at_end(int e) { next[e] = min(next[e], (next[e] | (kListBytes - 1)) - (kListBytes - 1 - kListFull * 16)); }
};

// One 64 x 128 accumulator against the thresholds of the thread's two queries, both above 0, where floats compare as their
// bits do. pair is half the slot of the thread's first column.
__device__ inline void collect_hits(const float (&scores)[64], const float (&threshold)[2], HitLists& lists, int pair) {
#pragma unroll
  for (int g = 0; g < 4; ++g) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const auto score = [&](int i) { return scores[16 * g + i / 2 * 4 + 2 * e + i % 2]; };
      const auto bits = [&](int i) { return __float_as_int(score(i)); };
      const int limit = __float_as_int(threshold[e]);
      int largest = __vimax3_s32(bits(0), bits(1), bits(2));
      largest = __vimax3_s32(largest, bits(3), bits(4));
      largest = max(__vimax3_s32(largest, bits(5), bits(6)), bits(7));
      if (!__any_sync(kAllLanes, largest >= limit)) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        lists.append(e, max(bits(2 * i), bits(2 * i + 1)), limit, score(2 * i), score(2 * i + 1), pair, 16 * g + 4 * i);
      lists.stop_at_end(e);
    }
  }
}

// The same for any thresholds and for tiles of which the window hides a part.
__device__ inline void collect_carefully(const float (&scores)[64], const float (&threshold)[2], HitLists& lists, int pair,
                                         const Window& window) {
#pragma unroll
  for (int i = 0; i < 64; i += 4) {
    const int slot = 2 * (pair + i);
    const bool first_shown = window.shows(slot), second_shown = window.shows(slot + 1);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float first = first_shown ? scores[i + 2 * e] : -INFINITY, second = second_shown ? scores[i + 2 * e + 1] : -INFINITY;
      lists.append(e, fmaxf(first, second) >= threshold[e], 1, first, second, pair, i);
      lists.stop_at_end(e);
    }
  }
}

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
    const ScanPlan plan(job.window, arguments.k, arguments.hit_cost);
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

// Where the result of one query against one part goes.
struct ScanResult {
  const ScanArguments& arguments;
  Window window;
  int64_t query;
  int part;

  __device__ void put(int rank, uint64_t entry) const {
    if (arguments.parts > 1) {
      arguments.entries[(query * arguments.parts + part) * arguments.k + rank] = entry;
      return;
    }
    arguments.scores[query * arguments.k + rank] = entry ? entry_score(entry) : -INFINITY;
    arguments.slots[query * arguments.k + rank] = entry ? window.slot(entry_age(entry)) : -1;
  }
  __device__ void pad(int from) const {
    for (int rank = from + threadIdx.x % 32; rank < arguments.k; rank += 32) put(rank, 0);
  }
  __device__ void redo() const {
    if (threadIdx.x % 32 == 0)
      arguments.redo[atomicAdd(arguments.redo_count, 1)] = static_cast<uint32_t>(query * arguments.parts + part);
  }
};

// One warp selects the K best of the four lists of one query: 8 lanes read a list.
template <typename T, int dim>
struct ListSelection {
  static constexpr int kLoads = 8;        // records of a lane in the common case
  static constexpr int kMostKept = 192;   // entries that are worth ranking by comparing all pairs
  const ScanArguments& arguments;
  Window window;
  const T* keys;         // of the row
  uint64_t* buffer;      // of the warp

  struct Lists {
    const char* place;   // of the lane's first record; the next ones are 8 records on
    int count;           // records of the lane's list, less those before its first
    float threshold;

    // Record i of the lane; whatever the list's memory holds where there is none.
    // Does any lane have more than half of kLoads records?
    __device__ bool many() const { return __any_sync(kAllLanes, count > 8 * kLoads / 2); }
    __device__ float4 record(int i) const { return __ldcg(reinterpret_cast<const float4*>(place + 128 * i)); }
    // Scores that reach nothing, where there is no record i.
    __device__ void hide_missing(float4& record, int i) const {
      record.x = 8 * i < count ? record.x : -INFINITY;
      record.y = 8 * i < count ? record.y : -INFINITY;
    }
  };

  // Any number of records, any ties, non-finite keys. Out of line, with everything by value: what it takes by address would
  // live in memory on the common path too.
  static __device__ __noinline__ void select_slowly(ListSelection self, Lists lists, ScanResult result) {
    WarpTopK best(self.buffer, self.arguments.k);
    const auto offer = [&](float score, int slot) {
      bool counted = score >= lists.threshold;
      if (counted && score == INFINITY) counted = key_is_finite(self.keys + static_cast<int64_t>(slot) * dim, dim);
      best.push(counted, make_entry(score, self.window.age(slot) + self.window.offset));
    };
    for (int i = 0; __any_sync(kAllLanes, 8 * i < lists.count); ++i) {
      float4 record = lists.record(i);
      lists.hide_missing(record, i);
      const int slot = 2 * __float_as_int(record.z);
      offer(record.x, slot);
      offer(record.y, slot + 1);
    }
    if (best.count < min(self.arguments.k, self.window.length) && lists.threshold > kLowest) return result.redo();
    best.finish([&](int rank, uint64_t entry) { result.put(rank, entry); });
    result.pad(best.count);
  }

  // Up to kLoads records a lane, already loaded; reload() may overwrite them once the best are in shared memory.
  template <typename Reload>
  __device__ void select(const Lists& lists, float4 (&records)[kLoads], bool many, const ScanResult& result,
                         Reload reload) const {
    for_records(many, [&](int i) { lists.hide_missing(records[i], i); });
    int mine;  // the lane's scores from the bound up
    const int found = reaching(records, many, lists.threshold, mine);
    const float largest = warp_largest(records, many);
    const bool full = __any_sync(kAllLanes, lists.count + static_cast<int>(threadIdx.x % 8) >= kListFull);
    const bool hard = __any_sync(kAllLanes, lists.count > 8 * kLoads) || largest == INFINITY;
    const bool is_short = !hard && found < min(arguments.k, window.length) && lists.threshold > kLowest;
    int kept = 0;
    if (!full && !hard && !is_short) {
      float bound = lists.threshold;
      if (found > arguments.k) bound = kth_score(records, many, lists.threshold, largest, found, mine);
      kept = compact(records, many, bound, mine);
    }
    const Lists current = lists;
    reload();
    if (full || is_short) result.redo();
    else if (hard || kept > kMostKept) select_slowly(*this, current, result);  // kept: ties
    else rank(kept, result);
  }

  template <typename Visit>
  static __device__ void for_records(bool many, Visit visit) {
#pragma unroll
    for (int i = 0; i < kLoads / 2; ++i) visit(i);
    if (!many) return;
#pragma unroll
    for (int i = kLoads / 2; i < kLoads; ++i) visit(i);
  }

  // Puts {score, slot} of the records' scores from bound up into the buffer, as far as they fit, and counts them; `mine` are
  // the lane's.
  __device__ int compact(const float4 (&records)[kLoads], bool many, float bound, int mine) const {
    int end = mine;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int before = __shfl_up_sync(kAllLanes, end, offset);
      if (static_cast<int>(threadIdx.x % 32) >= offset) end += before;
    }
    const int kept = __shfl_sync(kAllLanes, end, 31);
    if (kept > kMostKept) return kept;
    uint32_t place = shared_address(buffer + end - mine);
    const auto store = [&](float score, int slot) {
      asm volatile(
          "{\n"
          ".reg .pred kept;\n"
          "setp.ge.f32 kept, %1, %3;\n"
          "@kept st.shared.v2.b32 [%0], {%4, %2};\n"
          "@kept add.u32 %0, %0, 8;\n"
          "}\n"
          : "+r"(place)
          : "f"(score), "r"(slot), "f"(bound), "r"(__float_as_int(score))
          : "memory");
    };
    for_records(many, [&](int i) {
      const int slot = 2 * __float_as_int(records[i].z);
      store(records[i].x, slot);
      store(records[i].y, slot + 1);
    });
    __syncwarp();
    return kept;
  }

  static __device__ int reaching(const float4 (&records)[kLoads], bool many, float score, int& mine) {
    int first = 0, second = 0;
    const auto count = [&](int& total, float value) {
      asm("{\n.reg .pred reached;\nsetp.ge.f32 reached, %1, %2;\n@reached add.s32 %0, %0, 1;\n}\n"
          : "+r"(total)
          : "f"(value), "f"(score));
    };
    for_records(many, [&](int i) {
      count(first, records[i].x);
      count(second, records[i].y);
    });
    mine = first + second;
    return __reduce_add_sync(kAllLanes, mine);
  }

  static __device__ float warp_largest(const float4 (&records)[kLoads], bool many) {
    float largest = -INFINITY;
    for_records(many, [&](int i) { largest = fmaxf(largest, fmaxf(records[i].x, records[i].y)); });
    return unsortable(__reduce_max_sync(kAllLanes, sortable(largest)));
  }

  static __device__ float warp_smallest(const float4 (&records)[kLoads], bool many) {
    float smallest = INFINITY;
    for_records(many, [&](int i) {
      smallest = fminf(smallest, records[i].x >= kLowest ? records[i].x : INFINITY);
      smallest = fminf(smallest, records[i].y >= kLowest ? records[i].y : INFINITY);
    });
    return unsortable(__reduce_min_sync(kAllLanes, sortable(smallest)));
  }

  // A score that k records reach; more only where scores tie. The first guesses assume that counts fall exponentially.
  // `mine` are the lane's scores that reach it.
  __device__ float kth_score(const float4 (&records)[kLoads], bool many, float threshold, float largest, int found,
                             int& mine) const {
    float low = threshold == kLowest ? warp_smallest(records, many) : threshold, high = largest;
    float at_low = static_cast<float>(found), at_high = 0.7f;
    const float k = static_cast<float>(arguments.k);
    for (int step = 0; step < 64; ++step) {
      const float share = step < 8 ? __fdividef(__logf(__fdividef(at_low, k)), __logf(__fdividef(at_low, at_high))) : 0.5f;
      float middle = low + share * (high - low);
      if (!(middle > low && middle <= high)) middle = 0.5f * low + 0.5f * high;
      if (!(middle > low && middle <= high)) middle = high;
      const int reached = reaching(records, many, middle, mine);
      if (reached == arguments.k) return middle;
      if (reached > arguments.k) {
        low = middle;
        at_low = reached;
        if (low == high) break;
      } else {
        if (middle == high && at_high >= 1.0f) break;
        high = middle;
        at_high = fmaxf(reached, 1.0f);
      }
    }
    reaching(records, many, low, mine);
    return low;
  }

  // Writes the k best of the {score, slot} in the buffer, best first.
  __device__ void rank(int kept, const ScanResult& result) const {
    for (int i = threadIdx.x % 32; i < kept; i += 32) {
      const float2 raw = reinterpret_cast<const float2*>(buffer)[i];
      buffer[i] = make_entry(raw.x, window.age(__float_as_int(raw.y)) + window.offset);
    }
    if (threadIdx.x % 32 == 0 && kept % 2) buffer[kept] = 0;
    __syncwarp();
    for (int i = threadIdx.x % 32; i < kept; i += 32) {
      const uint64_t entry = buffer[i];
      int rank = 0;
#pragma unroll 4
      for (int other = 0; other < kept; other += 2) {
        const ulonglong2 two = *reinterpret_cast<const ulonglong2*>(buffer + other);
        rank += (two.x > entry) + (two.y > entry);
      }
      if (rank < arguments.k) result.put(rank, entry);
    }
    result.pad(kept);
    __syncwarp();
  }
};

template <typename T, int dim>
__device__ void consume(const ScanArguments& arguments, ScanConsumer<T, dim>& consumer, uint64_t* buffer, uint32_t query_full,
                        uint32_t query_empty) {
  using Shape = ScanShape<dim>;
  using Selection = ListSelection<T, dim>;
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16;  // this warp's first query in the block
  char* const lists = arguments.lists + static_cast<int64_t>(blockIdx.x) * Shape::kQueries * 4 * kListBytes;
  const uint64_t own = reinterpret_cast<uint64_t>(lists) + ((first + lane / 4) * 4 + lane % 4) * kListBytes;
  const uint32_t own_low = static_cast<uint32_t>(own), own_high = static_cast<uint32_t>(own >> 32);
  const int64_t jobs = ScanJob::count(arguments, Shape::kQueries);
  uint32_t query_phase = 0;
  for (int64_t number = blockIdx.x; number < jobs; number += gridDim.x, query_phase ^= 1) {
    const ScanJob job(arguments, number, Shape::kQueries);
    const ScanPlan plan(job.window, arguments.k, arguments.hit_cost);
    barrier_wait(query_full, query_phase);

    float threshold[2] = {kLowest, kLowest};
    if (plan.rank > 0) {
      float maxima[2][16];
#pragma unroll
      for (int i = 0; i < 32; ++i) maxima[i / 16][i % 16] = -INFINITY;
      const int limit = arguments.slot_count / 8 * 8;
      consumer.stream(plan.sample_tiles(), [&](const float(&scores)[64], int tile) {
        const int slot = plan.sample_block(tile) * kSampleBlock + plan.sample_phase(tile);
        if (plan.shows_all(slot, 8, limit)) take_maxima(scores, maxima);
        else take_visible_maxima(scores, maxima, plan.window, slot, limit);
      });
#pragma unroll
      for (int e = 0; e < 2; ++e) threshold[e] = group_threshold(maxima[e], plan.rank);
    }

#pragma unroll
    for (int e = 0; e < 2; ++e)  // a block may have queries to spare: what they hold is another row's, or zeros
      if (job.first_query + first + lane / 4 + 8 * e >= arguments.queries_per_row) threshold[e] = INFINITY;
    HitLists hits{{own_low, own_low + 8 * 4 * kListBytes}, own_high, arguments.one};
    const bool positive = threshold[0] > 0.0f && threshold[1] > 0.0f;
    const int ring_end = plan.tile_count - 1 - plan.first_tile, last = plan.tiles - 1;
    int pair = plan.first_tile * (kScanTile / 2) + lane % 4;
    consumer.stream(plan.tiles, [&](const float(&scores)[64], int tile) {
      // only the first and the last tile of the window and that at the end of the ring have slots to hide
      const bool plain = positive & (tile != 0) & (tile != last) & (tile != ring_end);
      if (__all_sync(kAllLanes, plain)) collect_hits(scores, threshold, hits, pair);
      else collect_carefully(scores, threshold, hits, pair, plan.window);
      pair = tile == ring_end ? lane % 4 : pair + kScanTile / 2;
    });
    if (lane == 0) barrier_arrive(query_empty);
    __syncwarp();

    const T* keys = static_cast<const T*>(arguments.keys) + static_cast<int64_t>(job.row) * arguments.slot_count * dim;
    const Selection selection{arguments, plan.window, keys, buffer};
    const int records[2] = {static_cast<int>(hits.next[0] - own_low) / 16,
                            static_cast<int>(hits.next[1] - own_low - 8 * 4 * kListBytes) / 16};
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
    bool many = false;
    const auto load = [&] {
      many = current.many();
      Selection::for_records(many, [&](int j) { loaded[j] = current.record(j); });
    };
    load();
#pragma unroll 1
    for (int i = 0; i < queries; ++i) {
      const int64_t query = job.index * arguments.queries_per_row + job.first_query + first + i;
      selection.select(current, loaded, many, {arguments, plan.window, query, job.part}, [&] {
        current = lists_of(min(i + 1, 15));
        load();
      });
    }
    __syncwarp();
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
