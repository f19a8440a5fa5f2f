// Keeps the lists of knn_scan short where more keys reach a threshold than its sample promised: copies of a key, or
// keys that get better and better.
//
// Each of a query's four lanes proposes an entry of its list. Of the proposals that K of all entries come up to, the
// best one is the query's bound: what does not come up to it is no neighbour, nor will a later key be. More than K
// entries may be left, as no proposal need be the K-th. A warp does this for all of its queries side by side, in two
// passes over their lists; scan_select.cuh shortens the lists of one query to its K best.
#pragma once

#include "cuda/knn_search/scan_plan.cuh"

namespace memtrans {

// A place in the order of neighbours: the higher score first, then the lower age.
struct Bound {
  float score;
  int age;

  __device__ bool is_reached_by(float other, int other_age) const {
    return (other > score) | ((other == score) & (other_age <= age));  // without a branch
  }
  // What a key that is no older than next_age has to reach.
  __device__ float threshold(int next_age) const {
    return age < next_age && score > -INFINITY ? unsortable(sortable(score) + 1) : score;
  }
};

// The lists of a lane's query: its own one, and those of the three lanes beside it.
struct ListCut {
  float4* list;
  int length;
  Window window;

  struct Left {
    int records;  // of the lane's list
    Bound bound;  // -inf: none was found
  };

  static __device__ __noinline__ Left cut(ListCut self, int k) {
    const Bound bound = self.best_proposal(k);
    return {self.drop_below(bound), bound};
  }

  // Infinite scores do not count, as their keys may not: what is not known to be a neighbour bounds nothing.
  __device__ Bound best_proposal(int k) const {
    const Bound own = proposal(k);
    Bound proposals[4];
    int reached[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      proposals[i] = {__shfl_sync(kAllLanes, own.score, i, 4), __shfl_sync(kAllLanes, own.age, i, 4)};
    visit([&](int, const float4& record, int first, int second) {
      const float x = record.x < INFINITY ? record.x : -INFINITY, y = record.y < INFINITY ? record.y : -INFINITY;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        reached[i] += proposals[i].is_reached_by(x, first) + proposals[i].is_reached_by(y, second);
    });
    Bound best{-INFINITY, -1};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool is_better = best.is_reached_by(proposals[i].score, proposals[i].age);
      best = of_four(reached[i]) >= k && is_better ? proposals[i] : best;
    }
    return best;
  }

  // The better entry of a record. Copies stand in the order of their ages, maybe two in a record, so the first lane's
  // is about the K-th of all from the front; keys that get better stand in the opposite order, so the last lane's is
  // from the back. What stands in no order may be anywhere, for which the other two are from the middle and behind it.
  __device__ Bound proposal(int k) const {
    const int lane = threadIdx.x % 4, share = length * k / max(of_four(length), 1);  // of K records
    const int early = share + share / 4 + 2, late = length - 2 * share - 1;
    const float4 single = record(early);
    const int front = single.x == single.y ? early / 2 + 1 : early;
    const float4 proposed = record(lane == 0 ? front : lane == 3 ? late : (1 + lane) * length / 4);
    const int slot = 2 * __float_as_int(proposed.z) + (proposed.y > proposed.x);
    return {length > 0 ? fmaxf(proposed.x, proposed.y) : INFINITY, window.age(slot)};
  }

  // Leaves the records of which an entry comes up to the bound, in their order, and returns how many of the lane's own.
  __device__ int drop_below(const Bound& bound) const {
    const int lane = threadIdx.x % 4;
    int left[4] = {};
    visit([&](int of, const float4& record, int first, int second) {
      const bool stays = bound.is_reached_by(record.x, first) | bound.is_reached_by(record.y, second);
      const unsigned all = __ballot_sync(kAllLanes, stays) >> threadIdx.x / 4 % 8 * 4 & 15u;
      if (stays)
        list_of(of)[left[of] + __popc(all & ((1u << lane) - 1))] = record;
      left[of] += __popc(all);
    });
    return lane == 0 ? left[0] : lane == 1 ? left[1] : lane == 2 ? left[2] : left[3];
  }

  // visit(lane, record, age of its first slot, of its second one) for the records of all four lists, each in one of the
  // four lanes, side by side: a lane that read its own list alone would fetch 32 bytes for each 16. Where a list has
  // ended both scores are -inf. All lanes of the warp alike.
  template <typename Visit>
  __device__ void visit(Visit visit) const {
    constexpr int kAtOnce = 2;
    const int longest = __reduce_max_sync(kAllLanes, length), lane = threadIdx.x % 4;
    int lengths[4];
#pragma unroll
    for (int of = 0; of < 4; ++of)
      lengths[of] = __shfl_sync(kAllLanes, length, of, 4);
#pragma unroll 1
    for (int first = lane; first < longest + lane; first += 4 * kAtOnce) {
      float4 records[4][kAtOnce];
#pragma unroll
      for (int of = 0; of < 4; ++of)
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          records[of][i] = __ldcg(list_of(of) + (first + 4 * i < lengths[of] ? first + 4 * i : 0));
#pragma unroll
      for (int of = 0; of < 4; ++of)
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          float4& record = records[of][i];
          const bool is_there = first + 4 * i < lengths[of];
          record.x = is_there ? record.x : -INFINITY;
          record.y = is_there ? record.y : -INFINITY;
          const int slot = is_there ? 2 * __float_as_int(record.z) : 0;
          visit(of, record, window.age(slot), window.age(slot + 1));
        }
    }
  }

  __device__ float4* list_of(int lane) const {
    return list + (lane - static_cast<int>(threadIdx.x % 4)) * kListRecords;
  }
  __device__ float4 record(int place) const { return __ldcg(list + max(min(place, length - 1), 0)); }

  static __device__ int of_four(int number) {
    number += __shfl_xor_sync(kAllLanes, number, 1);
    return number + __shfl_xor_sync(kAllLanes, number, 2);
  }
};

}  // namespace memtrans
