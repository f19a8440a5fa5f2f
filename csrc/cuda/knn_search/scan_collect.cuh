// What a consumer of knn_scan does with an accumulator in registers: 64 queries x 128 keys, of which a thread holds 32
// columns of two queries (rows lane / 4 and lane / 4 + 8 of its warp's 16; scores[4j + 2e + c] is query e, column 8j +
// 2 (lane % 4) + c).
#pragma once

#include "cuda/knn_search/scan_plan.cuh"
#include "cuda/predicated.cuh"

namespace memtrans {

// The group of a query's 64 that a thread's column belongs to: columns side by side to different ones.
__device__ constexpr int group_of(int i) { return i / 4 % 8 * 2 + i % 2; }

// Takes one 64 x 128 accumulator into the running maxima of the thread's two queries.
__device__ inline void take_maxima(const float (&scores)[64], float (&maxima)[2][16]) {
#pragma unroll
  for (int i = 0; i < 64; ++i)
    maxima[i / 2 % 2][group_of(i)] = fmaxf(maxima[i / 2 % 2][group_of(i)], scores[i]);
}

// Gives the 64 groups of each query other columns from here on: a key that comes again and again, at the same place of
// its box, is sampled into several groups that way, as often as one of its equals elsewhere would be.
__device__ inline void turn_groups(float (&maxima)[2][16], int turn) {
#pragma unroll
  for (int i = 0; i < 32; ++i)
    maxima[i / 16][i % 16] = __shfl_sync(kAllLanes, maxima[i / 16][i % 16], threadIdx.x + 1, 4);
  if (turn % 2)
    return;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const float last[3] = {maxima[e][13], maxima[e][14], maxima[e][15]};
#pragma unroll
    for (int i = 15; i >= 0; --i)
      maxima[e][i] = i < 3 ? last[i] : maxima[e][i - 3];
  }
}

// Of a tile, which column the thread's column c of 32 is.
__device__ inline int column(int c) { return c / 2 * 8 + threadIdx.x % 4 * 2 + c % 2; }

// Which of the thread's 32 columns of a tile from `slot` on the window hides: a bit each. Out of line, and before the
// tile's products are made: what few tiles need would take registers from all.
static __device__ __noinline__ uint32_t hidden_columns(Window window, int slot) {
  uint32_t hidden = 0;
  for (int c = 0; c < 32; ++c)
    hidden |= static_cast<uint32_t>(!window.shows(slot + column(c))) << c;
  return hidden;
}

// The same for sample tile i.
static __device__ __noinline__ uint32_t hidden_samples(SamplePlan plan, int i) {
  uint32_t hidden = 0;
  for (int c = 0; c < 32; ++c) {
    const int slot = plan.sample_slot(i, column(c));
    hidden |= static_cast<uint32_t>(slot >= plan.window.slots / 8 * 8 || !plan.window.shows(slot)) << c;
  }
  return hidden;
}

__device__ inline void hide(float (&scores)[64], uint32_t hidden) {
#pragma unroll
  for (int c = 0; c < 32; ++c)
    if (hidden >> c & 1)
      scores[c / 2 * 4 + c % 2] = scores[c / 2 * 4 + c % 2 + 2] = -INFINITY;
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
    for (int i = 0; i < 16; ++i)
      reached += maxima[i] >= middle;
    reached += __shfl_xor_sync(kAllLanes, reached, 1);
    reached += __shfl_xor_sync(kAllLanes, reached, 2);
    if (reached >= rank)
      low = middle;
    else
      high = middle;
  }
  return fmaxf(low, kLowest);  // where no maximum is finite, the steps lead to -inf, which hidden slots would reach
}

// A thread's lists, one for each of its two queries: where the next record {score, score of the next slot, slot / 2}
// goes.
struct HitLists {
  uint32_t next[2];  // low words of the addresses
  uint32_t high;     // high word of all of them
  int limit = 0;     // bytes of a list that can't wait for the next look: after a tile more there is still room

