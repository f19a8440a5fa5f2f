// Exact selection of the k best of any number of scored slots, by one warp, with shared memory for 256 of them.
//
// An entry is 64 bits: the score made sortable in the high word, the complement of the slot's age rank in the low word,
// so that a larger entry is a better neighbour and, between equal scores, the older slot wins. Entries are distinct, so
// the result does not depend on the order in which they come.
#pragma once

#include <cstdint>

namespace memtrans {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr float kLowest = -3.402823466e+38f;
constexpr int kBoundSlack =
    8;  // values beyond K that may reach a bound: half of the steps to find it, and a tenth more groups

// Visible entries of one memory row: `length` slots from slot `first` on, wrapping round after slot slots - 1. `offset`
// entries of the row are older than these.
struct Window {
  int first;
  int length;
  int slots;
  int offset = 0;

  __device__ int age(int slot) const { return slot >= first ? slot - first : slot - first + slots; }
  __device__ int slot(int age) const { return first + age < slots ? first + age : first + age - slots; }
  __device__ bool shows(int slot) const { return slot < slots && age(slot) < length; }

  // One of `parts` equal pieces, the oldest first.
  __device__ Window piece(int part, int parts) const {
    const int begin = static_cast<int>(static_cast<int64_t>(length) * part / parts);
    const int end = static_cast<int>(static_cast<int64_t>(length) * (part + 1) / parts);
    return {slot(begin), end - begin, slots, offset + begin};
  }
};

__device__ inline Window visible_window(
    const int64_t* start, const int64_t* cursor, int64_t row, int capacity, int slots) {
  const int64_t end = cursor[row];
  const int64_t oldest = end - capacity > start[row] ? end - capacity : start[row];
  return {static_cast<int>(oldest % slots), static_cast<int>(end > oldest ? end - oldest : 0), slots, 0};
}

__device__ inline uint32_t sortable(float score) {
  const uint32_t bits = __float_as_uint(__fadd_rn(score, 0.0f));  // -0.0 ties with 0.0
  return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

__device__ inline float unsortable(uint32_t bits) { return __uint_as_float(bits >> 31 ? bits ^ 0x80000000u : ~bits); }

__device__ inline uint64_t make_entry(float score, int age) {
  return static_cast<uint64_t>(sortable(score)) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(age));
}

__device__ inline float entry_score(uint64_t entry) { return unsortable(static_cast<uint32_t>(entry >> 32)); }
__device__ inline int entry_age(uint64_t entry) { return static_cast<int>(0xFFFFFFFFu - static_cast<uint32_t>(entry)); }

// A score of +inf is a finite key whose score overflowed, or a key with an infinite component, which is never
// retrieved.
template <typename T>
__device__ inline bool key_is_finite(const T* key, int dim) {
  bool finite = true;
  for (int i = 0; i < dim; ++i)
    finite = finite && isfinite(static_cast<float>(key[i]));
  return finite;
}

// A value that at least `rank` of some values reach and at most rank + slack, or the largest that at least rank reach
// if ties leave nothing else. Of the values, at_low >= rank reach low, and none exceeds high; count(value) says how
// many reach one, and the same in every calling thread. The first probes assume that counts fall exponentially.
template <typename Count>
__device__ inline uint32_t reached_by(int rank, int slack, uint32_t low, uint32_t high, int at_low, Count count) {
  float reach_low = static_cast<float>(at_low), reach_high = 0.5f;  // of values above high: fewer than rank
  for (int step = 0; low < high && at_low > rank + slack; ++step) {
    const uint32_t span = high - low;
    const float share = __logf(reach_low / rank) / __logf(reach_low / reach_high);
    const uint32_t guess = step < 6 ? __float2uint_rz(share * span) : span / 2;
    const uint32_t middle = low + 1 + min(guess, span - 1);
    const int reached = count(middle);
    if (reached >= rank) {
      low = middle;
      at_low = reached;
      reach_low = static_cast<float>(reached);
    } else {
      high = middle - 1;
      reach_high = fmaxf(static_cast<float>(reached), 0.5f);
    }
  }
  return low;
}

// The largest value that at least `rank` of a warp's values reach, or any smaller one that at most rank + slack reach.
// At least rank values are not 0, which stands for no value.
template <int count>
__device__ inline uint32_t kth_largest(const uint32_t (&values)[count], int rank, int slack = 0) {
  uint32_t smallest = 0xFFFFFFFFu, largest = 0;
  int present = 0;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    largest = max(largest, values[i]);
    smallest = min(smallest, values[i] ? values[i] : 0xFFFFFFFFu);
    present += values[i] != 0;
  }
  const uint32_t low = __reduce_min_sync(kAllLanes, smallest), high = __reduce_max_sync(kAllLanes, largest);
  return reached_by(rank, slack, low, high, __reduce_add_sync(kAllLanes, present), [&](uint32_t value) {
    int reached = 0;
#pragma unroll
    for (int i = 0; i < count; ++i)
      reached += values[i] >= value;
    return __reduce_add_sync(kAllLanes, reached);
  });
}

