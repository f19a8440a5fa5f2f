// Which way a search takes, the scratch memory that it needs, and who launches it for each type of keys.
#pragma once

#include "cuda/knn_search/few_select.cuh"
#include "cuda/knn_search/scan_plan.cuh"
#include "cuda/knn_search/search.h"

namespace memtrans {

constexpr int kMostFewQueries = 32;           // of a row, for the path that reads the keys once ...
constexpr int64_t kFewProducts = 22'000'000;  // ... while this many products are cheaper than a scan's fixed costs
constexpr int64_t kMaximaBytes = 64ll << 20;  // maxima that a few-query launch may hold
constexpr int64_t kGridHeight = 65535;        // of CUDA
constexpr int64_t kSmallestPart = 4096;       // keys that are worth a block of their own

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

inline int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

inline int64_t few_groups(const KnnSearchShape& shape) { return (shape.slots + kFewGroup - 1) / kFewGroup; }

// Rows that one few-query launch takes, so that its maxima fit the workspace and its queries the grid.
inline int64_t few_rows(const KnnSearchShape& shape) {
  const int64_t row_bytes = shape.queries_per_row * few_groups(shape) * 4;
  const int64_t of_workspace = kMaximaBytes / row_bytes, of_grid = kGridHeight / shape.queries_per_row;
  const int64_t fitting = of_workspace < of_grid ? of_workspace : of_grid;
  return fitting < 1 ? 1 : fitting < shape.row_count ? fitting : shape.row_count;
}

// Blocks of few_select for one query: one where there are enough queries.
inline int64_t few_parts(const KnnSearchShape& shape) {
  const int64_t queries = few_rows(shape) * shape.queries_per_row;
  const int64_t wanted = multiprocessors() / queries, sensible = shape.slots / kSmallestSelection;
  const int64_t parts = wanted < sensible ? wanted : sensible;
  return parts < 1 ? 1 : parts;
}

inline bool takes_few_queries(const KnnSearchShape& shape) {
  return shape.queries_per_row <= kFewQueries ||
         (shape.queries_per_row <= kMostFewQueries &&
          shape.row_count * shape.queries_per_row * shape.slots <= kFewProducts);
}

// Queries of a block of knn_scan and knn_redo.
inline int64_t queries_at_once(const KnnSearchShape& shape) {
  return shape.dim > 128 ? ScanShape<256>::kQueries : ScanShape<128>::kQueries;
}

// Pieces of a row's window, so that few queries still occupy all multiprocessors.
inline int64_t scan_parts(const KnnSearchShape& shape) {
  const int64_t queries = queries_at_once(shape);
  const int64_t jobs = shape.row_count * ((shape.queries_per_row + queries - 1) / queries);
  const int64_t wanted = multiprocessors() / jobs, sensible = shape.capacity / kSmallestPart;
  const int64_t parts = wanted < sensible ? wanted : sensible;
  return parts < 1 ? 1 : parts;
}

// Scratch memory of knn_scan and knn_redo: counters | tiles of queries that are redone | those queries | what was found
// of them in slices | entries of the parts | lists. The counters are zero at the start: redo_tiles, redo_done and
// redo_count.
struct ScanWorkspace {
  int64_t done, count, counter_bytes, tile, redo, slices, entries, lists, bytes;

  explicit ScanWorkspace(const KnnSearchShape& shape) {
    const int64_t at_once = queries_at_once(shape), blocks = multiprocessors();
    const int64_t queries = shape.row_count * shape.queries_per_row, parts = scan_parts(shape);
    const int64_t stretches = shape.row_count * parts;
    done = 4;
    count = done + blocks * 4;
    counter_bytes = count + stretches * 4;
    tile = round_up(counter_bytes, 256);
    redo = tile + round_up(stretches * ((shape.queries_per_row + at_once - 1) / at_once) * 8, 256);
    slices = redo + round_up(queries * parts * 4, 256);
    entries = slices + blocks * at_once * shape.k * 8;
    lists = round_up(entries + (parts > 1 ? queries * parts * shape.k * 8 : 0), kListAlignment);
    bytes = lists + blocks * at_once * 4 * kListBytes + kListAlignment;
  }
};

inline int64_t few_workspace(const KnnSearchShape& shape) {
  const int64_t queries = few_rows(shape) * shape.queries_per_row;
  return queries * (few_groups(shape) * 4 + few_parts(shape) * shape.k * 8 + 4) + 512;
}

int launch_float16(const KnnSearchShape& shape, const KnnSearchTensors& tensors, cudaStream_t stream);
int launch_bfloat16(const KnnSearchShape& shape, const KnnSearchTensors& tensors, cudaStream_t stream);

}  // namespace memtrans
