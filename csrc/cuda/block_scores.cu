#include "cuda/block_scores.cuh"
#include "cuda/block_scores.h"
#include "cuda/fill.cuh"
#include "cuda/kernels.h"
#include "cuda/runtime.h"
#include "cuda/supported.h"

namespace longctx::cuda {
namespace {

constexpr const char* kOp = "block_scores";

template <class T, class Mean>
void launch_means(const BlockScoresParams& p, const MeansGrid& grid, Mean* means) {
  const int64_t warps = p.map.seqs.batch * grid.heads * grid.slots;
  launch(kOp, &block_means_kernel<T, Mean>,
         dim3(static_cast<unsigned>((warps + kMeansWarps - 1) / kMeansWarps)), kMeansThreads, 0, p,
         grid, means);
}

template <class T>
MeansGrid means_grid(const BlockScoresParams& p, bool of_q, int64_t row_stride) {
  const SequenceParams& seqs = p.map.seqs;
  MeansGrid grid;
  grid.of_q = of_q;
  grid.tensor = of_q ? p.q : p.k;
  grid.heads = of_q ? p.num_q_heads : p.num_kv_heads;
  grid.aligned = rows_are_aligned(grid.tensor, seqs.batch, grid.heads,
                                  of_q ? seqs.seqlen_q : seqs.seqlen_k, sizeof(T));
  grid.slots = of_q ? num_slots(seqs, p.map.num_q_blocks, 1)
                    : num_slots(seqs, seqs.seqlen_k, p.map.block_size_k);
  grid.num_means = of_q ? p.map.num_q_blocks : grid.slots;
  grid.row_stride = row_stride;
  return grid;
}

// The means that full queries meet are rounded to the dtype of q: products take one dtype.
template <class T, class Mean>
void score_means(const BlockScoresParams& p) {
  const SequenceParams& seqs = p.map.seqs;
  const bool of_means = p.method == BlockScoreMethod::kMean;
  constexpr int64_t kChunk = 16 / sizeof(Mean);
  const int64_t row_stride = (p.head_dim + kChunk - 1) / kChunk * kChunk;
  const MeansGrid q_grid = means_grid<T>(p, true, row_stride);
  const MeansGrid k_grid = means_grid<T>(p, false, row_stride);
  const int64_t row_bytes = row_stride * static_cast<int64_t>(sizeof(Mean));
  const Workspace q_means(of_means ? seqs.batch * q_grid.heads * q_grid.num_means * row_bytes : 0);
  const Workspace k_means(seqs.batch * k_grid.heads * k_grid.num_means * row_bytes);
  if (of_means) launch_means<T>(p, q_grid, q_means.as<Mean>());
  launch_means<T>(p, k_grid, k_means.as<Mean>());

  ScoresGrid grid;
  grid.q_means = q_means.as<Mean>();
  grid.k_means = k_means.as<Mean>();
  grid.k_slots = k_grid.slots;
  grid.row_stride = row_stride;
  grid.tile_rows = of_means ? kTileRows : kTileRows / p.map.block_size_q;
  grid.row_slots = num_slots(seqs, p.map.num_q_blocks, grid.tile_rows);
  grid.column_tiles = (p.map.num_k_blocks + kScoreColumns - 1) / kScoreColumns;
  grid.q_aligned = q_grid.aligned;
  const int64_t blocks = seqs.batch * p.num_q_heads * grid.row_slots * grid.column_tiles;
  constexpr int64_t kSharedBytes =
      tile_shared_bytes<kScoreColumns>() + kTileRows * static_cast<int64_t>(sizeof(int32_t));
  const auto run = [&](auto kernel) {
    launch(kOp, kernel, dim3(static_cast<unsigned>(blocks)), kScoreThreads, kSharedBytes, p, grid);
  };
  if (of_means) {
    run(&mean_scores_kernel);
  } else {
    run(&max_scores_kernel<T>);
  }
  if (!p.softmax) return;
  launch(kOp, &softmax_rows_kernel,
         dim3(static_cast<unsigned>(seqs.batch * p.num_q_heads * q_grid.slots)), kScoreThreads,
         kScoreThreads / device::kWarpSize * static_cast<int64_t>(sizeof(float)), p, q_grid.slots);
}

}  // namespace

void score_means(const BlockScoresParams& p) {
  const bool of_means = p.method == BlockScoreMethod::kMean;
  switch (p.dtype) {
    case DType::kBFloat16:
      return of_means ? score_means<__nv_bfloat16, float>(p)
                      : score_means<__nv_bfloat16, __nv_bfloat16>(p);
    case DType::kFloat16:
      return of_means ? score_means<__half, float>(p) : score_means<__half, __half>(p);
    default:
      return score_means<float, float>(p);
  }
}

void run_block_scores_cuda(const BlockScoresParams& p) {
  require_supported(kOp, p.dtype, p.head_dim, p.map.seqs);
  const int64_t size = p.map.seqs.batch * p.num_q_heads * p.map.num_q_blocks * p.map.num_k_blocks;
  fill(kOp, p.scores, size, p.softmax ? 0.0f : -INFINITY);
  if (size == 0 || p.map.seqs.seqlen_q == 0) return;
  if (p.method == BlockScoreMethod::kAntidiagonal) {
    score_antidiagonals(p);
  } else {
    score_means(p);
  }
}

}  // namespace longctx::cuda
