// The boundary between the CUDA search and the operators that call it: plain pointers, all on the device.
#pragma once

#include <cstdint>

constexpr int64_t kFewQueries = 8;  // up to so many queries of a row always take the path that reads the keys once

enum QueryType : int64_t { kSameAsKeys, kOtherHalfPrecision, kFloat32 };

extern "C" {

struct KnnSearchShape {
  int64_t row_count;        // B * G
  int64_t queries_per_row;  // H / G * N
  int64_t memory_rows;      // R
  int64_t slots;            // M + S
  int64_t capacity;         // M
  int64_t dim;              // D
  int64_t k;                // K
  int64_t bfloat16;         // keys are bfloat16, else float16
  QueryType query_type;     // kSameAsKeys where a row has more than kFewQueries
};

struct KnnSearchTensors {
  const void* query;      // (B, H, N, D), contiguous, 16-byte aligned
  const void* keys;       // (R, M + S, D), contiguous, 16-byte aligned
  const int64_t* rows;    // (B * G,)
  const int64_t* start;   // (R,)
  const int64_t* cursor;  // (R,)
  float* scores;          // (B, H, N, K)
  int32_t* slots;         // (B, H, N, K)
  void* workspace;        // memtrans_cuda_knn_search_workspace bytes
};

int64_t memtrans_cuda_knn_search_workspace(const KnnSearchShape* shape);

// 0, a CUDA error code, or -1: D is not supported, -2: K is not supported, -3: no tensor map for these addresses.
int memtrans_cuda_knn_search(const KnnSearchShape* shape, const KnnSearchTensors* tensors, void* stream);
}
