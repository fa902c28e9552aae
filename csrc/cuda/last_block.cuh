// Work that is shared out to blocks and finished by whichever is the last to have its part: nobody
// waits, and which block it is changes no result.
#pragma once
#include "device/thread.cuh"

namespace longctx::cuda {

// Called by all threads of each of `num_blocks` blocks when the block's part is in memory; true in
// the last one, which then sees all parts. `counter` is 0 before and after. `arrivals` is in shared
// memory.
LONGCTX_DEVICE bool is_last_block(uint32_t* counter, uint32_t num_blocks, uint32_t& arrivals) {
  device::sync_threads();  // what all threads have written goes out with the first one's count
  if (device::thread_index() == 0) {
    arrivals = device::atomic_count_global(counter, num_blocks - 1);
  }
  device::sync_threads();
  return arrivals == num_blocks - 1;
}

}  // namespace longctx::cuda
