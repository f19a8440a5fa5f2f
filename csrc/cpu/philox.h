// Philox 4x32-10, the random numbers of dropout: the same bits as memtrans_kernels/philox.py, which names the source.
#pragma once

#include "cpu/vectors.h"

namespace memtrans {

// The first of the four 32-bit words for a counter (column, query, head, document).
MEMTRANS_INLINE uint32_t philox(uint64_t seed, uint32_t column, uint32_t query, uint32_t head, uint32_t document) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * column, product1 = uint64_t{0xCD9E8D57u} * head;
    column = static_cast<uint32_t>(product1 >> 32) ^ query ^ key0;
    query = static_cast<uint32_t>(product1);
    head = static_cast<uint32_t>(product0 >> 32) ^ document ^ key1;
    document = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return column;
}

}  // namespace memtrans
