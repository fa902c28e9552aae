// 128 live values in 32 registers: the check for spills must find this kernel.
#include "device/thread.cuh"

namespace longctx {

LONGCTX_KERNEL(1024, 2) spilling_kernel(float* values) {
  float kept[128];
  for (int i = 0; i < 128; ++i) kept[i] = values[i * 1024 + device::thread_index()];
  device::sync_threads();
  for (int i = 0; i < 128; ++i)
    values[(127 - i) * 1024 + device::thread_index()] = kept[i] * kept[127 - i];
}

}  // namespace longctx
