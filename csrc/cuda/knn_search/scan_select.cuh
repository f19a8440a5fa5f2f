// The last step of knn_scan: from the lists of a query to its K best, by one warp.
#pragma once

#include "cuda/hopper.cuh"
#include "cuda/knn_search/scan_plan.cuh"
#include "cuda/predicated.cuh"

namespace memtrans {

// Where the K best of one query go: to the outputs, or, as entries, to a place of their own where they are but those of
// a part of the window.
struct ScanResult {
  const ScanArguments& arguments;
  Window window;
  int64_t query;
  int part;
  uint64_t* entries;  // null: the outputs

  __device__ ScanResult(
      const ScanArguments& arguments, const Window& window, int64_t query, int part, uint64_t* entries = nullptr)
      : arguments(arguments), window(window), query(query), part(part), entries(entries) {
    if (entries == nullptr && arguments.parts > 1)
      this->entries = arguments.entries + (query * arguments.parts + part) * arguments.k;
  }
  __device__ void put(int rank, uint64_t entry) const {
    if (entries != nullptr) {
      entries[rank] = entry;
      return;
    }
    arguments.scores[query * arguments.k + rank] = entry ? entry_score(entry) : -INFINITY;
    arguments.slots[query * arguments.k + rank] = entry ? window.slot(entry_age(entry) - window.offset) : -1;
  }
  __device__ void pad(int from) const {
    for (int rank = from + threadIdx.x % 32; rank < arguments.k; rank += 32)
      put(rank, 0);
  }
  // Leaves the query to knn_redo, in tiles of queries of the same stretch.
  __device__ void redo() const {
    if (threadIdx.x % 32 != 0)
      return;
    const uint32_t in_row = static_cast<uint32_t>(query % arguments.queries_per_row);
    const uint32_t stretch = static_cast<uint32_t>(query / arguments.queries_per_row) * arguments.parts + part;
    const uint32_t place = atomicAdd(arguments.redo_count + stretch, 1u);
    arguments.redo[static_cast<int64_t>(stretch) * arguments.queries_per_row + place] = in_row;
    if (place % arguments.redo_queries == 0)
      arguments.redo_tile[atomicAdd(arguments.redo_tiles, 1u)] = {stretch, place / arguments.redo_queries};
  }
};

// One warp selects the K best of the four lists of one query: 8 lanes read a list.
template <typename T, int dim>
struct ListSelection {
  static constexpr int kLoads = 8;        // records of a lane in the common case
  static constexpr int kIdleGuesses = 3;  // of a score, after which one that there is follows
  static constexpr int kMostKept = 192;   // entries that are worth ranking by comparing all pairs
  const ScanArguments& arguments;
  Window window;
  uint64_t* buffer;  // of the warp

  struct Lists {
    const char* place;  // of the lane's first record; the next ones are 8 records on
    int count;          // records of the lane's list, less those before its first
    float floor;        // scores below it do not count
    int row;            // of the memory

    // Record i of the lane, or its first again where there is none: reading on past a list would fetch lines from DRAM
    // and drive out written ones.
    __device__ float4 record(int i) const {
      return __ldcg(reinterpret_cast<const float4*>(place + (8 * i < count ? 128 * i : 0)));
    }
    // Scores that reach nothing, where there is no record i.
    __device__ void hide_missing(float4& record, int i) const {
      record.x = 8 * i < count ? record.x : -INFINITY;
      record.y = 8 * i < count ? record.y : -INFINITY;
    }
  };

  // Offers all records to a selection: any number of them, any ties, non-finite keys.
  __device__ void offer_all(const Lists& lists, WarpTopK& best) const {
    const T* const keys =
        static_cast<const T*>(arguments.keys) + static_cast<int64_t>(lists.row) * arguments.slot_count * dim;
    const auto offer = [&](float score, int slot) {
      bool counted = score >= lists.floor;
      if (counted && score == INFINITY)
        counted = key_is_finite(keys + static_cast<int64_t>(slot) * dim, dim);
      best.push(counted, make_entry(score, window.age(slot) + window.offset));
    };
    for (int i = 0; __any_sync(kAllLanes, 8 * i < lists.count); ++i) {
      float4 record = lists.record(i);
      lists.hide_missing(record, i);
      const int slot = 2 * __float_as_int(record.z);
      offer(record.x, slot);
      offer(record.y, slot + 1);
    }
  }

