// Products of small float32 matrices that are in the cache: the inner loops of the CPU attention.
#pragma once

#include "cpu/vectors.h"

namespace memtrans {

template <typename Number>
struct Matrix {
  Number* first;
  int64_t stride;  // from row to row

  MEMTRANS_INLINE Number* row(int64_t number) const { return first + number * stride; }
};

// kRows x (kVectors * kLanes) sums, which leave the registers only when they are complete.
template <int kLanes, int kRows, int kVectors, bool kTransposed>
MEMTRANS_INLINE void add_block(
    const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, Matrix<float> c) {
  Vector<kLanes> sums[kRows][kVectors] = {};
  for (int64_t step = 0; step < depth; ++step) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const float factor = kTransposed ? a[step * a_stride + row] : a[row * a_stride + step];
#pragma GCC unroll 2
      for (int vector = 0; vector < kVectors; ++vector) {
        sums[row][vector] += factor * load<kLanes>(b + step * b_stride + vector * kLanes);
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int vector = 0; vector < kVectors; ++vector) {
      at<kLanes>(c.row(row) + vector * kLanes) += sums[row][vector];
    }
  }
}

template <int kLanes, int kRows, int kVectors, bool kTransposed>
MEMTRANS_INLINE void add_rows(
    Matrix<const float> a, const float* b, int64_t b_stride, int64_t first, int64_t rows, int64_t depth,
    Matrix<float> c) {
  for (; first + kRows <= rows; first += kRows) {
    const float* of_rows = kTransposed ? a.first + first : a.row(first);
    add_block<kLanes, kRows, kVectors, kTransposed>(of_rows, a.stride, b, b_stride, depth, {c.row(first), c.stride});
  }
  if constexpr (kRows > 1) {
    add_rows<kLanes, kRows / 2, kVectors, kTransposed>(a, b, b_stride, first, rows, depth, c);
  }
}

// c (rows, columns) += a (rows, depth) · b (depth, columns); kTransposed: a is stored as (depth, rows). The columns are
// a multiple of kLanes. Every sum adds up in the order of the depth, wherever its row and column stand.
template <int kLanes, int kRows, bool kTransposed>
MEMTRANS_INLINE void add_product(
    Matrix<const float> a, Matrix<const float> b, int64_t rows, int64_t depth, int64_t columns, Matrix<float> c) {
  int64_t column = 0;
  for (; column + 2 * kLanes <= columns; column += 2 * kLanes) {
    add_rows<kLanes, kRows, 2, kTransposed>(
        a, b.first + column, b.stride, 0, rows, depth, {c.first + column, c.stride});
  }
  if (column < columns) {
    add_rows<kLanes, kRows, 1, kTransposed>(
        a, b.first + column, b.stride, 0, rows, depth, {c.first + column, c.stride});
  }
}

}  // namespace memtrans
