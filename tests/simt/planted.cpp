// planted <bug>: runs a small kernel with this mistake in every mode; fails if it is found.
#include "planted.cuh"

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "cuda/runtime.h"
#include "modes.h"
#include "planted_hopper.cuh"

namespace {

using longctx::cuda::Bug;
using longctx::cuda::HopperBug;

constexpr int64_t kBlocks = 3;
constexpr int64_t kKeysPerBlock = 3 * longctx::cuda::kPlantedTile + 64;

// Exactly as long as needed, 16-byte aligned.
struct Buffers {
  std::unique_ptr<float[]> keys{new float[kBlocks * kKeysPerBlock]};
  std::unique_ptr<float[]> weights{new float[4]{1, -2, 3, -4}};
  std::unique_ptr<float[]> out{new float[kBlocks + 1]{}};
  uint32_t counter = 0;
};

bool right(const char* mode, int block, float got, float expected) {
  if (got == expected) return true;
  std::printf("%s: wrong result: block %d, %g instead of %g\n", mode, block, got, expected);
  return false;
}

// run_once(mode name): whether the result was right.
template <class RunOnce>
bool in_every_mode(const RunOnce& run_once) {
  bool ok = true;
  for (const simt::NamedMode& mode : simt::modes()) {
    simt::mode = mode.mode;
    try {
      ok &= run_once(mode.name);
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", mode.name, error.what());
      ok = false;
    }
  }
  return ok;
}

template <Bug bug>
bool run() {
  return in_every_mode([](const char* mode) {
    Buffers buffers;
    float expected[kBlocks + 1] = {};
    for (int64_t i = 0; i < kBlocks * kKeysPerBlock; ++i) {
      buffers.keys[i] = static_cast<float>(i * 37 % 11);
      expected[i / kKeysPerBlock] += buffers.weights[i % 4] * buffers.keys[i];
    }
    longctx::cuda::launch("planted", &longctx::cuda::planted_kernel<bug>, dim3(kBlocks),
                          longctx::cuda::kPlantedThreads, sizeof(longctx::cuda::PlantedShared),
                          static_cast<const float*>(buffers.keys.get()), kKeysPerBlock,
                          static_cast<const float*>(buffers.weights.get()), buffers.out.get(),
                          static_cast<uint32_t>(kBlocks), &buffers.counter);
    bool ok = true;
    for (int block = 0; block < kBlocks; ++block) expected[kBlocks] += expected[block];
    for (int block = 0; block <= kBlocks; ++block) {
      ok &= right(mode, block, buffers.out[block], expected[block]);
    }
    return ok;
  });
}

template <HopperBug bug>
bool run_hopper() {
  return in_every_mode([](const char* mode) {
    constexpr int kBoxes = 5, kRows = kBoxes * longctx::cuda::kHopperRows - 7;
    std::unique_ptr<__nv_bfloat16[]> tensor(new __nv_bfloat16[kRows * 64]);
    float expected = 0;
    for (int i = 0; i < kRows * 64; ++i) {
      const auto value = static_cast<float>(i % 5);
      tensor[i] = __float2bfloat16(value);
      expected += value;
    }
    constexpr int64_t kRowBytes = 128, kAllBytes = kRows * kRowBytes;
    const simt::TensorMap map = {reinterpret_cast<const char*>(tensor.get()),
                                 {64, kRows, 1, 1},
                                 {kRowBytes, kAllBytes, kAllBytes},
                                 longctx::cuda::kHopperRows};
    float out = 0;
    longctx::cuda::launch("planted", &longctx::cuda::planted_hopper_kernel<bug>, dim3(1),
                          longctx::cuda::kHopperThreads, sizeof(longctx::cuda::HopperShared), map,
                          kBoxes, &out);
    return right(mode, 0, out, expected);
  });
}

struct Variant {
  const char* name;
  bool (*run)();
};
constexpr Variant kVariants[] = {
    {"none", &run<Bug::kNone>},
    {"no_wait", &run<Bug::kNoWait>},
    {"no_barrier_after_wait", &run<Bug::kNoBarrierAfterWait>},
    {"no_trailing_barrier", &run<Bug::kNoTrailingBarrier>},
    {"no_warp_barrier", &run<Bug::kNoWarpBarrier>},
    {"shared_overrun", &run<Bug::kSharedOverrun>},
    {"global_overrun", &run<Bug::kGlobalOverrun>},
    {"shuffle_distance", &run<Bug::kShuffleDistance>},
    {"divergent_barrier", &run<Bug::kDivergentBarrier>},
    {"skipped_barrier", &run<Bug::kSkippedBarrier>},
    {"divergent_warp", &run<Bug::kDivergentWarp>},
    {"lane_returned", &run<Bug::kLaneReturned>},
    {"misaligned_copy", &run<Bug::kMisalignedCopy>},
    {"blocks_race", &run<Bug::kBlocksRace>},
    {"no_release", &run<Bug::kNoRelease>},
    {"no_barrier_before_count", &run<Bug::kNoBarrierBeforeCount>},
    {"hopper_none", &run_hopper<HopperBug::kNone>},
    {"hopper_no_full_wait", &run_hopper<HopperBug::kNoFullWait>},
    {"hopper_no_empty_wait", &run_hopper<HopperBug::kNoEmptyWait>},
    {"hopper_early_release", &run_hopper<HopperBug::kEarlyRelease>},
};

}  // namespace

int main(int argc, char** argv) {
  for (const Variant& variant : kVariants) {
    if (argc == 2 && std::string(argv[1]) == variant.name) return variant.run() ? 0 : 1;
  }
  std::fprintf(stderr, "usage: %s <bug>\n", argv[0]);
  return 2;
}
