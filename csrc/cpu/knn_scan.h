// Scores some queries with consecutive keys of one row and keeps the best: the inner loops of the CPU search.
//
// A score is sum_d query[d] · key[d] in float32. All keys add up in the same order, so that keys which are equal have
// equal scores whatever their place. Scores are compared with the query's K-th best so far while they are still in
// registers; the few that pass (about K · ln(M / K) of M) go to BestKeys, the others are never written.
//
// Many queries: a vector holds one component of kLanes queries, and a tile is kKeys keys by two such vectors.
// Few queries: a vector runs along D. Both are compiled for several instruction sets, one of which is picked at run
// time.
#pragma once

#include "cpu/best_keys.h"
#include "cpu/vectors.h"

#include <type_traits>

namespace memtrans {

constexpr int64_t kQueriesAlongWidth = 2;  // the most for which vectors run along D
constexpr int64_t kBlockBytes = 1 << 17;   // of keys that meet all queries in turn, from the L2 cache

// Visible keys of a row that lie one behind the other in memory, old to new.
template <typename Key>
struct Keys {
  const Key* first;
  int64_t stride;
  int64_t size;
  int64_t position;  // of the first one among all visible keys of the row
};

// The queries of a scan in float32: in panels (D, panel) for many, as rows (D,) for few. The last panel ends in zeros.
struct Queries {
  int64_t size;
  int64_t width;
  int64_t panel;
  std::vector<float> numbers;

  template <typename Key>
  Queries(const Key* queries, int64_t size, int64_t width, int64_t lanes)
      : size(size),
        width(width),
        panel(size <= kQueriesAlongWidth ? 1 : (size <= lanes ? lanes : 2 * lanes)),
        numbers(padded() * width) {
    for (int64_t query = 0; query < size; ++query) {
      float* first = &numbers[query / panel * panel * width + query % panel];
      for (int64_t column = 0; column < width; ++column) {
        first[column * panel] = static_cast<float>(queries[query * width + column]);
      }
    }
  }

  int64_t padded() const { return (size + panel - 1) / panel * panel; }
};

// A score above a threshold, if only because it overflowed: is the key finite, and does no product overflow to the
// other side? (Such a sum is NaN where products are rounded one by one, as they are not here.)
MEMTRANS_INLINE bool retrievable(float score, const float* query, int64_t stride, const float* key, int64_t width) {
  if (std::isfinite(score)) {
    return true;
  }
  for (int64_t column = 0; column < width; ++column) {
    const float product = query[column * stride] * key[column];
    if (!std::isfinite(key[column]) || !(product > -std::numeric_limits<float>::infinity())) {
      return false;
    }
  }
  return true;
}

// Whether any of kCount scores, kPanel of each key, is above its query's threshold.
template <int64_t kCount, int64_t kPanel>
MEMTRANS_INLINE bool any_above(const float* scores, const float* thresholds) {
  int32_t above[kPanel] = {}, any = 0;
  for (int64_t first = 0; first < kCount; first += kPanel) {
#pragma omp simd
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      above[lane] |= scores[first + lane] > thresholds[lane];
    }
  }
#pragma omp simd reduction(| : any)
  for (int64_t lane = 0; lane < kPanel; ++lane) {
    any |= above[lane];
  }
  return any != 0;
}

// kKeys rows of keys by kVectors * kLanes queries, which leave the registers only when they are complete.
template <int kLanes, int kVectors, int kKeys>
MEMTRANS_INLINE void score_tile(const float* const* key, const float* panel, int64_t width, float* scores) {
  Vector<kLanes> sums[kKeys][kVectors] = {};
  for (int64_t column = 0; column < width; ++column) {
#pragma GCC unroll 16
    for (int index = 0; index < kKeys; ++index) {
      const float component = key[index][column];
#pragma GCC unroll 2
      for (int vector = 0; vector < kVectors; ++vector) {
        sums[index][vector] += component * load<kLanes>(panel + (column * kVectors + vector) * kLanes);
      }
    }
  }
  std::memcpy(scores, sums, sizeof(sums));
}

