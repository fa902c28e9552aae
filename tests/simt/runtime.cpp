// csrc/cuda/runtime.h on the CPU: a small made-up device.
#include "cuda/runtime.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace longctx::cuda {

const DeviceLimits& device_limits() {
  static const DeviceLimits small = {8, 0, 4, static_cast<int>(simt::kMaxSharedBytes)};
  static const DeviceLimits hopper = {9, 0, 4, static_cast<int>(simt::kHopperSharedBytes)};
  return simt::mode.hopper ? hopper : small;
}

// Exactly as long as asked for, so that AddressSanitizer sees its end, and filled with NaN.
Workspace::Workspace(int64_t bytes) {
  if (bytes == 0) return;
  if (posix_memalign(&data_, 256, static_cast<size_t>(bytes)) != 0) throw std::bad_alloc();
  std::memset(data_, 0xff, static_cast<size_t>(bytes));
  owner_ = data_;
}

Workspace::~Workspace() { std::free(owner_); }

}  // namespace longctx::cuda
