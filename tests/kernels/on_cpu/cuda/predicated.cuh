// In place of csrc/cuda/predicated.cuh, on a CPU.
#pragma once

#include "warp.h"

namespace memtrans {

inline uint64_t shared_high;  // of the addresses of what is shared memory on a GPU

inline void count_reaching(int& total, float value, float score) { total += value >= score; }
inline void count_above(int& total, uint64_t entry, uint64_t than) { total += entry > than; }

inline void store_reaching(uint32_t& place, float score, int slot, float bound) {
  if (!(score >= bound))
    return;
  *reinterpret_cast<float2*>(shared_high << 32 | place) = {score, __int_as_float(slot)};
  place += 8;
}

template <typename Number>
void append_reaching(
    uint32_t& next, uint32_t high, Number larger, Number threshold, float first, float second, int pair) {
  if (!(larger >= threshold))
    return;
  float4& record = *reinterpret_cast<float4*>(static_cast<uint64_t>(high) << 32 | next);
  record.x = first;
  record.y = second;
  record.z = __int_as_float(pair);
  next += 16;
}

}  // namespace memtrans
