#include <algorithm>

#include "cuda/antidiagonal_scores.cuh"
#include "cuda/block_scores.h"
#include "cuda/runtime.h"

namespace longctx::cuda {
namespace {

constexpr const char* kOp = "block_scores";
constexpr int64_t kStateBytes = int64_t{1} << 28;  // of a slab; at least one unit is worked on

void launch_states(const BlockScoresParams& p, const GroupGrid& grid, int64_t units) {
  const auto run = [&](auto kernel) {
    launch(kOp, kernel, dim3(static_cast<unsigned>(units * grid.column_tiles)), kGroupThreads,
           kGroupSharedBytes, p, grid);
  };
  if (p.dtype == DType::kFloat32) {
    run(&antidiagonal_states_kernel<float>);
  } else if (p.dtype == DType::kBFloat16) {
    run(&antidiagonal_states_kernel<__nv_bfloat16>);
  } else {
    run(&antidiagonal_states_kernel<__half>);
  }
}

}  // namespace

void score_antidiagonals(const BlockScoresParams& p) {
  const SequenceParams& seqs = p.map.seqs;
  const int64_t element_size = p.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t block_groups = p.map.block_size_k / p.stride;
  GroupGrid grid;
  grid.row_slots = num_slots(seqs, p.map.num_q_blocks, grid.tile_map_rows(p));
  grid.unit_rows = std::min(grid.tile_map_rows(p), p.map.num_q_blocks);
  grid.column_tiles = (p.map.num_k_blocks * block_groups + kGroupColumns - 1) / kGroupColumns;
  grid.piece = static_cast<int>(std::min<int64_t>(block_groups, kMaxPiece));
  grid.num_pieces = grid.column_tiles * kGroupColumns / grid.piece;
  grid.q_aligned = rows_are_aligned(p.q, seqs.batch, p.num_q_heads, seqs.seqlen_q, element_size);
  grid.k_aligned = rows_are_aligned(p.k, seqs.batch, p.num_kv_heads, seqs.seqlen_k, element_size);

  const int64_t unit_bytes = kTileRows * grid.num_pieces * static_cast<int64_t>(sizeof(float));
  const int64_t num_units = seqs.batch * p.num_q_heads * grid.row_slots;
  const int64_t slab = std::clamp<int64_t>(kStateBytes / unit_bytes, 1, num_units);
  const Workspace states(slab * unit_bytes);
  grid.states = states.as<float>();
  for (; grid.first_unit < num_units; grid.first_unit += slab) {
    const int64_t units = std::min(slab, num_units - grid.first_unit);
    launch_states(p, grid, units);
    launch(kOp, &antidiagonal_rows_kernel, dim3(static_cast<unsigned>(units * grid.unit_rows)),
           kRowThreads, static_cast<int64_t>(sizeof(RowShared)), p, grid);
  }
}

}  // namespace longctx::cuda
