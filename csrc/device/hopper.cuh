// Hopper's asynchronous units (sm_90a): barriers in shared memory that count bytes, the tensor copy
// engine (TMA) and warpgroup products (WGMMA).
//
// A warpgroup is 4 warps whose first has an index divisible by 4. Who holds what, for thread t of
// it with warp w = t / 32, g = t % 32 / 4 and c = 2 * (t % 4):
//   acc [64, n]: acc[4 * j + i] = row 16 * w + g (+ 8 where i >= 2), column 8 * j + c + i % 2
//   a [64, 16] in registers: as an m16n8k16 operand of rows 16 * w to 16 * w + 15 (mma.cuh)
// Operands in shared memory lie in panels of 64 columns: 128 bytes a row, whose 16-byte units stand
// in the order that TMA's 128-byte swizzle gives them. A panel starts at a multiple of 1024 bytes.
#pragma once
#include "device/thread.cuh"

#ifndef LONGCTX_SIMT
#include <cuda.h>

#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "device/copy.cuh"
#define LONGCTX_GRID_CONSTANT __grid_constant__
#else
#include "hopper.h"
#define LONGCTX_GRID_CONSTANT
#endif

namespace longctx::device {

constexpr int kWarpgroupSize = 128;
constexpr int kPanelBytes = 128;  // of a row
constexpr int kSwizzleBytes = 1024;

#ifndef LONGCTX_SIMT

using TensorMap = CUtensorMap;

// An mbarrier's phase ends when `arrivals` threads have arrived and all bytes expected of TMA have
// landed. Initialised by one thread, then fence_mbarrier_init() and a barrier of the block.
LONGCTX_DEVICE void mbarrier_init(uint64_t* mbarrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(mbarrier)),
               "r"(arrivals)
               : "memory");
}
LONGCTX_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
LONGCTX_DEVICE void mbarrier_arrive(uint64_t* mbarrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(mbarrier))
               : "memory");
}
// Arrives, and makes the phase wait for `bytes` more.
LONGCTX_DEVICE void mbarrier_arrive_expect(uint64_t* mbarrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(mbarrier)),
      "r"(bytes)
      : "memory");
}
LONGCTX_DEVICE bool mbarrier_try_wait(uint64_t* mbarrier, uint32_t parity) {
  uint32_t ended;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}"
      : "=r"(ended)
      : "r"(shared_address(mbarrier)), "r"(parity)
      : "memory");
  return ended != 0;
}
// Waits for the end of the phase of this parity; phases count from 0. The phase before the first
// has ended.
LONGCTX_DEVICE void mbarrier_wait(uint64_t* mbarrier, uint32_t parity) {
  while (!mbarrier_try_wait(mbarrier, parity)) {
  }
}

// Starts the copy of a box of `map` [batch, heads, rows, columns]; what lies outside the tensor
// arrives as zeros. One thread calls this; `mbarrier` counts the bytes of the whole box.
LONGCTX_DEVICE void load_box(void* shared, const TensorMap* map, uint64_t* mbarrier, int column,
                             int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(mbarrier)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}
LONGCTX_DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// What this thread has stored to shared memory is seen by WGMMA and TMA of threads behind the next
// barrier.
LONGCTX_DEVICE void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Before the first product of a batch: orders the registers that it reads and adds to.
LONGCTX_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
LONGCTX_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most `pending` committed batches are under way. Their operands must stay as they are
// and their accumulators must not be looked at.
template <int pending>
LONGCTX_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// The compiler keeps these registers in place across this line.
template <class Word, int n>
LONGCTX_DEVICE void pin(Word (&registers)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<Word, float>) {
      asm volatile("" : "+f"(registers[i])::"memory");
    } else {
      asm volatile("" : "+r"(registers[i])::"memory");
    }
  }
}

// The compiler takes this for a new value here: it computes what depends on it again.
LONGCTX_DEVICE uint64_t opaque(uint64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}

namespace detail {
using cute::SM90::GMMA::Major;
template <class T, int n>
struct Atom;
#define LONGCTX_WGMMA_ATOM(T, n, name)                                                       \
  template <>                                                                                \
  struct Atom<T, n> {                                                                        \
    using Shared = cute::SM90::GMMA::MMA_64x##n##x16_F32##name##_SS<Major::K, Major::K>;     \
    using Registers = cute::SM90::GMMA::MMA_64x##n##x16_F32##name##_RS<Major::K, Major::MN>; \
  };
LONGCTX_WGMMA_ATOM(__nv_bfloat16, 64, BF16BF16)
LONGCTX_WGMMA_ATOM(__nv_bfloat16, 128, BF16BF16)
LONGCTX_WGMMA_ATOM(__nv_bfloat16, 256, BF16BF16)
LONGCTX_WGMMA_ATOM(__half, 64, F16F16)
LONGCTX_WGMMA_ATOM(__half, 128, F16F16)
LONGCTX_WGMMA_ATOM(__half, 256, F16F16)
#undef LONGCTX_WGMMA_ATOM

template <class T, size_t... i, int n>
LONGCTX_DEVICE void wgmma(std::index_sequence<i...>, float (&acc)[n], uint64_t a, uint64_t b,
                          bool accumulate) {
  Atom<T, 2 * n>::Shared::fma(a, b, acc[i]..., cute::SM90::GMMA::ScaleOut(accumulate));
}
template <class T, size_t... i, int n>
LONGCTX_DEVICE void wgmma(std::index_sequence<i...>, float (&acc)[n], const uint32_t (&a)[4],
                          uint64_t b) {
  Atom<T, 2 * n>::Registers::fma(a[0], a[1], a[2], a[3], b, acc[i]...);
}
}  // namespace detail

