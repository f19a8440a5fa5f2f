// Vectors of floats, and the instruction set of this processor: code is compiled for several, one is picked at run
// time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string>

namespace memtrans {

// What runs in a function of one instruction set has to be inlined into it to be compiled for that set.
#define MEMTRANS_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define MEMTRANS_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define MEMTRANS_AVX2 __attribute__((target("avx2,fma")))
#endif

template <int kLanes>
struct VectorOf {
  typedef float type __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));
  typedef int32_t bits __attribute__((vector_size(kLanes * sizeof(float))));
};

template <int kLanes>
using Vector = typename VectorOf<kLanes>::type;

template <int kLanes>
MEMTRANS_INLINE const Vector<kLanes>& load(const float* numbers) {
  return *reinterpret_cast<const Vector<kLanes>*>(numbers);
}

template <int kLanes>
MEMTRANS_INLINE Vector<kLanes>& at(float* numbers) {
  return *reinterpret_cast<Vector<kLanes>*>(numbers);
}

// Makes x exp(x), to within 1e-7 of it, for x up to 88; 0 below -87. With n = round(x / ln 2) that is 2^n times a
// Taylor series. (In place: a vector that is passed by value is passed in the registers of the baseline.)
template <int kLanes>
MEMTRANS_INLINE void exponentiate(Vector<kLanes>& x) {
  using Bits = typename VectorOf<kLanes>::bits;
  constexpr float kRounder = 12582912.0f;  // 1.5 · 2^23: a sum with it is an integer, and ends in that integer's bits
  const Vector<kLanes> rounded = x * 1.44269504f + kRounder, n = rounded - kRounder;
  const Vector<kLanes> rest = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts, the first one short
  Vector<kLanes> series = rest * (1.0f / 5040.0f) + 1.0f / 720.0f;
  series = series * rest + 1.0f / 120.0f;
  series = series * rest + 1.0f / 24.0f;
  series = series * rest + 1.0f / 6.0f;
  series = series * rest + 0.5f;
  series = series * rest + 1.0f;
  series = series * rest + 1.0f;
  const Bits scaled = (Bits)series + ((Bits)rounded << 23);
  x = x < -87.0f ? Vector<kLanes>{} : (Vector<kLanes>)scaled;
}

// Makes x tanh(x), to within 2e-7 of it relative to it: near 0 by an odd polynomial, fitted to the least relative
// error.
template <int kLanes>
MEMTRANS_INLINE void take_tanh(Vector<kLanes>& x) {
  const Vector<kLanes> size = x < 0.0f ? -x : x, square = x * x;
  Vector<kLanes> series = square * -0.005895043258f + 0.02079586685f;
  series = series * square - 0.05378379673f;
  series = series * square + 0.1333192437f;
  series = series * square - 0.3333329856f;
  series = x + x * (series * square);
  Vector<kLanes> power = 2.0f * (size > 10.0f ? size * 0.0f + 10.0f : size);
  exponentiate<kLanes>(power);
  const Vector<kLanes> far = 1.0f - 2.0f / (power + 1.0f);
  x = size < 0.6f ? series : (x < 0.0f ? -far : far);
}

MEMTRANS_INLINE float dot(const float* left, const float* right, int64_t width) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t column = 0; column < width; ++column) {
    sum += left[column] * right[column];
  }
  return sum;
}

#if defined(__x86_64__)
// Of what was compiled three times, the one for the fastest instruction set that this processor has, or that
// ATEN_CPU_CAPABILITY (avx512, avx2, default) limits all of PyTorch to.
template <typename Compiled>
Compiled fastest(Compiled avx512, Compiled avx2, Compiled anywhere) {
  const char* const variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string limit = variable ? variable : "avx512";
  if (limit == "avx512" && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return avx512;
  }
  if (limit != "default" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2;
  }
  return anywhere;
}
#endif

}  // namespace memtrans