  // Out of line, with everything by value: what it takes by address would live in memory on the common path too.
  static __device__ __noinline__ void select_slowly(ListSelection self, Lists lists, ScanResult result) {
    WarpTopK best(self.buffer, self.arguments.k);
    self.offer_all(lists, best);
    if (best.count < min(self.arguments.k, self.window.length) && lists.floor > kLowest)
      return result.redo();
    best.finish([&](int rank, uint64_t entry) { result.put(rank, entry); });
    result.pad(best.count);
  }

  struct Shortened {
    int count;        // entries that are left in the lists, dealt out to one after the other
    float threshold;  // what a key that is scored later must reach
    float floor;      // what the entries in the lists reach, and K of them if so many have been found
  };

  // The place of entry i of those that are left in the lists of a query, dealt out to one after the other.
  static __device__ char* place_of(const Lists& lists, int i) {
    const int lane = threadIdx.x % 32;
    return const_cast<char*>(lists.place) - (lane / 8 * kListBytes + lane % 8 * 16) + i % 4 * kListBytes + i / 4 * 16;
  }
  static __device__ void leave(const Lists& lists, int i, float score, int slot) {
    *reinterpret_cast<float4*>(place_of(lists, i)) = {
        slot % 2 ? -INFINITY : score, slot % 2 ? score : -INFINITY, __int_as_float(slot / 2), 0.0f};
  }

  // Leaves the K best in the lists, and few more. Keys that are scored later are no older than next_age. For what this
  // does not serve, shorten_slowly.
  static __device__ __noinline__ Shortened shorten(ListSelection self, Lists lists, float threshold, int next_age) {
    constexpr int kAll = kListRecords / 8;  // records of a lane: all are in registers at once
    constexpr int kNone = 0;
    uint32_t score[2 * kAll];  // sortable
    int pair[kAll], found = 0;
    bool infinite = false;
#pragma unroll
    for (int i = 0; i < kAll; ++i) {
      float4 record = lists.record(i);
      lists.hide_missing(record, i);
      pair[i] = __float_as_int(record.z);
      score[2 * i] = record.x >= lists.floor ? sortable(record.x) : kNone;
      score[2 * i + 1] = record.y >= lists.floor ? sortable(record.y) : kNone;
      found += (score[2 * i] != kNone) + (score[2 * i + 1] != kNone);
      infinite = infinite || record.x == INFINITY || record.y == INFINITY;
    }
    const int k = self.arguments.k;
    if (__any_sync(kAllLanes, infinite) || __reduce_add_sync(kAllLanes, found) < k)
      return shorten_slowly(self, lists, threshold, next_age);
    const int slack = shortened_slack(k);
    const uint32_t bound = kth_largest(score, k, slack);
    uint32_t youth[2 * kAll];  // of those that share the bound: larger for older ones
    int above = 0, equal = 0;
#pragma unroll
    for (int i = 0; i < 2 * kAll; ++i) {
      const bool shares = score[i] == bound;
      youth[i] = shares ? ~static_cast<uint32_t>(self.window.age(2 * pair[i / 2] + i % 2)) : kNone;
      above += score[i] > bound;
      equal += shares;
    }
    above = __reduce_add_sync(kAllLanes, above);
    equal = __reduce_add_sync(kAllLanes, equal);
    const uint32_t oldest = above < k ? kth_largest(youth, k - above, slack) : 0;
    int mine = 0;
#pragma unroll
    for (int i = 0; i < 2 * kAll; ++i)
      mine += score[i] > bound || (score[i] == bound && youth[i] >= oldest);
    int place = mine;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int before = __shfl_up_sync(kAllLanes, place, offset);
      if (static_cast<int>(threadIdx.x % 32) >= offset)
        place += before;
    }
    place -= mine;
    __syncwarp();  // every lane has its records
#pragma unroll
    for (int i = 0; i < 2 * kAll; ++i)
      if (score[i] > bound || (score[i] == bound && youth[i] >= oldest))
        leave(lists, place++, unsortable(score[i]), 2 * pair[i / 2] + i % 2);
    __syncwarp();
    // K of those that are left reach the bound; do all of them win over a later key that only does the same?
    uint32_t youngest = 0xFFFFFFFFu;
#pragma unroll
    for (int i = 0; i < 2 * kAll; ++i)
      if (score[i] > bound || (score[i] == bound && youth[i] >= oldest))
        youngest = min(youngest, ~static_cast<uint32_t>(self.window.age(2 * pair[i / 2] + i % 2)));
    const bool ties_lose = static_cast<int>(~__reduce_min_sync(kAllLanes, youngest)) < next_age;
    return {__reduce_add_sync(kAllLanes, mine), unsortable(bound + ties_lose), unsortable(bound)};
  }

