// What a consumer of knn_scan does with an accumulator in registers: 64 queries x 128 keys, of which a thread holds 32 columns
// of two queries (rows lane / 4 and lane / 4 + 8 of its warp's 16; scores[4j + 2e + c] is query e, column 8j + 2 (lane % 4) + c).
#pragma once

#include "cuda/knn_search/scan_plan.cuh"

namespace memtrans {

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
  return fmaxf(low, kLowest);  // where no maximum is finite, the steps lead to -inf, which hidden slots would reach
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

}  // namespace memtrans
