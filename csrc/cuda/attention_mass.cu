#include <optional>

#include "cuda/attention_mass.cuh"
#include "cuda/fill.cuh"
#include "cuda/kernels.h"
#include "cuda/mass_sums.cuh"
#include "cuda/runtime.h"
#include "cuda/supported.h"

namespace longctx::cuda {
namespace {

constexpr const char* kOp = "attention_mass";

// Long strips load q less often; short ones give every multiprocessor something to do.
MassGrid choose_grid(const AttentionMassParams& p, bool follow_diagonals) {
  const int64_t element_size = p.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t maps = p.seqs.batch * p.num_q_heads;
  const int64_t axis = follow_diagonals ? p.num_diagonals : p.seqs.seqlen_k;
  const DeviceLimits& limits = device_limits();
  MassGrid grid;
  grid.follow_diagonals = follow_diagonals;
  grid.strip_tiles = kMaxStripTiles;
  while (grid.strip_size() > kTileRows &&
         maps * num_slots(p.seqs, axis, grid.strip_size()) < 4 * limits.num_multiprocessors) {
    grid.strip_tiles /= 2;
  }
  grid.slots = num_slots(p.seqs, axis, grid.strip_size());
  grid.num_slices = static_cast<int>((p.head_dim * element_size + kSliceBytes - 1) / kSliceBytes);
  grid.q_slots = mass_shared_bytes(grid.num_slices) <= limits.shared_memory_per_block
                     ? grid.num_slices
                     : kStages;
  grid.q_aligned =
      rows_are_aligned(p.q, p.seqs.batch, p.num_q_heads, p.seqs.seqlen_q, element_size);
  grid.k_aligned =
      rows_are_aligned(p.k, p.seqs.batch, p.num_kv_heads, p.seqs.seqlen_k, element_size);
  return grid;
}

void launch_mass(const AttentionMassParams& p, const MassGrid& grid) {
  const int64_t blocks = p.seqs.batch * p.num_q_heads * grid.slots;
  const auto run = [&](auto kernel) {
    launch(kOp, kernel, dim3(static_cast<unsigned>(blocks)), kMassThreads,
           mass_shared_bytes(grid.q_slots), p, grid);
  };
  if (p.dtype == DType::kFloat32) {
    run(&attention_mass_kernel<float>);
  } else if (p.dtype == DType::kBFloat16) {
    run(&attention_mass_kernel<__nv_bfloat16>);
  } else {
    run(&attention_mass_kernel<__half>);
  }
}

// The sums of diagonals, and those of keys as well where one walk gives both.
void run_diagonals(const AttentionMassParams& p, float* key_mass) {
  MassGrid grid = choose_grid(p, true);
  const int64_t maps = p.seqs.batch * p.num_q_heads;
  const Workspace windows(maps * grid.slots * grid.window_size() *
                          static_cast<int64_t>(sizeof(float)));
  grid.windows = windows.as<float>();
  grid.key_mass = key_mass;
  launch_mass(p, grid);
  launch(kOp, &mass_diagonals_kernel, dim3(static_cast<unsigned>(maps * grid.slots)), kSumThreads,
         0, p, grid);
}

}  // namespace

void run_attention_mass_cuda(const AttentionMassParams& p) {
  require_supported(kOp, p.dtype, p.head_dim, p.seqs);
  const int64_t maps = p.seqs.batch * p.num_q_heads;
  const bool nothing = p.seqs.seqlen_q == 0 || p.seqs.seqlen_k == 0;
  const bool packed = p.seqs.cu_seqlens_q != nullptr;
  std::optional<Workspace> keys;  // [batch, num_q_heads, seqlen_k]
  float* key_mass = p.key_mass;
  if (p.key_mass != nullptr && p.segment_offsets != nullptr) {
    keys.emplace(maps * p.seqs.seqlen_k * static_cast<int64_t>(sizeof(float)));
    key_mass = keys->as<float>();
  }
  if (nothing || packed) {
    if (key_mass != nullptr) fill(kOp, key_mass, maps * p.seqs.seqlen_k, 0.0f);
    if (p.diagonal_mass != nullptr) fill(kOp, p.diagonal_mass, maps * p.num_diagonals, 0.0f);
  }
  if (!nothing && maps > 0) {
    const bool one_walk = p.diagonal_mass != nullptr && p.seqs.seqlen_q <= kTileRows;
    if (p.diagonal_mass != nullptr) run_diagonals(p, one_walk ? key_mass : nullptr);
    if (key_mass != nullptr && !one_walk) {
      MassGrid grid = choose_grid(p, false);
      grid.key_mass = key_mass;
      launch_mass(p, grid);
    }
  }
  if (keys && maps * p.num_segments > 0) {
    constexpr int64_t kSharedBytes = kSumThreads / device::kWarpSize * sizeof(double);
    launch(kOp, &mass_segments_kernel, dim3(static_cast<unsigned>(maps * p.num_segments)),
           kSumThreads, kSharedBytes, p, static_cast<const float*>(key_mass));
  }
}

}  // namespace longctx::cuda
