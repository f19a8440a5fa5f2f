// The best K of the keys that each of some queries was offered, in any number, by score and then by age.
#pragma once

#include "cpu/vectors.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

namespace memtrans {

// One retrieved key as a number whose order is (score, then age): larger is better. `position` counts the visible keys
// of a row from old to new. Zero stands for no key: a score of -inf or NaN is never retrieved.
using Found = uint64_t;

inline Found found(float score, int64_t position) {
  const float unsigned_zero = score + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &unsigned_zero, sizeof(bits));
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<Found>(ordered) << 32 | ~static_cast<uint32_t>(position);
}

inline float score_of(Found found) {
  const uint32_t ordered = static_cast<uint32_t>(found >> 32);
  const uint32_t bits = ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered;
  float score;
  std::memcpy(&score, &bits, sizeof(score));
  return score;
}

inline int64_t position_of(Found found) { return static_cast<uint32_t>(~found); }

// Keys above a query's threshold are put aside; every K of them the best K are kept and the threshold rises to the
// K-th.
class BestKeys {
 public:
  // Queries `queries` to `padded` stand for nothing: their threshold is one that no score passes.
  BestKeys(int64_t queries, int64_t padded, int64_t k)
      : k_(k),
        aside_(queries * 2 * k),
        sizes_(queries, 0),
        thresholds_(padded, std::numeric_limits<float>::infinity()) {
    std::fill_n(thresholds_.begin(), queries, -std::numeric_limits<float>::infinity());
  }

  // One for each query: only keys with a greater score are worth offering. It rises, and a stale one is safe.
  const float* thresholds() const { return thresholds_.data(); }

  // Keys have to be offered from old to new.
  MEMTRANS_INLINE void offer(int64_t query, float score, int64_t position) {
    Found* aside = &aside_[query * 2 * k_];
    int64_t& size = sizes_[query];
    aside[size++] = found(score, position);
    if (size == 2 * k_) {
      thresholds_[query] = score_of(keep_best(aside));
      size = k_;
    }
  }

  // Writes the best K of a query, best first, and returns how many there are.
  int64_t take(int64_t query, Found* best) {
    Found* aside = &aside_[query * 2 * k_];
    const int64_t size = sizes_[query], taken = std::min(size, k_);
    std::partial_sort(aside, aside + taken, aside + size, std::greater<Found>());
    std::copy_n(aside, taken, best);
    return taken;
  }

 private:
  static constexpr int64_t kFew = 32;

  // Moves the best K of 2 K to the front and returns the least of them. Few are counted out: each stays if fewer than K
  // are better, which takes vectors and no branch (16 of 32 in a fifth of the time of nth_element).
  MEMTRANS_INLINE Found keep_best(Found* aside) const {
    if (k_ > kFew) {
      std::nth_element(aside, aside + k_ - 1, aside + 2 * k_, std::greater<Found>());
      return aside[k_ - 1];
    }
    Found better[2 * kFew] = {}, least = 0;
    for (int64_t rival = 0; rival < 2 * k_; ++rival) {
      const Found of_rival = aside[rival];
#pragma omp simd
      for (int64_t place = 0; place < 2 * k_; ++place) {
        better[place] += of_rival > aside[place];
      }
    }
    for (int64_t place = 0, kept = 0; place < 2 * k_; ++place) {
      least = better[place] == static_cast<Found>(k_ - 1) ? aside[place] : least;
      aside[kept] = aside[place];
      kept += better[place] < static_cast<Found>(k_);
    }
    return least;
  }

  int64_t k_;
  std::vector<Found> aside_;
  std::vector<int64_t> sizes_;
  std::vector<float> thresholds_;
};

}  // namespace memtrans
