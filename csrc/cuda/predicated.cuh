// What a thread does only if a number reaches another, as predicated instructions: a compiler would branch, or select
// where it could skip. Source: PTX ISA, "Predicated execution".
#pragma once

#include <cstdint>

namespace memtrans {

// Adds one to total where value >= score.
__device__ inline void count_reaching(int& total, float value, float score) {
  asm("{\n.reg .pred reached;\nsetp.ge.f32 reached, %1, %2;\n@reached add.s32 %0, %0, 1;\n}\n"
      : "+r"(total)
      : "f"(value), "f"(score));
}

// Adds one to total where entry > than.
__device__ inline void count_above(int& total, uint64_t entry, uint64_t than) {
  asm("{\n.reg .pred above;\nsetp.gt.u64 above, %1, %2;\n@above add.s32 %0, %0, 1;\n}\n"
      : "+r"(total)
      : "l"(entry), "l"(than));
}

// Where score >= bound, stores {score, slot} in shared memory and moves the place on.
__device__ inline void store_reaching(uint32_t& place, float score, int slot, float bound) {
  asm volatile(
      "{\n"
      ".reg .pred kept;\n"
      "setp.ge.f32 kept, %1, %3;\n"
      "@kept st.shared.v2.b32 [%0], {%4, %2};\n"
      "@kept add.u32 %0, %0, 8;\n"
      "}\n"
      : "+r"(place)
      : "f"(score), "r"(slot), "f"(bound), "r"(__float_as_int(score))
      : "memory");
}

#define MEMTRANS_APPEND(compare, type)                                               \
  asm volatile(                                                                      \
      "{\n"                                                                          \
      ".reg .pred hit;\n"                                                            \
      ".reg .b64 address;\n" compare                                                 \
      " hit, %1, %2;\n"                                                              \
      "mov.b64 address, {%0, %6};\n"                                                 \
      "@hit st.global.v2.f32 [address], {%3, %4};\n"                                 \
      "@hit st.global.u32 [address + 8], %5;\n"                                      \
      "@hit add.u32 %0, %0, 16;\n"                                                   \
      "}\n"                                                                          \
      : "+r"(next)                                                                   \
      : type(larger), type(threshold), "f"(first), "f"(second), "r"(pair), "r"(high) \
      : "memory")

// Where larger >= threshold, stores the record {first, second, pair} in global memory and moves the place on, of which
// `next` and `high` are the low and the high word.
__device__ inline void append_reaching(
    uint32_t& next, uint32_t high, float larger, float threshold, float first, float second, int pair) {
  MEMTRANS_APPEND("setp.ge.f32", "f");
}
__device__ inline void append_reaching(
    uint32_t& next, uint32_t high, int larger, int threshold, float first, float second, int pair) {
  MEMTRANS_APPEND("setp.ge.s32", "r");
}

}  // namespace memtrans
