// Hopper's matrix and copy instructions, as thin inline PTX: mbarriers, tensor-map loads, wgmma with fp32 accumulators.
// Source: PTX ISA 8.x, "Asynchronous warpgroup level matrix instructions" and "cp.async.bulk.tensor". Needs sm_90a.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace memtrans {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- mbarriers: a phase bit flips each time the expected arrivals (and bytes) are in ----
__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_expect_bytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void barrier_wait(uint32_t barrier, uint32_t phase) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni end;\n"
      "bra.uni again;\n"
      "end:\n"
      "}\n" ::"r"(barrier),
      "r"(phase)
      : "memory");
}

// For a thread that waits long and often: leaves the issue slots to others.
__device__ inline void barrier_wait_idly(uint32_t barrier, uint32_t phase) {
  uint32_t done = 0;
  while (true) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(phase)
        : "memory");
    if (done)
      return;
    __nanosleep(64);
  }
}

// ---- barriers of some of a block's threads, and what was stored becomes visible to the tensor cores ----
__device__ inline void named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

__device__ inline void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- tensor-map loads into swizzled shared memory ----
__device__ inline void load_tile_2d(uint32_t target, const CUtensorMap* map, uint32_t barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(target),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1)
      : "memory");
}

__device__ inline void load_tile_3d(uint32_t target, const CUtensorMap* map, uint32_t barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(target),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

__device__ inline void load_tile_4d(
    uint32_t target, const CUtensorMap* map, uint32_t barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(target),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// ---- registers of a warpgroup: a producer gives up what the consumers take ----
template <int count>
__device__ inline void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

template <int count>
__device__ inline void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// ---- wgmma ----
// Descriptor of a K-major operand whose rows are row_bytes (64 or 128) wide and swizzled with that same width. The low
// word holds the address in units of 16 bytes: adding to it moves the matrix.
template <int row_bytes>
__device__ inline uint64_t matrix_descriptor(uint32_t low) {
  static_assert(row_bytes == 64 || row_bytes == 128, "swizzle is as wide as a row");
  constexpr uint32_t layout = row_bytes == 128 ? 1 : 2;
  constexpr uint32_t stride_of_8_rows = 8 * row_bytes;
  return static_cast<uint64_t>(layout << 30 | stride_of_8_rows >> 4) << 32 | low;
}

__device__ inline uint32_t matrix_low_word(uint32_t address) { return ((address & 0x3FFFF) >> 4) | 1u << 16; }

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

#define MEMTRANS_ACC8(mode, d, i)                                                                             \
  mode(d[i]), mode(d[i + 1]), mode(d[i + 2]), mode(d[i + 3]), mode(d[i + 4]), mode(d[i + 5]), mode(d[i + 6]), \
      mode(d[i + 7])
#define MEMTRANS_ACC64(mode, d)                                                                                 \
  MEMTRANS_ACC8(mode, d, 0), MEMTRANS_ACC8(mode, d, 8), MEMTRANS_ACC8(mode, d, 16), MEMTRANS_ACC8(mode, d, 24), \
      MEMTRANS_ACC8(mode, d, 32), MEMTRANS_ACC8(mode, d, 40), MEMTRANS_ACC8(mode, d, 48), MEMTRANS_ACC8(mode, d, 56)
#define MEMTRANS_WGMMA(type, mode, add)                                                            \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                        \
               " "                                                                                 \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
               "%64, %65, " add ", 1, 1, 0, 0;\n"                                                  \
               : MEMTRANS_ACC64(mode, d)                                                           \
               : "l"(a), "l"(b))

// d (64 x 128, fp32) = a (64 x 16) * b (128 x 16)^T, plus d where add is set.
template <typename T, bool add>
__device__ inline void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (add)
      MEMTRANS_WGMMA("f16", "+f", "1");
    else
      MEMTRANS_WGMMA("f16", "=f", "0");
  } else {
    if constexpr (add)
      MEMTRANS_WGMMA("bf16", "+f", "1");
    else
      MEMTRANS_WGMMA("bf16", "=f", "0");
  }
}

// Waits until at most `pending` groups are in flight; d is what the finished one wrote, so reads of d cannot move up.
template <int pending>
__device__ inline void wgmma_wait(float (&d)[64]) {
  asm volatile("wgmma.wait_group.sync.aligned %64;" : MEMTRANS_ACC64("+f", d) : "n"(pending) : "memory");
}

}  // namespace memtrans
