// Packed sequences need not cover the query axis: rows that no sequence owns get out = 0,
// lse = -inf. Runs before attention; where the sequences cover everything it only looks.
#pragma once
#include "device/thread.cuh"
#include "longctx/params.h"

namespace longctx::cuda {

constexpr int kUnownedWarps = 4;

struct UnownedRows {
  SequenceParams seqs;  // packed
  int64_t num_maps = 0;
  float* lse = nullptr;  // [num_maps, seqlen_q]
  char* out = nullptr;   // [num_maps, seqlen_q], strides in bytes; null: only lse
  int64_t map_stride = 0;
  int64_t row_stride = 0;
  int64_t row_bytes = 0;  // even
  int64_t num_warps = 0;  // of the grid
};

LONGCTX_KERNEL(kUnownedWarps* device::kWarpSize, 1)
fill_unowned_rows_kernel(const UnownedRows p) {
  const int32_t* offsets = p.seqs.cu_seqlens_q;
  bool partition = offsets[0] == 0 && offsets[p.seqs.num_seqs] == p.seqs.seqlen_q;
  for (int64_t s = device::lane_index(); s < p.seqs.num_seqs; s += device::kWarpSize) {
    partition &= offsets[s] <= offsets[s + 1];
  }
  if (device::ballot(!partition) == 0) return;
  int64_t index = device::block_index() * kUnownedWarps + device::warp_index();
  for (; index < p.num_maps * p.seqs.seqlen_q; index += p.num_warps) {
    if (device::lane_index() == 0) p.lse[index] = -INFINITY;
    if (p.out == nullptr) continue;
    char* row =
        p.out + index / p.seqs.seqlen_q * p.map_stride + index % p.seqs.seqlen_q * p.row_stride;
    for (int64_t i = 2 * device::lane_index(); i < p.row_bytes; i += 2 * device::kWarpSize) {
      *reinterpret_cast<uint16_t*>(row + i) = 0;
    }
  }
}

}  // namespace longctx::cuda