// acc [64, 2 * n] = (accumulate ? acc : 0) + a [64, 16] b^T, b [2 * n, 16]: both descriptors name
// rows along which the sum runs.
template <class T, int n>
LONGCTX_DEVICE void wgmma(float (&acc)[n], uint64_t a, uint64_t b, bool accumulate) {
  detail::wgmma<T>(std::make_index_sequence<n>(), acc, a, b, accumulate);
}
// acc [64, 2 * n] += a [64, 16] b [16, 2 * n].
template <class T, int n>
LONGCTX_DEVICE void wgmma(float (&acc)[n], const uint32_t (&a)[4], uint64_t b) {
  detail::wgmma<T>(std::make_index_sequence<n>(), acc, a, b);
}

// Moves registers between the warpgroups of a block: all of a warpgroup call it.
template <int count>
LONGCTX_DEVICE void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
LONGCTX_DEVICE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// True in one lane of the warp; all lanes call it.
LONGCTX_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected)
      :
      : "memory");
  return elected != 0;
}

#else

using TensorMap = simt::TensorMap;

LONGCTX_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(simt::shared_offset(shared));
}

LONGCTX_DEVICE void mbarrier_init(uint64_t* mbarrier, int arrivals,
                                  simt::Where where = simt::here()) {
  simt::mbarrier_init(mbarrier, arrivals, where);
}
LONGCTX_DEVICE void fence_mbarrier_init() {}
LONGCTX_DEVICE void mbarrier_arrive(uint64_t* mbarrier, simt::Where where = simt::here()) {
  simt::mbarrier_arrive(mbarrier, 0, where);
}
LONGCTX_DEVICE void mbarrier_arrive_expect(uint64_t* mbarrier, int bytes,
                                           simt::Where where = simt::here()) {
  simt::mbarrier_arrive(mbarrier, bytes, where);
}
LONGCTX_DEVICE void mbarrier_wait(uint64_t* mbarrier, uint32_t parity,
                                  simt::Where where = simt::here()) {
  simt::mbarrier_wait(mbarrier, parity, where);
}

LONGCTX_DEVICE void load_box(void* shared, const TensorMap* map, uint64_t* mbarrier, int column,
                             int row, int head, int batch, simt::Where where = simt::here()) {
  simt::load_box(shared, map, mbarrier, column, row, head, batch, where);
}
LONGCTX_DEVICE void prefetch_map(const TensorMap*) {}

LONGCTX_DEVICE void fence_async_proxy() {}
LONGCTX_DEVICE void wgmma_fence(simt::Where where = simt::here()) { simt::wgmma_fence(where); }
LONGCTX_DEVICE void wgmma_commit(simt::Where where = simt::here()) { simt::wgmma_commit(where); }
template <int pending>
LONGCTX_DEVICE void wgmma_wait(simt::Where where = simt::here()) {
  simt::wgmma_wait(pending, where);
}
template <class Word, int n>
LONGCTX_DEVICE void pin(Word (&)[n]) {}
LONGCTX_DEVICE uint64_t opaque(uint64_t value) { return value; }

template <class T>
constexpr simt::Element kElement =
    std::is_same_v<T, __half> ? simt::Element::kFloat16 : simt::Element::kBFloat16;
template <class T, int n>
LONGCTX_DEVICE void wgmma(float (&acc)[n], uint64_t a, uint64_t b, bool accumulate,
                          simt::Where where = simt::here()) {
  simt::wgmma_issue({acc, nullptr, a, b, 2 * n, kElement<T>, false, accumulate}, where);
}
template <class T, int n>
LONGCTX_DEVICE void wgmma(float (&acc)[n], const uint32_t (&a)[4], uint64_t b,
                          simt::Where where = simt::here()) {
  simt::wgmma_issue({acc, a, 0, b, 2 * n, kElement<T>, true, true}, where);
}

template <int count>
LONGCTX_DEVICE void lower_registers() {}
template <int count>
LONGCTX_DEVICE void raise_registers() {}

LONGCTX_DEVICE bool elect_one(simt::Where where = simt::here()) {
  return value_of_lane("elect_one", lane_index(), 0, where) == lane_index();
}

#endif  // LONGCTX_SIMT

// How WGMMA finds an operand in shared memory. Offsets in 16-byte units: bits 0-13 the start, 16-29
// the leading offset, 32-45 the stride, 62-63 the swizzle (1: 128 bytes). Within a panel 8 rows
// are `stride` apart. Where the rows are what the sum runs over (P V), the next 64 columns are one
// leading offset away; else that field is not used.
LONGCTX_DEVICE uint64_t operand_descriptor(uint32_t address, int panel_bytes) {
  const uint64_t start = (address & 0x3ffff) >> 4;
  const uint64_t leading = static_cast<uint64_t>(panel_bytes) >> 4;
  return start | leading << 16 | uint64_t{kSwizzleBytes >> 4} << 32 | uint64_t{1} << 62;
}
// The operand `bytes` further on, a multiple of 16.
LONGCTX_DEVICE uint64_t advance(uint64_t descriptor, int bytes) {
  return descriptor + (bytes >> 4);
}

}  // namespace longctx::device
