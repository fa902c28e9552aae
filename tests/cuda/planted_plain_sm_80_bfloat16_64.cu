// Named like an instance, but without tensor cores and asynchronous copies; and CMake compiles it
// for Hopper alone. The check must find all of it.
#include "device/thread.cuh"

namespace longctx {

LONGCTX_KERNEL(32, 1) plain_kernel(float* values) { values[device::thread_index()] += 1; }

}  // namespace longctx
