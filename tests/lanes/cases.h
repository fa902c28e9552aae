// Lane vectors: what every word of csrc/device makes of each thread's registers. Recorded on CPU
// fibers (LONGCTX_SIMT), replayed there and on a GPU.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/runtime.h"
#include "device/thread.cuh"
#include "longctx/config.h"

namespace longctx::lanes {

// Inputs of a record; a replay reads them from the file.
class Random {
 public:
  uint32_t bits() {  // SplitMix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>(z >> 32);
  }
  int below(int n) { return static_cast<int>(bits() % static_cast<uint32_t>(n)); }
  float between(float low, float high) {
    return low + (high - low) * static_cast<float>(bits() >> 8) * 0x1p-24f;
  }

 private:
  uint64_t state_ = 1;
};

template <class To, class From>
LONGCTX_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof(to));
  return to;
}

struct Case {
  const char* name;   // of its file
  const char* words;  // of csrc/device that it runs
  int threads;        // of all blocks
  int words_in;       // of a thread, 32 bits each
  int words_out;
  // Both 0: outputs are equal bit by bit. Else they are floats, and may be this far off.
  float relative;
  float absolute;
  void (*fill)(Random& random, int thread, uint32_t* in);
  // in [threads, words_in], out [threads, words_out]
  void (*run)(const uint32_t* in, uint32_t* out);
  // What a record writes; null: what run() returns.
  void (*expected)(const uint32_t* in, uint32_t* out) = nullptr;
};

// What a case says where it has nothing to add.
struct Defaults {
  static constexpr int kThreads = 32;  // of a block
  static constexpr int kGridX = 1, kGridY = 1;
  static constexpr int kSharedBytes = 0;
  static constexpr float kRelative = 0, kAbsolute = 0;
};

template <class Lane>
LONGCTX_KERNEL(256, 1)
lane_kernel(const uint32_t* in, uint32_t* out) {
  const int64_t block = device::block_index_y() * Lane::kGridX + device::block_index();
  const int64_t thread = block * device::num_threads() + device::thread_index();
  Lane::run(in + thread * Lane::kIn, out + thread * Lane::kOut);
}

template <class Lane>
void run_case(const uint32_t* in, uint32_t* out) {
  cuda::launch("lanes", &lane_kernel<Lane>, dim3(Lane::kGridX, Lane::kGridY), Lane::kThreads,
               Lane::kSharedBytes, in, out);
}

template <class Lane>
Case make_case() {
  return {Lane::kName,     Lane::kWords, Lane::kThreads * Lane::kGridX * Lane::kGridY,
          Lane::kIn,       Lane::kOut,   Lane::kRelative,
          Lane::kAbsolute, &Lane::fill,  &run_case<Lane>};
}

std::vector<Case> thread_cases();
std::vector<Case> matrix_cases();
std::vector<Case> hopper_cases();

}  // namespace longctx::lanes
