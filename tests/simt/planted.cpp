// planted <bug>: runs the small kernel with this mistake in every mode; fails if it is found.
#include "planted.cuh"

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "cuda/runtime.h"
#include "modes.h"

namespace {

using longctx::cuda::Bug;

constexpr int64_t kBlocks = 3;
constexpr int64_t kKeysPerBlock = 3 * longctx::cuda::kPlantedTile + 64;

// Exactly as long as needed, 16-byte aligned.
struct Buffers {
  std::unique_ptr<float[]> keys{new float[kBlocks * kKeysPerBlock]};
  std::unique_ptr<float[]> weights{new float[4]{1, -2, 3, -4}};
  std::unique_ptr<float[]> out{new float[kBlocks]{}};
};

template <Bug bug>
bool run() {
  bool ok = true;
  for (const simt::NamedMode& mode : simt::modes()) {
    simt::mode = mode.mode;
    Buffers buffers;
    float expected[kBlocks] = {};
    for (int64_t i = 0; i < kBlocks * kKeysPerBlock; ++i) {
      buffers.keys[i] = static_cast<float>(i * 37 % 11);
      expected[i / kKeysPerBlock] += buffers.weights[i % 4] * buffers.keys[i];
    }
    try {
      longctx::cuda::launch("planted", &longctx::cuda::planted_kernel<bug>, dim3(kBlocks),
                            longctx::cuda::kPlantedThreads, sizeof(longctx::cuda::PlantedShared),
                            static_cast<const float*>(buffers.keys.get()), kKeysPerBlock,
                            static_cast<const float*>(buffers.weights.get()), buffers.out.get());
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", mode.name, error.what());
      ok = false;
      continue;
    }
    for (int64_t block = 0; block < kBlocks; ++block) {
      if (buffers.out[block] == expected[block]) continue;
      std::printf("%s: wrong result: block %d, %g instead of %g\n", mode.name,
                  static_cast<int>(block), buffers.out[block], expected[block]);
      ok = false;
    }
  }
  return ok;
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
};

}  // namespace

int main(int argc, char** argv) {
  for (const Variant& variant : kVariants) {
    if (argc == 2 && std::string(argv[1]) == variant.name) return variant.run() ? 0 : 1;
  }
  std::fprintf(stderr, "usage: %s <bug>\n", argv[0]);
  return 2;
}
