// A small tiled kernel and the mistakes that host SIMT must find in it.
//
//   out[block] = sum over its keys of weights[key % 4] * keys[key]
//
// Two stages of asynchronous copies; every thread sums what another thread has copied:
//   step 0:  copy tile 0
//   step t:  copy tile t + 1; wait for tile t; barrier; sum tile t; barrier (the next copy reuses
//            its stage)
//   end:     sum over the lanes of a warp, then over the warps through shared memory; the last
//            block to end adds up all blocks' sums
#pragma once
#include "device/copy.cuh"

namespace longctx::cuda {

enum class Bug {
  kNone,
  kNoWait,              // sums before the copies have landed
  kNoBarrierAfterWait,  // reads what other threads have copied, before they have waited
  kNoTrailingBarrier,   // overwrites a stage that others still read
  kNoWarpBarrier,       // reads what another lane has written
  kSharedOverrun,       // reads behind the shared memory
  kGlobalOverrun,       // stores behind the output
  kShuffleDistance,     // adds the wrong lanes
  kDivergentBarrier,    // the warps wait at two places
  kSkippedBarrier,      // one warp does not wait
  kDivergentWarp,       // half a warp takes part in a collective
  kLaneReturned,        // one lane does not
  kMisalignedCopy,
  kBlocksRace,           // all blocks store to one place
  kNoRelease,            // the last block comes to know that others have ended, not what they left
  kNoBarrierBeforeCount  // a thread says that its block has ended before another one's store
};

constexpr int kPlantedThreads = 64;
constexpr int kPlantedTile = 4 * kPlantedThreads;

struct PlantedShared {
  float stages[2][kPlantedTile];
  uint32_t arrivals;
  float warp_sums[kPlantedThreads / device::kWarpSize];
};

template <Bug bug>
LONGCTX_DEVICE void copy_tile(const float* keys, int64_t num_keys, int64_t tile,
                              PlantedShared& shared) {
  constexpr int kShift = bug == Bug::kMisalignedCopy ? 1 : 0;
  const int first = 4 * device::thread_index();
  const int64_t left = num_keys - tile * kPlantedTile - first;
  const int count = left < 0 ? 0 : left < 4 ? static_cast<int>(left) : 4;
  const float* source = count > 0 ? keys + tile * kPlantedTile + first : keys;
  device::copy_async_16(shared.stages[tile % 2] + first + kShift, source, 4 * count);
  device::commit_copies();
}

template <Bug bug>
LONGCTX_DEVICE bool is_last_block(uint32_t* counter, uint32_t num_blocks, uint32_t& arrivals) {
  if constexpr (bug != Bug::kNoBarrierBeforeCount) device::sync_threads();
  if (device::thread_index() == kPlantedThreads - 1) {
    arrivals = bug == Bug::kNoRelease ? __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED)
                                      : device::atomic_count_global(counter, num_blocks - 1);
  }
  device::sync_threads();
  return arrivals == num_blocks - 1;
}

// out [num_blocks + 1], the last is the sum of all; counter 0.
template <Bug bug>
LONGCTX_KERNEL(kPlantedThreads, 1)
planted_kernel(const float* keys, int64_t keys_per_block, const float* weights, float* out,
               uint32_t num_blocks, uint32_t* counter) {
  auto& shared = *reinterpret_cast<PlantedShared*>(device::shared_memory());
  keys += device::block_index() * keys_per_block;
  const int64_t num_tiles = (keys_per_block + kPlantedTile - 1) / kPlantedTile;
  const int thread = device::thread_index();
  const int other = kPlantedThreads - 1 - thread;
  float sum = 0;
  copy_tile<bug>(keys, keys_per_block, 0, shared);
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    copy_tile<bug>(keys, keys_per_block, tile + 1, shared);
    if constexpr (bug != Bug::kNoWait) device::wait_copies<1>();
    if constexpr (bug == Bug::kDivergentBarrier) {
      if (thread < device::kWarpSize) {
        device::sync_threads();
      } else {
        device::sync_threads();
      }
    } else if constexpr (bug == Bug::kSkippedBarrier) {
      if (thread < device::kWarpSize) device::sync_threads();
    } else if constexpr (bug != Bug::kNoBarrierAfterWait) {
      device::sync_threads();
    }
    const float* part = shared.stages[tile % 2] + 4 * other;
    for (int i = 0; i < 4; ++i) sum += weights[i] * part[i];
    if constexpr (bug != Bug::kNoTrailingBarrier) device::sync_threads();
  }
  device::wait_copies<0>();

  // Every lane leaves its sum to its neighbour, as a step through shared memory.
  device::sync_threads();
  shared.stages[0][thread] = sum;
  if constexpr (bug != Bug::kNoWarpBarrier) device::sync_warp();
  sum = shared.stages[0][thread ^ 1];

  constexpr int kFarthest = bug == Bug::kShuffleDistance ? 8 : 16;
  if constexpr (bug == Bug::kDivergentWarp) {
    if (thread % 2 == 0) sum += device::shuffle_xor(sum, 1);
  }
  if constexpr (bug == Bug::kLaneReturned) {
    if (thread == 5) return;
  }
  for (int mask = kFarthest; mask > 0; mask /= 2) sum += device::shuffle_xor(sum, mask);
  if (device::lane_index() == 0) shared.warp_sums[thread / device::kWarpSize] = sum;
  device::sync_threads();
  constexpr int kOverrun = bug == Bug::kSharedOverrun ? 1 : 0;
  if (thread == 0) {
    const int64_t at = bug == Bug::kBlocksRace      ? 0
                       : bug == Bug::kGlobalOverrun ? device::block_index() + 2
                                                    : device::block_index();
    out[at] = shared.warp_sums[0] + shared.warp_sums[1 + kOverrun];
  }
  if (!is_last_block<bug>(counter, num_blocks, shared.arrivals) || thread != 0) return;
  float total = 0;
  for (uint32_t block = 0; block < num_blocks; ++block) total += out[block];
  out[num_blocks] = total;
}

}  // namespace longctx::cuda
