// 64-bit sums out of 32-bit atomics, which are single instructions where 64-bit ones are loops: the
// old value tells whether the addition carried.
#pragma once
#include "device/thread.cuh"

namespace longctx::cuda {

template <int num_bins>
struct WideSums {
  static constexpr int kBins = num_bins;
  int32_t low[kBins];
  int32_t high[kBins];

  LONGCTX_DEVICE void clear(int used = kBins) {
    for (int bin = device::thread_index(); bin < used; bin += device::num_threads()) {
      low[bin] = high[bin] = 0;
    }
  }
  LONGCTX_DEVICE void add(uint32_t bin, int64_t value) {
    const uint32_t part = static_cast<uint32_t>(value);
    const uint32_t old =
        static_cast<uint32_t>(device::atomic_add_shared(&low[bin], static_cast<int32_t>(part)));
    const int32_t rest = static_cast<int32_t>(value >> 32) + (old + part < old ? 1 : 0);
    if (rest != 0) device::atomic_add_shared(&high[bin], rest);
  }
  LONGCTX_DEVICE int64_t operator[](int bin) const {
    return static_cast<int64_t>(high[bin]) << 32 | static_cast<uint32_t>(low[bin]);
  }
};

}  // namespace longctx::cuda
