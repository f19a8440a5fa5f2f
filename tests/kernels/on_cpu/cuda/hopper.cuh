// In place of csrc/cuda/hopper.cuh, on a CPU. Products come from a table: which tile a lane is at is what it has waited
// for.
#pragma once

#include "warp.h"

namespace memtrans {

constexpr uint32_t kQueriesLoaded = 8;  // the barrier that is waited for before a job's first tile

// The score of one of the warp's queries and a column of tile `number` that is loaded for a job.
inline std::function<float(int query, int number, int column)> score_of;
inline int tile_of_lane[Warp::kLanes];

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pointer));
}

inline void barrier_init(uint32_t, int) {}
inline void barrier_init_fence() {}
inline void barrier_expect_bytes(uint32_t, int) {}
inline void barrier_arrive(uint32_t) {}
inline void barrier_wait_idly(uint32_t, uint32_t) {}
inline void barrier_wait(uint32_t barrier, uint32_t) {
  int& tile = tile_of_lane[threadIdx.x];
  tile = barrier == kQueriesLoaded ? -1 : tile + 1;
}
inline void named_barrier(int, int) { __syncwarp(); }
inline void async_proxy_fence() {}

inline void load_tile_2d(uint32_t, const CUtensorMap*, uint32_t, int, int) {}
inline void load_tile_3d(uint32_t, const CUtensorMap*, uint32_t, int, int, int) {}
inline void load_tile_4d(uint32_t, const CUtensorMap*, uint32_t, int, int, int, int) {}
template <int>
void registers_down() {}
template <int>
void registers_up() {}

template <int>
uint64_t matrix_descriptor(uint32_t low) {
  return low;
}
inline uint32_t matrix_low_word(uint32_t address) { return address; }
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int>
void wgmma_wait(float (&)[64]) {}

// The first step of a product gives all of it.
template <typename T, bool add>
void wgmma_m64n128k16(float (&d)[64], uint64_t, uint64_t) {
  if (add)
    return;
  const int lane = threadIdx.x;
  for (int i = 0; i < 64; ++i)
    d[i] = score_of(lane / 4 + 8 * (i / 2 % 2), tile_of_lane[lane], 8 * (i / 4) + 2 * (lane % 4) + i % 2);
}

}  // namespace memtrans
