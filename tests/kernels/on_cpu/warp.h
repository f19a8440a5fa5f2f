// A warp on a CPU: 32 fibers, each of which runs until the next intrinsic that the lanes of a warp call together. Lanes
// go on in another order each time, so that code which needs a barrier and has none gives other results in some runs.
// Included before CUDA sources, in place of what nvcc knows by itself.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>

#define __device__
#define __global__
#define __host__
#define __shared__
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)

using std::isfinite;
using std::max;
using std::min;

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) ulonglong2 {
  uint64_t x, y;
};
struct Place {
  unsigned x;
};
inline Place threadIdx{0}, blockIdx{0}, gridDim{132};
struct CUtensorMap {};

// What all lanes do next has to be the same.
enum class Meeting { shuffle, vote, reduction, barrier, end };

class Warp {
 public:
  static constexpr int kLanes = 32;

  // Runs what the lane's number is given to, once for each lane; throws where lanes do not meet at the same intrinsic.
  static void run(const std::function<void(int)>& of_lane, uint64_t seed) {
    body = of_lane;
    std::mt19937_64 order(seed);
    for (int lane = 0; lane < kLanes; ++lane) {
      getcontext(&lanes[lane]);
      lanes[lane].uc_stack.ss_sp = stacks[lane];
      lanes[lane].uc_stack.ss_size = sizeof stacks[lane];
      lanes[lane].uc_link = &caller;
      makecontext(&lanes[lane], begin, 0);
    }
    do {
      const unsigned turn = order();
      for (int i = 0; i < kLanes; ++i) {
        threadIdx.x = (turn % 2 ? kLanes - 1 - i : i) ^ turn / 2 % kLanes;
        swapcontext(&caller, &lanes[threadIdx.x]);
      }
      for (int lane = 1; lane < kLanes; ++lane)
        if (meeting[lane] != meeting[0])
          throw std::logic_error("lanes of a warp have parted");
    } while (meeting[0] != Meeting::end);
  }

  static void meet(Meeting where) {
    const unsigned lane = threadIdx.x;
    meeting[lane] = where;
    swapcontext(&lanes[lane], &caller);
    threadIdx.x = lane;
  }

  // Every lane gives a number; use(numbers) is called when all of them have.
  template <typename Number, typename Use>
  static auto together(Meeting where, Number number, Use use) {
    static_assert(sizeof(Number) <= sizeof given[0]);
    std::memcpy(&given[threadIdx.x], &number, sizeof number);
    meet(where);
    Number numbers[kLanes];
    for (int lane = 0; lane < kLanes; ++lane)
      std::memcpy(&numbers[lane], &given[lane], sizeof number);
    meet(where);  // all have read
    return use(numbers);
  }

 private:
  static void begin() {
    body(threadIdx.x);
    meeting[threadIdx.x] = Meeting::end;
  }

  inline static std::function<void(int)> body;
  inline static ucontext_t caller, lanes[kLanes];
  inline static char stacks[kLanes][1 << 18];
  inline static Meeting meeting[kLanes];
  inline static uint64_t given[kLanes];
};

template <typename Number>
Number __shfl_sync(unsigned, Number number, int lane, int width = 32) {
  const int first = threadIdx.x / width * width;
  return Warp::together(Meeting::shuffle, number, [&](const Number* n) { return n[first + (lane & (width - 1))]; });
}
template <typename Number>
Number __shfl_xor_sync(unsigned, Number number, int mask) {
  return Warp::together(Meeting::shuffle, number, [&](const Number* n) { return n[threadIdx.x ^ mask]; });
}
template <typename Number>
Number __shfl_up_sync(unsigned, Number number, unsigned by) {
  const unsigned lane = threadIdx.x;
  return Warp::together(Meeting::shuffle, number, [&](const Number* n) { return n[lane >= by ? lane - by : lane]; });
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  return Warp::together(Meeting::vote, vote, [](const bool* votes) {
    unsigned bits = 0;
    for (int lane = 0; lane < Warp::kLanes; ++lane)
      bits |= static_cast<unsigned>(votes[lane]) << lane;
    return bits;
  });
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == 0xFFFFFFFFu; }
template <typename Number>
Number __reduce_add_sync(unsigned, Number number) {
  return Warp::together(Meeting::reduction, number, [](const Number* n) {
    Number sum = 0;
    for (int lane = 0; lane < Warp::kLanes; ++lane)
      sum += n[lane];
    return sum;
  });
}
template <typename Number>
Number __reduce_min_sync(unsigned, Number number) {
  return Warp::together(Meeting::reduction, number, [](const Number* n) { return *std::min_element(n, n + 32); });
}
template <typename Number>
Number __reduce_max_sync(unsigned, Number number) {
  return Warp::together(Meeting::reduction, number, [](const Number* n) { return *std::max_element(n, n + 32); });
}
inline void __syncwarp() { Warp::meet(Meeting::barrier); }
inline void __syncthreads() {}
inline void __threadfence() {}

template <typename To, typename From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline int __float_as_int(float number) { return same_bits<int>(number); }
inline uint32_t __float_as_uint(float number) { return same_bits<uint32_t>(number); }
inline float __int_as_float(int bits) { return same_bits<float>(bits); }
inline float __uint_as_float(uint32_t bits) { return same_bits<float>(bits); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __logf(float number) { return std::log(number); }
inline uint32_t __float2uint_rz(float number) {
  return number >= 4294967296.0f ? 0xFFFFFFFFu : number > 0.0f ? static_cast<uint32_t>(number) : 0;
}
inline int __vimax3_s32(int a, int b, int c) { return max(a, max(b, c)); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(bits); }
template <typename Number>
Number __ldcg(const Number* place) {
  return *place;
}
inline uint32_t atomicAdd(uint32_t* place, uint32_t number) {
  const uint32_t before = *place;
  *place += number;
  return before;
}