  // Appends those of four pairs of scores, 8 slots apart, of which one reaches the threshold; pair is half the first
  // slot.
  template <bool positive>
  __device__ void append(int e, const float (&s)[8], float threshold, int pair) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float first = s[2 * i], second = s[2 * i + 1];
      if constexpr (positive)
        append_reaching(
            next[e], high, max(__float_as_int(first), __float_as_int(second)), __float_as_int(threshold), first, second,
            pair + 4 * i);
      else
        append_reaching(next[e], high, fmaxf(first, second), threshold, first, second, pair + 4 * i);
    }
  }
  __device__ float4* records(int e) const {
    return reinterpret_cast<float4*>(static_cast<uint64_t>(high) << 32 | (next[e] & ~(kListBytes - 1u)));
  }
  __device__ int bytes(int e) const { return static_cast<int>(next[e] & (kListBytes - 1)); }
  __device__ int length(int e) const { return bytes(e) / 16; }
  __device__ int longest() const { return __reduce_max_sync(kAllLanes, max(length(0), length(1))); }
  __device__ bool some_are_long() const { return __any_sync(kAllLanes, max(bytes(0), bytes(1)) > limit); }
  __device__ bool many_exceed(int records) const {
    return __popc(__ballot_sync(kAllLanes, min(length(0), length(1)) > records)) >= kMany;
  }
  // In the first tiles fewer records make a list long, once.
  __device__ void begin_early(int k) { limit = 16 * early_records(k); }
  __device__ bool is_early() const { return limit < 16 * kLongList; }
  __device__ void end_early() { limit = 16 * kLongList; }
  // Each lane goes on with the next one's list, so that the copies of a key that stands again and again in the same
  // columns of a tile fill all four of a query.
  __device__ void turn_on() {
    limit = min(limit + 16 * kLater, 16 * kLongList);
    turn();
  }
  __device__ void turn() {
    next[0] = __shfl_sync(kAllLanes, next[0], threadIdx.x + 1, 4);
    next[1] = __shfl_sync(kAllLanes, next[1], threadIdx.x + 1, 4);
  }
  // Until each lane has its own list, as whoever looks for those of a query expects.
  __device__ void turn_back() {
    for (int i = 0; i < 3 && __any_sync(kAllLanes, (next[0] / kListBytes - threadIdx.x) % 4 != 0); ++i)
      turn();
  }
  // Leaves the first records of a list.
  __device__ void cut(int e, int records) { next[e] = (next[e] & ~(kListBytes - 1u)) + 16 * records; }
};

// Does any of 8 scores reach the threshold?
template <bool positive>
__device__ inline bool any_reaches(const float (&s)[8], float threshold) {
  if constexpr (positive) {
    const auto number = [&](int i) { return __float_as_int(s[i]); };
    const int most = __vimax3_s32(__vimax3_s32(number(0), number(1), number(2)), number(3), number(4));
    return max(__vimax3_s32(most, number(5), number(6)), number(7)) >= __float_as_int(threshold);
  }
  return fmaxf(fmaxf(fmaxf(s[0], s[1]), fmaxf(s[2], s[3])), fmaxf(fmaxf(s[4], s[5]), fmaxf(s[6], s[7]))) >= threshold;
}

// One 64 x 128 accumulator against the thresholds of the thread's two queries. positive: all of the warp's are above 0,
// where floats compare as their bits do, three at once. pair is half the slot of the thread's first column.
template <bool positive>
__device__ inline void collect_hits(const float (&scores)[64], const float (&threshold)[2], HitLists& lists, int pair) {
#pragma unroll
  for (int g = 0; g < 4; ++g) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float eight[8];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        eight[i] = scores[16 * g + i / 2 * 4 + 2 * e + i % 2];
      if (!__any_sync(kAllLanes, any_reaches<positive>(eight, threshold[e])))
        continue;
      lists.append<positive>(e, eight, threshold[e], pair + 16 * g);
    }
  }
}

// The largest score of each of the thread's two queries in one 64 x 128 accumulator.
__device__ inline void take_largest(const float (&scores)[64], float (&largest)[2]) {
#pragma unroll
  for (int i = 0; i < 64; ++i)
    largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], scores[i]);
}

}  // namespace memtrans