struct WarpTopK {
  static constexpr int kCapacity = 256;
  static constexpr int kPerLane = kCapacity / 32;
  static constexpr int kRankedWhole = 64;  // so few entries are ranked without pruning: two of a lane

  uint64_t* buffer;  // shared memory of this warp, kCapacity entries
  int k;
  int count = 0;       // entries in the buffer, the same in every lane
  uint64_t floor = 0;  // an entry must be above this to matter

  __device__ WarpTopK(uint64_t* buffer, int k) : buffer(buffer), k(k) {}

  // Every lane offers one entry; k <= 128 leaves room for 32 more after a prune.
  __device__ void push(bool offered, uint64_t entry) {
    const bool taken = offered && entry > floor;
    const unsigned takers = __ballot_sync(kAllLanes, taken);
    if (takers == 0)
      return;
    if (count + 32 > kCapacity)
      prune();
    if (taken)
      buffer[count + __popc(takers & ((1u << (threadIdx.x & 31)) - 1))] = entry;
    count += __popc(takers);
    __syncwarp();
  }

  // Keeps the k best of the buffer.
  __device__ void prune() {
    if (count <= k)
      return;
    const int lane = threadIdx.x & 31;
    uint64_t mine[kPerLane];
    uint32_t high[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      mine[i] = lane + 32 * i < count ? buffer[lane + 32 * i] : 0;
      high[i] = static_cast<uint32_t>(mine[i] >> 32);
    }
    const uint32_t score = kth_largest(high, k);
    int above = 0, equal = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      above += high[i] > score;
      equal += high[i] == score;
    }
    above = __reduce_add_sync(kAllLanes, above);
    equal = __reduce_add_sync(kAllLanes, equal);
    uint32_t low_bound = 0;
    if (above + equal > k) {  // the k-th score is shared: the oldest of those that share it
      uint32_t low[kPerLane];
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        low[i] = high[i] == score ? static_cast<uint32_t>(mine[i]) : 0;
      low_bound = kth_largest(low, k - above);
    }
    const uint64_t bound = static_cast<uint64_t>(score) << 32 | low_bound;
    __syncwarp();
    count = 0;
    floor = bound - 1;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const bool kept = mine[i] >= bound && mine[i] != 0;
      const unsigned keepers = __ballot_sync(kAllLanes, kept);
      if (kept)
        buffer[count + __popc(keepers & ((1u << lane) - 1))] = mine[i];
      count += __popc(keepers);
    }
    __syncwarp();
  }

  // Gives visit(rank, entry) for the k best, each from one lane; ranks count from 0, the best. Afterwards count is how
  // many.
  template <typename Visit>
  __device__ void finish(Visit visit) {
    if (count > kRankedWhole)
      prune();
    for (int i = threadIdx.x & 31; i < count; i += 32) {
      const uint64_t entry = buffer[i];
      int rank = 0;
#pragma unroll 8
      for (int other = 0; other < count; ++other)
        rank += buffer[other] > entry;
      if (rank < k)
        visit(rank, entry);
    }
    count = min(count, k);
    __syncwarp();
  }
};

}  // namespace memtrans
