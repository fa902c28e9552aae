// What a block of linear_attention.cuh keeps in shared memory.
#pragma once
#include <type_traits>

#include "cuda/fragments.cuh"
#include "cuda/linear_weights.cuh"

namespace longctx::cuda {

constexpr int kLinearWarps = 4;
constexpr int kLinearThreads = kLinearWarps * device::kWarpSize;

// What a launch hands to the kernel beside the params.
struct LinearLaunch {
  LinearPass pass;
  SourceRows q, k, v;
  bool out_aligned = false;  // rows of out may be written 16 bytes at a time
};

// What a block works on. In shared memory, so that it takes no registers while the products run.
struct alignas(16) LinearTask {
  LinearItem item;
  const uint16_t* q;  // [head_dim], the first row of the sequence
  const uint16_t* k;  // [head_dim]
  const uint16_t* v;  // the item's columns
  char* out;          // the item's columns
};

template <int kHeadDim, int kColumns>
struct LinearShared {
  static constexpr int kStages = kHeadDim <= 128 ? 2 : 1;  // of K and V
  static constexpr int kTokens = kLinearChunk;
  static constexpr int kQ = 0;  // [kTokens, kHeadDim]
  static constexpr int kK = kQ + kTokens * TileRows<kHeadDim>::kRowBytes;
  static constexpr int kKBytes = kTokens * TileRows<kHeadDim>::kRowBytes;
  static constexpr int kV = kK + kStages * kKBytes;  // [kTokens, kColumns]
  static constexpr int kVBytes = kTokens * TileRows<kColumns>::kRowBytes;
  static constexpr int kP = kV + kStages * kVBytes;  // [kTokens, kTokens]
  static constexpr int kWeights = kP + kTokens * TileRows<kTokens>::kRowBytes;  // [2]
  static constexpr int kDecay = kWeights + 2 * sizeof(LinearWeights);
  static constexpr int kTask = kDecay + sizeof(LinearDecay);
  static constexpr int kKeySums = kTask + sizeof(LinearTask);           // [kHeadDim] float
  static constexpr int kRowSums = kKeySums + kHeadDim * sizeof(float);  // [kTokens] float
  static constexpr int kRowUnits = kRowSums + kTokens * sizeof(float);  // [kTokens] float
  static constexpr int kBytes = kRowUnits + kTokens * sizeof(float);
  static_assert(kBytes <= 99 * 1024);

  char* base = device::shared_memory();
  LONGCTX_DEVICE LinearWeights& weights(int parity) const {
    return reinterpret_cast<LinearWeights*>(base + kWeights)[parity];
  }
  LONGCTX_DEVICE LinearDecay& decay() const {
    return *reinterpret_cast<LinearDecay*>(base + kDecay);
  }
  LONGCTX_DEVICE LinearTask& task() const { return *reinterpret_cast<LinearTask*>(base + kTask); }
  // With normalize: the sum of keys, the last column of the state; and those of the rows.
  LONGCTX_DEVICE float* key_sums() const { return reinterpret_cast<float*>(base + kKeySums); }
  LONGCTX_DEVICE float* row_sums() const { return reinterpret_cast<float*>(base + kRowSums); }
  // A row of p stands in units of this.
  LONGCTX_DEVICE float* row_units() const { return reinterpret_cast<float*>(base + kRowUnits); }
};

}  // namespace longctx::cuda
