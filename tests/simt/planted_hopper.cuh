// The same for Hopper's pipeline of one producer warp and four consumer warps.
//
//   out = sum of the elements of a [rows, 64] tensor
//
//   producer, step t:   wait until stage t % 2 is empty; expect the bytes of box t; start its copy
//   consumers, step t:  wait until stage t % 2 is full; sum it; say that it is empty
#pragma once
#include "device/hopper.cuh"

namespace longctx::cuda {

enum class HopperBug {
  kNone,
  kNoFullWait,    // consumers read what has not landed
  kNoEmptyWait,   // the producer overwrites what is still read
  kEarlyRelease,  // consumers say empty before they have read
};

constexpr int kHopperConsumers = device::kWarpgroupSize;
constexpr int kHopperThreads = kHopperConsumers + device::kWarpSize;
constexpr int kHopperRows = 64;  // of a box
constexpr int kHopperBoxBytes = kHopperRows * device::kPanelBytes;

struct HopperShared {
  __nv_bfloat16 stages[2][kHopperRows * 64];
  uint64_t full[2], empty[2];
  float warp_sums[kHopperConsumers / device::kWarpSize];
};

template <HopperBug bug>
LONGCTX_KERNEL(kHopperThreads, 1)
planted_hopper_kernel(const LONGCTX_GRID_CONSTANT device::TensorMap map, int num_boxes,
                      float* out) {
  auto& shared = *reinterpret_cast<HopperShared*>(device::shared_memory());
  const int thread = device::thread_index();
  if (thread == 0) {
    for (int stage = 0; stage < 2; ++stage) {
      device::mbarrier_init(&shared.full[stage], 1);
      device::mbarrier_init(&shared.empty[stage], kHopperConsumers);
    }
  }
  device::fence_mbarrier_init();
  device::sync_threads();
  if (thread >= kHopperConsumers) {
    if (!device::elect_one()) return;
    for (int box = 0; box < num_boxes; ++box) {
      const int stage = box % 2;
      if constexpr (bug != HopperBug::kNoEmptyWait) {
        device::mbarrier_wait(&shared.empty[stage], (box / 2 + 1) % 2);
      }
      device::mbarrier_arrive_expect(&shared.full[stage], kHopperBoxBytes);
      device::load_box(shared.stages[stage], &map, &shared.full[stage], 0, box * kHopperRows, 0, 0);
    }
    return;
  }
  float sum = 0;
  for (int box = 0; box < num_boxes; ++box) {
    const int stage = box % 2;
    if constexpr (bug != HopperBug::kNoFullWait) {
      device::mbarrier_wait(&shared.full[stage], box / 2 % 2);
    }
    if constexpr (bug == HopperBug::kEarlyRelease) device::mbarrier_arrive(&shared.empty[stage]);
    for (int i = thread; i < kHopperRows * 64; i += kHopperConsumers) {
      sum += device::widen(shared.stages[stage][i]);
    }
    if constexpr (bug != HopperBug::kEarlyRelease) device::mbarrier_arrive(&shared.empty[stage]);
  }
  for (int mask = 16; mask > 0; mask /= 2) sum += device::shuffle_xor(sum, mask);
  if (thread % device::kWarpSize == 0) shared.warp_sums[thread / device::kWarpSize] = sum;
  device::sync_named(1, kHopperConsumers);
  if (thread == 0) {
    const float* sums = shared.warp_sums;
    *out = sums[0] + sums[1] + sums[2] + sums[3];
  }
}

}  // namespace longctx::cuda