template <int kLanes, int kVectors, int kKeys>
MEMTRANS_INLINE void scan_tile(
    const Keys<float>& keys, int64_t first_key, const Queries& queries, int64_t first_query, BestKeys& best) {
  constexpr int64_t kPanel = kVectors * kLanes;
  const int64_t count = std::min<int64_t>(kKeys, keys.size - first_key), width = queries.width;
  const float *panel = &queries.numbers[first_query * width], *thresholds = best.thresholds() + first_query;
  const float* key[kKeys];  // those beyond `count` repeat the last one and are not looked at
  for (int64_t index = 0; index < kKeys; ++index) {
    key[index] = keys.first + (first_key + std::min(index, count - 1)) * keys.stride;
  }
  float scores[kKeys][kPanel];
  score_tile<kLanes, kVectors, kKeys>(key, panel, width, scores[0]);
  if (!any_above<kKeys * kPanel, kPanel>(scores[0], thresholds)) {
    return;
  }
  for (int64_t index = 0; index < count; ++index) {
    if (!any_above<kPanel, kPanel>(scores[index], thresholds)) {
      continue;
    }
    int64_t above[kPanel], any = 0;  // collected without a branch: which lanes pass cannot be predicted
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      above[any] = lane;
      any += scores[index][lane] > thresholds[lane];
    }
    for (int64_t place = 0; place < any; ++place) {
      const int64_t lane = above[place];
      const float score = scores[index][lane];
      if (retrievable(score, panel + lane, kPanel, key[index], width)) {
        best.offer(first_query + lane, score, keys.position + first_key + index);
      }
    }
  }
}

MEMTRANS_INLINE void scan_few(const Keys<float>& keys, const Queries& queries, BestKeys& best) {
  const float* thresholds = best.thresholds();
  const int64_t width = queries.width;
  for (int64_t index = 0; index < keys.size; ++index) {
    const float* key = keys.first + index * keys.stride;
    for (int64_t query = 0; query < queries.size; ++query) {
      const float* numbers = &queries.numbers[query * width];
      const float score = dot(numbers, key, width);
      if (score > thresholds[query] && retrievable(score, numbers, 1, key, width)) {
        best.offer(query, score, keys.position + index);
      }
    }
  }
}

template <typename Key>
MEMTRANS_INLINE Keys<float> widened(const Keys<Key>& keys, int64_t width, std::vector<float>& storage) {
  if constexpr (std::is_same_v<Key, float>) {
    return keys;
  } else {
    storage.resize(keys.size * width);
    for (int64_t index = 0; index < keys.size; ++index) {
      for (int64_t column = 0; column < width; ++column) {
        storage[index * width + column] = static_cast<float>(keys.first[index * keys.stride + column]);
      }
    }
    return {storage.data(), width, keys.size, keys.position};
  }
}

template <typename Key, int kLanes, int kKeys>
MEMTRANS_INLINE void scan(const Keys<Key>& keys, const Queries& queries, BestKeys& best) {
  const int64_t row_bytes = std::max<int64_t>(1, queries.width) * sizeof(float);
  const int64_t most = std::max<int64_t>(1, kBlockBytes / row_bytes / kKeys) * kKeys;
  std::vector<float> storage;
  for (int64_t done = 0; done < keys.size; done += most) {
    const Keys<Key> block{
        keys.first + done * keys.stride, keys.stride, std::min(most, keys.size - done), keys.position + done};
    const Keys<float> wide = widened(block, queries.width, storage);
    if (queries.panel == 1) {
      scan_few(wide, queries, best);
      continue;
    }
    for (int64_t query = 0; query < queries.size; query += queries.panel) {
      for (int64_t key = 0; key < wide.size; key += kKeys) {
        if (queries.panel == kLanes) {
          scan_tile<kLanes, 1, kKeys>(wide, key, queries, query, best);
        } else {
          scan_tile<kLanes, 2, kKeys>(wide, key, queries, query, best);
        }
      }
    }
  }
}

template <typename Key>
struct Scan {
  void (*run)(const Keys<Key>& keys, const Queries& queries, BestKeys& best);
  int64_t lanes;
};

// Tiles are as large as the registers allow: 32 of 16 floats, 16 of 8, and 16 (x86) or 32 (ARM) of 4.
#if defined(__x86_64__)
template <typename Key>
MEMTRANS_AVX512 void scan_avx512(const Keys<Key>& keys, const Queries& queries, BestKeys& best) {
  scan<Key, 16, 12>(keys, queries, best);
}

template <typename Key>
MEMTRANS_AVX2 void scan_avx2(const Keys<Key>& keys, const Queries& queries, BestKeys& best) {
  scan<Key, 8, 6>(keys, queries, best);
}
#endif

template <typename Key>
void scan_anywhere(const Keys<Key>& keys, const Queries& queries, BestKeys& best) {
#if defined(__aarch64__)
  scan<Key, 4, 12>(keys, queries, best);
#else
  scan<Key, 4, 6>(keys, queries, best);
#endif
}

template <typename Key>
Scan<Key> fastest_scan() {
#if defined(__x86_64__)
  return fastest<Scan<Key>>({scan_avx512<Key>, 16}, {scan_avx2<Key>, 8}, {scan_anywhere<Key>, 4});
#else
  return {scan_anywhere<Key>, 4};
#endif
}

}  // namespace memtrans
