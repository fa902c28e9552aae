// Copies from global to shared memory that run beside the arithmetic (cp.async, sm_80 and later).
#pragma once
#include "device/thread.cuh"

namespace longctx::device {

#ifndef LONGCTX_SIMT

LONGCTX_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Copies `bytes` (0 to 16) and zero-fills up to 16. Both addresses are 16-byte aligned; `global` is
// not read when `bytes` is 0. The copy may land at any time until wait_copies() says it has.
LONGCTX_DEVICE void copy_async_16(void* shared, const void* global, int bytes) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes)
      : "memory");
}

// Closes the group of copies that this thread has issued since the last call.
LONGCTX_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's groups are still under way. Other threads see the
// data after a barrier.
template <int pending>
LONGCTX_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

#else

LONGCTX_DEVICE void copy_async_16(void* shared, const void* global, int bytes,
                                  simt::Where where = simt::here()) {
  simt::issue_copy(shared, global, bytes, where);
}
LONGCTX_DEVICE void commit_copies() { simt::commit_copies(); }
template <int pending>
LONGCTX_DEVICE void wait_copies() {
  simt::wait_copies(pending);
}

#endif  // LONGCTX_SIMT

}  // namespace longctx::device
