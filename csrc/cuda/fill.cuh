// Fills an output of which kernels write only the part that some sequence owns.
#pragma once
#include "cuda/runtime.h"
#include "device/thread.cuh"

namespace longctx::cuda {

constexpr int kFillThreads = 256;
constexpr int kFillPerThread = 16;

template <class T>
LONGCTX_KERNEL(kFillThreads, 1)
fill_kernel(T* data, const int64_t count, const T value) {
  const int64_t first = device::block_index() * kFillThreads * kFillPerThread;
  for (int i = 0; i < kFillPerThread; ++i) {
    const int64_t at = first + i * kFillThreads + device::thread_index();
    if (at < count) data[at] = value;
  }
}

template <class T>
void fill(const char* op, T* data, int64_t count, T value) {
  if (count == 0) return;
  constexpr int64_t kPerBlock = int64_t{kFillThreads} * kFillPerThread;
  const auto grid = dim3(static_cast<unsigned>((count + kPerBlock - 1) / kPerBlock));
  launch(op, &fill_kernel<T>, grid, kFillThreads, 0, data, count, value);
}

}  // namespace longctx::cuda
