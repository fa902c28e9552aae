// Thread indices, barriers, shared memory and warp collectives, one instruction each. Kernels are
// written in these words alone, so that under LONGCTX_SIMT the same source runs on CPU fibers
// (tests/simt). Blocks are one-dimensional.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef LONGCTX_SIMT
#include "simt.h"
#define LONGCTX_DEVICE inline
#define LONGCTX_GRID_CONSTANT
#define LONGCTX_KERNEL(max_threads, min_blocks) inline void
#else
#define LONGCTX_DEVICE __device__ __forceinline__
// A kernel parameter whose address may be taken without a copy in local memory.
#define LONGCTX_GRID_CONSTANT __grid_constant__
#define LONGCTX_KERNEL(max_threads, min_blocks) \
  __global__ void __launch_bounds__(max_threads, min_blocks)
#endif

namespace longctx::device {

constexpr int kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

#ifndef LONGCTX_SIMT

LONGCTX_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
LONGCTX_DEVICE int num_threads() { return static_cast<int>(blockDim.x); }
LONGCTX_DEVICE int64_t block_index() { return blockIdx.x; }    // of the grid's first dimension
LONGCTX_DEVICE int64_t block_index_y() { return blockIdx.y; }  // of its second, at most 65535

// The block's dynamic shared memory, aligned to 1024 bytes (TMA's 128-byte swizzle needs it).
LONGCTX_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char longctx_shared[];
  return longctx_shared;
}

LONGCTX_DEVICE void sync_threads() { __syncthreads(); }
LONGCTX_DEVICE void sync_warp() { __syncwarp(); }
// Barrier `id` (1 to 15) among the `threads` threads that name it; a multiple of 32.
LONGCTX_DEVICE void sync_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Every lane of the warp takes part in each of these.
template <class T>
LONGCTX_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
template <class T>
LONGCTX_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
// The value of lane - delta; the first delta lanes keep their own.
template <class T>
LONGCTX_DEVICE T shuffle_up(T value, int delta) {
  return __shfl_up_sync(kAllLanes, value, delta);
}
LONGCTX_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(kAllLanes, predicate); }

// Integers only: sums of floats in no fixed order would not repeat bitwise.
LONGCTX_DEVICE int32_t atomic_add_shared(int32_t* target, int32_t value) {
  return atomicAdd(target, value);
}
LONGCTX_DEVICE void atomic_add_shared(int64_t* target, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(target), static_cast<unsigned long long>(value));
}

LONGCTX_DEVICE void atomic_add_global(int64_t* target, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(target), static_cast<unsigned long long>(value));
}
LONGCTX_DEVICE void atomic_or_global(uint32_t* target, uint32_t bits) { atomicOr(target, bits); }
LONGCTX_DEVICE void atomic_max_global(uint32_t* target, uint32_t value) {
  atomicMax(target, value);
}
// Counts to `last` and then from 0 again; returns the count before. A thread whose call comes later
// sees what this one has done and, through barriers, knows that others have.
LONGCTX_DEVICE uint32_t atomic_count_global(uint32_t* counter, uint32_t last) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(last)
               : "memory");
  return before;
}

// `value`, from an unknown source: what is derived from it is computed anew where it is used,
// instead of staying in registers.
LONGCTX_DEVICE int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

LONGCTX_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }
LONGCTX_DEVICE int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }

// 2^x with a relative error of 2^-22; subnormal results flush to zero.
LONGCTX_DEVICE float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
// 1 / x, one unit in the last place off at most; subnormals flush to zero.
LONGCTX_DEVICE float reciprocal_fast(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

#else

LONGCTX_DEVICE int thread_index() { return simt::running.index; }
LONGCTX_DEVICE int num_threads() { return simt::running.num_threads; }
LONGCTX_DEVICE int64_t block_index() { return simt::running.block_x; }
LONGCTX_DEVICE int64_t block_index_y() { return simt::running.block_y; }
LONGCTX_DEVICE char* shared_memory() { return simt::running.shared_memory; }

LONGCTX_DEVICE void sync_threads(simt::Where where = simt::here()) {
  simt::sync_block("sync_threads", 0, num_threads(), where);
}
LONGCTX_DEVICE void sync_named(int id, int threads, simt::Where where = simt::here()) {
  simt::sync_block("sync_named", id, threads, where);
}
LONGCTX_DEVICE void sync_warp(simt::Where where = simt::here()) {
  simt::warp_op("sync_warp", char(), [](char*) {}, where, true);
}

template <class T>
LONGCTX_DEVICE T value_of_lane(const char* name, T value, int source, simt::Where where) {
  struct Lane {
    T value;
    int source;
    T result;
  };
  const auto exchange = [](Lane* lanes) {
    for (int l = 0; l < kWarpSize; ++l) lanes[l].result = lanes[lanes[l].source].value;
  };
  return simt::warp_op(name, Lane{value, source & (kWarpSize - 1), value}, exchange, where).result;
}
template <class T>
LONGCTX_DEVICE T shuffle(T value, int lane, simt::Where where = simt::here()) {
  return value_of_lane("shuffle", value, lane, where);
}
template <class T>
LONGCTX_DEVICE T shuffle_xor(T value, int mask, simt::Where where = simt::here()) {
  return value_of_lane("shuffle_xor", value, (thread_index() % kWarpSize) ^ mask, where);
}
template <class T>
LONGCTX_DEVICE T shuffle_up(T value, int delta, simt::Where where = simt::here()) {
  const int lane = thread_index() % kWarpSize;
  return value_of_lane("shuffle_up", value, lane < delta ? lane : lane - delta, where);
}
LONGCTX_DEVICE uint32_t ballot(bool predicate, simt::Where where = simt::here()) {
  const auto gather = [](uint32_t* lanes) {
    uint32_t bits = 0;
    for (int l = 0; l < kWarpSize; ++l) bits |= lanes[l] << l;
    for (int l = 0; l < kWarpSize; ++l) lanes[l] = bits;
  };
  return simt::warp_op("ballot", uint32_t{predicate}, gather, where);
}

LONGCTX_DEVICE int32_t atomic_add_shared(int32_t* target, int32_t value) {
  return __atomic_fetch_add(target, value, __ATOMIC_RELAXED);
}
LONGCTX_DEVICE void atomic_add_shared(int64_t* target, int64_t value) {
  __atomic_fetch_add(target, value, __ATOMIC_RELAXED);
}

LONGCTX_DEVICE void atomic_add_global(int64_t* target, int64_t value) {
  __atomic_fetch_add(target, value, __ATOMIC_RELAXED);
}
LONGCTX_DEVICE void atomic_or_global(uint32_t* target, uint32_t bits) {
  __atomic_fetch_or(target, bits, __ATOMIC_RELAXED);
}
LONGCTX_DEVICE void atomic_max_global(uint32_t* target, uint32_t value) {
  uint32_t seen = __atomic_load_n(target, __ATOMIC_RELAXED);
  while (seen < value && !__atomic_compare_exchange_n(target, &seen, value, false, __ATOMIC_RELAXED,
                                                      __ATOMIC_RELAXED)) {
  }
}
LONGCTX_DEVICE uint32_t atomic_count_global(uint32_t* counter, uint32_t last) {
  const uint32_t before = __atomic_load_n(counter, __ATOMIC_RELAXED);
  const uint32_t after = before < last ? before + 1 : 0;
  // Blocks that ThreadSanitizer does not look at must not order those that it does.
  simt::seen_by_tsan() ? __atomic_exchange_n(counter, after, __ATOMIC_ACQ_REL)
                       : __atomic_exchange_n(counter, after, __ATOMIC_RELAXED);
  return before;
}

LONGCTX_DEVICE int opaque(int value) { return value; }
LONGCTX_DEVICE int count_bits(uint32_t bits) { return __builtin_popcount(bits); }
LONGCTX_DEVICE int lowest_bit(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)) - 1; }

LONGCTX_DEVICE float exp2_fast(float x) {
  const float result = exp2f(x);
  return result < FLT_MIN ? 0.0f : result;
}
LONGCTX_DEVICE float reciprocal_fast(float x) { return 1.0f / x; }

#endif  // LONGCTX_SIMT

LONGCTX_DEVICE int lane_index() { return thread_index() % kWarpSize; }
// Uniform over the warp, and known to be so.
LONGCTX_DEVICE int warp_index() { return shuffle(thread_index() / kWarpSize, 0); }

LONGCTX_DEVICE float widen(float x) { return x; }
LONGCTX_DEVICE double widen(double x) { return x; }
LONGCTX_DEVICE float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
LONGCTX_DEVICE float widen(__half x) { return __half2float(x); }
LONGCTX_DEVICE void narrow(float x, float& y) { y = x; }
LONGCTX_DEVICE void narrow(double x, double& y) { y = x; }
LONGCTX_DEVICE void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
LONGCTX_DEVICE void narrow(float x, __half& y) { y = __float2half_rn(x); }

}  // namespace longctx::device