  // The same for any number of infinite scores.
  static __device__ __noinline__ Shortened
  shorten_slowly(ListSelection self, Lists lists, float threshold, int next_age) {
    WarpTopK best(self.buffer, self.arguments.k);
    self.offer_all(lists, best);
    best.prune();
    uint64_t worst = ~uint64_t{0};
    for (int i = threadIdx.x % 32; i < best.count; i += 32) {
      const uint64_t entry = self.buffer[i];
      worst = min(worst, entry);
      leave(lists, i, entry_score(entry), self.window.slot(entry_age(entry) - self.window.offset));
    }
    __syncwarp();
    if (best.count < self.arguments.k)
      return {best.count, threshold, lists.floor};
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2)
      worst = min(worst, __shfl_xor_sync(kAllLanes, worst, offset));
    const uint32_t score = static_cast<uint32_t>(worst >> 32);
    const bool ties_lose = entry_age(worst) < next_age + self.window.offset && entry_score(worst) < INFINITY;
    return {best.count, unsortable(score + ties_lose), unsortable(score)};
  }

  // Up to kLoads records a lane, already loaded; reload() may overwrite them once the best are in shared memory.
  template <typename Reload>
  __device__ void select(
      const Lists& lists, bool given_up, float4 (&records)[kLoads], const ScanResult& result, Reload reload) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      lists.hide_missing(records[i], i);
    int mine;  // the lane's scores from the bound up
    const int found = reaching(records, lists.floor, mine);
    const float largest = warp_largest(records);
    const bool more = __any_sync(kAllLanes, lists.count > 8 * kLoads);
    const bool is_short = !more && found < min(arguments.k, window.length) && lists.floor > kLowest;
    const bool left = given_up || is_short;
    int kept = kMostKept + 1;
    if (!left && largest < INFINITY) {
      float bound = lists.floor;
      if (found > arguments.k)
        bound = kth_score(records, lists.floor, largest, found, mine);
      kept = compact(records, bound, mine);
      if (more && kept <= kMostKept)
        kept = compact_rest(*this, lists, bound, kept);
    }
    const Lists current = lists;
    reload();
    if (left)
      result.redo();
    else if (kept > kMostKept)
      select_slowly(*this, current, result);
    else
      rank(kept, result);
  }

  // Puts {score, slot} of the records' scores from bound up into the buffer, from place `first` on and as far as they
  // fit, and counts them and those before them; `mine` are the lane's.
  __device__ int compact(const float4 (&records)[kLoads], float bound, int mine, int first = 0) const {
    int end = mine;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int before = __shfl_up_sync(kAllLanes, end, offset);
      if (static_cast<int>(threadIdx.x % 32) >= offset)
        end += before;
    }
    end += first;
    const int kept = __shfl_sync(kAllLanes, end, 31);
    if (kept > kMostKept)
      return kept;
    uint32_t place = shared_address(buffer + end - mine);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int slot = 2 * __float_as_int(records[i].z);
      store_reaching(place, records[i].x, slot, bound);
      store_reaching(place, records[i].y, slot + 1, bound);
    }
    __syncwarp();
    return kept;
  }

  // Puts those of the lists' further records behind the `kept` ones of the first kLoads of a lane, and counts all: too
  // many for the buffer where one is infinite, or where fewer than so many as there may be neighbours reach the bound.
  static __device__ __noinline__ int compact_rest(ListSelection self, Lists lists, float bound, int kept) {
    static_assert(kListRecords == 2 * 8 * kLoads, "two times kLoads are all of a list");
    float4 records[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      records[i] = lists.record(kLoads + i);
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      lists.hide_missing(records[i], kLoads + i);
    int mine;
    reaching(records, bound, mine);
    kept = self.compact(records, bound, mine, kept);
    const bool enough = kept >= min(self.arguments.k, self.window.length) || bound == kLowest;
    return enough && warp_largest(records) < INFINITY ? kept : kMostKept + 1;
  }

  static __device__ int reaching(const float4 (&records)[kLoads], float score, int& mine) {
    int first = 0, second = 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      count_reaching(first, records[i].x, score);
      count_reaching(second, records[i].y, score);
    }
    mine = first + second;
    return __reduce_add_sync(kAllLanes, mine);
  }

  static __device__ float warp_largest(const float4 (&records)[kLoads]) {
    float largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      largest = fmaxf(largest, fmaxf(records[i].x, records[i].y));
    return unsortable(__reduce_max_sync(kAllLanes, sortable(largest)));
  }

  static __device__ float largest_below(const float4 (&records)[kLoads], float score) {
    float largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      largest = fmaxf(largest, records[i].x < score ? records[i].x : -INFINITY);
      largest = fmaxf(largest, records[i].y < score ? records[i].y : -INFINITY);
    }
    return unsortable(__reduce_max_sync(kAllLanes, sortable(largest)));
  }

  static __device__ float warp_smallest(const float4 (&records)[kLoads]) {
    float smallest = INFINITY;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      smallest = fminf(smallest, records[i].x >= kLowest ? records[i].x : INFINITY);
      smallest = fminf(smallest, records[i].y >= kLowest ? records[i].y : INFINITY);
    }
    return unsortable(__reduce_min_sync(kAllLanes, sortable(smallest)));
  }

  // A score that k records reach; more only where scores tie. The first guesses assume that counts fall exponentially.
  // `mine` are the lane's scores that reach it. Where several guesses in a row find as many scores as the last one,
  // scores may tie, and the next guess is one of them.
  __device__ float kth_score(const float4 (&records)[kLoads], float floor, float largest, int found, int& mine) const {
    float low = floor == kLowest ? warp_smallest(records) : floor, high = largest;
    float at_low = static_cast<float>(found), at_high = 0.7f;
    const float k = static_cast<float>(arguments.k);
    int idle = 0;
    for (int step = 0; step < 64; ++step) {
      if (idle == kIdleGuesses) {
        idle = 0;
        const float next = largest_below(records, at_high < 1.0f ? INFINITY : high);
        const int reached = reaching(records, next, mine);
        if (reached >= arguments.k)
          return next;
        high = next;
        at_high = static_cast<float>(reached);
        continue;
      }
      const float share =
          step < 8 ? __fdividef(__logf(__fdividef(at_low, k)), __logf(__fdividef(at_low, at_high))) : 0.5f;
      float middle = low + share * (high - low);
      if (!(middle > low && middle <= high))
        middle = 0.5f * low + 0.5f * high;
      if (!(middle > low && middle <= high))
        middle = high;
      const int reached = reaching(records, middle, mine);
      if (reached == arguments.k)
        return middle;
      const float count = static_cast<float>(reached);
      idle = count == at_low || count == at_high ? idle + 1 : 0;
      if (reached > arguments.k) {
        low = middle;
        at_low = count;
        if (low == high)
          break;
      } else {
        if (middle == high && at_high >= 1.0f)
          break;
        high = middle;
        at_high = fmaxf(count, 1.0f);
      }
    }
    reaching(records, low, mine);
    return low;
  }

  // Writes the k best of the {score, slot} in the buffer, best first.
  __device__ void rank(int kept, const ScanResult& result) const {
    for (int i = threadIdx.x % 32; i < kept; i += 32) {
      const float2 raw = reinterpret_cast<const float2*>(buffer)[i];
      buffer[i] = make_entry(raw.x, window.age(__float_as_int(raw.y)) + window.offset);
    }
    if (threadIdx.x % 32 == 0 && kept % 2)
      buffer[kept] = 0;
    __syncwarp();
    for (int i = threadIdx.x % 32; i < kept; i += 32) {
      const uint64_t entry = buffer[i];
      int even = 0, odd = 0;  // better ones
#pragma unroll 4
      for (int other = 0; other < kept; other += 2) {
        const ulonglong2 two = *reinterpret_cast<const ulonglong2*>(buffer + other);
        count_above(even, two.x, entry);
        count_above(odd, two.y, entry);
      }
      if (even + odd < arguments.k)
        result.put(even + odd, entry);
    }
    result.pad(kept);
    __syncwarp();
  }
};

}  // namespace memtrans
