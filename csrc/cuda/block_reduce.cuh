// Integers combined over the threads of a warp or a block.
#pragma once
#include "device/thread.cuh"

namespace longctx::cuda {

constexpr int kMaxWarps = 32;

struct BlockSlots {
  int64_t of_warp[kMaxWarps];
};

struct Sum {
  LONGCTX_DEVICE int64_t operator()(int64_t a, int64_t b) const { return a + b; }
};
struct Maximum {
  LONGCTX_DEVICE int64_t operator()(int64_t a, int64_t b) const { return a > b ? a : b; }
};
struct BitOr {
  LONGCTX_DEVICE int64_t operator()(int64_t a, int64_t b) const { return a | b; }
};

// Every lane of the warp gets the result.
template <class Combine>
LONGCTX_DEVICE int64_t reduce_warp(int64_t value, const Combine& combine) {
  for (int mask = device::kWarpSize / 2; mask > 0; mask /= 2) {
    value = combine(value, device::shuffle_xor(value, mask));
  }
  return value;
}

// Every thread of the block gets the result; the slots are free again afterwards.
template <class Combine>
LONGCTX_DEVICE int64_t reduce_block(int64_t value, const Combine& combine, BlockSlots& slots) {
  value = reduce_warp(value, combine);
  if (device::lane_index() == 0) slots.of_warp[device::thread_index() / device::kWarpSize] = value;
  device::sync_threads();
  int64_t result = slots.of_warp[0];
  for (int w = 1; w < device::num_threads() / device::kWarpSize; ++w) {
    result = combine(result, slots.of_warp[w]);
  }
  device::sync_threads();
  return result;
}

// The sum of the values of this lane and those before it.
LONGCTX_DEVICE int64_t scan_warp(int64_t value) {
  for (int delta = 1; delta < device::kWarpSize; delta *= 2) {
    const int64_t other = device::shuffle_up(value, delta);
    if (device::lane_index() >= delta) value += other;
  }
  return value;
}

// `total` becomes the sum over the block. Returns the sum over the warps before this one; `value`
// is the same for all lanes of a warp.
LONGCTX_DEVICE int64_t sum_before_warp(int64_t value, int64_t& total, BlockSlots& slots) {
  const int warp = device::thread_index() / device::kWarpSize;
  if (device::lane_index() == 0) slots.of_warp[warp] = value;
  device::sync_threads();
  int64_t before = 0;
  total = 0;
  for (int w = 0; w < device::num_threads() / device::kWarpSize; ++w) {
    if (w == warp) before = total;
    total += slots.of_warp[w];
  }
  device::sync_threads();
  return before;
}

}  // namespace longctx::cuda
