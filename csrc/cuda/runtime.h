// What kernel files need of torch and of the CUDA runtime, without a torch header: the stream,
// temporary memory, the device's limits, and launches. Under LONGCTX_SIMT (tests/simt) a launch
// runs the kernel on CPU fibers.
#pragma once
#ifndef LONGCTX_SIMT
#include <cuda_runtime.h>
#else
#include "simt.h"
#endif

#include <cstdint>

namespace longctx::cuda {

// The current device. Asked once per device.
struct DeviceLimits {
  int compute_major = 0;
  int compute_minor = 0;
  int num_multiprocessors = 0;
  int shared_memory_per_block = 0;  // what a launch may ask for: 99 KiB on consumer cards
};
const DeviceLimits& device_limits();

// Temporary memory on the current device, 256-byte aligned and not initialised. It may be dropped
// as soon as the kernels that use it are launched: torch's allocator hands it out again in stream
// order, also inside a captured graph.
class Workspace {
 public:
  explicit Workspace(int64_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  void* owner_ = nullptr;
};

#ifndef LONGCTX_SIMT

// torch's current stream on the current device.
cudaStream_t current_stream();

// Throws std::runtime_error, naming the op. Does not wait for the kernel.
void check(const char* op, cudaError_t error);

// Launches kernel(params...) on torch's current stream with `shared_bytes` of dynamic shared
// memory.
template <class... Params>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, int num_threads,
            int64_t shared_bytes, const Params&... params) {
  constexpr int64_t kSharedByDefault = 48 * 1024;
  if (shared_bytes > kSharedByDefault) {
    check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shared_bytes)));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(num_threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = current_stream();
  check(op, cudaLaunchKernelEx(&config, kernel, params...));
}

#else

template <class... Params>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, int num_threads,
            int64_t shared_bytes, const Params&... params) {
  simt::run_grid(op, grid.x, grid.y, num_threads, shared_bytes, [&] { kernel(params...); });
}

#endif  // LONGCTX_SIMT

}  // namespace longctx::cuda
