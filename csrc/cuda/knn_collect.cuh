// What a consumer of knn_scan does with an accumulator in registers: 64 queries x 128 keys, of which a thread holds 32 columns
// of two queries (rows lane / 4 and lane / 4 + 8 of its warp's 16; scores[4j + 2e + c] is query e, column 8j + 2 (lane % 4) + c).
#pragma once

#include "knn_plan.cuh"

namespace memtrans {

// The group of a query's 64 that a thread's column belongs to: columns side by side to different ones.
__device__ constexpr int group_of(int i) { return i / 4 % 8 * 2 + i % 2; }

// Takes one 64 x 128 accumulator into the running maxima of the thread's two queries.
__device__ inline void take_maxima(const float (&scores)[64], float (&maxima)[2][16]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) maxima[i / 2 % 2][group_of(i)] = fmaxf(maxima[i / 2 % 2][group_of(i)], scores[i]);
}

// The same for a sample tile that may hold slots out of sight.
__device__ inline void take_visible_maxima(const float (&scores)[64], float (&maxima)[2][16], const ScanPlan& plan, int tile,
                                           int limit) {
#pragma unroll
  for (int i = 0; i < 64; i += 4) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = i * 2 + (threadIdx.x & 3) * 2 + c, box = plan.box_at(tile, column / kSampleBox);
      const int slot = plan.sample_block(tile) * kSampleBlock + (box * kSampleBox + column % kSampleBox) * 8 +
                       plan.sample_phase(tile, box);
      if (slot >= limit || !plan.window.shows(slot)) continue;
      maxima[0][group_of(i + c)] = fmaxf(maxima[0][group_of(i + c)], scores[i + c]);
      maxima[1][group_of(i + c)] = fmaxf(maxima[1][group_of(i + c)], scores[i + 2 + c]);
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
  return fmaxf(low, kLowest);  // where no maximum is finite, the steps lead to -inf, which hidden slots would reach
}

#define MEMTRANS_APPEND(compare, type, value, threshold)                                        \
  asm volatile(                                                                                 \
      "{\n"                                                                                     \
      ".reg .pred hit;\n"                                                                       \
      ".reg .b64 address;\n"                                                                    \
      ".reg .b32 id;\n"                                                                         \
      compare " hit, %1, %2;\n"                                                                 \
      "mov.b64 address, {%0, %6};\n"                                                            \
      "mad.lo.u32 id, %7, %8, %5;\n"                                                            \
      "@hit st.global.v2.f32 [address], {%3, %4};\n"                                            \
      "@hit st.global.u32 [address + 8], id;\n"                                                 \
      "@hit mad.lo.u32 %0, %7, 16, %0;\n"                                                       \
      "}\n"                                                                                     \
      : "+r"(next[e])                                                                           \
      : type(value), type(threshold), "f"(first), "f"(second), "r"(pair), "r"(high), "r"(one), "r"(step) \
      : "memory")

// A thread's lists, one for each of its two queries: where the next record {score, score of the next slot, slot / 2} goes.
// `one` is 1, unknown to the compiler: sums through it use the multiply pipe and leave the adder to the comparisons.
struct HitLists {
  uint32_t next[2];  // low words of the addresses
  uint32_t high;     // high word of all of them
  int one;
  int room = 0;      // how often 4 records more can be appended to any list of the warp, beside those of one tile

  // Appends the scores of two slots if the larger one reaches the threshold. positive: floats that compare as their bits
  // do. The record's slot / 2 is pair + step.
  template <bool positive>
  __device__ void append(int e, float first, float second, float threshold, int pair, int step) {
    if constexpr (positive)
      MEMTRANS_APPEND("setp.ge.s32", "r", max(__float_as_int(first), __float_as_int(second)), __float_as_int(threshold));
    else
      MEMTRANS_APPEND("setp.ge.f32", "f", fmaxf(first, second), threshold);
  }
  __device__ int length(int e) const { return static_cast<int>(next[e] & (kListBytes - 1)) / 16; }
  __device__ int longest() const { return __reduce_max_sync(kAllLanes, max(length(0), length(1))); }
  __device__ void set_room(int longest) { room = (kListRecords - 4 - kTileRecords - longest) / 4; }
};

// Does any of 8 scores reach the threshold? Above 0 three floats compare at once, as their bits.
template <bool positive>
__device__ inline bool any_reaches(const float (&s)[8], float threshold) {
  if constexpr (positive) {
    int largest = __vimax3_s32(__float_as_int(s[0]), __float_as_int(s[1]), __float_as_int(s[2]));
    largest = __vimax3_s32(largest, __float_as_int(s[3]), __float_as_int(s[4]));
    largest = max(__vimax3_s32(largest, __float_as_int(s[5]), __float_as_int(s[6])), __float_as_int(s[7]));
    return largest >= __float_as_int(threshold);
  }
  return fmaxf(fmaxf(fmaxf(s[0], s[1]), fmaxf(s[2], s[3])), fmaxf(fmaxf(s[4], s[5]), fmaxf(s[6], s[7]))) >= threshold;
}

// One 64 x 128 accumulator against the thresholds of the thread's two queries; positive: all of the warp's are above 0.
// pair is half the slot of the thread's first column.
template <bool positive>
__device__ inline void collect_hits(const float (&scores)[64], const float (&threshold)[2], HitLists& lists, int pair) {
#pragma unroll
  for (int g = 0; g < 4; ++g) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float eight[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) eight[i] = scores[16 * g + i / 2 * 4 + 2 * e + i % 2];
      if (!__any_sync(kAllLanes, any_reaches<positive>(eight, threshold[e]))) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        lists.append<positive>(e, eight[2 * i], eight[2 * i + 1], threshold[e], pair, 16 * g + 4 * i);
      --lists.room;
    }
  }
}

// The same for tiles of which the window hides a part.
__device__ inline void collect_visible_hits(const float (&scores)[64], const float (&threshold)[2], HitLists& lists, int pair,
                                            const Window& window) {
#pragma unroll
  for (int i = 0; i < 64; i += 4) {
    const int slot = 2 * (pair + i);
    const bool first_shown = window.shows(slot), second_shown = window.shows(slot + 1);
#pragma unroll
    for (int e = 0; e < 2; ++e)
      lists.append<false>(e, first_shown ? scores[i + 2 * e] : -INFINITY, second_shown ? scores[i + 2 * e + 1] : -INFINITY,
                          threshold[e], pair, i);
  }
  lists.room -= kTileRecords / 4;
}

// The largest score of each of the thread's two queries in one 64 x 128 accumulator.
__device__ inline void take_largest(const float (&scores)[64], float (&largest)[2]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], scores[i]);
}

// The same for tiles of which the window hides a part; pair is half the slot of the thread's first column.
__device__ inline void take_visible_largest(const float (&scores)[64], float (&largest)[2], int pair, const Window& window) {
#pragma unroll
  for (int i = 0; i < 64; ++i)
    if (window.shows(2 * (pair + i / 4 * 4) + i % 2)) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], scores[i]);
}

}  // namespace memtrans
