#include <algorithm>

#include "cuda/runtime.h"
#include "cuda/unowned_rows.h"
#include "device/thread.cuh"

namespace longctx::cuda {
namespace {

constexpr int kUnownedWarps = 4;

LONGCTX_KERNEL(kUnownedWarps* device::kWarpSize, 1)
fill_unowned_rows_kernel(const UnownedRows p, const int64_t num_warps) {
  const int32_t* offsets = p.seqs.cu_seqlens_q;
  bool partition = offsets[0] == 0 && offsets[p.seqs.num_seqs] == p.seqs.seqlen_q;
  for (int64_t s = device::lane_index(); s < p.seqs.num_seqs; s += device::kWarpSize) {
    partition &= offsets[s] <= offsets[s + 1];
  }
  if (device::ballot(!partition) == 0) return;
  int64_t index = device::block_index() * kUnownedWarps + device::warp_index();
  for (; index < p.num_maps * p.seqs.seqlen_q; index += num_warps) {
    if (p.lse != nullptr && device::lane_index() == 0) p.lse[index] = -INFINITY;
    if (p.out == nullptr) continue;
    char* row =
        p.out + index / p.seqs.seqlen_q * p.map_stride + index % p.seqs.seqlen_q * p.row_stride;
    for (int64_t i = 2 * device::lane_index(); i < p.row_bytes; i += 2 * device::kWarpSize) {
      *reinterpret_cast<uint16_t*>(row + i) = 0;
    }
  }
}

}  // namespace

void fill_unowned_rows(const char* op, const UnownedRows& rows) {
  const int64_t blocks = std::min<int64_t>((rows.num_maps * rows.seqs.seqlen_q + 63) / 64, 512);
  if (blocks == 0) return;
  launch(op, &fill_unowned_rows_kernel, dim3(static_cast<unsigned>(blocks)),
         kUnownedWarps * device::kWarpSize, 0, rows, blocks * kUnownedWarps);
}

}  // namespace longctx::cuda
