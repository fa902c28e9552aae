// Tiles of float32 rows in shared memory, and the copies that fill them.
#pragma once
#include "cuda/tile_copy.cuh"

namespace longctx::cuda::fp32 {

constexpr int kThreads = 128;
constexpr int kChunk = 4;  // elements in 16 bytes
constexpr int kPad = 4;    // rows of a tile are 16 bytes apart in the banks

struct alignas(16) Four {
  float x[kChunk];
};
LONGCTX_DEVICE Four load_four(const float* aligned) {
  return *reinterpret_cast<const Four*>(aligned);
}

// Copies `rows` rows into a tile of kHeadDim columns, zeros past their end. from(row) is the row's
// address, null for zeros. All threads take part.
template <int kHeadDim, class From>
LONGCTX_DEVICE void copy_rows(float* tile, int rows, const SourceRows& source, const From& from) {
  constexpr int kChunks = kHeadDim / kChunk;
  for (int i = device::thread_index(); i < rows * kChunks; i += kThreads) {
    const int row = i / kChunks, first = i % kChunks * kChunk;
    const float* address = from(row);
    float* target = tile + row * (kHeadDim + kPad) + first;
    if (source.aligned) {
      const bool live = address != nullptr && first < source.dim;
      device::copy_async_16(target, address + first, live ? 16 : 0);
      continue;
    }
    for (int e = 0; e < kChunk; ++e) {
      target[e] = address != nullptr && first + e < source.dim ? address[first + e] : 0.0f;
    }
  }
  device::commit_copies();
}

}  // namespace longctx::cuda::fp32
